"""Right operands of a product, cut along their columns, and the sizes that bound what a product loses."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .anywhere import largest, on_host
from .levels import UP, Bounded, Level

__all__ = ["SQUARED", "Right", "norms", "product_sizes", "sizes_of"]

Float = NDArray[np.float64]
SQUARED = 2.0**-520
"""More than the root of what fewer than 2**34 squares lose that fall below 2**-1074."""


def norms(x: Float) -> Float:
    """Return an upper bound of each row's 2-norm."""
    found: Float = np.sqrt((x * x).sum(1)) * UP + SQUARED
    return found


def sizes_of(f: Level, x: Float) -> tuple[Float, Float, Float]:
    """Return each row's largest size, its sum of sizes, and an upper bound of its 2-norm."""
    if f.device is not None:
        there: tuple[Float, Float, Float] = f.device.sizes(x)
        return there
    size = np.abs(x)
    return largest(size, 1), size.sum(1), norms(x)


def product_sizes(left: list[Float], right: list[Right]) -> Float:
    """Return bounds of sum |A_s| |B_{>=L-s}| over the parts s of A, for any column of B, one a row.

    By rows: the 1-norm times the largest element, or the 2-norms.
    """
    level = len(left) - 1
    most, norm = (np.max([getattr(x, n) for x in right], 0) for n in ("top", "norm"))
    total: Any = 0.0
    for s, a in enumerate(left):
        _, one, two = sizes_of(right[0].f, a)
        total += np.minimum(one * most[level - s], two * norm[level - s]) * UP
    found: Float = total
    return found


class Right:
    """A right operand B (k, w), cut along its columns: what each level of a product needs."""

    def __init__(self, turned: Any, f: Level, b: int) -> None:
        level, self.f, self.product = f.level, f, np.matmul if f.device is None else f.device.matmul
        turned = turned if isinstance(turned, Bounded) else f.array(turned)
        room, flat = (None, None) if f.device is None else _room(turned.h, level, f.xp)
        heads, tails = turned._cut(b, level, room)
        self.k = turned.shape[1]
        each = f.xp.empty((3, level + 1, turned.shape[0]))
        for t, x in enumerate(tails):
            each[:, t] = sizes_of(f, x)
        self.most, self.sums = each[0], each[1]  # of each column, by tail
        self.top, self.norm = on_host(largest(each[::2], 2))
        # the first tails may be all 0: of narrow formats most are
        self.lead = next((t for t in range(level + 1) if self.top[level - t] > 0), level)
        if flat is not None:
            self.heads, self.tails = flat[0], flat[1][self.lead * self.k :]
            return
        self.heads = np.concatenate([x.T for x in heads[::-1]], 0) if level else turned.h.T[:0]
        self.tails = np.concatenate([x.T for x in tails[: level + 1 - self.lead][::-1]], 0)

    def _again(self) -> Right:
        """Return a copy, as ``copy.copy`` does in several times as long: a long call has one for each tile."""
        part = object.__new__(Right)
        vars(part).update(vars(self))
        return part

    def columns(self, at: slice) -> Right:
        """Return some columns."""
        part = self._again()
        part.heads, part.tails = self.heads[:, at], self.tails[:, at]
        return part

    def rows(self, at: slice) -> Right:
        """Return some rows, with the bounds of all."""
        part, w = self._again(), self.most.shape[1]
        part.k = at.stop - at.start
        for name in ("heads", "tails"):
            x = getattr(self, name)
            x = x.reshape(len(x) // self.k, self.k, w)[:, at]
            setattr(part, name, (x if len(x) == 1 else x.copy()).reshape(len(x) * part.k, w))
        return part

    def levels(self, left: Float, level: int, out: list[Float]) -> None:
        """Write the products of left = [A_0 .. A_{L-1} A_{>=L}] by level; the last is the rounded one."""
        for t in range(level):
            self.product(left[:, : (t + 1) * self.k], self.heads[(level - 1 - t) * self.k :], out=out[t])
        self.product(left[:, self.lead * self.k :], self.tails, out=out[level])


def _room(x: Any, level: int, xp: Any) -> tuple[Any, Any]:
    """Return where heads (L, n, m) and tails (L + 1, n, m) of a device's matrix go, and the operands that these are."""
    (n, m), rooms, flat, down = x.shape, [], [], x.strides[1] > x.strides[0]
    for parts in (level, level + 1):
        base = xp.empty((parts, m, n) if down else (n, parts, m))
        rooms.append((np.moveaxis(base, 1, 2) if down else np.moveaxis(base, 1, 0))[::-1])
        flat.append(base.reshape(parts * m, n) if down else base.reshape(n, parts * m).T)
    return tuple(rooms), flat
