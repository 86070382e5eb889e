"""What the tests of selectors share: calls, exact probabilities, and how far a format's own may be from them."""

import jax.numpy as jnp
import numpy as np
import torch

import refattn

KINDS = {"numpy": np.asarray, "torch": torch.from_numpy, "jax": jnp.asarray}


def call(seed, h=4, h_kv=2, n_q=12, n_k=12, d=8, d_v=3, b=2, dtype=np.float32):
    """Return query, key and value."""
    rng = np.random.default_rng(seed)
    shapes = (b, h, n_q, d), (b, h_kv, n_k, d), (b, h_kv, n_k, d_v)
    return [rng.normal(size=s).astype(dtype) for s in shapes]


def exact_probabilities(query, key, scale=None, allowed=None):
    """Return causal probabilities, correctly rounded to float64: attention to values that are unit vectors."""
    n = key.shape[2]
    units = np.broadcast_to(np.eye(n), (*key.shape[:2], n, n)).astype(query.dtype)
    return refattn.softmax_attention(
        query, key, units, scale=scale, causal="bottom_right", allowed=allowed, rounding="float64"
    )


def relative_error(query, key, scale=None):
    """Return a bound on the relative error of probabilities that query's format computes.

    A score is a scaled product of d terms: off by (d + 2) eps of the sum of the terms' sizes, at most. Subtracting the
    largest score doubles that and rounds once; exp turns it into a relative error; the sum has the same and n eps.
    9 eps stand for exp's own error twice (at most 4 ulp each) and the division. A factor 1.1 covers terms of second
    order.
    """
    q, k = (np.abs(np.asarray(x, np.float64)) for x in (query, key))
    eps = np.finfo(query.dtype).eps
    scale = 1 / np.sqrt(q.shape[-1]) if scale is None else abs(scale)
    size = scale * np.max(np.repeat(k, q.shape[1] // k.shape[1], 1) @ np.swapaxes(q, 2, 3))
    return 1.1 * eps * (2 * (2 * (q.shape[-1] + 2) + 2) * size + k.shape[2] + 9)
