"""Every claim holds and its control fails; a violated hypothesis is said; bounds are of what was measured."""

import json
import math
from collections import Counter
from fractions import Fraction

import flint
import numpy as np
import pytest
from click.testing import CliRunner

from refattn import VARIANTS
from refattn.cli.main import main
from refattn.errors import HypothesisViolated, InvalidInput
from refattn.functions.costs import context_of_equal_cost, hbm_bytes, keys_read, standard_io
from refattn.rules import causal, prefix, window
from refattn.theory import CLAIMS, Claim, Evidence, io_loops, run
from refattn.theory.claim import judged, same, worst
from refattn.theory.counting import Memory, Slow, held, plain
from refattn.theory.counting import counted as counted_array
from refattn.theory.decisions import _condition, _problem
from refattn.theory.fields import disjoint, meet, over, precise
from refattn.theory.flash_io import counted
from refattn.theory.hyper import spread
from refattn.theory.plots import figure
from refattn.theory.reach import of_layers, of_mask, of_offsets
from refattn.theory.tracing import Traced

# claims that speak of some things only, and what they do not speak of
VIOLATED = {
    "flash-io": ({"grid": ((64, 8, 43),)}, "M from 5·d + 4 to 5·N·d, got M = 43"),
    "flash-io-lower": ({"sizes": ((16, 8, 4),)}, "M of at least 5 words"),
    "flash-io-block-sparse": ({"n": 61}, "that divide n = 61"),
    "triple-io": ({"grid": ((8, 3, 28),)}, "M of at least 8·d + 5 words, got M = 28"),
    "sparse-dropping": ({"selectors": {"none": lambda w, k: w < 0}}, "keeps a key of every row"),
    "quantised-inputs": ({"formats": ("int4",)}, "formats out of int8"),
    "quantised-weights": ({"levels": 0}, "at least one level"),
    "merge-associative": ({"sizes": (0,)}, "parts of at least one key"),
    "batch-invariance": ({"batches": (0,)}, "batches of at least one row"),
    "rank-collapse": ({"layers": 0}, "at least one layer"),
    "decoding-recurrence": ({"decay": 1}, "a decay in (0, 1)"),
    "decoding-eviction": ({"budgets": (0,)}, "a budget of at least one key"),
    "decoding-eviction-lightest": ({"budgets": (0,)}, "a budget of at least one key"),
    "decoding-quantised-cache": ({"formats": ("int4",)}, "formats out of int8"),
    "power-softmax-lipschitz": ({"size": 8}, "scores below p"),
    "power-softmax-range": ({"size": 8}, "scores below p"),
    "power-softmax": ({"size": 8}, "scores below p"),
    "bounded-degree": ({"places": ((0.0, 2),)}, "R > 0"),
    "bounded-rank": ({"n": 10}, "n > C(d+g, g)"),
    "bounded-near-linear": ({"entries": (0.0, 1.0)}, "c > 0"),
    "bounded-folds": ({"below": 1.25}, "more slowly than (log n)^(1/k)"),
    "log-sum-exp-rounding": ({"spread": 200.0}, "at which no exponential underflows"),
    "softmax-rounding": ({"spread": 200.0}, "at which no exponential underflows"),
    "online-rescale": ({"block": 0}, "blocks of at least one element"),
    "hyper-unbiased": ({"m": 0}, "at least one sample"),
    "hyper-rate": ({"sizes": (0, 1)}, "at least one sample"),
    "hyper-spectral": ({"size": 64}, "every row has an entry that is sampled"),
    "probing-folding": ({"heads": 4}, "heads that divide D = 6, got 4"),
    "rpe-constant": ({"same": False}, "all tokens are equal"),
    "single-layer-universal": ({"positions": False}, "positions are told"),
    "boltzmann-gap": ({"beyond": (-1.0,)}, "values more than 2·log n"),
    "virtual-node-wide": ({"alike": True}, "nodes that a direction keeps apart"),
    "virtual-node-deep": ({"separated": False}, "every node has a selector"),
    "decisions-layers": ({"counts": (0, 1)}, "at least one layer"),
    "decisions-accelerated": ({"kappas": (1.0,)}, "kappa > 1"),
    "decisions-root": ({"high": 8}, "a distance to I below 1"),
    "decisions-linucb": ({"rounds": 0}, "at least one round"),
    "decisions-thompson": ({"rounds": 0}, "at least one round"),
    "decisions-ucb-vi": ({"horizon": 0}, "at least one step"),
    "decisions-regret-growth": ({"starts": (0,)}, "at least one round"),
    "decisions-potential": ({"size": 2}, "at most unit norm"),
    "crate-descent": ({"steps": (Fraction(3, 2),)}, "steps s in (0, 1)"),
    "crate-descent-unit": ({"pairs": False}, "pairs of z and -z"),
    "crate-neumann": ({"size": 2.0}, "the series does not converge"),
    "crate-ista": ({"step": 2}, "eta up to"),
    "systems-selective": ({"a": -1.0}, "a > 0"),
    "systems-growing-state": ({"large": 8}, "the remainder is below 1"),
    "power-attention-reach": ({"layers": (12,)}, "is longer than n"),
    "block-reach": ({"own": False}, "every block attends to itself"),
    "combiner-support": ({"block": 7}, "blocks of 7 divide n = 12"),
    "lightning-chunks": ({"decay": 2.0}, "a decay in"),
    "kinetics-crossover": ({"intensities": (Fraction(-1),)}, "of at least 0"),
    "kinetics-keys": ({"grid": ((0, 1, 1),)}, "of at least 1"),
    "ecoformer-linear": ({"size": 2}, "codes of"),
    "match3-one-layer": ({"sizes": ((4, 9),)}, "that 3 does not divide"),
    "match3-pairwise": ({"shapes": ((4, 8),)}, "fewer than the universe's elements"),
}


