"""What kernels get wrong about the keys that a row sees, where a call says it beside `causal`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...problem import Problem

__all__ = ["MASK_BUGS"]


def _sibling(p: Problem) -> Problem:
    """Let a node of a tree of guesses see the one before it, which may be its sibling."""
    if p.allowed is None or p.causal != "bottom_right" or p.cu_seqlens_q is not None or p.block_table is not None:
        return p
    before = np.eye(p.n_q, p.n_k, p.n_k - p.n_q - 1, dtype=bool)
    return p.replace(allowed=p.allowed | before)


def _boundary(p: Problem) -> Problem:
    """Take the last token of each packed document for the first of the next."""
    if p.cu_seqlens_q is None or p.lengths_q is not None or p.lengths_k is not None:
        return p
    found = {n: getattr(p, n).copy() for n in ("cu_seqlens_q", "cu_seqlens_k")}
    for starts in found.values():
        starts[1:-1] = np.maximum(starts[1:-1], 1) - 1
    return p.replace(**found)


def _window_clamped(p: Problem) -> Problem:
    """Take a side of a window below 0 for 0: a row sees its own key."""
    if p.window is None:
        return p
    left, right = (None if side is None else max(side, 0) for side in p.window)
    return p.replace(window=(left, right))


def _offset_of_causal(p: Problem) -> Problem:
    """Move the diagonal by the offset only where the call is causal."""
    return p if p.causal is not None else p.replace(offset=None)


MASK_BUGS: dict[str, Callable[[Problem], Problem]] = {
    "tree_sibling_seen": _sibling,
    "document_boundary_off_by_one": _boundary,
    "window_side_clamped": _window_clamped,
    "offset_of_causal_alone": _offset_of_causal,
}
"""An edit of the problem that a right kernel is given, by name."""
