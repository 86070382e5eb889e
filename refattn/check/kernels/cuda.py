"""Kernels on an NVIDIA GPU: PyTorch's backends and flex_attention, JAX's cuDNN, and a Triton kernel of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import dtype_name, to_kind, to_numpy
from ...errors import UnsupportedProblem
from ...problem import VARIANT, Problem
from ...variants import variant_of
from .gradients import by_name, with_gradients
from .torch_sdpa import additive, attention_mask, sdpa

__all__ = [
    "cudnn",
    "efficient",
    "flash",
    "flex",
    "jax_cudnn",
    "math",
    "ours",
    "ours_decode",
    "ours_high",
    "ours_invariant",
    "ours_latent",
    "ours_mma",
    "ours_mma_high",
    "ours_simt",
    "recurrent",
    "triton",
]

NAMES = ("query", "key", "value")


class _Ours:
    """A kernel of refattn.gpu: out and lse, and its gradients."""

    def __init__(self, accuracy: str = "fast", impl: str | None = None, batch_invariant: bool = False) -> None:
        self.__name__, self.accuracy, self.impl = f"ours_{impl or accuracy}", accuracy, impl
        self.batch_invariant = batch_invariant

    def __call__(self, p: Problem) -> Any:
        from ...gpu import attention

        options = self._options(p)
        options |= {"accuracy": self.accuracy, "impl": self.impl, "batch_invariant": self.batch_invariant}
        return attention(p.query, p.key, p.value, **options, return_lse=True)

    def gradients(self, p: Problem, dout: Any) -> dict[str, Any]:
        """Return the gradients of all that is there, from out and lse computed before."""
        from ...gpu import attention_backward

        out, lse = self(p)
        return attention_backward(p.query, p.key, p.value, out, lse, dout, **self._options(p), impl=self.impl)

    @staticmethod
    def _options(p: Problem) -> dict[str, Any]:
        names = ("scale", "causal", "window", "softcap", "sink", "bias", "allowed")
        packed = None if p.cu_seqlens_q is None else (p.cu_seqlens_q, p.cu_seqlens_k)
        return {n: getattr(p, n) for n in names} | {"cu_seqlens": packed, "block_mask": _block_mask(p)}


def _block_mask(p: Problem) -> Any:
    """Return an operator's blocks as refattn.gpu takes them."""
    if p.variant not in (VARIANT, "block_sparse"):
        raise UnsupportedProblem(f"takes {VARIANT} and block_sparse, got {p.variant}")
    o = variant_of(p.variant).settings(p)
    if o.get("blocks") is None:
        return None
    mask = np.array(o["blocks"], bool)
    return to_kind(mask.reshape(1, -1, *mask.shape[-2:]), p.kind, "cuda"), o["block_q"], o["block_k"]


ours, ours_high = _Ours(), _Ours("high")
ours_decode = _Ours(impl="decode")
ours_invariant = _Ours(batch_invariant=True)
ours_mma, ours_mma_high, ours_simt = _Ours(impl="mma"), _Ours("high", "mma"), _Ours(impl="simt")


def ours_latent(p: Problem) -> Any:
    """Return out and lse; values that are the keys' first columns are passed as a view of them, as a latent is."""
    import torch

    first = p.key[..., : p.d_v]
    return ours(p.replace(value=first) if p.d_v <= p.d_k and torch.equal(first, p.value) else p)


def _back(p: Problem, dout: Any, dstate_out: Any = None) -> dict[str, Any]:
    """Return the gradients of a recurrence by refattn.gpu."""
    from ...gpu import gated_delta_backward, lightning_backward

    more = {"scale": p.scale, "state": p.state, "cu_seqlens": p.cu_seqlens_q}
    if p.variant == "gated_delta":
        more |= {"alpha": p.alpha, "beta": p.beta, "dstate_out": dstate_out}
        return gated_delta_backward(p.query, p.key, p.value, dout, **more)
    rates = variant_of(p.variant).settings(p)["decay"]
    found = lightning_backward(p.query, p.key, p.value, dout, decay=rates, dstate_out=dstate_out, **more)
    return {n: x for n, x in zip(("dq", "dk", "dv", "dstate"), found, strict=True) if x is not None}


@with_gradients(_back)
def recurrent(p: Problem) -> Any:
    """Return out and the last state of a recurrence by refattn.gpu."""
    from ...gpu import gated_delta, lightning

    more = {"scale": p.scale, "state": p.state, "cu_seqlens": p.cu_seqlens_q}
    if p.variant == "lightning":
        rates = variant_of(p.variant).settings(p)["decay"]
        return lightning(p.query, p.key, p.value, decay=rates, **more)
    return gated_delta(p.query, p.key, p.value, alpha=p.alpha, beta=p.beta, **more)


def _there(problem: Problem) -> Problem:
    """Return a call with PyTorch's arrays on the GPU; those that are there keep their layout."""
    return problem if problem.kind == "torch" else problem.to("torch", "cuda")


class _Torch:
    """A kernel of PyTorch's: what it gives, its lse where it has one, and its gradients."""

    def __init__(self, name: str, out: Callable[[Problem], Any], lse: Callable[[Any], Any] | None = None) -> None:
        self.__name__, self.out, self.lse = name, out, lse

    def __call__(self, problem: Problem) -> Any:
        p = _there(problem)
        with _having(self.__name__):
            out = self.out(p)
            return out if self.lse is None or p.heads != p.heads_kv else (out, self.lse(p))

    def gradients(self, problem: Problem, dout: Any) -> dict[str, Any]:
        """Return dq, dk and dv by autograd, as arrays of the call's library."""
        import torch

        p = _there(problem)
        leaves = {n: getattr(p, n).detach().requires_grad_() for n in NAMES}
        with _having(self.__name__):
            out = self.out(p.replace(**leaves))
        dout = dout if problem.kind == "torch" else to_kind(dout, "torch", "cuda")
        found = torch.autograd.grad(out, list(leaves.values()), dout)
        if problem.kind == "torch":
            return dict(zip(("dq", "dk", "dv"), found, strict=True))
        return by_name(problem, map(to_numpy, found))


