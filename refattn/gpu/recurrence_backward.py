"""Gradients of Lightning attention on a GPU: its own kernels with other roles, forwards and backwards in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import array_api_compat as api

from ..arrays import dtype_name, kind_of
from ..errors import InvalidProblem, UnsupportedProblem
from . import recurrence
from .views import cast, device_of, library

__all__ = ["lightning_backward"]


def lightning_backward(
    query: Any, key: Any, value: Any, dout: Any, *, decay: Sequence[float], scale: float | None = None,
    state: Any = None, cu_seqlens: Any = None, dstate_out: Any = None,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """Return dq, dk, dv and dstate of Lightning attention, dstate None where it starts from nothing.

    With fade = exp(-decay), S_0 the state that it starts from and G what arrives at the last one, after n tokens,

    - ``dq_i = scale (sum_(j <= i) fade^(i-j) (dout_i v_j) k_j + fade^(i+1) dout_i S_0^T)``: the recurrence itself,
    - ``dk_j = scale sum_(i >= j) fade^(i-j) (v_j dout_i) q_i + fade^(n-1-j) v_j G^T``: backwards in time, and so
    - ``dv_j = scale sum_(i >= j) fade^(i-j) (k_j q_i) dout_i + fade^(n-1-j) k_j G``, whose last state gives dstate.

    Parameters
    ----------
    query, key, value : (b, h_q, n, d_k), (b, h_kv, n, d_k) and (b, h_kv, n, d_v) arrays
        As :func:`refattn.gpu.lightning` takes them, with d_v up to 128.
    dout : (b, h_q, n, d_v) array
        The gradient by out, of out's type.
    decay, scale, state, cu_seqlens
        As they were given forward.
    dstate_out : array of the state's shape, optional
        The gradient by the last state, G; None is 0.

    Raises
    ------
    InvalidProblem
        Shapes, types or devices that do not fit together.
    UnsupportedProblem
        What the kernels do not take.

    Notes
    -----
    Derived from the recurrence; that it is three recurrences again is in Qin et al., Lightning Attention-2, arXiv
    2401.04658, recalled. Where key heads are fewer than query heads, or something arrives at the last state, dk and dv
    are sums: their terms are computed in float32 and rounded once. `cu_seqlens` is read then.
    """
    _takes(value)
    options, h_kv = {"decay": tuple(map(float, decay))}, key.shape[1]
    group = query.shape[1] // h_kv

    def run(q: Any, k: Any, v: Any, start: Any, cu: Any, back: bool) -> tuple[Any, Any]:
        return recurrence.run("lightning", {"query": q, "key": k, "value": v}, scale, start, cu, options, back)

    cuts = [0, query.shape[2]] if cu_seqlens is None else [] if dstate_out is None else list(map(int, cu_seqlens))
    many = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wanted = (many, query.shape[1], query.shape[3], value.shape[3])
    if dstate_out is not None and tuple(dstate_out.shape) != wanted:
        raise InvalidProblem(f"dstate_out: got shape {tuple(dstate_out.shape)}, expected {wanted}")
    transposed = None if state is None else state.swapaxes(2, 3)
    dq, _ = run(dout, value, key, transposed, cu_seqlens, False)
    cu = None if cu_seqlens is None else query.shape[2] - _turned(cu_seqlens)
    q, k, v, dtype = query, key, value, dtype_name(key)
    sums = group > 1 or dstate_out is not None
    if sums:
        q, k, v, dout = (cast(x, "float32", n) for n, x in zip(["q", "k", "v", "dout"], (q, k, v, dout), strict=True))
        k, v = _repeated(k, group), _repeated(v, group)
    dk, _ = run(v, dout, q, None, cu, True)
    dv, last = run(k, q, dout, None, cu, True)
    if dstate_out is not None:
        end = cast(dstate_out, "float32", "dstate_out")
        dk, dv = dk + _from_end(v, end.swapaxes(2, 3), cuts, decay), dv + _from_end(k, end, cuts, decay)
    if sums:
        dk, dv = (cast(_summed(x, h_kv), dtype, n) for x, n in ((dk, "dk"), (dv, "dv")))
    if state is None:
        return dq, dk, dv, None
    last = last if cu is None else _turned(last)
    by = [math.exp(-x) * (1.0 if scale is None else float(scale)) for x in decay]
    dstate = last * _numbers(last, by)[:, None, None]
    if dstate_out is not None:
        lengths = [cuts[1]] * many if cu is None else [j - i for i, j in pairwise(cuts)]
        kept = _numbers(last, [math.exp(-x * n) for n in lengths for x in decay])
        dstate = dstate + end * kept.reshape(many, -1, 1, 1)
    return dq, dk, dv, dstate


def _from_end(x: Any, end: Any, cuts: list[int], decay: Sequence[float]) -> Any:
    """Return ``fade^(n-1-j) x_j end`` for each token j of each sequence."""
    xp = api.array_namespace(x)
    rates, parts = _numbers(x, [float(y) for y in decay])[:, None], []
    for i, (at, stop) in enumerate(pairwise(cuts)):
        ahead = xp.arange(stop - at - 1, -1, -1, dtype=rates.dtype, device=api.device(x))
        own = end if len(cuts) == 2 else end[i : i + 1]
        parts.append(_product(x[:, :, at:stop], own) * xp.exp(-rates * ahead)[..., None])
    return xp.concat(parts, axis=2)


def _product(x: Any, y: Any) -> Any:
    """Return a matrix product of float32 numbers that no setting makes TF32."""
    if kind_of(x) == "jax":
        return library("jax.numpy").matmul(x, y, precision="highest")
    return cast(cast(x, "float64", "x") @ cast(y, "float64", "y"), "float32", "product")


def _repeated(x: Any, group: int) -> Any:
    """Return heads of keys, each as often as query heads read it."""
    return x if group == 1 else x.repeat_interleave(group, 1) if kind_of(x) == "torch" else x.repeat(group, 1)


def _summed(x: Any, h_kv: int) -> Any:
    """Return the sums over the query heads of each key head."""
    b, h, n, d = x.shape
    return x if h == h_kv else x.reshape(b, h_kv, h // h_kv, n, d).sum(2)


def _takes(value: Any) -> None:
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
            ctx.set_materialize_grads(False)  # where nothing arrives at the last state its terms are not computed
            _takes(v)
            out, last = recurrence.run(
                "lightning", {"query": q, "key": k, "value": v}, scale, state, cu, {"decay": decay}
            )
            ctx.save_for_backward(q, k, v, state, cu)
            ctx.options = {"decay": decay, "scale": scale}
            return out, last

        @staticmethod
        @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
        def backward(ctx: Any, dout: Any, dlast: Any) -> Any:
            q, k, v, state, cu = ctx.saved_tensors
            dout = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device) if dout is None else dout
            more = {"state": state, "cu_seqlens": cu, "dstate_out": dlast}
            dq, dk, dv, dstate = lightning_backward(q, k, v, dout.contiguous(), **more, **ctx.options)
            dstate = None if dstate is None else dstate.to(state.dtype)
            return dq, dk, dv, dstate, None, None, None

    return Lightning
