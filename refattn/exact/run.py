"""Run the definition of a call over one arithmetic, tile by tile, and collect what it gives."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedProblem
from ..problem import Problem
from ..variants import variant_of
from .arithmetics import Floats
from .backward import backward
from .doubledouble import U, two_sum
from .keys import FEW, Rows, few_keys, rows_by_definition, rows_of
from .slabs import Slab, matrix_of, slabs
from .stream import Forward, forward_pass, stream, streams
from .tape import Tape, gradients
from .tiers import UP, Bounded, Tier
from .trust import check_machine, check_thread

__all__ = ["Raw", "by_keys", "run"]

TILE = 2**18  # scores alive at a time: rows are taken in tiles, so memory stays O(n d)
TILE_TIER = 2**17
STREAM_FROM = 256  # keys: fewer are faster whole

Raw = dict[str, NDArray[Any]]
"""Arrays by name. Elements are an arithmetic's numbers; those of a tier stand along a last axis as h, l, r."""
Known = dict[tuple[int, int, int], Rows]
"""What the rows of a head know, by batch, head and first row."""


def run(
    problem: Problem,
    f: Any,
    dout: NDArray[np.float64] | None,
    need: NDArray[np.bool_] | None = None,
    threads: int = 1,
    keys: NDArray[np.bool_] | None = None,
    known: Known | None = None,
) -> Raw:
    """Run the definition of a call over one arithmetic.

    Parameters
    ----------
    problem : Problem
        The call.
    f : arithmetic
        As in ``refattn.exact.arithmetics``, ``tiers`` or ``field``.
    dout : (b, h_q, n_q, d_v) float64, optional
        The gradient arriving at out.
    need : (b, h_q, n_q) bool, optional
        The rows to compute; others keep 0 (and gradients by key and value count only these rows).
    threads : int
        Threads for the streaming path.
    keys : (b, h_kv, n_k) bool, optional
        The keys whose dk and dv are wanted, counted over all rows, where :func:`by_keys` holds; others keep 0.
    known : dict, optional
        What rows know, by head: taken where it is there, else kept here.

    Returns
    -------
    dict
        Arrays of the arithmetic's numbers by name; numbers that the contract fixes are plain floats.
    """
    variant = variant_of(problem.variant)
    if isinstance(f, Tier):
        check_machine()
        check_thread()
    p = problem.to("numpy")
    shapes = {"out": p.out_shape}
    if variant.has_lse:
        shapes["lse"] = p.out_shape[:3]  # type: ignore[assignment]
    if dout is not None:
        shapes |= {"dq": p.query.shape, "dk": p.key.shape, "dv": p.value.shape}
        shapes |= {n: getattr(p, n[1:]).shape for n in ("dbias", "dsink") if getattr(p, n[1:]) is not None}
    raw = {n: _empty(f, s) for n, s in shapes.items()}
    for slab in slabs(p):
        if dout is not None and not _finite(slab):
            raise UnsupportedProblem("gradients: NaN or inf in sight of a query has no gradient; remove or mask it")
        lines = np.nonzero(slab.live if need is None else slab.live & need[slab.batch, slab.head, slab.rows])[0]
        unit = _unit(slab.v) if isinstance(f, Tier) and dout is None else 0
        if dout is not None and isinstance(f, Tier) and (lines.size or keys is not None) and _back(slab, dout):
            _backward(slab, f, lines, raw, dout, threads, keys, {} if known is None else known)
            lines = lines[:0]
        elif dout is not None and keys is not None:
            _keys(slab, f, raw, dout, threads, keys, {} if known is None else known)
        if isinstance(f, Tier) and dout is None and lines.size and slab.k.shape[0] >= STREAM_FROM and streams(slab):
            whole = unit == 0 and len(lines) == slab.rows.stop - slab.rows.start
            at = (slab.batch, slab.head, slab.rows if whole else np.arange(slab.rows.start, slab.rows.stop)[lines])
            into = (raw["out"][at], raw["lse"][at]) if whole else None  # views: nothing is copied
            out, lse = stream(slab, f, lines, unit, threads, into)
            if not whole:
                raw["out"][at], raw["lse"][at] = _scaled(out, unit), lse
            lines = lines[:0]
        k, v = (matrix_of(f, x) for x in (slab.k, np.ldexp(slab.v, -unit))) if lines.size else (None, None)
        for tile in _tiles(lines, slab.k.shape[0], TILE_TIER if isinstance(f, Tier) else TILE):
            _tile(slab, f, tile, k, v, unit, raw, dout, sums=keys is None)
        _specials(slab, raw, f)
    return raw


