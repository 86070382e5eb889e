"""PyTorch operators refattn::attention and refattn::attention_backward: gradients, and shapes for torch.compile."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InvalidProblem, UnsupportedProblem
from .backward import SOURCES, attention_backward
from .forward import forward
from .simt import WIDEST

__all__ = ["attention", "needed"]

TENSORS = ("sink", "bias", "allowed", "blocks", "cu_q", "cu_k")
OPTIONS = (
    ", ".join(f"Tensor? {n}" for n in TENSORS)
    + ", float? scale, str? causal, int? left, int? right, float? softcap, int block_q, int block_k, str? impl"
)
NAMES = ("query", "key", "value", *TENSORS, "scale", "causal", "left", "right", "softcap", "block_q", "block_k", "impl")
"""The operator's arguments; accuracy and batch_invariant come after them."""
GRADIENTS = {source: n for n, source in SOURCES.items()}


def needed(*tensors: Any) -> bool:
    """Tell whether a call must go through the operator: a gradient may be asked for, or nothing is there but shapes."""
    if torch.compiler.is_compiling() or type(tensors[0]) not in (torch.Tensor, torch.nn.Parameter):
        return True
    return torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in tensors)


def attention(
    query: Any, key: Any, value: Any, options: dict[str, Any], accuracy: str, impl: str | None, batch_invariant: bool
) -> tuple[Any, Any]:
    """Return out and lse by the operator; `options` are those of :func:`refattn.gpu.attention`.

    Raises
    ------
    InvalidProblem
        No pair or triple where one is expected.
    UnsupportedProblem
        Gradients of head dims that no backward kernel takes.
    """
    widths = query.shape[-1], value.shape[-1]
    wanted = (query, key, value, options["sink"], options["bias"])
    if max(widths) > WIDEST and torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in wanted):
        raise UnsupportedProblem(
            f"gpu: has gradients for head dims up to {WIDEST}, got {widths[0]} and {widths[1]}; pass detached tensors"
        )
    left, right = _parts(options, "window", 2)
    blocks, block_q, block_k = _parts(options, "block_mask", 3)
    cu_q, cu_k = _parts(options, "cu_seqlens", 2)
    scale, softcap = options["scale"], options["softcap"]
    found = torch.ops.refattn.attention(
        *(query, key, value, options["sink"], options["bias"], options["allowed"], blocks, cu_q, cu_k),
        *(scale if scale is None else float(scale), options["causal"], left, right),
        *(
            softcap if softcap is None else float(softcap),
            block_q or 0,
            block_k or 0,
            impl,
            accuracy,
            bool(batch_invariant),
        ),
    )
    return found[0], found[1]


def _parts(options: dict[str, Any], name: str, count: int) -> tuple[Any, ...]:
    given = options[name]
    if given is None:
        return (None,) * count
    if not isinstance(given, tuple | list) or len(given) != count:
        raise InvalidProblem(f"{name}: got {given!r}, expected a tuple of {count}")
    return tuple(given)


def _options(a: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the functions from an operator's arguments."""
    options = {n: a[n] for n in ("scale", "causal", "softcap", "sink", "bias", "allowed")}
    options["window"] = None if a["left"] is None and a["right"] is None else (a["left"], a["right"])
    options["block_mask"] = None if a["blocks"] is None else (a["blocks"], a["block_q"], a["block_k"])
    options["cu_seqlens"] = None if a["cu_q"] is None else (a["cu_q"], a["cu_k"])
    return options


def _forward(*arguments: Any) -> tuple[Any, Any]:
    a = dict(zip(NAMES, arguments, strict=False))
    q, k, v = (a[n].detach() for n in ("query", "key", "value"))
    accuracy, batch_invariant = arguments[len(NAMES) :]
    return forward(q, k, v, **_options(a), accuracy=accuracy, impl=a["impl"], batch_invariant=batch_invariant)


def _forward_shapes(*arguments: Any) -> tuple[Any, Any]:
    query, value = arguments[0], arguments[2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    shape = (*query.shape[:3], value.shape[3])
    return query.new_empty(shape), query.new_empty(shape[:3], dtype=wide)


def _backward(*arguments: Any) -> list[Any]:
    a = dict(zip(NAMES, arguments, strict=False))
    out, lse, dout, dlse, wanted = arguments[len(NAMES) :]
    names = wanted.split()
    impl = "simt" if a["impl"] == "simt" else None  # the forward's kernels have no backward of their own
    given = (a["query"], a["key"], a["value"], out, lse, dout)
    found = attention_backward(*given, **_options(a), dlse=dlse, wanted=names, impl=impl)
    return [found[n] for n in names]


def _backward_shapes(*arguments: Any) -> list[Any]:
    a = dict(zip(NAMES, arguments, strict=False))
    sources = (a[SOURCES[n]] for n in arguments[-1].split())
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in sources]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
    a = dict(zip(NAMES, inputs, strict=False))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(a[n] for n in NAMES[:9]), *output)
    ctx.rest = [a[n] for n in NAMES[9:]]


def _gradients(ctx: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    wanted = [GRADIENTS[n] for n, need in zip(NAMES, ctx.needs_input_grad, strict=False) if need and n in GRADIENTS]
    if not wanted or (dout is None and dlse is None):
        return (None,) * (len(NAMES) + 2)
    dout = torch.zeros_like(out) if dout is None else dout
    found = torch.ops.refattn.attention_backward(*tensors, *ctx.rest, out, lse, dout, dlse, " ".join(wanted))
    by_name = dict(zip(wanted, found, strict=True))
    return (*(by_name.get(GRADIENTS.get(n, "")) for n in NAMES), None, None)


_INPUTS = f"Tensor query, Tensor key, Tensor value, {OPTIONS}"
_operator = torch.library.custom_op(
    "refattn::attention",
    _forward,
    mutates_args=(),
    schema=f"({_INPUTS}, str accuracy, bool batch_invariant) -> (Tensor, Tensor)",
)
_operator.register_fake(_forward_shapes)
_operator.register_autograd(_gradients, setup_context=_setup)
torch.library.custom_op(
    "refattn::attention_backward",
    _backward,
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, str wanted) -> Tensor[]",
).register_fake(_backward_shapes)
