"""The certified engine on a GPU: seconds and memory of correctly rounded attention, one head, d = 128.

Times are medians of whole calls of ``refattn.evaluate`` on NumPy arrays, copies to the GPU and back counted. "plain" is
float64 attention in CuPy: two products and a softmax, in blocks of rows, from and to the GPU's memory. "products" are
the float64 products of the call alone, at its first level: what the time cannot be below. Bits are compared with the
CPU's on some rows.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import refattn
from refattn import Problem
from refattn.arrays import cupy_with_gpu, from_float64, to_float64
from refattn.bench import Row
from refattn.dtypes import format_of
from refattn.exact.device.backward import ROWS as BACKWARD_ROWS
from refattn.exact.device.card import KEYS, ROWS, Card, card_of
from refattn.exact.enclosure import Enclosure
from refattn.exact.levels import Level
from refattn.exact.run import Work

D = 128
CHECKED = 32
RUNS = 5
LEVELS = {"float64": 2, "float32": 1, "bfloat16": 0}
"""The level that each format begins with, which decides nearly everything."""
# n, format, causal, the most seconds
CALLS: tuple[tuple[int, str, bool, float | None], ...] = (
    (4096, "float64", False, None),
    (16384, "float64", False, 0.10),
    (16384, "float64", True, None),
    (16384, "float32", False, None),
    (16384, "bfloat16", False, None),
    (65536, "float64", False, 2.0),
    (65536, "float64", True, None),
    (65536, "bfloat16", False, 0.3),
)
BACKWARD: tuple[tuple[int, str, bool, float | None], ...] = (
    (4096, "float32", False, None),
    (16384, "float32", False, 0.5),
    (16384, "float32", True, 0.5),
    (16384, "bfloat16", False, 0.5),
)
"""With gradients. A causal call has fewer weights, a narrow format fewer digits: both are held to float32's limit."""
LAST = 1024, 2**20
"""Rows, and the keys of the call whose last rows they are."""


def rows() -> Iterator[Row]:
    """Yield the figures.

    Raises
    ------
    UnsupportedProblem
        There is no CuPy, no GPU, or one that is not trusted.
    """
    cupy = cupy_with_gpu()
    start = time.perf_counter()
    card = card_of(int(cupy.cuda.Device().id))
    yield Row("arithmetic checked, kernels compiled in", time.perf_counter() - start, "s")
    plain_of: dict[int, float] = {}
    for n, form, causal, most in CALLS:
        if n not in plain_of:
            plain_of[n] = plain(cupy, n)
            yield Row(f"n = {n}, plain CuPy float64", plain_of[n], "s")
        yield from call(cupy, card, n, form, causal, most, plain_of[n])
    for n, form, causal, most in BACKWARD:
        yield from gradients(cupy, card, n, form, causal, most)
    for form in ("bfloat16", "float64"):
        yield from some_rows(cupy, form)


def random_call(n: int, form: str, causal: bool) -> Problem:
    """Return one head of normal numbers."""
    rng = np.random.default_rng(n)
    q, k, v = (from_float64(format_of(form).round_array(rng.standard_normal((1, 1, n, D))), form) for _ in range(3))
    return Problem(q, k, v, causal="bottom_right" if causal else None)


def seconds(cupy: Any, run: Callable[[], Any]) -> float:
    """Return the median seconds of a call that ends on the GPU, after one to warm up."""
    run()
    times = []
    for _ in range(RUNS):
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        run()
        cupy.cuda.Device().synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def plain(cupy: Any, n: int) -> float:
    """Return the seconds of attention in float64."""
    rng = np.random.default_rng(n)
    q, k, v = (cupy.asarray(rng.standard_normal((n, D))) for _ in range(3))
    out = cupy.empty((n, D))

    def run() -> None:
        for i in range(0, n, 8192):
            s = q[i : i + 8192] @ k.T
            s *= D**-0.5
            s -= s.max(1, keepdims=True)
            cupy.exp(s, out=s)
            out[i : i + 8192] = (s @ v) / s.sum(1, keepdims=True)

    return seconds(cupy, run)


