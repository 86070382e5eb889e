"""What each operator is: one file an operator, one row in the table VARIANTS."""

from __future__ import annotations

from ..errors import InvalidInput
from .block_sparse import BLOCK_SPARSE
from .codebook import CODEBOOK
from .dsa import DSA
from .ecoformer import ECOFORMER
from .gated_delta import GATED_DELTA
from .hyper import HYPER
from .lightning import LIGHTNING
from .linear import LINEAR
from .moba import MOBA
from .neighborhood import NEIGHBORHOOD
from .nsa import NSA, NSA_CORES
from .nsa_selected import NSA_SELECTED
from .option import Option
from .power import POWER
from .power_blocks import POWER_BLOCKS
from .relu import RELU
from .seer import SEER
from .shapes import Choices, Lowered, Rows, Selected, Shape, Steps
from .sigmoid import SIGMOID
from .softmax import SOFTMAX
from .spark import SPARK
from .titans import TITANS
from .titans_mac import TITANS_MAC
from .topk import TOPK
from .urpe import URPE
from .variant import Variant
from .view_local import VIEW_LOCAL

__all__ = ["VARIANTS", "Choices", "Lowered", "Option", "Rows", "Selected", "Shape", "Steps", "Variant", "variant_of"]

VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        SOFTMAX,
        LINEAR,
        POWER,
        SIGMOID,
        RELU,
        ECOFORMER,
        LIGHTNING,
        GATED_DELTA,
        TITANS,
        BLOCK_SPARSE,
        POWER_BLOCKS,
        NEIGHBORHOOD,
        TITANS_MAC,
        MOBA,
        TOPK,
        NSA_SELECTED,
        NSA,
        DSA,
        SEER,
        VIEW_LOCAL,
        URPE,
        CODEBOOK,
        SPARK,
        HYPER,
    )
}
"""The operators that refattn knows, by name; ``refattn.register`` adds one of your own."""

CORES: dict[str, Variant] = {v.name: v for v in NSA_CORES}
"""What operators of the table are lowered to that nobody calls by name, by name."""


def variant_of(name: str) -> Variant:
    """Return the operator of that name.

    Raises
    ------
    InvalidInput
        There is none.
    """
    if name in CORES:
        return CORES[name]
    if name not in VARIANTS:
        raise InvalidInput(
            f"variant: got {name!r}, expected one of {', '.join(VARIANTS)}; register one of your own first, or name "
            "it as --variant path/file.py:NAME"
        )
    return VARIANTS[name]
