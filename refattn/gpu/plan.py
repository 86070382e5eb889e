"""Which kernel computes a call, and why: decided from shapes, types and the GPU's capability, before any launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import InvalidInput, UnsupportedProblem

__all__ = ["ACCURACIES", "CONFIGURATIONS", "IMPLS", "Plan", "plan"]

IMPLS = ("sm90",)
"""The kernels: ``sm90`` (Hopper: wgmma, bulk tensor copies, specialised warps)."""
ACCURACIES = ("fast", "high")
"""P rounded to the input's type, or kept in two parts of it: then the error is the output's own rounding."""


def _tiles(consumers: int, keys: int, stages: int, query_stages: int, l2: int = 16) -> dict[str, int]:
    return {
        "CONSUMERS": consumers,
        "BLOCK_N": keys,
        "STAGES": stages,
        "Q_STAGES": query_stages,
        "L2_MIB": l2,
        "CONSUMER_REGISTERS": 232 if consumers == 2 else 160,
        "PRODUCER_REGISTERS": 40 if consumers == 2 else 32,
    }


CONFIGURATIONS: dict[tuple[int, bool, str], dict[str, int]] = {
    (64, False, "fast"): _tiles(3, 128, 3, 2),
    (64, True, "fast"): _tiles(3, 128, 3, 2),
    (64, False, "high"): _tiles(3, 96, 3, 2),
    (64, True, "high"): _tiles(2, 128, 3, 2),
    (128, False, "fast"): _tiles(2, 128, 2, 2),
    (128, True, "fast"): _tiles(2, 128, 2, 2),
    (128, False, "high"): _tiles(2, 128, 2, 2),
    (128, True, "high"): _tiles(2, 112, 2, 2),
    (256, False, "fast"): _tiles(2, 80, 2, 1),
    (256, True, "fast"): _tiles(2, 80, 2, 1, 32),
    (256, False, "high"): _tiles(2, 64, 2, 1),
    (256, True, "high"): _tiles(2, 64, 2, 1),
}
"""Tiles of the ``sm90`` kernel by (width, causal, accuracy): what was fastest of those that do not spill."""
WIDTHS = (64, 128, 256)
"""Head dims that it is compiled for; smaller ones are filled up with zeros."""


@dataclass(frozen=True)
class Plan:
    """What will run.

    Attributes
    ----------
    impl : str
        Out of ``IMPLS``.
    why : str
        Why this kernel.
    macros : dict
        What it is compiled with.
    """

    impl: str
    why: str
    macros: Mapping[str, int] = field(default_factory=dict)


def plan(
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    dtype: str,
    *,
    scale: float | None = None,
    causal: str | None = None,
    accuracy: str = "fast",
    impl: str | None = None,
    capability: tuple[int, int] = (9, 0),
) -> Plan:
    """Return which kernel computes a call, and why.

    Parameters
    ----------
    shapes : tuple of three shapes
        Of query, key and value: (b, h_q, n_q, d), (b, h_kv, n_k, d), (b, h_kv, n_k, d).
    dtype : str
        Their format.
    scale, causal, accuracy, impl
        As in :func:`refattn.gpu.attention`.
    capability : tuple of two int
        The GPU's compute capability.

    Raises
    ------
    InvalidInput
        An unknown accuracy or kernel.
    UnsupportedProblem
        No kernel computes it; the text says what is in the way.
    """
    if accuracy not in ACCURACIES:
        raise InvalidInput(f"accuracy: got {accuracy!r}, expected one of {', '.join(ACCURACIES)}")
    if impl is not None and impl not in IMPLS:
        raise InvalidInput(f"impl: got {impl!r}, expected one of {', '.join(IMPLS)}")
    obstacle = _obstacle(shapes, dtype, scale, causal, capability)
    if obstacle:
        raise UnsupportedProblem(f"gpu: the kernel sm90 {obstacle}")
    width = min(w for w in WIDTHS if w >= shapes[0][3])
    macros = {"HEAD_DIM": width, "BF16": int(dtype == "bfloat16"), "CAUSAL": int(causal is not None)}
    macros |= {"HIGH": int(accuracy == "high"), "PINGPONG": 1, "LAZY": 8}
    macros |= CONFIGURATIONS[width, causal is not None, accuracy]
    return Plan("sm90", f"{dtype}, head dim {shapes[0][3]} in tiles of {width}, compute capability 9.0", macros)


def _obstacle(shapes: Any, dtype: str, scale: float | None, causal: str | None, capability: tuple[int, int]) -> str:
    """Return why the sm90 kernel cannot compute a call, "" where it can."""
    (_, heads, n_q, d_k), (_, heads_kv, n_k, _), (*_, d_v) = shapes
    if capability != (9, 0):
        return f"needs compute capability 9.0, got {capability[0]}.{capability[1]}"
    if dtype not in ("float16", "bfloat16"):
        return f"takes float16 and bfloat16, got {dtype}"
    if d_k != d_v or d_k % 8 or not 0 < d_k <= max(WIDTHS):
        return f"takes equal head dims, multiples of 8 up to {max(WIDTHS)}, got {d_k} and {d_v}"
    if scale is not None and not scale > 0:
        return f"takes a scale above 0, got {scale}"
    if causal == "top_left" and n_q != n_k:
        return f"takes causal='top_left' only with n_q = n_k, got {n_q} and {n_k}"
    if max(n_q, n_k) >= 2**30 or heads // max(heads_kv, 1) > 2**15:
        return f"takes fewer than 2**30 rows and keys, got {n_q} and {n_k}"
    return ""