def _empty(f: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    if isinstance(f, Tier):
        return np.zeros((*shape, 3))
    return np.zeros(shape, f.dtype) if isinstance(f, Floats) else np.full(shape, 0, object)


def _tile(
    slab: Slab,
    f: Any,
    tile: NDArray[np.intp],
    k: Any,
    v: Any,
    unit: int,
    raw: Raw,
    dout: NDArray[np.float64] | None,
    sums: bool,
) -> None:
    define = variant_of(slab.problem.variant).define
    o = slab.options(f, tile)
    q = matrix_of(f, slab.q[tile])
    at = _place(slab, tile)
    with np.errstate(all="ignore"):
        if dout is None:
            out, lse = define(q, k, v, o)
        else:
            leaves = {"dq": Tape(q), "dk": Tape(k), "dv": Tape(v)}
            for name in ("bias", "sink"):
                if getattr(o, name) is not None:
                    leaves["d" + name] = Tape(getattr(o, name))
                    setattr(o, name, leaves["d" + name])
            out, lse = define(leaves["dq"], leaves["dk"], leaves["dv"], o)
            grads = gradients(out, matrix_of(f, dout[at]), list(leaves.values()))
            _collect(slab, at, dict(zip(leaves, grads, strict=True)), raw, sums)
            out, lse = out.value, None if lse is None else lse.value
        raw["out"][at] = _scaled(_numbers(out), unit)
        if lse is not None:
            raw["lse"][at] = _numbers(lse)[:, 0]


def _back(slab: Slab, dout: NDArray[np.float64]) -> bool:
    plain = _unit(slab.v) == _unit(dout[slab.batch, slab.head]) == _unit(slab.q) == _unit(slab.k) == 0
    return plain and slab.k.shape[0] >= STREAM_FROM and streams(slab)


def by_keys(problem: Problem, dout: NDArray[np.float64] | None) -> bool:
    """Tell whether the gradients of some keys can be computed alone."""
    return dout is not None and all(_back(slab, dout) for slab in slabs(problem))


def _backward(
    slab: Slab,
    f: Tier,
    lines: NDArray[np.intp],
    raw: Raw,
    dout: NDArray[np.float64],
    threads: int,
    keys: NDArray[np.bool_] | None,
    known: Known,
) -> None:
    forward = None if keys is None else _keys(slab, f, raw, dout, threads, keys, known)
    if not lines.size:
        return
    at = _place(slab, lines)
    lock = threading.Lock()

    def dbias(rows: slice, columns: slice, g: Bounded) -> None:
        with lock:
            _add_dbias(slab, (slab.batch, slab.head, at[2][rows]), columns, g, raw)

    result, rows = backward(
        slab, f, lines, dout[at], threads, None if slab.bias is None else dbias, forward and forward.some(lines)
    )
    raw["out"][at], raw["lse"][at], raw["dq"][at] = result["out"], result["lse"], result["dq"]
    if len(lines) == slab.live.sum():
        known[slab.batch, slab.head, slab.rows.start] = rows
    if keys is None:
        for x in ("dk", "dv"):
            _add(raw[x], (slab.batch, slab.head_kv, slab.keys), _numbers(result[x]))
    if "dsink" in result:
        _add(raw["dsink"], (slab.head,), _numbers(result["dsink"])[0, 0])


def _place(slab: Slab, rows: NDArray[np.intp]) -> tuple[Any, ...]:
    return slab.batch, slab.head, slab.rows.start + rows


def _keys(
    slab: Slab,
    f: Any,
    raw: Raw,
    dout: NDArray[np.float64],
    threads: int,
    keys: NDArray[np.bool_],
    known: Known,
) -> Forward | None:
    """Add dk and dv of the keys that are wanted; return the forward pass if a tier had to make one."""
    name, live, forward = (slab.batch, slab.head, slab.rows.start), np.nonzero(slab.live)[0], None
    wanted = np.nonzero(keys[slab.batch, slab.head_kv, slab.keys])[0]
    if not (wanted.size and live.size):
        return None  # nothing is wanted, or no row sees a key: dk and dv stay 0
    arriving = dout[_place(slab, live)]
    if name not in known:
        if isinstance(f, Tier):
            forward = forward_pass(slab, f, live, threads)
            known[name] = rows_of(forward, arriving, threads)
        else:
            known[name] = rows_by_definition(slab, f, live, arriving, max(1, TILE // len(slab.k)))
    for i in range(0, len(wanted), FEW):
        some = wanted[i : i + FEW]
        for x, g in zip(("dk", "dv"), few_keys(slab, f, arriving, some, known[name], threads), strict=True):
            _add(raw[x], (slab.batch, slab.head_kv, slab.keys.start + some), _numbers(g))
    return forward


def _unit(v: NDArray[np.float64]) -> int:
    """Return the exponent to take off the values where they lie far from 1: outputs are linear in them."""
    e = int(np.frexp(np.abs(v).max(initial=0.0))[1])
    return e if abs(e) > 200 else 0


def _scaled(x: NDArray[Any], unit: int) -> NDArray[Any]:
    if unit == 0:
        return x
    out = np.ldexp(x, unit)
    lost = (np.abs(out[..., 0]) < 2.0**-950) | ~np.isfinite(out[..., 0])  # too near the edge to be a power of two apart
    out[lost, 2] = np.inf
    return np.asarray(out)


def _collect(slab: Slab, at: Any, grads: dict[str, Any], raw: Raw, sums: bool) -> None:
    b, h, _ = at
    raw["dq"][at] = _numbers(grads["dq"])
    for name in ("dk", "dv") if sums else ():
        _add(raw[name], (b, slab.head_kv, slab.keys), _numbers(grads[name]))
    if "dsink" in grads:
        _add(raw["dsink"], (h,), _numbers(grads["dsink"])[0, 0])
    if "dbias" in grads:
        _add_dbias(slab, at, slice(0, slab.k.shape[0]), grads["dbias"], raw)


def _add_dbias(slab: Slab, at: Any, columns: slice, g: Any, raw: Raw) -> None:
    """Add the gradient by the scores of some rows and keys where the bias has them, summed where it was spread."""
    b, h, lines = at
    shape = slab.problem.bias.shape
    g = g if shape[2] > 1 else g.T.sum().T
    g = g if shape[3] > 1 else g.sum()
    rows = lines[:, None] if shape[2] > 1 else np.zeros((1, 1), int)
    keys = np.arange(slab.keys.start, slab.keys.stop)[None, columns] if shape[3] > 1 else np.zeros((1, 1), int)
    _add(raw["dbias"], (b if shape[0] > 1 else 0, h if shape[1] > 1 else 0, rows, keys), _numbers(g))


def _add(target: NDArray[Any], index: Any, x: NDArray[Any]) -> None:
    """Add numbers in place."""
    old = target[index]
    if target.dtype == object or target.shape[-1] != 3 or x.ndim != old.ndim:
        target[index] = old + x
        return
    s, e = two_sum(old[..., 0], x[..., 0])
    low = old[..., 1] + x[..., 1]
    h, tail = two_sum(s, e + low)
    lost = 2 * U * (np.abs(e) + np.abs(old[..., 1]) + np.abs(x[..., 1]))
    target[index] = np.stack([h, tail, (old[..., 2] + x[..., 2] + lost) * UP], -1)


def _numbers(m: Any) -> NDArray[Any]:
    if isinstance(m, Bounded):
        return np.stack([m.h, *(np.broadcast_to(x, m.h.shape) for x in (m.l, m.r))], -1)
    return np.asarray(m.image if hasattr(m, "image") else m.a)


def _tiles(lines: NDArray[np.intp], n_k: int, most: int) -> Iterator[NDArray[np.intp]]:
    size = max(1, most // max(n_k, 1))
    for start in range(0, len(lines), size):
        yield lines[start : start + size]


def _finite(slab: Slab) -> bool:
    seen = slab.allowed.any(0)
    return not slab.spoilt.any() and bool(np.isfinite(slab.values[seen]).all())


def _specials(slab: Slab, raw: Raw, f: Any) -> None:
    """Write what the contract fixes: rows without keys, rows that see NaN or inf."""
    at = (slab.batch, slab.head, slab.rows)

    def fixed(x: float) -> Any:
        return np.array([x, 0.0, 0.0]) if isinstance(f, Tier) else x

    out = raw["out"][at]
    if "lse" in raw:
        lse = raw["lse"][at]
        lse[~slab.allowed.any(1)] = fixed(-np.inf if slab.sink is None else slab.sink)
        lse[slab.spoilt] = fixed(np.nan)
    positive = slab.problem.variant in ("softmax", "sigmoid")  # every weight is above 0
    known: dict[tuple[int, int], float] = {}
    for j, c in zip(*np.nonzero(~np.isfinite(slab.values)), strict=True):
        x = float(slab.values[j, c]) if positive else np.nan
        for i in np.nonzero(slab.allowed[:, j])[0]:
            place = int(i), int(c)
            known[place] = x if known.get(place, x) == x else np.nan
            out[place] = fixed(known[place])
    out[slab.spoilt] = fixed(np.nan)
