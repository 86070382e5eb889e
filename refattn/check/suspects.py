"""The rows of a large call that look worst: they are compared with their exact values, too.

Of a large call some rows are compared with their exact values. So that every row is looked at, all of them are computed
once more in float64, which costs little, and those that differ most from it join the sample. What differs much is only
looked at: it is the exact value and the derived bound that decide.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..exact.arithmetics import Floats
from ..exact.run import run
from ..masks import unused
from ..problem import Problem
from ..scales import dequantised
from .call import Result
from .inputs.sample import Sample

__all__ = ["suspects"]

MOST = 4
"""Rows that are compared."""


def suspects(problem: Problem, result: Result) -> Sample | None:
    """Return the rows that differ most from float64, by out or by lse, of the head that has the worst.

    Parameters
    ----------
    problem : Problem
        A call with NumPy arrays, whose rows are defined one by one.
    result : Result
        What a kernel gave for the whole of it.

    Returns
    -------
    Sample or None
        None where every element is what float64 gives.
    """
    problem = dequantised(problem)
    both = np.concatenate([problem.value, np.abs(problem.value)], 3)  # the second half says what was added up
    plain = run(problem.replace(value=both), Floats(np.float64))
    out, size = np.split(plain["out"], 2, 3)
    off = _off(result.out, out, np.abs(size)).max(3, initial=0.0)
    if result.lse is not None and "lse" in plain:
        off = np.maximum(off, _off(result.lse, plain["lse"], np.ones(())))
    if (gone := unused(problem)) is not None:
        off = np.where(gone[0][:, None], 0.0, off)
    if not off.size or not off.max() > 0:
        return None
    batch, head, _ = (int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
    rows = np.argsort(-off[batch, head], kind="stable")
    rows = (rows if gone is None else rows[~gone[0][batch, rows]])[:MOST]
    return Sample(batch, (head * problem.heads_kv // problem.heads,), (head,), tuple(sorted(int(r) for r in rows)))


def _off(got: NDArray[np.generic], plain: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far elements are from float64's, over what was added up, as multiples of what is usual among them.

    It is inf where one of the two is no number.
    """
    x = got.astype(np.float64)
    with np.errstate(all="ignore"):
        far = np.abs(x - plain) / np.maximum(size, np.finfo(np.float64).tiny)
    same = (x == plain) | (np.isnan(x) & np.isnan(plain))
    far = np.where(same, 0.0, np.where(np.isnan(far), np.inf, far))
    some = far[(far > 0) & (far < np.inf)]
    with np.errstate(over="ignore"):
        return np.asarray(far / np.median(some)) if some.size else far
