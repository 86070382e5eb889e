import importlib.util
import sys
from dataclasses import astuple
from fractions import Fraction
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refattn import dtypes
from refattn.arrays import to_float64
from refattn.dtypes import FORMATS, format_of, is_float
from refattn.errors import InvalidInput

NARROW = [f for f in FORMATS.values() if f.precision < 24]
EVERY = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
TABLE = {
    "float64": (np.float64, 53, -1022, 1023, sys.float_info.max, True),
    "float32": (np.float32, 24, -126, 127, 2.0**128 - 2.0**104, True),
    "float16": (np.float16, 11, -14, 15, 65504.0, True),
    "bfloat16": (ml_dtypes.bfloat16, 8, -126, 127, 2.0**128 - 2.0**120, True),
    "float8_e4m3fn": (ml_dtypes.float8_e4m3fn, 4, -6, 8, 448.0, False),
    "float8_e5m2": (ml_dtypes.float8_e5m2, 3, -14, 15, 57344.0, True),
}
KNOWN = "float64, float32, float16, bfloat16, float8_e4m3fn, float8_e5m2"


def test_the_table_of_formats():
    spec = importlib.util.spec_from_file_location(dtypes.__name__, dtypes.__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    for formats in (FORMATS, anew.FORMATS):
        found = {key: astuple(f) for key, f in formats.items()}
        assert found == {name: (name, np.dtype(kind), *rest) for name, (kind, *rest) in TABLE.items()}
        assert [f.overflow for f in formats.values()] == [
            float("inf"), 2.0**128 - 2.0**103, 65520.0, 2.0**128 - 2.0**119, 464.0, 61440.0
        ]  # fmt: skip


@EVERY
def test_constants_are_those_of_the_dtype(form):
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


@EVERY
def test_zeros_infinities_nan_and_the_ends_of_the_range(form):
    inf, nan, most = float("inf"), float("nan"), sys.float_info.max
    past = most if form.precision == 53 else inf if form.infinities else nan
    over = inf if form.infinities else nan
    low, top, one = form.smallest_subnormal, 2.0 ** (form.emax - form.precision + 1), 2.0 ** (1 - form.precision)
    rows = [  # a number, what it rounds to, its ulp
        (0.0, 0.0, low),
        (1.0, 1.0, one),
        (low, low, low),
        (form.smallest_normal, form.smallest_normal, low),
        (form.largest, form.largest, top),
        (most, past, top),
        (inf, over, top),
        (nan, nan, nan),
    ]
    x, rounded, ulp = np.array(rows).T
    for sign in (1, -1):
        got = form.round_array(sign * x)
        np.testing.assert_array_equal(got, sign * rounded, strict=True)
        use = ~np.isnan(rounded)
        assert (np.signbit(got) == np.signbit(sign * x))[use].all()
        np.testing.assert_array_equal([form.round(sign * v) for v in x.tolist()], sign * rounded)
        np.testing.assert_array_equal(form.ulp_array(sign * x), ulp, strict=True)
        assert [form.ulp(sign * v) for v in x[:-2].tolist()] == ulp[:-2].tolist()


@EVERY
def test_arrays_of_other_kinds_of_numbers_are_taken_as_float64(form):
    exact = [Fraction(3, 8), 2**70, -5, 1.0]
    for found, want in (
        (form.round_array(exact), [form.round(x) for x in exact]),
        (form.ulp_array(exact), [form.ulp(x) for x in exact]),
    ):
        np.testing.assert_array_equal(found, want, strict=True)


@EVERY
@given(st.fractions(min_value=Fraction(1, 64), max_value=400))
@example(Fraction(1, 3))
@example(Fraction(2, 3))
def test_a_fraction_goes_to_the_nearest_number(form, x):
    low, high = form.neighbours(form.round(x))
    assert low <= x <= high
    assert -form.round(-x) == form.round(x)
    assert form.ulp(x) * Fraction(2) ** (form.precision - 1) <= x < form.ulp(x) * Fraction(2) ** form.precision
    assert FORMATS["float64"].round(x) == x.numerator / x.denominator


def test_format_of_understands_names_and_dtypes():
    import torch

    form = FORMATS["bfloat16"]
    for x in (torch.bfloat16, "bfloat16", "jax.numpy.bfloat16", form.dtype, form.dtype.type, form):
        assert format_of(x) is form
    assert format_of(SimpleNamespace(name="a.library.bfloat16")) is form
    assert format_of(np.float32) is format_of(np.dtype(">f4")) is FORMATS["float32"]
    assert is_float(torch.float8_e4m3fn)
    assert not is_float(np.int32)


@pytest.mark.parametrize(
    ("dtype", "name"), [("int8", "int8"), (np.int8, "int8"), ("quad", "quad"), ("some.quad", "quad")]
)
def test_what_is_no_format_is_refused(dtype, name):
    assert not is_float(dtype)
    with pytest.raises(InvalidInput) as caught:
        format_of(dtype)
    assert str(caught.value) == f"dtype: got {name!r}, expected one of {KNOWN}; cast the arrays first"


@pytest.mark.parametrize(
    ("short", "whole"), [("bf16", "bfloat16"), ("torch.bf16", "bfloat16"), ("E4M3", "float8_e4m3fn")]
)
def test_a_short_name_is_answered_with_the_whole_one(short, whole):
    with pytest.raises(InvalidInput) as caught:
        format_of(short)
    assert str(caught.value) == f"dtype: got {short.rpartition('.')[2]!r}; write {whole!r}"
    assert set(dtypes.SHORT.values()) <= set(FORMATS)


@pytest.mark.parametrize("name", [None, "1_000", "f4,,", "(1,2", "", SimpleNamespace(name=5)])
def test_what_names_no_format_is_refused(name):
    assert not is_float(name)
    with pytest.raises(InvalidInput, match=r"dtype: got .*, expected one of float64, float32, "):
        format_of(name)
