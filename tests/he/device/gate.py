"""The long comparisons: python -m tests.he.device.gate [compile] [emulate] [grid] [gpu]; by default the first three.

compile: the kernels for every degree, by nvcc, without spills. emulate: every operation at every degree, the kernels
run by g++ against the executor. grid: whole plans, the executor against SEAL. gpu: the same and larger ones, on a GPU
against SEAL where TenSEAL is installed, and against the executor.
"""

import itertools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from refattn import he
from refattn.he import wire
from refattn.he.baselines import random_call
from refattn.he.device.build import text_of
from refattn.he.device.card import Card
from refattn.he.device.encode import encoded
from refattn.he.device.executor import execute
from refattn.he.device.schedule import schedule_of
from refattn.he.device.session import Session

from ...gpu.compiled import check_compiles
from .drawn import Drawn
from .emulated import Emulated
from .every import RINGS, Every

GRID = [(4, 4), (16, 32), (32, 64)]
MODES = [{}, {"upload": "whole"}, {"upload": "compact"}, {"normalize": "client"}]


def same(program, device, seed=0):
    """Tell whether a device gives the executor's words, of drawn keys and queries."""
    given = Drawn(program.plan, seed)
    session = Session(program, given.keys, device)
    schedule = session.schedule
    found = given.words(session.attend(given.parts), schedule.outs)
    session.close()
    expected = execute(schedule, given.key_words, given.part_words, lambda x: encoded(x, program.plan.ring))
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def compile_all():
    for log in (13, 14, 15):
        with tempfile.TemporaryDirectory() as folder:
            check_compiles(Path(folder) / "kernels.cu", text_of(log), log)
        yield f"degree {2**log} compiles without spills", True


def emulate():
    for (degree, ring), upload in itertools.product(RINGS.items(), ("full", "whole")):
        with tempfile.TemporaryDirectory() as folder:
            device = Emulated(degree, Path(folder), order=upload == "full")
            good = same(Every(ring, upload), device)
        yield f"every operation, degree {degree}, {upload}, emulated", good


def problems(count):
    """Yield calls and plans: the grid's sizes, powers and modes."""
    every = itertools.cycle(itertools.product(GRID, (1, 2), (2, 4), MODES))
    for seed, ((n, d), heads, p, more) in zip(range(count), every, strict=False):
        x, given = random_call(n, d, heads, p, seed)
        yield (
            f"{heads} x {n} x {d}, p = {p}, {more}, seed {seed}",
            x,
            he.plan(n, n, d, heads=heads, p=p, **given, **more),
        )


def grid(count=24, device="cpu"):
    from .exchange import Exchange

    for name, x, plan in problems(count):
        e = Exchange(plan, x)
        outs = schedule_of(plan).outs
        if device == "cpu":
            keys, parts = e.given_words()
            found = execute(schedule_of(plan), keys, parts)
        else:
            with he.Server(plan, e.keys, device=device) as server:
                found = e.replied_words(outs, e.parts(server.attend(e.query), wire.REPLY))
        yield name, all(np.array_equal(a, b) for a, b in zip(found, e.replied_words(outs), strict=True))


def gpu():
    for (degree, ring), upload, seed in itertools.product(RINGS.items(), ("full", "whole"), range(3)):
        yield f"every operation, degree {degree}, {upload}, seed {seed}", same(Every(ring, upload), Card(degree), seed)
    try:
        import tenseal
    except ModuleNotFoundError:
        print("no TenSEAL: plans are compared with the executor only")
        for name, _, plan in problems(24):
            yield name, same(plan, Card(plan.ring.degree))
    else:
        assert tenseal
        yield from grid(200, "cuda")


def main(words):
    stages = {"compile": compile_all, "emulate": emulate, "grid": grid, "gpu": gpu}
    failed = 0
    for word in words or ["compile", "emulate", "grid"]:
        start = time.perf_counter()
        for name, good in stages[word]():
            failed += not good
            print(f"{'same' if good else 'DIFFERENT'}: {name} [{time.perf_counter() - start:.0f} s]", flush=True)
    print(f"{failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
