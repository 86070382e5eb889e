"""What matrix units lose, beside what one that cuts off does: never more, and about as much as is expected."""

from fractions import Fraction

import numpy as np
import pytest

from refattn.check.bounds.units import Unit, exponents, last_places
from refattn.check.model import Model
from refattn.check.sums import Adder
from refattn.dtypes import FORMATS

F8 = FORMATS["float8_e4m3fn"]


def test_places():
    x = np.array([1.0, 1.5, -3.0, 2.0**-30, 0.1, 0.0])
    assert exponents(x)[:4].tolist() == [0, 0, 1, -30]
    assert exponents(x)[5] < -(10**6)
    assert last_places(x, 4).tolist() == [0, -1, 0, -30, -7, 0]
    assert last_places(x, 53)[4] == -55  # 0.1 is m 2**-55, m odd
    assert Fraction(0.1).denominator == 2**55


def test_the_coefficient_is_the_proofs():
    """100 terms, 64 of them seen, in steps of 32: 4 steps of terms and sums, cut off before and after."""
    unit = Unit.of(Model(aligned_bits=13, fused=32))
    assert (unit.kept, unit.joins(100)) == (14, 0)
    assert unit.cut(64, 100) == (64 + 4) * 2.0**-13 + 4 * 2.0**-13
    assert unit.cut(np.array([2, 100]), 100).tolist() == [(2 + 2 + 2) * 2.0**-13, (100 + 8) * 2.0**-13]
    promoted = Unit.of(Model(aligned_bits=13, fused=32, promoted=64))
    assert promoted.joins(100) == 2
    assert promoted.cut(100, 100) == (64 + 2 + 2) * 2.0**-13
    wide = Unit.of(Model(aligned_bits=25, fused=16))
    assert wide.cut(16, 16) == 17 * 2.0**-25 + 2.0**-23  # sums keep the 24 bits of float32
    assert Unit.of(Model()) is None


@pytest.mark.parametrize(("bits", "fused", "promoted"), [(13, 32, 0), (13, 32, 64), (23, 4, 0), (25, 16, 0)])
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_what_is_cut_off_is_within_the_bound_and_as_expected(bits, fused, promoted, shift):
    rng, n = np.random.default_rng(0), 256
    model = Model(aligned_bits=bits, fused=fused, promoted=promoted)
    unit, adder = Unit.of(model), Adder(model, lambda x: x)  # parts are added exactly here
    form = F8 if bits == 13 else FORMATS["float16"]
    x = form.round_array(np.exp(rng.normal(size=(40, n))))
    y = form.round_array(rng.normal(size=(n, 16)) + shift)
    part = promoted or n
    found = sum(adder.run(np.zeros((40, 16)), x[:, i : i + part], y[i : i + part]) for i in range(0, n, part))
    error = np.abs(found - x @ y)  # sums of products of 22 bits are exact in float64, or off by 2**-53
    assert (error <= unit.cut(n, n) * (np.abs(x) @ np.abs(y))).all()
    assert error.any()
    expected = np.sqrt(np.mean(unit.squares(x, y, (form.precision,) * 2)))
    assert 0.8 < np.sqrt(np.mean(error**2)) / expected < 1.25


def test_one_term_that_is_lost_whole_is_expected():
    unit = Unit.of(Model(aligned_bits=13, fused=2))
    x, y = np.array([[1.0, 2.0**-7]]), np.array([[1.0], [2.0**-7]])
    assert unit.squares(x, y, (4, 4)).item() == 2.0**-28
    assert unit.squares(x, 0 * y, (4, 4)).item() == 0
    assert unit.squares(x[:, :1], y[:1], (4, 4)).item() == 0


def test_rows_at_a_time_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    x, y, unit = rng.normal(size=(9, 40)), rng.normal(size=(40, 3)), Unit.of(Model(aligned_bits=13, fused=8))
    whole = unit.squares(x, y, (8, 8))
    monkeypatch.setattr("refattn.check.bounds.units.ALIVE", 48)
    assert (unit.squares(x, y, (8, 8)) == whole).all()
