"""A float8 kernel with scales on a GPU, judged by the exact answer of the values that its bytes mean.

Floor: every element within its bound, and out's rms from 0.8 to 1.2 of what the model predicts: a model that is right
about how the kernel rounds, not only above it. Of lse, which sums what was never rounded to float8, only the bound.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refattn import Problem, check_problem
from refattn.bench import Row, gpu_torch, load
from refattn.scales import quantised

LOW, HIGH = 0.8, 1.2


def call(n_q: int, n_k: int, d: int, causal: str | None, by_head: bool) -> Problem:
    """Return a call in float8 with one scale for each tensor, or each head."""
    rng = np.random.default_rng(n_q + d)
    found = {}
    for name, heads, n in (("query", 4, n_q), ("key", 2, n_k), ("value", 2, n_k)):
        x = rng.standard_normal((1, heads, n, d)) * np.exp2(np.arange(heads))[None, :, None, None]
        x = x / 2 if name == "query" else x
        found[name], found[f"{name}_scale"] = quantised(x, "float8_e4m3fn", (1, heads if by_head else 1, 1, 1))
    return Problem(**found, causal=causal, out_dtype="bfloat16")


def rows() -> Iterator[Row]:
    """Out and lse of calls of several widths."""
    gpu_torch()
    kernel = load("_float8").attention
    for n_q, n_k, d, causal, by_head in (
        (128, 256, 64, None, False),
        (100, 200, 64, "bottom_right", True),
        (64, 320, 128, None, True),
        (128, 128, 128, "bottom_right", False),
        (100, 100, 32, "top_left", True),
    ):
        p = call(n_q, n_k, d, causal, by_head)
        at = f"{n_q} x {n_k} x {d}, {causal or 'whole'}, scales by {'head' if by_head else 'tensor'}"
        (check,) = check_problem(kernel, p, at).checks
        yield Row(f"{at}: {check.verdict}", check.verdict != "passed", "wrong", at_most=0)
        for a in check.arrays:
            yield Row(f"{at} {a.array}, error/allowed", a.ratio, "ratio", at_most=1)
            if a.array == "out" and a.figures is not None:
                yield Row(f"{at} {a.array}, rms/predicted, at least", a.figures.rms, "ratio", at_least=LOW)
                yield Row(f"{at} {a.array}, rms/predicted, at most", a.figures.rms, "ratio", at_most=HIGH)
