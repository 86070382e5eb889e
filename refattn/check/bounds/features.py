r"""Columns of queries and keys in the arithmetic of losses: taken in another order, and written out.

A kernel turns queries and keys by their positions in its accumulator, and may write them in its inputs' type before it
multiplies them (``Model.rotated``): one more rounding of each column that is turned, ``u_r`` of its size. A gradient by
what was multiplied may be rounded to that type, too, before it is turned back: :class:`Rotated` has both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import to_float64
from ...dtypes import format_of
from ...exact.heads import Head
from ...exact.matrix import Reflected
from ...norms import NORMS, has_norms, multiplied
from ...positions import partners, places, tables
from ..model import Model, inside_type
from .nodes import Link, Node, Scaled
from .operands import Operands
from .rules import floor

__all__ = ["Features", "Picked", "Rotated"]

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Picked(Link):
    """Columns in another order, each at most once."""

    at: NDArray[np.intp]

    def forward(self, x: Any) -> Any:
        """Take largest errors on."""
        return np.broadcast_to(x, self.parent.a.shape)[:, self.at]

    squares = forward

    def pull(self, child: Node, g: Float) -> Float:
        """Take the adjoint back."""
        back = np.zeros_like(g, shape=(*g.shape[:-1], self.parent.a.shape[1]))
        back[..., self.at] = g
        return back


class Features(Reflected):
    """What a matrix of losses does with its columns."""

    __slots__ = ()

    def columns(self, at: NDArray[np.intp]) -> Any:
        """Return the columns of those numbers: nothing is lost."""
        s: Any = self
        return type(s)(s.f, Node(s.node.a[:, at], s.node.axes, 0.0, 0.0, Picked(s.node, at)))

    def written(self, moved: NDArray[np.bool_]) -> Any:
        """Return it rounded to the type that turned queries and keys are written in.

        Columns that were not turned are inputs and stay, but where inputs are of a wider type than that.
        """
        s: Any = self
        n, u = s.node, s.f.model.loss(s.f.model.rotated)
        if not u:
            return s
        form = inside_type(s.f.model.rotated)
        with np.errstate(over="ignore", invalid="ignore"):
            moved = moved | (form.round_array(n.a) != n.a)
        tiny = floor(form, s.f.model) * s.f.model.times
        err = np.where(moved, u * (np.abs(n.a) + n.span) + tiny, 0.0)
        var = np.where(moved, s.f.model.scatter(s.f.model.rotated) * n.a * n.a + tiny**2 / 3, 0.0)
        return type(s)(s.f, Node(n.a, n.axes, err, var, Scaled(n, 1.0, n.a.shape)))


@dataclass(frozen=True)
class Rotated:
    """One head's queries and keys as they are multiplied, what they have lost till then, and the way back.

    Attributes
    ----------
    q, k : (n, d_k) arrays
        Turned by their positions where the call has these.
    lost_q, lost_k : (n, d_k) arrays
        Their largest errors.
    """

    one: Head
    model: Model
    q: Float
    k: Float
    lost_q: Float
    lost_k: Float

    @classmethod
    def of(cls, one: Head, model: Model, lost: Operands, f: Any) -> Rotated:
        """Return them over an arithmetic of losses."""
        if one.problem.rotary is None and not has_norms(one.problem):
            return cls(one, model, one.q, one.k, lost.q, lost.k)
        q, k = f.leaf(one.q, ("q", "d"), lost.q), f.leaf(one.k, ("k", "d"), lost.k)
        q, k = multiplied(q, k, one.options(f))
        spans = (np.broadcast_to(x.node.span, x.a.shape) for x in (q, k))
        return cls(one, model, q.a, k.a, *spans)

    @property
    def lossy(self) -> bool:
        """Tell whether anything is lost before queries and keys are multiplied."""
        return bool(self.model.operands) or self.moved

    @property
    def moved(self) -> bool:
        """Tell whether queries or keys are something else once they are multiplied."""
        return self.one.problem.rotary is not None or has_norms(self.one.problem)

    @property
    def products_lost(self) -> Any:
        """What turning costs the products of queries and keys, (n_q, n_k)."""
        if not self.moved:
            return 0.0
        return self.lost_q @ (np.abs(self.k) + self.lost_k).T + np.abs(self.q) @ self.lost_k.T

    def back(self, which: int, error: Float, size: Float) -> Float:
        """Return the errors of a gradient by queries (0) or keys (1), from those of the gradient by what is multiplied.

        Parameters
        ----------
        which : {0, 1}
            Queries or keys.
        error, size : (n, d_k) arrays
            The largest error and a bound of the size of the gradient by what was multiplied.
        """
        error, size = self._turned_back(which, error, size)
        weight = getattr(self.one.problem, NORMS[which])
        if weight is None:
            return error
        x, w, r = self._norm(which)
        tiny = floor(format_of(self.model.accumulator), self.model)
        error = error + self.model.loss(self.model.rotated) * (size + error) + tiny
        c = self._relative(x.shape[1])

        def taken(g: Float) -> Float:  # r (w g - x r^2 mean(x w g)), by sizes
            return np.asarray(r * (w * g + x * r * r * (x * w * g).mean(1, keepdims=True)))

        return np.asarray(taken(error) + c * taken(size + error) + x.shape[1] * tiny * (1 + r))

    def of_weights(self, which: int, error: Float, size: Float) -> Float:
        """Return the errors of the gradient by a norm's weights, (d_k,); arguments as those of :meth:`back`."""
        error, size = self._turned_back(which, error, size)
        x, _, r = self._norm(which)
        c = self._relative(x.shape[1]) + self.model.depth(len(x)) * format_of(self.model.accumulator).unit_roundoff
        c = c + 2 * self.model.loss(self.model.rotated)  # of what arrives, and of the row that it meets
        return np.asarray((x * r * (error + c * (size + error))).sum(0))

    def _norm(self, which: int) -> tuple[Float, Float, Float]:
        """Return the sizes of queries or keys, the norm's weights, and 1 / sqrt(mean(x^2) + eps) of each row."""
        p, x = self.one.problem, np.abs((self.one.q, self.one.k)[which])
        w = np.abs(to_float64(getattr(p, NORMS[which])))[None]
        return x, w, 1 / np.sqrt((x * x).mean(1, keepdims=True) + p.norm_eps)

    def _relative(self, d: int) -> float:
        """Return what a row's mean and its root lose, and the products with them, relatively: two powers of the root.

        A mean of d squares is good to d + 2 roundings, its root to half of that and 3 more.
        """
        return float((2 * d + 20) * format_of(self.model.accumulator).unit_roundoff)

    def _turned_back(self, which: int, error: Float, size: Float) -> tuple[Float, Float]:
        """Return the error and the size of a gradient by what is turned, from those by what is turned already."""
        p = self.one.problem
        if p.rotary is None:
            return error, size
        u, inside = format_of(self.model.accumulator).unit_roundoff, format_of(self.model.accumulator)
        error = error + self.model.loss(self.model.rotated) * (size + error) + floor(inside, self.model)
        cos, sin = (np.abs(x) for x in tables(p, places(p, self.one.batch, self.one.rows, self.one.keys)[which]))
        at = partners(p)

        def turn(x: Float) -> Float:
            return np.asarray(x * cos + (x * sin)[:, at])

        return turn(error) + 3 * u * turn(size + error) + 3 * floor(inside, self.model), turn(size)
