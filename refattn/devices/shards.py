"""A call cut into the shards of several devices, what each must give, and how parts are put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import dtype_name, kind_of, to_numpy
from ..dtypes import FORMATS
from ..errors import InvalidInput, UnsupportedProblem, expect
from ..exact.driver import evaluate
from ..functions.arguments import namespace, whole
from ..functions.parts import expect_part, merge
from ..masks import visible
from ..problem import Problem

__all__ = ["LAYOUTS", "ORDERS", "arriving", "exact_shards", "merged", "parts_of", "places"]

Places = NDArray[np.int64]
Part = tuple[Any, Any]

LAYOUTS = {
    "contiguous": "rank r has the r-th chunk of n / world_size rows",
    "zigzag": "of 2 world_size chunks rank r has chunk r, then chunk 2 world_size - 1 - r",
    "striped": "rank r has rows r, r + world_size, r + 2 world_size, ...",
}
"""How rows lie on ranks, by name. "zigzag" is what ring-flash-attention, Llama 3's training and PyTorch's
context_parallel (its head-tail load balancer) do, "striped" is Striped Attention's (arXiv 2311.09431)."""

ORDERS: dict[str, Callable[[list[Part]], Part]] = {
    "ring": lambda parts: reduce(lambda a, b: merge([a, b]), parts),
    "tree": lambda parts: _tree(parts),
    "split": lambda parts: merge(parts),
}
"""How parts are merged: one after another, in pairs of pairs, or all at once."""

SETTINGS = ("scale", "causal", "window", "softcap", "offset", "alignment")
"""Options that say the same whatever rows and keys are asked for, beside masks."""
CUT = ("query", "key", "value", "sink", "bias", "allowed", "weight")
PACKED = ("cu_seqlens_q", "cu_seqlens_k", "lengths_q", "lengths_k", "offset")


def places(layout: str, n: int, world_size: int) -> list[Places]:
    """Return which of n rows each rank has, in the order in which it has them.

    Parameters
    ----------
    layout : {"contiguous", "zigzag", "striped"}
        As ``LAYOUTS`` says.
    n : int
        Rows: a multiple of world_size, for "zigzag" of 2 world_size.
    world_size : int
        Ranks.

    Returns
    -------
    list of (n / world_size,) int64 arrays

    Raises
    ------
    InvalidInput
        A layout that there is not, or rows that it does not cut into equal chunks.

    Notes
    -----
    Sources: ring-flash-attention's tests (``extract_local``), PyTorch 2.13 ``_load_balancer.py``; both were read. Both
    refuse uneven chunks.
    """
    expect(isinstance(layout, str) and layout in LAYOUTS, "layout", layout, f"one of {', '.join(LAYOUTS)}")
    ranks, n = whole("world_size", world_size, 1), whole("n", n, 0)
    chunks = 2 * ranks if layout == "zigzag" else ranks
    if n % chunks:
        raise InvalidInput(f"n: got {n} rows, which {layout!r} does not cut into {chunks} equal chunks; pad them")
    rows = np.arange(n, dtype=np.int64)
    if layout == "striped":
        return [rows[r::ranks] for r in range(ranks)]
    cut = np.split(rows, chunks)
    if layout == "contiguous":
        return cut
    return [np.concatenate([cut[r], cut[chunks - 1 - r]]) for r in range(ranks)]


def parts_of(problem: Problem, world_size: int, layout: str = "contiguous") -> list[list[Problem]]:
    """Return the calls of every rank's queries to every rank's keys.

    Part [r][s] is what rank r computes when it has the keys of rank s. Its answer (out, lse) is what a ring's step must
    give; merged over s they are rank r's rows of the whole call. What causal, window, packing and lengths let through
    is written out in `allowed`, bias and weight are cut. A sink counts once: part [r][r] has it.

    Parameters
    ----------
    problem : Problem
        A call of softmax attention.
    world_size, layout
        As in :func:`places`.

    Returns
    -------
    list of lists of Problem
        Of NumPy's arrays.

    Raises
    ------
    InvalidInput
        As :func:`places`.
    UnsupportedProblem
        An option that is not cut here.
    """
    p = _plain(problem)
    rows, keys = places(layout, p.n_q, world_size), places(layout, p.n_k, world_size)
    seen = _seen(p)
    return [[_part(p, seen, q, k, sink=r == s) for s, k in enumerate(keys)] for r, q in enumerate(rows)]


def exact_shards(
    problem: Problem, world_size: int, layout: str = "contiguous", *, dout: Any = None
) -> list[dict[str, NDArray[np.float64]]]:
    """Return what each rank must hold in the end, correctly rounded to float64.

    Parameters
    ----------
    problem : Problem
        A call of softmax attention.
    world_size, layout
        As in :func:`places`.
    dout : (b, h_q, n_q, d_v) array, optional
        The gradient that arrives at the whole out.

    Returns
    -------
    list of dict
        By rank: "out" (b, h_q, n_q / world_size, d_v) and "lse" of its queries; with `dout` also "dq" of its queries,
        summed over all keys, and "dk" and "dv" of its keys, summed over the queries of all ranks.

    Raises
    ------
    InvalidInput, UnsupportedProblem
        As :func:`parts_of`.
    """
    p = _plain(problem)
    rows, keys = places(layout, p.n_q, world_size), places(layout, p.n_k, world_size)
    found = evaluate(p, rounding="float64", gradients=None if dout is None else to_numpy(dout, "dout")).values
    names = {"out": rows, "lse": rows, "dq": rows, "dk": keys, "dv": keys}
    return [{n: np.asarray(found[n])[:, :, at[r]] for n, at in names.items() if n in found} for r in range(len(rows))]


