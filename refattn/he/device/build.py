"""The kernels' text for a degree, and what they take."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

__all__ = ["ITEM", "KERNELS", "geometry", "text_of"]

HERE = Path(__file__).parent
ITEM = np.dtype(
    [(n, "<u8") for n in ("src", "dst", "x", "add", "plus", "perm", "key")]
    + [(n, "<u4") for n in ("prime", "from", "count", "flags", "first", "limbs")]
)
"""struct Item of kernels.cu."""
PRIME = np.dtype([(n, "<u8") for n in ("q", "ratio1", "ratio0", "inverse", "inverse_shifted", "most", "size", "over")])
"""struct Prime of modular.cuh."""
KERNELS = {
    "inverse_rows": ("primes", "inverse_roots"),
    "spread": ("primes", "roots", "inverse_roots", "drops", "count"),
    "times_key": ("primes", "roots", "inverse_roots", "count"),
    "drop": ("primes", "roots", "inverse_roots", "drops", "count"),
    "each": ("primes",),
    "sum": ("primes",),
    "dot": ("primes",),
    "residues": ("primes", "roots"),
    "subtract": ("primes", "roots"),
    "seed_roots": (),
    "seed_words": ("primes",),
    "seed_again": ("primes",),
}
"""What each takes after its items: tables, and how many primes there are."""


def text_of(log_degree: int) -> str:
    """Return the kernels' whole text for degree 2**log_degree."""
    include = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)
    text = (HERE / "kernels.cu").read_text(encoding="utf-8")
    text = include.sub(lambda m: (HERE / m[1]).read_text(encoding="utf-8"), text)
    return f"#define LOG_DEGREE {log_degree}\n{text}"


def geometry(kernel: str, degree: int, limbs: int = 1) -> tuple[int, int, int]:
    """Return the blocks of an item, threads of a block and its bytes of shared memory; limbs: those of a seed."""
    log = degree.bit_length() - 1
    columns = 1 << ((log + 1) // 2 + 4)  # words of a tile of columns
    rows = 1024
    return {
        "inverse_rows": (degree // rows, rows // 8, 8 * rows),
        "spread": (degree // columns, columns // 8, 16 * columns),
        "times_key": (degree // rows, rows // 8, 2 * 8 * rows),
        "drop": (degree // rows, rows // 8, 8 * rows),
        "each": (degree // 512, 256, 0),
        "sum": (degree // 512, 256, 0),
        "dot": (degree // 128, 128, 0),
        "residues": (degree // columns, columns // 8, 8 * columns),
        "subtract": (degree // rows, rows // 8, 8 * rows),
        "seed_roots": (-(-limbs * degree // 512 // 64), 64, 0),
        "seed_words": (limbs * degree // 8 // 128, 128, 0),
        "seed_again": (1, 1, 0),
    }[kernel]
