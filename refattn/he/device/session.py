"""A client's session on a device: its keys there, programs recorded, and queries checked and computed."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidInput, UnsupportedProblem
from ..encoder import Encoder
from ..planned import Program
from ..seal import galois_elements
from .encode import whole_numbers
from .format import Data, Received, ciphertext_bytes, polynomial_bytes, read_ciphertexts, read_keys
from .launches import Addresses, launches_of, plain_launches, seed_launches, seed_room
from .modular import Words
from .schedule import Schedule, Step, schedule_of
from .seeds import SEED
from .tables import Device, Tables
from .trace import Plain

__all__ = ["Session", "bytes_of", "chunk_of", "elements_of", "plains_of"]

BATCH, BATCHES = 64, 3
"""Ciphertexts that are checked together, and such batches on their way: two are checked while the device reads one."""
CHUNK, THREADS = 8, 16
"""The most ciphertexts of a batch that a thread takes at a time, and threads that few ciphertexts are shared by."""
ROOM = 2**28
"""Bytes left free beside a session: for the driver and for what is recorded."""
Each = Callable[..., Iterable[Any]]


def bytes_of(*schedules: Schedule) -> int:
    """Return the device memory of a session: keys, permutations, plaintexts, tables and one block's ciphertexts."""
    chain = schedules[0].chain
    degree, primes = chain.degree, len(chain.primes)
    key = 16 * (primes - 1) * primes * degree
    plains = sum(8 * x.limbs * degree for x in plains_of(schedules))
    elements = len(elements_of(schedules))
    return 8 * _words(schedules) + (elements + 1) * key + 4 * degree * elements + plains + Tables.bytes_of(chain)


