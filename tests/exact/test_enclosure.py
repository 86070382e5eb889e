from fractions import Fraction

import flint
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn.dtypes import FORMATS
from refattn.exact.enclosure import Enclosure
from refattn.exact.ties import _boundary

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


def test_a_boundary_inside_a_ball_is_found():
    form, single = FORMATS["bfloat16"], FORMATS["float32"]
    middle, tiny = Fraction(1) + Fraction(1, 256), Fraction(1, 2**200)
    for sign in (1, -1):
        ends = sorted(sign * (middle + s * tiny) for s in (1, -1))
        assert _boundary(*ends, form) == sign * middle
    assert _boundary(-tiny, tiny, form) == 0
    assert _boundary(Fraction(1), Fraction(2), form) is None
    top = Fraction(single.largest)
    assert _boundary(top, top * 2, single) == single.neighbours(single.largest)[1]
    half = Fraction(single.smallest_subnormal) / 2
    assert _boundary(half - tiny, half + tiny, single) == half


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
