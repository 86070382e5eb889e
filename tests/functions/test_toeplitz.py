"""A bias by distance, and its gradient, against loops in whole numbers and autograd."""

import re
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from refattn import InvalidInput, Problem, evaluate
from refattn.functions.toeplitz import toeplitz_bias, toeplitz_bias_gradient

SIZES = [(5, 7, 2, 0), (5, 7, 2, 3), (4, 4, 3, 0), (3, 6, 9, -4), (4, 5, 0, 1), (6, 1, 1, -(2**62)), (0, 3, 1, 0)]
"""Queries, keys, reach, offset."""


def column(i, j, reach, offset):
    apart = j - (i + offset)
    return 0 if apart < -reach else 2 * reach if apart > reach else apart + reach


@pytest.mark.parametrize("make", [np.asarray, torch.asarray, jnp.asarray])
def test_each_distance_has_its_number(make):
    for n_q, n_k, reach, offset in SIZES:
        table = np.arange(2 * (2 * reach + 1), dtype=np.float32).reshape(2, -1)
        got = toeplitz_bias(make(table), n_q, n_k, offset=offset)
        assert type(got) is type(make(table))
        assert got.dtype == make(table).dtype
        assert tuple(got.shape) == (1, 2, n_q, n_k)
        for h, i, j in np.ndindex(2, n_q, n_k):
            assert float(got[0, h, i, j]) == table[h, column(i, j, reach, offset)]


@pytest.mark.parametrize("size", SIZES)
def test_the_gradient_is_a_sum_over_diagonals(size):
    n_q, n_k, reach, offset = size
    rng = np.random.default_rng(0)
    dbias = rng.standard_normal((1, 3, n_q, n_k)) * 2.0 ** rng.integers(-60, 60, (1, 3, n_q, n_k))
    sums = [[Fraction(0)] * (2 * reach + 1) for _ in range(3)]
    for h, i, j in np.ndindex(3, n_q, n_k):
        sums[h][column(i, j, reach, offset)] += Fraction(dbias[0, h, i, j])
    got = toeplitz_bias_gradient(dbias, reach, offset=offset)
    assert got.tolist() == [[float(x) for x in row] for row in sums]


def test_the_gradient_of_a_calls_table_is_autograds():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, h, n, 8)) for h, n in ((4, 5), (2, 7), (2, 7)))
    table = rng.standard_normal((4, 5))
    p = Problem(q, k, v, bias=toeplitz_bias(table, 5, 7, offset=2))
    dout = rng.standard_normal(p.out_shape)
    found = toeplitz_bias_gradient(evaluate(p, gradients=dout).dbias, 2, offset=2)
    t = torch.tensor(table, requires_grad=True)
    at = torch.tensor([[column(i, j, 2, 2) for j in range(7)] for i in range(5)])
    q, k, v = map(torch.tensor, (q, k, v))
    s = q @ k.repeat_interleave(2, 1).mT / 8**0.5 + t[:, at]
    (s.softmax(-1) @ v.repeat_interleave(2, 1)).backward(torch.tensor(dout))
    # some hundred roundings of sums of 70 terms that stay below 64
    assert np.abs(t.grad.numpy() - found).max() <= 400 * 2.0**-53 * 64


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: toeplitz_bias(np.ones((2, 4)), 3, 3),
            "table: got shape (2, 4), expected (heads, 2 reach + 1), an odd",
        ),
        (lambda: toeplitz_bias(np.ones(5), 3, 3), "table: shape is (5,), expected (heads, distances), each at least 1"),
        (lambda: toeplitz_bias([[1.0]], 3, 3), "table: got list, expected an array"),
        (lambda: toeplitz_bias(np.ones((2, 5)), -1, 3), "n_q: got -1, expected a whole number from 0 on"),
        (lambda: toeplitz_bias(np.ones((2, 5)), 3, 2.5), "n_k: got 2.5, expected a whole number from 0 on"),
        (lambda: toeplitz_bias(np.ones((2, 5)), 3, 3, offset=0.5), "offset: got 0.5, expected a whole number from -46"),
        (lambda: toeplitz_bias_gradient(np.ones((2, 4, 3, 3)), 1), "dbias: got shape (2, 4, 3, 3), expected (1, heads"),
        (lambda: toeplitz_bias_gradient(np.ones((1, 4, 3, 3)), -1), "reach: got -1, expected a whole number from 0 to"),
    ],
)
def test_errors(call, text):
    with pytest.raises(InvalidInput, match=f"^{re.escape(text)}"):
        call()
