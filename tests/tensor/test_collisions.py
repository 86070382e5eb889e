"""Inputs that a pairwise layer cannot tell apart: opposite labels, and the outputs are what the layer gives."""

import numpy as np
import pytest

from refattn import InvalidInput, softmax_attention, tensor
from refattn.tensor.match3 import labels, solve

UNIVERSE = 12
TOKENS = 8 * UNIVERSE + 7


def layer(heads, width, seed=0):
    rng = np.random.default_rng(seed)
    e = rng.standard_normal((TOKENS, 16)) / 4
    q, k = rng.standard_normal((2, heads, 16, 8))
    return e, q, k, rng.standard_normal((heads, 16, width))


@pytest.mark.parametrize(("heads", "width"), [(1, 1), (1, 2), (2, 2)])
def test_a_collision_is_one(heads, width):
    e, q, k, v = layer(heads, width)
    query, keys, values = e[1] @ q, e @ k, e @ v  # (H, 8), (H, M, 8), (H, M, m)
    found = tensor.collide(np.einsum("hc,hmc->hm", query, keys) / 8**0.5, values, universe=UNIVERSE)
    assert found.labels[0] != found.labels[1]
    for x, label, out in zip(found.inputs, found.labels, found.outputs, strict=True):
        assert bool(labels(x, TOKENS)[0]) is label
        assert (solve(x, TOKENS)[0] > 0.5) == label  # one triple-wise layer can tell
        expected = softmax_attention(query[None, :, None], keys[None][:, :, x], values[None][:, :, x])
        np.testing.assert_allclose(out, expected[0, :, 0], atol=1e-12)
    # 2**12 points in H·(m + 1) dimensions: as near as that many are, not more than their spread over the side's count
    assert found.difference < 2 ** (1 - UNIVERSE / (heads * (width + 1))) * np.ptp(values)


def test_what_cannot_collide_is_refused():
    with pytest.raises(InvalidInput, match=r"collide: got scores \(3,\) and values \(3, 1\), expected"):
        tensor.collide(np.zeros(3), np.zeros((3, 1)))
    with pytest.raises(InvalidInput, match="got a universe of 14 and 100 tokens, expected 2 to 16 and at least 119"):
        tensor.collide(np.zeros((1, 100)), np.zeros((1, 100, 1)))
