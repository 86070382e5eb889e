"""A whole layer: its simulation against the formulas, and ciphertexts against the simulation."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from refattn import InvalidInput, InvalidProblem, UnsupportedProblem, he, power_attention
from refattn.he.arithmetic import Counted, Levels
from refattn.he.layer import least_of
from refattn.he.linear import Arrangement, compiled
from refattn.he.polynomials import activation, inverse_sqrt
from refattn.he.weights import Feedforward, Weights

from .apart import apart
from .make import in_parts

TOLERANCE = 1e-4


@cache
def layer(n=8, d=16, heads=2, d_k=8, hidden=32, p=2, causal=False, classes=0, seed=0):
    """Return weights, tokens, and what the formulas give, with the stand-ins for activation and root."""
    rng = np.random.default_rng(seed)

    def normal(*shape, size=1.0):
        return rng.standard_normal(shape) * size

    x, d_v = normal(n, d), classes or d_k
    weights = [normal(heads, d, c, size=1 / math.sqrt(d)) for c in (d_k, d_k, d_v)]
    biases = [normal(heads, n, c, size=0.3) for c in (d_k, d_k, d_v)]
    q, k, v = ((np.einsum("nd,hdc->hnc", x, w) + b)[None] for w, b in zip(weights, biases, strict=True))
    epsilon, scale = 2.0, 1 / math.sqrt(d_k)
    more = {"causal": "bottom_right"} if causal else {}
    a = power_attention(q, k, v, p=p, epsilon=epsilon, **more)[0]
    seen = np.tril(np.ones((n, n))) if causal else np.ones((n, n))
    sums = ((scale * q[0] @ k[0].swapaxes(1, 2)) ** p * seen).sum(2) + epsilon
    given = (*weights, *biases, p, epsilon, scale, (max(epsilon, 0.95 * sums.min()), 1.05 * sums.max()), causal)
    if classes:
        bias = normal(classes)
        return Weights(*given, bias), x, a.sum(0).mean(0) + bias
    out, out_bias = normal(heads, d_k, d, size=1 / math.sqrt(d)), normal(d, size=0.1)
    y = x + np.einsum("hic,hcd->id", a, out) + out_bias
    square = (y**2).mean(1, keepdims=True) + 1e-5
    norm = inverse_sqrt(0.9 * square.min(), 1.1 * square.max(), 1e-2)
    up, up_bias = normal(d, hidden, size=1 / math.sqrt(d)), normal(hidden, size=0.1)
    u = (y * norm(square)) @ up + up_bias
    act = activation("gelu", 1.05 * np.abs(u).max(), 3e-2)
    down, down_bias = normal(hidden, d, size=1 / math.sqrt(hidden)), normal(d, size=0.1)
    then = Feedforward(out, out_bias, norm, 1e-5, up, up_bias, act, down, down_bias)
    return Weights(*given, then), x, y + act(u) @ down + down_bias


SIZES = {
    "block": {},
    "causal block, sizes that fill nothing": {"n": 7, "d": 10, "heads": 3, "d_k": 4, "hidden": 13, "causal": True},
    "p = 4": {"n": 8, "d": 8, "heads": 1, "hidden": 16, "p": 4},
    "the size of a small model": {"n": 16, "d": 64, "heads": 4, "d_k": 16, "hidden": 256},
    "scores": {"n": 16, "d": 4, "heads": 4, "d_k": 16, "classes": 10},
    "causal scores, more features": {"n": 11, "d": 30, "heads": 3, "d_k": 7, "classes": 3, "causal": True},
}


@cache
def planned(name, upload="full"):
    """Return a layer, tokens and what the formulas give; several tests ask for one."""
    weights, x, expected = layer(**SIZES[name])
    return he.Layer(weights, TOLERANCE, upload), x, expected


@pytest.mark.parametrize("name", SIZES)
def test_the_simulation_is_the_formulas(name):
    made, x, expected = planned(name)
    # the polynomial for 1/D is all that differs: its relative error passes on to all that follows
    slack = 300 * made.inverse.relative_error * np.abs(expected).max()
    assert made.inverse.relative_error <= TOLERANCE
    assert np.abs(made.simulate(x) - expected).max() <= slack
    assert made.plan.outs == 1


@pytest.mark.parametrize(
    ("sizes", "queries", "parts"),
    [
        ({"n": 5, "d": 6, "d_k": 4, "hidden": 8, "causal": True}, 2, 3),  # the last part is not full
        ({"n": 7, "d": 6, "heads": 3, "d_k": 4, "classes": 3, "causal": True}, 4, 2),
    ],
)
def test_queries_in_parts_are_the_formulas(sizes, queries, parts, monkeypatch):
    weights, x, expected = layer(**sizes)
    in_parts(monkeypatch, queries)
    made = he.Layer(weights, TOLERANCE)
    assert (made.plan.query_parts, made.plan.outs) == (parts, 1 if "classes" in sizes else parts)
    slack = 300 * made.inverse.relative_error * np.abs(expected).max()
    assert np.abs(made.simulate(x) - expected).max() <= slack
    assert made.plan.digest != replace(made.plan, layout=replace(made.plan.layout, queries=8)).digest


def test_more_tokens_than_a_ciphertext_has_room_for():
    """64 tokens of 64 features: 8 parts of 8 queries; half as many tokens come in 2 of 16."""
    hidden = Feedforward(*3 * [None], 0.0, np.zeros((64, 256)), *3 * [None], None)

    def weights(n, then):
        return Weights(*3 * [np.zeros((4, 64, 16))], *3 * [np.zeros((4, n, 16))], 2, 2.0, 1.0, (2.0, 3.0), False, then)

    for n, queries in ((16, 16), (32, 16), (64, 8), (128, 4)):
        found = least_of(weights(n, hidden))
        assert (found.queries, found.keys, found.slots) == (queries, n, 16384 if n > 16 else 8192)
    with pytest.raises(UnsupportedProblem, match=r"needs 262144 slots, and no ring .* has more than 16384: take fewer"):
        he.Layer(weights(512, np.zeros(16)))


@pytest.mark.parametrize(
    ("name", "upload", "workers"),
    [("scores", "full", 1), ("causal scores, more features", "full", 2), ("scores", "whole", 1)],
)
def test_encrypted_scores_are_the_simulation(name, upload, workers):
    pytest.importorskip("tenseal")
    weights, x, _ = layer(**SIZES[name])
    compare(he.Layer(weights, 1e-2, upload), x, workers)


def test_an_encrypted_block_is_the_simulation(monkeypatch):
    """In full ciphertexts: whole ones are opened before anything is computed, as those of scores are.

    The hidden features are more than a row of slots holds, and the queries come in two parts.
    """
    pytest.importorskip("tenseal")
    in_parts(monkeypatch, 2)
    weights, x, _ = layer(4, 2, 1, 2, 8, seed=1)
    compare(he.Layer(weights, 5e-2), x)


def test_a_block_of_whole_ciphertexts_computes_the_same():
    weights, x, _ = layer(4, 8, 1, 8, 12, seed=1)
    full, whole = (he.Layer(weights, 5e-2, upload).simulate(x) for upload in ("full", "whole"))
    # the order of sums differs: some thousand (2**12) roundings of 2**-52 each
    assert np.abs(full - whole).max() <= 2.0**-40 * np.abs(full).max()


@apart
def compare(made, x, workers=1):
    """Ask a server, and compare what it says with the simulation."""
    client = he.Client(made.plan)
    with he.Server(made, client.evaluation_keys(), workers) as server:
        query = client.encrypt(x)
        out = client.decrypt(server.attend(query))
    assert np.abs(out - made.simulate(x)).max() <= 1e-5 * np.abs(out).max()
    assert 0.8 <= len(query) / made.plan.upload_bytes <= 1.25


def test_whole_ciphertexts_save_the_server_time_and_rotations():
    full, whole = (planned("the size of a small model", upload)[0].plan for upload in ("full", "whole"))
    assert whole.upload_bytes > 2 * full.upload_bytes
    assert whole.predicted_ms() < 0.9 * full.predicted_ms()
    assert len(whole.rotations) <= len(full.rotations)
    assert whole.digest != full.digest
    with pytest.raises(InvalidInput, match="upload: got 'compact', expected one of full, whole for a layer"):
        he.Layer(layer()[0], 1e-2, "compact")


def test_the_plan_holds_no_weights_and_counts_what_runs():
    weights, _, _ = layer()
    other, _, _ = layer(seed=0)
    a, b = he.Layer(weights, 1e-2), he.Layer(other, 1e-2)
    assert a.plan.digest == b.plan.digest
    levels = Levels()
    parts = [Counted(a.plan.ring.levels + 1)] * (2 * a.plan.copies) + [Counted(a.plan.residual_limbs)]
    (out,) = a.compute(levels, (), parts)
    assert out.limbs == 1
    assert levels.counts == a.plan.counts
    assert sum(a.plan.levels.values()) == a.plan.ring.levels
    assert sum(a.plan.ring.bits) <= 881


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"key": np.zeros((2, 16, 7))}, InvalidInput, r"key: got shape \(2, 16, 7\), expected \(2, 16, 8\)"),
        ({"p": 3}, InvalidInput, "p: got 3, expected one of 2, 4, 6, 8"),
        ({"epsilon": 1e9}, InvalidInput, "epsilon: got 1000000000.0, expected from 0 to the least denominator"),
        ({"denominator": (2.0, 1e9)}, UnsupportedProblem, "no ring at 128 bits of security has .* the levels"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, error, text):
    weights, _, _ = layer()
    with pytest.raises(error, match=text):
        he.Layer(replace(weights, **change), 1e-3)


def test_tokens_that_do_not_fit_are_refused():
    weights, x, _ = layer(**SIZES["scores"])
    client_side = he.Layer(weights).plan
    with pytest.raises(InvalidProblem, match=r"x: got shape \(16, 3\), expected \(16, 4\)"):
        client_side.encoded(x[:, :3])
    x = x.copy()
    x[0, 0] = np.nan
    with pytest.raises(InvalidProblem, match="x: has numbers that are not finite"):
        client_side.encoded(x)
    with pytest.raises(UnsupportedProblem, match="hidden features do not fit 8 tokens' slots, which hold 1536"):
        he.Layer(layer(hidden=1600)[0])


def test_a_map_that_misses_a_feature_is_refused():
    slots = np.arange(8)
    held = Arrangement(slots * 0, slots)
    with pytest.raises(UnsupportedProblem, match="do not bring all features together"):
        compiled([held], held, slots, np.ones((8, 8), complex), ((1, 2), (4, 1)))
    weights = slots[:, None] + 10 * slots[None, :]
    made = compiled([held], held, slots, weights + 0j, ((1, 2), (2, 4)))
    from refattn.he.arithmetic import Numbers

    x = np.arange(8) ** 2.0
    expected = x @ weights
    np.testing.assert_allclose(made.apply(Numbers(), [x]).real, expected)
