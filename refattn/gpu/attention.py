"""Softmax attention on a GPU: arrays of CuPy, PyTorch or JAX in, the same kind out, on the caller's stream."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedProblem
from .forward import forward
from .request import refuse_term
from .views import traced

__all__ = ["attention"]


def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    scale: float | None = None,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sink: Any = None,
    bias: Any = None,
    allowed: Any = None,
    block_mask: tuple[Any, ...] | None = None,
    cu_seqlens: tuple[Any, Any] | None = None,
    return_lse: bool = False,
    accuracy: str = "fast",
    impl: str | None = None,
    batch_invariant: bool = False,
) -> Any:
    """Return softmax attention, computed on the GPU that the arrays are on.

    Gradients flow through PyTorch's graph, also under ``torch.compile``, and through ``jax.grad``, also under
    ``jax.jit``; of CuPy's arrays :func:`refattn.gpu.attention_backward` gives them. ``jax.vmap`` is an error of JAX's:
    put its axis into the batch.

    Nothing is waited for: the kernels are queued on the caller's current stream (CuPy's for JAX arrays). Inputs are not
    copied, but for a boolean mask, which is packed to bits, and for sinks and offsets of another type.

    Parameters
    ----------
    query : (b, h_q, n_q, d_k) array of CuPy, PyTorch or JAX
        float16, bfloat16, float32 or float64; d_k, d_v from 1 to 256, or with the kernel "latent" to 576 and 512; any
        strides with a contiguous last axis.
    key : (b, h_kv, n_k, d_k) array
        Of query's library, type and device; h_kv divides h_q.
    value : (b, h_kv, n_k, d_v) array
        Likewise. Values that are a view of the keys' first columns, as of a latent, are read once.
    scale, causal, window, softcap, sink, bias, allowed
        As in :class:`refattn.Problem`; the bias of query's type or float32.
    block_mask : (blocks, block_q, block_k) or (blocks, block_q, block_k, bits), optional
        A boolean array (b or 1, h_q or 1, ceil(n_q / block_q), ceil(n_k / block_k)), True where a block of scores is
        computed. Hidden tiles are never loaded. With ``bits``, (tiles, block_q, block_k / 32) int32 and contiguous,
        ``blocks`` is int32: 0 for a hidden block, 1 for a whole one, 2 + i for one of which each row sees the keys of
        its bits in tile i, key j in bit j % 32 of word j // 32. Their values are not checked. It is for 16-bit types,
        and has no gradients.
    cu_seqlens : (cu_seqlens_q, cu_seqlens_k), optional
        Integer arrays of m + 1 offsets of m sequences packed along the sequence axes, as in :class:`refattn.Problem`.
        Their values are not checked, which would wait for the GPU; nothing outside the arrays is read.
    return_lse : bool
        Also return the log-sum-exp, (b, h_q, n_q) in float32 (float64 for float64): -inf for a row without keys, whose
        out is 0.
    accuracy : str
        "fast" rounds P to the input's type; "high" keeps it in two parts, so that the error is the output's rounding.
    impl : str, optional
        A kernel out of ``refattn.gpu.IMPLS``; by default the one that :func:`refattn.gpu.plan` chooses.
    batch_invariant : bool
        Give each row the same bits whatever else is in the call: alone or among other rows, heads and batches, in a
        prefill, in chunks of it, or as a single query, for the same options and layout. "decode" is not used then.

    Raises
    ------
    InvalidProblem
        Shapes, types or devices that do not fit together.
    UnsupportedProblem
        No kernel computes it; raised before any launch.
    """
    refuse_term(bias)
    options = {"scale": scale, "causal": causal, "window": window, "softcap": softcap, "sink": sink, "bias": bias}
    options |= {"allowed": allowed, "block_mask": block_mask, "cu_seqlens": cu_seqlens}
    if hasattr(query, "requires_grad"):  # a tensor of PyTorch: its graph may want a gradient, or only shapes
        from . import torch_operators

        if torch_operators.needed(query, key, value, sink, bias):
            _without_bits(block_mask)
            found = torch_operators.attention(query, key, value, options, accuracy, impl, batch_invariant)
            return found if return_lse else found[0]
    elif traced(query, key, value, sink, bias, allowed, block_mask, cu_seqlens):
        from . import jax_operators

        _without_bits(block_mask)
        found = jax_operators.attention(query, key, value, options, accuracy, impl, batch_invariant)
        return found if return_lse else found[0]
    out, lse = forward(query, key, value, accuracy=accuracy, impl=impl, batch_invariant=batch_invariant, **options)
    return (out, lse) if return_lse else out


def _without_bits(block_mask: Any) -> None:
    """Refuse bits of blocks where a graph is made of a call."""
    if isinstance(block_mask, tuple | list) and len(block_mask) == 4:
        raise UnsupportedProblem(
            "block_mask: has no gradients with bits of blocks, and is not compiled; pass allowed in their place"
        )
