"""NSA's parts beside the operator, exact attention to means, and loops; the indexer beside loops."""

import re
from fractions import Fraction

import numpy as np
import pytest

from refattn import InvalidInput, Problem, evaluate, softmax_attention
from refattn.arrays import to_numpy
from refattn.exact.lowering import lower
from refattn.functions.latent import absorbed
from refattn.functions.native import (
    compressed_attention,
    indexer_scores,
    indexer_select,
    native_sparse_attention,
    select_blocks,
)

from .selector_calls import KINDS, call, relative_error


def bound(q, k, v):
    """What float weights, relatively, and the sum of n products lose, on sums of |v|."""
    return (relative_error(q, k) + k.shape[2] * np.finfo(q.dtype).eps) * np.abs(v).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_q", [12, 5])
def test_compressed_is_exact_attention_to_means(kind, n_q):
    """Integers and blocks of 4: means are exact, so that the exact answer is of the same numbers."""
    q, k, v = (np.round(4 * x) for x in call(0, n_q=n_q, n_k=14))
    out, lse = compressed_attention(*map(KINDS[kind], (q, k, v)), block_size=4)
    means = [x[:, :, :12].reshape(2, 2, 3, 4, -1).mean(3) for x in (k, v)]
    seen = np.arange(1, 4) * 4 - 1 <= (np.arange(n_q) + 14 - n_q)[:, None]
    a = evaluate(Problem(q, *means, allowed=seen[None, None]), rounding="float64")
    out, lse = to_numpy(out), to_numpy(lse)
    assert out.dtype == np.float32
    assert (np.abs(out - a.out) <= bound(q, means[0], means[1])).all()
    none = ~seen.any(1)
    assert none.any() == (n_q == 12)
    assert (out[:, :, none] == 0).all()
    assert (lse[:, :, none] == -np.inf).all()
    # the scores' errors, those of exp and the sum, and the rounding of lse
    top = np.abs(a.lse[np.isfinite(a.lse)]).max()
    error = np.abs(lse[:, :, ~none] - a.lse[:, :, ~none])
    assert (error <= relative_error(q, means[0]) + 2 * top * np.finfo(np.float32).eps).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "topk"), [(4, 3), (5, 2), (3, 1), (16, 4)])
