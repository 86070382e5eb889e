"""A call, its heads and the route of each, chosen once; every level of the driver runs it over one arithmetic."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidProblem, UnsupportedProblem
from ..masks import unused
from ..problem import Problem
from ..variants import Rows as RowsShape
from ..variants import Steps, variant_of
from .arithmetics import Floats
from .backward import backward
from .doubledouble import U, two_sum
from .heads import Head, heads, matrix_of, numbers_of
from .keys import FEW, Rows, few_keys, rows_by_definition, rows_of
from .levels import UP, Bounded, Level
from .lowering import lower
from .steps import by_steps
from .stream import Forward, forward_pass, stream, streams
from .tape import Tape, gradients
from .trust import check_machine, check_thread

__all__ = ["Raw", "RowsByHead", "Work", "run", "specials"]

TILE = 2**18  # scores alive at a time: rows are taken in tiles, so memory stays O(n d)
TILE_LEVEL = 2**17
FURTHER = ("dbias", "dsink", "dalpha", "dbeta")  # gradients of what a call may have
STREAM_FROM = 256  # keys: fewer are faster whole

Raw = dict[str, NDArray[Any]]
"""Arrays by name. Elements are an arithmetic's numbers; those of a level stand along a last axis as h, l, r."""
RowsByHead = dict[tuple[int, int, int], Rows]
"""What the rows of a head know, by batch, head and first row."""


class Work:
    """A call to run over arithmetics.

    Parameters
    ----------
    problem : Problem
        The call, of an operator of the shapes ``Rows`` and ``Steps``.
    dout : (b, h_q, n_q, d_v) float64, optional
        The gradient arriving at out.
    threads : int
        Threads for the streaming path.
    dlse : (b, h_q, n_q) float64, optional
        The gradient arriving at lse: it goes by the tape.

    Raises
    ------
    UnsupportedProblem
        Gradients where NaN or inf is in sight of a query.
    """

    def __init__(
        self,
        problem: Problem,
        dout: NDArray[np.float64] | None = None,
        threads: int = 1,
        dlse: NDArray[np.float64] | None = None,
    ) -> None:
        self.p, self.dout, self.threads, self.dlse = problem.to("numpy"), dout, threads, dlse
        self.variant = variant_of(problem.variant)
        self.heads = list(heads(self.p))
        self.unused = unused(self.p)
        if dout is not None and not all(_finite(s) for s in self.heads):
            raise UnsupportedProblem("gradients: NaN or inf in sight of a query has no gradient; remove or mask it")
        self.streamed = [len(s.k) >= STREAM_FROM and streams(s) for s in self.heads]
        plain = dlse is None and self.p.out_scale is None
        self.backward = [
            yes and plain and dout is not None and streams(s, backward=True) and _plain(s, dout)
            for yes, s in zip(self.streamed, self.heads, strict=True)
        ]

    @property
    def by_keys(self) -> bool:
        """Tell whether the gradients of some keys can be computed alone."""
        return self.dout is not None and all(self.backward)

    def _empty(self, f: Any) -> Raw:
        p = self.p
        shapes: dict[str, tuple[int, ...]] = {"out": p.out_shape}
        if self.variant.has_lse:
            shapes["lse"] = p.out_shape[:3]
        if isinstance(self.variant.shape, Steps):
            shapes["state"] = (p.batch, p.heads, p.d_k, p.d_v)
        if self.dout is not None:
            shapes |= {"dq": p.query.shape, "dk": p.key.shape, "dv": p.value.shape}
            shapes |= {n: getattr(p, n[1:]).shape for n in FURTHER if getattr(p, n[1:]) is not None}
        return {n: _empty(f, s) for n, s in shapes.items()}

    def run(
        self,
        f: Any,
        need: NDArray[np.bool_] | None = None,
        keys: NDArray[np.bool_] | None = None,
        known: RowsByHead | None = None,
    ) -> Raw:
        """Run the definition over one arithmetic.

        Parameters
        ----------
        f : arithmetic
            As in ``refattn.exact.arithmetics``, ``levels`` or ``field``.
        need : (b, h_q, n_q) bool, optional
            The rows to compute; others keep 0 (and gradients by key and value count only these rows).
        keys : (b, h_kv, n_k) bool, optional
            The keys whose dk and dv are wanted, counted over all rows, where :attr:`by_keys` holds; others keep 0.
        known : dict, optional
            What rows know, by head: taken where it is there, else kept here.

        Returns
        -------
        dict
            Arrays of the arithmetic's numbers by name; numbers that the contract fixes are plain floats.
        """
        if isinstance(f, Level):
            check_machine()
            check_thread()
        raw, known, dout = self._empty(f), {} if known is None else known, self.dout
        if self.unused is not None and "lse" in raw:
            raw["lse"][np.broadcast_to(self.unused[0][:, None], self.p.out_shape[:3])] = _fixed(-np.inf, f)
        for i, one in enumerate(self.heads):
            wanted = one.live if need is None else one.live & need[one.batch, one.head, one.rows]
            lines, floating = np.nonzero(wanted)[0], isinstance(f, Level)
            if isinstance(self.variant.shape, Steps):
                for name, x in by_steps(one, f, self.variant.shape, dout).items():
                    _put(one, name, x, raw)
            elif floating and dout is not None and self.backward[i]:
                if lines.size or keys is not None:
                    _backward(one, f, lines, raw, dout, self.threads, keys, known)
            elif floating and dout is None and self.streamed[i] and lines.size:
                _streamed(one, f, lines, raw, self.threads)
            else:
                if dout is not None and keys is not None:
                    _keys(one, f, raw, dout, self.threads, keys, known)
                self._by_tiles(one, f, lines, raw, sums=keys is None)
            specials(one, raw, f, self.variant.positive)
            if self.dlse is not None and one.sink is not None and "dsink" in raw:
                alone = self.dlse[one.batch, one.head, one.rows][~one.allowed.any(1) & ~one.spoilt]
                _add(raw["dsink"], (one.head,), numbers_of(matrix_of(f, alone[None]).sum())[0, 0])
        return raw

    def _by_tiles(self, one: Head, f: Any, lines: NDArray[np.intp], raw: Raw, sums: bool) -> None:
        if not lines.size:
            return
        shape, floating = self.variant.shape, isinstance(f, Level)
        assert isinstance(shape, RowsShape)
        unit = _unit(one.v) if floating and self.dout is None else 0
        k, v = (matrix_of(f, x) for x in (one.k, np.ldexp(one.v, -unit)))
        most = TILE_LEVEL if floating else TILE
        for tile in [lines] if shape.together else _tiles(lines, one.k.shape[0], most):
            _tile(one, f, shape, tile, k, v, unit, raw, self.dout, sums, self.dlse)


