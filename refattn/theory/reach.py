"""Which tokens a stack of masked layers can hear: for a mask for each layer, and for PowerAttention's offsets."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from ..functions.arguments import integers, whole
from ..rules import Rule
from .claim import Claim, Evidence, needs, total

__all__ = ["CLAIMS", "of_layers", "of_mask", "of_offsets"]

LAYERS, TOKENS = 10**6, 2**16
"""The most that are taken: masks are n x n."""


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
    if seen.ndim != 2 or seen.shape[0] != seen.shape[1] or seen.dtype != bool:
        raise InvalidInput(f"reach: got {seen.dtype} {seen.shape}, expected (n, n) bools")
    return of_layers(itertools.repeat(seen, whole("layers", layers, 0, LAYERS)), len(seen))


def of_layers(masks: Iterable[Any], n: int) -> NDArray[np.bool_]:
    """Return which tokens each token hears after layers with masks of their own, with residuals.

    A hybrid of windows and full layers, say: ``of_layers([causal() & window(3, 0)] * 5 + [causal()], n)``.

    Parameters
    ----------
    masks : (n, n) bool arrays or rules of ``refattn.rules``
        By layer, the first one first: whether token i attends to token j. A rule is the same for all items and heads.
    n : int
        How many tokens.

    Returns
    -------
    (n, n) bool array

    Raises
    ------
    InvalidInput
        A mask of another shape or type, or one of several items or heads; its layer is named.
    """
    if not isinstance(masks, Iterable):
        raise InvalidInput(f"masks: got {type(masks).__name__}, expected a list of masks, one for each layer")
    n = whole("n", n, 0, TOKENS)
    heard, own = np.eye(n, dtype=bool), np.eye(n, dtype=bool)
    for layer, mask in enumerate(masks):
        if isinstance(mask, Rule) and (mask.batches, mask.heads) != (1, 1):
            raise InvalidInput(
                f"reach: layer {layer} is made for {mask.batches} items and {mask.heads} heads, expected one of each"
            )
        seen = mask.dense(n, n) if isinstance(mask, Rule) else np.asarray(mask)
        if seen.shape != (n, n) or seen.dtype != bool:
            raise InvalidInput(f"reach: got {seen.dtype} {seen.shape} at layer {layer}, expected ({n}, {n}) bools")
        heard = (seen | own).astype(np.float32) @ heard.astype(np.float32) > 0
    return heard


def of_offsets(offsets: Any, n: int) -> NDArray[np.bool_]:
    """Return the causal mask in which token i attends to i - o for each offset o.

    Raises
    ------
    InvalidInput
        No array of integers, or no number of tokens.
    """
    n, back = whole("n", n, 0, TOKENS), integers("offsets", offsets)
    return np.isin(np.arange(n)[:, None] - np.arange(n), back)


def _contiguous(offsets: list[int], layers: int, n: int) -> int:
    heard = of_mask(of_offsets(offsets, n), layers)[-1][::-1]
    return n if heard.all() else int(np.argmin(heard))


def power(layers: tuple[int, ...] = (1, 2, 3, 4, 5, 6), n: int = 150) -> Evidence:
    """Offsets 0, 1, 2, 4, ...: after L layers the last 2**(L + 1) - 1 tokens are heard, and the next is not."""
    needs(2 ** (max(layers) + 1) <= n, f"at most log2(n) - 1 layers: the range of {max(layers)} is longer than n = {n}")
    offsets = [0, *(2**i for i in range(n.bit_length()))]
    found = [_contiguous(offsets, count, n) for count in layers]
    away = max(abs(f - (2 ** (count + 1) - 1)) for f, count in zip(found, layers, strict=True))
    return Evidence(away, 0, "tokens from 2^(L+1) - 1", {"layers": list(layers), "heard": found})


def window() -> Evidence:
    """A window of as many tokens: its range is linear in the layers."""
    n, layers = 150, (1, 4, 6)
    found = [_contiguous(list(range(10)), count, n) for count in layers]
    away = max(abs(f - (2 ** (c + 1) - 1)) for f, c in zip(found, layers, strict=True))
    return Evidence(away, 0, "tokens from 2^(L+1) - 1, a window of 10", {"heard": found})


def _paths(mask: NDArray[np.bool_], layers: int) -> NDArray[np.bool_]:
    """Return what each token hears by following its paths, token by token."""
    found = np.zeros_like(mask)
    for i in range(len(mask)):
        heard = {i}
        for _ in range(layers):
            heard |= {int(j) for h in heard for j in np.flatnonzero(mask[h])}
        found[i, list(heard)] = True
    return found


def _refused(mask: NDArray[np.bool_]) -> bool:
    try:
        of_mask(mask, 1)
    except InvalidInput:
        return True
    return False


def _blocks(own: bool, what: str, sizes: tuple[int, ...] = (2, 3, 5)) -> Evidence:
    """Compare the reach of masks of whole blocks with the reach among blocks, and with paths."""
    wrong = [int(not _refused(np.ones((2, 3), bool)))]
    for seed, size in enumerate(sizes):
        blocks = np.tril(np.random.default_rng(seed).integers(4, size=(7, 7)) == 0, -1)
        np.fill_diagonal(blocks, own)
        mask = np.kron(blocks, np.ones((size, size), bool))
        for layers in range(4):
            among = (
                np.kron(of_mask(blocks, layers), np.ones((size, size), bool))
                if layers
                else np.eye(7 * size, dtype=bool)
            )
            heard = of_mask(mask, layers)
            wrong += [int((among != heard).sum()), int((_paths(mask, layers) != heard).sum())]
    return Evidence(total(*wrong), 0, what)


def blocks(own: bool = True) -> Evidence:
    """Block masks with whole blocks on the diagonal: the reach of tokens is the reach of their blocks."""
    needs(own, "every block attends to itself")
    return _blocks(True, "pairs of tokens whose reach differs from their blocks'")


def blocks_alone() -> Evidence:
    """Blocks that do not attend to themselves: a token then hears only itself of its block."""
    return _blocks(False, "pairs of tokens whose reach differs, blocks that do not attend to themselves")


CLAIMS = [
    Claim(
        "power-attention-reach",
        "With offsets of powers of two, L layers hear a range that doubles with each: 2^(L+1) - 1 tokens",
        "PowerAttention (a summary was read; it says 2^L, the count is ours)",
        power,
        window,
        ("2^(L+1) <= n",),
    ),
    Claim(
        "block-reach",
        "What a token hears after L layers of a block mask is what its block hears in the graph of blocks",
        "derived here",
        blocks,
        blocks_alone,
        ("every block attends to itself",),
    ),
]
