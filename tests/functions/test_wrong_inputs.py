"""Wrong inputs of functions: an error of the package that names the argument, never Python's or NumPy's own."""

import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.functions import (
    alignment,
    budgets,
    clusters,
    combiner,
    crate,
    dense,
    eviction,
    gates,
    hashing,
    hyper,
    native,
)

NAN, INF = np.float32(np.nan), np.float32(np.inf)
X, CODES = np.ones((3, 4), np.float32), np.ones((2, 3, 4))
EYE, BUDGET = np.eye(4, dtype=np.float32), np.ones((1, 2), int)
VALUES, BIAS = np.ones((2, 3, 5)), np.ones((2, 1, 5))
Q = torch.ones(1, 2, 4, 4)
CACHE = np.ones((2, 1, 1, 5, 2), np.float32)


def with_one(shape, at, number):
    """Return scores 0, 1, 2 and so on of a shape, one of which is another number."""
    found = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    found[at] = number
    return found


def regions(scale):
    return combiner.combiner_attention(*(np.ones((1, 1, 4, 2)) for _ in range(3)), block=2, scale=scale)


SEEN = (0, 0, 2, 1)
CALLS = {
    "softmax of a list": (lambda: dense.masked_softmax([1.0]), "scores: got list"),
    "softmax of a number": (lambda: dense.masked_softmax(np.array(1.0)), "scores: shape is ()"),
    "softmax, another mask": (lambda: dense.masked_softmax(X, np.ones((2, 4), bool)), "allowed's (2, 4)"),
    "softmax, no mask": (lambda: dense.masked_softmax(X, np.ones((3, 0), bool)), "allowed's (3, 0)"),
    "norm of a number": (lambda: dense.layer_norm(np.array(1.0), 0.1), "x: shape is ()"),
    "norm, text": (lambda: dense.layer_norm(X, "a"), "epsilon: got 'a'"),
    "step of no tokens": (lambda: crate.ista_step(X[:0], X, EYE, 0.1, 0.1), "z: shape is (3, 4)"),
    "step of a number": (lambda: crate.ista_step(np.array(1.0), X, EYE, 0.1, 0.1), "z: shape is (3, 4)"),
    "step, no rate": (lambda: crate.ista_step(X, X, EYE, None, 0.1), "eta: got None"),
    "step, text": (lambda: crate.ista_step(X, X, EYE, 0.1, "a"), "weight: got 'a'"),
    "codes, a list": (lambda: hashing.code_weights(CODES.tolist(), CODES), "h: got list"),
    "codes of others": (lambda: hashing.code_weights(CODES, CODES[:1]), "g: shape is (1, 3, 4)"),
    "codes of a number": (lambda: hashing.code_weights(np.array(1.0), CODES), "g: shape is (2, 3, 4)"),
    "sums, few values": (lambda: hashing.linear_sums(CODES, CODES, VALUES[:, :2], BIAS), "value: shape is (2, 2, 5)"),
    "sums, other bias": (lambda: hashing.linear_sums(CODES, CODES, VALUES, BIAS[:0]), "of_bias: shape is (0, 1, 5)"),
    "sums, no bias": (lambda: hashing.linear_sums(CODES, CODES, VALUES, None), "of_bias: got NoneType"),
    "hash of a number": (lambda: hyper.angular_hash(np.array(1.0), X), "x: has no axes"),
    "streams, no values": (lambda: alignment.ssa_streams(Q, Q, None, Q[..., :1], Q > 0), "value: got NoneType"),
    "gate, no base": (lambda: gates.seer_gate(Q, Q, Q[0], torch.ones(2, 12, 4), block=2, base=None), "base: got None"),
    "regions, text": (lambda: regions("a"), "scale: got 'a'"),
    "blocks, NaN": (lambda: budgets.proxy_block_mask(with_one((1, 1, 3, 3), SEEN, NAN), BUDGET), "scores: holds NaN"),
    "blocks, inf": (lambda: budgets.proxy_block_mask(with_one((1, 1, 3, 3), SEEN, INF), BUDGET), "scores: holds inf"),
    "cache, NaN": (
        lambda: eviction.evict(*CACHE, with_one((1, 1, 4), (0, 0, 1), NAN), capacity=3),
        "scores: holds NaN",
    ),
    "select, NaN": (
        lambda: eviction.specpc_select(with_one((1, 9), (0, 2), NAN), capacity=3, window=1),
        "scores: holds",
    ),
    "gates, NaN": (lambda: gates.seer_select(with_one((1, 1, 3, 3), SEEN, NAN), ratio=0.5), "gate: holds NaN"),
    "members, NaN": (lambda: clusters.members_of(with_one((4, 2), (1, 1), NAN), 2), "scores: holds NaN"),
    "indexer, NaN": (lambda: native.indexer_select(with_one((1, 3, 3), (0, 2, 1), NAN), topk=1), "scores: holds NaN"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_input_is_named(name):
    call, said = CALLS[name]
    with pytest.raises(InvalidInput) as e:
        call()
    assert said in str(e.value)


def test_infinite_scores_come_first_and_last():
    scores = np.float32([[0.5, -np.inf, 2.0, np.inf]]).T
    assert clusters.members_of(scores, 4).tolist() == [[3, 2, 0, 1]]
    kept = eviction.evict(*CACHE[..., :4, :], scores.T[None], capacity=2)[2]
    assert kept.tolist() == [[[3, 2]]]
    seen = native.indexer_select(np.float32([[[0, 0, 0], [0, 0, 0], [1, np.inf, -np.inf]]]), topk=2)
    assert seen[0, 2].tolist() == [True, True, False]


def test_hidden_scores_may_be_anything():
    scores = with_one((1, 1, 3, 3), (0, 0, 0, 2), NAN)
    assert gates.seer_select(scores, ratio=1.0)[0, 0].tolist() == np.tri(3, dtype=bool).tolist()
    assert budgets.proxy_block_mask(scores, 3 * BUDGET)[0, 0].tolist() == np.tri(3, dtype=bool).tolist()
