"""How kernels add, beside sums in rationals that are cut off and rounded term by term."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest

from refattn.check.model import Model
from refattn.check.sums import Adder
from refattn.dtypes import FORMATS


def exponent(x):
    x = abs(Fraction(x))
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def cut(x, place):
    """Cut a rational off toward zero to a multiple of 2**place."""
    unit = Fraction(2) ** place
    return (1 if x > 0 else -1) * floor(abs(x) / unit) * unit


def step(c, x, y, bits):
    """One step of a matrix unit, in rationals: the exponent of a product is the sum of its factors'."""
    terms = [(Fraction(a) * Fraction(b), exponent(a) + exponent(b)) for a, b in zip(x, y, strict=True) if a and b]
    terms += [(Fraction(c), exponent(c))] if c else []
    if not terms:
        return 0.0
    top = max(e for _, e in terms)
    total = sum(cut(t, top - bits) for t, _ in terms)
    return float(cut(total, max(exponent(total), -126) - min(bits + 1, 24) + 1)) if total else 0.0


@pytest.mark.parametrize(("bits", "fused", "n"), [(13, 32, 70), (23, 4, 9), (25, 16, 33), (8, 3, 11)])
def test_a_matrix_unit_is_as_in_rationals(bits, fused, n):
    rng = np.random.default_rng(bits)
    f8 = FORMATS["float8_e4m3fn"]
    x, y = (f8.round_array(rng.normal(size=s) * np.exp2(rng.integers(-4, 5, s))) for s in ((5, n), (n, 3)))
    start = np.float32(rng.normal(size=(5, 3))).astype(float)
    x[0], start[0] = 0.0, 0.0  # nothing to add
    adder = Adder(Model(aligned_bits=bits, fused=fused), FORMATS["float32"].round_array)
    found = adder.run(start, x, y)
    for i, j in np.ndindex(5, 3):
        c = start[i, j]
        for at in range(0, n, fused):
            c = step(c, x[i, at : at + fused], y[at : at + fused, j], bits)
        assert found[i, j] == c
    assert (found == found.astype(np.float32)).all()


def test_float8_on_hopper_loses_what_is_8192_times_smaller():
    """13 bits below 1 are kept: 2**-13 is added, all of it, and 2**-14 not at all, however often."""
    adder = Adder(Model(aligned_bits=13, fused=32), FORMATS["float32"].round_array)
    ones = np.ones((1, 64))
    for small, wanted in ((2.0**-13, 1 + 64 * 2.0**-13), (2.0**-14, 1.0)):
        assert adder.run(np.ones((1, 1)), ones, np.full((64, 1), small)) == wanted
    assert adder.run(-np.ones((1, 1)), ones, np.full((64, 1), -(2.0**-14))) == -1


@pytest.mark.parametrize("accumulator", ["float32", "float16", "bfloat16", "float64"])
def test_each_product_and_each_addition_is_rounded(accumulator):
    form, rng = FORMATS[accumulator], np.random.default_rng(0)
    x, y = (form.round_array(rng.normal(size=s)) for s in ((4, 9), (9, 2)))
    found = Adder(Model(accumulator=accumulator), form.round_array).run(np.zeros((4, 2)), x, y)
    for i, j in np.ndindex(4, 2):
        c = 0.0
        for a, b in zip(x[i], y[:, j], strict=True):
            c = form.round(Fraction(c) + Fraction(form.round(Fraction(a) * Fraction(b))))
        assert found[i, j] == c


def test_integers_are_added_exactly_and_parts_are_as_long_as_the_model_says():
    x, y = np.full((1, 1000), 127.0), np.full((1000, 1), 127.0)
    adder = Adder(Model(), FORMATS["float32"].round_array)
    assert adder.run(np.zeros((1, 1)), x, y, whole=True) == np.float32(1000 * 127 * 127)
    assert adder.part == 512
    assert Adder(Model(aligned_bits=13, fused=32, promoted=128), adder.rounded).part == 128
    assert Adder(Model(aligned_bits=13, fused=32), adder.rounded).part > 2**40
