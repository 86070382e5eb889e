"""Sigmoid attention: each weight on its own, no denominator."""

from __future__ import annotations

from typing import Any

from .option import Option, finite
from .variant import COMMON_BUGS, Variant

__all__ = ["SIGMOID"]


def attention(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    """Define sigmoid attention of one head."""
    s = q @ k.T * o.scale
    if o.bias is not None:
        s = s + o.bias
    s = s - o.length.log() if o.offset is None else s + o.offset
    return s.sigmoid(where=o.allowed) @ v, None


SIGMOID = Variant(
    name="sigmoid",
    define=attention,
    formula="out_i = sum_j sigmoid(scale·q_i·k_j + bias_ij + offset) v_j",
    unit="u · sum_j w_ij |v_jc|",
    source="Ramapuram et al., arXiv 2409.04431v2, section 2; the offset -log n from its best practices (abstract and "
    "summary read).",
    uses=frozenset({"causal", "window", "bias", "allowed"}),
    options={"offset": Option(None, "added to every score; None is -log(n_k)", finite, (None, 0.0, -1.5))},
    positive=True,
    cases={"offset-of-scores": {"options": {"offset": -1.5}}},
    bugs=(*COMMON_BUGS, "bias_ignored"),
    contract=(
        "A row without any key gives out 0.",
        "offset None is the exact -log(n_k), n_k the length of the key sequence, masked keys counted.",
        "A key that is not allowed is never read.",
    ),
)
