"""The bounds of merged parts beside the largest errors that roundings can make."""

import pytest

from refattn.theory.merging import TRACED, _largest, rounding


def pairs(given):
    return [x for x in _largest(*given) if isinstance(x, tuple)]


@pytest.mark.parametrize("given", TRACED)
def test_bounds_are_near_what_roundings_can_do(given):
    shares = [float(error / bound) for error, bound in pairs(given)]
    assert 1 / 4 < max(shares) < 1


def test_traced_errors_are_what_is_measured():
    shares = [float(error / bound) for given in TRACED for error, bound in pairs(given)]
    assert float(rounding().measured) == pytest.approx(max(shares))