def test_blocks_are_those_of_the_operator(kind, size, topk):
    q, k, v = call(1, n_q=30, n_k=37)
    options = {"block_size": size, "topk": topk}
    p = Problem(q, k, v, causal="bottom_right", variant="nsa_selected", options=options)
    found = to_numpy(select_blocks(KINDS[kind](q), KINDS[kind](k), **options))
    seen = np.take(found, np.arange(37) // size, -1)
    assert (np.repeat(seen, 2, 1) == lower(p).problem.allowed).all()


def test_equal_blocks_go_to_the_lower():
    q, k = np.ones((1, 1, 12, 2)), np.ones((1, 1, 12, 2))
    assert select_blocks(q, k, block_size=3, topk=3)[0, 0, 11].tolist() == [True, True, False, True]


def test_all_three_parts_add_up_by_their_gates():
    q, k, v = call(2, n_q=20, n_k=20)
    rng = np.random.default_rng(0)
    sizes = {"block_size": 4, "topk": 2}
    chosen = np.repeat(np.take(select_blocks(q, k, **sizes), np.arange(20) // 4, -1), 2, 1)
    near = np.tri(20, dtype=bool) & ~np.tri(20, 20, -3, dtype=bool)
    parts = [
        compressed_attention(q, k, v, block_size=4)[0],
        softmax_attention(q, k, v, causal="bottom_right", allowed=chosen, rounding="float64"),
        softmax_attention(q, k, v, allowed=near[None, None], rounding="float64"),
    ]
    gates = rng.uniform(0, 1, (2, 4, 20, 3)).astype(np.float32)
    found = native_sparse_attention(q, k, v, gates, window=3, **sizes)
    expected = sum(gates[..., i : i + 1] * part for i, part in enumerate(parts))
    assert (np.abs(found - expected) <= 3 * bound(q, k, v) + 8 * np.finfo(np.float32).eps * np.abs(v).max()).all()
    for i in range(3):
        one = np.zeros_like(gates)
        one[..., i] = 1
        alone = native_sparse_attention(q, k, v, one, window=3, **sizes)
        assert (np.abs(alone - parts[i]) <= bound(q, k, v)).all()


def test_full_budgets_are_causal_attention():
    q, k, v = call(3, n_q=9, n_k=9)
    dense = softmax_attention(q, k, v, causal="bottom_right", rounding="float64")
    for gate in ([0, 1, 0], [0, 0, 1]):
        gates = np.broadcast_to(np.array(gate, np.float32), (2, 4, 9, 3))
        found = native_sparse_attention(q, k, v, gates, block_size=2, topk=9, window=9)
        assert (np.abs(found - dense) <= bound(q, k, v)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_index_scores_in_fractions(kind):
    rng = np.random.default_rng(4)
    q, k = rng.integers(-4, 5, (2, 3, 4, 5)).astype(np.float32), rng.integers(-4, 5, (2, 6, 5)).astype(np.float32)
    w = rng.integers(-4, 5, (2, 4, 3)).astype(np.float32) / 8
    found = to_numpy(indexer_scores(*map(KINDS[kind], (q, k, w))))
    for b, i, j in np.ndindex(2, 4, 6):
        due = sum(
            Fraction(float(w[b, i, h])) * max(int(np.dot(q[b, h, i], k[b, j])), 0) for h in range(3)
        )  # all of it is exact in float32
        assert Fraction(float(found[b, i, j])) == due


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("topk", [1, 3, 50])
def test_index_keys_by_a_loop_ties_to_the_lower(kind, topk):
    s = np.random.default_rng(5).integers(0, 3, (2, 4, 9)).astype(np.float32)
    found = to_numpy(indexer_select(KINDS[kind](s), topk=topk))
    for b, i in np.ndindex(2, 4):
        seen = range(i + 6)
        best = sorted(seen, key=lambda j: (-s[b, i, j], j))[:topk]
        assert np.nonzero(found[b, i])[0].tolist() == sorted(best)
    if topk == 50:
        assert (found == np.tri(4, 9, 5, dtype=bool)).all()


def test_bad_input_is_named():
    q, k, v = call(0)
    gates = np.ones((2, 4, 12, 3), np.float32)
    for wrong, text in (
        (lambda: compressed_attention(q, k, v, block_size=0), "block_size: got 0, expected a whole number from 1 on"),
        (lambda: select_blocks(q, k, topk=0), "topk: got 0, expected a whole number from 1 on"),
        (lambda: native_sparse_attention(q, k, v, gates, window=0), "window: got 0, expected a whole number from 1 on"),
        (
            lambda: native_sparse_attention(q, k, v, gates[..., :2]),
            "gates: shape is (2, 4, 12, 2), expected (2, 4, 12, 3)",
        ),
        (lambda: select_blocks(q[:, :, :, :4], k), "key: shape is (2, 2, 12, 8), expected (2, heads, keys, 4)"),
        (lambda: indexer_scores(q, k, gates), "key: shape is (2, 2, 12, 8), expected (2, keys, 8)"),
        (lambda: indexer_select(np.full((1, 2, 2), np.nan)), "scores: holds NaN, which has no place in an order"),
        (
            lambda: indexer_select(np.zeros((1, 3, 2))),
            "scores: has 3 queries and 2 keys; each query stands at",
        ),
    ):
        with pytest.raises(InvalidInput, match=re.escape(text)):
            wrong()


def test_an_indexers_choice_is_a_mask_over_a_latent():
    """The choice of `dsa` as `allowed` of the absorbed call: what `dsa` gives over the latent, bit for bit."""
    rng = np.random.default_rng(3)
    n, h = 9, 2
    nope, rope, index_q, latent, key_rope, index_k, w_uk = (
        rng.integers(-2, 3, s).astype(float)
        for s in ((1, h, n, 3), (1, h, n, 2), (1, 2, n, 4), (1, n, 5), (1, n, 2), (1, n, 3), (h, 3, 5))
    )
    read = indexer_select(indexer_scores(index_q[..., :3], index_k, np.moveaxis(index_q[..., 3], 1, 2)), topk=3)
    inside = absorbed(nope, rope, latent, key_rope, w_uk, allowed=read[:, None])
    query = np.zeros((1, h + 2, n, 11))
    query[:, :h, :, :7], query[:, h:, :, 7:] = inside.query, index_q
    key = np.concatenate([inside.key, index_k[:, None], np.zeros((1, 1, n, 1))], -1)
    options = {"variant": "dsa", "causal": "bottom_right", "options": {"topk": 3}}
    layer = Problem(query, key, inside.value, scale=inside.scale, **options)
    exact = evaluate(inside, rounding="float64").out
    np.testing.assert_array_equal(evaluate(layer, rounding="float64").out[:, :h], exact)
    assert (evaluate(inside.replace(allowed=None, causal="bottom_right"), rounding="float64").out != exact).any()
