"""FlashAttention-3 (the package fa3-fwd) as a peer of the GPU's benchmarks, where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

__all__ = ["FA3", "flash3"]

FA3 = "FlashAttention-3"


def flash3(q: Any, k: Any, v: Any, name: str = FA3, **more: Any) -> dict[str, Callable[[], Any]]:
    """Return a call of it on tensors (b, h, s, d), by its name; they are laid out before as it likes them."""
    if importlib.util.find_spec("fa3_fwd_interface") is None:
        return {}
    call = importlib.import_module("fa3_fwd_interface").flash_attn_func
    tensors = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    return {name: lambda: call(*tensors, **more).transpose(1, 2)}
