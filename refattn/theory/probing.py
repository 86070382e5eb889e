"""Efficient probing: a learned query's cross-attention needs no matrices for queries and keys."""

from __future__ import annotations

from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from .claim import Claim, Evidence, needs
from .fields import balls, disjoint, each, precise, rationals

__all__ = ["CLAIMS"]

Array = NDArray[Any]
D = 6


def _softmax(s: Array) -> Array:
    w = each(lambda a: a.exp(), s)
    return np.asarray(w / w.sum(1)[:, None])


def _compared(heads: int, factor: Any, what: str) -> Evidence:
    """Compare the weights of a query's heads, (heads, n), with those of folded queries times a factor."""
    needs(heads > 0 and D % heads == 0, f"heads that divide D = {D}, got {heads}")
    x, u, b_q, b_k = (balls(rationals(i, *shape)) for i, shape in enumerate(((5, D), (D,), (D,), (D,))))
    w_q, w_k = (balls(rationals(i, D, D)) for i in (4, 5))
    query, keys, width = w_q @ u + b_q, x @ w_k.T + b_k, D // heads
    parts = [slice(m * width, (m + 1) * width) for m in range(heads)]
    due = _softmax(np.array([keys[:, p] @ query[p] for p in parts]) / flint.arb(width).sqrt())
    folded = np.array([factor * (query[p] @ w_k[p]) for p in parts])
    found = _softmax(folded @ x.T / flint.arb(D).sqrt())
    return Evidence(disjoint(found, due), 0, what)


@precise()
def folding(heads: int = 3) -> Evidence:
    """Weights of a query's heads, biases and all, against those of sqrt(heads) W_k[m]ᵀ (W_q u + b_q)[m], in balls."""
    return _compared(heads, flint.arb(max(heads, 0)).sqrt(), "weights that differ from those of the folded queries")


@precise()
def without_root() -> Evidence:
    """Folded queries without sqrt(heads), which is 1 for one head alone."""
    return _compared(3, flint.arb(1), "weights that differ from those of queries folded without sqrt(heads)")


CLAIMS = [
    Claim(
        "probing-folding",
        "Cross-attention of H heads from one learned query has the weights of H queries of length D: H·D numbers "
        "do the work of two matrices and a query; a bias of keys changes no weight",
        "github billpsomas/efficient-probing, whose code was read; the identity is shown here",
        folding,
        without_root,
        ("heads divide D",),
    ),
]
