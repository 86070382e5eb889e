"""Gradients of Lightning attention on a GPU: its own kernels with other roles, forwards and backwards in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

from ..arrays import kind_of
from ..errors import UnsupportedProblem
from . import recurrence
from .views import device_of, library

__all__ = ["lightning_backward"]


def lightning_backward(
    query: Any, key: Any, value: Any, dout: Any, *, decay: Sequence[float], scale: float | None = None,
    state: Any = None, cu_seqlens: Any = None,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """Return dq, dk, dv and dstate of Lightning attention, dstate None where it starts from nothing.

    With fade = exp(-decay) and S_0 the state that it starts from,

    - ``dq_i = scale (sum_(j <= i) fade^(i-j) (dout_i v_j) k_j + fade^(i+1) dout_i S_0^T)``: the recurrence itself,
    - ``dk_j = scale sum_(i >= j) fade^(i-j) (v_j dout_i) q_i``: backwards in time, and so
    - ``dv_j = scale sum_(i >= j) fade^(i-j) (k_j q_i) dout_i``, whose last state gives dstate.

    Parameters
    ----------
    query, key, value : (b, h, n, d_k), (b, h, n, d_k) and (b, h, n, d_v) arrays
        As :func:`refattn.gpu.lightning` takes them, with as many key heads as query heads, d_v up to 128.
    dout : (b, h, n, d_v) array
        The gradient by out, of out's type. None arrives at the last state.
    decay, scale, state, cu_seqlens
        As they were given forward.

    Raises
    ------
    InvalidProblem
        Shapes, types or devices that do not fit together.
    UnsupportedProblem
        What the kernels do not take, grouped heads among it.

    Notes
    -----
    Derived from the recurrence; that it is three recurrences again is in Qin et al., Lightning Attention-2, arXiv
    2401.04658, recalled.
    """
    _takes(query, value)
    options = {"decay": tuple(map(float, decay))}

    def run(q: Any, k: Any, v: Any, start: Any, cu: Any, back: bool) -> tuple[Any, Any]:
        return recurrence.run("lightning", {"query": q, "key": k, "value": v}, scale, start, cu, options, back)

    transposed = None if state is None else state.swapaxes(2, 3)
    dq, _ = run(dout, value, key, transposed, cu_seqlens, False)
    cu = None if cu_seqlens is None else query.shape[2] - _turned(cu_seqlens)
    dk, _ = run(value, dout, query, None, cu, True)
    dv, last = run(key, query, dout, None, cu, True)
    if state is None:
        return dq, dk, dv, None
    last = last if cu is None else _turned(last)
    by = [math.exp(-x) * (1.0 if scale is None else float(scale)) for x in decay]
    return dq, dk, dv, last * _numbers(last, by)[:, None, None]


def _takes(query: Any, value: Any) -> None:
    if query.shape[1] != value.shape[1]:
        raise UnsupportedProblem(
            f"gpu: gradients of lightning take as many key heads as query heads, got {value.shape[1]} and "
            f"{query.shape[1]}; repeat the key heads"
        )
    if value.shape[3] > recurrence.WIDTHS[-1]:
        raise UnsupportedProblem(
            f"gpu: gradients of lightning take values of up to {recurrence.WIDTHS[-1]} columns, got {value.shape[3]}"
        )


def _turned(x: Any) -> Any:
    return x.flip(0) if kind_of(x) == "torch" else x[::-1]


def _numbers(like: Any, x: list[float]) -> Any:
    if kind_of(like) == "torch":
        return recurrence.rates_of(like, device_of(like, "state"), tuple(x)).float()
    return library("jax.numpy" if kind_of(like) == "jax" else "cupy").asarray(x, "float32")


@cache
def function() -> Any:
    """Return Lightning attention as a function of PyTorch's graph; made once, as importing it imports PyTorch."""
    torch = library("torch")

    class Lightning(torch.autograd.Function):  # type: ignore[misc, name-defined]
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any, state: Any, cu: Any, decay: Any, scale: Any) -> Any:
            _takes(q, v)
            out, last = recurrence.run(
                "lightning", {"query": q, "key": k, "value": v}, scale, state, cu, {"decay": decay}
            )
            ctx.save_for_backward(q, k, v, state, cu)
            ctx.options = {"decay": decay, "scale": scale}
            ctx.mark_non_differentiable(last)
            return out, last

        @staticmethod
        @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
        def backward(ctx: Any, dout: Any, _: Any) -> Any:
            q, k, v, state, cu = ctx.saved_tensors
            dout = dout.contiguous()
            dq, dk, dv, dstate = lightning_backward(q, k, v, dout, state=state, cu_seqlens=cu, **ctx.options)
            dstate = None if dstate is None else dstate.to(state.dtype)
            return dq, dk, dv, dstate, None, None, None

    return Lightning
