"""Families made to break a certified engine, in every format, against balls of 600 bits; and an exhaustive one."""

from fractions import Fraction
from functools import cache

import mpmath
import numpy as np
import pytest

from refattn import Problem, evaluate
from refattn.arrays import from_float64, to_float64
from refattn.dtypes import FORMATS
from refattn.exact import run as runner
from refattn.exact.arithmetics import Balls
from refattn.exact.run import run
from refattn.exact.ties import _fraction

N, M, D = 4, 40, 8


def families():
    """Yield name, q, k, v and more arguments."""
    r = np.random.default_rng(0)
    g = r.standard_normal
    f32 = lambda x: np.asarray(x).astype(np.float32).astype(np.float64)  # noqa: E731
    f16 = lambda x: np.asarray(x).astype(np.float16).astype(np.float64)  # noqa: E731
    q, k, v = f32(g((N, D))), f32(g((M, D))), f32(g((M, D)))
    pairs = np.repeat(k[: M // 2], 2, 0)
    halves = np.concatenate([k[: M // 2], k[: M // 2]])
    yield "gaussian", q, k, v, {}
    yield "logits near 1e5", f32(q * 300), f32(k * 300), v, {}
    yield "nearly tied scores", np.ones((N, D)), f32(1 + 2.0**-23 * r.integers(0, 3, (M, D))), v, {}
    noise = g((M // 2, D))
    yield "values cancel to 2^-30", q, halves, np.concatenate([noise, -noise + 2.0**-30 * g((M // 2, D))]), {}
    yield "values cancel to 0", q, halves, np.concatenate([noise, -noise]), {}
    yield "float64 subnormal values", q, k, np.round(g((M, D)) * 50) * 2.0**-1074, {}
    yield "float32 subnormal values", q, k, np.round(g((M, D)) * 50) * 2.0**-149, {}
    wide = lambda n, low, high: g((n, D)) * 2.0 ** r.integers(low, high, (n, D))  # noqa: E731
    yield "wide exponents", wide(N, -40, 3), wide(M, -60, 3), wide(M, -100, 100), {}
    yield "very wide values", q, k, wide(M, -900, 900), {}
    yield "equal values", q, k, np.tile(f16(g((1, D))), (M, 1)), {}
    point = f16(np.abs(g((1, D))) + 1)
    step = 2.0 ** np.floor(np.log2(point))
    middle = point + step * 2.0**-11
    yield "equal values at float16 midpoints", q, k, np.tile(middle, (M, 1)), {}
    yield "uniform weights", np.zeros((N, D)), k, f16(v), {}
    even = np.where(np.arange(M)[:, None] % 2 == 0, point, point + step * 2.0**-10)
    yield "uniform weights, mean at a midpoint", np.zeros((N, D)), k, even, {}
    yield "pairs of equal scores, means at midpoints", q, pairs, even, {}
    broken, far, near = np.tile(middle, (M, 1)), k.copy(), q.copy()
    broken[5] += step[0] * 2.0**-30
    far[5] = 0
    far[:, 0], far[5, 0], near[:, 0] = 1, -300, 300
    yield "a tie broken by exp(-3e4)", near, far, broken, {}
    yield "values near 1e307", q, k, g((M, D)) * 1e307, {}
    yield "queries and keys near 1e-200", q * 1e-200, k * 1e-200, v, {}
    yield "negative scale, sink and causal", q, k, v, {"scale": -2.0, "sink": np.array([1.5]), "causal": "bottom_right"}


FAMILIES = {name: (q, k, v, more) for name, q, k, v, more in families()}


def brute(problem, form, bits=600):
    """Round both ends of a ball of many bits; also return where that decides."""
    f = Balls(bits)
    with f.working():
        values = run(problem, f, None)["out"]
        out, known = np.zeros(values.shape), np.zeros(values.shape, bool)
        for index, x in np.ndenumerate(values):
            a, b = (form.round(_fraction(e)) for e in (x.lower(), x.upper()))
            if a == b or (np.isnan(a) and np.isnan(b)):
                out[index], known[index] = a, True
    return out, known


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_no_mismatch_and_all_end(name, form, stream, monkeypatch):
    monkeypatch.setattr(runner, "STREAM_FROM", 1 if stream else 10**9)
    q, k, v, more = FAMILIES[name]
    problem = Problem(*(x[None, None] for x in (q, k, v)), **more)
    answer = evaluate(problem, rounding=form)
    assert answer.undecided == {"out": 0, "lse": 0}
    (want, known), got = brute(problem, FORMATS[form]), to_float64(answer.out)
    assert known.any() or any(x in name for x in ("midpoint", "cancel to 0", "tie broken"))
    assert np.array_equal(got[known], want[known], equal_nan=True)


def test_every_bfloat16_score_of_two_keys():
    """All 65280 finite bfloat16 scores against 0: a weight is correctly rounded, and mpmath agrees."""
    form = FORMATS["bfloat16"]
    scores = to_float64(np.arange(2**16, dtype=np.uint16).view(form.dtype))
    scores = scores[np.isfinite(scores)]
    q = scores[:, None]
    k, v = np.array([[1.0], [0.0]]), np.array([[1.0], [0.0]])
    problem = Problem(*(from_float64(x[None, None], "bfloat16") for x in (q, k, v)), scale=1.0)
    answer = evaluate(problem, rounding="bfloat16")
    assert answer.undecided["out"] == 0
    got = to_float64(answer.out).ravel()
    mp = mpmath.ctx_mp.MPContext()
    mp.prec = 400
    power = cache(lambda size: mp.exp(-mp.mpf(size)))  # one for both signs
    for s, x in zip(scores.tolist(), got.tolist(), strict=True):
        if abs(s) > 300:  # beyond that the weight is 0, 1 or below the smallest subnormal by far
            assert x == (1.0 if s > 0 else 0.0)
            continue
        e = power(abs(s))
        exact = (1 if s >= 0 else e) / (1 + e)
        _, man, exp, _ = exact._mpf_
        assert x == form.round(Fraction(int(man)) * Fraction(2) ** int(exp))
