"""Match3 by one triple-wise layer, exactly; and that the layer needs its third argument."""

import numpy as np
import pytest

from refattn import InvalidInput, tensor
from refattn.tensor import match3


def brute(x, m):
    return np.array([any((a + b + c) % m == 0 for b in x for c in x) for a in x])


@pytest.mark.parametrize(("n", "m"), [(4, 2), (7, 23), (12, 64), (16, 128)])
def test_labels_are_the_rule(n, m):
    rng = np.random.default_rng(0)
    for _ in range(5):
        x = rng.integers(0, m, n)
        np.testing.assert_array_equal(match3.labels(x, m), brute(x, m))


@pytest.mark.parametrize(("n", "m"), [(4, 5), (16, 128), (64, 1021), (128, 8191)])
def test_one_layer_is_right_everywhere(n, m):
    rng = np.random.default_rng(1)
    seen = set()
    for seed in range(4):
        x = rng.integers(0, m, n)
        if seed % 2:  # so few values that some tokens have no match
            x = rng.integers(1, max(2, m // 3), n)
        out, label = match3.solve(x, m), match3.labels(x, m)
        assert np.abs(out - label).max() < 0.1
        seen |= set(label.tolist())
    assert seen == {False, True}


def test_the_control_fails():
    """The layer without the third argument (all k2 alike) answers wrongly somewhere."""
    rng = np.random.default_rng(2)
    x = rng.integers(0, 128, 16)
    q, k1, k2, v1, v2 = match3.layer(x, 128)
    k2 = np.broadcast_to(k2[:, :, :1], k2.shape).copy()
    out = tensor.attention(q, k1, k2, v1, v2, scale=1.0)[0, 0, :, 0]
    assert ((out > 0.5) != match3.labels(x, 128)).any()


def test_bad_tokens_are_refused():
    with pytest.raises(InvalidInput, match="expected one axis of integers"):
        match3.labels(np.array([0.5]), 3)
    with pytest.raises(InvalidInput, match="expected tokens from 0 to 2"):
        match3.solve(np.array([3]), 3)