# and their other hypotheses
VIOLATED_TOO = {
    "single-layer-universal": ({"beta": 0.0}, "heads that prefer the token"),
    "crate-descent": ({"size": 2}, "tokens of unit norm"),
    "match3-one-layer": ({"sizes": ((2, 7),)}, "at least three tokens"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_holds_and_its_control_fails(name):
    result = run(CLAIMS[name])
    assert result.holds, (result.measured, result.bound, result.what, result.violated)
    assert result.control_failed, result.control
    assert math.isfinite(result.measured)
    assert math.isfinite(result.bound)
    assert json.loads(json.dumps(result.to_json()))["name"] == name


@pytest.mark.parametrize(("name", "violated"), [*VIOLATED.items(), *VIOLATED_TOO.items()])
def test_a_violated_hypothesis_is_said(name, violated):
    options, text = violated
    assert CLAIMS[name].hypotheses
    result = run(CLAIMS[name], **options)
    assert not result.holds
    assert text in result.violated


def test_every_hypothesis_is_violated_in_a_test():
    counts = {n: (n in VIOLATED) + (n in VIOLATED_TOO) for n in CLAIMS}
    assert counts == {n: len(c.hypotheses) for n, c in CLAIMS.items()}


def test_every_claim_says_whose_it_is_and_the_conditional_one_of_what():
    for claim in CLAIMS.values():
        assert claim.statement
        assert claim.source
    assert [c.name for c in CLAIMS.values() if c.conditional_on] == ["bounded-near-linear", "bounded-folds"]
    assert "refutation has been claimed" in CLAIMS["bounded-near-linear"].conditional_on


def test_a_false_claim_and_a_control_that_holds_are_seen():
    def claim(check, control):
        return run(Claim("x", "", "", lambda: Evidence(*check, ""), lambda: Evidence(*control, "")))

    result = claim((2.0, 1.0), (0.0, 1.0))
    assert not result.holds
    assert not result.control_failed
    assert not claim((math.nan, 1.0), (2.0, 1.0)).holds
    assert claim((1, 1), (2, 1)).control_failed
    for nothing in (math.nan, math.inf):  # what overflowed does not fail for the claim's reason
        assert not claim((0, 1), (nothing, 1)).control_failed
    assert math.isnan(worst([(1, 2), (math.nan, 1), (3, 4)]))
    assert worst([(1, 2), (3, 4), (1, 4)]) == 3 / 4
    assert math.isnan(worst([(1, 2), (1, -4)]))  # nothing is within a bound below 0


def test_a_control_fails_only_where_all_of_it_does():
    unsure, vast = flint.arb(0.5, 10), flint.arb(0, math.inf)
    for measured in (unsure, vast, worst([(unsure, 1)]), worst([(vast, 1)]), worst([flint.arb(1, 0.5)])):
        evidence = Evidence(measured, flint.arb(1), "")
        assert not evidence.holds
        assert not evidence.fails
        assert not run(Claim("x", "", "", lambda: Evidence(0, 1, ""), lambda e=evidence: e)).control_failed
    assert Evidence(flint.arb(2, 0.5), 1, "").fails
    assert Evidence(worst([flint.arb(2, 0.5), flint.arb(1.75, 0.5)]), 1, "").fails
    assert not Evidence(1, math.inf, "").holds


def test_equalities_are_counted_apart_from_what_is_measured():
    found = judged([(1, 2), same(1, 2), 3 / 4, same(1, 1)], "")
    assert (found.measured, found.unequal, found.holds, found.fails) == (3 / 4, 1, False, False)
    assert judged([(1, 2), same(1, 1)], "").holds
    assert judged([(3, 2), same(1, 2)], "").fails
    with pytest.raises(TypeError, match="an equality is no ratio"):
        worst([(1, 2), same(1, 2)])


def test_a_condition_is_that_of_the_matrix():
    for kappa in (10, 1000):
        a, _, weight, _ = _problem(kappa)
        assert _condition(kappa) == pytest.approx(np.linalg.cond(a.T @ a + weight * np.eye(6)), rel=1e-9)


def test_balls_that_meet_are_of_ratio_one_only_where_they_are_known():
    with precise():
        third = flint.arb(1) / 3
        assert over(third, 1 / flint.arb(3)) == 1
        assert over(third, flint.arb(1)) < 1
        assert not over(flint.arb(1, 0.5), flint.arb(1)) <= 1


def test_balls_hold_only_where_all_of_them_do():
    assert Evidence(flint.arb(1), flint.arb(2), "").holds
    assert not Evidence(flint.arb(1, 0.5), flint.arb(1), "").holds
    assert not Evidence(flint.arb("nan"), flint.arb(1), "").holds


def test_what_is_not_a_number_meets_nothing():
    nan, one = flint.arb("nan"), flint.arb(1)
    assert meet(flint.arb(1, 0.5), one)
    assert not meet(nan, one)
    assert not meet(flint.arb(0, math.inf), one)
    assert disjoint(np.array([nan, one]), np.array([one, one])) == 1


def test_words_are_counted_and_tiles_compute_attention():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 37, 4))
    out, words, (rows, columns) = counted(q, k, v, 100)
    p = np.exp(q @ k.T)
    np.testing.assert_allclose(out, p @ v / p.sum(1, keepdims=True), atol=1e-13)
    assert (rows, columns) == (4, 4)
    assert words == 2 * 4 * 37 + 10 * 37 * (3 * 4 + 4)
    assert standard_io(37, 4).forward == 4 * 37 * 4 + 4 * 37 * 37
    assert hbm_bytes(1, 2, 1, 3, 5, 4) == 2 * 4 * (2 * 2 * 3 + 2 * 5) + 4 * 2 * 3


