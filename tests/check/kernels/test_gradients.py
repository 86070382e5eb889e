"""The gradients that kernels carry: near the exact ones, of the shape and type of what they are by."""

import numpy as np
import pytest

from refattn import UnsupportedProblem, evaluate
from refattn.arrays import from_float64, to_float64
from refattn.check.kernels import KERNELS
from refattn.dtypes import FORMATS

CARRY = ("torch-sdpa-flash", "torch-sdpa-math", "jax", "keras")


def rounded(seed, shape, dtype):
    return from_float64(FORMATS[dtype].round_array(np.random.default_rng(seed).standard_normal(shape)), dtype)


def seen(n_q, n_k):
    return np.random.default_rng(2).random((1, 1, n_q, n_k)) < 0.7


CASES = {
    "plain": lambda make, f: make(dtype=f),
    "causal": lambda make, f: make(7, 5, dtype=f, causal="top_left"),
    "allowed": lambda make, f: make(dtype=f, allowed=seen(5, 7)),
    "bias": lambda make, f: make(dtype=f, bias=rounded(3, (1, 2, 5, 7), f)),
    "bias-of-heads": lambda make, f: make(dtype=f, b=2, bias=rounded(3, (1, 2, 1, 7), f)),
    "bias-allowed": lambda make, f: make(dtype=f, bias=rounded(3, (1, 1, 1, 7), f), allowed=seen(5, 7)),
    "grouped": lambda make, f: make(dtype=f, h=4, h_kv=2),
    "d_v": lambda make, f: make(dtype=f, d_v=3),
    "scale": lambda make, f: make(dtype=f, scale=-0.5),
}


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CARRY)
def test_near_the_exact_gradients(make, name, dtype):
    entry, met = KERNELS[name], 0
    for case, of in CASES.items():
        p = of(make, dtype)
        if not entry.capabilities.missing(p) and (name, case) != ("keras", "bias-allowed"):
            check(name, case, p, entry.load().gradients)
            met += 1
    assert met >= 5 or dtype not in entry.capabilities.dtypes


def check(name, case, p, gradients):
    dout = rounded(1, p.out_shape, p.dtype)
    given = {n: x.tobytes() for n, x in p.arrays().items()} | {"dout": dout.tobytes()}
    got = gradients(p, dout)
    assert given == {n: x.tobytes() for n, x in p.arrays().items()} | {"dout": dout.tobytes()}
    by = {"dq": p.query, "dk": p.key, "dv": p.value, "dbias": p.bias}
    assert set(got) == {n for n, x in by.items() if x is not None and (n, name) != ("dbias", "torch-sdpa-flash")}
    exact = evaluate(p, gradients=dout)
    # a dozen roundings in a term, and sums over rows, keys and columns
    share = 12 * (p.n_q + p.n_k + p.d_k) ** 0.5 * FORMATS[p.dtype].unit_roundoff
    for n, x in got.items():
        assert type(x) is np.ndarray
        assert (x.shape, x.dtype) == (by[n].shape, by[n].dtype), (case, n)
        allowed = share * np.abs(exact.values[n]).max()
        assert (exact.enclosures[n].error(to_float64(x)) <= allowed).all(), (case, n)


def test_the_rest_carries_none():
    pytest.importorskip("openvino")
    for name in ("torch-flex", "torch-flex-compiled", "onnxruntime", "openvino"):
        assert not hasattr(KERNELS[name].load(), "gradients")


def test_flex_attention_has_no_backward_on_a_cpu():
    """Where this fails, flex can carry gradients."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    x = torch.ones(1, 1, 4, 8, requires_grad=True)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        flex_attention(x, x, x)


def test_flash_refuses_a_mask_that_needs_a_gradient():
    """Where this fails, torch-sdpa-flash can carry dbias."""
    import torch

    x, mask = torch.ones(1, 1, 4, 8), torch.zeros(1, 1, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'attn_mask'"):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x, 0.0, False, attn_mask=mask)


def test_keras_on_another_backend(make, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    import keras

    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    p = make()
    with pytest.raises(UnsupportedProblem, match="gradients: Keras's backend is numpy, expected torch"):
        KERNELS["keras"].load().gradients(p, np.ones(p.out_shape, np.float32))
