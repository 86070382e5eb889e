"""Which keys an output's errors come from: the weights' errors by tile of keys that explain them best."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...exact.answer import Answer
from ...exact.heads import heads
from ..bounds.forward import head_losses
from ..model import Model
from .statistics import bands

__all__ = ["weights_off"]

Float = NDArray[np.float64]
EXPLAINED = 0.9
"""The share of the errors' squares that the tiles must explain to be named."""
LEAST = 0.25
MOST = 64
TIMES = 2
"""Elements to each unknown, at least: as many unknowns as elements explain anything."""
NAMED = 3
"""Runs of tiles that are named at most: more are no explanation."""
ELEMENTS = 1 << 14
"""About how many elements the errors are explained of: the rows with the largest; the unknowns are 64."""


def weights_off(answer: Answer, got: NDArray[np.generic]) -> tuple[str, ...]:
    """Say which tiles of keys weigh too much or too little, where that explains the errors of out.

    If the weights of tile t are (1 + eps_t) times what they should be, out is x with x - o = sum_t eps_t sum_{j in t}
    p_ij (v_j - x) (v_j alone where there is no denominator): eps by least squares, over the rows of all heads whose
    errors are largest.

    Parameters
    ----------
    answer : Answer
        The exact answer.
    got : (b, h_q, n_q, d_v) array
        What the kernel returned.
    """
    p, exact = answer.call.to("numpy"), answer.enclosures["out"].mid
    if p.out_scale is not None:
        return ()
    tiles = bands(p.n_k, MOST)
    gram, right, energy, equations = np.zeros((len(tiles), len(tiles))), np.zeros(len(tiles)), 0.0, 0
    x, shared = np.asarray(got).astype(np.float64), False
    with np.errstate(invalid="ignore"):  # inf where inf is right
        chosen = _largest(x - exact)
    for one in heads(p):
        at = (one.batch, one.head, one.rows)
        if not chosen[at].any():
            continue
        with np.errstate(all="ignore"):
            head = head_losses(one, slice(None), Model())
            shared, weights = head.divides, head.shares
            error = x[at] - exact[at]
        if weights.shape[1] != len(one.k):  # the last weights are of other values than the keys'
            return ()
        live = chosen[at]
        error, weights, out = error[live], weights[live], x[at][live]
        size = np.abs(error).max(initial=0.0)
        if not size:
            continue
        moved, equations = [], equations + error.size
        for t in tiles:  # a sequence's keys are some of all
            j = slice(max(t.start, one.keys.start) - one.keys.start, max(0, t.stop - one.keys.start))
            part = weights[:, j]
            moved.append((part @ one.v[j] - (out * part.sum(1)[:, None] if shared else 0)).ravel() / size)
        a = np.array(moved)
        gram, right, energy = gram + a @ a.T, right + a @ (error.ravel() / size), energy + (error**2).sum() / size**2
    if not energy or not np.isfinite(gram).all() or equations < TIMES * len(tiles):
        return ()
    eps = np.asarray(np.linalg.lstsq(gram, right, rcond=1e-9)[0], np.float64)
    if 2 * right @ eps - eps @ gram @ eps < EXPLAINED * energy:
        return ()
    if shared and np.median(1 + eps) > 0:  # by the denominator, all weights may be larger alike
        eps = np.asarray((1 + eps) / np.median(1 + eps) - 1)
    runs = _runs(tiles, eps)
    if len(runs) > NAMED or any(by < -1 - LEAST for _, _, by in runs):  # no weights are below 0
        return ()
    return tuple(
        f"as if the weights of keys {a} to {b} were {abs(by):.0%} too {'large' if by > 0 else 'small'}"
        for a, b, by in runs
    )


def _largest(error: Float) -> NDArray[np.bool_]:
    """Return which rows, (b, h, n), have the largest finite errors."""
    sizes = np.abs(error).max(-1, initial=0.0)
    sizes[~np.isfinite(sizes)] = -1.0
    count = max(MOST, ELEMENTS // error.shape[-1])
    least = np.partition(sizes, -count, axis=None)[-count] if sizes.size > count else 0.0
    return np.asarray(sizes >= max(least, 0.0))


def _runs(tiles: list[range], eps: Float) -> list[tuple[int, int, float]]:
    """Return first and last key and error of runs of tiles whose weights are off alike, unless they are all."""
    off = [i for i, x in enumerate(eps) if abs(x) >= LEAST]
    if len(off) > len(tiles) // 2:
        return []
    found: list[tuple[int, int, float]] = []
    for i in off:
        if found and found[-1][1] == tiles[i].start - 1 and abs(found[-1][2] - eps[i]) < LEAST:
            found[-1] = (found[-1][0], tiles[i].stop - 1, found[-1][2])
        else:
            found.append((tiles[i].start, tiles[i].stop - 1, float(eps[i])))
    return found