def test_instruments():
    fast, slow = Memory(5), Slow(np.arange(6.0))
    part = fast.load(slow, slice(0, 3))
    fast.store(slow, slice(3, 6), part)
    assert (fast.words, fast.peak, slow.data.tolist()) == (6, 3, [0, 1, 2, 0, 1, 2])
    with pytest.raises(MemoryError, match="6 words are held, 5 fit"):
        fast.new(3)
    fast.free(part)
    assert held((np.zeros((2, 3)), [1.0, {"a": np.zeros(4)}])) == 11
    tally = Counter()
    a, s = counted_array([2.0, 3.0], tally), counted_array([1, -1], tally, sign=True)
    assert (plain(a @ s), plain(a[0] / a[1]), a[0] > a[1], a[0] >= 2) == (-1.0, 2 / 3, False, True)
    assert plain((a[0] * a[1] - 1) * 2 + a[0] - 5) == 7.0
    assert tally == {"sign": 2, "add": 4, "divide": 1, "compare": 2, "multiply": 2}


def test_a_rounding_model_traces_what_its_operations_lose():
    with precise():
        x, y = Traced(3), Traced(5)
        product = x * y - x  # 15(1 + a) - 3, then (1 + b): 15 and 12
        assert product.error == 27
        assert product.may.contains(flint.arb(12) * (1 + flint.arb(2) ** -24))
        assert (x - x).error == 0
        assert (x - x).exp().error == 0
        assert (x / y).error.overlaps(flint.arb(3) / 5)


