"""SpecKV and SpecPC against loops over their descriptions, and the evicted cache against attention under a mask."""

import re

import numpy as np
import pytest

import refattn
from refattn import InvalidInput
from refattn.arrays import to_numpy
from refattn.functions.eviction import evict, speckv, speckv_scores, specpc_scores, specpc_select

from .selector_calls import KINDS, call, exact_probabilities, relative_error


def pooled_by_loops(x, before, after, average):
    """Pool a row: the largest of the places that are there, or their sum over the pool's full size."""
    found = []
    for j in range(len(x)):
        there = [x[i] for i in range(j - before, j + after + 1) if 0 <= i < len(x)]
        found.append(sum(there) / (before + after + 1) if average else max(there))
    return found


def importance_by_loops(p, h_kv, reduce, pooling, pool):
    """Return SpecKV's scores from probabilities (b, h_q, w, n)."""
    b, heads, w, n = p.shape
    group, found = heads // h_kv, np.zeros((b, h_kv, n - w))
    for i in range(b):
        for g in range(h_kv):
            columns = []
            for j in range(n - w):
                paid = [p[i, h, a, j] for h in range(g * group, (g + 1) * group) for a in range(w)]
                columns.append(max(paid) if reduce == "max" else sum(paid) / len(paid))
            found[i, g] = pooled_by_loops(columns, pool // 2, pool // 2, pooling == "average")
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("reduce", "pooling", "pool"),
    [("max", "max", 7), ("mean", "max", 3), ("max", "average", 7), ("mean", "average", 1)],
)
def test_speckv_scores(kind, reduce, pooling, pool):
    q, k, _ = call(1, n_q=4, n_k=17)
    got = to_numpy(speckv_scores(KINDS[kind](q), KINDS[kind](k), reduce=reduce, pooling=pooling, pool=pool))
    want = importance_by_loops(exact_probabilities(q, k), 2, reduce, pooling, pool)
    # means add the rounding of at most 8 queries, 7 places and two divisions to that of probabilities
    assert (np.abs(got - want) <= (relative_error(q, k) + 17 * np.finfo(np.float32).eps) * want).all()
    assert got.dtype == np.float32


def test_an_average_counts_places_beyond_the_ends_as_zeros():
    """With no difference between keys each has 1/n; the pool at the end has 4 of 7 of it."""
    q, k = np.zeros((1, 1, 2, 4)), np.zeros((1, 1, 16, 4))
    got = speckv_scores(q[:, :, -1:], k, pooling="average", reduce="mean")[0, 0]
    assert got[7] == 1 / 16
    assert got[0] == got[14] == 4 / 16 / 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [3, 4, 9, 16])
def test_evicted_is_what_the_text_keeps(kind, capacity):
    """Sorted by score, equal ones by index, cut, the window behind."""
    _, k, v = call(2, n_k=17)
    scores = np.random.default_rng(3).integers(0, 5, (2, 2, 14)).astype(np.float32)
    got = evict(*(KINDS[kind](x) for x in (k, v, scores)), capacity=capacity)
    for i in range(2):
        for h in range(2):
            best = sorted(range(14), key=lambda j: (-scores[i, h, j], j))[: capacity - 3]
            kept = [*best, 14, 15, 16]
            assert to_numpy(got[2])[i, h].tolist() == kept
            assert (to_numpy(got[0])[i, h] == k[i, h, kept]).all()
            assert (to_numpy(got[1])[i, h] == v[i, h, kept]).all()


def test_nothing_happens_from_full_capacity_on():
    _, k, v = call(2, n_k=17)
    for capacity in (17, 400):
        got = evict(k, v, np.zeros((2, 2, 14)), capacity=capacity)
        assert got[0] is k
        assert got[1] is v
        assert (got[2] == np.arange(17)).all()


