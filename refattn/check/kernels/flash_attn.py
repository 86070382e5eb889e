"""FlashAttention 2, 3 and 4, and vLLM's function of the first two.

Their layout is (batch, seq, heads, dim), or (rows of all sequences, heads, dim) with offsets; caches are NHD. The
causal diagonal meets the bottom right corner, a window's side of -1 is none, both sides include their end, and `causal`
stands for a right side of 0. lse is natural: (batch, heads, seq), or (heads, rows) of packed sequences.
"""

from __future__ import annotations

import importlib
from typing import Any

from ...errors import UnsupportedProblem
from ...pages import PAGES
from ...problem import Problem

__all__ = ["fa3_forward", "flash_2", "flash_3", "flash_4", "vllm_flash"]

NAMES = ("query", "key", "value")


def gradients_of(run: Any) -> Any:
    """Return the gradients of a kernel by autograd: dq, dk and dv."""

    def gradients(p: Problem, dout: Any) -> dict[str, Any]:
        import torch

        if any(getattr(p, n) is not None for n in (*PAGES, "lengths_q", "lengths_k")):
            raise UnsupportedProblem("gradients: its function for caches and lengths has none")
        leaves = {n: getattr(p, n).detach().requires_grad_() for n in NAMES}
        with torch.enable_grad():
            out = run(p.replace(**leaves))
        found = torch.autograd.grad(out[0] if isinstance(out, tuple) else out, list(leaves.values()), dout)
        return dict(zip(("dq", "dk", "dv"), found, strict=True))

    return gradients


def rows(x: Any) -> Any:
    """Return (b, h, n, d) as (b, n, h, d), and back."""
    return x.transpose(1, 2)


def _sides(p: Problem) -> tuple[int, int]:
    left, right = p.window or (None, None)
    return -1 if left is None else left, -1 if right is None else right


def _plain(p: Problem) -> dict[str, Any]:
    """Return what all of its functions take."""
    causal, (left, right) = p.causal is not None, _sides(p)
    if causal and right >= 0:
        right = 0  # a wider right side beside causal means nothing
    return {"softmax_scale": p.scale, "causal": causal, "window_size": (left, right), "softcap": p.softcap or 0.0}


def _packed(p: Problem) -> tuple[list[Any], dict[str, Any]]:
    """Return packed queries, keys and values, (rows, heads, dim), and the offsets and longest lengths."""
    tensors = [x[0].transpose(0, 1) for x in (p.query, p.key, p.value)]
    return tensors, _offsets(p.cu_seqlens_q, "q") | _offsets(p.cu_seqlens_k, "k")


def _offsets(x: Any, axis: str) -> dict[str, Any]:
    starts = x.int()
    return {f"cu_seqlens_{axis}": starts, f"max_seqlen_{axis}": int((starts[1:] - starts[:-1]).max())}


def _unpacked(out: Any, lse: Any) -> tuple[Any, Any]:
    return out.transpose(0, 1)[None], lse[None]


def _used(p: Problem) -> Any:
    """Return how many keys of each item's cache are there before the call writes."""
    import torch

    many = p.batch if p.cu_seqlens_q is None else p.cu_seqlens_q.shape[0] - 1
    if p.lengths_k is None:
        whole = torch.full((many,), p.room, dtype=torch.int32, device=p.query.device)
    else:
        whole = p.lengths_k.int()
    return whole if p.new_key is None else whole - p.new_key.shape[2]


def _cached(p: Problem, call: Any, table: str, **more: Any) -> tuple[Any, Any]:
    """Return what a function for caches gives, whose table has this name."""
    paged = p.block_table is not None
    key, value = (x if paged else rows(x) for x in (p.key, p.value))
    new = {} if p.new_key is None else {"k": rows(p.new_key), "v": rows(p.new_value)}
    more |= {table: p.block_table.int()} if paged else {}
    found = call(rows(p.query), key, value, **new, cache_seqlens=_used(p), return_softmax_lse=True, **_plain(p), **more)
    return rows(found[0]), found[1]


def flash_2(p: Problem) -> Any:
    """Return what FlashAttention 2 gives."""
    flash_attn = importlib.import_module("flash_attn")
    slopes = {"alibi_slopes": None if p.alibi_slopes is None else p.alibi_slopes.float()}
    if p.block_table is not None or p.lengths_k is not None:
        if p.cu_seqlens_q is not None:
            raise UnsupportedProblem("cu_seqlens_q: flash_attn_with_kvcache takes no packed queries")
        return _cached(p, flash_attn.flash_attn_with_kvcache, "block_table", **slopes)
    if p.cu_seqlens_q is not None:
        tensors, where = _packed(p)
        call = flash_attn.flash_attn_varlen_func
        return _unpacked(*call(*tensors, **where, **_plain(p), **slopes, return_attn_probs=True)[:2])
    tensors = [rows(x) for x in (p.query, p.key, p.value)]
    out, lse, _ = flash_attn.flash_attn_func(*tensors, **_plain(p), **slopes, return_attn_probs=True)
    return rows(out), lse


