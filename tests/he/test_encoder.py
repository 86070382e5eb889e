"""Several blocks: the simulation against the formulas, and ciphertexts with refreshes against the simulation."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from refattn import InvalidInput, InvalidProblem, Problem, UnsupportedProblem, he, power_attention
from refattn.he.device.trace import trace_of
from refattn.he.noise import Ring
from refattn.he.plausible import Size, Sizes
from refattn.he.polynomials import activation, inverse_sqrt
from refattn.he.saved import load_weights, save_weights
from refattn.he.service import Remote
from refattn.he.weights import EncoderWeights, Feedforward, Weights

from .apart import apart
from .make import in_parts
from .relay import plan


@cache
def encoder(n=4, d=8, heads=1, hidden=8, blocks=2, classes=3, p=2, seed=0, tolerance=5e-2):
    """Return an encoder's weights, tokens, and what the formulas give with the stand-ins."""
    rng = np.random.default_rng(seed)

    def normal(*shape, size=1.0):
        return rng.standard_normal(shape) * size

    x = normal(n, d)
    made, y, d_k = [], x, d // heads
    for k in range(blocks):
        square = (y**2).mean(1, keepdims=True) + 1e-5
        first = inverse_sqrt(0.8 * square.min(), 1.2 * square.max(), tolerance)
        z = y * (first(square) if k else 1 / np.sqrt(square))
        maps = [normal(heads, d, d_k, size=1 / math.sqrt(d)) for _ in range(3)]
        biases = [normal(heads, n, d_k, size=0.3) for _ in range(3)]
        q, key, v = ((np.einsum("nd,hdc->hnc", z, w) + b)[None] for w, b in zip(maps, biases, strict=True))
        a = power_attention(q, key, v, p=p, epsilon=2.0)[0]
        sums = ((q[0] @ key[0].swapaxes(1, 2) / math.sqrt(d_k)) ** p).sum(2) + 2.0
        out, out_bias = normal(heads, d_k, d, size=1 / math.sqrt(d)), normal(d, size=0.1)
        y = y + np.einsum("hic,hcd->id", a, out) + out_bias
        square = (y**2).mean(1, keepdims=True) + 1e-5
        norm = inverse_sqrt(0.8 * square.min(), 1.2 * square.max(), tolerance)
        up, up_bias = normal(d, hidden, size=1 / math.sqrt(d)), normal(hidden, size=0.1)
        u = (y * norm(square)) @ up + up_bias
        act = activation("gelu", 1.2 * np.abs(u).max(), tolerance)
        down, down_bias = normal(hidden, d, size=0.5 / math.sqrt(hidden)), normal(d, size=0.1)
        then = Feedforward(out, out_bias, norm, 1e-5, up, up_bias, act, down, down_bias)
        y = y + act(u) @ down + down_bias
        ranges = (max(2.0, 0.95 * sums.min()), 1.05 * sums.max())
        made.append(
            Weights(*maps, *biases, p, 2.0, 1 / math.sqrt(d_k), ranges, False, then, 1e-5, first if k else None)
        )
    if not classes:
        return EncoderWeights(tuple(made)), x, y
    head, bias = normal(d, classes), normal(classes)
    return EncoderWeights(tuple(made), head, bias), x, y.mean(0) @ head + bias


SIZES = {
    "two blocks and scores": {},
    "three blocks, tokens": {"blocks": 3, "classes": 0},
    "one block, as many scores as fit": {"d": 10, "blocks": 1, "classes": 16, "hidden": 16},
    "sizes that fill nothing": {"n": 5, "d": 6, "heads": 3, "hidden": 7, "classes": 2},
    "p = 4": {"p": 4, "hidden": 4},
}


@pytest.mark.parametrize("name", SIZES)
def test_the_simulation_is_the_formulas(name):
    weights, x, expected = encoder(**SIZES[name])
    made = he.Encoder(weights, 1e-5 if SIZES[name].get("p") != 4 else 1e-3)
    # the polynomials for 1/D are all that differs: their relative errors pass on to all that follows
    slack = 300 * max(b.inverse.relative_error for b in made.stages) * np.abs(expected).max()
    assert np.abs(made.simulate(x) - expected).max() <= slack


