"""Some rows of some heads of a large call, as a call of their own with the same exact answer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dropout import drawn
from ...masks import unused, visible
from ...norms import NORMS
from ...positions import part_of
from ...problem import Problem
from ...scales import dequantised
from ...variants import Rows, variant_of

__all__ = ["LINES", "WHOLE", "Sample", "sample_of", "separate"]

ROWS = 24
LINES = 64
"""Rows of all heads together."""
WHOLE = 2**15
"""Calls of fewer scores are compared as a whole."""
EDGES = (0, 1, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256)
"""Rows at the edges of usual tiles."""


@dataclass(frozen=True)
class Sample:
    """Rows of some query heads of one batch; of each group of query heads that is looked at, equally many.

    Attributes
    ----------
    batch : int
        Of the call.
    groups : tuple of int
        Key heads.
    heads : tuple of int
        Query heads, those of the first key head first.
    rows : tuple of int
        Query rows.
    """

    batch: int
    groups: tuple[int, ...]
    heads: tuple[int, ...]
    rows: tuple[int, ...]

    def of(self, p: Problem) -> Problem:
        """Return the rows as a call of their own: every mask in ``allowed``, the keys as they are."""
        p = drawn(dequantised(p.with_bias()))
        b, heads, groups, rows = self.batch, list(self.heads), list(self.groups), list(self.rows)
        rules = (p.causal, p.window, p.allowed, p.cu_seqlens_q, p.lengths_q, p.lengths_k)
        masked = any(x is not None for x in rules)
        bias = None if p.bias is None else self._of_scores(p.bias)
        weight, kept = (None if x is None else self._of_scores(x) for x in (p.weight, p.dropout_mask))
        return p.replace(
            query=p.query[b, heads][None][:, :, rows],
            key=p.key[b, groups][None],
            value=p.value[b, groups][None],
            sink=None if p.sink is None else p.sink[heads],
            bias=bias,
            weight=weight,
            dropout_mask=kept,
            allowed=self._allowed(p) if masked else None,
            causal=None,
            window=None,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            lengths_q=None,
            lengths_k=None,
            offset=None,
            alignment=None,
            out_scale=self._of_scores(p.out_scale) if hasattr(p.out_scale, "shape") else p.out_scale,
            **part_of(p, b, heads, rows),
        )

    def take(self, name: str, x: NDArray[Any]) -> NDArray[Any]:
        """Return what a result of the whole call ("out", "lse" or a gradient) has for these rows."""
        if name in ("out", "lse", "dq"):
            return x[self.batch, list(self.heads)][None][:, :, list(self.rows)]
        if name in ("dk", "dv"):
            return x[self.batch, list(self.groups)][None]
        if name[1:] in NORMS:
            return x
        if name == "dalibi_slopes":
            return (x if x.ndim == 1 else x[self.batch])[list(self.heads)]
        return x[list(self.heads)] if name == "dsink" else self._of_scores(x)

    def rest(self, name: str, x: NDArray[Any]) -> NDArray[Any]:
        """Return a gradient with what belongs to these rows set to 0: all of it must be 0."""
        left = np.array(x, copy=True)
        if name == "dq":
            left[np.ix_([self.batch], list(self.heads), list(self.rows))] = 0
        elif name in ("dk", "dv"):
            left[self.batch, list(self.groups)] = 0
        elif name == "dsink":
            left[list(self.heads)] = 0
        else:
            left[:] = 0
        return left

    def only(self, dout: NDArray[Any]) -> NDArray[Any]:
        """Return dout with all other rows set to 0."""
        kept = np.zeros_like(dout)
        at = np.ix_([self.batch], list(self.heads), list(self.rows))
        kept[at] = dout[at]
        return kept

    def place(self, name: str, at: tuple[int, ...]) -> tuple[int, ...]:
        """Return the place in the whole call of a place among these rows."""
        if name in ("dsink", "dalibi_slopes"):
            return (self.heads[at[0]],)
        if name == "dbias" or name[1:] in NORMS:
            return at
        if name in ("dk", "dv"):
            return (self.batch, self.groups[at[1]], *at[2:])
        return (self.batch, self.heads[at[1]], self.rows[at[2]], *at[3:])

    def _of_scores(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return the part of an array that spreads to (b, h_q, n_q, n_k)."""
        x = x[[self.batch if x.shape[0] > 1 else 0]]
        x = x[:, list(self.heads)] if x.shape[1] > 1 else x
        return x[:, :, list(self.rows)] if x.shape[2] > 1 else x

    def _allowed(self, p: Problem) -> NDArray[np.bool_]:
        mask = np.zeros((1, len(self.heads), len(self.rows), p.n_k), bool)
        bare = p.replace(bias=None, weight=None)
        rows = np.asarray(self.rows)
        for i, h in enumerate(self.heads):
            for queries, keys in p.segments(self.batch):
                at = np.nonzero((rows >= queries.start) & (rows < queries.stop))[0]
                if len(at):
                    seen = visible(bare, self.batch, h, queries, keys)
                    mask[0, i, at, keys] = seen[rows[at] - queries.start]
        return mask


def separate(variant: str, options: Collection[str] = ()) -> bool:
    """Tell whether an operator's rows, with some of its options, are defined one by one, wherever they stand."""
    v = variant_of(variant)
    places = v.places or any(v.options[n].places for n in options)
    return isinstance(v.shape, Rows) and not v.shape.together and not places


def sample_of(p: Problem, rng: np.random.Generator) -> Sample | None:
    """Return rows of a call to compare: edges of tiles, first, last and random ones; None where all are few.

    Parameters
    ----------
    p : Problem
        The call.
    rng : numpy.random.Generator
        What draws the heads and the other rows.
    """
    if p.cu_seqlens_q is not None and not variant_of(p.variant).has_lse:
        return None  # such a definition may read how many keys its sequence has
    if not separate(p.variant, p.options) or p.batch * p.heads * p.n_q * p.n_k <= WHOLE or 0 in (p.batch, p.n_q, p.n_k):
        return None
    edges = [r for e in EDGES for r in (e, p.n_q - 1 - e) if 0 <= r < p.n_q]
    some = [*edges, *rng.integers(p.n_q, size=ROWS).tolist()]
    rows = sorted(set(some[:4]) | set(rng.permutation(sorted(set(some)))[: ROWS - 4].tolist()))
    # the fewer rows, the more heads, the last of each kind among them
    group, wanted = p.heads // p.heads_kv, max(4, LINES // len(rows))
    groups = _some(rng, p.heads_kv, max(2, wanted // group))
    each = _some(rng, group, max(2, wanted // len(groups)))
    heads = tuple(g * group + i for g in groups for i in each)
    batch = int(rng.integers(1, p.batch)) if p.batch > 1 else 0  # the first hides mistakes
    gone = unused(p)
    used = [int(r) for r in rows if gone is None or not gone[0][batch, r]]
    return Sample(batch, tuple(groups), heads, tuple(used)) if used else None


def _some(rng: np.random.Generator, n: int, most: int) -> list[int]:
    """Return some of n places, the last one among them."""
    return sorted({n - 1, *rng.permutation(n - 1)[: most - 1].tolist()})
