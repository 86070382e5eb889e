"""What float arithmetic may lose in the functions that these tests compare with exact answers."""

import numpy as np


def unit(dtype):
    """Return a type's unit roundoff."""
    return float(np.finfo(dtype).eps) / 2


def score_error(q, k, scale, u):
    """Return the most that a score is off: (d + 2) roundings of a share u of sum |q_c k_c|, and 1 % more."""
    d = q.shape[-1]
    return 1.01 * (d + 2) * u * abs(scale) * float((np.abs(q) @ np.abs(np.swapaxes(k, -1, -2))).max())


def softmax_error(q, k, v, scale, u, times=1.0):
    """Return the most that a softmax's out, and its lse, is off.

    Score errors e and roundings of s - m (a share u of at most 2 max|s|), exp (2 u) and of the sum over n keys (n u)
    change a weight by a share e + (2 max|s| + n + 4) u; numerator and denominator both, and parts that are merged by
    exp(lse - top) once more, so four times it; `times` is the largest number of times that a key counts.
    """
    n = k.shape[-2]
    s = abs(scale) * float((np.abs(q) @ np.abs(np.swapaxes(k, -1, -2))).max()) + abs(np.log(times))
    share = score_error(q, k, scale, u) + (2 * s + n + 8) * u
    return 4 * share * float(np.abs(v).max()), 4 * share
