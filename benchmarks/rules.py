"""What long masks cost as rules: the kinds of tiles of 131,072 tokens, choosing among 65,536 keys, and equal scores.

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
from numpy.typing import NDArray

from refattn import Problem, evaluate, rules
from refattn.bench import Row
from refattn.exact.lowering import lower

TOKENS = 131072
KEYS, BLOCKS, TOPK, D = 65536, 128, 3, 64
FEWER = 16384
TIED = 1024, 4096


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


def tied() -> Iterator[Row]:
    """The choice of 32 keys where scores are equal: of keys that are the same, and of a row of keys that are not."""
    rng = np.random.default_rng(0)
    for n in TIED:
        a, b = rng.standard_normal((2, 1, 1, n, D)).astype(np.float32)
        whole = rng.integers(-2, 3, (2, 1, 1, n, D)).astype(np.float32)
        size = np.float32(2.0) ** rng.integers(-60, 61, D).astype(np.float32)
        one = np.ones((1, 1, 1, D), np.float32)
        kinds = {
            "keys that are all the same": (a, np.broadcast_to(b[:, :, :1], b.shape)),
            "integers between -2 and 2": (whole[0], whole[1]),
            "independent numbers": (a, b),
            "different keys of one score, a row": (one, turned(rng, a[0, 0, 0], n)),
            "different keys of one score, sizes 2^120 apart, a row": (one, turned(rng, a[0, 0, 0] * size, n)),
        }
        for name, (q, k) in kinds.items():
            p = Problem(q, k, k, causal="bottom_right", variant="topk", options={"topk": 32})
            if n == TIED[0]:
                lower(p)  # what is compiled or tabulated once
            start = time.process_time()
            lower(p)
            yield Row(f"n={n} d={D} topk 32, the choice among {name}", time.process_time() - start, "s of CPU")


def turned(rng: np.random.Generator, key: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """Return keys of the same numbers in other orders: a query of ones scores them the same."""
    return rng.permuted(np.tile(key, (1, 1, n, 1)), axis=3)


def rows() -> Iterator[Row]:
    yield from tiles()
    yield from chosen()
    yield from gathered()
    yield from among_all()
    yield from tied()