@pytest.mark.parametrize("capacity", [4, 7, 12, 16, 17])
def test_attention_to_what_is_kept_is_attention_under_its_mask(capacity):
    """Both are correctly rounded, so that they are equal bit for bit, and at full capacity equal to full attention."""
    q, k, v = call(4, n_q=3, n_k=17)
    kept_k, kept_v, places = evict(k, v, speckv_scores(q, k), capacity=capacity)
    assert places.shape == (2, 2, capacity)
    mask = np.zeros((2, 2, 1, 17), bool)
    np.put_along_axis(mask, places[:, :, None], True, axis=3)
    assert mask.sum() == 4 * capacity  # exactly as many keys: none twice
    now = q[:, :, -1:]
    got = refattn.softmax_attention(now, kept_k, kept_v)
    assert (got == refattn.softmax_attention(now, k, v, allowed=np.repeat(mask, 2, 1))).all()
    full = refattn.softmax_attention(now, k, v)
    assert (got == full).all() if capacity == 17 else (got != full).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lookahead", [0, 3])
def test_speckv_drops_the_draft_and_the_last_token(kind, lookahead):
    """30 prompt tokens: w = 5 + L + 1 queries score, the last L + 1 keys go, the 5 before them stay."""
    n = 30 + lookahead
    q, k, v = call(5, n_q=n, n_k=n)
    got = speckv(*(KINDS[kind](x) for x in (q, k, v)), lookahead=lookahead, capacity=12, window=5)
    w = 5 + lookahead + 1
    scores = importance_by_loops(exact_probabilities(q[:, :, -w:], k), 2, "max", "max", 7)
    for i in range(2):
        for h in range(2):
            # pooled maxima tie exactly in both computations, as they are copies of one number
            best = sorted(range(n - w), key=lambda j: (-scores[i, h, j], j))[: 12 - 5]
            kept = [*best, *range(30 - 1 - 5, 30 - 1)]
            assert to_numpy(got[2])[i, h].tolist() == kept
            assert (to_numpy(got[0])[i, h] == k[i, h, kept]).all()
            assert (to_numpy(got[1])[i, h] == v[i, h, kept]).all()


def test_speckv_keeps_a_short_prompt():
    q, k, v = call(5, n_q=20, n_k=20)
    got = speckv(q, k, v, lookahead=3, capacity=16, window=5)
    assert (got[2] == np.arange(16)).all()  # of 17 prompt tokens all but the last
    assert (got[0] == k[:, :, :16]).all()


def test_a_drafted_query_finds_the_key_that_the_prompt_does_not_ask_for():
    """The needle is what only the drafted token asks for: scores of the prompt alone lose it."""
    n, d = 64, 8
    q, k = np.zeros((1, 1, n + 1, d)), np.random.default_rng(0).normal(size=(1, 1, n + 1, d)) * 0.01
    k[0, 0, 20, 0], q[0, 0, n, 0] = 10.0, 10.0
    k[0, 0, 40:50, 1] = 1.0
    q[0, 0, :n, 1] = 10.0
    with_draft = speckv(q, k, k, lookahead=1, capacity=12, window=4)[2]
    without = speckv(q[:, :, :n], k[:, :, :n], k[:, :, :n], lookahead=0, capacity=12, window=4)[2]
    assert 20 in with_draft
    assert 20 not in without


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduce", ["max", "sum"])
@pytest.mark.parametrize("w", [1, 5])
def test_specpc_scores(kind, reduce, w):
    p = np.random.default_rng(6).random((2, 3, 4, w, 11)).astype(np.float32)
    got = to_numpy(specpc_scores(KINDS[kind](p), reduce=reduce))
    for b in range(2):
        for j in range(11):
            terms = [
                float(p[b, x, h, i, j]) * (i / (w - 1) if w > 1 else 1.0)
                for x in range(3)
                for h in range(4)
                for i in range(w)
            ]
            want = max(terms) if reduce == "max" else sum(terms)
            # a weight, a product and a sum of 12 w terms, each rounded
            assert abs(got[b, j] - want) <= (12 * w + 2) * np.finfo(np.float32).eps * want


