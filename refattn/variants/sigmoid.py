"""Sigmoid attention: each weight on its own, no denominator."""

from __future__ import annotations

from typing import Any

import numpy as np

from .variant import COMMON_BUGS, COMMON_FAMILIES, COMMON_LAWS, Option, Sensitivity, Variant, finite

__all__ = ["SIGMOID"]


def attention(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    """Define sigmoid attention of one head."""
    s = q @ k.T * o.scale
    if o.bias is not None:
        s = s + o.bias
    s = s - o.length.log() if o.offset is None else s + o.offset
    return s.sigmoid(where=o.allowed) @ v, None


def sensitivity(q: np.ndarray, k: np.ndarray, o: Any) -> Sensitivity:
    """Return weights, slopes and rounding magnitudes in float64."""
    raw = q @ k.T * o.scale
    bias = 0.0 if o.bias is None else o.bias
    offset = -np.log(np.maximum(o.length, 1)) if o.offset is None else o.offset
    s = raw + bias + offset
    e = np.exp(-np.abs(s))
    w = np.where(o.allowed, np.where(s >= 0, 1.0, e) / (1 + e), 0.0)
    slope = np.where(o.allowed, e / (1 + e) ** 2, 0.0)
    roundings = np.abs(raw) + np.abs(raw + bias) + np.abs(offset) + 2 * np.abs(s)
    return Sensitivity(
        w, slope, np.abs(q) @ np.abs(k).T * abs(o.scale), np.where(o.allowed, roundings, 0.0), None, relative=3.0
    )


SIGMOID = Variant(
    name="sigmoid",
    define=attention,
    sensitivity=sensitivity,
    formula="out_i = sum_j sigmoid(scale·q_i·k_j + bias_ij + offset) v_j",
    unit="u · sum_j w_ij |v_jc|",
    source="Ramapuram et al., arXiv 2409.04431v2, section 2; the offset -log n from its best practices (abstract and "
    "summary read).",
    uses=frozenset({"causal", "window", "bias", "allowed"}),
    options={"offset": Option(None, "added to every score; None is -log(n_k)", finite)},
    laws=COMMON_LAWS,
    bugs=(*COMMON_BUGS, "bias_ignored"),
    families=COMMON_FAMILIES,
    contract=(
        "A row without any key gives out 0.",
        "offset None is the exact -log(n_k), n_k the length of the key sequence, masked keys counted.",
        "A key that is not allowed is never read.",
    ),
)
