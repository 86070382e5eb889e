"""Several blocks on ciphertexts: between two of them the client encrypts anew what it cannot read.

A block's result is masked and sent back; the client decrypts, places value and mask where the next block wants them,
and encrypts; the server takes the mask off (refresh.py). A block after the first also needs its normalisation: the sums
of squares come with the tokens, computed where few primes are left and key switches are cheap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput, UnsupportedProblem
from .arguments import check_device, plans
from .arithmetic import Counted, Levels, Numbers
from .encoder_plan import MOST_DRIFT, REFRESHED, EncoderPlan
from .layer import LEAST_MIDDLE, LINE, Layer, added, kappa_of, layouts_of, least_of, no_ring, sums
from .layer_plan import axes_of, period_of
from .layout import Layout
from .linear import Arrangement, Plain, compiled
from .noise import Ring
from .plan import MOST_BITS, MOST_FIRST
from .plausible import Size, Sizes
from .sampled import Sampled
from .weights import EncoderWeights, Feedforward, Weights, check_encoder

__all__ = ["Encoder"]

Float = NDArray[np.float64]
FIRST, MOST_MIDDLE = 52, 44
"""Bits of the last prime, which float64 holds, and the most of the others, so that results are below it."""
LATENCY = 100.0
"""Milliseconds that client and server take to place, encode and encrypt a ciphertext of a refresh."""


class _Block(Layer):
    """A block of an encoder: a layer with the normalisation of its input, and what follows its result.

    Parameters
    ----------
    weights : Weights
        The block's.
    tolerance : float
        Of the polynomial for 1/D.
    scale : float
        What the tokens come multiplied with.
    head : (weights, bias) or None
        What is computed of the result's mean over tokens.
    last : bool
        Whether the result is the encoder's, which needs no sums of squares.
    """

    def __init__(
        self, weights: Weights, tolerance: float, scale: float, head: tuple[Float, Float] | None, last: bool
    ) -> None:
        self._last, self._head, self._norm = last, head, weights.first
        factor = 1 / scale
        if weights.first is not None:
            factor *= weights.first.factors()[0]
        then = weights.then
        if head is not None and isinstance(then, Feedforward):  # the bias of the result goes into the scores'
            self._head = (head[0], head[1] + then.down_bias @ head[0])
            then = replace(then, down_bias=np.zeros_like(then.down_bias))
        given = {n: getattr(weights, n) * factor for n in ("query", "key", "value")}
        self._begin(replace(weights, **given, then=then), tolerance)

    def compute(self, m: Any, shared: Sequence[Any], parts: Sequence[Any]) -> list[Any]:
        """Return the scores; or the block's result, and for one that is not the last the sums of squares."""
        outs, layout = super().compute(m, shared, parts), self._layout
        if self._head is not None:
            m.step("scores")
            held = [self._maps["head", b].apply(m, [o, m.conjugate(o)]) for b, o in enumerate(outs)]
            t = sums(m, added(m, held), layout.queries, layout.heads)
            mean = t
            for _ in range(1, min(layout.queries, len(self.weights.query_bias[0]))):
                mean = m.add(t, m.rotate(mean, 1))  # few primes are left: rotations cost less than keys
            return [m.plus(mean, self._plains["head", 0])]
        if self._last:
            return outs
        m.step("squares")
        squares = []
        for o in outs:
            s = m.rescale(m.relinearize(m.mul(o, m.conjugate(o))))
            for step in layout.group_steps():
                s = m.add(s, m.rotate(s, step))
            squares.append(sums(m, s, layout.queries, layout.heads))
        return [*outs, *squares]

    def _normalised(self, m: Any, squares: Sequence[Any]) -> list[list[Any]]:
        if self._norm is None:
            return super()._normalised(m, squares)
        norm, epsilon = self._norm, self.weights.first_epsilon or 0.0
        shift = (2 * epsilon - norm.low - norm.high) / (norm.high - norm.low)
        return [norm.apply(m, m.add_constant(s, shift)) for s in squares]

    def _compile(self, layout: Layout, spread: int, apart: int) -> None:
        super()._compile(layout, spread, apart)
        then = self.weights.then
        if self._head is None or not isinstance(then, Feedforward):
            return
        weight, bias = self._head
        f, j, h, i = axes_of(layout)
        (d, classes), n = weight.shape, self.weights.query_bias.shape[1]
        width, after = layout.groups * layout.heads, (f + 1) % layout.groups * layout.heads + h
        # of o, the pair (a, b): a·A + b·B = o·(A - iB)/2 + conj(o)·(A + iB)/2, A and B of two scores each
        x = np.pad(weight, ((0, 2 * width - d), (0, classes % 2))) / (2 * kappa_of(then.norm, d) * n)
        two = x[:, 0::2] + 1j * x[:, 1::2]
        of = np.concatenate([two[0::2] - 1j * two[1::2], two[0::2] + 1j * two[1::2]])
        own = np.arange(len(f)) // period_of(layout) * layout.groups * layout.queries
        unit = layout.keys * layout.columns
        # what heads hold of a token is added up later, with the tokens
        steps = (layout.columns, 1), (unit, layout.groups)
        for b in range(self._parts):
            here = (j == 1) & self._real(i, b)
            if b and here.sum() == ((j == 1) & self._real(i, 0)).sum():
                self._maps["head", b] = self._maps["head", 0]
                continue
            held = [Arrangement(np.where(here, i, -1), np.where(here, y, -1)) for y in (after, width + after)]
            wanted = here & (f < two.shape[1])
            out = Arrangement(np.where(wanted, i, -1), np.where(wanted, f, -1))
            self._maps["head", b] = compiled(held, out, own + f * layout.queries + i, of, steps)
        pairs, first = np.pad(bias, (0, 2 * layout.groups - classes)), (j == 1) & (f < two.shape[1])
        scores = np.where(first & (h == 0) & (i == 0), pairs[2 * f] + 1j * pairs[2 * f + 1], 0)
        self._plains["head", 0] = Plain(scores)


