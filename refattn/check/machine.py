"""The arithmetic of one kernel of a Model: every operation rounded where the Model says that a kernel rounds.

A definition's text runs over it as over any other arithmetic. Below a row's maximum an exponential is made by tiles of
keys under a running maximum, as flash kernels do: what is multiplied or added up later is rescaled with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import dtype_name
from ..dtypes import FORMATS, Format
from ..errors import UnsupportedProblem
from ..exact.heads import Head
from .bounds.operands import of_values, scale_of
from .bounds.rounded import Rounded, Rounding
from .bounds.stores import largest_of
from .model import INTEGERS, Model, inside_type
from .rounding import MICRO
from .sums import Adder

__all__ = ["Machine", "Machined"]

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Machine(Rounding):
    """The arithmetic of one Model for one head."""

    name = "machine"

    def __init__(self, model: Model, rng: np.random.Generator, n_k: int) -> None:
        super().__init__(model, "random", rng, n_k)
        self.adder = Adder(model, self.rounded)

    def rounded(self, y: Float, form: Format | None = None, times: float = 1.0) -> Float:
        """Return results rounded once to a type (the accumulator's), of a function that is off by more beforehand."""
        form = form or self.inside
        if times > 1:
            y = y * (1 + (times - 1) * self.spread(y.shape) * form.unit_roundoff)
        if self.model.stochastic and form.precision < self.inside.precision:
            found = self._by_chance(y, form)
        else:
            found = form.round_array(y)
        return found if self.model.subnormals else np.where(np.abs(found) < form.smallest_normal, 0.0, found)

    def _by_chance(self, y: Float, form: Format) -> Float:
        place = form.ulp_array(np.where(np.isfinite(y), y, 0.0))
        low = np.floor(y / place)
        found = (low + (self.rng.random(y.shape) < y / place - low)) * place
        found = np.where(np.isfinite(y), found, y)
        return np.where(np.abs(found) > form.largest, form.round_array(found), found)

    def array(self, x: Any) -> Machined:
        """Take in an option's matrix, exactly."""
        return Machined(self, np.asarray(x, np.float64), None)

    def state(self, x: Any) -> Machined:
        """Take in the state that a recurrence starts from: it stays in the accumulator's type."""
        return Machined(self, np.asarray(x, np.float64), "state")

    def operands(self, one: Head, rows: Any = slice(None)) -> tuple[Machined, Machined, Machined]:
        """Return a head's queries, keys and values as they are multiplied, with the scale that is not yet in them."""
        p, models = one.problem, (self.model, self.model, of_values(self.model))
        found = []
        for x, tensor, kind, m in zip(
            (one.q, one.k, one.v), (p.query, p.key, p.value), (None, None, "value"), models, strict=True
        ):
            given = np.where(np.abs(x) < FORMATS[self.model.accumulator].smallest_normal, 0.0, x)
            x = x if self.model.subnormals else given
            unit: Any = 1.0
            if dtype_name(tensor) not in FORMATS or FORMATS[dtype_name(tensor)].precision > self.inside.precision:
                x = self.rounded(x)  # an element times its scale
            if m.operands and m.passes == 1:
                form = inside_type(m.operands)
                s = self.inside.round_array(np.asarray(scale_of(np.abs(x), tensor, m), np.float64))
                unit = np.where(s > 0, s, 1.0)
                x = self.rounded(np.clip(self.rounded(x / unit), -form.largest, form.largest), form)
            found.append(Machined(self, x, kind, unit=unit))
        q, k, v = found
        if np.ndim(q.unit):
            q = Machined(self, q.a[rows], None, unit=q.unit[rows] if q.unit.shape[:1] == q.a.shape[:1] else q.unit)
        else:
            q = Machined(self, q.a[rows], None, unit=q.unit)
        v = v if np.ndim(v.unit) == 0 else v.in_full()
        if p.rotary is not None:
            q, k = q.in_full(), k.in_full()
        return q, k, v

    def plain(self) -> Machine:
        """Return how it adds what no matrix unit adds."""
        return Machine(_plain(self.model), self.rng, 1)

    def product(self, x: Float, y: Float, whole: bool = False) -> Float:
        """Return x @ y, in three passes where the model has these; sums of whole numbers are rounded once."""
        total = np.zeros((x.shape[0], y.shape[1]))
        for a, b in self.passes(x, y):
            part = np.zeros_like(total)
            for start in range(0, x.shape[1], self.adder.part):
                at = slice(start, min(start + self.adder.part, x.shape[1]))
                more = self.adder.run(np.zeros_like(total), a[:, at], b[at], whole)
                part = more if start == 0 else self.rounded(part + more)
            total = part if not total.any() else self.rounded(total + part)
        return total

    def passes(self, x: Float, y: Float) -> list[tuple[Float, Float]]:
        """Return the products that stand for x @ y: one, or three of what is rounded and what that leaves."""
        if self.model.passes == 1:
            return [(x, y)]
        form = inside_type(self.model.operands)
        (a, b), (c, d) = ((h, form.round_array(z - h)) for z in (x, y) for h in [form.round_array(z)])
        return [(b, c), (a, d), (a, c)]


@dataclass(frozen=True)
class Tile:
    """Weights of some keys below the running maximum, and what earlier sums are multiplied with before, (n_q, 1)."""

    keys: slice
    weights: Float
    fade: Float


class Machined(Rounded):
    """A matrix of that arithmetic."""

    __slots__ = ("tiles", "unit")
    f: Machine

    def __init__(
        self,
        f: Any,
        a: Float,
        kind: str | None,
        seen: Mask | None = None,
        shifted: bool = False,
        tiles: tuple[Tile, ...] = (),
        unit: Any = 1.0,
    ) -> None:
        super().__init__(f, a, kind, seen, shifted)
        self.tiles, self.unit = tiles, unit

    @property
    def T(self) -> Machined:
        """The transpose."""
        return Machined(self.f, self.a.T, self.kind, unit=np.asarray(self.unit).T)

    def in_full(self) -> Machined:
        """Return it with its scale multiplied in."""
        return Machined(self.f, self.f.rounded(self.a * self.unit), self.kind)

    def exp(self, where: Mask | None = None) -> Machined:
        """Exponential; of what lies below a row's maximum by tiles of keys, under a running maximum."""
        found = self._exp(self.a, where)
        seen = self.seen if where is None else np.broadcast_to(where, found.shape)
        made = Machined(self.f, found, self.kind, seen, self.shifted)
        if not self.shifted or not self.a.size:
            return made
        mask = np.ones(self.a.shape, bool) if where is None else np.broadcast_to(where, self.a.shape)
        x, tiles, size = np.where(mask, self.a, -np.inf), [], self.f.model.tile
        top = np.full((len(x), 1), -np.inf)
        for start in range(0, x.shape[1], size):
            keys = slice(start, min(start + size, x.shape[1]))
            now = np.maximum(top, x[:, keys].max(1, keepdims=True))
            live = np.where(np.isneginf(now), 0.0, now)
            fade = self._exp(np.where(np.isneginf(top), 0.0, top - live), np.isfinite(top))
            fade = np.where(top == now, 1.0, fade)
            tiles.append(Tile(keys, self._exp(self.f.rounded(x[:, keys] - live), mask[:, keys]), fade))
            top = now
        last = np.where(np.isneginf(top), 0.0, top)  # below 0 where a sink is the largest
        tiles.append(Tile(slice(0, 0), np.zeros((len(x), 0)), np.where(last == 0, 1.0, self._exp(last, None))))
        made.tiles = tuple(tiles)
        return made

    def _exp(self, x: Float, where: Mask | None) -> Float:
        f = self.f
        with np.errstate(all="ignore"):
            y = np.exp(x if where is None else np.where(where, x, -np.inf))
        return f.rounded(y * (1 + f.spread(y.shape) * f.model.exp_ulps * f.inside.unit_roundoff))

    def __mul__(self, o: Any) -> Rounded:
        def scaled(t: Tile) -> Float:
            by = np.broadcast_to(o.a if isinstance(o, Rounded) else np.full((1, 1), o), self.a.shape)
            return self.f.rounded(t.weights * by[:, t.keys])

        return self._by_tiles(super().__mul__(o), scaled)

    def __truediv__(self, o: Any) -> Rounded:
        found = super().__truediv__(o)
        return found if isinstance(o, Rounded) else self._by_tiles(found, lambda t: self.f.rounded(t.weights / o))

    def where(self, mask: Mask | None) -> Rounded:
        """Keep the elements where `mask` holds; the others become 0."""
        found = super().where(mask)
        if mask is None:
            return found
        keep = np.broadcast_to(mask, self.a.shape)
        return self._by_tiles(found, lambda t: np.where(keep[:, t.keys], t.weights, 0.0))

    def _by_tiles(self, found: Rounded, weights: Callable[[Tile], Float]) -> Rounded:
        """Return a result with the same done to every tile."""
        if not self.tiles:
            return found
        more = tuple(replace(t, weights=weights(t)) for t in self.tiles)
        return Machined(self.f, found.a, found.kind, found.seen, found.shifted, more)

    def __matmul__(self, o: Any) -> Machined:
        f, y = self.f, o.a
        if o.kind != "value":
            whole = f.model.operands in INTEGERS and self.kind is None and o.kind is None
            total = f.product(self.a, y, whole)
            if np.ndim(self.unit) or np.ndim(o.unit) or self.unit * o.unit != 1:
                total = f.rounded(total * f.rounded(np.asarray(self.unit * o.unit, np.float64)))
            return Machined(f, total, "value" if o.kind == "state" else None)
        if not self.tiles and f.model.weights_scale and self.a.size:
            raise UnsupportedProblem("model: weights_scale is of weights that are at most 1, below a row's maximum")
        if not self.tiles:
            return Machined(f, self._scaled(f.product(self._stored(self.a, True)[0], y), o.unit), "value")
        return Machined(f, self._scaled(self._over_tiles(y, True), o.unit), "value")

    def _scaled(self, total: Float, unit: Any) -> Float:
        return total if np.ndim(unit) == 0 and unit == 1 else self.f.rounded(total * unit)

    def sum(self) -> Machined:
        """Sum of each row."""
        ones = np.ones((self.a.shape[1], 1))
        if not self.tiles:
            return Machined(self.f, self.f.plain().product(self.a, ones), "column")
        return Machined(self.f, self._over_tiles(ones, False), "column")

    def _over_tiles(self, y: Float, values: bool) -> Float:
        """Return the running sum over tiles: of weights times values, stored as the model says, or of weights."""
        f, model = self.f, self.f.model
        adder, kept = (f.adder, f.rounded) if values else (Adder(_plain(model), f.rounded), f.rounded)
        if values and model.value_sums:
            kept = partial(f.rounded, form=FORMATS[model.value_sums])
            adder = Adder(replace(model, accumulator=model.value_sums, value_sums=""), kept)
        whole = values and model.weights in INTEGERS and (model.values or model.operands) in INTEGERS
        apart = values and model.weights_scale in ("row", "block", "micro")
        part, total = np.zeros((2, len(self.a), y.shape[1]))
        since = 0
        for t in self.tiles:
            if not (t.fade == 1).all():
                part, total = kept(part * t.fade), kept(total * t.fade)
            weights, unit = self._stored(t.weights, values)
            for a, b in f.passes(weights, y[t.keys]) if values else [(weights, y[t.keys])]:
                if apart:
                    more = adder.run(np.zeros_like(part), a, b, whole)
                    total = kept(total + kept(more * unit))
                    continue
                for start, stop in _cuts(since, t.keys.stop - t.keys.start, adder.part):
                    part = adder.run(part, a[:, start:stop], b[start:stop], whole)
                    if (since + stop) % adder.part == 0:
                        part, total = np.zeros_like(part), kept(total + part)
            since += t.keys.stop - t.keys.start
        total = kept(total + part) if total.any() else part
        return f.rounded(total / largest_of(model.weights)) if values and model.weights_scale == "static" else total

    def _stored(self, w: Float, values: bool) -> tuple[Float, Any]:
        """Return a tile's weights as they are multiplied or added up, and the scale that is not yet in them."""
        f, model = self.f, self.f.model
        if not values:
            return (f.rounded(w, inside_type(model.denominator)) if model.denominator else w), 1.0
        if not model.weights_scale or not w.size:
            narrow = model.loss(model.weights) and not (model.passes == 3 and model.weights == model.operands)
            return (f.rounded(w, inside_type(model.weights)) if narrow else w), 1.0
        if model.weights_scale == "micro":
            return self._micro(w)
        form, largest = inside_type(model.weights), largest_of(model.weights)
        unit: Any = 1 / largest
        if model.weights_scale != "static":
            top = w.max(1, keepdims=True)
            if model.weights_scale == "block":
                starts = np.arange(0, len(w), model.block)
                top = np.maximum.reduceat(top, starts, axis=0)[np.arange(len(w)) // model.block]
            unit = f.rounded(top / largest)
            unit = np.where(unit > 0, unit, 1.0)
        scaled = f.rounded(w * largest) if model.weights_scale == "static" else f.rounded(w / unit)
        return f.rounded(np.minimum(scaled, form.largest), form), unit

    def _micro(self, w: Float) -> tuple[Float, Float]:
        """Return a tile's weights in float4 times a scale for each 16 keys, and the scale of a row."""
        f, form, scales = self.f, inside_type(self.f.model.weights), FORMATS["float8_e4m3fn"]
        unit = f.rounded(w.max(1, keepdims=True) / (form.largest * scales.largest))
        unit = np.where(unit > 0, unit, 1.0)
        scaled, starts = f.rounded(w / unit), np.arange(0, w.shape[1], MICRO)
        s = scales.round_array(np.minimum(np.maximum.reduceat(scaled, starts, axis=1) / form.largest, scales.largest))
        s = np.where(s > 0, s, 1.0)[:, np.arange(w.shape[1]) // MICRO]
        return form.round_array(np.minimum(scaled / s, form.largest)) * s, unit


def _plain(model: Model) -> Model:
    """Return how a model adds what no matrix unit adds."""
    return replace(
        model,
        aligned_bits=0,
        promoted=0,
        passes=1,
        scales="",
        operands="",
        values="",
        smoothed=False,
        smoothed_queries=False,
    )


def _cuts(since: int, n: int, part: int) -> list[tuple[int, int]]:
    """Return where n more products are cut so that parts end after so many of all."""
    if not n:
        return []
    ends = [*range(min(part - since % part, n), n, part), n]
    return list(zip([0, *ends[:-1]], ends, strict=True))
