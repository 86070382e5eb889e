"""What a GPU takes for a program, before any key exists: its launches counted, at costs that were measured on one."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..baselines import random_call
from ..cache import context_of
from ..decoding_plan import DecodingPlan
from ..encoder import Encoder
from ..plan import Plan, plan
from ..planned import Program, bytes_text
from .decoding import kinds_of, step_of
from .launches import Addresses, Launch, launches_of
from .schedule import Schedule, schedule_of
from .session import BATCH, bytes_of, chunk_of, plains_of

__all__ = ["COSTS", "GpuCosts", "GpuTimes", "counted", "fitted", "on_gpu"]

Counts = Counter[tuple[str, str]]
"""By (kernel, "launches", "items" or "limbs")."""
MB = 1e6


@dataclass(frozen=True)
class GpuCosts:
    """What kernels and a host take.

    Attributes
    ----------
    machine : str
        What it was measured on.
    kernels : mapping
        By kernel (a, b): milliseconds of a launch, and of each limb of 16384 words that it reads. The three that
        expand seeds are one.
    host : (float, float, float)
        Milliseconds for each MB of a seeded query, for each MB that one thread unpacks and checks, and for each MB of a
        reply.
    whole : float
        Milliseconds for each MB of a query of whole ciphertexts, of one measurement.
    threads : int
        The host's, which share a query's ciphertexts.
    of_kernels, of_host : float
        The fit's residuals: the largest ratio, either way, of a predicted and a measured time of those it is made of.
    chunk : int or None
        Ciphertexts that a thread takes at a time; None: as many as sessions have it take.
    """

    machine: str
    kernels: Mapping[str, tuple[float, float]]
    host: tuple[float, float, float]
    whole: float
    threads: int
    of_kernels: float
    of_host: float
    chunk: int | None = None


COSTS = GpuCosts(
    machine="NVIDIA H200",
    kernels={
        "dot": (0.00274, 0.0001255),
        "drop": (0.003959, 0.0001655),
        "each": (0.001304, 4.907e-05),
        "inverse_rows": (0.002694, 8.611e-05),
        "seeds": (0.004006, 8.743e-05),
        "spread": (0.004738, 6.214e-05),
        "sum": (0.00229, 2.872e-05),
        "times_key": (0.01208, 0.0001489),
    },
    host=(0.1066, 2.714, 2.167),
    whole=0.1787,
    threads=16,
    of_kernels=1.158,
    of_host=1.055,
)
"""What `fitted` finds in benchmarks/results/he-gpu-h200.json, whose threads took 8 ciphertexts at a time."""
WITHOUT_ROW = {"residues": "drop", "subtract": "drop"}
"""Kernels that nobody measured, and which they are taken for: a pass of a transform over as many words."""


@dataclass(frozen=True)
class GpuTimes:
    """What a program takes on a GPU; see `on_gpu`.

    Attributes
    ----------
    computing_ms : float
        From ciphertexts in place to the result in place: seeds expanded, all launches.
    bytes_ms : float
        From a query's bytes in the host's memory to the reply's, of an encoder of all its messages: digests, checks,
        what is unpacked, the way to the GPU, computing.
    memory_bytes : int
        The session's memory on the GPU, as it is asked for when a session begins.
    ciphertext_bytes : int
        Of it ciphertexts, at their peak.
    costs : GpuCosts
        What times were predicted by.
    """

    computing_ms: float
    bytes_ms: float
    memory_bytes: int
    ciphertext_bytes: int
    costs: GpuCosts

    def words(self) -> str:
        """Return it in a sentence, with the machine that was measured."""
        return (
            f"on a GPU {_ms_text(self.computing_ms)} of computing, {_ms_text(self.bytes_ms)} from a query's bytes to "
            f"the reply's, {bytes_text(self.memory_bytes)} of its memory (by what an {self.costs.machine} and "
            f"{self.costs.threads} cores of its host took)"
        )


def on_gpu(program: Program, costs: GpuCosts | None = None) -> GpuTimes:
    """Return the times and the memory that a program would take on a GPU.

    A kernel's time is a for each launch and b for each limb that it reads, b by N log N of the ring over that of 16384.

    Launches and what they read are counted of the schedule that the GPU would be given; memory is what a session would
    ask for.

    Parameters
    ----------
    program : Plan, DecodingPlan, Layer or Encoder
        What would be computed; of decoding a token with the longest cache. The plan of a layer or an encoder is not
        enough: its weights are a part of the schedule.
    costs : GpuCosts, optional
        By default those of an NVIDIA H200.

    Raises
    ------
    UnsupportedProblem
        A program that the GPU does not compute.
    """
    costs = COSTS if costs is None else costs
    kept = 0
    if isinstance(program, DecodingPlan):
        every, kept = _steps(program), program.cache_bytes
        schedules = every[-1:]  # with the longest cache
    else:
        rounds = program.plan.rounds if isinstance(program, Encoder) else 1
        every = schedules = [schedule_of(program, k) for k in range(rounds)]
    seeded = program.plan.upload != "whole"
    computing = sum(sum(kernel_ms(costs, x.chain.degree, counted(x, seeded)).values()) for x in schedules)
    host = sum(_host_ms(costs, x, _message_mb(program, k), seeded) for k, x in enumerate(schedules))
    words = max(x.words for x in every)
    return GpuTimes(computing, host + computing, bytes_of(*every) + kept, 8 * words, costs)


def _steps(plan: DecodingPlan) -> list[Schedule]:
    """Return the schedules of a sequence's steps; what a context holds is of no account."""
    k, v = (np.zeros((plan.heads, plan.context, d)) for d in (plan.d_k, plan.d_v))
    context = context_of(plan, (k, v) if plan.context else None)
    return [step_of(plan, context, count) for count in kinds_of(plan).values()]


