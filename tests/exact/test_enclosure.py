from fractions import Fraction

import flint
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn.dtypes import FORMATS
from refattn.exact.enclosure import Enclosure

finite = st.floats(width=64, allow_nan=False, allow_infinity=False)


@given(finite, st.integers(-60, 0), st.sampled_from(list(FORMATS)), st.floats(-1, 1))
def test_settle_is_right_where_it_decides(x, power, name, place):
    """A ball around x: if settle decides, every point of the ball rounds to its answer."""
    form = FORMATS[name]
    with flint.ctx.workprec(300):
        radius = abs(flint.arb(x)) * flint.arb(2) ** power
        ball = flint.arb(x, radius)
        e = Enclosure.of(np.array([ball], object))
        value, decided = e.settle(form)
    if decided[0]:
        point = Fraction(x) + Fraction(place) * abs(Fraction(x)) * Fraction(2) ** power
        want = form.round(point)
        assert value[0] == want or (np.isnan(value[0]) and np.isnan(want))


@given(finite, st.sampled_from(list(FORMATS)))
def test_points_are_always_decided(x, name):
    e = Enclosure.of(np.array([flint.arb(x)], object))
    value, decided = e.settle(FORMATS[name])
    assert decided[0]
    want = FORMATS[name].round(x)
    assert value[0] == want or (np.isnan(value[0]) and np.isnan(want))


def test_a_boundary_inside_is_found():
    form = FORMATS["bfloat16"]
    middle = Fraction(1) + Fraction(1, 256)
    for sign in (1, -1):
        e = Enclosure(np.array([sign * float(middle)]), np.zeros(1), np.array([1e-30]))
        assert not e.settle(form)[1][0]
        assert e.boundary((0,), form) == sign * middle
    near_zero = Enclosure(np.array([1e-40]), np.zeros(1), np.array([1e-39]))
    assert near_zero.boundary((0,), form) == 0
    assert not near_zero.rounds_to_zero((0,), FORMATS["float32"])
    assert near_zero.rounds_to_zero((0,), FORMATS["float16"])
    wide = Enclosure(np.array([1.0]), np.zeros(1), np.array([np.inf]))
    assert wide.boundary((0,), form) is None


def test_balls_become_sums_with_a_radius():
    with flint.ctx.workprec(200):
        third = flint.arb(1) / 3
        e = Enclosure.of(np.array([third, flint.arb("nan"), flint.arb(2) ** 5000, flint.arb(0)], object))
        assert abs(flint.arb(e.mid[0]) + flint.arb(e.tail[0]) - third) <= flint.arb(e.radius[0])
    assert 0 < e.radius[0] < 2.0**-100
    assert np.isnan(e.mid[1])
    assert np.isposinf(e.radius[1])
    assert np.isposinf(e.mid[2])
    assert e.radius[2] == 0
    assert e.mid[3] == e.radius[3] == 0


def test_error_counts_the_radius():
    e = Enclosure(np.array([1.0]), np.array([2.0**-60]), np.array([2.0**-70]))
    assert e.error(np.array([1.0]))[0] == 2.0**-60 + 2.0**-70
    assert e.error(np.array([1 + 2.0**-52]))[0] == pytest.approx(2.0**-52, rel=1e-2)
