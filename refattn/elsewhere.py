"""What other libraries call an option of Problem, so that a message can name ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

__all__ = ["ELSEWHERE", "answered", "hinted"]

_DIAGONAL = "causal='bottom_right' (the last row sees all keys) or 'top_left' (PyTorch's is_causal)"
_MASK = "allowed (booleans, True takes part) or bias (numbers that are added to the scores)"
_SCALE = "scale; None is 1/sqrt(d_k)"
_GROUPS = "nothing: a query head reads the key head of its group by itself"
ELSEWHERE = {
    "is_causal": _DIAGONAL,
    "attn_mask": _MASK,
    "mask": _MASK,
    "attn_bias": "bias",
    "enable_gqa": _GROUPS,
    "num_key_value_groups": _GROUPS,
    "softmax_scale": _SCALE,
    "sm_scale": _SCALE,
    "scaling": _SCALE,
    "window_size": "window=(left, right)",
    "sliding_window": "window=(left, right)",
    "soft_cap": "softcap",
    "logits_soft_cap": "softcap",
    "s_aux": "sink",
    "sinks": "sink",
    "page_table": "block_table",
    "block_tables": "block_table",
    "key_padding_mask": "lengths_k (keys of each batch item), or allowed",
    "attention_mask": _MASK,
    "position_bias": "bias",
    "alibi": "alibi_slopes",
    "cu_seqlens": "cu_seqlens_q and cu_seqlens_k",
    "seqlens_k": "lengths_k",
    "score_mod": "bias: a term of refattn.rules.terms, or numbers",
    "mask_mod": "allowed: a rule of refattn.rules, or booleans",
    "operator": "variant",
    "momentum": "eta",
    "q": "query",
    "k": "key",
    "v": "value",
}
"""Their name, and what Problem calls it."""
C = TypeVar("C", bound=Callable[..., Any])
T = TypeVar("T")


def answered(call: C) -> C:
    """Let a function that gets another library's name of an option say its own."""
    found: C = _answering(call, call.__name__)
    return found


def hinted(made: type[T]) -> type[T]:
    """Let a class do so."""
    made.__init__ = _answering(made.__init__, made.__name__)  # type: ignore[method-assign]
    return made


def _answering(call: Any, whose: str) -> Any:
    @wraps(call)
    def answering(*args: Any, **options: Any) -> Any:
        for name in options:
            if name in ELSEWHERE:
                raise TypeError(f"{name}: {whose} takes {ELSEWHERE[name]}")
        return call(*args, **options)

    return answering
