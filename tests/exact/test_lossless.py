"""Sums of products that are said to be exact are: against fractions, with numbers of few and of many bits."""

from fractions import Fraction

import numpy as np
import pytest

from refattn.exact.levels import Bounded, Level
from refattn.exact.lossless import grain


def exactly(a, b):
    rows = [[Fraction(x) for x in row] for row in a.tolist()]
    columns = [[Fraction(x) for x in column] for column in b.T.tolist()]
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in columns] for row in rows]


def few_bits(rng, shape, bits):
    """Numbers of so many bits, a quarter of them smaller by up to 2**20."""
    x = rng.integers(-(2**bits), 2**bits + 1, shape).astype(float)
    return x * np.exp2(-rng.integers(0, 21, shape) * (rng.random(shape) < 0.25))


@pytest.mark.parametrize("level", range(4))
def test_what_is_said_to_be_exact_is(level):
    rng, said = np.random.default_rng(level), []
    for bits in (1, 12, 19, 22, 23, 24, 25, 26, 40, 52):
        a, b = few_bits(rng, (6, 16), bits), few_bits(rng, (16, 5), bits)
        a[0], a[1, 3:] = 0, 0
        f = Level(level)
        found = f.array(a) @ f.array(b)
        low, r = (np.broadcast_to(x, found.h.shape) for x in (found.l, found.r))
        for i, row in enumerate(exactly(a, b)):
            for j, x in enumerate(row):
                gap = abs(Fraction(found.h[i, j]) + Fraction(low[i, j]) - x)
                assert gap <= Fraction(r[i, j])
                said.append((bits, r[i, j] == 0))
    assert all(x for bits, x in said if bits == 1)
    assert all(x for bits, x in said if bits <= 19) == (level == 3)  # of 39 bits: two heads of each
    assert not all(x for _, x in said)


def test_a_row_of_many_bits_leaves_the_others_exact():
    a = np.ones((3, 8))
    a[1] += 2.0**-52
    for level in (0, 1):
        f = Level(level)
        r = np.broadcast_to((f.array(a) @ f.array(np.full((8, 2), 3.0))).r, (3, 2))
        assert (r[[0, 2]] == 0).all()
        assert (r[1] > 0).all()


@pytest.mark.parametrize("level", [0, 1, 3])
def test_what_leaves_the_range_is_never_exact(level):
    f = Level(level)
    for a, b in ((2.0**-540, 3 * 2.0**-540), (2.0**600, 2.0**600)):
        with np.errstate(all="ignore"):
            found = f.array(np.full((1, 4), a)) @ f.array(np.full((4, 1), b))
        assert not (found.r == 0).any()


def test_wide_sums_are_exact_where_nothing_is_rounded():
    f = Level(0)
    one = f.array(np.ones((2, 80)))
    x = np.ones((2, 80))
    x[1, 3] = 2.0**53
    assert ((one + f.array(x)).r == 0).ravel().tolist() == [True, False]


def test_grain():
    assert grain(np.array([[12.0, -0.5], [0.0, 0.0], [3.0, 2.0**-1074]]), 1).ravel().tolist() == [-1, np.inf, -1074]
    assert grain(np.array([[8.0, 24.0]])) == 3


def test_quotients_by_powers_of_two_are_exact_and_others_not():
    f = Level(1)
    x = f.array(np.array([[3.0, 0.0], [5.0, 2.0**-900], [7.0, 1.0]]))
    found = x / f.array(np.array([[4.0], [2.0**20], [3.0]]))
    assert (np.broadcast_to(found.r, (3, 2)) == 0).tolist() == [[True, True], [True, False], [False, False]]
    assert found.h[:2].tolist() == [[0.75, 0.0], [5 * 2.0**-20, 2.0**-920]]
    wide = Bounded(f, x.h, x.l, np.full((3, 1), 2.0**-60))
    assert (np.broadcast_to((wide / f.array(np.full((3, 1), 4.0))).r, (3, 2)) > 0).all()