def counted(schedule: Schedule, seeded: bool) -> Counts:
    """Return the launches of each kernel, their items, and the limbs that these read."""
    elements = dict.fromkeys((0, *schedule.elements), 0)
    plains, held = dict.fromkeys(plains_of([schedule]), 0), [0] * schedule.held
    at = Addresses(0, elements, elements, plains, int(seeded), held=held)
    found: Counts = Counter()
    for x in launches_of(schedule, schedule.steps, at)[0]:
        kernel = "seeds" if x.kernel.startswith("seed_") else x.kernel
        for what, n in (("launches", 1), ("items", x.results), ("limbs", _limbs(x))):
            found[kernel, what] += n
    return found


def _limbs(launch: Launch) -> int:
    """Return how many limbs a launch's items read; a transform of several counts what it makes of one."""
    items = launch.items
    if launch.kernel == "spread":  # the inverse's pass and what it is written to, then a pass for each prime
        return int(items["count"].sum()) + 2 * len(items)
    if launch.kernel == "dot":
        return int((items["count"] * items["limbs"]).sum())
    if launch.kernel in ("times_key", "sum"):
        return int(items["count"].sum())
    return int(items["limbs"].sum()) if launch.kernel.startswith("seed_") else len(items)


def kernel_ms(costs: GpuCosts, degree: int, counts: Counts) -> dict[str, float]:
    """Return each kernel's milliseconds."""
    size = degree * math.log2(degree) / (16384 * 14)  # most are passes of transforms: N log N
    found = {}
    for kernel in {k for k, _ in counts}:
        a, b = costs.kernels[WITHOUT_ROW.get(kernel, kernel)]
        found[kernel] = a * counts[kernel, "launches"] + b * size * counts[kernel, "limbs"]
    return found


def _message_mb(program: Program, stage: int) -> float:
    """Return the megabytes of a query, or of an encoder's later message: its ciphertexts' share by their primes."""
    whole: float = program.plan.upload_bytes / MB
    if not isinstance(program, Encoder):
        return whole
    limbs = [sum(program.plan.part_limbs(k)) for k in range(program.plan.rounds)]
    return float(whole * limbs[stage] / sum(limbs))


def _host_ms(costs: GpuCosts, schedule: Schedule, megabytes: float, seeded: bool) -> float:
    query, unpacked, reply = costs.host
    found = reply * _reply_mb(schedule)
    if not seeded:
        return found + costs.whole * megabytes
    return found + query * megabytes + unpacked * _serial_mb(schedule, megabytes, costs)


def _reply_mb(schedule: Schedule) -> float:
    return sum(8 * x.size * x.limbs * schedule.chain.degree for x in schedule.replies) / MB


