"""Attention on NVIDIA GPUs by kernels of our own, for CuPy, PyTorch and JAX arrays."""

from .attention import attention
from .backward import attention_backward
from .cache import attention_with_cache
from .delta_backward import gated_delta_backward
from .kernel import Plan
from .lowered import lowered
from .plan import IMPLS, plan
from .recurrence import gated_delta, lightning
from .recurrence_backward import lightning_backward

__all__ = [
    "IMPLS",
    "Plan",
    "attention",
    "attention_backward",
    "attention_with_cache",
    "gated_delta",
    "gated_delta_backward",
    "lightning",
    "lightning_backward",
    "lowered",
    "plan",
]
