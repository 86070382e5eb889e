"""Two inputs with opposite Match3 labels that a given small pairwise layer cannot tell apart.

The reduction of Sanford, Hsu and Telgarsky (arXiv 2306.02896; its abstract was read): one half of the tokens says a
set A, the other a set B, and token 0 has the label "A and B meet". What a pairwise layer says of B at token 0 are
H·(m + 1) sums; there are 2**universe sets B, so that two of them have nearly the same sums, and A can be an element
that only one of them has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput, UnsupportedProblem
from .match3 import labels

__all__ = ["Collision", "collide"]

Float = NDArray[np.float64]
MOST, CANDIDATES, ROWS = 16, 64, 64


@dataclass(frozen=True)
class Collision:
    """Two inputs.

    Attributes
    ----------
    inputs : (2, N) int array
        Tokens; token 0 asks.
    labels : (bool, bool)
        Whether two tokens complete token 0 to a multiple of the modulus: one does, one does not.
    outputs : (2, H, m) array
        What the layer gives at token 0.
    difference : float
        The largest of their differences.
    modulus : int
        M.
    """

    inputs: NDArray[np.int64]
    labels: tuple[bool, bool]
    outputs: Float
    difference: float
    modulus: int


def collide(scores: Any, values: Any, *, universe: int = 14) -> Collision:
    """Return two inputs of 2·universe + 1 tokens that a pairwise softmax layer gives nearly the same output for.

    Parameters
    ----------
    scores : (H, M) array
        Of each head: the score of token x for the query of token 1, e.g. (W_q e_1)·(W_k e_x)·scale.
    values : (H, M, m) array
        The value of token x.
    universe : int
        How many elements the sets have to choose from: 2**universe sets are searched. M must be at least
        8·universe + 7.

    Raises
    ------
    InvalidInput
        Shapes or sizes that do not fit together.
    UnsupportedProblem
        None of the nearest sets gives opposite labels.
    """
    scores, values = np.asarray(scores, np.float64), np.asarray(values, np.float64)
    if scores.ndim != 2 or values.shape[:2] != scores.shape or values.ndim != 3:
        raise InvalidInput(
            f"collide: got scores {scores.shape} and values {values.shape}, expected (H, M) and (H, M, m)"
        )
    modulus = scores.shape[1]
    if not 2 <= universe <= MOST or modulus < 8 * universe + 7:
        raise InvalidInput(
            f"collide: got a universe of {universe} and {modulus} tokens, expected 2 to {MOST} and at least "
            f"{8 * universe + 7} tokens"
        )
    weights = np.exp(scores - scores.max(1, keepdims=True))
    sums = np.concatenate([weights[..., None], weights[..., None] * values], 2)  # (H, M, m + 1): what adds up
    of_token = sums.transpose(1, 0, 2).reshape(modulus, -1)
    elements = np.arange(universe)
    first, second = 2 + elements, modulus - 3 - elements  # 1 + first + second = M
    blanks = 5 * universe + 1, 5 * universe + 3
    states = np.zeros((1, of_token.shape[1]))
    for t in elements:  # the sums of all sets, set s having element t where bit t of s is 1
        states = np.concatenate([states, states + of_token[second[t]] - of_token[blanks[1]]])
    distance, near = _nearest(states)
    best: Collision | None = None
    for s in np.argsort(distance)[:CANDIDATES]:
        pair = [(n >> elements & 1).astype(bool) for n in (int(s), int(near[s]))]
        for t in np.flatnonzero(pair[0] != pair[1]):
            left = np.where(elements == t, first, blanks[0])
            inputs = np.array([np.concatenate([[1], left, np.where(b, second, blanks[1])]) for b in pair])
            found = tuple(bool(labels(x, modulus)[0]) for x in inputs)
            if found[0] == found[1]:
                continue
            of_inputs = sums[:, inputs].sum(2)  # (H, 2, m + 1)
            outputs = (of_inputs[..., 1:] / of_inputs[..., :1]).transpose(1, 0, 2)
            difference = float(np.abs(outputs[0] - outputs[1]).max())
            if best is None or difference < best.difference:
                best = Collision(inputs, (found[0], found[1]), outputs, difference, modulus)
    if best is None or not math.isfinite(best.difference):
        raise UnsupportedProblem(f"collide: none of the {CANDIDATES} nearest pairs of sets has opposite labels")
    return best


def _nearest(states: Float) -> tuple[Float, NDArray[np.int64]]:
    """Return the squared distance of each state to the nearest other one, and which that is."""
    distance, near = np.empty(len(states)), np.empty(len(states), np.int64)
    for i in range(0, len(states), ROWS):
        rows = np.arange(i, min(i + ROWS, len(states)))
        apart = np.asarray(sum((states[rows, c, None] - states[:, c]) ** 2 for c in range(states.shape[1])))
        apart[rows - i, rows] = np.inf
        near[rows] = apart.argmin(1)
        distance[rows] = apart.min(1)
    return distance, near