def _serial_mb(schedule: Schedule, megabytes: float, costs: GpuCosts) -> float:
    """Return what one thread unpacks, one after another: of each load its share, or the largest piece it takes."""
    parts = [x.limbs if x.size == 2 else 0 for x in schedule.inputs[: schedule.came]]
    each, found = megabytes / sum(parts), 0.0
    for step in schedule.steps:
        limbs = sorted((parts[i] for i in schedule.sent(step)), reverse=True)
        taken = costs.chunk or chunk_of(len(limbs))
        for start in range(0, len(limbs), BATCH * 2):  # two batches are on their way
            some = limbs[start : start + BATCH * 2]
            found += each * max(sum(some[:taken]), sum(some) / costs.threads)
    return found


def _ms_text(ms: float) -> str:
    return f"{ms:.2g} ms" if ms < 100 else f"{ms / 1e3:.2g} s"


def fitted(rows: Iterable[Mapping[str, Any]], machine: str, threads: int = 16, chunk: int | None = None) -> GpuCosts:
    """Return the costs that rows of ``refattn bench he_gpu --json`` show, by least squares of relative errors.

    Parameters
    ----------
    rows : iterable of mappings
        With "name" and "value". Of plans of attention those "N launches of KERNEL, M items" and "bytes to bytes" are
        taken, the latter less what kernels take; and the time of an input where a slot is an input.
    machine : str
        What they were measured on.
    threads : int
        The host's.
    chunk : int or None
        As `GpuCosts` has it, when the rows were measured.
    """
    value = {r["name"]: float(r["value"]) for r in rows}
    kernels: dict[str, list[tuple[float, ...]]] = {}
    every = []
    for name, made, took in _measured(value):
        schedule, seeded = schedule_of(made), made.upload != "whole"
        counts = counted(schedule, seeded)
        every.append((schedule, counts, made.upload_bytes / MB, seeded, took))
        for kernel in {k for k, _ in counts} if seeded and made.mode == "latency" else ():
            n, items, limbs = (counts[kernel, w] for w in ("launches", "items", "limbs"))
            ms = value[f"{name}, {n} launches of {kernel}, {items} items"]
            kernels.setdefault(kernel, []).append((n, limbs, ms))
    costs = {k: _fit(x) for k, x in sorted(kernels.items())}
    pairs = {k: (a, b) for k, ((a, b), _) in costs.items()}
    found = GpuCosts(machine, pairs, (0.0, 0.0, 0.0), 0.0, threads, max(r for _, r in costs.values()), 1.0, chunk)
    host: list[tuple[float, ...]] = []
    whole = []
    for schedule, counts, megabytes, seeded, took in every:
        ms = took - sum(kernel_ms(found, schedule.chain.degree, counts).values())
        if seeded:
            host.append((megabytes, _serial_mb(schedule, megabytes, found), _reply_mb(schedule), ms))
        else:
            whole.append((megabytes, _reply_mb(schedule), ms))
    (query, unpacked, reply), of_host = _fit(host)
    each = np.mean([(ms - reply * out) / megabytes for megabytes, out, ms in whole])
    return replace(found, host=(query, unpacked, reply), whole=float(f"{each:.4g}"), of_host=of_host)


def _measured(value: Mapping[str, float]) -> list[tuple[str, Plan, float]]:
    """Return the plans of attention that rows are about: names, and milliseconds from bytes to bytes."""
    found = []
    for name in value:
        if m := re.fullmatch(r"((\d+) x (\d+) x (\d+), p = (\d), (\w+)), bytes to bytes", name):
            heads, n, d, p = map(int, m.groups()[1:5])
            given = random_call(n, d, heads, p)[1] | {"upload": m[6]}
            took = value[name]
        elif m := re.fullmatch(r"(\d+ slots, (\d+) inputs of (\d+) x (\d+)), an input on the GPU", name):
            heads, n, d, p = *map(int, m.groups()[1:4]), 2
            given = random_call(n, d, heads, p)[1] | {"mode": "throughput"}
            took = value[name] * heads
        else:
            continue
        found.append((m[1], plan(n, n, d, heads=heads, p=p, **given), took))
    return found


def _fit(points: Sequence[tuple[float, ...]]) -> tuple[tuple[float, ...], float]:
    """Return factors of a point's numbers whose sum is near its last one, and the largest ratio of the two."""
    x = np.array(points)
    columns = x[:, :-1] / x[:, -1:]
    found = tuple(float(f"{y:.4g}") for y in np.linalg.lstsq(columns, np.ones(len(x)), rcond=None)[0])
    ratios = columns @ np.array(found)
    return found, math.ceil(1e3 * max(ratios.max(), 1 / ratios.min())) / 1e3
