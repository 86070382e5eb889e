"""Power-softmax attention on ciphertexts beside what a user would write with TenSEAL's CKKSTensor and CKKSVector.

Normal inputs, epsilon a tenth of the mean denominator, 128-bit security, the same polynomial for 1/D. Ours is on one
core: the median of 5 after one to warm up; TenSEAL's have two threads and run once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from refattn import he
from refattn.bench import Row
from refattn.he.baselines import ckks_tensor, ckks_vector, random_call
from refattn.he.inverse import Inverse
from refattn.problem import Problem

RUNS, THREADS = 5, 2


def timed(plan: he.Plan, x: Problem) -> tuple[float, float]:
    """Return the median seconds, and the error of the last result."""
    client = he.Client(plan)
    server = he.Server(plan, client.evaluation_keys())
    times = []
    for _ in range(RUNS + 1):
        query = client.encrypt(x)
        start = time.perf_counter()
        reply = server.attend(query)
        times.append(time.perf_counter() - start)
        out = client.decrypt(reply)
    return statistics.median(times[1:]), float(np.abs(out - he.reference(x)).max())


def rows() -> Iterator[Row]:
    """Ratios to the baselines, by input and core in throughput mode, too."""
    yield from baselines()


def throughput(peer: float) -> Iterator[Row]:
    """A slot an input: 8192 inputs at once, by input and core, beside CKKSTensor's time by input and core."""
    n, d, inputs = 16, 32, 8192
    x, given = random_call(n, d, inputs, 2)
    w = (x.query @ x.key.swapaxes(2, 3) / np.sqrt(d)) ** 2
    exact = w @ x.value / (w.sum(3, keepdims=True) + x.options["epsilon"])
    for upload in ("full", "whole"):
        plan = he.plan(n, n, d, None, inputs, 2, **given, mode="throughput", upload=upload)
        client = he.Client(plan)
        server = he.Server(plan, client.evaluation_keys())
        query = client.encrypt(x)
        start = time.perf_counter()
        reply = server.attend(query)
        each = (time.perf_counter() - start) / inputs * 1e3
        error = float(np.abs(client.decrypt(reply) - exact).max())
        at = f"throughput, {inputs} x {n} x {d}, {len(query) / 1e9:.2f} GB up"
        yield Row(f"{at}, an input", each, "ms")
        yield Row(f"{at}, CKKSTensor's time by input and core over ours", peer / each, "ratio", at_least=6.0)
        yield Row(f"{at}, error over its bound", error / plan.error, "ratio", at_most=1.0)


def baselines() -> Iterator[Row]:
    """The same inverse polynomial on the same inputs, 16 x 32."""
    x, given = random_call(16, 32, 1, 2)
    low, high = given["denominator"]
    inverse = Inverse(low, high, 4)
    plan = he.plan(16, 16, 32, **given, inverse=inverse)
    ours, error = timed(plan, x)
    yield Row("16 x 32 refattn", ours, "s")
    yield Row("16 x 32 refattn error", error, "absolute")
    q, k, v = (np.asarray(a)[0, 0] for a in (x.query, x.key, x.value))
    exact = he.reference(x)[0, 0]
    for name, run, least in (("CKKSTensor", ckks_tensor, 500.0), ("CKKSVector", ckks_vector, 150.0)):
        # in a process of its own, which gives its gigabytes back
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            call_ = (q, k, v, inverse, 1 / np.sqrt(32), float(x.options["epsilon"]), THREADS)
            out, seconds = pool.submit(run, *call_).result()
        if name == "CKKSTensor":
            # its ciphertexts cost the same with all their slots in use
            yield from throughput(seconds * THREADS / 8192 * 1e3)
        yield Row(f"16 x 32 {name}", seconds, "s")
        yield Row(f"16 x 32 {name} error", float(np.abs(out - exact).max()), "absolute")
        yield Row(f"16 x 32 {name} over refattn", seconds / ours, "ratio", at_least=least)