@pytest.mark.parametrize("classes", [0, 3])
def test_queries_in_parts_are_the_formulas(classes, monkeypatch):
    """Three parts of two queries, of which the last has one."""
    in_parts(monkeypatch, 2)
    weights, x, expected = encoder(n=5, d=4, hidden=4, classes=classes)
    made = he.Encoder(weights, 1e-4)
    plan = made.plan
    assert (plan.query_parts, plan.masked, plan.outs) == (3, 6, 1 if classes else 3)
    assert [len(plan.part_limbs(k)) for k in (0, 1)] == [4 * plan.copies + 3, 4 * plan.copies + 7]
    slack = 300 * max(b.inverse.relative_error for b in made.stages) * np.abs(expected).max()
    assert np.abs(made.simulate(x) - expected).max() <= slack
    alone = replace(plan, layout=replace(plan.layout, queries=8))
    assert plan.refresh_most == alone.refresh_most
    assert plan.report()["refresh_wrong_with_chance"] == 3 * alone.report()["refresh_wrong_with_chance"]
    assert plan.reply_most > 2.9 * alone.reply_most


@pytest.fixture(scope="module")
def small():
    """Return a small encoder's weights, its program and tokens: four layers."""
    # few levels and keys: this is about ciphertexts
    weights, x, _ = encoder(n=3, d=2, hidden=2, blocks=4, classes=2, tolerance=0.3, seed=1)
    return weights, he.Encoder(weights, 0.3), x


def test_four_encrypted_layers_are_the_simulation(small, served, tmp_path):
    """The server is another process, which has the weights from a file."""
    for package in ("tenseal", "httpx", "starlette", "uvicorn"):
        pytest.importorskip(package)
    weights, made, x = small
    expected, bound = made.simulate(x), he.noise_bound(made, x, 16)
    save_weights(weights, tmp_path / "w.npz")
    url = served(tmp_path / "w.npz", "--tolerance", "0.3")

    @apart
    def asked():
        with Remote(url) as server:
            plan = server.plan()
            assert plan.digest == made.plan.digest
            client = he.Client(plan)
            server.open(client.evaluation_keys())
            return client.ask(x, server.attend)

    out = asked()
    assert 0 < np.abs(out - expected).max() <= bound <= 1e-4 * np.abs(expected).max()


def test_the_noise_bound_is_that_of_the_draws():
    """Of a program whose noise is known: normal numbers, of deviations from 0 to 1."""
    deviations = np.linspace(0, 1, 50)

    class Known:
        def simulate(self, x, seed=None):
            noise = 0.0 if seed is None else np.random.default_rng(seed).standard_normal(50)
            return x + noise * deviations

    x, squares = np.ones(50), [0.0] * 50
    for i in range(40):
        drawn = np.random.default_rng(1000 * i).standard_normal(50)
        squares = [s + (d * z) ** 2 / 40 for s, d, z in zip(squares, deviations, drawn, strict=True)]
    t = (math.log(50 * 2**20) + 3) / 2
    bound = he.noise_bound(Known(), x, 40)
    assert abs(bound - 2 * t * math.sqrt(max(squares))) <= 1e-13 * bound  # float64's, of hundreds of operations
    assert bound > 2 * t  # the largest deviation's own draws, but for chance, which the seeds fix
    fresh = [np.abs(Known().simulate(x, seed=10**6 + i) - x).max() for i in range(50)]
    assert max(fresh) < bound
    for draws in (15, 16.0, True, 2**16 + 1):
        with pytest.raises(InvalidInput, match=r"draws: got .*, expected an integer from 16 to 65536"):
            he.noise_bound(Known(), x, draws)


def test_weights_of_encoders_survive_a_file(tmp_path):
    for classes in (0, 3):
        weights, _, _ = encoder(n=3, d=4, hidden=4, tolerance=0.3, classes=classes)
        save_weights(weights, tmp_path / "w.npz")
        again = load_weights(tmp_path / "w.npz")
        assert (again.head is None) == (not classes)
        for a, b in zip(weights.blocks, again.blocks, strict=True):
            np.testing.assert_array_equal(a.query, b.query)
            np.testing.assert_array_equal(a.then.down_bias, b.then.down_bias)
            assert (a.first, a.denominator, a.then.norm, a.then.activation, a.first_epsilon) == (
                b.first, b.denominator, b.then.norm, b.then.activation, b.first_epsilon,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda w: replace(w, blocks=()), InvalidInput, "blocks: got none, expected at least one"),
        (lambda w: replace(w, blocks=w.blocks[::-1]), InvalidInput, "number 1 has no polynomial for its first normali"),
        (lambda w: replace(w, blocks=(w.blocks[1],)), InvalidInput, "the first one's input is the client's"),
        (lambda w: replace(w, head_bias=None), InvalidInput, "head: got one of head and head_bias"),
        (lambda w: replace(w, head=w.head[:3]), InvalidInput, r"head: got shape \(3, 3\), expected \(4, classes\)"),
        (
            lambda w: replace(w, head_bias=w.head_bias[:2]),
            InvalidInput,
            r"head_bias: got shape \(2,\), expected \(3,\)",
        ),
        (
            lambda w: replace(w, head=np.ones((4, 99)), head_bias=np.ones(99)),
            UnsupportedProblem,
            "got 99 classes, at most 4 fit the tokens' slots",
        ),
        (
            lambda w: replace(w, blocks=(w.blocks[0], replace(w.blocks[1], then=np.ones(4)))),
            InvalidInput,
            "blocks: number 1 has no feed-forward part",
        ),
        (
            lambda w: replace(w, blocks=(encoder(d=8, hidden=4, tolerance=0.3)[0].blocks[0], w.blocks[1])),
            InvalidInput,
            "blocks: number 1 has sizes .* they must be alike",
        ),
        (
            lambda w: replace(w, blocks=tuple(replace(b, denominator=(2.0, 1e9)) for b in w.blocks)),
            UnsupportedProblem,
            "no ring at 128 bits of security has .* the levels that a block needs",
        ),
    ],
)
def test_blocks_that_do_not_fit_together_are_refused(change, error, text):
    weights, _, _ = encoder(n=3, d=4, hidden=4, tolerance=0.3)
    with pytest.raises(error, match=text):
        he.Encoder(change(weights), 1e-2)


