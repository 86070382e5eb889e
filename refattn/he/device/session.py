"""A client's session on a device: its keys there, a query's program recorded, and queries checked and computed."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidInput, UnsupportedProblem
from ..planned import Program
from ..seal import galois_elements
from .encode import encoded
from .format import Data, Received, ciphertext_bytes, polynomial_bytes, read_ciphertexts, read_keys
from .launches import Addresses, launches_of, seed_launches, seed_room
from .schedule import Schedule, Step, schedule_of
from .seeds import SEED
from .tables import Device, Tables
from .trace import Plain

__all__ = ["Session", "bytes_of"]

BATCH, BATCHES = 64, 3
"""Ciphertexts that are checked together, and such batches on their way: two are checked while the device reads one."""
CHUNK = 8
"""Ciphertexts of a batch that a thread takes at a time."""
ROOM = 2**28
"""Bytes left free beside a session: for the driver and for what is recorded."""
Each = Callable[..., Iterable[Any]]


def bytes_of(schedule: Schedule) -> int:
    """Return the device memory of a session: ciphertexts, keys, permutations, plaintexts and tables."""
    degree, primes = schedule.chain.degree, len(schedule.chain.primes)
    key = 16 * (primes - 1) * primes * degree
    plains = sum(8 * x.limbs * degree for x in _plains(schedule))
    elements = len(schedule.elements)
    return 8 * schedule.words + (elements + 1) * key + 4 * degree * elements + plains + Tables.bytes_of(schedule.chain)


def _plains(schedule: Schedule) -> list[Plain]:
    """Return what is to be encoded, each once."""
    found = (op.what for step in schedule.steps for op in step.operations if isinstance(op.what, Plain))
    return list(dict.fromkeys(found))


class Session:
    """Keys and a recorded program on a device.

    Parameters
    ----------
    program : Plan or Layer
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
        self.schedule = schedule = schedule_of(program)
        self.chain, self._limbs = schedule.chain, plan.part_limbs()
        self._scale, self._seeded = 2.0**plan.ring.middle, plan.upload != "whole"
        keys = self._read_keys(parts, galois_elements(plan.ring, plan.rotations))  # before any memory is asked for
        needed = bytes_of(schedule) + ROOM
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

    def _read_keys(self, parts: Sequence[Data], elements: Sequence[int]) -> dict[int, list[Received]]:
        relin = read_keys("RelinKeys", parts[0], self.chain, [0])
        galois = read_keys("GaloisKeys", parts[1], self.chain, [(e - 1) // 2 for e in elements])
        return {0: relin[0]} | {2 * index + 1: digits for index, digits in galois.items()}

    def _begin(self, keys: dict[int, list[Received]]) -> None:
        device, chain = self.device, self.chain
        self._tables = tables = Tables(device, chain)
        size = max(x.limbs for x in self.schedule.inputs) * 8 * chain.degree * (1 if self._seeded else 2)
        self._slots = device.pinned(BATCHES * BATCH * size).reshape(BATCHES, BATCH, size)
        self._marks: list[Any] = [None] * BATCHES
        limbs, degree = len(chain.primes), chain.degree
        most = max(sum(seed_room(self._limbs[i], degree) for i in s.loaded) for s in self.schedule.steps)
        self._room = device.empty(8 * max(most, (limbs - 1) * seed_room(limbs, degree)))
        used = {0, *self.schedule.elements}
        at_keys = {e: self._put_key(x) for e, x in keys.items() if e in used}
        self._memory = device.empty(8 * self.schedule.words)
        self._seeds = np.zeros((len(self._limbs), SEED), np.uint8)
        self._at_seeds = device.empty(self._seeds.nbytes) if self._seeded else 0
        self._at = Addresses(
            self._memory, at_keys, {e: tables.stored(chain.permutation(e)) for e in self.schedule.elements},
            {x: tables.stored(encoded(x, self.program.plan.ring)) for x in _plains(self.schedule)}, self._at_seeds,
            self._room,
        )  # fmt: skip
        self._phases = [(steps, self._recorded(steps)) for steps in self.schedule.phases]

    def _recorded(self, steps: Sequence[Step]) -> Callable[[], None]:
        return self._tables.recorded(*launches_of(self.schedule, steps, self._at))

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

    def compute(self) -> None:
        """Queue the program on what is in place, without loading: to be timed."""
        for _, run in self._phases:
            run()

    def attend(self, parts: Sequence[Data]) -> list[bytes]:
        """Return the ciphertexts of a reply.

        Raises
        ------
        InvalidInput
            A ciphertext of the query is none of the plan's, or the reply would be no secret; or the session is closed.
        """
        if not self._end.alive:
            raise InvalidInput("he: the session on the GPU is closed; make another Server")
        for steps, run in self._phases:
            self._load([i for step in steps for i in step.loaded], parts)
            run()
        replies = [self._reply(x) for x in self.schedule.outs]
        for words in replies:
            if not words[1].any():
                raise InvalidInput("he: the query cannot be computed: a result's second polynomial is zero")
        return [ciphertext_bytes(w, self.chain, x.scale) for w, x in zip(replies, self.schedule.outs, strict=True)]

    def _reply(self, node: Any) -> NDArray[np.uint64]:
        shape = (node.size, node.limbs, self.chain.degree)
        found = self.device.get(self._memory + 8 * self.schedule.place(node), 8 * int(np.prod(shape)))
        return found.view(np.uint64).reshape(shape)

    def _load(self, wanted: Sequence[int], parts: Sequence[Data]) -> None:
        """Check some ciphertexts of a query, and queue their way to the device, a batch while the next are checked."""
        waiting: deque[tuple[int, Sequence[int], Iterable[InvalidInput | None]]] = deque()
        try:
            for number, start in enumerate(range(0, len(wanted), BATCH)):
                if len(waiting) == BATCHES - 1:
                    self._send(*waiting.popleft())
                batch, place = wanted[start : start + BATCH], number % BATCHES
                if self._marks[place] is not None:
                    self.device.wait(self._marks[place])  # the device has read what was here
                chunks = list(self._chunks(batch))
                slots = [self._slots[place, at : at + len(x)] for at, x in chunks]
                given = [[parts[i] for i in x] for _, x in chunks]
                waiting.append((place, batch, self.each(self._filled, [x for _, x in chunks], slots, given)))
            while waiting:
                self._send(*waiting.popleft())
        finally:
            for *_, done in waiting:
                list(done)  # after an error: no thread may write into a slot later
        if self._seeded:
            self.device.put(self._at_seeds, self._seeds)

    def _chunks(self, batch: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
        """Yield what a thread takes at a time, all of one level, and where it begins in its batch."""
        at = 0
        for _, alike in groupby(batch, lambda i: self._limbs[i]):
            rest = list(alike)
            yield from ((at + i, rest[i : i + CHUNK]) for i in range(0, len(rest), CHUNK))
            at += len(rest)

    def _send(self, place: int, batch: Sequence[int], done: Iterable[InvalidInput | None]) -> None:
        """Queue a batch's way to the device, when its threads have ended."""
        refused = [x for x in done if x is not None]
        if refused:
            raise refused[0]
        for i, slot in zip(batch, self._slots[place], strict=False):
            size = polynomial_bytes(self.chain, self._limbs[i], self._seeded)
            self.device.put(self._memory + 8 * self.schedule.place(self.schedule.inputs[i]), slot[:size])
        self._marks[place] = self.device.mark()

    def _filled(self, chunk: Sequence[int], slots: NDArray[np.uint8], given: Sequence[Data]) -> InvalidInput | None:
        """Put some ciphertexts' polynomials, checked, into slots; return what is wrong with them."""
        try:
            limbs = self._limbs[chunk[0]]
            seeds = read_ciphertexts(given, self.chain, limbs, self._scale, self._seeded, slots)
        except InvalidInput as e:
            return e
        if self._seeded:
            self._seeds[chunk] = np.frombuffer(b"".join(seeds), np.uint8).reshape(len(chunk), SEED)
        return None

    def close(self) -> None:
        """Write zeros over the session's memory on the device and in what it reads, and give it back."""
        self._end()
