"""One head of one sequence at a time: the float64 pieces of a Problem that a definition runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import to_float64, to_numpy
from ..errors import InvalidProblem, UnsupportedProblem
from ..gates import GATES, finite_state, gate
from ..masks import block, diagonal, distance, visible
from ..norms import NORMS, multiplied
from ..positions import partners, places, slope_of, tables
from ..problem import Problem
from ..variants import Rows, variant_of
from .anywhere import beside, on_host
from .matrix import Matrix

__all__ = [
    "Given",
    "Head",
    "all_finite",
    "finite_rows",
    "gate_of",
    "heads",
    "matrix_of",
    "numbers_of",
    "plain_scores",
    "rows_of",
]

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]


def matrix_of(f: Any, x: Float) -> Any:
    """Take a float64 matrix into an arithmetic, exactly."""
    taken = f.operand(x) if hasattr(f, "operand") else f.array(x)
    return Matrix(taken, f) if isinstance(taken, np.ndarray) else taken  # a field and a level have their own


class Given:
    """What a definition calls ``o``: options in one arithmetic; what follows from the call is made when it is read."""

    def __init__(self, make: dict[str, Callable[[], Any]], **values: Any) -> None:
        self._make = make
        vars(self).update(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._make:
            raise AttributeError(f"definition: options have no {name!r}; they have {', '.join(sorted(self.names()))}")
        setattr(self, name, self._make[name]())
        return vars(self)[name]

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self)[name] = value

    def names(self) -> list[str]:
        """Return what can be read."""
        return [n for n in (*vars(self), *self._make) if not n.startswith("_")]


def rows_of(one: Head) -> Rows:
    """Return the definition of a head's rows: the operator's own, or the form of a recurrence that has all tokens."""
    variant = variant_of(one.problem.variant)
    if variant.rows is None:
        raise UnsupportedProblem(f"variant: {variant.name} attention has no form that gives all rows at once")
    return variant.rows


def gate_of(f: Any, x: Float) -> Any:
    """Take a gate into an arithmetic: some arithmetics tell its rows, which are tokens, from rows of queries."""
    return f.gate(x) if hasattr(f, "gate") else matrix_of(f, x)


def keyed_of(f: Any, x: Float) -> Any:
    """Take a matrix whose rows are keys, or made from them, into an arithmetic: some tell them from queries."""
    return f.keyed(x) if hasattr(f, "keyed") else matrix_of(f, x)


def numbers_of(m: Any) -> NDArray[Any]:
    """Return a matrix's numbers as an array; those of a level stand along a last axis as h, l, r."""
    if hasattr(m, "h"):
        return np.stack([m.h, *(np.broadcast_to(x, m.h.shape) for x in (m.l, m.r))], -1)
    return np.asarray(m.image if hasattr(m, "image") else m.a)