def call(
    cupy: Any, card: Card, n: int, form: str, causal: bool, most: float | None, plain_seconds: float
) -> Iterator[Row]:
    """Yield the figures of one call."""
    at = f"n = {n}, {form}{', causal' if causal else ''}"
    problem = random_call(n, form, causal)
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    answer = refattn.evaluate(problem, rounding=form, device="cuda")
    yield Row(f"{at}, memory in arrays n x d of float64", pool.total_bytes() / (8 * n * D), "", at_most=_most_memory(n))
    yield Row(f"{at}, undecided", float(sum(answer.undecided.values())), "", at_most=0.0)
    yield Row(f"{at}, levels", float(len(answer.stats)), "")
    yield Row(
        f"{at}, same bits as the CPU's, {CHECKED} rows", same(problem, answer, form, causal), "share", at_least=1.0
    )
    took = seconds(cupy, lambda: refattn.evaluate(problem, rounding=form, device="cuda"))
    yield Row(f"{at}, correctly rounded", took, "s", at_most=most)
    first = next(iter(answer.stats.values()))["seconds"]
    yield Row(f"{at}, of it the first level", first, "s")
    limit = 2.0 if (n, form, causal) == (16384, "bfloat16", False) else None
    yield Row(f"{at}, over plain CuPy float64", took / plain_seconds, "ratio", at_most=limit)
    if not causal:
        yield Row(f"{at}, products", products(cupy, card, n, LEVELS[form]), "s")


def _most_memory(n: int) -> float | None:
    return 40.0 if n == 65536 else None


