"""Softmax over part of the scores, and what the arguments of a call must be."""

import re

import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.functions.dense import as_index, check_call, check_floats, layer_norm, masked_softmax
from tests.functions.rounding import unit


def exact_softmax(scores, allowed):
    """Return softmax and log-sum-exp of one row with 60 digits."""
    with mpmath.workdps(60):
        powers = [
            mpmath.exp(mpmath.mpf(float(s))) if a else mpmath.mpf(0) for s, a in zip(scores, allowed, strict=True)
        ]
        total = sum(powers)
        return [p / total if total else p for p in powers], mpmath.log(total) if total else -mpmath.inf


@pytest.mark.parametrize(
    ("make", "dtype"), [(np.asarray, "float64"), (torch.asarray, "float64"), (jnp.asarray, "float32")]
)
def test_masked_softmax_is_mpmaths(make, dtype):
    rng = np.random.default_rng(0)
    scores = (rng.standard_normal((5, 7)) * 3).astype(dtype)
    allowed = rng.random((5, 7)) < 0.6
    allowed[2] = False
    p, lse = (np.asarray(x) for x in masked_softmax(make(scores), as_index(allowed, make(scores))))
    u = unit(dtype)
    for row in range(5):
        due, due_lse = exact_softmax(scores[row], allowed[row])
        for found, exact in zip(p[row], due, strict=True):
            # exp of a rounded difference: a share (|s| + m + 2) u; the sum 7 u more, the division 1
            assert abs(float(found) - exact) <= 2 * (2 * abs(scores).max() + 12) * u * exact
        if allowed[row].any():
            assert abs(float(lse[row]) - due_lse) <= 2 * (2 * abs(scores).max() + 12) * u * (1 + abs(due_lse))
        else:
            assert lse[row] == -np.inf
    assert (p[~allowed] == 0).all()
    assert p.dtype == lse.dtype == dtype


def test_rows_beyond_the_range_of_exp_are_right():
    p, lse = masked_softmax(np.array([[1000.0, 1000.0], [-1000.0, -1000.0]]))
    assert (p == 0.5).all()
    # m + log 2, one rounding of a number below 1024
    assert (np.abs(lse - np.array([1000, -1000]) - np.log(2)) <= 1024 * unit("float64")).all()


def test_a_row_that_sees_none_is_zero_and_unseen_numbers_are_not_read():
    x = np.array([[1.0, np.nan], [np.inf, np.nan]])
    p, lse = masked_softmax(x, np.array([[True, False], [False, False]]))
    assert p.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert lse.tolist() == [1.0, -np.inf]


def test_layer_norm_is_torchs_and_its_formula():
    """Of integers with a whole mean and deviation nothing is rounded: 3 over sqrt(8 + 1)."""
    x = np.array([[-1.0, 5.0, -1.0, 5.0], [7.0, 13.0, 7.0, 13.0]])
    assert (layer_norm(x, 7.0) == np.array([-0.75, 0.75, -0.75, 0.75])).all()
    y = np.random.default_rng(3).standard_normal((3, 4))
    due = torch.nn.functional.layer_norm(torch.asarray(y), (4,), eps=1e-5).numpy()
    # mean and variance are sums of 4 (4 u each); a difference is off by that of |x| over the deviation
    share = 2 * 16 * unit("float64") * (1 + abs(y).max() / y.std(-1).min())
    assert abs(layer_norm(y, 1e-5) - due).max() <= 2 * share


def test_errors_name_the_argument():
    x = np.zeros((2, 3, 4))
    for call, text in (
        ((x, x.astype("float32"), x), "key: holds float32, expected float64, as query does; cast one of them"),
        ((x, x, x.astype(int)), "value: holds int64, expected floats; cast it first"),
        ((x, x[0], x), "key: shape is (3, 4), expected (2,) before tokens and dim, as query has; repeat or slice it"),
        ((x[0, 0], x, x), "query: shape is (4,), expected (..., tokens, dim), each at least 1"),
        ((x, x[..., :0], x), "key: shape is (2, 3, 0), expected (..., tokens, dim), each at least 1"),
        ((x, x[..., :3], x), "key: dim is 3, expected query's 4"),
        ((x, x, x[:, :2]), "value: has 2 tokens, expected key's 3"),
        ((x, torch.zeros(2, 3, 4), x), "key: is an array of torch, expected numpy's, as query is"),
    ):
        with pytest.raises(InvalidInput, match=re.escape(text)):
            check_call(*call)
    assert check_floats(x=x) is check_call(x, x, x)
