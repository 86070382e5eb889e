"""The long comparisons: python -m tests.he.device.gate [STAGE ...] [CALLS]; by default the first three stages.

compile: the kernels for every degree, by nvcc, without spills. emulate: every operation at every degree, the kernels
run by g++ against the executor. grid: whole plans, the executor against SEAL. gpu: the same and larger ones, and
encoders with their masks, and decoding, on a GPU against SEAL where TenSEAL is installed, and against the executor.
decoding: of those on a GPU the sequences that are decoded, twelve, alone.
problems: drawn calls on a GPU against SEAL, which the machine's cores share.
predicted: times and memory of blocks and many inputs, as predicted, beside those that were measured.
"""

import importlib.util
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
from .. import make_sigmoid
from ..make import planned, problem
from ..make_decoding import planned as planned_decoding
from ..make_decoding import sequence, taken, token
from ..relay import Relay
from ..test_encoder import encoder
from ..test_layer import layer
from .drawn import Drawn
from .emulated import Emulated
from .every import RINGS, Every
from .exchange import Exchange
from .predicted import predicted
from .problems import problems
from .rounds import contents, same_rounds

GRID = [(4, 4), (16, 32), (32, 64)]
MODES = [{}, {"upload": "whole"}, {"upload": "compact"}, {"normalize": "client"}]


def same(program, device, seed=0):
    """Tell whether a device gives the executor's words, of drawn keys and queries."""
    given = Drawn(program.plan, seed)
    session, good = Session(program, given.keys, device), True
    for stage, schedule in enumerate(session.schedules):
        given.draw(seed, stage)
        found = given.words(session.attend(given.parts, stage, given.masks), schedule.outs)
        parts = [*given.part_words, *given.masks]
        expected = execute(schedule, given.key_words, parts, lambda x: encoded(x, program.plan.ring))
        good = good and all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    session.close()
    return good


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


def calls(count):
    """Yield names, calls and programs: layers, masked calls, sigmoid attention, then the grid's sizes and modes."""
    for classes in (0, 3):
        weights, x, _ = layer(classes=classes)
        for upload in ("full", "whole"):
            yield f"a layer with {classes} classes, {upload}", x, he.Layer(weights, upload=upload)
    for causal in ("top_left", "bottom_right"):
        x = problem(8, 16, 8, heads=2, epsilon=1.0, causal=causal)
        yield f"causal, {causal}", x, planned(x)
    for sizes, more in (
        ((3, 3, 4), {"tolerance": 0.3}), ((16, 24, 32), {}), ((16, 16, 32), {"upload": "whole"}), ((64, 64, 64), {}),
    ):  # fmt: skip
        x = make_sigmoid.call(*sizes, heads=2, causal="bottom_right")
        yield f"sigmoid, 2 heads of {sizes}, {more}", x, make_sigmoid.planned(x, **more)
    every = itertools.cycle(itertools.product(GRID, (1, 2), (2, 4), MODES))
    for seed, ((n, d), heads, p, more) in zip(range(count), every, strict=False):
        x, given = random_call(n, d, heads, p, seed)
        plan = he.plan(n, n, d, heads=heads, p=p, **given, **more)
        yield f"{heads} x {n} x {d}, p = {p}, {more}, seed {seed}", x, plan


def grid(count, device="cpu"):
    """Yield whether SEAL's words come out: of the executor, or of a device."""
    for name, x, program in calls(count):
        e = Exchange(program, x)
        schedule = schedule_of(program)
        if device == "cpu":
            keys, parts = e.given_words()
            found = execute(schedule, keys, parts, lambda a, ring=e.plan.ring: encoded(a, ring))
        else:
            with he.Server(program, e.keys, device=device) as server:
                found = e.replied_words(schedule.outs, e.parts(server.attend(e.query), wire.REPLY))
        theirs = e.replied_words(schedule.outs)
        yield name, all(np.array_equal(a, b) for a, b in zip(found, theirs, strict=True))


def encoders():
    """Yield names, tokens and programs of several blocks: those that compute next to nothing, and small real ones."""
    x = np.random.default_rng(0).standard_normal((3, 5)) / 4
    for rounds, upload in itertools.product((2, 3), ("full", "whole")):
        yield f"{rounds} blocks of next to nothing, {upload}", x, Relay(rounds, upload)
        yield f"{rounds} blocks of next to nothing, {upload}, queries in parts", x, Relay(rounds, upload, 2)
    for blocks, upload in ((2, "full"), (2, "whole"), (4, "full")):
        weights, x, _ = encoder(n=3, d=4, hidden=4, blocks=blocks, tolerance=0.3)
        yield f"{blocks} blocks, {upload}", x, he.Encoder(weights, 0.3, upload)


def masked():
    """Yield whether a GPU's messages are SEAL's, with the same masks, and the result is the simulation's."""
    for name, x, program in encoders():
        found, out = same_rounds(program, x)
        expected = program.simulate(x)
        near = np.abs(out - expected).max() <= 1e-4 * np.abs(expected).max()  # noise and refreshes are near 1e-7
        yield f"encoder, {name}", all(found) and bool(near)


def decodings():
    """Yield whether each step's message of a GPU is SEAL's, and within the plan's bound."""
    for (n, context, d, heads), p, upload in itertools.product(
        ((6, 0, 8, 2), (5, 11, 16, 3), (20, 0, 32, 12)), (2, 4), ("full", "whole")
    ):  # fmt: skip
        x = sequence(n, context, d, heads=heads, p=p, epsilon=3.0)
        plan = planned_decoding(x, tolerance=0.1, upload=upload)
        known, exact, good = taken(x)[3], he.reference(x)[0], True
        client = he.DecodingClient(plan)
        keys = client.evaluation_keys()
        with he.DecodingServer(plan, keys, known) as cpu, he.DecodingServer(plan, keys, known, "cuda") as card:
            for i in range(n):
                message = token(client, x, i)
                ours = card.step(message)
                good &= contents(plan, ours) == contents(plan, cpu.step(message))
                good &= bool(np.abs(client.decrypt(ours) - exact[:, i]).max() <= plan.error)
        yield f"decoding {n} tokens after {context}, {heads} x {d}, p = {p}, {upload}", good


def gpu(count):
    """Yield whether a GPU gives the executor's words, and SEAL's where TenSEAL is installed."""
    for (degree, ring), upload, seed in itertools.product(RINGS.items(), ("full", "whole"), range(3)):
        yield f"every operation, degree {degree}, {upload}, seed {seed}", same(Every(ring, upload), Card(degree), seed)
    if importlib.util.find_spec("tenseal"):
        yield from grid(count, "cuda")
        yield from masked()
        yield from decodings()
        return
    print("no TenSEAL: programs are compared with the executor only")
    for name, _, program in itertools.chain(calls(count), encoders()):
        yield name, same(program, Card(program.plan.ring.degree))


def main(words):
    """Run stages, and say how many comparisons failed; a number is how many random calls there are."""
    stages = {
        "compile": lambda _: compile_all(), "emulate": lambda _: emulate(), "grid": grid, "gpu": gpu,
        "decoding": lambda _: decodings(), "predicted": lambda _: predicted(),
        "problems": lambda count: problems(count, "cuda"),
    }  # fmt: skip
    counts = [int(w) for w in words if w.isdigit()]
    failed = 0
    for word in [w for w in words if w in stages] or ["compile", "emulate", "grid"]:
        start = time.perf_counter()
        for name, good in stages[word](*counts or [24]):
            failed += not good
            print(f"{'same' if good else 'DIFFERENT'}: {name} [{time.perf_counter() - start:.0f} s]", flush=True)
    print(f"{failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
