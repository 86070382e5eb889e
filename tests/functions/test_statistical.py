"""Spark: thresholds against exact statistics, counts against their distribution, layers against loops and attention."""

import math
import re
import statistics
from fractions import Fraction
from statistics import NormalDist

import mpmath
import numpy as np
import pytest
import torch

import refattn
from refattn import InvalidInput
from refattn.arrays import to_numpy
from refattn.functions.statistical import count_error, spark_attention, spark_ffn, statistical_topk

from .selector_calls import KINDS, call


def threshold(x, k, ddof, eps):
    """Return the threshold of a row by exact fractions, and a bound on what a format loses.

    The mean is off by n eps of the mean size; each deviation by that and a rounding, so their root mean square by that
    and (n/2 + 4) eps of itself; z times it, and the sum, are rounded once each. A factor 1.1 covers second order.
    """
    x, n = [float(y) for y in x], len(x)
    z, mean = NormalDist().inv_cdf(1 - k / n), statistics.fmean(x)
    std = statistics.stdev(x) if ddof else statistics.pstdev(x)
    off = n * eps * statistics.fmean(map(abs, x))
    return mean + z * std, 1.1 * (off + abs(z) * (off + (n / 2 + 4) * eps * std) + 3 * eps * (abs(mean) + abs(z) * std))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "ddof"), [(2, 1), (5, 0), (20, 1), (39, 0)])
