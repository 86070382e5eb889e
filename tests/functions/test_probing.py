"""Poolings against torch's attention, against loops in 40 digits, and folding on integers, exactly."""

import re
from fractions import Fraction

import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.functions.probing import abmilp_pool, fold_cross_attention, multi_query_pool, simpool
from tests.functions.rounding import softmax_error, unit


def call(seed, n=6, d=8, m=4, d_out=1, lead=(2,), dtype="float64"):
    rng = np.random.default_rng(seed)
    shapes = ((*lead, n, d), (m, d), (d // d_out, d))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def softmax(scores):
    powers = [mpmath.exp(s) for s in scores]
    return [p / sum(powers) for p in powers]


def wide(x):
    """Return numbers with 40 digits, exactly."""
    return np.frompyfunc(lambda a: mpmath.mpf(float(a)), 1, 1)(x)


def projected(bound, w):
    """Return the bound of a sum over D features that are off by a bound, with its own D roundings: twice the sum."""
    return 2 * w.shape[-1] * float(np.abs(w).max()) * bound


@pytest.mark.parametrize(("m", "d_out"), [(4, 1), (1, 1), (2, 2), (8, 1)])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_pooling_is_the_mean_of_projected_tokens(m, d_out, kind):
    """Values are projected first here, token by token."""
    x, queries, w_v = call(0, m=m, d_out=d_out)
    make = {"numpy": np.asarray, "torch": torch.asarray}[kind]
    found = multi_query_pool(make(x), make(queries), make(w_v), d_out)
    assert type(found) is type(make(x))
    with mpmath.workdps(40):
        for b in range(2):
            tokens, values = wide(x[b]), wide(x[b]) @ wide(w_v).T
            width, due = len(w_v) // m, []
            for i in range(m):
                p = softmax(list(tokens @ wide(queries[i]) / mpmath.sqrt(8)))
                due += [sum(p[t] * values[t, i * width + c] for t in range(6)) for c in range(width)]
            bound, _ = softmax_error(queries, x[b], x[b], 8**-0.5, unit("float64"))
            assert max(abs(float(f) - e) for f, e in zip(found[b], due, strict=True)) <= projected(bound, w_v)


def test_other_libraries_give_the_same():
    x, queries, w_v = call(1, dtype="float32")
    found = multi_query_pool(*(jnp.asarray(a) for a in (x, queries, w_v)))
    due = multi_query_pool(x.astype(float), queries.astype(float), w_v.astype(float))
    bound, _ = softmax_error(queries, x, x, 8**-0.5, unit("float32"))
    assert abs(np.asarray(found) - due).max() <= 2 * projected(bound, w_v)


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_folded_queries_are_torchs_attention(heads):
    torch.manual_seed(heads)
    d = 8
    layer = torch.nn.MultiheadAttention(d, heads, batch_first=True, dtype=torch.float64)
    for bias in (layer.in_proj_bias, layer.out_proj.bias):
        torch.nn.init.normal_(bias)
    u, x = torch.randn(d, dtype=torch.float64), torch.randn(3, 5, d, dtype=torch.float64)
    (w_q, w_k, w_v), (b_q, b_k, b_v) = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    with torch.no_grad():
        due = layer(u.expand(3, 1, d), x, x, need_weights=False)[0][:, 0]
        folded = fold_cross_attention(u, w_q, w_k, heads, b_q)
        found = layer.out_proj(multi_query_pool(x, folded, w_v) + b_v)
        # the scores before folding: sums of d products twice, so of magnitudes |W_q||u| + |b_q| and |W_k||x| + |b_k|
        a, b = w_q.abs() @ u.abs() + b_q.abs(), x.abs() @ w_k.abs().T + b_k.abs()
        bound, _ = softmax_error(a.numpy()[None], b.numpy().reshape(-1, d), b.numpy(), 1, 2 * (d + 2) * unit("float64"))
        values = x.abs() @ w_v.abs().T + b_v.abs()
        most = d * float(layer.out_proj.weight.abs().max()) * float(values.max()) * bound / float(b.max())
    assert float((found - due).abs().max()) <= 2 * most
    assert folded.shape == (heads, d)


def test_folding_is_exact_on_integers():
    """D = 16 and 4 heads: roots of powers of 4, so that float64 rounds nothing; scores are equal as fractions."""
    rng = np.random.default_rng(2)
    d, heads, n = 16, 4, 5
    u, w_q, w_k, x = (rng.integers(-4, 5, shape).astype(float) for shape in ((d,), (d, d), (d, d), (n, d)))
    folded = fold_cross_attention(u, w_q, w_k, heads)
    whole = [np.frompyfunc(lambda a: Fraction(float(a)), 1, 1)(a) for a in (folded, u, w_q, w_k, x)]
    for m in range(heads):
        part = slice(m * d // heads, (m + 1) * d // heads)
        scores = whole[4] @ whole[0][m] / Fraction(4)
        due = (whole[4] @ whole[3].T)[:, part] @ (whole[2] @ whole[1])[part] / Fraction(2)
        assert (scores == due).all()
    assert folded.size < w_q.size + w_k.size + u.size


def test_heads_of_a_query_are_more_queries():
    """What the code's num_heads would be: identities fold a query into one for each slice of features."""
    u = np.arange(1.0, 9.0)
    folded = fold_cross_attention(u, np.eye(8), np.eye(8), 4)
    assert (folded == 2 * np.kron(np.eye(4), [1, 1]) * u).all()


def normalised(x, epsilon):
    """Return layer norm with 40 digits."""
    rows = []
    for row in wide(x):
        mean = sum(row) / len(row)
        variance = sum((a - mean) ** 2 for a in row) / len(row)
        rows.append((row - mean) / mpmath.sqrt(variance + epsilon))
    return np.array(rows)


@pytest.mark.parametrize("gamma", [None, 1.25, 2.0])
@pytest.mark.parametrize("make", [np.asarray, torch.asarray])
def test_simpool_is_its_formula(gamma, make):
    rng = np.random.default_rng(3)
    x, w_q, w_k = rng.standard_normal((2, 5, 4)), rng.standard_normal((4, 4)), rng.standard_normal((4, 4))
    found = simpool(make(x), make(w_q), make(w_k), gamma=gamma)
    with mpmath.workdps(40):
        for b in range(2):
            tokens = wide(x[b])
            normal = normalised(x[b], mpmath.mpf(1e-6))
            asked = wide(w_q) @ (sum(tokens) / 5)
            p = softmax(list(normal @ wide(w_k).T @ asked / 2))
            if gamma is None:
                due = [sum(p[t] * normal[t, c] for t in range(5)) for c in range(4)]
            else:
                raised = (normal - normal.min() + mpmath.mpf(1e-6)) ** mpmath.mpf(gamma)
                due = [sum(p[t] * raised[t, c] for t in range(5)) ** (1 / mpmath.mpf(gamma)) for c in range(4)]
            # LN's features are at most 2 = sqrt(D) and off by 16 u / (deviation) or less; then scores and softmax
            size = (
                4 * np.abs(w_q).max() * np.abs(x[b]).max() * np.ones((1, 4)),
                2 * 4 * np.abs(w_k).max() * np.ones((5, 4)),
            )
            off = 16 * max(1, 1 / float(np.std(x[b], -1).min())) * unit("float64")
            bound, _ = softmax_error(*size, 2 * np.ones((5, 4)), 0.5, 2 * off)
            assert max(abs(float(f) - e) for f, e in zip(found[b], due, strict=True)) <= 4 * bound


def test_simpool_of_an_example_does_not_depend_on_others():
    rng = np.random.default_rng(4)
    x, w = rng.standard_normal((3, 5, 4)), np.eye(4)
    together = simpool(x, w, w, gamma=2.0)
    for b in range(3):
        assert (simpool(x[b : b + 1], w, w, gamma=2.0)[0] == together[b]).all()


def test_abmilp_is_its_formula():
    rng = np.random.default_rng(5)
    x, w, b, score = (rng.standard_normal(shape) for shape in ((2, 5, 4), (3, 4), (3,), (3,)))
    found = abmilp_pool(x, w, b, score)
    with mpmath.workdps(40):
        for at in range(2):
            hidden = wide(x[at]) @ wide(w).T + wide(b)
            p = softmax([sum(c * mpmath.tanh(h) for c, h in zip(wide(score), row, strict=True)) for row in hidden])
            due = [sum(p[t] * wide(x[at])[t, c] for t in range(5)) for c in range(4)]
            # hidden features are off by 6 roundings of their terms and 2 of tanh, whose slope is at most 1
            off = (np.abs(x[at]) @ np.abs(w).T + np.abs(b)).max() * 6 + 2
            bound, _ = softmax_error(
                off * np.ones((1, 3)), np.abs(score)[None] * np.ones((5, 3)), x[at], 1, unit("float64")
            )
            assert max(abs(float(f) - e) for f, e in zip(found[at], due, strict=True)) <= bound


def test_gradient_passes():
    x, queries, w_v = (torch.asarray(a) for a in call(6, n=3, d=4, m=2, lead=()))
    queries.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: multi_query_pool(x, q, w_v), queries)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": np.zeros(8)}, "x: shape is (8,), expected (..., tokens, D), each at least 1"),
        ({"queries": np.zeros((4, 7))}, "queries: shape is (4, 7), expected (queries, 8), each at least 1"),
        ({"queries": np.zeros((3, 8))}, "queries: got 3, expected a number that divides the 8 features that come out"),
        ({"d_out": 3}, "d_out: got 3, expected a divisor of D = 8"),
        ({"d_out": 2}, "w_v: shape is (8, 8), expected (4, 8), each at least 1"),
    ],
)
def test_errors_of_pooling_name_the_argument(change, text):
    x, queries, w_v = call(0)
    with pytest.raises(InvalidInput, match=re.escape(text)):
        multi_query_pool(**({"x": x, "queries": queries, "w_v": w_v} | change))


def test_errors_of_the_others_name_the_argument():
    u, w, x = np.ones(8), np.eye(8), np.ones((2, 8))
    for do, text in (
        (lambda: fold_cross_attention(u, w, w, 3), "heads: got 3, expected a divisor of D = 8"),
        (lambda: fold_cross_attention(u, w, w[:4], 4), "w_k: shape is (4, 8), expected (8, 8), each at least 1"),
        (lambda: fold_cross_attention(u, w, w, 4, u[:3]), "b_q: shape is (3,), expected (8), each at least 1"),
        (lambda: simpool(x, w, w, gamma=0), "gamma: got 0, expected a number in (0, inf)"),
        (lambda: simpool(x, w, w, epsilon=0), "epsilon: got 0, expected a number in (0, inf)"),
        (lambda: simpool(x, w[:3], w), "w_q: shape is (3, 8), expected (8, 8), each at least 1"),
        (lambda: abmilp_pool(x, w, u[:3], u), "b_hidden: shape is (3,), expected (8), each at least 1"),
        (lambda: abmilp_pool(x, w, u, u[:3]), "w_score: shape is (3,), expected (8), each at least 1"),
    ):
        with pytest.raises(InvalidInput, match=re.escape(text)):
            do()
