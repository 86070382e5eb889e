"""Softmax attention (Vaswani et al. 2017), with every option that kernels in use have."""

from __future__ import annotations

from typing import Any

import numpy as np

from .variant import COMMON_BUGS, COMMON_FAMILIES, COMMON_LAWS, Sensitivity, Variant

__all__ = ["SOFTMAX", "scores"]


def scores(q: Any, k: Any, o: Any) -> Any:
    """Return the scores: products, scale, softcap, bias, in this order."""
    s = q @ k.T * o.scale
    if o.softcap is not None:
        s = (s / o.softcap).tanh() * o.softcap
    return s if o.bias is None else s + o.bias


def attention(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    """Define softmax attention of one head."""
    s = scores(q, k, o)
    m = s.shift(o.allowed, o.sink)  # any number per row will do: it cancels
    p = (s - m).exp(where=o.allowed)
    z = p.sum() if o.sink is None else p.sum() + (o.sink - m).exp()
    return (p @ v) / z, m + z.log()


def sensitivity(q: np.ndarray, k: np.ndarray, o: Any) -> Sensitivity:
    """Return weights, slopes and rounding magnitudes in float64."""
    raw = q @ k.T * o.scale
    products = np.abs(q) @ np.abs(k).T * abs(o.scale)
    roundings = np.abs(raw)
    s = raw
    if o.softcap is not None:
        s = np.tanh(raw / o.softcap) * o.softcap
        products = products * (1 - (s / o.softcap) ** 2)
        roundings = (roundings * (1 - (s / o.softcap) ** 2)) + 4 * np.abs(s)  # quotient, tanh to 2 ulp, product
    if o.bias is not None:
        s = s + o.bias
        roundings = roundings + np.abs(s)
    visible = np.where(o.allowed, s, -np.inf)
    m = visible.max(1, initial=-np.inf if o.sink is None else o.sink)
    m = np.where(np.isneginf(m), 0.0, m)[:, None]
    w = np.where(o.allowed, np.exp(np.minimum(s - m, 0.0)), 0.0)
    z = w.sum(1) + (0.0 if o.sink is None else np.exp(o.sink - m[:, 0]))
    # the shift is taken in natural or base-2 units: two roundings of its size
    roundings = np.where(o.allowed, roundings + 2 * np.abs(s - m) + np.abs(s), 0.0)
    with np.errstate(divide="ignore"):
        return Sensitivity(w, w, products, roundings, z, relative=1.0, lse=m[:, 0] + np.log(z))


SOFTMAX = Variant(
    name="softmax",
    define=attention,
    sensitivity=sensitivity,
    formula="out_i = sum_j exp(s_ij) v_j / (sum_j exp(s_ij) + exp(sink)),  "
    "s_ij = softcap·tanh(scale·q_i·k_j / softcap) + bias_ij;  lse_i = log(sum_j exp(s_ij) + exp(sink))",
    unit="u · sum_j p_ij |v_jc|",
    source="Vaswani et al., arXiv 1706.03762, eq. 1; softcap as in Gemma 2 (arXiv 2408.00118, section 2); "
    "the sink logit as in StreamingLLM's softmax1 (arXiv 2309.17453, eq. 2), learnable in gpt-oss. "
    "Recalled, not read again.",
    uses=frozenset({"causal", "window", "softcap", "sink", "bias", "allowed"}),
    laws=(*COMMON_LAWS, "split_and_merge", "bias_shifted", "gradient_steps", "dk_sums", "dbias_sums"),
    bugs=(
        *COMMON_BUGS,
        "bias_ignored",
        "softcap_ignored",
        "softcap_after_bias",
        "sink_ignored",
        "lse_base_two",
        "lse_of_empty_row_zero",
        "empty_row_mean",
        "scores_clamped",
    ),
    families=(*COMMON_FAMILIES, "shifted", "extreme"),
    contract=(
        "A row without any key gives out 0 and lse -inf; a sink counts as a key without a value.",
        "A key that is not allowed, or whose bias is -inf, is never read: NaN there changes nothing.",
        "NaN or inf in a query, or in a key that a row sees, or +inf in a bias: that row's out and lse are NaN.",
        "NaN in a value that a row sees: that element is NaN; inf: it is the same inf (NaN if both signs meet).",
        "lse is the natural logarithm.",
    ),
)