def test_tokens_that_do_not_fit_are_refused():
    client_side = plan()
    for x, text in (
        (np.zeros((3, 4)), r"x: got shape \(3, 4\), expected \(3, 5\)"),
        (np.full((3, 5), np.nan), "x: has numbers that are not finite"),
        (Problem(*[np.ones((1, 1, 2, 2))] * 3), r"x: got a Problem, expected an array of shape \(3, 5\)"),
    ):
        with pytest.raises(InvalidProblem, match=text):
            client_side.encoded(x)
    with pytest.raises(InvalidInput, match="upload: got 'compact', expected one of full, whole for an encoder"):
        he.Encoder(encoder()[0], 1e-2, "compact")


def test_a_plan_for_a_gpu_has_fewer_ciphertexts():
    weights, _, _ = encoder(d=8, tolerance=0.3)
    plans = {device: he.Encoder(weights, 0.3, device=device).plan for device in ("cpu", "cuda")}
    most, least = (plans[device].loads().total() for device in ("cpu", "cuda"))
    assert least < most
    assert plans["cuda"].upload_bytes < plans["cpu"].upload_bytes
    assert plans["cuda"].predicted_ms() > plans["cpu"].predicted_ms()  # on a core
    with pytest.raises(InvalidInput, match="device: got 'tpu', expected 'cpu' or 'cuda'"):
        he.Encoder(weights, 0.3, device="tpu")


def test_scales_are_those_that_a_device_writes_down(small):
    """Primes are not quite powers of 2, and squares double what scales are off by: the plan says how far it goes."""
    _, made, _ = small
    plan, ring = made.plan, made.plan.ring
    for block, stage in zip(made.stages, range(4), strict=True):
        _, nodes = trace_of(made, stage)  # which decides scales as SEAL does
        parts = [Size(2.0**ring.middle, limbs) for limbs in plan.part_limbs(stage)]
        assert [x.scale for x in block.compute(Sizes(ring), (), parts)] == [x.scale for x in nodes]
        most = max(max(x.scale / 2.0**ring.middle, 2.0**ring.middle / x.scale) for x in nodes)
        assert 1 < most < plan.drift[stage == 3]
    assert plan.drift == (2.0, 2.0)
    wide = replace(plan, drift=(4.0, 8.0))  # as of 20 levels and small primes
    assert (wide.refresh_most, wide.digest == plan.digest) == (plan.refresh_most / 2, False)
    assert plan.refresh_error < wide.refresh_error < 2 * plan.refresh_error


def test_many_levels_of_small_primes_drift_and_are_planned_for():
    """Narrow ranges of long polynomials: 20 levels, the fewest bits; scales are then off by more than 2."""
    chain = Ring(32768, 52, 38, 60, 20)
    x = Size(2.0**38, 21)
    for _ in range(18):
        m = Sizes(chain)
        x = m.rescale(m.square(x))
    assert max(x.scale / 2.0**38, 2.0**38 / x.scale) > 3


def test_an_encoders_plan_says_what_a_refresh_promises(small):
    _, made, _ = small
    plan = made.plan
    report = plan.report()
    assert report["rounds"] == 4
    assert sum(plan.ring.bits) <= 881
    assert plan.refresh_most > 5
    assert plan.refresh_error < 1e-7
    assert "in 4 rounds" in plan.words()
    assert plan.part_limbs(1)[0] == plan.limbs[1][0]
    assert plan.loads().total() == sum(len(plan.part_limbs(k)) for k in range(4))