@contextmanager
def _having(name: str) -> Iterator[None]:
    """Say of what PyTorch has no kernel for that it is unsupported."""
    try:
        yield
    except RuntimeError as e:
        if any(x in str(e) for x in ("No available kernel", "No viable backend", "head_size must be a multiple")):
            raise UnsupportedProblem(f"{name}: PyTorch has no kernel for this call") from e
        raise


def _backend(name: str) -> Callable[[Problem], Any]:
    return lambda p: sdpa(p, name)


def _efficient_out(p: Problem) -> Any:
    if p.bias is not None and p.bias.dtype != p.query.dtype:
        kinds = f"got {dtype_name(p.bias)} beside {p.dtype}"
        raise UnsupportedProblem(f"bias: PyTorch's memory-efficient kernel takes one of query's type, {kinds}")
    return sdpa(p, "EFFICIENT_ATTENTION")


def _flash_lse(p: Any) -> Any:
    import torch

    call = torch.ops.aten._scaled_dot_product_flash_attention
    return call(p.query, p.key, p.value, 0.0, p.causal is not None, False, scale=p.scale)[1]


def _efficient_lse(p: Any) -> Any:
    import torch

    mask = additive(attention_mask(p), p.query)
    if mask is not None:  # its rows must start at multiples of 16 bytes
        wide = torch.zeros((p.batch, p.heads, p.n_q, -(-p.n_k // 8) * 8), dtype=mask.dtype, device="cuda")
        wide[..., : p.n_k] = mask
        mask = wide[..., : p.n_k]
    call = torch.ops.aten._scaled_dot_product_efficient_attention
    lse = call(p.query, p.key, p.value, mask, True, 0.0, p.causal is not None, scale=p.scale)[1]
    return lse[:, :, : p.n_q].contiguous()  # it is padded


flash = _Torch("flash", _backend("FLASH_ATTENTION"), _flash_lse)
efficient = _Torch("efficient", _efficient_out, _efficient_lse)
cudnn = _Torch("cudnn", _backend("CUDNN_ATTENTION"))
math = _Torch("math", _backend("MATH"))


def _flex_out(p: Problem) -> Any:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if 0 in (p.n_q, p.n_k):
        raise UnsupportedProblem("seq: flex_attention refuses an axis of length 0")
    # no function that is compiled may hold the call: a call that notes what is read of it ends in a RecursionError
    corner, causal, cap = p.n_k - p.n_q if p.causal == "bottom_right" else 0, p.causal is not None, p.softcap
    allowed = None if p.allowed is None else p.allowed.expand(p.batch, p.heads, p.n_q, p.n_k)
    bias = None if p.bias is None else p.bias.expand(p.batch, p.heads, p.n_q, p.n_k)

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        yes = j - i - corner <= 0 if causal else j >= 0
        return yes if allowed is None else yes & allowed[b, h, i, j]

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if cap is not None:
            s = torch.tanh(s / cap) * cap
        return s if bias is None else s + bias[b, h, i, j]

    torch._dynamo.reset()
    blocks = create_block_mask(seen, p.batch, p.heads, p.n_q, p.n_k, device="cuda")
    call = torch.compile(flex_attention, dynamic=False)
    return call(
        p.query, p.key, p.value, score_mod=score, block_mask=blocks, scale=p.scale, enable_gqa=p.heads != p.heads_kv
    )


flex = _Torch("flex", _flex_out)


def _jax_call(problem: Problem) -> tuple[Any, tuple[Any, ...]]:
    import jax

    p = problem.to("jax")
    given = tuple(getattr(p, n).swapaxes(1, 2) for n in NAMES)

    def call(q: Any, k: Any, v: Any) -> Any:
        out = jax.nn.dot_product_attention(
            q, k, v, bias=p.bias, mask=p.allowed, scale=p.scale, is_causal=p.causal is not None, implementation="cudnn"
        )
        return out.swapaxes(1, 2)

    return call, given


def _supported(call: Callable[[], Any]) -> Any:
    """Call JAX; what it says it cannot do is unsupported."""
    try:
        return call()
    except (NotImplementedError, ValueError) as e:
        raise UnsupportedProblem(f"cudnn: {str(e).splitlines()[0]}") from e


class _JaxCudnn:
    """JAX's dot_product_attention through cuDNN."""

    __name__ = "jax_cudnn"

    def __call__(self, problem: Problem) -> Any:
        call, given = _jax_call(problem)
        return _supported(lambda: call(*given))

    def gradients(self, problem: Problem, dout: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Return dq, dk and dv by jax.vjp."""
        import jax

        call, given = _jax_call(problem)
        found = _supported(lambda: jax.vjp(call, *given)[1](to_kind(dout, "jax")))
        return by_name(problem, (to_numpy(x.swapaxes(1, 2)) for x in found))


jax_cudnn = _JaxCudnn()


def triton(problem: Problem) -> Any:
    """Return what a plain Triton forward kernel gives (:mod:`.triton_forward`), and its lse."""
    from .triton_forward import forward

    p = _there(problem)
    if 0 in (p.n_q, p.n_k):
        raise UnsupportedProblem("seq: an axis of length 0")
    group = p.heads // p.heads_kv
    scale = float(p.scale if p.scale is not None else 1 / np.sqrt(p.d_k))
    call: Any = forward
    return call(p.query, p.key, p.value, scale, p.causal, group)