def chunk_of(count: int) -> int:
    """Return how many ciphertexts a thread takes at a time, of so many that a step takes in."""
    return max(1, min(CHUNK, count // THREADS))


def _words(schedules: Sequence[Schedule]) -> int:
    """Return the words for ciphertexts: the blocks of an encoder have them in turns; a plaintext fits, too."""
    chain = schedules[0].chain
    return max((2 + len(chain.primes)) * chain.degree, *(x.words for x in schedules))


def elements_of(schedules: Sequence[Schedule]) -> list[int]:
    """Return the Galois elements that keys are needed for."""
    return sorted({e for x in schedules for e in x.elements})


def plains_of(schedules: Sequence[Schedule]) -> list[Plain]:
    """Return what is to be encoded, each once."""
    steps = (step for x in schedules for step in x.steps)
    return list(dict.fromkeys(op.what for step in steps for op in step.operations if isinstance(op.what, Plain)))


@dataclass
class _Stage:
    """A message's program: what is done, the primes of its ciphertexts, 0 of a mask; steps with what queues them."""

    schedule: Schedule
    limbs: list[int]
    phases: list[tuple[list[Step], Callable[[], None]]] = field(default_factory=list)


class Session:
    """Keys and a recorded program on a device.

    Parameters
    ----------
    program : Plan, Layer or Encoder
        What is computed.
    parts : two of bytes
        Relinearisation keys and rotation keys.
    device : Device
        Where.
    each : callable
        What maps a function over ciphertexts: threads', to check several at once.

    Raises
    ------
    InvalidInput
        The keys are none, or not the plan's.
    UnsupportedProblem
        The device has too little memory left.
    """

    def __init__(self, program: Program, parts: Sequence[Data], device: Device, each: Each = map) -> None:
        self.program, self.device, self.each = program, device, each
        plan = program.plan
        self.schedules = self._planned()
        self._stages = [_Stage(s, [x.limbs if x.size == 2 else 0 for x in s.inputs]) for s in self.schedules]
        self.chain, self._lock = self.schedules[0].chain, threading.Lock()
        self._scale, self._seeded = 2.0**plan.ring.middle, plan.upload != "whole"
        keys = self._read_keys(parts, galois_elements(plan.ring, plan.rotations))  # before any memory is asked for
        needed = bytes_of(*self.schedules) + self._kept_bytes() + ROOM
        if needed > device.free():
            raise UnsupportedProblem(
                f"he: a session of this plan takes {needed / 1e9:.2f} GB of the GPU's memory, of which "
                f"{device.free() / 1e9:.2f} are free; end another session first"
            )
        self._end = weakref.finalize(self, device.end)  # also where nobody closes it, or Python ends
        try:
            self._begin(keys)
        except BaseException:
            self._end()
            raise

    def _planned(self) -> list[Schedule]:
        """Return what is recorded, by the message that it is for."""
        program = self.program
        return [schedule_of(program, k) for k in range(program.plan.rounds if isinstance(program, Encoder) else 1)]

    def _kept_bytes(self) -> int:
        """Return the bytes of ciphertexts that stay from one message to the next."""
        return 0

    def _held(self, stage: int) -> Sequence[int]:
        """Return where a program's inputs are that stay from one message to the next."""
        return ()

    def _read_keys(self, parts: Sequence[Data], elements: Sequence[int]) -> dict[int, list[Received]]:
        relin = read_keys("RelinKeys", parts[0], self.chain, [0])
        galois = read_keys("GaloisKeys", parts[1], self.chain, [(e - 1) // 2 for e in elements])
        return {0: relin[0]} | {2 * index + 1: digits for index, digits in galois.items()}

    def _begin(self, keys: dict[int, list[Received]]) -> None:
        device, chain = self.device, self.chain
        self._tables = tables = Tables(device, chain)
        inputs = [x for s in self.schedules for x in s.inputs[: s.came]]
        size = max(x.limbs * (1 if self._seeded else x.size) for x in inputs) * 8 * chain.degree
        loaded = max(len(s.sent(step)) for s in self.schedules for step in s.steps)
        places = (min(BATCHES, -(-loaded // BATCH)), min(BATCH, loaded))
        self._slots = device.pinned(places[0] * places[1] * size).reshape(*places, size)
        self._marks: list[Any] = [None] * BATCHES
        limbs, degree = len(chain.primes), chain.degree
        loads = [[x.inputs[i].limbs for i in x.sent(step)] for x in self.schedules for step in x.steps]
        most = max(sum(seed_room(n, degree) for n in load) for load in loads)
        self._room = device.empty(8 * max(most, (limbs - 1) * seed_room(limbs, degree)))
        elements = elements_of(self.schedules)
        at_keys = {e: self._put_key(x) for e, x in keys.items() if e in (0, *elements)}
        self._memory = device.empty(8 * _words(self.schedules))
        self._seeds = np.zeros((max(len(x.limbs) for x in self._stages), SEED), np.uint8)
        self._at_seeds = device.empty(self._seeds.nbytes) if self._seeded else 0
        self._at = Addresses(
            self._memory, at_keys, {e: tables.stored(chain.permutation(e)) for e in elements},
            self._encoded(plains_of(self.schedules)), self._at_seeds, self._room,
        )  # fmt: skip
        for number, stage in enumerate(self._stages):
            at = replace(self._at, held=self._held(number))
            for steps in stage.schedule.phases:
                run = tables.recorded(*launches_of(stage.schedule, steps, at))
                stage.phases.append((steps, run))

    def _encoded(self, plains: Sequence[Plain]) -> dict[Plain, int]:
        """Return where plaintexts' words are; the memory for ciphertexts has their numbers before they are changed."""
        ring, degree = self.program.plan.ring, self.chain.degree
        found = {x: self.device.empty(8 * x.limbs * degree) for x in plains}
        each = (2 + len(self.chain.primes)) * degree
        count = _words(self.schedules) // each
        for start in range(0, len(plains), count):
            some, jobs = plains[start : start + count], []
            numbers = self.each(partial(whole_numbers, ring=ring), some)
            for at, (x, of) in enumerate(zip(some, numbers, strict=True)):
                src = self._memory + 8 * at * each
                self.device.put(src, of)
                jobs.append((src, src + 16 * degree, found[x], x.limbs))
            self._tables.recorded(plain_launches(degree, jobs))()
        return found

    def _put_key(self, digits: Sequence[Received]) -> int:
        """Return where a key is, (digits, 2, primes, N); its seeds are expanded there."""
        size = digits[0].words[0].nbytes
        start, jobs = self.device.empty(2 * size * len(digits)), []
        for j, x in enumerate(digits):
            for c, polynomial in enumerate(x.words):
                self.device.put(start + (2 * j + c) * size, polynomial)
            if x.seed:
                at = self._tables.stored(np.frombuffer(x.seed, np.uint8))
                jobs.append((at, start + (2 * j + 1) * size, len(self.chain.primes)))
        self._tables.recorded(seed_launches(self.chain.degree, jobs, self._room))()
        return start

    def check_open(self) -> None:
        """Refuse a session that is closed.

        Raises
        ------
        InvalidInput
            It is.
        """
        if not self._end.alive:
            raise InvalidInput("he: the session on the GPU is closed; make another Server")

    def compute(self) -> None:
        """Queue the program on what is in place, without loading: to be timed."""
        for stage in self._stages:
            for _, run in stage.phases:
                run()

    def attend(self, parts: Sequence[Data], stage: int = 0, masks: Sequence[Words] = ()) -> list[bytes]:
        """Return the ciphertexts of a reply, or of a block's result, which nobody but the server may see.

        Parameters
        ----------
        parts : sequence of bytes
            The ciphertexts of a query, or of an answer to a masked result.
        stage : int
            The block.
        masks : sequence of (2, N) arrays
            What is to be subtracted from an answer (`refattn.he.integers.wide`).

        Raises
        ------
        InvalidInput
            A ciphertext of the query is none of the plan's, or the reply would be no secret; or the session is closed.
        """
        of = self._stages[stage]
        with self._lock:  # one query at a time has the memory
            return self._bytes(of, self._computed(of, [*parts, *masks]))

    def _computed(self, of: _Stage, parts: Sequence[Any]) -> list[Words]:
        """Return the words of a reply, none of which is without a second polynomial."""
        self.check_open()
        for steps, run in of.phases:
            self._load(of, [i for step in steps for i in of.schedule.sent(step)], parts)
            run()
        replies = [self._words(of, x) for x in of.schedule.replies]
        if not all(words[1].any() for words in replies):
            raise InvalidInput("he: the query cannot be computed: a result's second polynomial is zero")
        return replies

    def _bytes(self, of: _Stage, replies: Sequence[Words]) -> list[bytes]:
        nodes = of.schedule.replies
        return [ciphertext_bytes(w, self.chain, x.scale) for w, x in zip(replies, nodes, strict=True)]

    def _words(self, of: _Stage, node: Any) -> Words:
        shape = (node.size, node.limbs, self.chain.degree)
        found = self.device.get(self._memory + 8 * of.schedule.place(node), 8 * int(np.prod(shape)))
        return found.view(np.uint64).reshape(shape)

    def _load(self, of: _Stage, wanted: Sequence[int], parts: Sequence[Any]) -> None:
        """Check some ciphertexts of a query, and queue their way to the device, a batch while the next are checked."""
        waiting: deque[tuple[int, Sequence[int], Iterable[InvalidInput | None]]] = deque()
        try:
            for number, start in enumerate(range(0, len(wanted), BATCH)):
                if len(waiting) == BATCHES - 1:
                    self._send(of, *waiting.popleft())
                batch, place = wanted[start : start + BATCH], number % BATCHES
                if self._marks[place] is not None:
                    self.device.wait(self._marks[place])  # the device has read what was here
                chunks = list(_chunks(of, batch, chunk_of(len(wanted))))
                slots = [self._slots[place, at : at + len(x)] for at, x in chunks]
                given = [[parts[i] for i in x] for _, x in chunks]
                waiting.append(
                    (place, batch, self.each(partial(self._filled, of), [x for _, x in chunks], slots, given))
                )
            while waiting:
                self._send(of, *waiting.popleft())
        finally:
            for *_, done in waiting:
                list(done)  # after an error: no thread may write into a slot later
        if self._seeded:
            self.device.put(self._at_seeds, self._seeds)

    def _send(self, of: _Stage, place: int, batch: Sequence[int], done: Iterable[InvalidInput | None]) -> None:
        """Queue a batch's way to the device, when its threads have ended."""
        refused = [x for x in done if x is not None]
        if refused:
            raise refused[0]
        for i, slot in zip(batch, self._slots[place], strict=False):
            size = polynomial_bytes(self.chain, of.limbs[i], self._seeded) or 16 * self.chain.degree
            self.device.put(self._memory + 8 * of.schedule.place(of.schedule.inputs[i]), slot[:size])
        self._marks[place] = self.device.mark()

    def _filled(
        self, of: _Stage, chunk: Sequence[int], slots: NDArray[np.uint8], given: Sequence[Any]
    ) -> InvalidInput | None:
        """Put some ciphertexts' polynomials, checked, or masks into slots; return what is wrong with them."""
        limbs = of.limbs[chunk[0]]
        if not limbs:
            for slot, x in zip(slots, given, strict=True):
                slot[: x.nbytes] = x.reshape(-1).view(np.uint8)
            return None
        try:
            seeds = read_ciphertexts(given, self.chain, limbs, self._scale, self._seeded, slots)
        except InvalidInput as e:
            return e
        if self._seeded:
            self._seeds[chunk] = np.frombuffer(b"".join(seeds), np.uint8).reshape(len(chunk), SEED)
        return None

    def close(self) -> None:
        """Write zeros over the session's memory on the device and in what it reads, and give it back."""
        with self._lock:
            self._end()


def _chunks(of: _Stage, batch: Sequence[int], most: int) -> Iterator[tuple[int, Sequence[int]]]:
    """Yield what a thread takes at a time, all of one level, and where it begins in its batch."""
    at = 0
    for _, alike in groupby(batch, lambda i: of.limbs[i]):
        rest = list(alike)
        yield from ((at + i, rest[i : i + most]) for i in range(0, len(rest), most))
        at += len(rest)