def run(problem: Problem, f: Any, dout: Any = None, threads: int = 1, dlse: Any = None, **some: Any) -> Raw:
    """Run a call of any shape over one arithmetic, once; the arguments are those of :class:`Work` and its ``run``."""
    return Work(lower(problem).problem, dout, threads, dlse).run(f, **some)


def _streamed(one: Head, f: Level, lines: NDArray[np.intp], raw: Raw, threads: int) -> None:
    """Run softmax over a level by tiles of keys, into the result itself where every row is wanted."""
    unit = _unit(one.v)
    whole = unit == 0 and len(lines) == one.rows.stop - one.rows.start
    at = (one.batch, one.head, one.rows if whole else np.arange(one.rows.start, one.rows.stop)[lines])
    into = (raw["out"][at], raw["lse"][at]) if whole else None  # views: nothing is copied
    out, lse = stream(one, f, lines, unit, threads, into)
    if one.out_scale is not None:
        out[...] = numbers_of(Bounded(f, *np.moveaxis(out, -1, 0)) / f.number(one.out_scale))
    if not whole:
        raw["out"][at], raw["lse"][at] = _scaled(out, unit), lse


def _put(one: Head, name: str, x: NDArray[Any], raw: Raw) -> None:
    """Write what a recurrence gives of one head."""
    if name in ("dk", "dv"):
        _add(raw[name], (one.batch, one.head_kv, one.keys), x)
    else:
        raw[name][(one.batch, one.head) if name == "state" else (one.batch, one.head, one.rows)] = x


