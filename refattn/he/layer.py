"""A transformer's layer on ciphertexts, with weights that the server holds in clear.

Slots are (f, j, h, i): a pair of features f, a key j, a head h, a query i, which runs fastest; the whole is repeated
until a ciphertext is full. Tokens come twice, along i and along j, so that no projection moves a token. Linear maps are
linear.py's, attention is circuit.attend; its result lies in row j = 0. What follows a sum over the rows lies in rows
j >= 1, shifted by one f: a rotation past a row's end goes to the next f, and the maps are compiled for that.

Queries that do not fit beside all keys come in parts (LayerPlan.query_parts), each with ciphertexts of its own: all but
keys and values, which the parts share, is done for each of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput, UnsupportedProblem
from .arguments import plans
from .arithmetic import Counted, Levels
from .circuit import attend
from .inputs import simulated
from .inverse import Inverse, choose, product
from .layer_plan import LayerPlan, axes_of, feature_of, period_of
from .layout import Layout
from .linear import Arrangement, Map, Plain, compiled
from .noise import Ring
from .plan import MOST_BITS, MOST_FIRST, MOST_MIDDLE
from .polynomials import Polynomial
from .weights import Feedforward, Weights, check

__all__ = [
    "LEAST_MIDDLE", "LINE", "Layer", "added", "kappa_of", "layouts_of", "least_of", "no_ring", "pairs_of", "sums",
]  # fmt: skip

Float = NDArray[np.float64]
Complex = NDArray[np.complex128]
Name = tuple[str, int]
"""Of a map or a plaintext: what it is for, and the part of the queries."""
LINE = {"full": 8e-6, "whole": 8e-7}
"""Milliseconds that a byte takes: 1 Gbit/s, and 10 where whole ciphertexts are asked for."""
MOST_PARTS = 32
"""Parts of the queries: each is computed apart, so more would take minutes of a core and gigabytes up."""
LEAST_MIDDLE = 36
"""Bits of a prime: fewer would leave a layer's noise above 1e-4."""


