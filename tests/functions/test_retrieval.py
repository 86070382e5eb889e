"""Retrieved attention beside exact attention over the keys that it saw."""

import re

import mpmath
import numpy as np
import pytest
import torch

import refattn
from refattn import InvalidInput
from refattn.functions.indexes import FlatIndex
from refattn.functions.parts import attend
from refattn.functions.retrieval import (
    build_indexes,
    clustered_attention,
    retrieval_attention,
    segment_labels,
    summaries,
)

from .test_parts import KINDS

U = 2.0**-53


def draw(seed, b=2, h=4, h_kv=2, n_q=1, n=40, d=4, d_v=3):
    rng = np.random.default_rng(seed)
    shapes = ((b, h, n_q, d), (b, h_kv, n, d), (b, h_kv, n, d_v))
    return tuple(rng.standard_normal(s) for s in shapes)


def merged(parts, lse, v):
    """How far merging so many parts in float64 may be off: a weight by 6u of the largest lse and its exponential's.

    Once above and once in the divisor, then a sum, a division and the part's own rounding; as in test_parts.
    """
    return 1.01 * U * (2 * (6 * np.abs(lse).max() + 2) + 2 * parts + 3) * max(1.0, np.abs(v).max())


@pytest.mark.parametrize("retrieved", [0, 1, 7, 20])
def test_it_is_attention_over_the_union(retrieved):
    q, k, v = draw(0, n_q=2)
    indexes = build_indexes(k, FlatIndex, sinks=4, local=6)
    out, lse, seen = retrieval_attention(q, k, v, indexes, sinks=4, local=6, retrieved=retrieved)
    assert (seen.sum(-1) == 10 + retrieved).all()
    want, total = attend(q, k, v, allowed=seen)
    bound = merged(2, total, v)
    assert np.abs(out - want).max() <= bound
    assert np.abs(lse - total).max() <= bound
    # and by the rule that judges kernels: keys are split in two, the accumulator is float64
    model = refattn.check.model.flash("float64")
    allowed = refattn.allowed_error(refattn.Problem(q, k, v, allowed=seen), model)
    assert (np.abs(out - want) <= allowed["out"]).all()
    for at in np.ndindex(2, 4, 2):
        middle = range(4, 34)
        best = sorted(middle, key=lambda j: -float(q[at] @ k[at[0], at[1] // 2, j]))[:retrieved]
        assert set(np.flatnonzero(seen[at])) == {*range(4), *range(34, 40), *best}


def test_a_budget_of_all_keys_is_dense_and_less_is_not():
    q, k, v = draw(1)
    dense, total = attend(q, k, v)
    indexes = build_indexes(k, FlatIndex, sinks=2, local=3)
    errors = []
    for retrieved in (2, 8, 20, 1000):
        out, _, seen = retrieval_attention(q, k, v, indexes, sinks=2, local=3, retrieved=retrieved)
        errors.append(np.abs(out - dense).max())
    assert seen.all()
    assert errors[-1] <= merged(2, total, v)
    assert errors[0] > errors[1] > errors[2] > 1e-3
    every = retrieval_attention(q, k, v, (), sinks=30, local=30, retrieved=9)  # nothing between: no index is asked
    assert (every[0] == dense).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_library_gives_the_same(kind):
    q, k, v = (x.astype(np.float32) for x in draw(2, b=1))
    want = retrieval_attention(q, k, v, build_indexes(k, FlatIndex, sinks=2, local=3), sinks=2, local=3, retrieved=5)
    given = [KINDS[kind](x) for x in (q, k, v)]
    indexes = build_indexes(given[1], FlatIndex, sinks=2, local=3)
    got = retrieval_attention(*given, indexes, sinks=2, local=3, retrieved=5)
    assert all(type(x) is type(given[0]) for x in got)
    assert all((np.asarray(a) == b).all() for a, b in zip(got, want, strict=True))
    labels = segment_labels(given[1], np.random.default_rng(0), segment=16, size=4)
    zones = clustered_attention(*given, labels[:, :, 5:], retrieved=2, estimated=3, sinks=2, local=3)
    labels = segment_labels(k, np.random.default_rng(0), segment=16, size=4)[:, :, 5:]
    want = clustered_attention(q, k, v, labels, retrieved=2, estimated=3, sinks=2, local=3)
    assert all((np.asarray(a) == b).all() for a, b in zip(zones, want, strict=True))


def test_a_narrow_type_has_a_wider_lse():
    q, k, v = (torch.tensor(x).bfloat16() for x in draw(2, b=1))
    indexes = build_indexes(k, FlatIndex, sinks=2, local=3)
    out, lse, _ = retrieval_attention(q, k, v, indexes, sinks=2, local=3, retrieved=5)
    labels = torch.zeros(1, 2, 35, dtype=torch.int64)
    _, other = clustered_attention(q, k, v, labels, retrieved=1, estimated=0, sinks=2, local=3)
    assert (out.dtype, lse.dtype, other.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    want = attend(*(x.double().numpy() for x in (q, k, v)))[1]
    assert np.abs(other.numpy() - want).max() <= 2.0**-24 * np.abs(want).max() * 1.01


class Says:
    """An index with a given answer."""

    def __init__(self, *places):
        self.places = np.array(places)

    def search(self, queries, k):
        return self.places


@pytest.mark.parametrize(
    ("places", "text"),
    [
        ([[0, 30, 1]], "indexes[0][0]: search gave the key 30, which is out of range of 30 keys"),
        ([[0, -2, 1]], "indexes[0][0]: search gave the key -2, which is out of range of 30 keys"),
        ([[5, 3, 5]], "indexes[0][0]: search gave the key 5 twice; a key counts once"),
        ([[0, 9, 1]], "indexes[0][0]: search gave the key 9, which allowed hides"),
        ([[0, 1]], "indexes[0][0]: search gave int64 of shape (1, 2), expected integers of (1, 3)"),
        ([[0, 1, 2.0]], "indexes[0][0]: search gave float64 of shape (1, 3), expected integers of (1, 3)"),
    ],
)
def test_what_an_index_may_not_say(places, text):
    q, k, v = draw(3, b=1, h=1, h_kv=1)
    allowed = np.ones((1, 40), bool)
    allowed[0, [1, 13]] = False  # 13 is 9 of those between
    given = {"sinks": 4, "local": 6, "retrieved": 3, "allowed": allowed}
    with pytest.raises(InvalidInput, match=re.escape(text)):
        retrieval_attention(q, k, v, [[Says(*places)]], **given)
    out, _, seen = retrieval_attention(q, k, v, [[Says([2, -1, 0])]], **given)
    assert set(np.flatnonzero(seen)) == {0, 2, 3, *range(34, 40), 4, 6}
    want, total = attend(q, k, v, allowed=seen)
    assert np.abs(out - want).max() <= merged(2, total, v)


def test_summaries_by_a_loop():
    rng = np.random.default_rng(0)
    keys, values = rng.integers(-9, 9, (2, 10, 3)).astype(float), rng.integers(-9, 9, (2, 10, 2)).astype(float)
    labels = rng.integers(0, 3, (2, 10))
    centroids, means, sizes = summaries(keys, values, labels, 4)
    for b in range(2):
        for c in range(4):
            mine = np.flatnonzero(labels[b] == c)
            assert sizes[b, c] == len(mine)
            for got, x in ((centroids, keys), (means, values)):
                assert got[b, c].tolist() == (x[b, mine].sum(0) / max(len(mine), 1)).tolist()


def by_sums(q, k, v, labels, first, retrieved, estimated):
    """A row's output by the definition, in 40 digits: single keys of weight e^s, clusters of weight size·e^s."""
    clusters = range(labels.max() + 1)
    mine = {c: [first + j for j in np.flatnonzero(labels == c)] for c in clusters}
    centroid = {c: k[mine[c]].mean(0) for c in clusters if mine[c]}
    order = sorted(centroid, key=lambda c: -float(q @ centroid[c]))
    between = set(range(first, first + len(labels)))
    single = [j for j in range(len(k)) if j not in between] + [j for c in order[:retrieved] for j in mine[c]]
    with mpmath.workdps(40):
        root = mpmath.sqrt(len(q))
        terms = [(1, k[j], v[j]) for j in single]
        terms += [(len(mine[c]), centroid[c], v[mine[c]].mean(0)) for c in order[retrieved : retrieved + estimated]]
        w = [n * mpmath.exp(mpmath.fdot(map(float, q), map(float, x)) / root) for n, x, _ in terms]
        z = mpmath.fsum(w)
        return [mpmath.fdot(w, [float(y[e]) for *_, y in terms]) / z for e in range(v.shape[1])], mpmath.log(z)


@pytest.mark.parametrize(("retrieved", "estimated"), [(0, 3), (2, 0), (2, 3), (3, 4)])
def test_zones_by_sums(retrieved, estimated):
    q, k, v = draw(4, b=1)
    labels = np.random.default_rng(5).integers(0, 7, (1, 2, 31))
    labels[0, 0, labels[0, 0] == 6] = 5  # a cluster of a head is empty
    out, lse = clustered_attention(q, k, v, labels, retrieved=retrieved, estimated=estimated, sinks=3, local=6)
    for h in range(4):
        want, z = by_sums(q[0, h, 0], k[0, h // 2], v[0, h // 2], labels[0, h // 2], 3, retrieved, estimated)
        # means of at most 31 keys in another order move a logit by 31u|q||k|, so out by twice that of the largest value
        moved = 4 * 31 * U * np.abs(q[0, h]).sum() * np.abs(k).max() * np.abs(v).max()
        bound = merged(2, lse, v) + moved
        assert max(abs(float(a - mpmath.mpf(b))) for a, b in zip(want, out[0, h, 0], strict=True)) <= bound
        assert abs(float(z - mpmath.mpf(lse[0, h, 0]))) <= bound


def test_the_estimate_is_exact_for_equal_keys_and_below_else():
    q, k, v = draw(6, b=1, n=23)
    labels = np.repeat(np.arange(5), 4)[None, None].repeat(2, 1)
    k[:, :, 1:21] = np.repeat(np.round(k[:, :, 1:21:4] * 8) / 8, 4, axis=2)  # the mean of four equal keys is exact
    dense, total = attend(q, k, v)
    out, lse = clustered_attention(q, k, v, labels, retrieved=0, estimated=5, sinks=1, local=2)
    bound = merged(2, total, v) + 8 * U * np.abs(v).max()  # and the mean of four values
    assert np.abs(out - dense).max() <= bound
    assert np.abs(lse - total).max() <= bound
    q, k, v = draw(7, b=1, n=23)
    dense, total = attend(q, k, v)
    out, lse = clustered_attention(q, k, v, labels, retrieved=0, estimated=5, sinks=1, local=2)
    assert (lse < total).all()  # e^mean < mean of e^
    every, _ = clustered_attention(q, k, v, labels, retrieved=5, estimated=0, sinks=1, local=2)
    assert np.abs(every - dense).max() <= merged(2, total, v)
    left, _ = clustered_attention(q, k, v, labels, retrieved=1, estimated=0, sinks=1, local=2)
    some, _ = clustered_attention(q, k, v, labels, retrieved=1, estimated=4, sinks=1, local=2)
    assert np.abs(some - dense).mean() < np.abs(left - dense).mean()


def test_segments_are_clustered_apart():
    rng = np.random.default_rng(0)
    centres = 5 * rng.standard_normal((4, 3))
    group = np.stack([np.arange(24) % 4, np.arange(24) // 3 % 4])  # another order in each batch
    k = (centres[group][:, None] + 0.01 * rng.standard_normal((2, 1, 24, 3))).astype(np.float32)
    labels = segment_labels(k, np.random.default_rng(1), segment=12, size=3)
    assert labels.shape == (2, 1, 24)
    assert set(labels[..., :12].ravel()) <= set(range(4))
    assert set(labels[..., 12:].ravel()) <= set(range(4, 8))
    same = labels[..., None] == labels[..., None, :]
    half = np.arange(24) < 12
    assert (same <= (half == half[:, None])).all()
    moved = segment_labels(k + np.float32(64), np.random.default_rng(1), segment=12, size=3)
    assert (moved == labels).all()  # whatever offset all keys have
    for b in range(2):  # four clear groups of three keys
        one = (group[b] == group[b][:, None]) & half & half[:, None]
        assert same[b, 0][one].all()


def test_errors():
    q, k, v = draw(0)
    indexes = build_indexes(k, FlatIndex, sinks=4, local=6)
    for change, text in (
        ({"indexes": indexes[:1]}, "indexes: expected 2 sequences of 2, one for each batch and key head"),
        ({"key": torch.tensor(k)}, "key: is an array of torch, expected numpy's, as query is"),
        ({"query": q[:, :3]}, "key: axis heads is 2 and must divide query's 3"),
        ({"sinks": -1}, "sinks: got -1, expected a whole number from 0 on"),
        ({"retrieved": 2.5}, "retrieved: got 2.5, expected a whole number from 0 on"),
        ({"allowed": np.ones((2, 3), bool)}, "allowed: shape is (2, 3), expected (2, 40), each at least 1"),
    ):
        given = {"query": q, "key": k, "value": v, "indexes": indexes, "sinks": 4, "local": 6, "retrieved": 3} | change
        with pytest.raises(InvalidInput, match=re.escape(text)):
            retrieval_attention(**given)
    labels, text = np.zeros((2, 2, 30), int), "sinks, local: 20 and 20 leave none of 40 keys between"
    with pytest.raises(InvalidInput, match=text):
        build_indexes(k, FlatIndex, sinks=20, local=20)
    with pytest.raises(InvalidInput, match=text):
        clustered_attention(q, k, v, labels, retrieved=1, estimated=0, sinks=20, local=20)
    with pytest.raises(InvalidInput, match="estimated: got 1, expected a whole number from 0 to 0"):
        clustered_attention(q, k, v, labels, retrieved=1, estimated=1, sinks=4, local=6)
    with pytest.raises(InvalidInput, match="labels: one is out of range, expected integers from 0 to"):
        clustered_attention(q, k, v, labels - 1, retrieved=0, estimated=0, sinks=4, local=6)
    with pytest.raises(InvalidInput, match=re.escape("labels: shape is (3,), expected that of keys without its last")):
        summaries(k, v, np.zeros(3, int), 1)
