"""A model whose types are coarse, half floats inside: what underflow costs shows beside what roundings cost."""

from fractions import Fraction

import numpy as np

from refattn.check.bounds.losses import Losses
from refattn.check.model import C, Model

U, TINY = 2.0**-11, 2.0**-25  # float16
S = 2.0**-8  # bfloat16, in which scores are stored
W, TINY_W = 2.0**-3, 2.0**-17  # float8_e5m2, to which weights are rounded
CU, EXP, TILES, DEPTH = C * U**2, 3, 3, 4
MODEL = Model("float16", "float8_e5m2", "bfloat16", exp_ulps=EXP, tile=2, chain=2)
SEEN = np.array([[True, True, False, True, False, True]])


def arithmetic():
    return Losses(MODEL, 6)


def times(n):
    """The largest relative error of n roundings."""
    return float((1 + Fraction(U)) ** n - 1)


def alike(got, *terms):
    """Fewer than 2**10 operations on terms that are not negative, each off by 2**-53."""
    wanted = np.broadcast_to(sum(np.asarray(x, np.float64) for x in terms), np.shape(got) or ())
    return bool((np.abs(got - wanted) <= 2.0**-43 * np.abs(wanted)).all())


def leaf(f, a, axes, err=0.0, var=0.0, marks=(), seen=None):
    x = f.leaf(np.array(a, np.float64), axes, np.asarray(err, np.float64), np.asarray(var, np.float64))
    x.node.marks, x.node.seen = frozenset(marks), seen
    return x


def scores(f, a=((1.0, 0.25, -2.0, 4.0, 3.0, -0.5),), err=2.0**-6, var=2.0**-9, marks=()):
    """A row of six scores, of error and variance 2**-6 and 2**-9 times 1 to 6."""
    by = np.arange(1.0, 7.0)[None]
    return leaf(f, a, ("q", "k"), err * by, var * by, marks)


def walk(terms):
    sums = np.cumsum(terms)
    return max(np.mean(sums**2), sums[-1] ** 2 / 3 + np.sum(np.square(terms)) / 6)
