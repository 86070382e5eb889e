"""Every claim holds and its control fails; a violated hypothesis is said; bounds are of what was measured."""

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner

from refattn.cli.main import main
from refattn.errors import HypothesisViolated, InvalidInput
from refattn.theory import CLAIMS, Claim, Evidence, run
from refattn.theory.flash_io import counted, hbm_bytes, standard
from refattn.theory.hyper import spread
from refattn.theory.kinetics import context_of_equal_cost, keys_read
from refattn.theory.reach import of_mask, of_offsets

# claims that speak of some things only, and what they do not speak of
VIOLATED = {
    "flash-io": ({"memory": 3}, "M from d to N·d, got M = 3"),
    "bounded-degree": ({"errors": (2.0,)}, "an error between 0 and 1"),
    "log-sum-exp-rounding": ({"spread": 200.0}, "at which no exponential underflows"),
    "softmax-rounding": ({"spread": 200.0}, "at which no exponential underflows"),
    "online-rescale": ({"block": 0}, "blocks of at least one element"),
    "hyper-rate": ({"sizes": (1, 2)}, "at least 8 samples"),
    "rpe-constant": ({"same": False}, "all tokens are equal"),
    "single-layer-universal": ({"positions": False}, "positions are told"),
    "boltzmann-gap": ({"delta": 1.0}, "values more than 2·log n"),
    "virtual-node-wide": ({"degrees": (1,)}, "a degree whose remainder"),
    "virtual-node-deep": ({"separated": False}, "every node has a selector"),
    "decisions-accelerated": ({"kappas": (1.0,)}, "kappa > 1"),
    "crate-neumann": ({"size": 5.0}, "the series does not converge"),
    "crate-ista": ({"step": 2.0}, "eta up to"),
    "systems-selective": ({"a": -1.0}, "a > 0"),
    "power-attention-reach": ({"layers": (12,)}, "is longer than n"),
    "combiner-support": ({"block": 7}, "blocks of 7 divide n = 64"),
    "lightning-chunks": ({"decay": 2.0}, "a decay in"),
    "kinetics-keys": ({"grid": ((0, 1, 1),)}, "of at least 1"),
    "ecoformer-linear": ({"codes": "real"}, "codes of"),
    "match3-one-layer": ({"sizes": ((0, 5),)}, "at least one token"),
    "match3-pairwise": ({"heads": 4, "width": 8}, "fewer than the elements"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_holds_and_its_control_fails(name):
    result = run(CLAIMS[name])
    assert result.holds, (result.measured, result.bound, result.what, result.violated)
    assert result.control_failed, result.control
    assert math.isfinite(result.measured)
    assert json.loads(json.dumps(result.to_json()))["name"] == name


@pytest.mark.parametrize("name", VIOLATED)
def test_a_violated_hypothesis_is_said(name):
    options, text = VIOLATED[name]
    assert CLAIMS[name].hypotheses
    result = run(CLAIMS[name], **options)
    assert not result.holds
    assert text in result.violated


def test_every_claim_says_whose_it_is_and_the_conditional_one_of_what():
    for claim in CLAIMS.values():
        assert claim.statement
        assert claim.source
    assert [c.name for c in CLAIMS.values() if c.conditional_on] == ["bounded-near-linear"]
    assert "refutation has been claimed" in CLAIMS["bounded-near-linear"].conditional_on


def test_a_false_claim_and_a_control_that_holds_are_seen():
    false = Claim("x", "", "", lambda: Evidence(2.0, 1.0, ""), lambda: Evidence(0.0, 1.0, ""))
    result = run(false)
    assert not result.holds
    assert not result.control_failed
    assert not run(Claim("x", "", "", lambda: Evidence(math.nan, 1.0, ""), lambda: Evidence(2.0, 1.0, ""))).holds


def test_words_are_counted_and_tiles_compute_attention():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 37, 4))
    out, words, (rows, columns) = counted(q, k, v, 100)
    p = np.exp(q @ k.T)
    np.testing.assert_allclose(out, p @ v / p.sum(1, keepdims=True), atol=1e-13)
    assert (rows, columns) == (4, 7)
    assert words == 2 * 4 * 37 + 6 * 37 * (3 * 4 + 4)
    assert standard(37, 4) == 4 * 37 * 4 + 4 * 37 * 37
    assert hbm_bytes(1, 2, 1, 3, 5, 4) == 2 * 4 * (2 * 2 * 3 + 2 * 5) + 4 * 2 * 3


def test_calculators_of_the_users_own_numbers():
    q = np.zeros((8, 3))
    assert spread(q, q, 1.0) == pytest.approx((1.0, 1.0))  # uniform
    with pytest.raises(InvalidInput, match=r"spread: got shapes \(8, 3\) and \(8, 2\)"):
        spread(q, np.zeros((8, 2)), 1.0)
    assert keys_read(10, 3, 4) == 4 + 5 + 6 + 7
    assert keys_read(5, 3, 4) == 4 + 5 + 5 + 5
    with pytest.raises(InvalidInput, match="keys_read: got budget 0"):
        keys_read(0, 3, 4)
    assert round(context_of_equal_cost(0.752e9, 28, 16, 8, 128)) == 23  # Qwen3-0.6B
    mask = np.zeros((5, 5), bool)
    mask[1, 0] = mask[2, 1] = True
    assert of_mask(mask, 1)[2].tolist() == [False, True, True, False, False]
    assert of_mask(mask, 2)[2].tolist() == [True, True, True, False, False]
    assert (
        of_offsets([0, 2], 4).tolist()
        == np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]], bool).tolist()
    )
    with pytest.raises(InvalidInput, match="reach: got float64"):
        of_mask(np.zeros((2, 2)), 1)


def test_the_command_line(tmp_path):
    runner = CliRunner()
    listed = runner.invoke(main, ["theory", "list"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in CLAIMS)
    path = tmp_path / "evidence.json"
    names = ["lightning-chunks", "power-attention-reach"]
    done = runner.invoke(main, ["theory", "run", *names, "--json", str(path), "--plots", str(tmp_path / "plots")])
    assert done.exit_code == 0, done.output
    claims = json.loads(path.read_text())["claims"]
    assert [c["name"] for c in claims] == names
    assert {"name", "holds", "control_failed", "measured", "bound", "seconds"} <= set(claims[0])
    assert [p.name for p in (tmp_path / "plots").iterdir()] == ["power-attention-reach.png"]
    for given, text in (
        (["nothing"], "theory: got 'nothing', expected one of flash-io"),
        ([], "give names of claims, or --all"),
        (["lightning-chunks", "--json", "no/such/x.json"], "its folder does not exist"),
    ):
        failed = runner.invoke(main, ["theory", "run", *given])
        assert failed.exit_code != 0
        assert text in failed.output + str(failed.exception)


def test_needs_raises():
    with pytest.raises(HypothesisViolated, match="blocks of 3 divide n = 64"):
        CLAIMS["combiner-support"].check(block=3)
