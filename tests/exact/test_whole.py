"""Whole numbers with a unit: what they give is what fractions give; what has no fraction is refused."""

from fractions import Fraction

import numpy as np
import pytest

from refattn import UnsupportedProblem
from refattn.exact.whole import Whole

F = Whole()
X, Y = (np.ldexp(np.random.default_rng(i).standard_normal((3, 3)), [[-900, 0, 7]]) for i in (0, 1))
X[0, 0] = -0.0


def fractions(x):
    return np.vectorize(Fraction, otypes=[object])(x)


def numbers(m):
    return m.a * m.unit


@pytest.mark.parametrize(
    "do",
    [
        lambda x, y: x @ y.T,
        lambda x, y: x + y,
        lambda x, y: 1 - x,
        lambda x, y: x * y,
        lambda x, y: -x / 3 + 2,
        lambda x, y: x / y,
        lambda x, y: (x * -0.5)[:, [2, 0]] if isinstance(x, np.ndarray) else (x * -0.5).columns(np.array([2, 0])),
    ],
)
def test_operations_are_those_of_fractions(do):
    assert (numbers(do(F.array(X), F.array(Y))) == do(fractions(X), fractions(Y))).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_below_0_becomes_0(sign):
    x = fractions(X) * sign
    assert (numbers((F.array(X) * sign).relu()) == np.where(x > 0, x, 0)).all()


def test_what_is_no_fraction_is_refused():
    x = F.array(X)
    assert numbers(x * F.rsqrt(4))[2, 2] == Fraction(X[2, 2]) / 2
    for do, text in (
        (lambda: x * F.rsqrt(2), "rsqrt: whole numbers do not have it"),
        (lambda: x.exp(), "exp: whole numbers do not have it"),
        (lambda: x / x, "a division by 0: whole numbers have no quotient"),
    ):
        with pytest.raises(UnsupportedProblem, match=f"^{text}$"):
            do()
