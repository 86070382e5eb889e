"""Attention to parts of the keys, and parts merged: beside sums over all keys in 60 digits."""

import re

import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch

from refattn import InvalidInput, UnsupportedProblem
from refattn.functions import parts
from refattn.functions.parts import attend, merge, numbers, rounded

U = 2.0**-53
KINDS = {"numpy": np.asarray, "torch": torch.tensor, "jax": jnp.asarray}


def exactly(q, k, v, scale, weight=None):
    """Attention of one row over keys, and its log-sum-exp, in 60 digits."""
    with mpmath.workdps(60):
        w = [mpmath.exp(mpmath.mpf(scale) * mpmath.fsum(map(mpmath.mpf, q * x))) for x in k]
        w = w if weight is None else [a * int(n) for a, n in zip(w, weight, strict=True)]
        z = mpmath.fsum(w)
        return [mpmath.fsum(a * mpmath.mpf(x) for a, x in zip(w, c, strict=True)) / z for c in v.T], mpmath.log(z)


def integers(seed, *shape):
    """Small integers: their products are exact."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float64)


def test_a_part_is_correctly_rounded():
    q, k, v = integers(0, 3, 1, 1, 9, 4)
    weight = np.arange(9.0).reshape(1, 1, 1, 9)  # the first key does not count
    out, lse = attend(q, k, v, scale=0.5, weight=weight)
    for i in range(9):
        row, z = exactly(q[0, 0, i], k[0, 0], v[0, 0], 0.5, range(9))
        assert out[0, 0, i].tolist() == [float(x) for x in row]
        assert lse[0, 0, i] == float(z)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 4, 11])
@pytest.mark.parametrize("far", [0.5, 200.0])
def test_merged_parts_are_attention_to_all(size, far, kind):
    q, k, v = integers(1, 3, 1, 1, 11, 3)
    pieces = [attend(q, k[:, :, i : i + size], v[:, :, i : i + size], scale=far) for i in range(0, 11, size)]
    given = [tuple(KINDS[kind](x) for x in p) for p in pieces]
    out, lse = (np.asarray(x, np.float64) for x in merge(given))
    u = 2.0**-24 if kind == "jax" else U  # JAX keeps float32
    largest = max(abs(x[x > -np.inf]).max() for _, x in pieces)
    # lse and its difference from the largest are off by u·|lse| each, three times; exp adds an ulp, and a sum of m
    # terms m roundings: to a weight above and to one in the divisor. Second orders: a hundredth.
    relative = 1.01 * u * (2 * (6 * largest + 2) + 2 * len(pieces) + 2)
    for i in range(11):
        row, z = exactly(q[0, 0, i], k[0, 0], v[0, 0], far)
        assert max(abs(float(x - mpmath.mpf(y))) for x, y in zip(row, out[0, 0, i], strict=True)) <= relative * 4
        assert abs(float(z - mpmath.mpf(lse[0, 0, i]))) <= relative


def test_parts_without_keys():
    q, k, v = integers(2, 3, 1, 1, 4, 3)
    none = attend(q, k, v, allowed=np.zeros((1, 1, 1, 4), bool))
    some = attend(q, k, v)
    assert all((a == b).all() for a, b in zip(merge([none, some, none]), some, strict=True))
    out, lse = merge([none, none])
    assert (out == 0).all()
    assert (lse == -np.inf).all()


def test_without_a_shift_the_merge_overflows():
    """What the public code of RetrievalAttention does to a part: the control."""
    q, v = np.full((1, 1, 1, 1), 800.0), np.ones((1, 1, 1, 1))
    part = attend(q, np.ones((1, 1, 1, 1)), v, scale=1.0)
    assert np.isfinite(merge([part, part])[1]).all()
    with np.errstate(over="ignore"):
        assert np.isinf(np.log(np.exp(part[1]) + np.exp(part[1]))).all()


def test_numbers_and_roundings():
    x = np.array([1 + 2.0**-30, 3.0])
    assert rounded(x, torch.zeros(1, dtype=torch.bfloat16)).tolist() == [1, 3]
    once = np.array([1 + 2.0**-8 + 2.0**-30])  # through float32 it would become a tie, and 1
    assert rounded(once, torch.zeros(1, dtype=torch.bfloat16)).tolist() == [1 + 2.0**-7]
    assert rounded(x, x).tolist() == x.tolist()
    assert numbers("x", jnp.ones(3, jnp.float32)).dtype == np.float64
    with pytest.raises(InvalidInput, match="x: holds NaN or an infinity, expected finite numbers"):
        numbers("x", np.array([np.nan]))


def test_errors(monkeypatch):
    q = integers(0, 1, 1, 2, 2)
    with pytest.raises(InvalidInput, match="parts: got none"):
        merge([])
    text = "parts[1]: shapes are (1, 1, 2, 2) and (1, 1, 3), expected the first part's out"
    with pytest.raises(InvalidInput, match=re.escape(text)):
        merge([attend(q, q, q), (q, np.zeros((1, 1, 3)))])
    answer = parts.evaluate

    def told(*given, **more):
        found = answer(*given, **more)
        found.undecided["out"] = 2
        return found

    monkeypatch.setattr(parts, "evaluate", told)
    with pytest.raises(UnsupportedProblem, match="attend: 2 results lie nearer"):
        attend(q, q, q)
