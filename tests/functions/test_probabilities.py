"""Probabilities against correctly rounded ones, and the order that selectors take."""

import re

import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.arrays import to_numpy
from refattn.functions.arguments import namespace
from refattn.functions.probabilities import attended, causal_mask, probabilities, rank

from .selector_calls import KINDS, call, exact_probabilities, relative_error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("h", "h_kv", "n_q", "scale"), [(4, 2, 5, None), (3, 3, 12, -0.7), (4, 1, 1, 2.0)])
def test_probabilities(kind, h, h_kv, n_q, scale):
    q, k, _ = call(0, h, h_kv, n_q)
    xp = attended(KINDS[kind](q), KINDS[kind](k))
    got = probabilities(xp, KINDS[kind](q), KINDS[kind](k), scale, causal_mask(xp, n_q, 12, KINDS[kind](k)))
    assert type(got) is type(KINDS[kind](q))
    assert got.dtype == KINDS[kind](q).dtype
    want = exact_probabilities(q, k, scale).reshape(got.shape)
    assert (np.abs(to_numpy(got) - want) <= relative_error(q, k, scale) * want).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_numbers_rank_by_their_index(kind):
    x = np.array([[2.0, 5.0, 2.0, 5.0, -1.0, 2.0], [0.0, -0.0, 0.0, -0.0, 0.0, -0.0]], np.float32)
    got = to_numpy(rank(namespace(x=KINDS[kind](x)), KINDS[kind](x)))
    assert got.tolist() == [[2, 0, 3, 1, 5, 4], [0, 1, 2, 3, 4, 5]]


def test_many_equal_numbers_rank_by_their_index():
    x = np.random.default_rng(0).integers(0, 4, 5000)
    want = sorted(range(5000), key=lambda j: (-x[j], j))
    for kind in KINDS.values():
        y = kind(x.astype(np.float32))
        assert np.argsort(to_numpy(rank(namespace(x=y), y))).tolist() == want


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"query": np.zeros((1, 4, 3, 8), int)}, "query: has type int64, expected floats; convert it"),
        ({"key": np.zeros((1, 3, 5, 8))}, "key: axis heads is 3 and must divide query's 4 (grouped-query attention)"),
        ({"key": np.zeros((1, 2, 2, 8))}, "query: has 3 queries, more than the 2 keys; queries are the last places"),
        ({"key": np.zeros((1, 2, 5, 7))}, "key: shape is (1, 2, 5, 7), expected (1, heads, keys, 8), each at least 1"),
        ({"value": np.zeros((1, 2, 4, 3))}, "value: shape is (1, 2, 4, 3), expected (1, 2, 5, dim), each at least 1"),
        ({"key": torch.zeros(1, 2, 5, 8)}, "key: is an array of torch, expected numpy's, as query is"),
    ],
)
def test_wrong_calls(change, text):
    good = {"query": np.zeros((1, 4, 3, 8)), "key": np.zeros((1, 2, 5, 8)), "value": np.zeros((1, 2, 5, 3))}
    attended(**good)
    with pytest.raises(InvalidInput, match=re.escape(text)):
        attended(**{**good, **change})