def test_threshold(kind, k, ddof):
    x = (3 + np.random.default_rng(k).normal(size=(2, 3, 40))).astype(np.float32)
    eps = np.finfo(np.float32).eps
    soft = to_numpy(statistical_topk(KINDS[kind](x), k, ddof=ddof))
    mask = to_numpy(statistical_topk(KINDS[kind](x), k, ddof=ddof, mode="mask"))
    assert soft.dtype == np.float32
    for at in np.ndindex(2, 3):
        theta, off = threshold(x[at], k, ddof, eps)
        above = x[at].astype(np.float64) - theta
        assert (np.abs(above) > off).all()  # so that rounding moves no number across
        assert (mask[at] == (above > 0)).all()
        assert (np.abs(soft[at] - np.maximum(above, 0)) <= off + eps * np.abs(above)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_smooth_form(kind):
    """It is the integral of ``clip(u / w, 0, 1)``, here in exact fractions of the rounded u."""
    x = np.random.default_rng(0).normal(size=(4, 60)).astype(np.float32)
    w, eps = 0.25, Fraction(float(np.finfo(np.float32).eps))
    over = to_numpy(statistical_topk(KINDS[kind](x), 20)).ravel()
    smooth = to_numpy(statistical_topk(KINDS[kind](x), 20, smooth=w)).ravel()
    sides = set()
    for a, b in zip(over, smooth, strict=True):
        u = Fraction(float(a))
        want = u * u / (2 * Fraction(w)) if u < w else u - Fraction(w) / 2
        sides.add((u > 0) + (u >= w))
        assert abs(Fraction(float(b)) - want) <= 2 * eps * want
    assert sides == {0, 1, 2}


@pytest.mark.parametrize("shape", [(5,), (2, 5), (1, 1, 5)])
def test_shapes_stay(shape):
    x = np.arange(math.prod(shape), dtype=float).reshape(shape)
    assert statistical_topk(x, 2).shape == statistical_topk(x, 2, mode="mask").shape == shape


def test_gradients():
    x = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for smooth in (0.0, 0.5):
        assert torch.autograd.gradcheck(lambda x, s=smooth: statistical_topk(x, 4, smooth=s), (x,))


def test_the_slope_of_the_smooth_form_does_not_jump():
    """Where one number crosses the threshold in small steps the slope changes in small steps; relu's jumps."""
    jumps = {}
    for smooth in (0.0, 0.1):
        slopes = []
        for last in torch.linspace(-1, 3, 801, dtype=torch.float64):
            x = torch.cat([torch.linspace(-1, 1, 15, dtype=torch.float64), last[None]]).requires_grad_()
            statistical_topk(x, 4, smooth=smooth)[-1].backward()
            slopes.append(float(x.grad[-1]))
        jumps[smooth] = np.abs(np.diff(slopes)).max()
    # the slope is clip(u / w, 0, 1) (1 - d theta / d x), and |du| <= 0.005: at most 0.05, and theta's own change
    assert jumps[0.1] < 0.1
    assert jumps[0.0] > 0.5


def test_where_nothing_passes_the_first_of_the_largest_does():
    """The mean of three times 0.1 is rounded above 0.1 in float64."""
    x = np.array([[0.1, 0.1, 0.1], [0.0, 1.0, 1.0]])
    assert x[0].sum() / 3 > 0.1
    assert statistical_topk(x, 1, mode="mask").tolist()[0] == [True, False, False]
    assert statistical_topk(x, 1).tolist()[0] == [0.0, 0.0, 0.0]


def counts(draw, n, k, rows=2000):
    rng = np.random.default_rng(0)
    parts = [statistical_topk(draw(rng, (100, n)), k, mode="mask").sum(-1) for _ in range(rows // 100)]
    return np.concatenate(parts)


def spread(n, k):
    """Return the standard deviation of the count for many normal numbers.

    To first order the count is sum of ``[y > z] - p + phi(z) (y + z (y^2 - 1) / 2)``: mean and deviation are sums, too.
    Its variance is ``n (p (1 - p) - phi(z)^2 (1 + z^2 / 2))``.
    """
    p, z = k / n, NormalDist().inv_cdf(1 - k / n)
    return math.sqrt(n * (p * (1 - p) - NormalDist().pdf(z) ** 2 * (1 + z * z / 2)))


@pytest.mark.parametrize(("n", "k"), [(1024, 82), (4096, 256), (1024, 512)])
def test_counts_of_normal_numbers(n, k):
    """The mean and the deviation of 2000 counts are those of the law, and no count leaves the proven bound.

    Both are within 5 of their own deviations: s / sqrt(2000), s / sqrt(4000); terms beyond first order move the mean by
    less than 1 of k, and the deviation by less than a tenth.
    """
    got, s = counts(lambda rng, shape: rng.normal(size=shape), n, k), spread(n, k)
    assert abs(got.mean() - k) < 5 * s / math.sqrt(2000) + 1
    assert abs(got.std() - s) < 5 * s / math.sqrt(4000) + s / 10
    assert np.abs(got - k).max() <= count_error(n, k, failure=1e-6)


@pytest.mark.parametrize(("n", "k", "ddof"), [(1024, 82, 1), (1024, 512, 0), (100, 90, 1), (10, 3, 0)])
def test_the_bound_at_its_corners(n, k, ddof):
    """The worst of the four corners of the mean's and the deviation's ranges, in 40 digits."""
    failure = 1e-3
    with mpmath.workdps(40):
        t, m = mpmath.log(6 / mpmath.mpf(failure)), n - 1
        z = mpmath.sqrt(2) * mpmath.erfinv(1 - 2 * mpmath.mpf(k) / n)
        worst = mpmath.mpf(0)
        for mean in (-1, 1):
            for chi in (m + 2 * mpmath.sqrt(m * t) + 2 * t, max(m - 2 * mpmath.sqrt(m * t), 0)):
                theta = mean * mpmath.sqrt(2 * t / n) + z * mpmath.sqrt(chi / (n - ddof))
                worst = max(worst, abs(1 - mpmath.ncdf(theta) - mpmath.mpf(k) / n))
        want = n * (worst + mpmath.sqrt(t / (2 * n)))
        # some 40 roundings of numbers below 4
        assert abs(count_error(n, k, failure=failure, ddof=ddof) - want) <= 160 * 2.0**-52 * n


def test_the_bound_shrinks_as_said():
    """Its share of n falls as 1/sqrt(n), and a bound for fewer failures is larger."""
    shares = [count_error(n, n // 16, failure=1e-3) / n for n in (10**4, 10**6, 10**8)]
    assert 9 < shares[0] / shares[1] < 11.5
    assert 9.5 < shares[1] / shares[2] < 10.5
    assert count_error(1000, 80, failure=1e-9) > count_error(1000, 80, failure=1e-3) > 5 * spread(1000, 80)


def test_heavy_tails_fail():
    """The negative control: of t(3)-distributed numbers far fewer pass than asked for, about 161 of 256."""
    got = counts(lambda rng, shape: rng.standard_t(3, size=shape), 4096, 256)
    assert 155 < got.mean() < 168
    assert got.mean() < 256 - 5 * spread(4096, 256)
    # with more numbers their count is outside the bound for normal ones, too
    got = counts(lambda rng, shape: rng.standard_t(3, size=shape), 65536, 4096, rows=100)
    assert (np.abs(got - 4096) > count_error(65536, 4096, failure=1e-6)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smooth", [0.0, 0.5])
def test_the_feed_forward_layer(kind, smooth):
    """Loops over the neurons that fire, in float64; what fires is statistical_topk's, tested above."""
    rng = np.random.default_rng(1)
    x, k1, k2, v = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 10), (4, 50), (6, 50), (50, 7)))
    given = [KINDS[kind](y) for y in (x, k1, k2, v)]
    got = to_numpy(spark_ffn(*given, k=8, smooth=smooth))
    fired = to_numpy(statistical_topk(given[0][..., :4] @ given[1], 8, smooth=smooth))
    assert 0 < (fired > 0).sum() < fired.size / 2
    eps = np.finfo(np.float32).eps
    for at in np.ndindex(2, 3):
        want, size = np.zeros(7), np.zeros(7)
        for j in np.flatnonzero(fired[at]):
            u = float(fired[at][j])
            gelu = u / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
            terms = x[at][4:].astype(np.float64) * k2[:, j]
            want += gelu * terms.sum() * v[j]
            size += gelu * np.abs(terms).sum() * np.abs(v[j])
        # 50 + 6 sums and products, gelu: 8 roundings and tanh of at most 4 ulp, its argument's error times at most 1
        assert (np.abs(got[at] - want) <= (50 + 6 + 2 + 8 + 4 + 8) * eps * size).all()


def test_neurons_below_the_threshold_give_nothing_at_all():
    rng = np.random.default_rng(1)
    x, k1, k2, v = (rng.normal(size=s) for s in ((1, 10), (4, 50), (6, 50), (50, 7)))
    off = statistical_topk(x[:, :4] @ k1, 8)[0] == 0
    other_k2, other_v = np.where(off, 1e3, k2), np.where(off[:, None], -1e3, v)
    assert (spark_ffn(x, k1, k2, v, k=8) == spark_ffn(x, k1, other_k2, other_v, k=8)).all()


def passed_by_loops(s, seen, k, eps, error):
    """Return which keys pass, from exact scores; check that no score is as near to a threshold as rounding goes."""
    found = np.zeros(s.shape, bool)
    for at in np.ndindex(s.shape[:3]):
        there = np.flatnonzero(seen[at[2]])
        if len(there) <= k:
            found[at][there] = True
            continue
        theta, off = threshold(s[at][there], k, 1, eps)
        assert (np.abs(s[at][there] - theta) > off + 4 * error).all()
        found[at][there] = s[at][there] > theta
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "causal", "n_q"), [(4, "bottom_right", 13), (3, None, 5), (40, "bottom_right", 13)])
def test_attention(kind, k, causal, n_q):
    """Weights are those of attention under a mask that exact statistics give, times softplus."""
    q, key, v = call(4, n_q=n_q, n_k=13, d=6, d_v=5)
    r, eps = 4, np.finfo(np.float32).eps
    got = to_numpy(spark_attention(*(KINDS[kind](x) for x in (q, key, v)), r=r, k=k, scale=0.7, causal=causal))
    q64, k64, v64 = (np.float64(x) for x in (q, np.repeat(key, 2, 1), np.repeat(v, 2, 1)))
    s1, s2 = (0.7 * a @ np.swapaxes(b, 2, 3) for a, b in ((q64[..., :r], k64[..., :r]), (q64[..., r:], k64[..., r:])))
    # a score of at most 4 terms: 6 roundings of their sizes' sum
    error = 6 * eps * (0.7 * np.abs(q64) @ np.swapaxes(np.abs(k64), 2, 3)).max()
    seen = np.tril(np.ones((n_q, 13), bool), 13 - n_q) if causal else np.ones((n_q, 13), bool)
    allowed = passed_by_loops(s1, seen, k, eps, error)
    units = np.broadcast_to(np.eye(13, dtype=np.float32), (2, 2, 13, 13))
    p = refattn.softmax_attention(q[..., :r], key[..., :r], units, scale=0.7, allowed=allowed, rounding="float64")
    want = (p * np.log1p(np.exp(s2))) @ v64
    size = (p * np.log1p(np.exp(s2))) @ np.abs(v64)
    # p: 4 errors of scores, 13 + 9 roundings; softplus: a score's error over its value (softplus(x) >= exp(x)/2 below
    # 0 and its slope is below both), 6 roundings; the products: 13 + 2
    slope = (1 / (1 + np.exp(-s2)) / np.log1p(np.exp(s2))).max()
    assert (np.abs(got - want) <= 1.1 * ((4 + slope) * error + (22 + 6 + 15) * eps) * size).all()
    kept = allowed.sum(-1)
    assert (kept[..., -1] == 13).all() if k > 12 else (kept[..., -1] < 13).all()


def test_unseen_keys_are_not_read():
    q, k, v = call(4, n_q=13, n_k=13, d=6)
    want = spark_attention(q, k, v, r=4, k=3)
    k[:, :, 9:] = np.nan
    with np.errstate(invalid="ignore"):  # later rows do see the NaN
        got = spark_attention(q, k, v, r=4, k=3)
    assert (got[:, :, :9] == want[:, :, :9]).all()


X = np.zeros((2, 8))
FFN = {"x": np.zeros((2, 10)), "k1": np.zeros((4, 9)), "k2": np.zeros((6, 9)), "v": np.zeros((9, 3)), "k": 2}
ATTENTION = {
    "query": np.zeros((1, 2, 3, 4)),
    "key": np.zeros((1, 1, 5, 4)),
    "value": np.zeros((1, 1, 5, 2)),
    "r": 2,
    "k": 2,
}
WRONG = [
    (statistical_topk, {"x": X, "k": 2}, {"k": 8}, "k: got 8, expected a whole number from 1 to 7"),
    (statistical_topk, {"x": X, "k": 2}, {"ddof": 2}, "ddof: got 2, expected a whole number from 0 to 1"),
    (statistical_topk, {"x": X, "k": 2}, {"mode": "hard"}, "mode: got 'hard', expected 'soft' or 'mask'"),
    (statistical_topk, {"x": X, "k": 2}, {"smooth": -1.0}, "smooth: got -1.0, expected a number in [0, inf)"),
    (statistical_topk, {"x": X, "k": 2}, {"x": X[:, :1]}, "x: shape is (2, 1), expected a last axis of 2 or more"),
    (count_error, {"n": 9, "k": 2, "failure": 0.1}, {"failure": 0.0}, "failure: got 0.0, expected a number in (0, 1]"),
    (spark_ffn, FFN, {"x": np.zeros((2, 4))}, "x: shape is (2, 4), expected a last axis of more than k1's 4 features"),
    (spark_ffn, FFN, {"k2": np.zeros((5, 9))}, "k2: shape is (5, 9), expected (6, 9), each at least 1"),
    (spark_ffn, FFN, {"v": np.zeros((8, 3))}, "v: shape is (8, 3), expected (9, features), each at least 1"),
    (spark_attention, ATTENTION, {"r": 4}, "r: got 4, expected a whole number from 1 to 3"),
    (spark_attention, ATTENTION, {"causal": "top_left"}, "causal: got 'top_left', expected 'bottom_right' or None"),
    (spark_attention, ATTENTION, {"k": 0}, "k: got 0, expected a whole number from 1 on"),
]


@pytest.mark.parametrize(("function", "good", "change", "text"), WRONG)
def test_wrong_calls(function, good, change, text):
    function(**good)
    with pytest.raises(InvalidInput, match=re.escape(text)):
        function(**{**good, **change})
