"""ProxyAttn's scores, budgets and masks against loops, and what attention its masks keep on two kinds of data."""

import math
import re

import numpy as np
import pytest

import refattn
from refattn import InvalidInput
from refattn.arrays import to_numpy
from refattn.functions.budgets import block_budget, proxy_block_mask, proxy_block_scores

from .selector_calls import KINDS, call, exact_probabilities, relative_error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("groups", "stride", "block", "scale"), [(2, 2, 4, None), (1, 1, 8, 0.5), (2, 4, 4, None)])
def test_proxy_scores(kind, groups, stride, block, scale):
    """Entries are multiples of 1/8, so that means of two or four are exact, and the loops see the same proxy."""
    n = 27
    q, k = (np.round(8 * x) / 8 for x in call(0, n_q=n, n_k=n)[:2])
    got = to_numpy(
        proxy_block_scores(*(KINDS[kind](x) for x in (q, k)), groups=groups, stride=stride, block=block, scale=scale)
    )
    per_q, per_k, count = 4 // groups, 2 // groups, -(-n // block)
    want = np.zeros((2, groups, count, count))
    for g in range(groups):
        mean_q = sum(q[:, g * per_q + i] for i in range(per_q))[:, None, ::stride] / np.float32(per_q)
        mean_k = sum(k[:, g * per_k + i] for i in range(per_k))[:, None, ::stride] / np.float32(per_k)
        p = exact_probabilities(mean_q, mean_k, scale)
        for b in range(2):
            for i in range(p.shape[2]):
                for j in range(i + 1):
                    at = b, g, i * stride // block, j * stride // block
                    want[at] = max(want[at], p[b, 0, i, j])
    bound = relative_error(mean_q, mean_k, scale)
    assert (np.abs(got - want) <= bound * want).all()


def needed_by_loops(p, block, gamma, error):
    """Return one head's budget from its last block's probabilities; check that rounding cannot change it."""
    n = p.shape[1]
    a = [p[:, at : at + block].max() for at in range(0, n, block)]
    a = sorted((x / sum(a) for x in a), reverse=True)
    total = 0.0
    for i, x in enumerate(a):
        total += x
        assert abs(total - gamma) > error
        if total > gamma:
            return i + 1
    return len(a)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("block", "gamma"), [(4, 0.5), (4, 0.9), (7, 0.3), (1, 0.8), (30, 0.9)])
