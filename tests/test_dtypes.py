from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn.arrays import to_float64
from refattn.dtypes import FORMATS, format_of, is_float
from refattn.errors import InvalidInput

NARROW = [f for f in FORMATS.values() if f.precision < 24]


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_constants_are_those_of_the_dtype(form):
    import ml_dtypes

    info = ml_dtypes.finfo(form.dtype)
    assert form.largest == float(info.max)
    assert form.smallest_normal == float(info.smallest_normal)
    assert form.smallest_subnormal == float(info.smallest_subnormal)
    assert form.unit_roundoff == float(info.eps) / 2


@pytest.mark.parametrize("form", NARROW, ids=lambda f: f.name)
def test_every_number_of_a_narrow_format_rounds_to_itself(form):
    size = form.dtype.itemsize
    every = to_float64(np.arange(2 ** (8 * size), dtype=np.uint64).astype(f"u{size}").view(form.dtype))
    every = every[np.isfinite(every)]
    assert (form.round_array(every) == every).all()
    some = every[:: max(1, len(every) // 2000)]
    assert all(form.round(Fraction(x)) == x for x in some.tolist())


@pytest.mark.parametrize("form", NARROW, ids=lambda f: f.name)
def test_midpoints_go_to_even_and_their_neighbours_to_the_nearer(form):
    size = form.dtype.itemsize
    bits = np.arange(2 ** (8 * size - 1) - 1, dtype=np.uint64).astype(f"u{size}")
    low, high = (to_float64(b.view(form.dtype)) for b in (bits, bits + np.ones(1, f"u{size}")))
    use = np.isfinite(low) & np.isfinite(high) & (high > low)
    low, high, even = low[use], high[use], np.where(bits[use] % 2 == 0, low[use], high[use])
    middle = (low + high) / 2
    assert (form.round_array(middle) == even).all()
    assert (form.round_array(np.nextafter(middle, -np.inf)) == low).all()
    assert (form.round_array(np.nextafter(middle, np.inf)) == high).all()
    for m, lo, hi, e in list(zip(middle, low, high, even, strict=True))[:: max(1, len(low) // 500)]:
        tiny = Fraction(1, 2**2000)
        assert form.round(Fraction(m)) == e
        assert form.round(Fraction(m) - tiny) == lo
        assert form.round(Fraction(m) + tiny) == hi
        assert form.neighbours(lo)[1] == form.neighbours(hi)[0] == Fraction(m)


@given(st.floats(width=64, allow_nan=False), st.sampled_from(list(FORMATS)))
def test_array_and_scalar_rounding_agree(x, name):
    form = FORMATS[name]
    one, many = form.round(x), float(form.round_array(np.array([x]))[0])
    assert one == many or (np.isnan(one) and np.isnan(many))
    assert np.signbit(one) == np.signbit(many) or one == 0 or np.isnan(one)


@given(st.floats(width=64, allow_nan=False, allow_infinity=False))
def test_float32_rounding_is_numpys(x):
    with np.errstate(over="ignore"):
        assert FORMATS["float32"].round(x) == float(np.float32(x))


def test_no_double_rounding_into_bfloat16():
    # float64 -> float32 -> bfloat16 would first reach a midpoint and then go to even
    x = 1 + 2.0**-8 + 2.0**-40
    assert FORMATS["bfloat16"].round(x) == 1 + 2.0**-7
    assert FORMATS["bfloat16"].round_array(np.array([x]))[0] == 1 + 2.0**-7


@pytest.mark.parametrize(
    ("name", "x", "want"),
    [
        ("float8_e4m3fn", 464, 448.0),  # the tie goes to the even 448
        ("float8_e4m3fn", Fraction(464) + Fraction(1, 10**30), float("nan")),
        ("float8_e5m2", 61440, float("inf")),
        ("float8_e5m2", 61439, 57344.0),
        ("float16", 65520, float("inf")),
        ("float16", 65519, 65504.0),
        ("float64", Fraction(2) ** 1024, float("inf")),
        ("float64", Fraction(1, 2**1075), 0.0),
        ("float64", Fraction(3, 2**1076), 5e-324),
    ],
)
def test_the_edges_of_the_range(name, x, want):
    got = FORMATS[name].round(x)
    assert got == want or (np.isnan(got) and np.isnan(want))
    back = FORMATS[name].round(-x)
    assert back == -want or np.isnan(want)


@given(st.floats(min_value=1e-300, max_value=1e300), st.sampled_from(list(FORMATS)))
def test_ulp_is_the_spacing(x, name):
    form = FORMATS[name]
    assert form.ulp(x) == form.ulp_array(np.array([x]))[0] == form.ulp(-x)
    if form.smallest_normal <= x < form.largest:
        assert 2.0**-(form.precision) <= form.ulp(x) / x <= 2.0 ** (1 - form.precision)


def test_ulp_of_zero_and_beyond():
    f = FORMATS["float16"]
    assert f.ulp(0) == f.smallest_subnormal == 2.0**-24
    assert f.ulp(1e9) == f.ulp(65504) == 32
    assert np.isnan(f.ulp_array(np.array([np.nan]))[0])


def test_format_of_understands_names_and_dtypes():
    import torch

    assert format_of(torch.bfloat16) is format_of("bfloat16") is format_of(FORMATS["bfloat16"].dtype)
    assert format_of(np.float32) is FORMATS["float32"]
    assert is_float(torch.float8_e4m3fn)
    assert not is_float(np.int32)
    with pytest.raises(InvalidInput, match="dtype: got 'int8', expected one of float64, float32"):
        format_of("int8")
