"""Functions that no package installs, as kernels: Triton's tutorial, and vLLM's reference for its paged kernels.

Both stand in their repositories' files, ``python/tutorials/06-fused-attention.py`` and ``ref_paged_attn`` of
``tests/kernels/attention``; copy the file, and name a kernel that is made here: ``refattn check my.py:kernel``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import UnsupportedProblem, expect
from ...problem import Problem
from ..call import Function
from ..model import Capabilities, materialised
from .flash_attn import gradients_of, rows
from .packages import on_gpu

__all__ = ["of_paged_reference", "of_tutorial"]

TUTORIAL = frozenset({"causal_bottom_right", "causal_top_left", "scale"})
PAGED = frozenset({"causal_bottom_right", "window", "softcap", "grouped_heads", "scale", "lengths_differ", "lengths_k"})
PAGED |= {"paged_nhd", "variable_lengths"}


def of_tutorial(attention: Callable[..., Any]) -> Function:
    """Return Triton's fused attention of the tutorial, ``attention(q, k, v, causal, sm_scale) -> o``, as a kernel.

    It takes float16 tensors (b, h, n, d) side by side, as many keys as queries, a multiple of 128, as many key heads
    as query heads, and widths 32, 64, 128 and 256; P is float16. Gradients are autograd's.

    Parameters
    ----------
    attention : callable
        The tutorial's.

    Raises
    ------
    InvalidInput
        It is no function.
    """
    expect(callable(attention), "attention", attention, "the tutorial's function attention")

    def triton_tutorial(p: Problem) -> Any:
        triton_tutorial.capabilities.require(p)  # type: ignore[attr-defined]
        scale = float(p.d_k**-0.5 if p.scale is None else p.scale)
        return attention(*(x.contiguous() for x in (p.query, p.key, p.value)), p.causal is not None, scale)

    triton_tutorial.capabilities = Capabilities(  # type: ignore[attr-defined]
        frozenset({"float16"}),
        TUTORIAL,
        gradients=frozenset({"dq", "dk", "dv"}),
        arrays="torch",
        device="cuda",
        refuses=True,
        deterministic=False,
        head_dims=frozenset({32, 64, 128, 256}),
        seq_multiple=128,
    )
    triton_tutorial.model = on_gpu  # type: ignore[attr-defined]
    triton_tutorial.gradients = gradients_of(triton_tutorial)  # type: ignore[attr-defined]
    return triton_tutorial


def of_paged_reference(reference: Callable[..., Any], device: str = "cpu") -> Function:
    """Return vLLM's ``ref_paged_attn`` as a kernel.

    ``ref_paged_attn(query, key_cache, value_cache, query_lens, kv_lens, block_tables, scale, sliding_window=None,
    soft_cap=None)`` takes rows (tokens, h, d) and pages (pages, page, h_kv, d). It is causal always, to the bottom
    right; a sliding window of w is a left side of w - 1; S and P are kept in the tensors' type. It multiplies the
    queries that it gets by the scale where they lie: here it gets a copy.

    Parameters
    ----------
    reference : callable
        vLLM's.
    device : str
        Where its tensors are.

    Raises
    ------
    InvalidInput
        It is no function.
    """
    expect(callable(reference), "reference", reference, "vLLM's function ref_paged_attn")

    def vllm_reference(p: Problem) -> Any:
        import torch

        vllm_reference.capabilities.require(p)  # type: ignore[attr-defined]
        if p.block_table is None or p.causal is None:
            raise UnsupportedProblem("block_table, causal: vLLM's reference takes causal calls of keys in pages")
        left, right = p.window or (None, None)
        if right is not None and right < 0:
            raise UnsupportedProblem("window: vLLM's reference has a left side alone")
        segments = [x for b in range(p.batch) for x in p.segments(b)]
        lens = [[x.stop - x.start for x in which] for which in zip(*segments, strict=True)]
        query = rows(p.query).reshape(-1, p.heads, p.d_k).clone()
        window = None if left is None else left + 1
        scale = float(p.d_k**-0.5 if p.scale is None else p.scale)
        out = reference(query, p.key, p.value, *lens, p.block_table, scale, window, p.softcap)
        if p.cu_seqlens_q is not None:
            return out.transpose(0, 1)[None]
        return rows(torch.as_tensor(out).reshape(p.batch, p.n_q, p.heads, p.d_v))

    vllm_reference.capabilities = Capabilities(  # type: ignore[attr-defined]
        frozenset({"float32", "float16", "bfloat16"}), PAGED, arrays="torch", device=device, refuses=True
    )
    vllm_reference.model = materialised  # type: ignore[attr-defined]
    return vllm_reference
