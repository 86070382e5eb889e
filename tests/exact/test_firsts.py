"""The first of many candidates found in tiles: the same as by all scores at once, ties and near ties among them."""

import numpy as np
import pytest

from refattn import Problem, masks
from refattn.exact import choosing, firsts, lowering
from refattn.exact.levels import Bounded, Level
from refattn.exact.lowering import lower

N, D = 90, 4


def numbers(seed, heads=1, n=N):
    return np.random.default_rng(seed).standard_normal((1, heads, n, D))


def repeated():
    k = numbers(1)
    k[:, :, 5:] = k[:, :, :1]
    k[:, :, 40] = 0
    return k


def nearly():
    k = repeated()
    k[..., 0] *= 1 + 2.0**-52 * np.random.default_rng(2).integers(0, 3, k.shape[:3])
    return k


def silent():
    q = numbers(0, 2)
    q[:, :, ::40] = 0
    return q


WHOLE = np.random.default_rng(3).integers(-1, 2, (2, 1, 2, N, D)).astype(np.float64)
LOST = np.where(np.arange(N * D).reshape(N, D) % 97 == 5, np.nan, numbers(1))
CASES = {
    "numbers": (numbers(0, 2, 70), numbers(1), {"topk": 5}),
    "queries of zeros": (silent(), numbers(1), {"topk": 5}),
    "whole numbers": (WHOLE[0, :, :, :20], WHOLE[1], {"topk": 7}),
    "by group": (WHOLE[0, :, :, :9], WHOLE[1, :, :1], {"topk": 7, "by_group": True}),
    "blocks": (numbers(0, 2), numbers(1), {"topk": 2, "block_size": 3}),
    "repeated keys": (numbers(0, 1, 20), repeated(), {"topk": 3}),
    "an ulp apart": (numbers(0, 1, 9), nearly(), {"topk": 3}),
    "falling": (np.abs(numbers(0)), np.sort(np.abs(numbers(1)), 2)[:, :, ::-1], {"topk": 6}),
    "huge": (numbers(0, 1, 5) * 1e200, numbers(1, 1, 40) * 1e300, {"topk": 3}),
    "lost": (numbers(0), LOST, {"topk": 3}),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(masks, "WRITTEN", 0)
    monkeypatch.setattr(lowering, "WRITTEN", 0)
    for name, size in {"WIDE": 23, "TALL": 17, "FIRST": 9, "SPARE": 2}.items():
        monkeypatch.setattr(firsts, name, size)


@pytest.mark.parametrize("name", CASES)
def test_tiles_choose_what_all_scores_choose(monkeypatch, name):
    q, k, options = CASES[name]
    p = Problem(q, k, k, causal="bottom_right", variant="topk", options={"sink_keys": 2, "local": 3} | options)
    found, asked = [], []
    for many in (1, 10**9):
        monkeypatch.setattr(choosing, "MANY", many)
        monkeypatch.setattr(choosing, "by_tiles", lambda *a: asked.append(1) or firsts.by_tiles(*a))
        found.append(lower(p))
    assert len(asked) == (1 if "by_group" in options else q.shape[1])
    got, want = (np.asarray(x.problem.written_out().allowed) for x in found)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(found[0].margins == 0, found[1].margins == 0)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(*(np.float32(x.margins) for x in found))


def test_few_are_kept_where_a_thousand_keys_are_alike():
    kept = firsts.Contenders(1, 4, None)
    assert kept.at.shape[1] == 10
    k = np.zeros((1, 1, 1000, D))
    p = Problem(k[:, :, :1] + 1, k + 1, k, causal="bottom_right", variant="topk", options={"topk": 3})
    one = next(choosing.choosers(p, lowering.variant_of("topk").shape))
    sight = choosing.Sight(one[0], lowering.variant_of("topk").shape)
    work = firsts._Tiled(one, lowering.variant_of("topk").shape, sight)
    taken, margins = work.choose(np.arange(1))
    assert np.nonzero(taken[0])[0].tolist() == [0, 1, 2]
    assert margins[0] == 0


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_out_comes_after_the_first_whatever_the_scores_are(by_row, seed):
    """Whole numbers as ends: sums are exact. A score may be anywhere between its ends."""
    rng, count, f = np.random.default_rng(seed), 3, Level(0)
    shape = (40, 60)
    mid = rng.integers(-30, 31, shape).astype(float)
    radius = rng.choice([0, 0, 1, 2], (40, 1 if by_row else 60)).astype(float)
    may = rng.random(shape) < 0.8
    kept = firsts.Contenders(40, count + 1)
    for i in range(0, 60, 20):
        at = slice(i, i + 20)
        part = radius if by_row else radius[:, at]
        kept.take(i, Bounded(f, mid[:, at], np.zeros((40, 20)), part), may[:, at])
    kept.narrow(np.arange(40))
    first, margins, sure = kept.first(count)
    assert sure.any()
    assert not sure.all()
    low, high = mid - radius, mid + radius
    for n in range(40):
        there = np.nonzero(may[n])[0]
        before = {j: sum(low[n, i] > high[n, j] or (low[n, i] == high[n, j] and i < j) for i in there) for j in there}
        left = kept.at[n, : kept.many[n]].tolist()
        assert left == sorted(left)
        assert {j for j in there if before[j] <= count} <= set(left) <= set(there.tolist())
        chosen = sorted(kept.at[n, first[n]].tolist())
        order = sorted(there, key=lambda j: (-mid[n, j], j))
        assert chosen == sorted(order[:count])
        assert margins[n] == mid[n, order[count - 1]] - mid[n, order[count]]
        if sure[n]:
            rest = set(there.tolist()) - set(chosen)
            assert all(low[n, i] > high[n, j] or (low[n, i] == high[n, j] and i < j) for i in chosen for j in rest)
