"""What the predicted variances of one head's gradients are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import format_of
from ...exact.heads import Head
from ..model import C, Model, inside_type
from .features import Rotated
from .forward import HeadLosses, head_losses
from .gradients import dropped
from .graph import Graph
from .losses import Losses
from .operands import Operands
from .rules import floor

__all__ = ["Parts", "dot"]

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Parts:
    """What the variances of one head's gradients are made of."""

    one: Head
    model: Model
    losses: HeadLosses
    q: Float  # as they are multiplied
    k: Float
    cu: float
    tiny: float  # the square of what underflow of a sum costs, and of a weight
    tiny_w: float
    dout: Float
    o: Float
    lse: Float
    weights: Float  # before dropout
    kept: Any  # what dropout multiplies them with
    slope: Any  # of the softcap
    x: Float  # dout·v - dout·out
    wild: NDArray[np.bool_]
    var_p: Float  # relative
    var_dp: Float
    var_d: Float
    var_lse: Float
    d: Float  # dout·out - dlse, a column
    dlse: Float  # a column

    @classmethod
    def of(cls, one: Head, model: Model, o: Float, dout: Float, var_out: Float, var_lse: Float, dlse: Float) -> Parts:
        """Return those of one head, from what is predicted of out and lse and what arrives at them."""
        inside = format_of(model.accumulator)
        cu = C * inside.unit_roundoff**2
        turned = Rotated.of(one, model, Operands.of(one, model), Losses(model, one.k.shape[0]))
        # what is lost where queries and keys are written is followed by itself: it is common to rows, or to keys
        losses = head_losses(one, slice(None), replace(model, rotated="") if turned.moved else model)
        assert losses.lse is not None
        Graph([losses.out.node, losses.lse.node])  # the flows
        var_w, parts = losses.score_variances, model.merges(one.k.shape[0], one.sink is not None)
        wild = np.isnan(var_w).any(1, keepdims=True)
        tiny_w, tiny = (floor(form, model) ** 2 / 3 for form in (inside_type(model.weights), inside))
        o, v = np.nan_to_num(o, posinf=0, neginf=0), one.v
        lse = np.where(one.allowed.any(1), np.nan_to_num(losses.lse.a[:, 0], neginf=0.0), 0.0)[:, None]
        plain = one.plain()
        t = 0.0 if plain.softcap is None else np.tanh(turned.q @ turned.k.T * plain.scale / plain.softcap)
        (kept, off), g2 = dropped(one, model, inside.unit_roundoff), dout * dout
        dp = kept * (dout @ v.T)
        var_dp = kept * kept * cu * dot(losses.f, v.shape[1], dout, v.T)
        var_dp = var_dp + C * (model.loss(model.scores) ** 2 + off**2) * dp * dp
        var_d = (g2 * var_out).sum(1, keepdims=True) + cu * (g2 * o * o).sum(1, keepdims=True)
        var_p = np.where(wild, 1.0, var_w) + cu * ((2 + 2 * parts) * (lse**2 + 2))
        d = (dout * o).sum(1, keepdims=True) - dlse[:, None]
        var_d = var_d + cu * dlse[:, None] ** 2
        x = dp - d
        return cls(
            one, model, losses, turned.q, turned.k, cu, tiny,
            tiny_w, dout, o, lse, losses.probabilities, kept, 1 - np.square(t), x, wild,
            var_p, var_dp, var_d, var_lse, d, dlse[:, None],
        )  # fmt: skip

    @property
    def rows_of_a_key(self) -> int:
        """How many rows meet in a gradient by a key."""
        return int(self.q.shape[0]) * (self.one.problem.heads // self.one.problem.heads_kv)

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied with."""
        return float(self.one.plain().scale)

    @property
    def ds(self) -> Float:
        """The gradient by the products of queries and keys, over the scale: the softcap is behind it."""
        return np.asarray(self.weights * self.x * self.slope)

    def own(self) -> Float:
        """Return the variance of each of those that is its own: D's error is common to a row."""
        w2, slope, cu = self.weights**2, self.slope, self.cu
        found = slope**2 * w2 * (self.x * self.x * (self.var_p + 2 * cu) + self.var_dp)
        found = found + C * self.model.loss(self.model.weights) ** 2 * self.ds**2
        if self.one.problem.softcap is not None:
            # 1 - t^2 near 0 keeps the errors of t, which is good to 2 ulps, and of its square
            t2, u = 1 - slope, format_of(self.model.accumulator).unit_roundoff
            more = 4 * t2 * (9 * u * u * t2) / 3 + 4 * cu
            found = found + w2 * (self.x * self.x + self.var_dp + self.var_d) * more
        return np.asarray(found)


def dot(f: Losses, n: Any, x: Float, y: Float) -> Float:
    """Return the variances of sums of n rounded products, those of x @ y, over C u^2."""
    walk, squares = f.walk(x, y)
    return np.asarray(f.model.depth(n) * walk + squares)
