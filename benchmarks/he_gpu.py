"""Encrypted attention on a GPU beside the CPU: words, times, memory. Normal inputs, 128-bit security, TenSEAL's client.

"computing" is the recorded program alone, data in place, the mean of runs in a row for at least 0.2 s; of a seeded
query it expands the seeds, too. "bytes to bytes"
is the server's time from the query's bytes in memory to the reply's, a median of 10. Words are compared with those of
the CPU's server, which is SEAL. The CPU's server has two processes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from refattn import he
from refattn.arrays import cupy_with_gpu
from refattn.bench import Row, load
from refattn.errors import InvalidInput
from refattn.he.baselines import random_call, random_sigmoid
from refattn.he.decoding import OnCpu
from refattn.he.device.chain import chain_of
from refattn.he.device.decoding import DecodingSession
from refattn.he.device.format import read_ciphertext
from refattn.he.device.launches import launches_of
from refattn.he.device.schedule import schedule_of
from refattn.he.device.session import Session, bytes_of
from refattn.he.device.trace import Node
from refattn.he.seal import api, unpacked
from refattn.he.wire import KEYS, QUERY, REPLY, TOKEN, pack, unpack
from refattn.problem import Problem

RUNS = 10
# heads, n, d, p; the most milliseconds of computing, and from bytes to bytes of a seeded query
SIZES: tuple[tuple[int, int, int, int, float | None, float | None], ...] = (
    (1, 16, 32, 2, None, None),
    (1, 128, 64, 2, 1.4, 40.0),
    (1, 128, 64, 4, None, None),
    (12, 128, 64, 2, 5.2, 250.0),
)


def parts() -> dict[str, Callable[[], Iterator[Row]]]:
    """Return what yields the figures, by what most of its rows' names begin with."""
    blocks = load("_he_gpu_blocks")
    whole = (*SIZES[1][:4], None, None)
    found = {"replies": same_words}
    found |= {name_of(*x[:4], "full"): partial(attention, *x, "full") for x in SIZES}
    found[name_of(*whole[:4], "whole")] = partial(attention, *whole, "whole")
    for heads, n, d in ((1, 16, 32), (1, 32, 64), (1, 128, 64), (12, 128, 64)):
        found[f"sigmoid {heads} x {n} x {d}, full"] = partial(sigmoid, heads, n, d)
    return found | {
        "8192 inputs of 16 x 32": throughput,
        "block 16 x 64": blocks.block,
        "two-layer encoder, 16 tokens": blocks.encoder,
        "two-layer encoder, 32 tokens": partial(blocks.more_tokens, 32, 1e-2),
        "two-layer encoder, 64 tokens": partial(blocks.more_tokens, 64, 5e-2),
        "decoding 12 x 128 x 64": decoding,
    }


def rows(only: str = "") -> Iterator[Row]:
    """Yield the figures, of the parts whose names contain a text.

    Raises
    ------
    InvalidInput
        No part's name does.
    UnsupportedProblem
        There is no GPU, CuPy or TenSEAL.
    """
    every = parts()
    asked = [part for name, part in every.items() if only in name]
    if not asked:
        raise InvalidInput(f"only: got {only!r}, expected a part of one of {'; '.join(every)}")
    cupy_with_gpu()
    api()
    for part in asked:
        yield from part()


def name_of(heads: int, n: int, d: int, p: int, upload: str) -> str:
    """Return what the rows of a call of power-softmax attention begin with."""
    return f"{heads} x {n} x {d}, p = {p}, {upload}"


def session_of(server: he.Server) -> Session:
    """Return what a server has on the GPU."""
    assert isinstance(server._worker, Session)
    return server._worker


def computing_ms(session: Session, run: Callable[[], None]) -> float:
    """Return the mean milliseconds of what queues work."""
    device = session.device
    count, took = 1, 0.0
    while took < 0.2:
        device.wait(device.mark())
        start = time.perf_counter()
        for _ in range(count):
            run()
        device.wait(device.mark())
        took = time.perf_counter() - start
        count, per = 2 * count, took / count
    return per * 1e3


def seconds(call: Callable[[], Any], runs: int = RUNS) -> float:
    """Return the median seconds of a call, after one to warm up."""
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def words(message: bytes, plan: he.Plan) -> list[bytes]:
    """Return a reply's words."""
    return words_of(unpack(message, REPLY, plan.digest, plan.reply_most).parts, plan, schedule_of(plan).outs)


def words_of(parts: Sequence[bytes | memoryview], plan: he.Plan | he.DecodingPlan, outs: Sequence[Node]) -> list[bytes]:
    """Return the words of a result's ciphertexts."""
    chain = chain_of(plan.ring)
    found = (read_ciphertext(x, chain, o.limbs, o.scale, False) for x, o in zip(parts, outs, strict=True))
    return [x.words.tobytes() for x in found]