class Layer:
    """A layer's program: the plan, and the weights as plaintexts. The server's alone.

    Parameters
    ----------
    weights : Weights
        What it computes.
    tolerance : float
        The largest relative error of the polynomial for 1/D.
    upload : {"full", "whole"}
        As in :func:`refattn.he.plan`. The plan is the fastest with its query's way on a line of 1 Gbit/s, or of 10
        where whole ciphertexts are asked for.

    Raises
    ------
    InvalidInput
        Shapes that do not fit together, or ranges that have no meaning.
    UnsupportedProblem
        No ring at 128 bits of security has the slots and levels; or arguments of sigmoid attention.
    """

    @plans("power", "there is no such layer; he.plan_sigmoid plans the attention alone")
    def __init__(self, weights: Weights, tolerance: float = 1e-2, upload: str = "full") -> None:
        if upload not in LINE:
            raise InvalidInput(f"upload: got {upload!r}, expected one of {', '.join(LINE)} for a layer")
        if not isinstance(weights, Weights):
            raise InvalidInput(
                f"weights: got {type(weights).__name__}, expected Weights; he.Encoder takes several blocks"
            )
        self._upload = upload
        self._begin(weights, tolerance)
        w = weights
        found = [plan for where in layouts_of(w) for plan in self._planned(*where)]
        if not found:
            raise no_ring("the layer", w)
        self.plan = min(found, key=lambda x: x.predicted_ms() + LINE[upload] * x.upload_bytes)
        self._compile(self.plan.layout, self.plan.spread, self.plan.apart)

    def _begin(self, weights: Weights, tolerance: float) -> None:
        """Check the weights and choose the polynomial for 1/D."""
        check(weights)
        self.weights = weights
        candidates = choose(*weights.denominator, tolerance)
        if not candidates:
            raise UnsupportedProblem(f"he: no polynomial is within {tolerance:.3g} of 1/D on {weights.denominator}")
        self.inverse: Inverse = candidates[0]

    def _planned(self, layout: Layout, spread: int, apart: int) -> list[LayerPlan]:
        """Return a plan, or none where the ring has too few levels."""
        w, then = self.weights, self.weights.then
        degree, d, n = 2 * layout.slots, w.query.shape[1], w.query_bias.shape[1]
        self._compile(layout, spread, apart)
        tokens, rests = (self._parts + 1) * self._copies, self._parts
        counting = Levels()
        depth = 99 - min(x.limbs for x in self.compute(counting, (), [Counted(99)] * (tokens + rests)))
        middle = min(MOST_MIDDLE, (MOST_BITS[degree] - MOST_FIRST - 10) // (depth + 1))
        if middle < LEAST_MIDDLE:
            return []
        ring = Ring(degree, min(MOST_FIRST, middle + 10), middle, MOST_FIRST, depth)
        steps = {s: c for s, c in counting.levels.items() if c}
        before = sum(steps.get(s, 0) for s in ("projections", "products", "power", "values", "division", "output"))
        limbs = depth + 2 - before
        exact = Levels()
        self.compute(exact, (), [Counted(depth + 1)] * tokens + [Counted(limbs)] * rests)
        kappa = kappa_of(then.norm, d) if isinstance(then, Feedforward) else 1.0
        return [LayerPlan(
            n, d, w.query.shape[0], w.p, 0 if isinstance(then, Feedforward) else len(then), ring, layout, spread, apart,
            0 if not isinstance(then, Feedforward) else limbs, w.first_epsilon, kappa,
            1 / kappa if isinstance(then, Feedforward) else self.inverse.output_factor / n,
            steps, exact.counts, tuple(sorted({r % ring.slots for r in exact.rotations})), self._upload, w.centred,
        )]  # fmt: skip

    def simulate(self, x: Any, seed: int | None = None) -> Float:
        """Return what the encrypted layer computes, on float64 numbers without keys; with noise drawn by a seed."""
        return simulated(self, x, seed)

    def tasks(self, parts: Sequence[Any]) -> list[tuple[Sequence[Any], Sequence[Any]]]:
        """Return what can be computed apart: here a query is one task."""
        return [((), parts)]

    def compute(self, m: Any, shared: Sequence[Any], parts: Sequence[Any]) -> list[Any]:
        """Return the result by an arithmetic; parts are a query's ciphertexts."""
        w, then, parts_of = self.weights, self.weights.then, self._parts
        tokens = [parts[k * self._copies : (k + 1) * self._copies] for k in range(parts_of + 1)]
        rest = parts[(parts_of + 1) * self._copies :]
        m.step("projections")
        factors = self._normalised(m, rest[parts_of:])
        queries = [self._projected(m, ("query", b), tokens[b], factors[b]) for b in range(parts_of)]
        k, v = (self._projected(m, (name, 0), tokens[-1], factors[-1]) for name in ("key", "value"))
        outs: list[Any] = []
        for b in range(parts_of):
            outs += attend(m, self._layout, w.p, self.inverse, w.epsilon, [queries[b]], [k], [v])
            if isinstance(then, Feedforward):
                outs[b] = self._feedforward(m, then, outs[b], rest[b], b)
        if isinstance(then, Feedforward):
            return outs
        m.step("mean")
        return [m.plus(sums(m, added(m, outs), 1, self._layout.columns), self._plains["bias", 0])]

    def _normalised(self, m: Any, squares: Sequence[Any]) -> list[list[Any]]:
        """Return what each part's queries, and keys and values, are multiplied with: a layer's nothing."""
        return [[]] * (self._parts + 1)

    def _projected(self, m: Any, name: Name, tokens: Sequence[Any], factors: list[Any]) -> Any:
        """Return a part's queries, or all keys or values."""
        y = sums(m, self._maps[name].apply(m, tokens), period_of(self._layout), self._apart)
        # 1, 2, 4, ... of the factors: each product is there when the projection has come so far
        for k in range(len(factors).bit_length()):
            y = m.product(y, product(m, factors[2**k - 1 : 2 ** (k + 1) - 1]))
        return m.plus(y, self._plains[name])

    def _feedforward(self, m: Any, then: Feedforward, z: Any, residual: Any, part: int) -> Any:
        layout, of = self._layout, {name: self._maps[name, part] for name in ("out", "up", "down")}
        plains = {name: self._plains[name, part] for name in of}
        m.step("output")
        y = m.plus(of["out"].apply(m, [z, m.conjugate(z)]), plains["out"])
        y = m.add(y, m.like(residual, y))
        y = sums(m, y, layout.columns, layout.keys)
        m.step("normalisation")
        s = m.rescale(m.relinearize(m.mul(y, m.conjugate(y))))
        for step in layout.group_steps():
            s = m.add(s, m.rotate(s, step))
        s = sums(m, s, layout.queries, layout.heads)
        norm = then.norm
        s = m.add_constant(s, (2 * then.norm_epsilon - norm.low - norm.high) / (norm.high - norm.low))
        t = of["up"].apply(m, [y])
        u = product(m, [m.add(t, m.conjugate(t)), *norm.apply(m, s)])
        m.step("activation")
        g = then.activation.apply(m, m.plus(u, plains["up"]))
        m.step("feed-forward")
        o = sums(m, of["down"].apply(m, [g]), layout.columns, layout.keys)
        o = m.plus(o, plains["down"])
        return m.add(o, m.like(y, o))

    def _compile(self, layout: Layout, spread: int, apart: int) -> None:
        """Make the maps and plaintexts for a layout; parts of queries whose places are the same share them."""
        w, then = self.weights, self.weights.then
        heads, d, _ = w.query.shape
        n = w.query_bias.shape[1]
        self._layout, self._copies, self._apart = layout, -(-d // (spread * apart)), apart
        self._parts = -(-n // layout.queries)
        self._maps: dict[Name, Map] = {}
        self._plains: dict[Name, Plain] = {}
        f, j, h, i = axes_of(layout)
        factor, here = w.scale * self.inverse.input_factor ** (1 / w.p) / 2, (j < n) & (h < heads)
        maps: dict[bytes, Map] = {}
        for b in range(self._parts):
            t = i + b * layout.queries
            seen = (t < n) & here & ((j <= t) | (not w.causal))
            self._side("query", b, (w.query * factor, w.query_bias * factor, 1j), t, seen, spread, maps)
        self._side("key", 0, (w.key, w.key_bias, -1j), j, here, spread, {})
        self._side("value", 0, (w.value, w.value_bias, 1j), j, here, spread, {})
        if isinstance(then, Feedforward):
            for b in range(self._parts):
                if b > 0 and (b + 1) * layout.queries <= n:  # all are tokens, as of the first part
                    self._maps |= {(name, b): self._maps[name, 0] for name in ("out", "up", "down")}
                    self._plains |= {(name, b): self._plains[name, 0] for name in ("out", "up", "down")}
                    continue
                self._compile_output(then, layout, b)
                self._compile_feedforward(then, layout, b)
            return
        bias = np.pad(then, (0, 2 * layout.groups - len(then))) * n / self.inverse.output_factor
        added = np.where((j == 0) & (h == 0) & (i == 0), bias[2 * f] + 1j * bias[2 * f + 1], 0)
        self._plains["bias", 0] = Plain(added)

    def _side(
        self, name: str, part: int, given: tuple[Float, Float, complex], token: NDArray[np.int64],
        where: NDArray[np.bool_], spread: int, known: dict[bytes, Map],
    ) -> None:  # fmt: skip
        """Make the map and the plaintext of queries, keys or values; `known` maps are by `where`."""
        (weight, bias, unit_i), layout, apart = given, self._layout, self._apart
        f, _, h, _ = axes_of(layout)
        pair, period, at = f * layout.heads + h, period_of(layout), np.arange(len(f))
        n, d = bias.shape[1], weight.shape[1]
        by = _paired(bias, layout.groups, layout.heads, unit_i)  # (n, pairs)
        self._plains[name, part] = Plain(np.where(where, by[np.minimum(token, n - 1), pair], 0))
        if where.tobytes() not in known:
            key, unit = at % period + at // (apart * period) * period, layout.keys * layout.columns
            of = _paired(weight, layout.groups, layout.heads, unit_i)  # (d, pairs)
            inputs = [_tokens(feature_of(layout, spread, apart, c), token, d, n) for c in range(self._copies)]
            out = Arrangement(np.where(where, token, -1), np.where(where, pair, -1))
            known[where.tobytes()] = compiled(inputs, out, key, of, ((layout.columns, 1), (unit, spread)))
        self._maps[name, part] = known[where.tobytes()]

    def _compile_output(self, then: Feedforward, layout: Layout, part: int) -> None:
        """Make what leads from attention to the layer's first sum, of a part of the queries."""
        f, j, h, i = axes_of(layout)
        heads, d_v, d = then.out.shape
        width, kappa, real = layout.groups * layout.heads, kappa_of(then.norm, d), self._real(i, part)
        pair, after = f * layout.heads + h, (f + 1) % layout.groups * layout.heads + h
        steps = (layout.queries, layout.heads), (layout.keys * layout.columns, layout.groups)

        # of z, the pair (a, b) of head h: a·A + b·B = z·(A - iB)/2 + conj(z)·(A + iB)/2
        of = np.zeros((2 * width, width), np.complex128)
        out = np.pad(then.out, ((0, 0), (0, 2 * layout.groups - d_v), (0, 0))) * kappa * self.inverse.output_factor
        rows = np.arange(layout.groups)
        for head in range(heads):
            a, b = pairs_of(out[head, 0::2], width), pairs_of(out[head, 1::2], width)
            of[rows * layout.heads + head] = (a - 1j * b) / 2
            of[width + rows * layout.heads + head] = (a + 1j * b) / 2
        # heads that are none are zero in z, too; all pairs are asked for, so that every product is there
        first = [Arrangement(np.where((j == 0) & real, i, -1), x) for x in (pair, width + pair)]
        last = j == layout.keys - 1  # of the next f: what lies past this row's end
        target = np.where(j == 0, pair, after)
        wanted = real & ((j == 0) | last)
        own = np.arange(len(f)) // period_of(layout) * width * layout.queries  # repeats are results of their own
        self._maps["out", part] = compiled(
            first, Arrangement(np.where(wanted, i, -1), np.where(wanted, target, -1)),
            own + target * layout.queries + i, of, steps,
        )  # fmt: skip
        bias = pairs_of(then.out_bias * kappa, width)
        self._plains["out", part] = Plain(np.where((j == 0) & real, bias[pair], 0))

    def _real(self, i: NDArray[np.int64], part: int) -> NDArray[np.bool_]:
        """Return which queries of a part are tokens."""
        return np.asarray(i + part * self._layout.queries < self.weights.query_bias.shape[1])

    def _compile_feedforward(self, then: Feedforward, layout: Layout, part: int) -> None:
        """Make what leads from the first sum to the layer's result, of a part of the queries."""
        f, j, h, i = axes_of(layout)
        (d, hidden), width = then.up.shape, layout.groups * layout.heads
        kappa, real = kappa_of(then.norm, d), self._real(i, part)
        pair, after = f * layout.heads + h, (f + 1) % layout.groups * layout.heads + h
        steps = (layout.queries, layout.heads), (layout.keys * layout.columns, layout.groups)
        own = np.arange(len(f)) // period_of(layout) * width * layout.queries  # repeats are results of their own
        held = Arrangement(np.where((j >= 1) & real, i, -1), after)
        unit = (j - 1) * width + pair
        wide = real & (j >= 1) & (j <= layout.keys - 2) & (unit < hidden)
        up = np.pad(then.up, ((0, 2 * width - d), (0, 0)))
        up = up * (then.norm.factors()[0] / (2 * kappa * then.activation.most))
        up_pairs = up[0::2] - 1j * up[1::2]
        hiddens = Arrangement(np.where(wide, i, -1), np.where(wide, unit, -1))
        self._maps["up", part] = compiled([held], hiddens, np.arange(len(f)), up_pairs, steps)
        bias_up = np.where(wide, (then.up_bias / then.activation.most)[np.where(wide, unit, 0)], 0)
        self._plains["up", part] = Plain(bias_up.astype(np.complex128))

        down = pairs_of(then.down * kappa * then.activation.constant, width)
        target = np.where(j == 0, pair, after)
        rows_in = real & (j <= layout.keys - 2)
        self._maps["down", part] = compiled(
            [hiddens], Arrangement(np.where(rows_in, i, -1), np.where(rows_in, target, -1)),
            own + target * layout.queries + i, down, steps,
        )  # fmt: skip
        bias = pairs_of(then.down_bias * kappa, width)
        self._plains["down", part] = Plain(np.where((j == 1) & real, bias[after], 0))


def least_of(w: Weights) -> Layout:
    """Return the layout with as many slots as one repeat of a ciphertext needs: of all queries, or as many as fit.

    Raises
    ------
    UnsupportedProblem
        More hidden features than the tokens' slots hold.
    """
    then, (heads, d, _) = w.then, w.query.shape
    n = w.query_bias.shape[1]
    width = max(w.query.shape[2], w.value.shape[2], 1 if not isinstance(then, Feedforward) else -(-d // heads))
    rows, columns = 1 << (n - 1).bit_length(), 1 << (heads - 1).bit_length()
    groups = 1 << (-(-width // 2) - 1).bit_length()
    hidden = then.up.shape[1] if isinstance(then, Feedforward) else 0
    while (rows - 2) * groups * columns < hidden and 2 * groups * rows * columns * rows <= max(MOST_BITS) // 2:
        groups *= 2
    if hidden and (rows - 2) * groups * columns < hidden:
        raise UnsupportedProblem(
            f"he: {hidden} hidden features do not fit {n} tokens' slots, which hold "
            f"{max(0, rows - 2) * groups * columns}"
        )
    queries = rows
    while queries > max(1, rows // MOST_PARTS) and groups * rows * columns * queries > max(MOST_BITS) // 2:
        queries //= 2
    return Layout(groups * rows * columns * queries, rows, columns * queries, groups, 1, queries, columns)


def no_ring(what: str, w: Weights) -> UnsupportedProblem:
    """Return the error that says what no ring has for some weights: slots, or levels."""
    slots, most = period_of(least_of(w)), max(MOST_BITS) // 2
    return UnsupportedProblem(
        f"he: {what} needs {slots} slots, and no ring at 128 bits of security has more than {most}: take fewer tokens "
        "or features"
        if slots > most
        else f"he: no ring at 128 bits of security has {slots} slots and the levels that {what} needs; narrower "
        "ranges, a larger tolerance or a smaller p would help"
    )


def layouts_of(w: Weights) -> Iterator[tuple[Layout, int, int]]:
    """Yield the layouts that can be planned, with pairs of features that are spread, and that lie apart."""
    least, d = least_of(w), w.query.shape[1]
    period = period_of(least)
    for degree in MOST_BITS:
        if degree // 2 < period:
            continue
        layout = replace(least, slots=degree // 2)
        for spread, apart in itertools.product(_powers(least.groups), _powers(degree // 2 // period)):
            if spread * apart < 2 * d:
                yield layout, spread, apart


def _tokens(feature: NDArray[np.int64], token: NDArray[np.int64], d: int, n: int) -> Arrangement:
    return Arrangement(np.where(token < n, token, -1), np.where(feature < d, feature, -1))


def _paired(x: Float, groups: int, heads: int, unit: complex) -> Complex:
    """Return (rows, pairs) of (heads, rows, features): pair (f, h) of features 2f and 2f + 1 of head h."""
    x = np.pad(x, ((0, heads - x.shape[0]), (0, 0), (0, 2 * groups - x.shape[2])))
    z = x[..., 0::2] + unit * x[..., 1::2]
    return np.asarray(z.transpose(1, 2, 0).reshape(x.shape[1], -1))


def pairs_of(x: Float, width: int) -> Complex:
    """Return features as `width` pairs along the last axis."""
    x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 2 * width - x.shape[-1])])
    return np.asarray(x[..., 0::2] + 1j * x[..., 1::2])


def kappa_of(norm: Polynomial, d: int) -> float:
    """Return what makes the sum of squares the variable that the normalisation's polynomial is in, but for a shift."""
    return math.sqrt(2 / (d * (norm.high - norm.low)))


def added(m: Any, parts: Sequence[Any]) -> Any:
    """Return the sum of ciphertexts."""
    total = parts[0]
    for x in parts[1:]:
        total = m.add(total, x)
    return total


def sums(m: Any, x: Any, unit: int, count: int) -> Any:
    """Return sums over `count` neighbours, a power of 2, that are `unit` slots apart."""
    step = unit
    while step < unit * count:
        x = m.add(x, m.rotate(x, step))
        step *= 2
    return x


def _powers(most: int) -> list[int]:
    return [1 << k for k in range(most.bit_length())]