def _empty(f: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    if isinstance(f, Level):
        return np.zeros((*shape, 3))
    return np.zeros(shape, f.dtype) if isinstance(f, Floats) else np.full(shape, 0, object)


def _tile(
    one: Head,
    f: Any,
    shape: RowsShape,
    tile: NDArray[np.intp],
    k: Any,
    v: Any,
    unit: int,
    raw: Raw,
    dout: NDArray[np.float64] | None,
    sums: bool,
    dlse: NDArray[np.float64] | None,
) -> None:
    define = shape.define
    o = one.options(f, tile) if dout is None else one.options(f, tile, Tape)
    q = matrix_of(f, one.q[tile])
    at = _place(one, tile)
    with np.errstate(all="ignore"):
        if dout is None:
            out, lse = define(q, k, v, o)
            out = out if one.out_scale is None else out / f.number(one.out_scale)
        else:
            leaves = {"dq": Tape(q), "dk": Tape(k), "dv": Tape(v)}
            for name in ("bias", "sink"):
                if getattr(o, name) is not None:
                    leaves["d" + name] = getattr(o, name)
            out, lse = define(leaves["dq"], leaves["dk"], leaves["dv"], o)
            out = out if one.out_scale is None else out / f.number(one.out_scale)
            ends, arriving = [out], [matrix_of(f, dout[at])]
            if dlse is not None:
                ends, arriving = [out, lse], [*arriving, matrix_of(f, dlse[at][:, None])]
            grads = gradients(ends, arriving, list(leaves.values()))
            _collect(one, at, dict(zip(leaves, grads, strict=True)), raw, sums)
            out, lse = out.value, None if lse is None else lse.value
        _shaped(one, "out", out, (len(tile), one.v.shape[1]))
        raw["out"][at] = _scaled(numbers_of(out), unit)
        if (lse is None) == ("lse" in raw):
            given = "no lse" if lse is None else "an lse"
            raise InvalidProblem(f"{one.problem.variant}: has_lse is {'lse' in raw}, its definition returns {given}")
        if lse is not None:
            _shaped(one, "lse", lse, (len(tile), 1))
            raw["lse"][at] = numbers_of(lse)[:, 0]


def _shaped(one: Head, name: str, x: Any, expected: tuple[int, int]) -> None:
    if getattr(x, "shape", None) != expected:
        got = getattr(x, "shape", type(x).__name__)
        raise InvalidProblem(
            f"{one.problem.variant}: its definition returns {name} of shape {got}, expected {expected}"
        )


def _plain(one: Head, dout: NDArray[np.float64]) -> bool:
    """Tell whether all of a head's numbers lie near enough to 1."""
    return _unit(one.v) == _unit(dout[one.batch, one.head]) == _unit(one.q) == _unit(one.k) == 0


def _backward(
    one: Head,
    f: Level,
    lines: NDArray[np.intp],
    raw: Raw,
    dout: NDArray[np.float64],
    threads: int,
    keys: NDArray[np.bool_] | None,
    known: RowsByHead,
) -> None:
    forward = None if keys is None else _keys(one, f, raw, dout, threads, keys, known)
    if not lines.size:
        return
    at = _place(one, lines)
    lock = threading.Lock()

    def dbias(rows: slice, columns: slice, g: Bounded) -> None:
        with lock:
            _add_dbias(one, (one.batch, one.head, at[2][rows]), columns, g, raw)

    result, rows = backward(
        one, f, lines, dout[at], threads, None if one.bias is None else dbias, forward and forward.some(lines)
    )
    raw["out"][at], raw["lse"][at], raw["dq"][at] = result["out"], result["lse"], result["dq"]
    if len(lines) == one.live.sum():
        known[one.batch, one.head, one.rows.start] = rows
    if keys is None:
        for x in ("dk", "dv"):
            _add(raw[x], (one.batch, one.head_kv, one.keys), numbers_of(result[x]))
    if "dsink" in result:
        _add(raw["dsink"], (one.head,), numbers_of(result["dsink"])[0, 0])


def _place(one: Head, rows: NDArray[np.intp]) -> tuple[Any, ...]:
    return one.batch, one.head, one.rows.start + rows


def _keys(
    one: Head,
    f: Any,
    raw: Raw,
    dout: NDArray[np.float64],
    threads: int,
    keys: NDArray[np.bool_],
    known: RowsByHead,
) -> Forward | None:
    """Add dk and dv of the keys that are wanted; return the forward pass if a level had to make one."""
    name, live, forward = (one.batch, one.head, one.rows.start), np.nonzero(one.live)[0], None
    wanted = np.nonzero(keys[one.batch, one.head_kv, one.keys])[0]
    if not (wanted.size and live.size):
        return None  # nothing is wanted, or no row sees a key: dk and dv stay 0
    arriving = dout[_place(one, live)]
    if name not in known:
        if isinstance(f, Level):
            forward = forward_pass(one, f, live, threads)
            known[name] = rows_of(forward, arriving, threads)
        else:
            known[name] = rows_by_definition(one, f, live, arriving, max(1, TILE // len(one.k)))
    for i in range(0, len(wanted), FEW):
        some = wanted[i : i + FEW]
        for x, g in zip(("dk", "dv"), few_keys(one, f, arriving, some, known[name], threads), strict=True):
            _add(raw[x], (one.batch, one.head_kv, one.keys.start + some), numbers_of(g))
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


def _collect(one: Head, at: Any, grads: dict[str, Any], raw: Raw, sums: bool) -> None:
    b, h, _ = at
    raw["dq"][at] = numbers_of(grads["dq"])
    for name in ("dk", "dv") if sums else ():
        _add(raw[name], (b, one.head_kv, one.keys), numbers_of(grads[name]))
    if "dsink" in grads:
        _add(raw["dsink"], (h,), numbers_of(grads["dsink"])[0, 0])
    if "dbias" in grads:
        _add_dbias(one, at, slice(0, one.k.shape[0]), grads["dbias"], raw)


def _add_dbias(one: Head, at: Any, columns: slice, g: Any, raw: Raw) -> None:
    """Add the gradient by the scores of some rows and keys where the bias has them, summed where it was spread."""
    b, h, lines = at
    shape = one.problem.bias.shape
    g = g if shape[2] > 1 else g.T.sum().T
    g = g if shape[3] > 1 else g.sum()
    rows = lines[:, None] if shape[2] > 1 else np.zeros((1, 1), int)
    keys = np.arange(one.keys.start, one.keys.stop)[None, columns] if shape[3] > 1 else np.zeros((1, 1), int)
    _add(raw["dbias"], (b if shape[0] > 1 else 0, h if shape[1] > 1 else 0, rows, keys), numbers_of(g))


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


def _tiles(lines: NDArray[np.intp], n_k: int, most: int) -> Iterator[NDArray[np.intp]]:
    size = max(1, most // max(n_k, 1))
    for start in range(0, len(lines), size):
        yield lines[start : start + size]


def _finite(one: Head) -> bool:
    odd = np.nonzero(~np.isfinite(one.values).all(1))[0]
    return not one.spoilt.any() and not (odd.size and one.allowed[:, odd].any())


def _fixed(x: float, f: Any) -> Any:
    """Return a number that the contract fixes as one of an arithmetic."""
    return np.array([x, 0.0, 0.0]) if isinstance(f, Level) else x


def specials(one: Head, raw: Raw, f: Any, positive: bool) -> None:
    """Write what the contract fixes: rows without keys, rows that see NaN or inf."""
    at = (one.batch, one.head, one.rows)

    out = raw["out"][at]
    if "lse" in raw:
        lse = raw["lse"][at]
        lse[~one.allowed.any(1)] = _fixed(-np.inf if one.sink is None else one.sink, f)
        lse[one.spoilt] = _fixed(np.nan, f)
    odd = np.nonzero(~np.isfinite(one.values).all(1))[0]
    seen = one.allowed[:, odd].astype(np.float32)
    if seen.any():
        kinds = (np.isposinf, np.isneginf, np.isnan)
        plus, minus, nan = (seen @ kind(one.values[odd]).astype(np.float32) > 0 for kind in kinds)
        nan |= (plus & minus) | ((plus | minus) & (not positive))
        for where, x in ((plus, np.inf), (minus, -np.inf), (nan, np.nan)):
            out[where] = _fixed(x, f)
    out[one.spoilt] = _fixed(np.nan, f)
