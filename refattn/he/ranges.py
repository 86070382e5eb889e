"""The ranges that a plan wants, measured on data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import to_float64
from ..errors import InvalidInput, InvalidProblem, UnsupportedProblem
from ..files import load_problem
from ..masks import visible
from ..problem import Problem
from .arguments import is_number
from .inputs import checked

__all__ = ["ranges", "ranges_of_file"]


def ranges(x: Any, k: Any = None, v: Any = None, *, margin: float = 0.2, **options: Any) -> dict[str, Any]:
    """Return the ranges of data, with room: what :func:`refattn.he.plan` takes; or those of a module's parts.

    Parameters
    ----------
    x : Problem, (b, h, n_q, d) array, or module
        A call of variant "power" or "sigmoid"; or the queries of one of variant "power", with keys ``k`` and values
        ``v``; or a PyTorch module with parts of ``refattn.he.torch``, with its input ``k``: the parts then take the
        polynomials for what they see.
    k, v : arrays, optional
        As said.
    margin : float
        The room: sizes are multiplied with 1 + margin, the least denominator with 1 - margin, not below epsilon. Of
        sigmoid attention's scores the sizes are those of scale·q·k; the offset is added then.
    **options
        p, epsilon of the call; scale, causal and whatever else a Problem takes.

    Returns
    -------
    dict
        denominator, norms, value_most, epsilon, scale and p; of sigmoid attention scores, norms, value_most, offset
        and scale, which :func:`refattn.he.plan_sigmoid` takes; or (low, high) by the name of a part.

    Raises
    ------
    InvalidInput
        A margin that has no meaning, no numbers, numbers that are not finite, denominators that are all 0, or products
        of queries and keys that are.
    """
    if not is_number(margin) or not 0 <= margin < 1:
        raise InvalidInput(f"margin: got {margin}, expected from 0 to below 1")
    if hasattr(x, "named_modules"):
        from .modules import measured

        if k is None:
            raise InvalidInput("k: got no data; pass what the module's forward takes")
        return dict(measured(x, k, margin))
    if isinstance(x, Problem):
        if k is not None or v is not None or options:
            raise InvalidInput("x: got a Problem and more; pass either a Problem, or queries, keys, values and options")
        return _of_call(x, margin)
    of = {n: options.pop(n) for n in ("p", "epsilon") if n in options}
    arrays = [np.asarray(a) for a in (x, k, v) if a is not None]
    if len(arrays) != 3:
        raise InvalidInput("k, v: got queries without keys or values, expected all three, or a Problem")
    settings = {"p": 2, "epsilon": 0.0} | of
    return _of_call(Problem(*arrays, **options, variant="power", options=settings), margin)  # type: ignore[misc,arg-type]


def ranges_of_file(
    path: str | Path, margin: float, given: dict[str, Any], operator: str = "power"
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the sizes (n_q, n_k, d_k, d_v, heads of all batches) and ranges of a problem's file.

    Parameters
    ----------
    path : str or Path
        What ``refattn.save_problem`` wrote, or an .npz file of query, key and value.
    margin : float
        As :func:`ranges` takes it.
    given : dict
        p and epsilon, or the offset, where the problem is of another operator.
    operator : {"power", "sigmoid"}
        Which one is planned.
    """
    x = load_problem(path)
    if x.variant != operator:
        defaults: dict[str, Any] = {"offset": None} if operator == "sigmoid" else {"p": 2, "epsilon": 0.0}
        x = x.replace(variant=operator, options={n: given.get(n, value) for n, value in defaults.items()})
    return (x.n_q, x.n_k, x.d_k, x.d_v, x.batch * x.heads), ranges(x, margin=margin)


def _of_call(x: Problem, margin: float) -> dict[str, Any]:
    settings = checked(x, "sigmoid" if x.variant == "sigmoid" else "power")
    if x.cu_seqlens_q is not None:
        raise InvalidProblem("he: takes no packed sequences")
    q, k, v = (to_float64(np.asarray(a)) for a in (x.query, x.key, x.value))
    for name, a in (("query", q), ("key", k), ("value", v)):
        if not a.size:
            raise InvalidInput(f"{name}: got shape {a.shape}, expected numbers to measure")
    if not all(np.isfinite(a).all() for a in (q, k, v)):
        raise InvalidInput("x: has numbers that are not finite")
    k = np.repeat(k, x.heads // x.heads_kv, 1)
    scale = 1 / math.sqrt(x.d_k) if x.scale is None else float(x.scale)
    norms = tuple(float(np.linalg.norm(a, axis=-1).max()) * (1 + margin) for a in (q, k))
    found = {"norms": norms, "value_most": float(np.abs(v).max()) * (1 + margin), "scale": scale}
    if x.variant == "sigmoid":
        if x.bias is not None:
            raise UnsupportedProblem("he: sigmoid attention is planned without a bias")
        return _scores(x, scale * (q @ k.swapaxes(2, 3)), settings["offset"], margin) | found
    least, largest = math.inf, 0.0
    for b in range(x.batch):
        for h in range(x.heads):
            seen = visible(x, b, h, slice(0, x.n_q), slice(0, x.n_k))
            sums = ((scale * (q[b, h] @ k[b, h].T)) ** settings["p"] * seen).sum(1) + settings["epsilon"]
            sums = sums[seen.any(1)]
            least, largest = min(least, sums.min(initial=math.inf)), max(largest, sums.max(initial=0.0))
    low = max(settings["epsilon"], least * (1 - margin))
    if not 0 < low < math.inf:
        raise InvalidInput(f"x: its least denominator is {least:.3g}; choose an epsilon above 0")
    return found | {
        "denominator": (float(low), float(max(largest, low) * (1 + max(margin, 1e-6)))),
        "epsilon": float(settings["epsilon"]),
        "p": int(settings["p"]),
    }


def _scores(x: Problem, products: NDArray[np.float64], offset: float | None, margin: float) -> dict[str, Any]:
    """Return the range of scores over all pairs that are seen, with room, and the offset."""
    offset = -math.log(x.n_k) if offset is None else float(offset)
    low = high = 0.0
    for b, h in np.ndindex(x.batch, x.heads):
        seen = np.broadcast_to(visible(x, b, h, slice(0, x.n_q), slice(0, x.n_k)), (x.n_q, x.n_k))
        of = products[b, h][seen]
        low, high = min(low, of.min(initial=0.0)), max(high, of.max(initial=0.0))
    if low == high:
        raise InvalidInput("x: all its products of queries and keys are 0; choose other data")
    room = 1 + max(margin, 1e-6)
    return {"scores": (float(offset + room * low), float(offset + room * high)), "offset": offset}
