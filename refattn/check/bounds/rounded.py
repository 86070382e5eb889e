"""An arithmetic that rounds: what a kernel of a Model would give, to nearest or as badly as the Model allows.

It says how kernels round operation by operation, apart from the loss rules (``losses.py``), which are tested with it:
whatever it makes of a definition lies within the bound.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import FORMATS, Format, format_of
from ...exact.choosing import scores_of
from ...exact.heads import Head, heads, rows_of
from ...exact.matrix import Reflected
from ...problem import Problem
from ...variants import Choices, Selected, Steps, variant_of
from ..model import Model, inside_type
from .operands import Operands

__all__ = ["HOWS", "Rounded", "simulate", "simulate_scores", "simulate_steps"]

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]
HOWS = ("nearest", "random", "alternating", "up", "down")
"""How an operation rounds: to nearest, anywhere within its limit, to its limit by turns, or always one way."""


class Rounding:
    """The arithmetic of one Model for one head."""

    name = "rounded"

    def __init__(self, model: Model, how: str, rng: np.random.Generator, n_k: int) -> None:
        self.model, self.how, self.rng = model, how, rng
        self.inside = format_of(model.accumulator)
        self.tiles = math.ceil(n_k / model.tile)

    def spread(self, shape: tuple[int, ...]) -> Float:
        """Return numbers from -1 to 1: where within its limit each error lies."""
        if self.how in ("up", "down"):
            return np.full(shape, 1.0 if self.how == "up" else -1.0)
        if self.how == "alternating":
            return np.asarray(self.rng.choice((-1.0, 1.0), shape))
        return np.asarray(self.rng.uniform(-1, 1, shape))

    def rounded(self, y: Float, form: Format | None = None, times: float = 1.0) -> Float:
        """Return results rounded once to a type (the accumulator's), or off by as much as that may be."""
        form = form or self.inside
        if self.how == "nearest" and times == 1.0:
            return form.round_array(y) if form.name != "tf32" else y
        most = np.maximum(times * form.unit_roundoff * np.abs(y), 0.5 * form.smallest_subnormal)
        off = np.where(y == 0, 0.0, y + self.spread(y.shape) * most)  # 0 is 0 in every type
        return np.where(np.signbit(off) == np.signbit(y), off, 0.0)  # and rounding keeps signs

    def stored(self, y: Float, name: str) -> Float:
        """Return results rounded to a type where that is narrower than the accumulator."""
        return self.rounded(y, inside_type(name)) if self.model.loss(name) else y

    def added(self, x: Float, y: Float, steps: Any) -> Float:
        """Return x @ y, each product rounded and each term passed through so many additions."""
        u = self.inside.unit_roundoff
        steps = np.broadcast_to(steps, (x.shape[0], 1))
        if self.how == "nearest":
            return self.inside.round_array(x @ y)
        off = self.spread((x.shape[0], x.shape[1], y.shape[1])) * ((steps + 1) * u)[:, :, None]
        return np.asarray(((x[:, :, None] * y[None]) * (1 + off)).sum(1))

    def array(self, x: Any) -> Rounded:
        """Take in an option's matrix, exactly."""
        return Rounded(self, np.asarray(x, np.float64), None)

    def state(self, x: Any) -> Rounded:
        """Take in the state that a recurrence starts from: it stays in the accumulator's type."""
        return Rounded(self, np.asarray(x, np.float64), "state")

    def operands(self, one: Head, rows: Any = slice(None)) -> tuple[Rounded, Rounded, Rounded]:
        """Return a head's queries, keys and values, each off by what it may lose before it is multiplied."""
        lost = Operands.of(one, self.model)
        q, k, v = (x + self.spread(x.shape) * off for x, off in ((one.q, lost.q), (one.k, lost.k), (one.v, lost.v)))
        return Rounded(self, q[rows], None), Rounded(self, k, None), Rounded(self, v, "value")

    def number(self, x: Any) -> float:
        """Take in a number."""
        return float(x)

    def rsqrt(self, n: int) -> float:
        """Return 1/sqrt(n)."""
        return 1 / math.sqrt(n)


class Rounded(Reflected):
    """A matrix of the rounding arithmetic, with the operators of :class:`refattn.exact.matrix.Matrix`."""

    __slots__ = ("a", "f", "kind", "seen", "shifted")

    def __init__(
        self, f: Rounding, a: Float, kind: str | None, seen: Mask | None = None, shifted: bool = False
    ) -> None:
        self.f, self.a, self.kind, self.seen, self.shifted = f, a, kind, seen, shifted

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, m)."""
        return tuple(self.a.shape)

    @property
    def T(self) -> Rounded:
        """The transpose."""
        return type(self)(self.f, self.a.T, self.kind)

    def number(self, x: Any) -> float:
        """Take in a number."""
        return float(x)

    def _score(self, y: Float, times: float = 1.0) -> Rounded:
        y = self.f.rounded(y, times=times)
        wide = y.shape[1] > 1 and self.kind not in ("value", "state")
        return type(self)(
            self.f, self.f.stored(y, self.f.model.scores) if wide else y, self.kind, self.seen, self.shifted
        )

    def columns(self, at: Any) -> Rounded:
        """Return the columns of those numbers."""
        return type(self)(self.f, self.a[:, at], self.kind)

    def written(self, moved: Mask) -> Rounded:
        """Return it rounded to the type that turned queries and keys are written in, where columns were turned."""
        return type(self)(self.f, np.where(moved, self.f.stored(self.a, self.f.model.rotated), self.a), self.kind)

    def __matmul__(self, o: Rounded) -> Rounded:
        f, x = self.f, self.a
        if o.kind == "value":
            count = x.shape[1] if self.seen is None else self.seen.sum(1, keepdims=True)
            weights = f.stored(x, f.model.weights)
            return type(self)(f, f.added(weights, o.a, f.model.depth(count) + self._tiles()), "value")
        return type(self)(f, f.added(x, o.a, x.shape[1]), "value" if o.kind == "state" else None)

    def _tiles(self) -> int:
        return self.f.tiles if self.shifted else 0

    def sum(self) -> Rounded:
        """Sum of each row."""
        count = self.a.shape[1] if self.seen is None else self.seen.sum(1, keepdims=True)
        ones = np.ones((self.a.shape[1], 1))
        return type(self)(self.f, self.f.added(self.a, ones, self.f.model.depth(count) + self._tiles()), "column")

    def __add__(self, o: Any) -> Rounded:
        found = self._score(self.a + _value(o))
        found.kind = self.kind if self.kind != "shift" else "column"
        return found

    def __sub__(self, o: Any) -> Rounded:
        if not (isinstance(o, Rounded) and o.kind == "shift"):
            return self._score(self.a - _value(o))
        y = self.f.rounded(self.f.rounded(self.a) - o.a)
        wide = y.shape[1] > 1
        # a softmax by itself reads stored scores and takes the maximum off in the accumulator; a Model allows storing
        stored = self.f.stored(y, self.f.model.scores) if wide and self.f.how != "nearest" else y
        return type(self)(self.f, stored, self.kind, self.seen, wide)

    def __neg__(self) -> Rounded:
        return type(self)(self.f, -self.a, self.kind, self.seen)

    def __mul__(self, o: Any) -> Rounded:
        found = self._score(self.a * _value(o))
        if found.seen is None and isinstance(o, Rounded):  # adding up what is 0 on either side rounds nothing
            found.seen = o.seen
        return found

    def __truediv__(self, o: Any) -> Rounded:
        with np.errstate(all="ignore"):
            return self._score(self.a / _value(o))

    def where(self, mask: Mask | None) -> Rounded:
        """Keep the elements where `mask` holds; the others become 0."""
        if mask is None:
            return self
        keep = np.broadcast_to(mask, self.a.shape)
        return type(self)(self.f, np.where(keep, self.a, 0.0), self.kind, keep, self.shifted)

    def zeros(self) -> Rounded:
        """Return zeros of the same shape."""
        return type(self)(self.f, np.zeros(self.shape), self.kind, self.seen)

    def geometric(self, reach: int) -> Rounded:
        """Return the inverse of I - a by substitution, row by row."""
        made = type(self), self.f
        y = np.eye(len(self.a))
        for i, row in enumerate(self.a):
            at = np.nonzero(row)[0]
            if len(at):
                y[i] = self.f.rounded(
                    (made[0](made[1], row[None, at], None) @ made[0](made[1], y[at], None)).a[0] + y[i]
                )
        return made[0](made[1], y, None)

    def positive(self) -> Mask:
        """Tell where an element is above 0."""
        return np.asarray(self.a > 0)

    def _function(self, y: Float, ulps: float, where: Mask | None) -> Rounded:
        f = self.f
        if f.how != "nearest":
            y = y * (1 + f.spread(y.shape) * ulps * f.inside.unit_roundoff)
        found = type(self)(f, f.rounded(y), self.kind, self.seen, self.shifted)
        return found if where is None else found.where(where)

    def exp(self, where: Mask | None = None) -> Rounded:
        """Exponential, with the rescales that a running maximum brings."""
        f = self.f
        with np.errstate(all="ignore"):
            y = np.exp(self.a if where is None else np.where(where, self.a, -np.inf))
        rescales = self._tiles() * (f.model.exp_ulps + 1)
        return self._function(y, f.model.exp_ulps + rescales, where)

    def sigmoid(self, where: Mask | None = None) -> Rounded:
        """1 / (1 + exp(-x))."""
        e = np.exp(-np.abs(self.a))
        return self._function(np.where(self.a >= 0, 1.0, e) / (1 + e), self.f.model.exp_ulps + 2, where)

    def tanh(self) -> Rounded:
        """Hyperbolic tangent, to 2 ulps."""
        return self._score(np.tanh(self.a), 2.0)

    def rsqrt(self) -> Rounded:
        """1 / sqrt(x), to 2 ulps."""
        return self._function(1 / np.sqrt(self.a), 2.0, None)

    def log(self) -> Rounded:
        """Natural logarithm: of base 2, times log 2."""
        with np.errstate(all="ignore"):
            return self._function(np.log(self.a), 3.0, None)

    def relu(self) -> Rounded:
        """max(x, 0)."""
        return type(self)(self.f, np.maximum(self.a, 0.0), self.kind, self.seen)

    def power(self, p: int, where: Mask | None = None) -> Rounded:
        """x**p."""
        return self._function(self.a**p, p - 1, where)

    def shift(self, where: Mask, also: Rounded | None = None) -> Rounded:
        """Return each row's largest element."""
        top = np.where(where, self.a, -np.inf).max(1, initial=-np.inf if also is None else also.a.item(), keepdims=True)
        return type(self)(self.f, np.where(np.isneginf(top), 0.0, top), "shift")

    def absmax(self, where: Mask) -> Rounded:
        """Return each row's largest absolute value."""
        top = np.where(where, np.abs(self.a), 0.0).max(1, initial=0.0, keepdims=True)
        return type(self)(self.f, top, "column")