def uncompressed(query: bytes, plan: he.Plan | he.LayerPlan) -> bytes:
    """Return a query as a client with compressed=False sends it."""
    m = unpack(query, QUERY, plan.digest, 2**40)
    return pack(replace(m, parts=tuple(unpacked(bytes(x)) for x in m.parts)))


def same_words() -> Iterator[Row]:
    """Yield the share of replies of small calls that are SEAL's in all words; the gate of the tests has the rest."""
    same = total = 0
    for seed in range(12):
        n, d, p = ((4, 4, 2), (16, 32, 2), (16, 16, 4))[seed % 3]
        x, given = random_call(n, d, 1, p, seed)
        plan = he.plan(n, n, d, p=p, **given, upload=("full", "whole", "compact")[seed // 4])
        client = he.Client(plan)
        keys, query = client.evaluation_keys(), client.encrypt(x)
        with he.Server(plan, keys) as cpu, he.Server(plan, keys, device="cuda") as gpu:
            same += words(cpu.attend(query), plan) == words(gpu.attend(query), plan)
        total += 1
    yield Row("replies that are SEAL's in all words, of 12", same / total, "share", at_least=1.0)


def attention(
    heads: int, n: int, d: int, p: int, most: float | None, most_bytes: float | None, upload: str
) -> Iterator[Row]:
    """Yield a plan's figures."""
    x, given = random_call(n, d, heads, p)
    plan = he.plan(n, n, d, heads=heads, p=p, **given, upload=upload)
    yield from served_call(name_of(heads, n, d, p, upload), plan, x, most, most_bytes)


def sigmoid(heads: int, n: int, d: int) -> Iterator[Row]:
    """Yield the figures of sigmoid attention."""
    x, given = random_sigmoid(n, d, heads)
    plan = he.plan_sigmoid(n, n, d, heads=heads, **given)
    yield from served_call(f"sigmoid {heads} x {n} x {d}, full", plan, x, None, None)


def served_call(at: str, plan: he.Plan, x: Problem, most: float | None, most_bytes: float | None) -> Iterator[Row]:
    """Yield the figures of a call, and whether its reply is SEAL's."""
    client, upload = he.Client(plan), plan.upload
    keys, query = client.evaluation_keys(), client.encrypt(x)
    start = time.perf_counter()
    with he.Server(plan, keys, device="cuda") as gpu:
        yield Row(f"{at}, session begun in", time.perf_counter() - start, "s")
        session = session_of(gpu)
        reply = gpu.attend(query)
        yield Row(f"{at}, computing", computing_ms(session, session.compute), "ms")
        took = seconds(lambda: gpu.attend(query))
        yield Row(f"{at}, bytes to bytes", 1e3 * took, "ms", at_most=most_bytes if upload == "full" else None)
        yield Row(f"{at}, memory of the session", bytes_of(*session.schedules) / 1e9, "GB", at_most=2.0)
        yield Row(f"{at}, of it ciphertexts at their peak", 8 * session.schedules[0].words / 1e9, "GB")
        yield Row(f"{at}, query", len(query) / 1e6, "MB")
        if upload == "full":
            plain = uncompressed(query, plan)
            yield Row(f"{at}, query, not compressed", len(plain) / 1e6, "MB")
            name = f"{at}, bytes to bytes, not compressed"
            yield Row(name, 1e3 * seconds(lambda: gpu.attend(plain)), "ms", at_most=most_bytes)
        parts = unpack(query, QUERY, plan.digest, 2**40, gpu._each).parts
        yield Row(f"{at}, digests", 1e3 * seconds(lambda: unpack(query, QUERY, plan.digest, 2**40, gpu._each)), "ms")
        yield Row(f"{at}, checked, uploaded, computed", 1e3 * seconds(lambda: session.attend(parts)), "ms")
        if upload == "full":
            yield from kernels(at, session, most)
    if upload == "whole":
        return
    with he.Server(plan, keys, 2) as cpu:
        start = time.perf_counter()
        theirs = cpu.attend(query)
        cpu_took = time.perf_counter() - start
        if cpu_took < 3:
            cpu_took = seconds(lambda: cpu.attend(query), 3)
    yield Row(f"{at}, reply is SEAL's in all words", float(words(theirs, plan) == words(reply, plan)), "", at_least=1.0)
    yield Row(f"{at}, CPU's server, two cores", cpu_took, "s")
    least = 25.0 if plan.heads == 12 and plan.operator == "power" else None
    yield Row(f"{at}, times the CPU's server", cpu_took / took, "ratio", at_least=least)


def kernels(at: str, session: Session, most: float | None) -> Iterator[Row]:
    """Yield each kernel's launches, items and time: what a prediction would be fitted to; and of all but the seeds'.

    The three that expand seeds are timed together, since each reads what the one before left for the same seeds.
    """
    launches, lists = launches_of(session.schedules[0], session.schedules[0].steps, session._at)
    groups: dict[str, list[Any]] = {}
    for launch in launches:
        groups.setdefault("seeds" if launch.kernel.startswith("seed_") else launch.kernel, []).append(launch)
    for kernel, of in sorted(groups.items()):
        run = session._tables.recorded(of, lists)
        items = sum(x.results for x in of)
        yield Row(f"{at}, {len(of)} launches of {kernel}, {items} items", computing_ms(session, run), "ms")
    rest = session._tables.recorded([x for x in launches if not x.kernel.startswith("seed_")], lists)
    yield Row(f"{at}, computing, seeds expanded before", computing_ms(session, rest), "ms", at_most=most)


def throughput(inputs: int = 8192) -> Iterator[Row]:
    """Yield the time of an input where a slot is an input: 16 x 32."""
    x, given = random_call(16, 32, inputs, 2)
    plan = he.plan(16, 16, 32, heads=inputs, p=2, **given, mode="throughput")
    client = he.Client(plan)
    keys, query = client.evaluation_keys(), client.encrypt(x)
    at = f"{plan.ring.degree // 2} slots, {inputs} inputs of 16 x 32"
    with he.Server(plan, keys, device="cuda") as gpu:
        took = seconds(lambda: gpu.attend(query), 3)
        reply = gpu.attend(query)
        yield Row(f"{at}, memory of the session", bytes_of(*session_of(gpu).schedules) / 1e9, "GB")
    with he.Server(plan, keys, 2) as cpu:
        start = time.perf_counter()
        theirs = cpu.attend(query)
        cpu_took = time.perf_counter() - start
    yield Row(
        f"{at}, replies are SEAL's in all words", float(words(theirs, plan) == words(reply, plan)), "", at_least=1
    )
    yield Row(f"{at}, an input on the GPU", 1e3 * took / inputs, "ms")
    yield Row(f"{at}, an input on two cores", 1e3 * cpu_took / inputs, "ms")
    yield Row(f"{at}, times the CPU's", cpu_took / took, "ratio", at_least=50.0)


def decoding(heads: int = 12, n: int = 128, d: int = 64, runs: int = 32) -> Iterator[Row]:
    """Yield the figures of a sequence's last token, whose cache has all others.

    A step is done once, so bytes to bytes is a median of the last `runs` tokens, which are of one program. SEAL's cache
    grows with the GPU's, and computes the last token.
    """
    x = random_call(n, d, heads, 2)[0].replace(causal="bottom_right")
    q, k, v = (np.asarray(a)[0] for a in (x.query, x.key, x.value))
    plan = he.plan_decoding(n, d, heads=heads, **he.ranges(x, margin=0.05))
    client, at = he.DecodingClient(plan), f"decoding {heads} x {n} x {d}, p = 2, full"
    keys, times, appended = client.evaluation_keys(), [], load("he").appended
    seals = OnCpu(plan, unpack(keys, KEYS, plan.digest, 2**40).parts, None)
    with he.DecodingServer(plan, keys, device="cuda") as gpu:
        session = gpu._held
        assert isinstance(session, DecodingSession)
        for i in range(n):
            message = client.encrypt_token(q[:, i], k[:, i], v[:, i])
            if i < n - 1:
                appended(seals, message)
            start = time.perf_counter()
            reply = gpu.step(message)
            times.append(time.perf_counter() - start)
        last = session._stages[-1]

        def compute() -> None:
            for _, run in last.phases:
                run()

        yield Row(f"{at}, the last token, computing", computing_ms(session, compute), "ms")
        memory = bytes_of(*session.schedules) + plan.cache_bytes
        yield Row(f"{at}, memory of the session", memory / 1e9, "GB")
    yield Row(f"{at}, a token", len(message) / 1e6, "MB")
    took = 1e3 * statistics.median(times[-runs:])
    yield Row(f"{at}, the last token, bytes to bytes", took, "ms", at_most=50.0)
    start = time.perf_counter()
    theirs = seals.step(unpack(message, TOKEN, plan.digest, 2**40).parts[1:])
    cpu = time.perf_counter() - start
    ours, outs = unpack(reply, REPLY, plan.digest, plan.reply_most).parts, last.schedule.replies
    same = words_of(ours, plan, outs) == words_of(theirs, plan, outs)
    yield Row(f"{at}, the last reply is SEAL's in all words", float(same), "", at_least=1.0)
    yield Row(f"{at}, the last token, the CPU's server, one core", cpu, "s")
    off = float(np.abs(client.decrypt(reply) - he.reference(x)[0, :, -1]).max())
    yield Row(f"{at}, error's bound over the last token's error", plan.error / off, "ratio", at_least=1.0)
