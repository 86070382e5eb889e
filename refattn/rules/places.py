"""Where a rule's formula is asked: queries and keys of a call, as indices, as tensors, as text, or as ranges."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Places"]


class Places:
    """What a formula sees.

    Attributes
    ----------
    q, k : integers
        Places of queries and of keys, which broadcast.
    b, h : int
        The batch and the query head.
    n_q, n_k : int
        How many queries and keys the call has.
    """

    def __init__(self, q: Any, k: Any, b: Any, h: Any, n_q: int, n_k: int) -> None:
        self.q, self.k, self.b, self.h, self.n_q, self.n_k = q, k, b, h, n_q, n_k

    def behind(self, corner: str) -> Any:
        """Return the place of a query on the diagonal, counted in keys."""
        return self.q + (self.n_k - self.n_q) if corner == "bottom_right" and self.n_k != self.n_q else self.q

    def look(self, name: str, x: NDArray[Any], *at: Any) -> Any:
        """Return a table's elements; an axis of one element stands for all."""
        return self.table(name, x, tuple(0 if n == 1 else i for n, i in zip(x.shape, at, strict=True)))

    def table(self, name: str, x: NDArray[Any], at: tuple[Any, ...]) -> Any:
        """Return a table's elements at places."""
        return x[at]

    def clip(self, x: Any, least: int, most: int) -> Any:
        """Hold integers to a range."""
        return np.clip(x, least, most)

    def number(self, x: Any) -> Any:
        """Return truth as 1 and 0."""
        return np.asarray(x, np.float64)
