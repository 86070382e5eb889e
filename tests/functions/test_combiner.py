"""Combiner against theory's balls, and its weights against regions that are found another way."""

import itertools
import math
import re

import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch

import refattn
from refattn import InvalidInput
from refattn.functions.combiner import combiner_attention, combiner_regions
from refattn.theory.combiner import factorised
from refattn.theory.fields import balls, precise
from tests.functions.rounding import softmax_error, unit


def call(seed, n, d=3, d_v=2, lead=(2,), dtype="float64"):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((*lead, n, width)).astype(dtype) for width in (d, d, d_v)]


def bound(q, k, v, scale, dtype="float64"):
    """Return what two softmaxes, one over pooled features, may lose.

    Sums over regions make features, scores and their errors up to n times as large: as tokens of which all features are
    the sums of sizes. The values of the outer one are off by the inner's error, so three times it for both.
    """
    q, k = (np.broadcast_to(np.abs(x).sum(-2, keepdims=True), x.shape) for x in (q, k))
    return 3 * softmax_error(q, k, v, scale, unit(dtype))[0]


@pytest.mark.parametrize("block", [1, 3, 4, 12])
@precise()
def test_fixed_is_theorys_in_balls(block):
    q, k, v = call(0, 12, lead=())
    found = combiner_attention(q, k, v, block=block, causal="bottom_right", scale=1.0)
    exact = factorised(balls(q), balls(k), balls(v), block)
    due = np.array([[float(x.mid()) for x in row] for row in exact])
    assert abs(found - due).max() <= bound(q, k, v, 1)


def lowest_bits(i):
    """Return [0, i) in spans, from the last one: each as long as the lowest bit of where it ends."""
    found = []
    while i:
        size = i & -i
        found.append(range(i - size, i))
        i -= size
    return found


