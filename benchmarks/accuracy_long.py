"""What long context costs kernels: errors of real sizes, one head of normal numbers, by length, width, type and mask.

Of each call up to 32 rows are compared, spread over all of them; of dk and dv, which sum over rows, all keys, of calls
of ``WHOLE`` rows at most. An rms of 1 is a kernel that loses what its types must lose. The exact answers come from
the GPU where there is one. REFATTN_KERNELS names kernels, separated by commas.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from joblib import Parallel, delayed

import refattn
from refattn import Problem
from refattn.arrays import cupy_with_gpu, from_float64, to_float64
from refattn.bench import Row, load
from refattn.check.bounds.expected import Expected, of_answer
from refattn.check.call import Result, call_gradients, call_kernel
from refattn.check.compare import against
from refattn.check.inputs.sample import Sample
from refattn.check.kernels import find, found
from refattn.check.model import Model, flash
from refattn.dtypes import FORMATS, format_of
from refattn.errors import RefattnError, UnsupportedProblem
from refattn.exact.driver import enclose

FA3, flash3 = load("_flash3").FA3, load("_flash3").flash3

LENGTHS = (1024, 16384, 65536)
CALLS = (("bfloat16", 128, False), ("bfloat16", 128, True), ("bfloat16", 64, False), ("float16", 128, False))
ROWS, SCORES = 32, 2**19
"""Rows that are compared, and the most scores of theirs: bounds are made on the CPU."""
WHOLE = 1024
"""The most rows where dk and dv are compared."""
KERNELS = (
    "refattn-gpu", "refattn-gpu-high", "cuda-flash", "cuda-cudnn", "cuda-efficient", "cuda-triton", FA3
)  # fmt: skip


def rows() -> Iterator[Row]:
    """Yield the figures of the kernels that are here; REFATTN_JOBS processes, each with its own calls."""
    try:
        cupy_with_gpu()
        device = "cuda"
    except UnsupportedProblem:
        device = "cpu"
    here = {e.name for e in found()}
    names = [n for n in os.environ.get("REFATTN_KERNELS", "").split(",") if n]
    names = names or [n for n in KERNELS if n in here or n == FA3]
    calls = [(n, *c) for c in CALLS for n in LENGTHS]
    if (jobs := int(os.environ.get("REFATTN_JOBS", "1"))) == 1:
        for c in calls:
            yield from call(*random_call(*c), names, device)
        return
    work = (delayed(part)(c, names, device) for c in sorted(calls, reverse=True))
    for some in Parallel(n_jobs=jobs, return_as="generator_unordered")(work):
        print(f"done: {some[0].name.partition(', ')[2].rpartition(',')[0]}", file=sys.stderr)
        yield from some


def part(c: Any, names: list[str], device: str) -> list[Row]:
    """Return the figures of a call: what a process is asked for."""
    return list(call(*random_call(*c), names, device))


def random_call(n: int, form: str, d: int, causal: bool) -> tuple[Problem, Any]:
    """Return one head of normal numbers, and a gradient that arrives."""
    rng = np.random.default_rng(n + d)
    rounded = format_of(form).round_array
    q, k, v, dout = (from_float64(rounded(rng.standard_normal((1, 1, n, d))), form) for _ in range(4))
    return Problem(q, k, v, causal="top_left" if causal else None), dout


def call(problem: Problem, dout: Any, names: list[str], device: str) -> Iterator[Row]:
    """Yield the figures of one call, kernel by kernel."""
    lines = np.unique(np.linspace(0, problem.n_q - 1, min(ROWS, SCORES // problem.n_k)).astype(int))
    some = Sample(0, (0,), (0,), tuple(lines.tolist()))
    part, arriving = some.of(problem), some.take("out", dout)
    exact = refattn.evaluate(part, rounding="float64", device=device)
    back = enclose(part, gradients=arriving)
    whole = enclose(problem, gradients=dout) if problem.n_q <= WHOLE else None
    known: dict[Any, list[Expected | None]] = {}
    for name in names:
        at = f"{name}, {problem.dtype}, d = {problem.d_k}, n = {problem.n_q}{', causal' if problem.causal else ''}"
        try:
            model, result, gradients = asked(name, problem, dout)
        except (RefattnError, RuntimeError) as e:
            print(f"{at}: did not run: {e}"[:300], file=sys.stderr)
            yield Row(f"{at}, runs", 0.0, "")
            continue
        if model not in known:
            known[model] = [of_answer(exact, model), of_answer(back, model, arriving)]
            known[model].append(None if whole is None else of_answer(whole, model, dout))
        forward, rows_back, all_back = known[model]
        for array, x in {"out": result.out, "lse": result.lse, **gradients}.items():
            sums = array in ("dk", "dv")
            of = forward if array in ("out", "lse") else all_back if sums else rows_back
            if x is not None and of is not None:
                yield from figures(at, array, x if sums else some.take(array, x), of)


def asked(name: str, problem: Problem, dout: Any) -> tuple[Model, Result, dict[str, Any]]:
    """Return a kernel's model, and what it gives."""
    if name == FA3:
        return flash(problem.dtype), Result(_flash3(problem)), {}
    (entry,) = find(name)
    kernel = entry.kernel()
    if problem.causal and entry.capabilities.missing(problem):  # of as many rows as keys both corners are one
        problem = problem.replace(causal="bottom_right")
    result = call_kernel(kernel.call, problem)
    gradients = call_gradients(kernel.call, problem, dout)[0] if entry.capabilities.gradients else {}
    return kernel.model(problem.dtype), result, gradients


def _flash3(problem: Problem) -> Any:
    p = problem.to("torch", "cuda")
    calls = flash3(p.query, p.key, p.value, causal=problem.causal is not None)
    if not calls:
        raise UnsupportedProblem("fa3-fwd is not installed")
    out = calls[FA3]()
    return p.replace(query=out[0] if isinstance(out, tuple) else out).to("numpy").query


def figures(at: str, array: str, x: Any, known: Expected) -> Iterator[Row]:
    """Yield what is said of one array."""
    worst = against(known, array, x, x.dtype.name)
    yield Row(f"{at}, {array}: largest error ÷ allowed error", worst.ratio, "ratio")
    if worst.figures is not None and np.isfinite(worst.figures.rms):
        yield Row(f"{at}, {array}: rms error ÷ predicted", worst.figures.rms, "ratio")
        yield Row(f"{at}, {array}: mean error toward larger values ÷ predicted", worst.figures.bias, "ratio")
    value, sure = known.answer.enclosures[array].settle(FORMATS[x.dtype.name])
    right = (to_float64(x) == value)[sure]
    yield Row(f"{at}, {array}: correctly rounded", float(right.mean()), "share")