def _value(o: Any) -> Any:
    return o.a if isinstance(o, Rounded) else o


def simulate(
    problem: Problem, model: Model, how: str = "nearest", rng: np.random.Generator | None = None
) -> dict[str, Float]:
    """Return what a kernel of a model would give: out and, where the operator has one, lse; float64.

    Parameters
    ----------
    problem : Problem
        The call; an operator that is another's call is that one's (``Answer.call``).
    model : Model
        How the kernel rounds.
    how : str
        Out of ``HOWS``.
    rng : Generator, optional
        For those that draw.
    """
    p, rng = problem.to("numpy"), rng or np.random.default_rng(0)
    found = {"out": np.zeros(p.out_shape)}
    if variant_of(p.variant).has_lse:
        found["lse"] = np.full(p.out_shape[:3], -np.inf)
    for one in heads(p):
        f, rows = Rounding(model, how, rng, one.k.shape[0]), np.nonzero(one.live)[0]
        if not len(rows):
            continue
        with np.errstate(all="ignore"):
            out, lse = rows_of(one).define(*f.operands(one, rows), one.options(f, rows))
        at = one.batch, one.head, one.rows.start + rows
        found["out"][at] = f.rounded(out.a, FORMATS[p.out_type])
        if lse is not None:
            found["lse"][at] = f.rounded(lse.a[:, 0], format_of(model.lse))
    return found


