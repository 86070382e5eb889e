"""Which tokens a stack of masked layers can hear: for any mask, and for PowerAttention's offsets."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from .claim import Claim, Evidence, needs

__all__ = ["CLAIMS", "of_mask", "of_offsets"]


def of_mask(mask: Any, layers: int) -> NDArray[np.bool_]:
    """Return which tokens each token hears after some layers, with residuals.

    Parameters
    ----------
    mask : (n, n) bool array
        Whether token i attends to token j.
    layers : int
        How many such layers.
    """
    seen = np.asarray(mask)
    if seen.ndim != 2 or seen.shape[0] != seen.shape[1] or seen.dtype != bool or layers < 0:
        raise InvalidInput(f"reach: got {seen.dtype} {seen.shape} and {layers} layers, expected (n, n) bools")
    heard = np.eye(len(seen), dtype=bool)
    step = (seen | heard).astype(np.float32)
    for _ in range(layers):
        heard = step @ heard.astype(np.float32) > 0
    return heard


def of_offsets(offsets: Any, n: int) -> NDArray[np.bool_]:
    """Return the causal mask in which token i attends to i - o for each offset o."""
    at = np.arange(n)[:, None] - np.arange(n)
    return np.isin(at, np.asarray(offsets))


def _contiguous(offsets: list[int], layers: int, n: int) -> int:
    heard = of_mask(of_offsets(offsets, n), layers)[-1][::-1]
    return n if heard.all() else int(np.argmin(heard))


def power(layers: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7), n: int = 300) -> Evidence:
    """Offsets 0, 1, 2, 4, ...: after L layers the last 2**(L + 1) - 1 tokens are heard, and the next is not."""
    needs(2 ** (max(layers) + 1) <= n, f"at most log2(n) - 1 layers: the range of {max(layers)} is longer than n = {n}")
    offsets = [0, *(2**i for i in range(n.bit_length()))]
    found = [_contiguous(offsets, count, n) for count in layers]
    away = max(abs(f - (2 ** (count + 1) - 1)) for f, count in zip(found, layers, strict=True))
    return Evidence(float(away), 0.0, "tokens from 2^(L+1) - 1", {"layers": list(layers), "heard": found})


def window() -> Evidence:
    """A window of as many tokens: its range is linear in the layers."""
    n = 300
    found = [_contiguous(list(range(10)), count, n) for count in (1, 4, 7)]
    away = max(abs(f - (2 ** (c + 1) - 1)) for f, c in zip(found, (1, 4, 7), strict=True))
    return Evidence(float(away), 0.0, "tokens from 2^(L+1) - 1, a window of 10", {"heard": found})


CLAIMS = [
    Claim(
        "power-attention-reach",
        "With offsets of powers of two, L layers hear a range that doubles with each: 2^(L+1) - 1 tokens",
        "PowerAttention (a summary was read; it says 2^L, the count is ours)",
        power,
        window,
        ("2^(L+1) <= n",),
    ),
]
