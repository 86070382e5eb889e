"""Predictions beside the measurements that are kept: those of blocks take a while to plan, and are a stage of gate.py.

Kernels' times, and whole ones of attention, are what the costs were fitted to. Blocks and encoders are not: they have
other kernels, twice the degree and more primes, and are held to the same residuals.
"""

import json
from dataclasses import replace
from pathlib import Path

from refattn import he
from refattn.bench import load
from refattn.he.baselines import random_call
from refattn.he.device.predict import COSTS, on_gpu

FILE = Path(__file__).parents[3] / "benchmarks" / "results" / "he-gpu-h200.json"
ROWS = {row["name"]: row["value"] for row in json.loads(FILE.read_text(encoding="utf-8"))["rows"]}

THEN = replace(COSTS, chunk=8)
"""The costs with as many ciphertexts a thread as when the rows were measured: few are shared by all threads since."""


def measured(file):
    """Return the figures of a file of results, by name."""
    return {row["name"]: row["value"] for row in json.loads((FILE.parent / file).read_text(encoding="utf-8"))["rows"]}


def bound(what):
    """Return the largest ratio of a time: it is a sum of parts, each within its residual."""
    return COSTS.of_kernels if what == "computing" else max(COSTS.of_kernels, COSTS.of_host)


def ratios(name, program, rows=ROWS, costs=THEN):
    """Yield what was measured of a program, the ratio of its prediction to that, and the most it may be."""
    found = on_gpu(program, costs)
    inputs = f"{name}, an input on the GPU"
    for what, row, ms in (
        ("computing", f"{name}, computing", found.computing_ms),
        ("bytes to bytes", f"{name}, bytes to bytes", found.bytes_ms),
        ("bytes to bytes", inputs, found.bytes_ms / getattr(program, "heads", 1)),
    ):
        if row in rows:
            yield what, ms / rows[row], bound(what)
    asked = rows.get(f"{name}, memory of the session")
    if asked is not None:
        yield "memory", found.memory_bytes / round(1e9 * asked), 1.0


def programs():
    """Yield names and programs that take long to plan: many inputs, a block, an encoder."""
    plan = he.plan(16, 16, 32, heads=8192, mode="throughput", **random_call(16, 32, 8192, 2)[1])
    yield "8192 slots, 8192 inputs of 16 x 32", plan
    from refattn.he.torch import weights_of

    yield "block 16 x 64", he.Layer(weights_of(load("he").a_block()[0], 16), tolerance=1e-2)
    weights = weights_of(load("he").an_encoder(2)[0], 16)
    name = "two-layer encoder, 16 tokens, d = 64, masked refresh"
    yield name, he.Encoder(weights, tolerance=1e-2, device="cuda")


def predicted():
    """Yield whether predictions are within their bounds: those of blocks by what was measured last.

    What a server of two blocks takes in all is not among them: it makes masks beside, which nobody predicts.
    """
    for name, program in programs():
        later = getattr(program.plan, "mode", "") != "throughput"
        given = (measured("he-gpu-encoder-h200.json"), COSTS) if later else ()
        for what, ratio, most in ratios(name, program, *given):
            yield f"{name}, {what}: predicted over measured {ratio:.3f}, at most {most:.3f}", 1 / most <= ratio <= most