def chosen(n, pattern, block, causal, i):
    """Return the single tokens and the regions of query i, by the coordinates of tokens."""
    cells = range(n)
    if pattern == "fixed":
        single = [j for j in cells if j // block == i // block]
        regions = [[j for j in cells if j // block == b] for b in range(-(-n // block)) if b != i // block]
    elif pattern == "logsparse":
        single, regions = [i], [list(s) for s in lowest_bits(i)]
        regions += [[n - 1 - j for j in s] for s in lowest_bits(n - 1 - i)]
    else:
        r, c = i // block, i % block
        single = [j for j in cells if j // block == r or j % block == c]
        others = [j for j in cells if j not in single]
        regions = [
            [j for j in others if j % block == x and (j // block < r) == above]
            for x in range(block) for above in (True, False)
        ] + [
            [j for j in others if j // block == y and (j % block < c) == left]
            for y in range(-(-n // block)) for left in (True, False)
        ]  # fmt: skip
    regions = [x for x in regions if x]
    if causal:
        single = [j for j in single if j <= i]
        regions = [x for x in regions if all(j // (block or 1) < i // (block or 1) for j in x)]
    return single, regions


def distribution(q, k, pattern, block, pool, causal):
    """Return one head's weights by loops, with 40 digits."""
    n, d = k.shape
    wide = [[[mpmath.mpf(float(x)) for x in row] for row in a] for a in (q, k)]
    how = {"max": max, "mean": lambda x: sum(x) / len(x), "sum": sum}[pool]

    def pooled(x, region):
        return [how([x[j][c] for j in region]) for c in range(d)]

    def score(a, b):
        return mpmath.exp(sum(x * y for x, y in zip(a, b, strict=True)) / mpmath.sqrt(d))

    rows = []
    for i in range(n):
        single, regions = chosen(n, pattern, block, causal, i)
        choice = [score(wide[0][i], wide[1][j]) for j in single]
        choice += [score(wide[0][i], pooled(wide[1], r)) for r in regions]
        row = [mpmath.mpf(0)] * n
        for w, region in zip(choice, [*([j] for j in single), *regions], strict=True):
            inner = [score(pooled(wide[0], region), wide[1][j]) for j in region]
            for j, x in zip(region, inner, strict=True):
                row[j] += w / sum(choice) * x / sum(inner)
        rows.append([float(x) for x in row])
    return np.array(rows)


CASES = [
    ("fixed", 4, 12), ("fixed", 4, 10), ("logsparse", None, 8), ("logsparse", None, 11),
    ("axial", 3, 9), ("axial", 4, 10),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "block", "n"), CASES)
@pytest.mark.parametrize("pool", ["max", "mean", "sum"])
@pytest.mark.parametrize("causal", [None, "bottom_right"])
def test_weights_are_a_distribution_and_give_out(pattern, block, n, pool, causal):
    q, k, v = call(1, n)
    out, p = combiner_attention(q, k, v, pattern=pattern, block=block, pool=pool, causal=causal, return_weights=True)
    ones = np.ones_like(v)
    most = bound(q, k, ones, 3**-0.5)
    for head in range(2):
        with mpmath.workdps(40):
            due = distribution(q[head], k[head], pattern, block, pool, causal is not None)
        assert abs(p[head] - due).max() <= most
    support = np.tri(n, dtype=bool) if causal else np.ones((n, n), bool)
    assert ((p > 0) == support).all()
    assert abs(p.sum(-1) - 1).max() <= most
    assert abs(out - p @ v).max() <= n * bound(q, k, v, 3**-0.5)  # a sum of n weights that are off, and its rounding


@pytest.mark.parametrize(
    ("block", "causal", "kind"),
    [(b, c, kind) for b in (1, 9, 20) for c in (None, "top_left") for kind in ("numpy", "torch")] + [(1, None, "jax")],
)
def test_blocks_of_one_or_of_all_are_softmax(block, causal, kind):
    dtype = "float32" if kind == "jax" else "float64"
    make = {"numpy": np.asarray, "torch": torch.asarray, "jax": jnp.asarray}[kind]
    q, k, v = call(2, 9, dtype=dtype)
    found = combiner_attention(make(q), make(k), make(v), block=block, causal=causal)
    assert type(found) is type(make(q))
    exact = refattn.evaluate(refattn.Problem(q[None], k[None], v[None], causal=causal), rounding="float64").out[0]
    assert abs(np.asarray(found) - exact).max() <= softmax_error(q, k, v, 3**-0.5, unit(dtype))[0]


def test_work_is_counted():
    for k in (2, 3, 4):
        n, b = 4**k, 2**k
        fixed = combiner_regions(n, "fixed", block=b, causal="bottom_right").work
        # own tokens, (b + 1)/2 on average; earlier blocks, (n/b - 1)/2; tokens of all blocks but the last
        assert fixed == n * (b + 1) // 2 + n * (n // b - 1) // 2 + n - b
        spans = combiner_regions(n, "logsparse", causal="bottom_right")
        assert (spans.seen >= 0).sum() == n + n * (2 * k) // 2  # half of log2(n) bits are set
        axial = combiner_regions(n, "axial", block=b, causal="bottom_right").work
        # at (r, c): r + c + 1 single tokens; regions: b - 1 columns where r > 0, and r rows, left and right
        single = sum(r + c + 1 for r in range(b) for c in range(b))
        regions = sum((b - 1) * (r > 0) + r * ((c > 0) + (c < b - 1)) for r in range(b) for c in range(b))
        # within: parts of columns above each row, of rows but the last left and right of each column
        inner = sum(r for r in range(2, b)) * b + 2 * sum(c for c in range(2, b)) * (b - 1)
        ones = b + 2 * (b - 2)  # regions of one token: the first row, and the ends of the others but the last
        assert axial == single + regions + inner + ones
    large = [combiner_regions(n, "fixed", block=math.isqrt(n), causal="top_left").work for n in (256, 1024, 4096)]
    exponents = [math.log(b / a, 4) for a, b in itertools.pairwise(large)]
    # b^3 + b^2 - b at n = b^2: a power of n that is below 3/2 by log_4((1 + 1/b)/(1 + 1/(2b))) or less
    assert 1.5 - 1 / (32 * math.log(4)) < exponents[0] < exponents[1] < 1.5


@pytest.mark.parametrize("n", [17, 33])
def test_released_spans_lose_the_last_row(n):
    """Levels are counted by ceil(log2(n - 1)): none is as long as n - 1 = 2^k, all that the last token sees."""
    q, k, v = call(3, n)
    options = {"pattern": "logsparse", "causal": "bottom_right", "return_weights": True}
    _, p = combiner_attention(q, k, v, mode="released", **options)
    assert ((p[:, :-1] > 0) == np.tri(n, dtype=bool)[:-1]).all()
    assert (p[:, -1, -1] == 1).all()
    assert (p[:, -1, :-1] == 0).all()
    for fine in (n - 1, n + 1):
        q, k, v = call(3, fine)
        both = [combiner_attention(q, k, v, mode=mode, **options)[1] for mode in ("paper", "released")]
        assert (both[0] == both[1]).all()


def test_the_future_is_not_read():
    q, k, v = call(4, 16)
    for pattern, block in (("fixed", 4), ("logsparse", None), ("axial", 4)):
        first = combiner_attention(q, k, v, pattern=pattern, block=block, causal="bottom_right")
        changed = [np.concatenate([x[:, :9], x[:, 9:] + 1], 1) for x in (q, k, v)]
        second = combiner_attention(*changed, pattern=pattern, block=block, causal="bottom_right")
        assert (first[:, :9] == second[:, :9]).all()
        assert (first[:, 9:] != second[:, 9:]).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"pattern": "dense"}, "pattern: got 'dense', expected one of fixed, logsparse, axial"),
        ({"pool": "min"}, "pool: got 'min', expected one of max, mean, sum"),
        ({"causal": True}, "causal: got True, expected one of None, bottom_right, top_left"),
        ({"mode": "code"}, "mode: got 'code', expected one of paper, released"),
        ({"block": None}, "block: got None, expected a whole number from 1 on"),
        ({"block": 0}, "block: got 0, expected a whole number from 1 on"),
        ({"pattern": "logsparse"}, "block: got 2, expected None for 'logsparse', whose spans are powers of two"),
        ({"mode": "released"}, "mode: got 'released', expected 'paper': only causal 'logsparse' is released otherwise"),
        ({"query": np.zeros((2, 5, 3))}, "query: has 5 tokens, expected key's 6; regions are of both"),
    ],
)
def test_errors_name_the_argument(change, text):
    q, k, v = call(0, 6)
    with pytest.raises(InvalidInput, match=re.escape(text)):
        combiner_attention(**({"query": q, "key": k, "value": v, "block": 2} | change))
    with pytest.raises(InvalidInput, match="n: got 0"):
        combiner_regions(0, "fixed", block=1)
