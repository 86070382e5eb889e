"""One text, every arithmetic: mpmath inside its Arb ball, intervals around it, precisions agreeing."""

import flint
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import VARIANTS, Problem
from refattn.check.inputs.families import cases
from refattn.exact.arithmetics import Balls, Floats, Intervals, Multiprecision
from refattn.exact.lowering import lower
from refattn.exact.run import run
from refattn.variants import Rows

SMALL = [
    (v, c.name)
    for v in VARIANTS
    for c in cases(v)
    if c.family in ("gaussian", "shifted", "sparse", "extreme")
    and not c.name.endswith(("dim-128", "masked-tail"))  # too wide, and nothing but mask in the last keys
]


def shrunk(variant, name):
    p = next(c for c in cases(variant) if c.name == name).problem("float32")
    small = cut(p)
    # an operator whose options say how many keys there are is cut once its mask is written out
    return small if VARIANTS[variant].takes(small) else cut(lower(p).problem)


def cut(p):
    rows = -6 if p.n_q == p.n_k else -3  # square calls stay so
    found = {"query": p.query[:1, :, rows:], "key": p.key[:1, :, -6:], "value": p.value[:1, :, -6:, :5]}
    for mask in ("bias", "allowed", "weight"):
        if getattr(p, mask) is not None:
            x = getattr(p, mask)
            found[mask] = x[:1, :, rows:][..., -6:] if x.shape[2] > 1 else x[:1, ..., -6:]
    if p.cu_seqlens_q is not None:  # 21 tokens become 6
        found |= {n: np.minimum(getattr(p, n) // 3, 6) for n in ("cu_seqlens_q", "cu_seqlens_k")}
    if p.state is not None:
        found["state"] = p.state[: None if p.cu_seqlens_q is not None else 1, ..., :5]
    found |= {n: x[:1, :, -6:] for n in ("alpha", "beta") if (x := getattr(p, n)) is not None}
    found |= {n: x[:1] for n in ("lengths_q", "lengths_k", "offset") if np.ndim(x := getattr(p, n)) > 0}
    for name, most in (("lengths_q", -rows), ("lengths_k", 6)):
        if name in found:
            found[name] = np.minimum(found[name], most)
    return p.replace(**found)


def exactly(parts):
    """mpmath's (sign, mantissa, exponent, bits) as an exact ball."""
    sign, man, exp, _ = parts
    return flint.arb(int(-man if sign else man)) * flint.arb(2) ** int(exp)


@pytest.mark.parametrize(("variant", "name"), SMALL)
def test_mpmath_lies_in_its_ball_and_in_its_interval(variant, name):
    p = shrunk(variant, name)
    balls = Balls(128)
    with balls.working():
        ball = run(p, balls, None)
    if not all(isinstance(x, int | float) or x.is_finite() for x in ball["out"].ravel()):
        with pytest.raises(ZeroDivisionError):  # a denominator of exactly 0
            run(p, Multiprecision(400), None)
        return
    mp = run(p, Multiprecision(400), None)
    iv = run(p, Intervals(128), None)
    with flint.ctx.workprec(3000):
        for array, values in ball.items():
            for b, m, i in zip(values.ravel(), mp[array].ravel(), iv[array].ravel(), strict=True):
                if isinstance(b, int | float):
                    assert m == b
                    continue
                # a number of 400 bits is a point beside a ball of 128: no slack but its own last 150 bits
                point = exactly(m._mpf_)
                slack = abs(point) * flint.arb(2) ** -250 + flint.arb(2) ** -2500
                assert b.lower() - slack <= point <= b.upper() + slack
                low, high = (exactly(x) for x in i._mpi_)
                assert low - slack <= point <= high + slack


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [64, 200, 777])
def test_rising_precision_agrees(call_of, variant, bits):
    p = call_of(variant)
    results = []
    for b in (bits, 2 * bits):
        f = Balls(b)
        with f.working():
            results.append(run(p, f, None)["out"])
    with flint.ctx.workprec(4 * bits):
        for low, high in zip(results[0].ravel(), results[1].ravel(), strict=True):
            assert low.overlaps(high)
            assert low.rel_accuracy_bits() > bits - 25
            assert high.rel_accuracy_bits() > 2 * bits - 25


@given(st.integers(0, 10**6), st.sampled_from([n for n, v in VARIANTS.items() if isinstance(v.shape, Rows)]))
def test_float64_is_near_the_ball(seed, variant):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, 1, n, 4)) * 2.0 ** rng.integers(-3, 3) for n in (3, 5, 5))
    p = Problem(q, k, v, variant=variant)
    f = Balls(96)
    with f.working():
        exact = run(p, f, None)["out"]
    plain = run(p, Floats(), None)["out"]
    for x, b in zip(plain.ravel(), exact.ravel(), strict=True):
        assert abs(float(b) - x) <= 1e-12 * (1 + np.abs(v).max())


def test_float32_is_float32(make):
    assert run(make(), Floats(np.float32), None)["out"].dtype == np.float32


def test_the_tiling_changes_nothing(make, monkeypatch):
    from refattn.exact import run as module

    p = make(9, 11, h=1)
    f = Balls(128)
    with f.working():
        whole = run(p, f, None)["out"]
        monkeypatch.setattr(module, "TILE", 11)
        rows = run(p, f, None)["out"]
    assert all(
        a.overlaps(b) and abs(float(a) - float(b)) < 1e-30 for a, b in zip(whole.ravel(), rows.ravel(), strict=True)
    )
