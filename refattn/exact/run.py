"""A call, its heads and the route of each, chosen once; every level of the driver runs it over one arithmetic."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidProblem, UnsupportedProblem
from ..masks import unused
from ..norms import NORMS
from ..problem import Problem
from ..variants import Rows as RowsShape
from ..variants import Steps, variant_of
from .anywhere import beside, scaled, within
from .arithmetics import Floats
from .gather import joined, parts
from .heads import Head, heads, matrix_of, numbers_of
from .keys import Arriving, Rows
from .levels import Level
from .lowering import lower
from .results import Raw, add, collect, finite, mark, put, single, specials
from .steps import by_steps
from .stream import STREAMED, each, streams
from .streamed import (
    TILE,
    RowsByHead,
    head_gradients,
    in_units,
    near_one,
    open_keys,
    place,
    streamed_head,
    unit_of,
)
from .tape import Tape, gradients
from .trust import check_machine, check_thread

__all__ = ["Raw", "RowsByHead", "Work", "run", "specials"]

TILE_LEVEL = 2**17
FURTHER = ("dbias", "dsink", "dalpha", "dbeta", "deta", "dstate", "dalibi_slopes", *(f"d{n}" for n in NORMS))
"""Gradients of what a call may have."""
STREAM_FROM = 256  # keys: fewer are faster whole


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
        The gradient arriving at lse, or at a recurrence's last state.
    device : refattn.exact.device.card.Card, optional
        Where levels run: by the streaming path, or where that does not know a call by the definition's own text.

    Raises
    ------
    UnsupportedProblem
        Gradients where NaN or inf is in sight of a query; a recurrence on a device.
    """

    def __init__(
        self,
        problem: Problem,
        dout: NDArray[np.float64] | None = None,
        threads: int = 1,
        dlse: NDArray[np.float64] | None = None,
        device: Any = None,
    ) -> None:
        self.p, self.dout, self.dlse = problem.to("numpy"), dout, dlse
        self.threads = threads if device is None else 1  # a device's work queues up by itself
        self.variant = variant_of(problem.variant)
        self.device = device
        if device is not None and isinstance(self.variant.shape, Steps):
            raise UnsupportedProblem(
                f"device: {problem.variant} attention goes token by token, which no GPU does here; use device='cpu'"
            )
        self.there = self.heads if device is None else device.heads(self.p) or self.heads
        self.unused = unused(self.p)
        if dout is not None and not all(finite(s) for s in self.there):
            raise UnsupportedProblem("gradients: NaN or inf in sight of a query has no gradient; remove or mask it")
        self.streamed = [(device is not None or len(s.k) >= STREAM_FROM) and streams(s) for s in self.there]
        self.arriving = None if dout is None else Arriving(dout, dlse)
        self.backward = [
            yes and self.arriving is not None and near_one(s, self.arriving)
            for yes, s in zip(self.streamed, self.there, strict=True)
        ]

    @cached_property
    def heads(self) -> list[Head]:
        """The heads, on the CPU; :attr:`there` has those of a device, made once for all levels."""
        return list(heads(self.p, by_rules=self.device is not None))

    @property
    def by_keys(self) -> bool:
        """Tell whether the gradients of some keys can be computed alone."""
        return self.dout is not None and all(self.backward)

    @property
    def by_columns(self) -> bool:
        """Tell whether some columns of out can be computed alone: each is the mean of a column of the values."""
        return self.dout is None and self.variant.fused == STREAMED

    def _empty(self, f: Any) -> Raw:
        p = self.p
        shapes: dict[str, tuple[int, ...]] = {"out": p.out_shape}
        if self.variant.has_lse:
            shapes["lse"] = p.out_shape[:3]
        if isinstance(self.variant.shape, Steps):
            shapes["state"] = p.state_shape
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
        columns: NDArray[np.intp] | None = None,
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
        columns : integer array, optional
            The columns of out that are wanted, for balls, where :attr:`by_columns` holds; others keep 0.

        Returns
        -------
        dict
            Arrays of the arithmetic's numbers by name; numbers that the contract fixes are plain floats.
        """
        if isinstance(f, Level):  # a device has been checked when it was asked for, with the CPU's arithmetic
            check_machine()
            check_thread()
        raw, known, dout = self._empty(f), {} if known is None else known, self.dout
        if self.unused is not None and "lse" in raw:
            mark(raw["lse"], np.broadcast_to(self.unused[0][:, None], self.p.out_shape[:3]), -np.inf, f)
        for i, one in enumerate(self.there if getattr(f, "device", None) is not None else self.heads):
            wanted = one.live if need is None else one.live & need[one.batch, one.head, one.rows]
            lines, floating = np.nonzero(wanted)[0], isinstance(f, Level)
            if isinstance(self.variant.shape, Steps):
                for name, x in by_steps(one, f, self.variant.shape, dout, self.dlse).items():
                    put(one, name, x, raw)
            else:
                forward = None
                if self.arriving is not None and keys is not None:
                    forward = open_keys(one, f, raw, self.arriving, self.threads, keys, known)
                if floating and dout is not None and self.backward[i]:
                    if lines.size:
                        self._backward(one, f, lines, raw, known, keys is None, forward)
                elif (some := parts(one, f, lines)) is not None:
                    self._gathered(one, f, some, raw, self.streamed[i] and dout is None, keys is None, columns)
                elif floating and dout is None and self.streamed[i] and lines.size:
                    streamed_head(one, f, lines, raw, self.threads)
                else:
                    self._by_tiles(one, f, lines, raw, keys is None, columns)
            specials(one, raw, f, self.variant.positive and one.kept is None)
            plain = self.variant.fused == STREAMED and self.dlse is None and one.sink is None
            if floating and plain and dout is not None and len(one.k):
                single(one, raw, f)
            if self.dlse is not None and one.sink is not None and "dsink" in raw:
                alone = self.dlse[one.batch, one.head, one.rows][~one.allowed.any(1) & ~one.spoilt]
                add(raw["dsink"], (one.head,), numbers_of(matrix_of(f, alone[None]).sum())[0, 0])
        return raw

    def _gathered(
        self, one: Head, f: Any, some: Iterator[Head], raw: Raw, streamed: bool, sums: bool, columns: Any
    ) -> None:
        """Run parts of a head."""
        if streamed and isinstance(f, Level):
            each(lambda x: streamed_head(x, f, np.arange(len(x.q)), raw, 1), some, self.threads)
        else:
            for x in some:
                self._by_tiles(x, f, np.arange(len(x.q)), raw, sums, columns)

    def _backward(
        self, one: Head, f: Level, lines: NDArray[np.intp], raw: Raw, known: RowsByHead, sums: bool, forward: Any
    ) -> None:
        """Run the streaming path's gradients of a head, by parts where a rule lists keys, and note what rows know."""
        arriving, lock = self.arriving, threading.Lock()
        assert arriving is not None
        some = parts(one, f, lines)
        if some is None:
            rows = head_gradients(one, f, lines, raw, arriving, self.threads, sums, forward, lock)
        else:

            def of(x: Head) -> Rows:
                return head_gradients(x, f, np.arange(len(x.q)), raw, arriving, 1, sums, None, lock)

            rows = joined(each(of, some, self.threads), lines)
        if len(lines) == one.live.sum():
            known[one.batch, one.head, one.rows.start] = rows

    def _by_tiles(self, one: Head, f: Any, lines: NDArray[np.intp], raw: Raw, sums: bool, columns: Any = None) -> None:
        if not lines.size:
            return
        shape, floating = self.variant.shape, isinstance(f, Level)
        assert isinstance(shape, RowsShape)
        one = one if columns is None else replace(one, v=np.ascontiguousarray(one.v[:, columns]))
        unit = unit_of(one.v) if floating and self.dout is None else 0
        k, v = (matrix_of(f, x) for x in (one.k, scaled(one.v, -unit)))
        there = self.device if floating else None
        most = there.scores() if there is not None else TILE_LEVEL if floating else TILE
        for tile in [lines] if shape.together else _tiles(lines, one.k.shape[0], most):
            _tile(one, f, shape, tile, k, v, unit, raw, self.dout, sums, self.dlse, columns)