def same(problem: Problem, answer: Any, form: str, causal: bool) -> float:
    """Return the share of elements of some rows that are the CPU's in every bit."""
    n, found, total = problem.n_q, 0, 0
    lines = np.linspace(0, n - 1, CHECKED).astype(int).tolist()
    # a causal row alone sees its first keys; rows without a mask go together
    parts = [([i], slice(0, i + 1)) for i in lines[:: CHECKED // 8]] if causal else [(lines, slice(None))]
    for some, keys in parts:
        part = Problem(problem.query[:, :, some], problem.key[:, :, keys], problem.value[:, :, keys])
        exact = refattn.evaluate(part, rounding=form)
        for mine, theirs in ((answer.out[:, :, some], exact.out), (answer.lse[:, :, some], exact.lse)):
            found += int((to_float64(mine) == to_float64(theirs)).sum())
            total += theirs.size
    return found / total


def some_rows(cupy: Any, form: str) -> Iterator[Row]:
    """Yield the figures of the last rows of a long causal call."""
    rows, n = LAST
    at, rng = f"{rows} exact rows on {n} keys, {form}", np.random.default_rng(n)
    q, k, v = (from_float64(format_of(form).round_array(rng.standard_normal((1, 1, x, D))), form) for x in (rows, n, n))
    problem = Problem(q, k, v, causal="bottom_right")
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    answer = refattn.evaluate(problem, rounding=form, device="cuda")
    yield Row(f"{at}, memory", pool.total_bytes() / 1e9, "GB")
    yield Row(f"{at}, undecided", float(sum(answer.undecided.values())), "", at_most=0.0)
    few = 8
    exact = refattn.evaluate(refattn.query_rows(problem, rows - few, rows), rounding=form)
    pairs = (answer.out[:, :, -few:], exact.out), (answer.lse[:, :, -few:], exact.lse)
    found = sum(int((to_float64(a) == to_float64(b)).sum()) for a, b in pairs)
    yield Row(f"{at}, same bits as the CPU's, {few} rows", found / sum(b.size for _, b in pairs), "share", at_least=1.0)
    yield Row(at, seconds(cupy, lambda: refattn.evaluate(problem, rounding=form, device="cuda")), "s", at_most=0.5)


def gradients(cupy: Any, card: Card, n: int, form: str, causal: bool, most: float | None) -> Iterator[Row]:
    """Yield the figures of a call with all gradients; dq is compared with the CPU's, by its last rows."""
    at = f"n = {n}, {form}{', causal' if causal else ''}, out and all gradients"
    problem = random_call(n, form, causal)
    dout = np.random.default_rng(n + 1).standard_normal(problem.out_shape)
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    answer = refattn.evaluate(problem, rounding=form, gradients=dout, device="cuda")
    yield Row(f"{at}, memory in arrays n x d of float64", pool.total_bytes() / (8 * n * D), "")
    yield Row(f"{at}, undecided", float(sum(answer.undecided.values())), "", at_most=0.0)
    yield Row(f"{at}, levels", float(len(answer.stats)), "")
    took = seconds(cupy, lambda: refattn.evaluate(problem, rounding=form, gradients=dout, device="cuda"))
    yield Row(at, took, "s", at_most=most)
    for level, s in answer.stats.items():
        yield Row(f"{at}, of it {level}", s["seconds"], "s")
    if not causal:
        yield Row(f"{at}, products", products(cupy, card, n, LEVELS[form], backward=True), "s")
    few = refattn.query_rows(problem, n - 8, n)
    exact = refattn.evaluate(few, rounding=form, gradients=dout[:, :, -8:])
    pairs = [(to_float64(answer.values[x])[:, :, -8:], to_float64(exact.values[x])) for x in ("out", "lse", "dq")]
    found = sum(int((a == b).sum()) for a, b in pairs)
    yield Row(f"{at}, same bits as the CPU's, 8 rows", found / sum(b.size for _, b in pairs), "share", at_least=1.0)
    yield Row(f"{at}, dk and dv", by_keys(problem, dout, answer), "share", at_least=1.0)


def by_keys(problem: Problem, dout: Any, answer: Any) -> float:
    """Return the share of dk and dv of some keys that are the CPU's enclosures' rounded numbers."""
    keys = np.zeros((1, 1, problem.n_k), bool)
    keys[0, 0, :: problem.n_k // 8] = True
    none, form = np.zeros(problem.out_shape[:3], bool), format_of(problem.out_type)
    raw = Work(problem, dout, os.cpu_count() or 1).run(Level(2), none, keys)
    found = total = 0
    for name in ("dk", "dv"):
        value, decided = Enclosure(*np.moveaxis(raw[name][keys], -1, 0)).settle(form)
        found += int((value == to_float64(answer.values[name])[keys])[decided].sum())
        total += int(decided.sum())
    return found / total


def products(cupy: Any, card: Card, n: int, level: int, backward: bool = False) -> float:
    """Return the seconds of the products of a call alone, tile by tile; with gradients those of both passes."""
    r, w = min(n, BACKWARD_ROWS if backward else ROWS), min(n, KEYS)
    left, planes = cupy.ones((r, (level + 1) * D)), cupy.ones((r, level + 1, w))
    keys, values = cupy.ones(((level + 1) * D, w)), cupy.ones(((level + 1) * w, D))
    out, turned, by_key = cupy.empty((level + 1, r, D)), cupy.ones((D, r * (level + 1))), cupy.empty((D, w))

    def scores() -> None:
        for t in range(level + 1):
            card.matmul(left[:, : (t + 1) * D], keys[: (t + 1) * D], planes[:, t])

    def sums() -> None:
        wide = planes.reshape(r, -1)
        for t in range(level + 1):
            card.matmul(wide[:, : (t + 1) * w], values[: (t + 1) * w], out[t])

    def over_rows() -> None:
        for start in range(0, r, w):
            part = planes[start : start + w]
            for t in range(level):
                for s in range(t + 1):
                    card.matmul(turned[:, start : start + w], part[:, s], by_key)
            wide = slice(start * (level + 1), (start + w) * (level + 1))
            card.matmul(turned[:, wide], part.reshape(-1, w), by_key)

    steps = (scores, sums, scores, scores, sums, over_rows, over_rows) if backward else (scores, sums)

    def run() -> None:
        for _ in range(-(-n // r) * -(-n // w)):
            for step in steps:
                step()

    return seconds(cupy, run)
