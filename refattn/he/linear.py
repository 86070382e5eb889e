"""Linear maps with known weights on encrypted features: which rotations, and which numbers in which slots.

Features lie in slots in any way that two arrays tell: for each slot, the token and the feature that it holds (-1: not
to be used). A map from some ciphertexts to another arrangement is sum_g rot_g(sum_b P_gb · rot_b(x)), with baby steps b
of the inputs and giant steps g of the sums. Each product of a weight and a feature that a result needs is put into the
first term that has them in one slot; that all are found is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedProblem

__all__ = ["Arrangement", "Map", "Plain", "compiled"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Plain:
    """Numbers in slots that the server knows; equal only to itself, as what is encoded of it is kept by it.

    Attributes
    ----------
    slots : (slots,) array
        The numbers; where noise is bounded, their largest size.
    scale : float or None
        What they are multiplied with in a product; None for the scale of the ciphertext that they meet.
    """

    slots: NDArray[np.complex128]
    scale: float | None = None


@dataclass(frozen=True)
class Arrangement:
    """What a ciphertext's slots hold.

    Attributes
    ----------
    token, feature : (slots,) int arrays
        -1 where a slot is not to be used.
    """

    token: Ints
    feature: Ints


@dataclass(frozen=True)
class Map:
    """A compiled map.

    Attributes
    ----------
    baby, giant : int
        The unit steps, in slots.
    babies : int
        How many baby steps of each input: 0, ..., babies - 1 times the unit.
    terms : tuple
        For each giant step, (input, baby step, Plain), ...
    """

    baby: int
    giant: int
    babies: int
    terms: tuple[tuple[tuple[int, int, Plain], ...], ...]

    def apply(self, m: Any, inputs: Sequence[Any]) -> Any:
        """Return the result by an arithmetic: one level.

        Rotations are by the units only, one after another (Horner), so that two keys serve them all.
        """
        turned = [[x] for x in inputs]
        for xs in turned:
            for _ in range(1, self.babies):
                xs.append(m.rotate(xs[-1], self.baby))
        total = None
        for terms in reversed(self.terms):
            if total is not None:
                total = m.rotate(total, self.giant)
            part = None
            for source, b, plain in terms:
                x = m.times(turned[source][b], plain)
                part = x if part is None else m.add(part, x)
            if part is not None:
                part = m.rescale(part)
                total = part if total is None else m.add(total, part)
        return total


def compiled(
    inputs: Sequence[Arrangement],
    out: Arrangement,
    key: Ints,
    weights: NDArray[np.complex128],
    steps: tuple[tuple[int, int], tuple[int, int]],
) -> Map:
    """Return a map.

    Parameters
    ----------
    inputs : sequence of Arrangement
        Of each ciphertext.
    out : Arrangement
        ``token`` of the slots of the result; ``feature`` names the output there.
    key : (slots,) int array
        Slots of the same key are added up later: together they hold the output.
    weights : (features, outputs) complex array
        The map.
    steps : ((baby, babies), (giant, giants))
        Unit steps and how many of each, the zeroth included.

    Raises
    ------
    UnsupportedProblem
        Some product is in no term.
    """
    (baby, babies), (giant, giants) = steps
    slots, features = np.arange(len(key)), len(weights)
    wanted = out.feature >= 0
    done = np.zeros((int(key.max()) + 1, features), bool)
    terms = []
    for g in range(giants):
        row = []
        for b in range(babies):
            for source, x in enumerate(inputs):
                at = (slots + g * giant + b * baby) % len(key)
                feature = x.feature[at]
                good = wanted & (feature >= 0) & (x.token[at] == out.token)
                good[good] &= ~done[key[good], feature[good]]
                good &= _once(key * features + feature, good)
                if not good.any():
                    continue
                done[key[good], feature[good]] = True
                plain = np.zeros(len(key), np.complex128)
                plain[(slots[good] + g * giant) % len(key)] = weights[feature[good], out.feature[good]]
                if plain.any():  # SEAL refuses to multiply with zeros: the result would be no secret
                    row.append((source, b, Plain(plain)))
        terms.append(tuple(row))
    if not done[np.unique(key[wanted])].all():
        raise UnsupportedProblem("he: the rotations do not bring all features together")
    while terms and not terms[-1]:
        terms.pop()
    if not terms:
        raise UnsupportedProblem("he: a linear map is zero everywhere")
    return Map(baby, giant, babies, tuple(terms))


def _once(value: Ints, good: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return where a value is there for the first time, among the good ones."""
    out = np.zeros(len(value), bool)
    at = np.flatnonzero(good)
    out[at[np.unique(value[at], return_index=True)[1]]] = True
    return out