def test_calculators_of_the_users_own_numbers():
    q = np.zeros((8, 3))
    assert spread(q, q, 1.0) == pytest.approx((1.0, 1.0))  # uniform
    with pytest.raises(InvalidInput, match=r"spread: got shapes \(8, 3\) and \(8, 2\)"):
        spread(q, np.zeros((8, 2)), 1.0)
    assert keys_read(10, 3, 4) == 4 + 5 + 6 + 7
    assert keys_read(5, 3, 4) == 4 + 5 + 5 + 5
    with pytest.raises(InvalidInput, match="budget: got 0"):
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


def test_layers_may_have_masks_of_their_own():
    """A window of two, then a full layer, or the other way round: the last token hears all; the first row differs."""
    near, full = causal() & window(1, 0), np.tri(6, dtype=bool)
    assert (of_layers([near] * 2, 6) == of_mask(near.dense(6, 6), 2)).all()
    for masks in ([near, full], [full, near]):
        assert (of_layers(masks, 6) == full).all()
    skip, back = of_offsets([3], 6), of_offsets([1], 6)
    heard = [np.flatnonzero(of_layers(x, 6)[5]).tolist() for x in ([skip, back], [back, skip], [])]
    assert heard == [[1, 2, 4, 5], [1, 2, 4, 5], [5]]
    late = np.zeros((6, 6), bool)
    late[5, 4] = True  # heard by the last token alone: what token 4 hears before counts, what it hears later does not
    assert [np.flatnonzero(of_layers(x, 6)[5]).tolist() for x in ([skip, late], [late, skip])] == [
        [1, 2, 4, 5],
        [2, 4, 5],
    ]
    with pytest.raises(InvalidInput, match=r"^reach: got bool \(5, 5\) at layer 1, expected \(6, 6\) bools$"):
        of_layers([near, np.tri(5, dtype=bool)], 6)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: of_layers(None, 3), "masks: got NoneType, expected a list of masks, one for each layer"),
        (lambda: of_layers([causal()], -1), "n: got -1, expected a whole number"),
        (lambda: of_layers([prefix([1, 2])], 3), "reach: layer 0 is made for 2 items and 1 heads"),
        (lambda: of_mask(np.eye(3, dtype=bool), None), "layers: got None, expected a whole number"),
        (lambda: of_offsets("x", 3), "offsets: got <U1, expected integers"),
        (lambda: of_offsets([0], 1.5), "n: got 1.5, expected a whole number"),
    ],
)
def test_what_has_no_reach_is_said(make, text):
    with pytest.raises(InvalidInput, match=f"^{text}"):
        make()


def test_what_flash_computes_after_its_loads_is_stored():
    q, k, v = np.random.default_rng(1).standard_normal((3, 12, 2))
    stored = []

    class Watched(Memory):
        def store(self, x, at, part):
            super().store(x, at, part)
            stored.append(x)

    real, io_loops.Memory = io_loops.Memory, Watched
    try:
        out, _, _ = io_loops.flash(q, k, v, 60)
    finally:
        io_loops.Memory = real
    assert any(x.data is out for x in stored)  # not a quotient of what was stored


def test_a_plot_has_a_line_for_each_model():
    found = run(CLAIMS["kinetics-crossover"])
    lines = figure(found).axes[0].lines
    assert [line.get_label() for line in lines] == [f"context, {x}e9 parameters" for x in ("0.752", "8.19")]
    assert all((np.diff(line.get_xdata()) > 0).all() for line in lines)
    for name in ("flash-io", "triple-io"):
        lines = figure(run(CLAIMS[name])).axes[0].lines
        assert len(lines) == len(set(run(CLAIMS[name]).detail["series"]))


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


OTHERS = ("nsa", "seer")
"""One that chooses keys and is no softmax over these alone, and one whose calls have as many rows as keys."""


def test_every_operator_over_a_mask_is_held_and_leaves_keys_out():
    shares = CLAIMS["sparse-operators"].check().detail["largest dropped share"]
    assert set(shares) >= {"block_sparse", "power_blocks", "neighborhood", "titans_mac", "moba", "topk"}
    assert min(shares.values()) > 0
    shapes = {name: type(v.shape).__name__ for name, v in VARIANTS.items() if name not in OTHERS}
    assert set(shares) == {name for name, shape in shapes.items() if shape in ("Lowered", "Selected")}


def test_needs_raises():
    with pytest.raises(HypothesisViolated, match="blocks of 5 divide n = 12"):
        CLAIMS["combiner-support"].check(block=5)
