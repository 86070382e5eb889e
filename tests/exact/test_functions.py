import inspect

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import refattn
from refattn import InvalidInput, InvalidProblem, Problem, UnsupportedProblem, evaluate

CALLS = ["softmax_attention", "linear_attention", "power_attention", "sigmoid_attention"]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_torch_in_torch_out(name, dtype):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, 4, 3, 8, dtype=dtype),
        torch.randn(1, 2, 5, 8, dtype=dtype),
        torch.randn(1, 2, 5, 6, dtype=dtype),
    )
    out = getattr(refattn, name)(q, k, v, causal="bottom_right")
    assert out.shape == (1, 4, 3, 6)
    assert out.dtype == dtype
    problem = Problem(q, k, v, causal="bottom_right", variant=name.removesuffix("_attention"))
    want = evaluate(problem, rounding=str(dtype).removeprefix("torch.")).out.astype(np.float64)
    assert (out.double().numpy() == want).all()


@pytest.mark.parametrize("name", CALLS)
def test_options_are_named_in_the_docstring(name):
    f = getattr(refattn, name)
    for parameter in inspect.signature(f).parameters:
        assert parameter in f.__doc__


def test_jax_and_numpy():
    x = jnp.ones((1, 1, 2, 4), jnp.bfloat16)
    assert refattn.softmax_attention(x, x, x).dtype == jnp.bfloat16
    y = np.ones((1, 1, 2, 4), np.float16)
    out = refattn.softmax_attention(y, y, y)
    assert isinstance(out, np.ndarray)
    assert out.dtype == np.float16


def test_lse_is_at_least_float32():
    x = torch.randn(1, 1, 3, 8).bfloat16()
    out, lse = refattn.softmax_attention(x, x, x, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    want = torch.logsumexp(x.double() @ x.double().mT / 8**0.5, -1)
    assert (lse.double() - want).abs().max() < 2e-7
    _, wide = refattn.softmax_attention(x, x, x, rounding="float64", return_lse=True)
    assert wide.dtype == torch.float64


def test_rounding_changes_the_type():
    x = np.ones((1, 1, 2, 4), np.float32)
    assert refattn.linear_attention(x, x, x, rounding="float8_e4m3fn").dtype.name == "float8_e4m3fn"


def test_errors_pass_through():
    x = np.ones((1, 1, 2, 4), np.float32)
    with pytest.raises(InvalidProblem, match="query: got list"):
        refattn.softmax_attention([1], x, x)
    with pytest.raises(InvalidInput, match="dtype: got 'float20'"):
        refattn.softmax_attention(x, x, x, rounding="float20")
    with pytest.raises(InvalidProblem, match="p: got 5"):
        refattn.power_attention(x, x, x, p=5)


def test_what_no_enclosure_decides_is_raised():
    """Out lies above a midpoint of two bfloat16 numbers by 2·exp(gap)."""
    zero = np.zeros((1, 1, 1, 1), np.float32)
    value = np.array([1 + 2**-8, 3], np.float32).reshape(1, 1, 2, 1)
    key = np.zeros((1, 1, 2, 1), np.float32)

    def call(gap, **more):
        bias = np.array([0, gap], np.float32).reshape(1, 1, 1, 2)
        return refattn.softmax_attention(zero, key, value, bias=bias, rounding="bfloat16", **more)

    assert call(-1.5e5).astype(float).item() == 1.0078125
    with pytest.raises(UnsupportedProblem, match="out: 1 of 1 elements lie nearer to a midpoint of two bfloat16 numb"):
        call(-2e5)
    apart = value.copy()
    apart[0, 0, 0] = 1.25
    value = apart
    assert call(-2e5).astype(float).item() == 1.25
