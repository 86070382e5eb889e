"""What a reply must be like, as far as a client can tell without computing it: a wrong one is not believed."""

# ruff: noqa: D102 (the methods of arithmetics are described once, in arithmetic.py)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from .arithmetic import Arithmetic
from .call import Call
from .device.chain import chain_of
from .noise import Ring
from .structure import check_ciphertext

__all__ = ["Size", "Sizes", "check_out", "check_reply"]

NOT_BELIEVED = "the server computed something else, or the reply was changed on its way; do not use it"


@dataclass(frozen=True)
class Size:
    """A ciphertext without its numbers: what they are multiplied with, and the primes left."""

    scale: float
    limbs: int


class Sizes(Arithmetic):
    """The arithmetic of scales, as SEAL reckons them.

    Parameters
    ----------
    ring : Ring
        The chain; its primes are near 2**middle, not equal to it.
    """

    def __init__(self, ring: Ring) -> None:
        self.ring = ring

    def mul(self, a: Size, b: Size) -> Size:
        return Size(a.scale * b.scale, min(a.limbs, b.limbs))

    def square(self, a: Size) -> Size:
        return self.mul(a, a)

    def add(self, a: Size, b: Size) -> Size:
        return Size(a.scale, min(a.limbs, b.limbs))

    def add_constant(self, a: Size, c: float) -> Size:
        return a

    def negate(self, a: Size) -> Size:
        return a

    def times_constant(self, a: Size, c: float) -> Size:
        return self.square(a)

    def relinearize(self, a: Size) -> Size:
        return a

    def rescale(self, a: Size) -> Size:
        return Size(a.scale / chain_of(self.ring).primes[a.limbs - 1], a.limbs - 1)

    def rotate(self, a: Size, k: int) -> Size:
        return a

    def conjugate(self, a: Size) -> Size:
        return a

    def times(self, a: Size, plain: Any) -> Size:
        return Size(a.scale * (plain.scale or a.scale), a.limbs)

    def plus(self, a: Size, plain: Any) -> Size:
        return a

    def like(self, a: Size, b: Size) -> Size:
        return b


def check_reply(plan: Any, found: Sequence[Any]) -> None:
    """Refuse a reply's ciphertexts whose structure, level or scale are not those of the plan's result.

    Parameters
    ----------
    plan : Plan or LayerPlan
        What was asked. Of a layer, whose program the client does not know, the scale is known within a factor of 2, of
        an encoder within the plan's ``drift``.
    found : sequence of Ciphertext
        What SEAL loaded.

    Raises
    ------
    InvalidInput
        One is of another structure.
    """
    wanted: list[tuple[int, float | None]] = [(1, None)]
    if isinstance(plan, Call):
        wanted = [(x.limbs, x.scale) for x in sizes_of(plan)]
    wanted *= len(found) // len(wanted)
    for x, (limbs, scale) in zip(found, wanted, strict=True):
        check_ciphertext("a ciphertext of the reply", x, plan.ring, limbs, scale, getattr(plan, "drift", (2.0, 2.0))[1])


def check_out(plan: Any, out: NDArray[np.float64]) -> None:
    """Refuse a result that no input of the plan has.

    Parameters
    ----------
    plan : Plan or LayerPlan
        What was asked. A mean of values is not larger than the largest of them, a sum by sigmoids not larger than all
        keys' together; of a layer nothing is known but that results are numbers.
    out : array
        What was decrypted.

    Raises
    ------
    InvalidInput
        An element is not finite, or beyond what the plan allows.
    """
    if not np.isfinite(out).all():
        raise InvalidInput(f"he: got a reply with numbers that are not finite; {NOT_BELIEVED}")
    largest = float(np.abs(out).max(initial=0.0))
    if isinstance(plan, Call) and largest > plan.out_most + plan.error:
        raise InvalidInput(
            f"he: got a reply with {largest:.4g}, expected at most the plan's {plan.out_most:.4g} and its error of "
            f"{plan.error:.2g}; {NOT_BELIEVED}"
        )


def sizes_of(plan: Any) -> list[Size]:
    """Return scale and level of each ciphertext of a block's result."""
    fresh = Size(2.0**plan.ring.middle, plan.ring.levels + 1)
    shared = plan.layout.shared_parts
    values = [Size(fresh.scale, plan.value_limbs)] * shared
    return list(plan.compute(Sizes(plan.ring), [fresh] * shared + values, [fresh] * plan.layout.query_parts))