def simulate_steps(
    problem: Problem, shape: Steps, model: Model, how: str, rng: np.random.Generator
) -> dict[str, Float]:
    """Return what a kernel would give that takes a recurrence token by token: out and the last state."""
    p = problem.to("numpy")
    found = {"out": np.zeros(p.out_shape), "state": np.zeros(p.state_shape)}
    for one in heads(p):
        f, at = Rounding(model, how, rng, 1), (one.batch, one.head)
        o, operands = one.options(f), f.operands(one)
        state = [f.state(x) for x in one.start(shape.held)]
        with np.errstate(all="ignore"):
            shape.prepare(o)
            for t in range(len(one.q)):
                q, k, v = (Rounded(f, x.a[t : t + 1], x.kind) for x in operands)
                vars(o).update({n: f.array(x[t : t + 1]) for n, x in one.gates.items()}, token=t)
                state, out = shape.take(state, q, k, v, o)
                found["out"][at][one.rows][t] = f.rounded(out.a, FORMATS[p.dtype])[0]
        found["state"][one.sequence, one.head] = f.rounded(np.concatenate([x.a for x in state[: p.state_parts]]))
    return found


def simulate_scores(
    ones: tuple[Head, ...], shape: Selected, c: Choices, model: Model, how: str, rng: np.random.Generator
) -> Float:
    """Return the scores by which a kernel of a model would choose, (n_q, m), in the type that it stores scores in."""
    f = Rounding(model, how, rng, len(ones[0].k))
    given = [f.operands(one)[:2] for one in ones]
    return f.stored(scores_of(ones, shape, c, f, given).a, model.scores)
