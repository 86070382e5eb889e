"""The arguments of a plan, checked."""

from __future__ import annotations

import math
from typing import Any

from ..errors import InvalidInput, UnsupportedProblem

__all__ = ["POWERS", "check_arguments"]

POWERS = (2, 4, 6, 8)
UPLOADS = ("full", "compact", "whole")


def check_arguments(
    n_q: Any, n_k: Any, d_k: Any, d_v: Any, heads: Any, p: Any, denominator: Any, epsilon: Any, norms: Any,
    value_most: Any, tolerance: Any, normalize: Any, mode: Any, upload: Any, workers: Any,
) -> None:  # fmt: skip
    """Refuse sizes, ranges and names that have no meaning."""
    sizes = {"n_q": n_q, "n_k": n_k, "d_k": d_k, "d_v": d_k if d_v is None else d_v, "heads": heads}
    sizes["workers"] = workers
    for name, n in sizes.items():
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise InvalidInput(f"{name}: got {n!r}, expected an integer of at least 1")
    if p not in POWERS:
        raise InvalidInput(f"p: got {p!r}, expected one of {', '.join(map(str, POWERS))}")
    numbers = {"norms": min(norms), "value_most": value_most, "tolerance": tolerance}
    for name, x in numbers.items():
        if not (math.isfinite(x) and x > 0):
            raise InvalidInput(f"{name}: got {x!r}, expected a finite number above 0")
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise InvalidInput(f"epsilon: got {epsilon!r}, expected a finite number of at least 0")
    low, high = denominator
    if not (math.isfinite(high) and epsilon <= low < high and low > 0):
        raise InvalidInput(
            f"denominator: got ({low}, {high}), expected 0 < low < high with low at least epsilon = {epsilon}"
        )
    if normalize not in ("server", "client"):
        raise InvalidInput(f"normalize: got {normalize!r}, expected 'server' or 'client'")
    if mode not in ("latency", "throughput"):
        raise InvalidInput(f"mode: got {mode!r}, expected 'latency' or 'throughput'")
    if upload not in UPLOADS:
        raise InvalidInput(f"upload: got {upload!r}, expected one of {', '.join(UPLOADS)}")
    if upload == "compact" and mode == "throughput":
        raise UnsupportedProblem("he: upload='compact' is for mode='latency'")