@dataclass(frozen=True)
class Head:
    """One query head of one packed sequence, in float64 (exact), non-finite inputs set aside.

    Attributes
    ----------
    batch, head, head_kv : int
        Where it comes from.
    sequence : int
        Which state is its own: its batch item, or packed sequence.
    rows, keys : slice
        Its queries and keys; the keys of a part are an integer array.
    q, k, v : (n_q, d_k), (n_k, d_k), (n_k, d_v)
        With 0 in place of NaN and inf.
    bias : (n_q, n_k) or None
        With 0 in place of -inf, NaN and inf.
    allowed : (n_q, n_k) bool
        Every mask combined; where a rule stands for many pairs, a :class:`refattn.rules.View`.
    sink : float or None
        None also where it is -inf.
    weight : (n_q, n_k) or None
        How often each key counts.
    kept : (n_q, n_k) bool or None
        Which weights dropout keeps.
    state : (d_k, d_v) or None
        What a recurrence starts from; with a momentum (2 d_k, d_v).
    gates : dict
        Its gates by name, (n_k, 1 or d_k) each, those that the call has.
    live : (n_q,) bool
        Rows that the definition must be asked for: they see a key and nothing non-finite decides them.
    spoilt : (n_q,) bool
        Rows whose out and lse are NaN by the contract.
    values : (n_k, d_v)
        The values as they came, NaN and inf included.
    lines : (n_q,) integer array or None
        Of a part, where its rows stand in the call.
    """

    problem: Problem
    batch: int
    head: int
    head_kv: int
    rows: slice
    keys: Any
    q: Float
    k: Float
    v: Float
    bias: Float | None
    allowed: Mask
    sink: float | None
    live: Mask
    spoilt: Mask
    values: Float
    weight: Float | None = None
    kept: Mask | None = None
    state: Float | None = None
    gates: dict[str, Float] = field(default_factory=dict)
    sequence: int = 0
    lines: NDArray[np.intp] | None = None

    def places(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return where some of its rows stand in the call."""
        return self.rows.start + rows if self.lines is None else self.lines[rows]

    def part(self, rows: NDArray[np.intp], keys: NDArray[np.intp]) -> Head:
        """Return some rows with the keys outside which these see none, for a definition that reads no places."""
        at = np.ix_(rows, keys)
        bias, weight = (None if x is None else x[at] for x in (self.bias, self.weight))
        return replace(
            self,
            keys=self.keys.start + keys,
            q=self.q[rows],
            k=self.k[keys],
            v=self.v[keys],
            bias=bias,
            allowed=np.asarray(self.allowed[at]),
            live=self.live[rows],
            spoilt=self.spoilt[rows],
            values=self.values[keys],
            weight=weight,
            kept=None if self.kept is None else self.kept[at],
            lines=self.places(rows),
        )

    @property
    def out_scale(self) -> float | None:
        """What the output is divided by; None where nothing is."""
        x = self.problem.out_scale
        if x is None or isinstance(x, float):
            return x
        b, h = (i if n > 1 else 0 for i, n in zip((self.batch, self.head), x.shape[:2], strict=True))
        return float(to_float64(x)[b, h, 0, 0])

    def options(self, f: Any, rows: Any = slice(None), wrap: Callable[[Any], Any] = lambda x: x) -> Given:
        """Return what a definition calls ``o``: the options in the arithmetic, for some rows; matrices wrapped."""
        p, variant = self.problem, variant_of(self.problem.variant)
        usual = f.rsqrt(p.d_k) if variant.default_scale == "rsqrt" and p.d_k else f.number(1)
        scale = usual if p.scale is None else f.number(p.scale)
        own = {}
        for name, value in variant.settings(p).items():
            option = variant.options[name]
            x = value[self.head % len(value)] if option.by_head and isinstance(value, tuple) and value else value
            real = isinstance(option.default, float) or isinstance(x, float)
            own[name] = f.number(x) if real else x

        def column(x: Any) -> Any:
            return wrap(matrix_of(f, np.asarray(x, np.float64)))

        def steps() -> Any:
            first = diagonal(p, self.batch, self.rows, self.keys)
            return distance(self.q.shape[0], self.k.shape[0], first)[rows]

        def toeplitz(values: Sequence[float]) -> Any:
            reach = len(values) // 2
            return column(np.asarray(values, np.float64)[np.clip(reach - steps(), 0, 2 * reach)])

        def state() -> Any:
            take = f.state if hasattr(f, "state") else lambda x: matrix_of(f, x)
            found = tuple(wrap(take(x)) for x in self.start())
            return found if len(found) > 1 else found[0]

        gates = {n: wrap(gate_of(f, self.gates[n])) if n in self.gates else None for n in GATES}
        gates |= {n: None if (w := getattr(p, n)) is None else wrap(gate_of(f, to_float64(w)[None])) for n in NORMS}
        made = Given(
            {
                "allowed": lambda: self.allowed[rows],
                "one": lambda: column([[1.0]]),
                "count": lambda: column(made.allowed.sum(1, keepdims=True)),
                "length": lambda: column([[self.k.shape[0]]]),
                "distance": lambda: column(steps()),
                "toeplitz": lambda: toeplitz,
                "matrix": lambda: column,
                "of_keys": lambda: lambda x: wrap(keyed_of(f, np.asarray(x, np.float64))),
                "rows": lambda: rows,
                "queries": lambda: self.q.shape[0],
                "behind": steps,
                "place": lambda: column(np.arange(1, self.q.shape[0] + 1)[rows][:, None]),
                **self._positioned(f, rows, wrap),
            },
            partner=None if p.rotary is None else partners(p),
            norm_eps=None if p.norm_eps is None else f.number(p.norm_eps),
            norm_width=f.number(max(p.d_k, 1)),
            slope=None if p.alibi_slopes is None else column([[slope_of(p, self.batch, self.head)]]),
            scale=scale,
            softcap=None if p.softcap is None else f.number(p.softcap),
            kept=None if self.kept is None else self.kept[rows],
            share=None if p.dropout_p is None else f.number(1 - Fraction(p.dropout_p)),
            bias=None if self.bias is None else column(self.bias[rows]),
            sink=None if self.sink is None else column([[self.sink]]),
            weight=None if self.weight is None else column(self.weight[rows]),
            state=None if self.state is None else state(),
            **(gates | own),
        )
        return made

    def _positioned(self, f: Any, rows: Any, wrap: Callable[[Any], Any]) -> dict[str, Callable[[], Any]]:
        """Return what a definition reads of positions: tables by query and key, which columns turn, distances."""
        p = self.problem

        def table(which: int, of: int, at: Any = slice(None)) -> Any:
            where = places(p, self.batch, self.rows, self.keys)[which][at]
            return wrap(gate_of(f, tables(p, where)[of]))

        def apart() -> Any:
            where, at = places(p, self.batch, self.rows, self.keys)
            return wrap(matrix_of(f, np.abs(where[rows][:, None] - at).astype(np.float64)))

        return {
            "cos_q": lambda: table(0, 0, rows),
            "sin_q": lambda: table(0, 1, rows),
            "cos_k": lambda: table(1, 0),
            "sin_k": lambda: table(1, 1),
            "moved": lambda: partners(p) != np.arange(p.d_k),
            "apart": apart,
        }

    def start(self, held: int = 0) -> list[Float]:
        """Return the matrices that a recurrence begins with, (d_k, d_v) each: its state's, then zeros that it holds."""
        none, parts = np.zeros((self.q.shape[1], self.v.shape[1])), self.problem.state_parts
        given = [none] * parts if self.state is None else np.split(self.state, parts)
        return [*given, *[none] * held]

    def tokens(self, f: Any) -> list[tuple[list[Any], dict[str, Any]]]:
        """Return by token its query, key and value in an arithmetic, (1, d) each, and the gates that it has."""
        cuts = [slice(t, t + 1) for t in range(len(self.q))]
        return [
            (
                [matrix_of(f, x[at]) for x in (self.q, self.k, self.v)],
                {n: gate_of(f, x[at]) for n, x in self.gates.items()},
            )
            for at in cuts
        ]

    def plain(self, rows: Any = slice(None)) -> SimpleNamespace:
        """Return the options as float64 NumPy arrays and numbers."""
        from .arithmetics import Floats

        o = vars(self.options(Floats(), rows))
        known = {n: x.a if isinstance(x, Matrix) else x for n, x in o.items() if not n.startswith("_")}
        return SimpleNamespace(**known | {"sink": self.sink})


def heads(problem: Problem, by_rules: bool = False, take: Callable[[NDArray[Any]], Any] = to_float64) -> Iterator[Head]:
    """Yield the heads of a call, batch by batch, query heads of one key head together.

    Parameters
    ----------
    problem : Problem
        The call.
    by_rules : bool
        Whether long masks are views, whatever the call has.
    take : callable
        Makes float64 of queries, keys and values, on the CPU or on a device.
    """
    p = problem.to("numpy")
    q, k, v = (take(to_numpy(x)) for x in (p.query, p.key, p.value))
    sink = None if p.sink is None else to_float64(p.sink)
    if p.d_k == 0:  # one column of zeros gives the same products
        q, k = (beside(x, np.zeros((*x.shape[:3], 1))) for x in (q, k))
    gates = {n: gate(n, to_float64(x)) for n in GATES if (x := getattr(p, n)) is not None}
    group = p.heads // p.heads_kv
    for b in range(p.batch):
        for h in range(p.heads):
            for i, (rows, keys) in enumerate(p.segments(b)):
                sequence = b if p.cu_seqlens_q is None else i
                allowed = visible(p, b, h, rows, keys, by_rules)
                bias = None if p.bias is None else to_float64(block(p.bias, b, h, rows, keys))
                weight = None if p.weight is None else _weights(to_float64(block(p.weight, b, h, rows, keys)))
                kept = None if p.dropout_mask is None else np.asarray(block(p.dropout_mask, b, h, rows, keys), bool)
                s = None if sink is None or np.isneginf(sink[h]) else float(sink[h])
                parts = (q[b, h, rows], k[b, h // group, keys], v[b, h // group, keys])
                whole = [all_finite(x) for x in parts]
                bad = _spoilt(parts[0], parts[1], whole, bias, s, allowed)
                live = allowed.any(1) & ~bad
                clean = [x if yes else np.where(np.isfinite(x), x, 0.0) for x, yes in zip(parts, whole, strict=True)]
                if bias is not None:
                    bias = np.where(np.isfinite(bias), bias, 0.0)
                if s is not None and not np.isfinite(s):
                    s = None
                state = None if p.state is None else finite_state(to_float64(p.state[sequence, h]))
                yield Head(
                    p,
                    b,
                    h,
                    h // group,
                    rows,
                    keys,
                    clean[0],
                    clean[1],
                    clean[2],
                    bias,
                    allowed,
                    s,
                    live,
                    bad,
                    parts[2],
                    weight,
                    kept,
                    state,
                    {n: x[b, h, keys] for n, x in gates.items()},
                    sequence,
                )


def plain_scores(one: Head, row: int) -> Float:
    """Return the scores of one row in float64, (n_k,), without a softcap and masks."""
    from .arithmetics import Floats

    f, at = Floats(), slice(row, row + 1)
    o, q, k = one.options(f, at), matrix_of(f, one.q[at]), matrix_of(f, one.k)
    with np.errstate(all="ignore"):
        q, k = multiplied(q, k, o)
        s = q @ k.T * o.scale
        s = s if o.slope is None else s - o.apart * o.slope
        return np.asarray((s if o.bias is None else s + o.bias).a[0])


def all_finite(x: Float) -> bool:
    """Tell whether an array has neither NaN nor inf: a finite sum says so at once."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(x.sum()) or np.isfinite(x).all())


def finite_rows(x: Float) -> Mask:
    """Tell which rows have neither NaN nor inf, on the CPU."""
    return np.ones(len(x), bool) if all_finite(x) else np.asarray(on_host(np.isfinite(x).all(1)))


def _weights(x: Float) -> Float:
    if not (x >= 0).all() or np.isinf(x).any():
        raise InvalidProblem("weight: has a number below 0, NaN or inf; it says how often a key counts")
    return x


def _spoilt(q: Float, k: Float, finite: list[bool], bias: Float | None, sink: float | None, allowed: Mask) -> Mask:
    """Return the rows that are NaN by the contract: a non-finite query, key in sight, bias above -inf, or sink."""
    bad: Mask = np.zeros(len(q), bool)
    if not finite[1] and (lost := ~finite_rows(k)).any():
        bad = np.asarray(allowed[:, lost].any(1))
    if not finite[0]:
        bad |= ~finite_rows(q) & allowed.any(1)
    if bias is not None:
        bad |= (np.asarray(allowed) & ~np.isfinite(bias)).any(1)
    if sink is not None and not np.isfinite(sink):
        bad[...] = True
    return bad
