"""What the exact answer costs: correctly rounded, by Arb, by mpmath, beside plain float64 NumPy; one head, Gaussian.

Floor: a forward is 2 n² d multiply-adds in QKᵀ and PV and n² exponentials. float64 NumPy does them at BLAS speed; the
others are read off as ratios to it in the same process.

mpmath's cost is the same for every query row, so from n = 256 on a few rows are timed and the time is scaled by their
share; those figures' names say so.
"""

from __future__ import annotations

import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from refattn import Problem
from refattn.arrays import from_float64
from refattn.bench import Row
from refattn.dtypes import FORMATS
from refattn.exact import elementwise
from refattn.exact.arithmetics import Balls, Multiprecision
from refattn.exact.driver import START_BACK, evaluate
from refattn.exact.levels import Level
from refattn.exact.run import run

SIZES = (64, 256, 1024)
DIMS = (64, 128)
BITS = 128
MPMATH_ROWS = 8


def problem(n: int, d: int, dtype: str = "float32") -> Problem:
    rng = np.random.default_rng(n + d)
    form = FORMATS[dtype]
    return Problem(*(from_float64(form.round_array(rng.standard_normal((1, 1, n, d))), dtype) for _ in range(3)))


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


def plain_gradients(p: Problem, dout: np.ndarray) -> tuple[np.ndarray, ...]:
    """Forward and backward as anyone would write them in float64."""
    q, k, v, g = (x[0, 0].astype(np.float64) for x in (p.query, p.key, p.value, dout))
    w = q @ k.T / np.sqrt(q.shape[1])
    w = np.exp(w - w.max(1, keepdims=True))
    w /= w.sum(1, keepdims=True)
    s = w * (g @ v.T - (g * (w @ v)).sum(1, keepdims=True)) / np.sqrt(q.shape[1])
    return s @ k, s.T @ q, w.T @ g


def balls(p: Problem) -> None:
    f = Balls(BITS)
    with f.working():
        run(p, f, None)


def base_of(p: Problem) -> float:
    plain(p)
    return min(seconds(lambda: plain(p), 5), seconds(lambda: plain(p), 5))


def rounded(p: Problem, form: str) -> float:
    evaluate(p.replace(query=p.query[:, :, :256]), rounding=form)  # what is compiled or tabulated once
    return seconds(lambda: evaluate(p, rounding=form), 5)


def certified() -> Iterator[Row]:
    """Correctly rounded forwards at n = 4096, d = 128, as ratios to float64 NumPy in this process."""
    n, d = 4096, 128
    for dtype, form, bound in (
        ("bfloat16", "bfloat16", 2.0),
        ("float16", "float16", 2.0),
        ("float32", "float32", 3.5),
        ("float64", "float64", 6.0),
    ):
        p = problem(n, d, dtype)
        base = base_of(p)
        at = f"n={n} d={d} {dtype} in, {form} out"
        yield Row(f"{at}, correctly rounded / float64", rounded(p, form) / base, "ratio", at_most=bound)
        a = evaluate(p, rounding=form)
        yield Row(f"{at}, undecided", float(sum(a.undecided.values())), "elements", at_most=0.0)
    with numpy_only():
        yield Row(f"n={n} d={d} float64, NumPy only / float64", rounded(p, "float64") / base, "ratio", at_most=10.0)
    tracemalloc.start()
    evaluate(p, rounding="float64")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    yield Row(f"n={n} d={d} float64, memory beyond the inputs", peak / (8 * n * d), "n×d float64 arrays", at_most=25.0)
    for form, bound in (("float32", 4.5), ("float64", 8.0)):
        p, dout = problem(n, d, form), problem(n + 1, d, form).key[:, :, :n]
        base = seconds(lambda p=p, dout=dout: plain_gradients(p, dout), 5)
        g = dout.astype(np.float64)
        level = START_BACK[FORMATS[form].precision]
        run(p.replace(query=p.query[:, :, :256]), Level(level), g[:, :, :256])
        cost = seconds(lambda p=p, g=g, level=level: run(p, Level(level), g, threads=os.cpu_count() or 1), 3)
        yield Row(f"n={n} d={d} gradients, enclosures at L = {level} / float64", cost / base, "ratio")
        cost = seconds(lambda p=p, dout=dout, form=form: evaluate(p, rounding=form, gradients=dout), 5)
        yield Row(f"n={n} d={d} {form} gradients, correctly rounded / float64", cost / base, "ratio", at_most=bound)
        a = evaluate(p, rounding=form, gradients=dout)
        yield Row(f"n={n} d={d} {form} gradients, undecided", float(sum(a.undecided.values())), "elements", at_most=0.0)
    p = problem(4 * n, d, "float64")
    base = seconds(lambda: plain(p), 1)
    cost = seconds(lambda: evaluate(p, rounding="float64"), 1)
    yield Row(f"n={4 * n} d={d} float64, correctly rounded / float64", cost / base, "ratio", at_most=6.0)


@contextmanager
def numpy_only() -> Iterator[None]:
    """Work as if numba were not here."""
    known = elementwise.steps
    elementwise.steps = lambda: elementwise  # type: ignore[assignment]
    try:
        yield
    finally:
        elementwise.steps = known


def rows() -> Iterator[Row]:
    yield from certified()
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
            whole = rounded(p, "float32")
            at = f"n={n} d={d}"
            yield Row(f"{at} float64 NumPy", base, "s")
            yield Row(f"{at} Arb {BITS} bits", arb, "s")
            yield Row(f"{at} mpmath {BITS} bits" + (f" ({MPMATH_ROWS} rows, scaled)" if few else ""), multi, "s")
            yield Row(f"{at} correctly rounded float32", whole, "s")
            yield Row(f"{at} Arb / float64", arb / base, "ratio")
            yield Row(f"{at} mpmath / float64", multi / base, "ratio")
            yield Row(f"{at} mpmath / Arb", multi / arb, "ratio", at_least=1.0)
