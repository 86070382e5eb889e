"""JAX, ONNX Runtime, OpenVINO and Keras."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedProblem
from ...problem import Problem
from .gradients import by_name, with_gradients

__all__ = ["jax_attention", "keras_attention", "onnxruntime_attention", "openvino_attention"]


Call = Callable[..., Any]


def _jax(problem: Problem) -> tuple[Call, list[Any]]:
    """Return the call as a function of query, key, value and, if it is there, bias, and these as JAX's arrays."""
    import jax
    import jax.numpy as jnp

    p = problem.to("numpy")
    if p.window is not None and None in p.window:
        raise UnsupportedProblem("window: dot_product_attention has no open side")
    if p.window is not None and p.n_q != p.n_k:
        raise UnsupportedProblem("window: dot_product_attention counts it from the top left")
    mask = None if p.allowed is None else jnp.broadcast_to(p.allowed, (*p.allowed.shape[:2], p.n_q, p.n_k))

    def call(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # its layout is batch, seq, heads, dim
        bias = None if bias is None else jnp.broadcast_to(bias, (*bias.shape[:2], p.n_q, p.n_k))
        out = jax.nn.dot_product_attention(
            q, k, v, bias, mask, scale=p.scale, is_causal=p.causal is not None, local_window_size=p.window
        )
        return jnp.swapaxes(out, 1, 2)

    return call, [jnp.asarray(x) for x in (p.query, p.key, p.value, p.bias) if x is not None]


def _compiled(call: Call, dtype: str) -> Call:
    """Return a call as one program, as JAX is used: to compile each of its operations takes three times as long.

    On a CPU its products of float16 are refused within a program.
    """
    import jax

    return call if dtype == "float16" else jax.jit(call)


def _jax_gradients(problem: Problem, dout: NDArray[Any]) -> dict[str, NDArray[Any]]:
    import jax

    call, given = _jax(problem)

    def backward(arriving: Any, *given: Any) -> Any:
        return jax.vjp(call, *given)[1](jax.numpy.asarray(arriving))

    return by_name(problem, map(np.asarray, _compiled(backward, problem.dtype)(dout, *given)))


@with_gradients(_jax_gradients)
def jax_attention(problem: Problem) -> Any:
    """Return what jax.nn.dot_product_attention gives."""
    call, given = _jax(problem)
    return _compiled(call, problem.dtype)(*given)


def _keras(problem: Problem) -> tuple[Call, list[Any]]:
    """Return the call as a function of query, key, value and, if it is there, bias, and these as Keras's tensors."""
    if "KERAS_BACKEND" not in os.environ:
        os.environ["KERAS_BACKEND"] = next((b for b in ("torch", "jax") if importlib.util.find_spec(b)), "tensorflow")
    from keras import ops

    p = problem.to("numpy")
    if p.bias is not None and p.allowed is not None:
        raise UnsupportedProblem("bias: keras.ops takes bias or mask")
    full = (p.batch, p.heads, p.n_q, p.n_k)
    mask = None if p.allowed is None else ops.convert_to_tensor(np.broadcast_to(p.allowed, full).copy())

    def call(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        q, k, v = (ops.swapaxes(x, 1, 2) for x in (q, k, v))  # its layout is batch, seq, heads, dim
        bias = None if bias is None else ops.broadcast_to(bias, full)
        return ops.swapaxes(ops.dot_product_attention(q, k, v, bias, mask, p.scale, p.causal is not None), 1, 2)

    given = (x.astype(np.float32) for x in (p.query, p.key, p.value, p.bias) if x is not None)
    return call, [ops.convert_to_tensor(x, dtype=p.dtype) for x in given]


def _from_keras(x: Any) -> NDArray[Any]:
    from keras import ops

    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")))


def _keras_gradients(problem: Problem, dout: NDArray[Any]) -> dict[str, NDArray[Any]]:
    call, given = _keras(problem)
    import keras

    if keras.backend.backend() != "torch":
        raise UnsupportedProblem(f"gradients: Keras's backend is {keras.backend.backend()}, expected torch")
    import torch

    # where the bias needs a gradient PyTorch takes the math backend, which refuses bias with causal
    leaves = [x.requires_grad_() for x in given]
    out = call(*leaves)
    arriving = keras.ops.convert_to_tensor(dout.astype(np.float32), dtype=problem.dtype)
    return by_name(problem, map(_from_keras, torch.autograd.grad(out, leaves, arriving)))


@with_gradients(_keras_gradients)
def keras_attention(problem: Problem) -> Any:
    """Return what keras.ops.dot_product_attention gives on Keras's backend (PyTorch or JAX if unset)."""
    call, given = _keras(problem)
    return _from_keras(call(*given)).astype(problem.to("numpy").query.dtype)


@lru_cache(maxsize=256)
def _session(shapes: tuple[Any, ...], dtype: str, causal: bool, scale: float | None, softcap: float | None) -> Any:
    import onnxruntime
    from onnx import TensorProto, helper

    kinds = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bool": TensorProto.BOOL}
    attributes = {"is_causal": int(causal)} | {
        n: x for n, x in (("scale", scale), ("softcap", softcap)) if x is not None
    }
    names = ("Q", "K", "V", "M")[: len(shapes)]
    inputs = [helper.make_tensor_value_info(n, kinds[t], list(s)) for n, (s, t) in zip(names, shapes, strict=True)]
    node = helper.make_node("Attention", list(names), ["Y"], **attributes)
    graph = helper.make_graph([node], "attention", inputs, [helper.make_tensor_value_info("Y", kinds[dtype], None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _attn_mask(p: Problem) -> NDArray[Any] | None:
    """Return one mask argument: boolean, or bias with -inf where the mask is False, its last two axes whole."""
    mask: NDArray[Any] | None = p.allowed if p.bias is None else p.bias
    if p.bias is not None and p.allowed is not None:
        mask = np.where(p.allowed, p.bias, np.array(-np.inf, p.bias.dtype))
    return None if mask is None else np.ascontiguousarray(np.broadcast_to(mask, (*mask.shape[:2], p.n_q, p.n_k)))


def onnxruntime_attention(problem: Problem) -> Any:
    """Return what ONNX Runtime gives for an Attention node (opset 23)."""
    p = problem.to("numpy")
    if p.scale is not None and p.scale <= 0:
        raise UnsupportedProblem(f"scale: ONNX Runtime's Attention refuses {p.scale}, it must be above 0")
    mask = _attn_mask(p)
    feed = {"Q": p.query, "K": p.key, "V": p.value} | ({} if mask is None else {"M": mask})
    shapes = tuple((x.shape, x.dtype.name) for x in feed.values())
    session = _session(shapes, p.dtype, p.causal is not None, p.scale, p.softcap)
    return session.run(None, {n: np.ascontiguousarray(x) for n, x in feed.items()})[0]


def openvino_attention(problem: Problem) -> Any:
    """Return what OpenVINO's CPU plugin gives for scaled_dot_product_attention (opset 13), in float32 precision."""
    import openvino
    import openvino.opset13 as ops

    p = problem.to("numpy")
    mask = _attn_mask(p)
    if p.scale is not None and mask is None:
        mask = np.zeros((1, 1, p.n_q, p.n_k), p.query.dtype)  # the operator takes scale only after a mask
    if mask is not None and p.causal is not None:
        raise UnsupportedProblem("causal: scaled_dot_product_attention ignores attention_mask where causal is set")
    feed = [x for x in (p.query, p.key, p.value, mask) if x is not None]
    parameters = [ops.parameter(list(x.shape), bool if x.dtype == bool else x.dtype.type) for x in feed]
    more: dict[str, Any] = {"causal": p.causal is not None}
    if mask is not None:
        more["attention_mask"] = parameters[3]
    if p.scale is not None:
        more["scale"] = ops.constant(np.asarray(p.scale, p.query.dtype))
    node = ops.scaled_dot_product_attention(*parameters[:3], **more)
    compiled = openvino.Core().compile_model(
        openvino.Model([node], parameters), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return np.array(next(iter(compiled([np.ascontiguousarray(x) for x in feed]).values())))
