"""What the exact answer costs: mpmath, Arb and plain float64 NumPy side by side, one head, Gaussian float32 inputs.

Floor: a forward is 2 n² d multiply-adds in QKᵀ and PV and n² exponentials. float64 NumPy does them at BLAS speed; the
others are read off as ratios to it in the same process.

mpmath's cost is the same for every query row, so from n = 256 on a few rows are timed and the time is scaled by their
share; those figures' names say so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refattn import Problem
from refattn.bench import Row
from refattn.exact.arithmetics import Balls, Multiprecision
from refattn.exact.driver import evaluate, run

SIZES = (64, 256, 1024)
DIMS = (64, 128)
BITS = 128
MPMATH_ROWS = 8


def problem(n: int, d: int) -> Problem:
    rng = np.random.default_rng(n + d)
    q, k, v = (rng.standard_normal((1, 1, n, d)).astype(np.float32) for _ in range(3))
    return Problem(q, k, v)


def seconds(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def plain(p: Problem) -> np.ndarray:
    """Attention as anyone would write it in float64."""
    q, k, v = (x[0, 0].astype(np.float64) for x in (p.query, p.key, p.value))
    s = q @ k.T / np.sqrt(q.shape[1])
    w = np.exp(s - s.max(1, keepdims=True))
    return w @ v / w.sum(1, keepdims=True)


def balls(p: Problem) -> None:
    f = Balls(BITS)
    with f.working():
        run(p, f, None)


def rows() -> Iterator[Row]:
    for n in SIZES:
        for d in DIMS:
            p = problem(n, d)
            plain(p)
            base = seconds(lambda p=p: plain(p), 7)
            arb = seconds(lambda p=p: balls(p), 5 if n < 1024 else 3)
            few = n > 64
            part = p.replace(query=p.query[:, :, :MPMATH_ROWS]) if few else p
            mp = Multiprecision(BITS)
            multi = seconds(lambda part=part, mp=mp: run(part, mp, None), 3) * (n / MPMATH_ROWS if few else 1)
            rounded = seconds(lambda p=p: evaluate(p, rounding="float32"), 3)
            at = f"n={n} d={d}"
            yield Row(f"{at} float64 NumPy", base, "s")
            yield Row(f"{at} Arb {BITS} bits", arb, "s")
            yield Row(f"{at} mpmath {BITS} bits" + (f" ({MPMATH_ROWS} rows, scaled)" if few else ""), multi, "s")
            yield Row(f"{at} correctly rounded float32", rounded, "s")
            yield Row(f"{at} Arb / float64", arb / base, "ratio")
            yield Row(f"{at} mpmath / float64", multi / base, "ratio")
            yield Row(f"{at} mpmath / Arb", multi / arb, "ratio", at_least=1.0)
