"""What a received ciphertext or key must be before anything computes with it: SEAL trusts what it has loaded.

SEAL checks that an object is of its context, not that it is the one that a computation needs: Galois keys where
relinearisation keys belong, or a key with too few digits, make it read past an array's end.
"""

from __future__ import annotations

from typing import Any

from ..errors import InvalidInput
from .noise import Ring
from .seal import context, galois_elements

__all__ = ["check_ciphertext", "check_keys"]


def check_keys(ring: Ring, rotations: tuple[int, ...], relin: Any, galois: Any) -> None:
    """Refuse keys that are not all that a plan's computation needs, and nothing else.

    Raises
    ------
    InvalidInput
        They are for other elements, or of another structure.
    """
    elements = galois_elements(ring, rotations)
    for name, keys, wanted in (
        ("relinearisation keys", relin, [2]),  # the power of the secret key that they bring back to the first
        ("rotation keys", galois, sorted(set(elements))),
    ):
        if keys.size() != len(wanted) or keys.parms_id() != context(ring).key_parms_id():
            raise InvalidInput(
                f"he: got {keys.size()} {name}, expected the plan's {len(wanted)}; make them by its client"
            )
        for element in wanted:
            if not keys.has_key(element):
                raise InvalidInput(f"he: got {name} without that of {element}; make them by the plan's client")
            digits = keys.key(element)
            if len(digits) != ring.levels + 1:
                raise InvalidInput(f"he: got {name} of {len(digits)} digits, expected {ring.levels + 1}")
            for digit in digits:
                _check(f"a digit of the {name}", digit.data(), ring, ring.levels + 2, None)


def check_ciphertext(
    what: str, x: Any, ring: Ring, limbs: int | None, scale: float | None, within: float = 2.0
) -> None:
    """Refuse a ciphertext that is not as a plan says.

    Parameters
    ----------
    what : str
        What to call it in an error.
    x : Ciphertext
        What SEAL loaded.
    ring : Ring
        The plan's.
    limbs : int or None
        Primes that it must have left, where that is known.
    scale : float or None
        What its numbers must be multiplied with, to nine digits; None where only its size is known.
    within : float
        How near the ring's it must be then: within this factor.

    Raises
    ------
    InvalidInput
        It is not so.
    """
    _check(what, x, ring, limbs, scale)
    low, high = (1 / within, within) if scale is None else (1 - 1e-9, 1 + 1e-9)
    wanted = 2.0**ring.middle if scale is None else scale
    if not low <= x.scale / wanted <= high:  # NaN, too
        raise InvalidInput(
            f"he: got {what} of scale {x.scale:.6g}, expected {wanted:.6g}; it was not made by this plan"
        )


def _check(what: str, x: Any, ring: Ring, limbs: int | None, scale: float | None) -> None:
    found = {
        "polynomials": (x.size(), 2),
        "coefficients": (x.poly_modulus_degree(), ring.degree),
        "primes": (x.coeff_modulus_size(), limbs),
        "form for products": (x.is_ntt_form(), True),
    }
    for name, (got, expected) in found.items():
        if expected is not None and got != expected:
            raise InvalidInput(f"he: got {what} with {name}: {got}, expected {expected}; it was not made by this plan")
