"""What long masks cost as rules: the kinds of tiles of 131,072 tokens, and choosing blocks among 65,536 keys.

MoBA at 3 of 128 blocks is held to at most 1.2 times exact attention of as many queries to as many keys as a row
chooses; both are correctly rounded, and take turns. No array of n² booleans is made: memory is the peak of what is
allocated beyond the inputs, beside one boolean for each pair.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refattn import Problem, evaluate, rules
from refattn.bench import Row
from refattn.exact.lowering import lower

TOKENS = 131072
KEYS, BLOCKS, TOPK, D = 65536, 128, 3, 64
FEWER = 16384


def peak(call: Callable[[], Any]) -> float:
    tracemalloc.start()
    call()
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def seconds(calls: dict[str, Callable[[], Any]], repeats: int = 3) -> dict[str, float]:
    times: dict[str, list[float]] = {n: [] for n in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {n: statistics.median(x) for n, x in times.items()}


def tiles() -> Iterator[Row]:
    ids = np.sort(np.random.default_rng(0).integers(0, 60, TOKENS))
    known = {
        "causal": rules.causal(),
        "causal, documents": rules.causal() & rules.document(ids),
        "causal, window 4096, 4 sinks": rules.causal() & (rules.window(4096, 0) | rules.sinks(4)),
        "dilated by 7, 512 keys": rules.dilated(7) & rules.window(7 * 511, 0),
        "causal, a tree of 512 drafts": rules.causal() & rules.tree((np.arange(512) - 1) // 2),
    }
    for name, rule in known.items():
        at = f"n={TOKENS} tiles of {name}"
        cost = seconds({name: lambda rule=rule: rule.tiles(TOKENS, TOKENS)})[name]
        yield Row(at, cost, "s")
        yield Row(
            f"{at}, memory / n² booleans", peak(lambda rule=rule: rule.tiles(TOKENS, TOKENS)) / TOKENS**2, "ratio"
        )


def chosen() -> Iterator[Row]:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, KEYS, D)).astype(np.float32) for _ in range(3))
    size = KEYS // BLOCKS
    p = Problem(q, k, v, causal="bottom_right", variant="moba", options={"block_size": size, "topk": TOPK})
    base = Problem(q, k[:, :, : TOPK * size], v[:, :, : TOPK * size])
    evaluate(base.replace(query=q[:, :, :256]), rounding="float32")  # what is compiled or tabulated once
    calls: dict[str, Callable[[], Any]] = {
        "chosen": lambda: evaluate(p, rounding="float32"),
        "as many": lambda: evaluate(base, rounding="float32"),
        "choice": lambda: lower(p),
    }
    cost, at = seconds(calls), f"n={KEYS} d={D} MoBA {TOPK} of {BLOCKS} blocks"
    yield Row(f"{at}, correctly rounded", cost["chosen"], "s")
    yield Row(f"{at}, the choice alone", cost["choice"], "s")
    yield Row(f"{KEYS} queries, {TOPK * size} keys, correctly rounded", cost["as many"], "s")
    yield Row(f"{at} / as many keys", cost["chosen"] / cost["as many"], "ratio", at_most=1.2)
    yield Row(f"{at}, memory / n² booleans", peak(calls["chosen"]) / KEYS**2, "ratio", at_most=1.0)


def gathered() -> Iterator[Row]:
    """Gradients of MoBA, beside those of as many queries and keys; single keys chosen by topk, without the choice."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 1, FEWER, D)).astype(np.float32) for _ in range(4))
    size = FEWER // BLOCKS
    p = Problem(q, k, v, causal="bottom_right", variant="moba", options={"block_size": size, "topk": TOPK})
    single = Problem(q, k, v, causal="bottom_right", variant="topk")
    core = lower(single).problem
    base = Problem(q, k[:, :, : TOPK * size], v[:, :, : TOPK * size])
    evaluate(base.replace(query=q[:, :, :256]), rounding="float32", gradients=dout[:, :, :256])
    calls: dict[str, Callable[[], Any]] = {
        "gradients": lambda: evaluate(p, rounding="float32", gradients=dout),
        "as many": lambda: evaluate(base, rounding="float32", gradients=dout),
        "single": lambda: evaluate(core, rounding="float32"),
        "single, choice": lambda: lower(single),
    }
    cost, at = seconds(calls, 1), f"n={FEWER} d={D}"
    yield Row(f"{at} MoBA {TOPK} of {BLOCKS} blocks, gradients", cost["gradients"], "s")
    yield Row(
        f"{at} MoBA {TOPK} of {BLOCKS} blocks, gradients / as many keys", cost["gradients"] / cost["as many"], "ratio"
    )
    yield Row(f"{at} topk, the choice among all keys", cost["single, choice"], "s")
    yield Row(f"{at} topk, attention to what was chosen", cost["single"], "s")


def among_all() -> Iterator[Row]:
    """The choice of 64 keys among all earlier ones, beside the products that any choice by float64 needs."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 1, KEYS, 128)).astype(np.float32) for _ in range(2))
    p = Problem(q, k, k, causal="bottom_right", variant="topk", options={"topk": 64})
    some, every = np.float64(q[0, 0, : KEYS // 16]), np.float64(k[0, 0])
    cost = seconds({"choice": lambda: lower(p), "products": lambda: some @ every.T}, 1)
    at = f"n={KEYS} d=128 topk 64"
    yield Row(f"{at}, the choice among all keys", cost["choice"], "s")
    yield Row(f"{at}, half of all products in float64", 8 * cost["products"], "s")


def rows() -> Iterator[Row]:
    yield from tiles()
    yield from chosen()
    yield from gathered()
    yield from among_all()