class Encoder:
    """The blocks' programs: the plan, and the weights as plaintexts. The server's alone.

    Parameters
    ----------
    weights : EncoderWeights
        What it computes.
    tolerance : float
        The largest relative error of the polynomials for 1/D.
    upload : {"full", "whole"}
        As in :class:`refattn.he.Layer`.
    device : {"cpu", "cuda"}
        Where it will be computed; any plan is computed on both. On a GPU that takes milliseconds, so the plan is the
        one with the fewest bytes and ciphertexts, each of which the client places, encodes and encrypts.

    Raises
    ------
    InvalidInput
        Shapes that do not fit together, or ranges that have no meaning.
    UnsupportedProblem
        No ring at 128 bits of security has the slots and levels; or arguments of sigmoid attention.
    """

    @plans("power", "there is no such layer; he.plan_sigmoid plans the attention alone")
    def __init__(
        self, weights: EncoderWeights, tolerance: float = 1e-2, upload: str = "full", device: str = "cpu"
    ) -> None:
        check_device(device)
        if upload not in LINE:
            raise InvalidInput(f"upload: got {upload!r}, expected one of {', '.join(LINE)} for an encoder")
        if not isinstance(weights, EncoderWeights):
            raise InvalidInput(
                f"weights: got {type(weights).__name__}, expected EncoderWeights; he.Layer takes one block"
            )
        check_encoder(weights)
        self.weights, self._upload = weights, upload
        d, last = weights.blocks[0].query.shape[1], len(weights.blocks) - 1
        scales = [1.0, *(kappa_of(w.then.norm, d) for w in weights.blocks)]  # type: ignore[union-attr]
        head = None if weights.head is None or weights.head_bias is None else (weights.head, weights.head_bias)
        if head is not None and head[0].shape[1] > (most := self._width(weights)):
            raise UnsupportedProblem(f"he: got {head[0].shape[1]} classes, at most {most} fit the tokens' slots")
        self._scales = scales
        self.stages = tuple(
            _Block(w, tolerance, scales[k], head if k == last else None, k == last)
            for k, w in enumerate(weights.blocks)
        )
        self.plan = self._planned(device)

    @staticmethod
    def _width(weights: EncoderWeights) -> int:
        return 2 * least_of(_largest(weights)).groups

    def simulate(self, x: Any, seed: int | None = None) -> Float:
        """Return what the encrypted encoder computes, on float64 numbers without keys; with noise drawn by a seed.

        Raises
        ------
        InvalidInput
            A block's result is larger than a refresh is right for.
        """
        plan = self.plan
        shape, slots = plan.encoded(x)
        for stage, block in enumerate(self.stages):
            if seed is None:
                outs = block.compute(Numbers(), (), [s for s, _ in slots])
            else:
                m = Sampled(plan.ring, seed + stage)
                outs = [y.slots for y in block.compute(m, (), [m.fresh(s, limbs) for s, limbs in slots])]
            if stage == plan.rounds - 1:
                return plan.decoded(outs, shape)
            for y in outs:
                size = float(np.sqrt((np.abs(y) ** 2).mean()))
                if not size <= plan.refresh_most:
                    raise InvalidInput(
                        f"he: block {stage} has a result of root mean square {size:.3g} in its slots, above the "
                        f"{plan.refresh_most:.3g} that a refresh is right for"
                    )
            tokens, squares = plan.taken([(y, np.zeros_like(y)) for y in outs])
            slots = [(p[0] + p[1], limbs) for p, limbs in plan.placed(stage + 1, tokens, squares)]
        raise AssertionError("an encoder has a block")

    def tasks(self, parts: Sequence[Any]) -> list[tuple[Sequence[Any], Sequence[Any]]]:
        """Return what can be computed apart: here a message is one task."""
        return [((), parts)]

    def compute(self, m: Any, shared: Sequence[Any], parts: Sequence[Any]) -> list[Any]:
        """Return the first block's result; that of the others is ``stages[k].compute``."""
        return self.stages[0].compute(m, shared, parts)

    def _planned(self, device: str) -> EncoderPlan:
        """Return the plan: the places that suit one block best, of those with which all have levels enough."""
        typical = self.stages[min(1, len(self.stages) - 1)]
        line, found = LINE[self._upload], []  # type: ignore[var-annotated]
        for layout, spread, apart in layouts_of(_largest(self.weights)):
            typical._compile(layout, spread, apart)
            made = self._with([typical] * len(self.stages), layout, spread, apart)
            if made is not None:
                parts = sum(len(made.part_limbs(s)) for s in range(device == "cpu", made.rounds))
                cost = (made.predicted_ms() if device == "cpu" else 0.0) + line * made.upload_bytes + LATENCY * parts
                found.append((cost, len(found), layout, spread, apart))
        for _, _, layout, spread, apart in sorted(found, key=lambda x: x[:2]):
            for block in self.stages:
                block._compile(layout, spread, apart)
            made = self._with(self.stages, layout, spread, apart)
            if made is not None:
                return made
        raise no_ring("a block", _largest(self.weights))

    def _with(self, blocks: Sequence[_Block], layout: Layout, spread: int, apart: int) -> EncoderPlan | None:
        """Return the plan of blocks that are compiled for a layout, or none where the ring has too few levels."""
        w, degree, last = self.weights, 2 * layout.slots, len(blocks) - 1
        first = w.blocks[0]
        n, (heads, d, _) = first.query_bias.shape[1], first.query.shape
        parts_of = -(-n // layout.queries)
        copies = -(-d // (spread * apart)) * (parts_of + 1)
        limbs, levels = [], Counter[str]()
        for k, block in enumerate(blocks):
            counting = Levels()
            parts = [Counted(99)] * (copies + parts_of + (parts_of + 1) * (block._norm is not None))
            depth = 99 - min(x.limbs for x in block.compute(counting, (), parts))
            top = depth + (1 if k == last else REFRESHED)
            before = ("projections", "products", "power", "values", "division", "output")
            residual = top + 1 - sum(counting.levels.get(s, 0) for s in before)
            limbs.append((top, residual, 0 if block._norm is None else top))
            if sum(counting.levels.values()) > sum(levels.values()):
                levels = Counter({s: c for s, c in counting.levels.items() if c})
        most = max(top for top, _, _ in limbs) - 1
        middle = min(MOST_MIDDLE, (MOST_BITS[degree] - MOST_FIRST - FIRST) // most)
        if middle < LEAST_MIDDLE:
            return None
        ring = Ring(degree, FIRST, middle, MOST_FIRST, most)
        exact, scales, drift = Levels(), Sizes(ring), [2.0, 2.0]
        for k, block in enumerate(blocks):
            top, residual, squares = limbs[k]
            more = [squares] * (parts_of + 1) if block._norm is not None else []
            left = [top] * copies + [residual] * parts_of + more
            block.compute(exact, (), [Counted(n) for n in left])
            for out in block.compute(scales, (), [Size(2.0**middle, n) for n in left]):
                off = 1.001 * out.scale / 2.0**middle
                drift[k == last] = max(drift[k == last], off, 1.002 / off)
        if not max(drift) <= MOST_DRIFT:
            return None
        return EncoderPlan(
            n, d, heads, 0 if w.head is None else w.head.shape[1], ring, layout, spread, apart, tuple(limbs),
            self._factors(d), first.first_epsilon, 1.0 if w.head is not None else 1 / self._scales[-1], dict(levels),
            exact.counts, tuple(sorted({r % ring.slots for r in exact.rotations})), self._upload, first.centred,
            (drift[0], drift[1]),
        )  # fmt: skip

    def _factors(self, d: int) -> tuple[tuple[float, float], ...]:
        """Return what residuals and sums of squares are multiplied with, by block."""
        found = [(self._scales[1], 1.0)]
        for k, w in enumerate(self.weights.blocks[1:], 1):
            norm = w.first
            assert norm is not None  # check_encoder saw it
            square = 2 / (d * self._scales[k] ** 2 * (norm.high - norm.low))
            found.append((self._scales[k + 1] / self._scales[k], square))
        return tuple(found)


def _largest(w: EncoderWeights) -> Weights:
    """Return the block with the most hidden features: layouts that hold it hold all."""
    return max(w.blocks, key=lambda x: x.then.up.shape[1])  # type: ignore[union-attr]