def test_block_budget(kind, block, gamma):
    q, k, _ = call(1, n_q=27, n_k=27)
    got = to_numpy(block_budget(KINDS[kind](q), KINDS[kind](k), gamma=gamma, block=block))
    last = q[:, :, (27 - 1) // block * block :]
    p = exact_probabilities(last, k)
    # shares are ratios of two sums of probabilities, summed once more over at most 27 blocks
    error = 2 * relative_error(last, k) + 60 * np.finfo(np.float32).eps
    want = [[needed_by_loops(p[b, h], block, gamma, error) for h in range(4)] for b in range(2)]
    assert got.tolist() == want


def test_a_sum_of_floats_that_stays_below_gamma_means_all_blocks():
    gamma, short = 1 - 2.0**-52, 0
    for n in range(2, 200):
        x = np.zeros((1, 1, n, 1))
        short += np.cumsum(np.full(n, 1 / n))[-1] < gamma
        assert block_budget(x, x, gamma=gamma, block=1).tolist() == [[n]]
    assert short > 10


def test_gamma_1_is_all_blocks_where_the_sum_of_floats_is_1_before_the_last():
    q, k = np.ones((1, 1, 8, 1)), np.linspace(50, 0, 8)[None, None, :, None]
    assert block_budget(q, k, gamma=1 - 1e-15, block=1, scale=1.0).item() < 8
    assert block_budget(q, k, gamma=1, block=1, scale=1.0).item() == 8


def test_a_sharper_head_needs_fewer_blocks():
    q, k, _ = call(2, n_q=256, n_k=256, d=16)
    needed = [block_budget(q * sharp, k, gamma=0.9, block=8).mean() / 32 for sharp in (0.5, 1, 2, 4, 8)]
    assert needed == sorted(needed, reverse=True)
    assert needed[0] > 2 * needed[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sink", [0, 1, 3, 20])
def test_proxy_mask(kind, sink):
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 4, (2, 2, 11, 11)).astype(np.float32)
    budget = rng.integers(1, 12, (2, 6)).astype(np.int32)
    got = to_numpy(proxy_block_mask(KINDS[kind](scores), KINDS[kind](budget), sink=sink))
    for b in range(2):
        for h in range(6):
            for row in range(11):
                forced = [c for c in range(row + 1) if c < sink or c == row]
                others = [c for c in range(row + 1) if c not in forced]
                others.sort(key=lambda c: (-scores[b, h // 3, row, c], c))
                share = -(-int(budget[b, h]) * (row + 1) // 11)
                kept = {*forced, *others[: max(share - len(forced), 0)]}
                assert set(np.flatnonzero(got[b, h, row])) == kept


def test_shares_of_blocks_are_rounded_in_whole_numbers():
    """Of 1 to 47 blocks of 47, row 47 takes exactly so many; floats would make a few of these one more."""
    scores = np.random.default_rng(4).random((1, 1, 47, 47))
    budget = np.arange(1, 48)[None, :]
    assert (proxy_block_mask(scores, budget, sink=0)[0, :, -1].sum(-1) == budget[0]).all()
    assert any(math.ceil(b / 47 * 47) != b for b in range(1, 48))


def attended_parts(q, k, v, block, gamma):
    mask = proxy_block_mask(
        proxy_block_scores(q, k, groups=1, stride=1, block=block), block_budget(q, k, gamma=gamma, block=block)
    )
    allowed = np.repeat(np.repeat(mask, block, 2), block, 3)[:, :, : q.shape[2], : k.shape[2]]
    return mask, refattn.softmax_attention(q, k, v, causal="bottom_right", allowed=allowed)


def test_attention_under_the_mask():
    """At gamma 1 it is full attention; below, what block-sparse attention gives, bit for bit."""
    q, k, v = call(5, n_q=21, n_k=21, b=1)
    full = refattn.softmax_attention(q, k, v, causal="bottom_right")
    mask, out = attended_parts(q, k, v, 4, 1)
    assert (mask == np.tril(np.ones((6, 6), bool))).all()
    assert (out == full).all()
    mask, out = attended_parts(q, k, v, 4, 0.5)
    blocks = tuple(tuple(tuple(map(bool, row)) for row in head) for head in mask[0])
    problem = refattn.Problem(
        q, k, v, causal="bottom_right", variant="block_sparse", options={"blocks": blocks, "block_q": 4, "block_k": 4}
    )
    assert (out == refattn.evaluate(problem, rounding="float32").out).all()
    assert (out != full).any()


def needles(seed, n=1024, block=32, d=32, h=4, h_kv=2):
    """Return query and key where each block of queries looks for three blocks, each with a needle and its opposite.

    The two cancel in the mean of a block's keys.
    """
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(1, h, n, d)), rng.normal(size=(1, h_kv, n, d))
    count = n // block
    ways = rng.normal(size=(count, d))
    ways *= np.sqrt(8 * np.sqrt(d)) / np.linalg.norm(ways, axis=1, keepdims=True)
    for c in range(count):
        one, other = c * block + rng.choice(block, 2, replace=False)
        k[:, :, one] += ways[c]
        k[:, :, other] -= ways[c]
        for target in rng.choice(c + 1, min(c + 1, 3), replace=False):
            q[:, :, c * block : (c + 1) * block] += ways[target]
    return q, k


def topics(seed, n=1024, block=32, d=32, h=4, h_kv=2):
    """Return query and key where a block's keys share a direction, which the queries of later blocks look for."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(1, h, n, d)), rng.normal(size=(1, h_kv, n, d))
    count = n // block
    ways = rng.normal(size=(count, d))
    ways *= np.sqrt(4 * np.sqrt(d)) / np.linalg.norm(ways, axis=1, keepdims=True)
    for c in range(count):
        k[:, :, c * block : (c + 1) * block] += ways[c]
        for target in rng.choice(c + 1, min(c + 1, 3), replace=False):
            q[:, :, c * block : (c + 1) * block] += ways[target]
    return q, k


def mass_kept(q, k, block, density):
    """Return the part of attention that masks of a density keep: by proxy, by means of blocks, by attention itself."""
    group, n, d = q.shape[1] // k.shape[1], q.shape[2], q.shape[3]
    s = q @ np.swapaxes(np.repeat(k, group, 1), 2, 3) / np.sqrt(d)
    p = np.exp(s - s.max()) * np.tril(np.ones((n, n)))
    p /= p.sum(-1, keepdims=True)
    mass = p.reshape(1, q.shape[1], n // block, block, n // block, block).mean(3).sum(4)
    means = [x.reshape(1, x.shape[1], n // block, block, d).mean(3) for x in (q, np.repeat(k, group, 1))]
    budget = np.full((1, q.shape[1]), round(density * n / block))
    scored = (
        proxy_block_scores(q, k, groups=k.shape[1], stride=1, block=block),
        means[0] @ np.swapaxes(means[1], 2, 3),
        mass,
    )
    return [float((mass * proxy_block_mask(x, budget, sink=0)).sum(-1).mean()) for x in scored]


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_the_proxy_finds_needles_that_means_of_blocks_cancel(density):
    """A gain of a tenth of all attention is asked for; on these data it is far more."""
    for seed in range(3):
        proxy, means, best = mass_kept(*needles(seed), 32, density)
        assert means + 0.1 < proxy <= best


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_the_proxy_gains_nothing_where_blocks_are_alike_inside(density):
    """The negative control: without cancellation means of blocks do as well, to a fiftieth of all attention."""
    for seed in range(3):
        proxy, means, best = mass_kept(*topics(seed), 32, density)
        assert abs(proxy - means) < 0.02
        assert max(proxy, means) <= best


X = np.zeros((1, 4, 8, 2))
SCORES = {"query": X, "key": X[:, :2], "groups": 2, "stride": 2, "block": 4}
BUDGET = {"query": X, "key": X[:, :2], "gamma": 0.5}
MASK = {"scores": np.zeros((1, 2, 3, 3)), "budget": np.ones((1, 4), int)}
WRONG = [
    (proxy_block_scores, SCORES, {"groups": 4}, "groups: got 4, expected a whole number from 1 to 2"),
    (
        proxy_block_scores,
        {**SCORES, "key": X, "groups": 4},
        {"groups": 3},
        "groups: got 3, expected a divisor of the 4",
    ),
    (proxy_block_scores, SCORES, {"stride": 3}, "stride: got 3, expected a divisor of block=4"),
    (proxy_block_scores, SCORES, {"query": X[:, :, :3]}, "query: has 3 queries, expected one for each of the 8 keys"),
    (block_budget, BUDGET, {"gamma": 0.0}, "gamma: got 0.0, expected a number in (0, 1]"),
    (block_budget, BUDGET, {"block": 0}, "block: got 0, expected a whole number from 1 on"),
    (proxy_block_mask, MASK, {"budget": np.ones((1, 3), int)}, "budget: axis heads is 3, expected a multiple of the 2"),
    (proxy_block_mask, MASK, {"budget": np.ones((1, 4))}, "budget: holds float64, expected integers from 0 to"),
    (proxy_block_mask, MASK, {"sink": -1}, "sink: got -1, expected a whole number from 0 on"),
    (
        proxy_block_mask,
        MASK,
        {"scores": np.zeros((1, 2, 3, 4))},
        "scores: shape is (1, 2, 3, 4), expected (1, 2, 3, 3)",
    ),
]


@pytest.mark.parametrize(("function", "good", "change", "text"), WRONG)
def test_wrong_calls(function, good, change, text):
    function(**good)
    with pytest.raises(InvalidInput, match=re.escape(text)):
        function(**{**good, **change})