class _Third:
    """FlashAttention 3, under the name that its module has."""

    def __init__(self, name: str, module: str) -> None:
        self.__name__, self.module = name, module

    def __call__(self, p: Problem) -> Any:
        if p.d_k % 8 or p.d_v % 8:
            raise UnsupportedProblem(f"dim: FlashAttention 3 takes multiples of 8, got {p.d_k} and {p.d_v}")
        try:
            return self._found(p)
        except RuntimeError as e:
            if "we only support" in str(e):  # of some widths, what it is compiled for
                raise UnsupportedProblem(f"FlashAttention 3: {str(e).splitlines()[0]}") from e
            raise

    def _found(self, p: Problem) -> Any:
        package, plain = importlib.import_module(self.module), _plain(p)
        if p.cu_seqlens_q is not None and p.block_table is None:
            tensors, where = _packed(p)
            lengths = ((f"seqused_{x}", getattr(p, f"lengths_{x}")) for x in "qk")
            more = {n: x.int() for n, x in lengths if x is not None}
            return _unpacked(
                *package.flash_attn_varlen_func(*tensors, **where, **more, **plain, return_attn_probs=True)[:2]
            )
        if p.lengths_q is not None or p.cu_seqlens_q is not None:
            what = "lengths_q" if p.lengths_q is not None else "cu_seqlens_q beside a cache"
            raise UnsupportedProblem(f"{what}: only packed sequences have that here")
        if p.block_table is not None or p.lengths_k is not None:
            return _cached(p, package.flash_attn_with_kvcache, "page_table")
        tensors = [rows(x) for x in (p.query, p.key, p.value)]
        out, lse = package.flash_attn_func(*tensors, **plain, return_attn_probs=True)[:2]
        return rows(out), lse


def flash_4(p: Problem) -> Any:
    """Return what FlashAttention 4 gives (flash_attn.cute): an open side is None, lengths need no offsets."""
    package = importlib.import_module("flash_attn.cute")
    if p.d_k % 8 or p.d_v % 8:
        raise UnsupportedProblem(f"dim: FlashAttention 4 takes multiples of 8, got {p.d_k} and {p.d_v}")
    left, right = p.window or (None, None)
    if p.causal is not None:
        right = None  # a wider right side beside causal means nothing
    more: dict[str, Any] = {"softmax_scale": p.scale, "causal": p.causal is not None, "window_size": (left, right)}
    more |= {"softcap": p.softcap or 0.0, "learnable_sink": p.sink, "return_lse": True}
    if p.cu_seqlens_q is None and p.lengths_q is None and p.lengths_k is None and p.block_table is None:
        out, lse = package.flash_attn_func(*(rows(x) for x in (p.query, p.key, p.value)), **more)[:2]
        return rows(out), lse
    packed, paged = p.cu_seqlens_q is not None, p.block_table is not None
    more |= {f"seqused_{x}": n.int() for x in "qk" if (n := getattr(p, f"lengths_{x}")) is not None}
    if paged:
        more |= {"page_table": p.block_table.int(), "seqused_k": _used(p)}
    for axis in "qk" if packed and not paged else "q" if packed else "":
        more |= _offsets(getattr(p, f"cu_seqlens_{axis}"), axis)
    query = rows(p.query)[0] if packed else rows(p.query)
    key, value = (x if paged else rows(x)[0] if packed else rows(x) for x in (p.key, p.value))
    out, lse = package.flash_attn_varlen_func(query, key, value, **more)[:2]
    return _unpacked(out, lse) if packed else (rows(out), lse)


def vllm_flash(p: Problem) -> Any:
    """Return what vLLM's flash_attn_varlen_func gives: everything is packed, and pages go by `seqused_k`."""
    import torch

    if p.lengths_k is not None and p.block_table is None and p.cu_seqlens_k is not None:
        raise UnsupportedProblem("lengths_k: it takes cu_seqlens_k or seqused_k, not both")
    call = importlib.import_module("vllm.vllm_flash_attn").flash_attn_varlen_func
    where: dict[str, Any] = {}
    step = torch.arange(p.batch + 1, dtype=torch.int32, device=p.query.device)
    if p.cu_seqlens_q is not None:
        where |= _offsets(p.cu_seqlens_q, "q")
    else:
        where |= {"cu_seqlens_q": step * p.n_q, "max_seqlen_q": p.n_q}
    if p.block_table is not None:
        where |= {"seqused_k": _used(p), "block_table": p.block_table.int(), "max_seqlen_k": p.room}
    elif p.cu_seqlens_k is not None:
        where |= _offsets(p.cu_seqlens_k, "k")
    elif p.lengths_k is not None:
        raise UnsupportedProblem("lengths_k: it takes them of keys in pages")
    else:
        where |= {"cu_seqlens_k": step * p.n_k, "max_seqlen_k": p.n_k}
    query, key, value = (
        x if p.block_table is not None and i else rows(x).reshape(-1, *rows(x).shape[2:])
        for i, x in enumerate((p.query, p.key, p.value))
    )
    out, lse = call(query, key, value, **where, **_plain(p), return_softmax_lse=True)
    b, h, n = p.batch, p.heads, p.n_q
    return rows(out.reshape(b, n, h, -1)), lse.reshape(h, b, n).transpose(0, 1)


flash_3 = _Third("flash_3", "flash_attn_interface")
fa3_forward = _Third("fa3_forward", "fa3_fwd_interface")
flash_2.gradients = gradients_of(flash_2)  # type: ignore[attr-defined]
flash_4.gradients = gradients_of(flash_4)  # type: ignore[attr-defined]
flash_3.gradients = gradients_of(flash_3)  # type: ignore[attr-defined]
