"""A bias by distance, and its gradient, against loops in whole numbers and autograd."""

import re
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from refattn import InvalidInput, Problem, evaluate
from refattn.functions.toeplitz import toeplitz_bias, toeplitz_bias_gradient, toeplitz_gain_gradient

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


def gained(scale, gain, n_q=3, n_k=4, **more):
    rng = np.random.default_rng(2)
    q, k, v = (rng.integers(-3, 4, (2, h, n, 8)) / 4 for h, n in ((4, n_q), (2, n_k), (2, n_k)))
    p = Problem(q, k, v, scale=scale, variant="urpe", options={"gain": gain}, **more)
    return p, rng.integers(-3, 4, p.out_shape) / 4


@pytest.mark.parametrize("rows", [1, 4])
def test_the_gradient_by_a_gain_is_exact_where_its_parts_are(rows):
    """With a scale of 0 a weight is 1/4 of 4 keys: no sum rounds. The place of row i is key i + 1."""
    gain = tuple((0.5, -1.0, 2.0, 0.0, 3.0)[h % 2 : 5 - h % 2] for h in range(rows))
    p, dout = gained(0.0, gain)
    wanted = [[Fraction(0)] * len(row) for row in gain]
    for b, h, i, j in np.ndindex(2, 4, 3, 4):
        product = sum(Fraction(x) * Fraction(y) for x, y in zip(dout[b, h, i], p.value[b, h // 2, j], strict=True))
        wanted[h % rows][column(i, j, len(gain[h % rows]) // 2, 1)] += product / 4
    got = toeplitz_gain_gradient(p, dout)
    assert [x.tolist() for x in got] == [[float(x) for x in row] for row in wanted]
    huge = toeplitz_gain_gradient(p.replace(value=p.value * 2.0**1000), dout * 2.0**-1000)
    assert all((a == b).all() for a, b in zip(huge, got, strict=True))


def test_the_gradient_by_a_gain_is_autograds():
    bias = np.random.default_rng(3).standard_normal((1, 4, 5, 7))
    p, dout = gained(None, ((0.5, -1.0, 2.0, 0.25, 1.0),), 5, 7, bias=bias, causal="bottom_right")
    c = torch.tensor(p.options["gain"][0], dtype=torch.float64, requires_grad=True)
    at = torch.tensor([[column(i, j, 2, 2) for j in range(7)] for i in range(5)])
    q, k, v = (torch.tensor(x) for x in (p.query, p.key, p.value))
    hidden = torch.ones(5, 7, dtype=torch.bool).triu(3)
    s = (q @ k.repeat_interleave(2, 1).mT / 8**0.5 + torch.tensor(bias)).masked_fill(hidden, -torch.inf)
    ((s.softmax(-1) * c[at]) @ v.repeat_interleave(2, 1)).backward(torch.tensor(dout))
    # some hundred roundings of sums of 8 * 8 * 5 * 7 terms that stay below 1 and whose weights sum to 1 in a row
    bound = 400 * 2.0**-53 * 8 * 8 * 5
    assert np.abs(c.grad.numpy() - toeplitz_gain_gradient(p, dout)[0]).max() <= bound
    other = toeplitz_gain_gradient(p.replace(causal=None), dout)[0]
    assert np.abs(c.grad.numpy() - other).max() > bound


def test_values_that_are_no_numbers_show_in_the_gradient_by_a_gain():
    p, dout = gained(0.0, ((1.0,),))
    value = p.value.copy()
    value[0, 0, 0, 0] = np.nan
    assert np.isnan(toeplitz_gain_gradient(p.replace(value=value), dout)[0]).all()


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
        (
            lambda: toeplitz_gain_gradient(None, np.ones(3)),
            "problem: got None, expected refattn's Problem; make one, with",
        ),
        (lambda: toeplitz_gain_gradient(*gained(0.0, None)), "problem: has no gain, expected a call with an option"),
        (
            lambda: toeplitz_gain_gradient(gained(0.0, ((1.0,),))[0], np.ones((2, 4, 3, 7))),
            "dout: shape is (2, 4, 3, 7), expected (2, 4, 3, 8)",
        ),
        (lambda: toeplitz_bias_gradient(np.ones((1, 4, 3, 3)), -1), "reach: got -1, expected a whole number from 0 to"),
    ],
)
def test_errors(call, text):
    with pytest.raises(InvalidInput, match=f"^{re.escape(text)}"):
        call()