def run(problem: Problem, f: Any, dout: Any = None, threads: int = 1, dlse: Any = None, **some: Any) -> Raw:
    """Run a call of any shape over one arithmetic, once; the arguments are those of :class:`Work` and its ``run``."""
    return Work(lower(problem).problem, dout, threads, dlse).run(f, **some)


def _empty(f: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    if isinstance(f, Level):
        return f.xp.zeros((*shape, 3))  # type: ignore[no-any-return]
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
    columns: NDArray[np.intp] | None = None,
) -> None:
    define = shape.define
    o = one.options(f, tile) if dout is None else one.options(f, tile, Tape)
    q = matrix_of(f, one.q[beside(one.q, tile)])
    at = place(one, tile)
    with np.errstate(all="ignore"):
        if dout is None:
            out, lse = define(q, k, v, o)
            out = out if one.out_scale is None else out / f.number(one.out_scale)
        else:
            leaves = {"dq": Tape(q), "dk": Tape(k), "dv": Tape(v)}
            for name in ("bias", "sink", "alibi_slopes", *NORMS):
                option = getattr(o, "slope" if name == "alibi_slopes" else name)
                if option is not None:
                    leaves["d" + name] = option
            out, lse = define(leaves["dq"], leaves["dk"], leaves["dv"], o)
            out = out if one.out_scale is None else out / f.number(one.out_scale)
            ends, arriving = [out], [matrix_of(f, dout[at])]
            if dlse is not None:
                ends, arriving = [out, lse], [*arriving, matrix_of(f, dlse[at][:, None])]
            grads = gradients(ends, arriving, list(leaves.values()))
            collect(one, at, dict(zip(leaves, grads, strict=True)), raw, sums)
            out, lse = out.value, None if lse is None else lse.value
        _shaped(one, "out", out, (len(tile), one.v.shape[1]))
        to = at if columns is None else (*at[:2], at[2][:, None], columns)
        raw["out"][within(raw["out"], to)] = in_units(numbers_of(out), unit)
        if (lse is None) == ("lse" in raw):
            given = "no lse" if lse is None else "an lse"
            raise InvalidProblem(f"{one.problem.variant}: has_lse is {'lse' in raw}, its definition returns {given}")
        if lse is not None:
            _shaped(one, "lse", lse, (len(tile), 1))
            raw["lse"][within(raw["lse"], at)] = numbers_of(lse)[:, 0]


def _shaped(one: Head, name: str, x: Any, expected: tuple[int, int]) -> None:
    if getattr(x, "shape", None) != expected:
        got = getattr(x, "shape", type(x).__name__)
        raise InvalidProblem(
            f"{one.problem.variant}: its definition returns {name} of shape {got}, expected {expected}"
        )


def _tiles(lines: NDArray[np.intp], n_k: int, most: int) -> Iterator[NDArray[np.intp]]:
    size = max(1, most // max(n_k, 1))
    for start in range(0, len(lines), size):
        yield lines[start : start + size]
