"""Numbers by how far a key lies ahead of its query, as URPE learns them: a bias b[j - i], and gradients by b and c."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import dtype_name, like, to_float64, to_numpy
from ..dtypes import FORMATS
from ..errors import InvalidInput, UnsupportedProblem
from ..exact.doubledouble import two_prod
from ..exact.driver import evaluate
from ..problem import Problem
from .arguments import axes, instance, namespace, whole
from .parts import numbers

__all__ = ["toeplitz_bias", "toeplitz_bias_gradient", "toeplitz_gain_gradient"]


def toeplitz_bias(table: Any, n_q: int, n_k: int, *, offset: int = 0) -> Any:
    """Return a bias by distance: the head's number for key j - query (i + offset), the end ones beyond.

    Parameters
    ----------
    table : (h, 2 reach + 1) array
        A row for each head: numbers for the distances from -reach to reach. With a reach of n - 1 each distance of n
        tokens has its own.
    n_q, n_k : int
        Queries and keys.
    offset : int
        The position of the first query.

    Returns
    -------
    (1, h, n_q, n_k) array
        For ``Problem(bias=...)``, of the table's library and type.

    Raises
    ------
    InvalidInput
        A table that is no array (h, 2 reach + 1), an offset that is no integer.

    Notes
    -----
    Source: the bias of URPE (Luo et al., arXiv 2205.13401; its `multihead_attention.py` was read). The factors that it
    multiplies weights with are the option ``gain`` of the operator ``urpe``.
    """
    namespace(table=table)
    axes("table", table, "heads", "distances")
    x = to_numpy(table, "table")
    if x.shape[1] % 2 == 0:
        raise InvalidInput(f"table: got shape {x.shape}, expected (heads, 2 reach + 1), an odd number of distances")
    at = _columns(whole("n_q", n_q, 0), whole("n_k", n_k, 0), x.shape[1] // 2, offset)
    return like(np.ascontiguousarray(x[:, at][None]), table)


def toeplitz_bias_gradient(dbias: Any, reach: int, *, offset: int = 0) -> NDArray[np.float64]:
    """Return the gradient by a table of distances of that by its bias: sums over diagonals, each rounded once.

    What is allowed of it, and the radius of an exact one, are the same sums of what is allowed of dbias, and of its
    radius, each element off by one rounding more.

    Parameters
    ----------
    dbias : (1, h, n_q, n_k) array
        The gradient by a bias that all batch items share: ``refattn.evaluate(problem, gradients=dout).dbias``.
    reach : int
        The table's: it has 2 reach + 1 distances.
    offset : int
        As in :func:`toeplitz_bias`.

    Returns
    -------
    (h, 2 reach + 1) float64 array
        The end ones are sums over all diagonals from there on.

    Raises
    ------
    InvalidInput
        A gradient of another shape, and as :func:`toeplitz_bias`.
    """
    x = _of_bias(dbias)
    columns = 2 * whole("reach", reach, 0, 2**31) + 1
    at = _columns(x.shape[1], x.shape[2], reach, offset).ravel()
    order = np.argsort(at, kind="stable")
    ends = np.searchsorted(at[order], np.arange(1, columns))
    return np.array([[_exact_sum(d) for d in np.split(one.ravel()[order], ends)] for one in x])


def toeplitz_gain_gradient(problem: Problem, dout: Any) -> tuple[NDArray[np.float64], ...]:
    """Return the gradient by a call's gain: ``dc[r] = sum_{j - i' = r} p_ij (dout_i·v_j)``, p before the gain.

    Out is linear in the gain, so this is the product of dout with the out of the call whose gain is 1 at a distance and
    0 at all others, which is correctly rounded to float64 and asked for once for each distance.

    Parameters
    ----------
    problem : Problem
        A call with an option `gain`: (b, h_q, n_q, d) queries, and rows of numbers for distances.
    dout : (b, h_q, n_q, d_v) float array
        The gradient arriving at out.

    Returns
    -------
    tuple of (2 reach + 1,) float64 arrays
        For each row of the gain, whose end numbers count for all distances from there on; a row that all heads share
        has the sum over heads. Off by half a unit of float64 of its sum over ``|dout·out|``, and one rounding.

    Raises
    ------
    InvalidInput
        What is no call, a call without a gain, a dout of another shape, of no floats, with NaN or an infinity.
    UnsupportedProblem
        An out that 262144 bits do not tell from a midpoint of two numbers.

    Notes
    -----
    Source: the factor C of URPE (Luo et al., arXiv 2205.13401; its `multihead_attention.py` was read), which learns it.
    The gradient by its bias is :func:`toeplitz_bias_gradient`.
    """
    instance("problem", problem, Problem, "make one, with the option gain")
    gain = problem.options.get("gain")
    if gain is None:
        raise InvalidInput("problem: has no gain, expected a call with an option gain; a gain of ones is ((1.0,),)")
    x = numbers("dout", dout)
    axes("dout", dout, *problem.out_shape)
    found: list[list[float]] = [[] for _ in gain]
    for r in range(max(map(len, gain))):
        rows = tuple(tuple(float(i == r) for i in range(len(row))) for row in gain)
        answer = evaluate(problem.replace(options={**problem.options, "gain": rows}), rounding="float64")
        if left := sum(answer.undecided.values()):
            raise UnsupportedProblem(f"problem: {left} results lie nearer to a midpoint of two numbers than told")
        out = np.asarray(answer.out)
        for h, row in enumerate(gain):
            here = slice(None) if len(gain) == 1 else slice(h, h + 1)
            found[h] += [_exact_product(x[:, here], out[:, here])] if r < len(row) else []
    return tuple(map(np.array, found))


def _exact_product(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return sum ab, rounded once: of numbers near 1, so that no product overflows, and what underflows is nothing."""
    near = [int(np.frexp(np.abs(x).max(initial=0.0))[1]) for x in (a, b)]
    if not np.isfinite(b).all():
        return math.nan
    terms = two_prod(np.ldexp(a, -near[0]).ravel(), np.ldexp(b, -near[1]).ravel())
    return float(np.ldexp(_exact_sum(np.concatenate(terms)), sum(near)))


def _columns(n_q: int, n_k: int, reach: int, offset: int) -> NDArray[np.int64]:
    """Return the table's column of each query and key."""
    first = whole("offset", offset, -(2**62), 2**62)
    return np.asarray(np.clip(np.arange(n_k) - (np.arange(n_q) + first)[:, None], -reach, reach) + reach)


def _exact_sum(x: NDArray[Any]) -> float:
    """Return the sum of float64 numbers, rounded once: NaN of both infinities, infinite past the largest number."""
    if not np.isfinite(x).all():
        with np.errstate(invalid="ignore"):
            return float(x.sum())
    try:
        return math.fsum(x)
    except OverflowError:  # half the sum may fit, and tells where the whole goes
        return 2.0 * math.fsum(x / 4) * 2.0


def _of_bias(dbias: Any) -> NDArray[np.float64]:
    """Return the gradient by a bias that batch items share as (heads, queries, keys)."""
    namespace(dbias=dbias)
    if dtype_name(dbias) not in FORMATS:
        raise InvalidInput(f"dbias: got dtype {dtype_name(dbias)}, expected a float format; cast it")
    x = to_float64(to_numpy(dbias, "dbias"))
    if x.ndim != 4 or x.shape[0] != 1:
        raise InvalidInput(f"dbias: got shape {x.shape}, expected (1, heads, queries, keys)")
    return np.asarray(x[0])
