"""Match3: is there a pair of tokens that completes a token to a multiple of M? One triple-wise layer answers exactly.

Sanford, Hsu and Telgarsky (arXiv 2306.02896; its abstract was read): a pairwise layer needs width times heads times
bits in proportion to N/loglog N for it, one triple-wise head a constant width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from .stream import attention

__all__ = ["labels", "layer", "solve"]

Float = NDArray[np.float64]


def labels(x: Any, modulus: int) -> NDArray[np.bool_]:
    """Return for each token whether x_i + x_j + x_k is 0 modulo M for some j and k (any, also equal ones).

    Parameters
    ----------
    x : (N,) int array
        The tokens, from 0 to M - 1.
    modulus : int
        M.
    """
    x = _checked(x, modulus)
    sums = np.unique((x[:, None] + x[None, :]) % modulus)
    return np.isin((-x) % modulus, sums)


def layer(x: Any, modulus: int) -> tuple[Float, ...]:
    """Return query, k1, k2, v1, v2 of the trilinear layer that answers: d = 5, scale 1, a dummy token last.

    cos(a + b + c) is a sum of four products, so the logit of a pair is beta·cos(2·pi·(x_i + x_j + x_k)/M), largest
    where the sum is 0; the dummy's pair has a logit halfway to the next smaller cosine. beta makes one match outweigh
    all that is not: 2·log(10·N**2) / (1 - cos(2·pi/M)).

    Parameters
    ----------
    x, modulus
        As in `labels`.

    Returns
    -------
    query (1, 1, N, 5), k1, k2 (1, 1, N + 1, 5), v1, v2 (1, 1, N + 1, 1) arrays
    """
    x = _checked(x, modulus)
    n, step = len(x), 2 * math.pi / modulus
    # 1 - cos(step) without cancellation
    gap = 2 * math.sin(step / 2) ** 2
    beta = 2 * math.log(10 * n**2) / gap
    c, s, one = np.cos(step * x), np.sin(step * x), np.ones(n)
    query = beta * np.stack([c, -c, -s, -s, one], 1)
    k1, k2 = np.stack([c, s, s, c, 0 * one], 1), np.stack([c, s, c, s, 0 * one], 1)
    dummy = np.array([[0, 0, 0, 0, 1.0]])
    k1, k2 = np.concatenate([k1, dummy]), np.concatenate([k2, dummy * (1 - gap / 2)])
    value = np.concatenate([one, [0.0]])[:, None]
    return tuple(a[None, None] for a in (query, k1, k2, value, value))


def solve(x: Any, modulus: int) -> Float:
    """Return the layer's output for each token: above 1/2 where a pair completes it.

    Parameters
    ----------
    x, modulus
        As in `labels`.
    """
    return np.asarray(attention(*layer(x, modulus), scale=1.0)[0, 0, :, 0])


def _checked(x: Any, modulus: int) -> NDArray[np.int64]:
    x = np.asarray(x)
    if x.ndim != 1 or len(x) < 1 or x.dtype.kind not in "iu":
        raise InvalidInput("match3: expected one axis of integers")
    if modulus < 2 or x.min() < 0 or x.max() >= modulus:
        raise InvalidInput(f"match3: expected tokens from 0 to {modulus - 1} and a modulus of at least 2")
    return np.asarray(x, np.int64)