def merged(parts: Sequence[Part], order: str = "ring", *, first: int = 0) -> Part:
    """Return one rank's (out, lse) from its parts, merged in an order.

    Parameters
    ----------
    parts : sequence of (out, lse)
        By the rank whose keys they are of, as :func:`refattn.functions.parts.merge` takes them.
    order : {"ring", "tree", "split"}
        One after another as keys come round the ring, in pairs, or all at once.
    first : int
        The rank that merges: a ring begins with its own keys, then come those of the rank before it.

    Raises
    ------
    InvalidInput
        No parts, an order that there is not, a rank outside, arrays that do not fit, or an lse of NaN or infinity.
    """
    expect(isinstance(order, str) and order in ORDERS, "order", order, f"one of {', '.join(ORDERS)}")
    good = isinstance(parts, Sequence) and not isinstance(parts, str) and len(parts) > 0
    expect(good, "parts", parts, "at least one pair of out and lse")
    own = whole("first", first, 0, len(parts) - 1)
    for i, part in enumerate(parts):
        expect_part(f"parts[{i}]", part, parts[0])
    return ORDERS[order]([parts[(own - i) % len(parts)] for i in range(len(parts))])


def arriving(part: Part, found: Part, dout: Any) -> tuple[Any, Any]:
    """Return the gradients that arrive at a part's out and lse.

    They are ``w dout`` and ``w dout·(out_p - out)``, with ``w = exp(lse_p - lse)``. A part's own backward pass then
    gives the part's share of dq, dk and dv. It is what a flash backward pass does that is given the whole lse and
    ``D = dout·out``: its P is ``w P_p``, and ``w P_p (dP - D)`` is the part's own ``w P_p (dP - D_p)`` and ``P_p``
    times what arrives at lse_p.

    Parameters
    ----------
    part, found : (out, lse)
        The part's, and the whole's: (b, h_q, n, d_v) and (b, h_q, n) arrays of one library.
    dout : (b, h_q, n, d_v) array
        The gradient that arrives at the whole out.

    Returns
    -------
    dout_p, dlse_p
        Of the part's shapes; 0 in rows that see no key of the part.

    Raises
    ------
    InvalidInput
        What is no pair of float arrays, arrays of other shapes or libraries, or an lse of NaN or infinity.
    """
    expect_part("part", part, part)
    expect_part("found", found, part)
    xp = namespace(**{"part out": part[0], "dout": dout})
    if tuple(dout.shape) != tuple(part[0].shape) or dtype_name(dout) not in FORMATS:
        got = f"{dtype_name(dout)} of shape {tuple(dout.shape)}"
        raise InvalidInput(f"dout: got {got}, expected floats of out's shape {tuple(part[0].shape)}")
    some, none = part[1] > -xp.inf, xp.zeros_like(part[1])
    gap = xp.where(some, part[1], none) - xp.where(some, found[1], none)
    weight = xp.where(some, xp.exp(gap), none)
    given = weight[..., None] * dout
    return given, xp.sum(given * (part[0] - found[0]), axis=-1)


def _tree(parts: list[Part]) -> Part:
    while len(parts) > 1:
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        parts = [merge(pair) for pair in pairs]
    return merge(parts)


def _plain(problem: Problem) -> Problem:
    """Return a call with NumPy's arrays, after looking whether all of its options are cut here."""
    expect(isinstance(problem, Problem), "problem", problem, "a Problem")
    p = problem.to("numpy").with_bias()
    for name in (*p.settings(), *p.arrays()):
        if name not in (*SETTINGS, *CUT, *PACKED):
            raise UnsupportedProblem(f"{name}: calls that have it are not cut into shards")
    return p


def _seen(p: Problem) -> NDArray[np.bool_]:
    """Return which keys each query sees, (b, h_q, n_q, n_k)."""
    seen = np.zeros((p.batch, p.heads, p.n_q, p.n_k), bool)
    for b in range(p.batch):
        for h in range(p.heads):
            for rows, keys in p.segments(b):
                seen[b, h, rows, keys] = np.asarray(visible(p, b, h, rows, keys))
    return seen


def _part(p: Problem, seen: NDArray[np.bool_], rows: Places, keys: Places, sink: bool) -> Problem:
    def cut(x: Any) -> Any:
        if x is None or kind_of(x) is None:
            return None
        x = x[:, :, rows] if x.shape[2] > 1 else x
        return x[..., keys] if x.shape[3] > 1 else x

    return Problem(
        p.query[:, :, rows],
        p.key[:, :, keys],
        p.value[:, :, keys],
        p.scale,
        softcap=p.softcap,
        sink=p.sink if sink else None,
        bias=cut(p.bias),
        weight=cut(p.weight),
        allowed=seen[:, :, rows][..., keys],
    )