def select_by_loops(scores, capacity, window, neighbors, pool, average):
    """Follow the text with lists."""
    n = len(scores)
    if n <= capacity:
        return list(range(n))
    pooled = pooled_by_loops(scores, (pool - 1) // 2, pool - 1 - (pool - 1) // 2, average)
    best = sorted(range(n), key=lambda j: (-pooled[j], j))[:capacity]
    steps = range(-((neighbors - 1) // 2), neighbors - 1 - (neighbors - 1) // 2 + 1)
    listed = list(range(n - window, n))
    for j in best:
        listed += [min(max(j + s, 0), n - 1) for s in sorted(steps, key=lambda s: (abs(s), s))]
    return sorted(list(dict.fromkeys(listed))[:capacity])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "capacity", "window", "neighbors", "pool", "pooling"),
    [
        (60, 20, 5, 8, 4, "max"),
        (60, 20, 0, 7, 1, "average"),
        (60, 59, 20, 64, 64, "max"),
        (61, 30, 30, 3, 5, "average"),
        (61, 1, 0, 64, 64, "average"),
        (9, 8, 2, 64, 64, "max"),
        (9, 9, 2, 4, 4, "max"),
    ],
)
def test_specpc_select(kind, n, capacity, window, neighbors, pool, pooling):
    # multiples of 2^-6 add without rounding, and tie often
    scores = np.random.default_rng(n + capacity).integers(0, 8, (3, n)).astype(np.float32) / 64
    got = specpc_select(
        KINDS[kind](scores), capacity=capacity, window=window, neighbors=neighbors, pool=pool, pooling=pooling
    )
    want = [select_by_loops(x.tolist(), capacity, window, neighbors, pool, pooling == "average") for x in scores]
    assert to_numpy(got).tolist() == want


SCORES = np.zeros((1, 2, 9))
CACHE = {"key": np.zeros((1, 2, 12, 4)), "value": np.zeros((1, 2, 12, 3)), "scores": SCORES, "capacity": 5}
QK = {"query": np.zeros((1, 4, 3, 4)), "key": np.zeros((1, 2, 12, 4))}
SPECKV = {**QK, "query": np.zeros((1, 4, 12, 4)), "value": np.zeros((1, 2, 12, 3)), "lookahead": 2, "window": 3}
SELECT = {"scores": np.zeros((1, 9)), "capacity": 5, "window": 3}
WRONG = [
    (evict, CACHE, {"scores": np.zeros((1, 2, 13))}, "scores: has 13 keys, expected at most key's 12"),
    (evict, CACHE, {"capacity": 2}, "capacity: got 2, expected a whole number from 3 on"),
    (evict, CACHE, {"scores": np.zeros((1, 4, 9))}, "scores: shape is (1, 4, 9), expected (1, 2, keys)"),
    (speckv_scores, QK, {"pool": 4}, "pool: got 4, expected an odd number of keys, so that a pool has a middle"),
    (speckv_scores, QK, {"reduce": "sum"}, "reduce: got 'sum', expected 'max' or 'mean'"),
    (speckv_scores, QK, {"pooling": "mean"}, "pooling: got 'mean', expected 'max' or 'average'"),
    (speckv_scores, QK, {"query": np.zeros((1, 4, 12, 4))}, "query: has as many queries as there are keys, 12"),
    (speckv, SPECKV, {"query": np.zeros((1, 4, 3, 4))}, "query: has 3 queries, expected one for each of the 12 keys"),
    (speckv, SPECKV, {"window": 9}, "key: has 12 keys, expected more than window + lookahead + 1 = 12"),
    (speckv, SPECKV, {"capacity": 2}, "capacity: got 2, expected a whole number from 3 on"),
    (specpc_scores, {"attention": np.zeros((1, 2, 3, 4, 5))}, {"reduce": "mean"}, "reduce: got 'mean', expected 'max'"),
    (specpc_scores, {}, {"attention": np.zeros((2, 3, 4, 5))}, "attention: shape is (2, 3, 4, 5), expected (batch,"),
    (specpc_select, SELECT, {"window": 10}, "window: got 10, expected a whole number from 0 to 9"),
    (specpc_select, SELECT, {"capacity": 2}, "capacity: got 2, expected a whole number from 3 on"),
    (specpc_select, SELECT, {"neighbors": 0}, "neighbors: got 0, expected a whole number from 1 on"),
    (specpc_select, SELECT, {"pooling": "sum"}, "pooling: got 'sum', expected 'max' or 'average'"),
]


@pytest.mark.parametrize(("function", "good", "change", "text"), WRONG)
def test_wrong_calls(function, good, change, text):
    if good:
        function(**good)
    with pytest.raises(InvalidInput, match=re.escape(text)):
        function(**{**good, **change})
