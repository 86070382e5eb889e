"""What each operator is: one file an operator, one row in the table VARIANTS."""

from __future__ import annotations

from ..errors import InvalidInput
from .linear import LINEAR
from .power import POWER
from .sigmoid import SIGMOID
from .softmax import SOFTMAX
from .variant import Option, Variant

__all__ = ["VARIANTS", "Option", "Variant", "variant_of"]

VARIANTS: dict[str, Variant] = {v.name: v for v in (SOFTMAX, LINEAR, POWER, SIGMOID)}
"""The operators that refattn knows, by name."""


def variant_of(name: str) -> Variant:
    """Return the operator of that name.

    Raises
    ------
    InvalidInput
        There is none.
    """
    if name not in VARIANTS:
        raise InvalidInput(f"variant: got {name!r}, expected one of {', '.join(VARIANTS)}")
    return VARIANTS[name]
