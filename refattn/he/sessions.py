"""Client and server: the client holds the secret key, the server evaluation keys only."""

from __future__ import annotations

import itertools
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput, UnsupportedProblem, WorkerDied
from ..validation import shown
from .ahead import from_slots
from .arguments import MOST_WORKERS, check_device, is_count
from .device.card import Card
from .device.masks import Masks as DeviceMasks
from .device.masks import zero_of as zero_words
from .device.session import Session
from .embedding import coefficients
from .encoder import Encoder
from .encoder_plan import EncoderPlan
from .layer import Layer
from .layer_plan import LayerPlan
from .plan import Plan
from .plausible import check_out, check_reply
from .processes import pool_of, stop
from .refresh import Masks, check_masked, plaintext_of, refreshed, zero_of
from .seal import from_bytes, primes
from .secret import Holder, Sharing
from .shared import Slice, held
from .transform import MOST, ready
from .wire import FRESH, KEYS, MASKED, QUERY, REPLY, Message, kind_of, pack, query_of, unpack
from .worker import Sent, Worker, begin, block

__all__ = ["Client", "Server", "Sharing"]

Float = NDArray[np.float64]
MOST_THREADS = 16
"""Threads that check a query's ciphertexts for a GPU."""
LARGE = 2**24
"""Bytes of a message from which on a client's threads share its digests."""
SLACK = 2
"""How many times the planned bytes a message may have."""


class Client(Holder):
    """Holds a secret key: encrypts queries, decrypts replies. The secret key has no way out of it.

    Parameters
    ----------
    plan : Plan, LayerPlan or EncoderPlan
        What the server will compute.
    compressed : bool
        Whether ciphertexts from seeds are sent compressed, which saves a seventh to a quarter of the bytes. Where the
        server is near, and has a GPU, it takes longer to undo that than to send them as they are.
    """

    def __init__(self, plan: Plan | LayerPlan | EncoderPlan, compressed: bool = True) -> None:
        if not isinstance(plan, Plan | LayerPlan | EncoderPlan):
            raise InvalidInput(f"plan: got {type(plan).__name__}, expected a plan: he.plan(...), or a program's .plan")
        super().__init__(plan, compressed)
        self._asked: dict[bytes, tuple[int, ...]] = {}  # shapes of the replies that are waited for
        self._stage: dict[bytes, int] = {}  # of an encoder's queries, the block that works on them

    def __repr__(self) -> str:
        return f"Client(degree {self.plan.ring.degree}, {len(self._asked)} queries without a reply)"

    def evaluation_keys(self) -> bytes:
        """Return what a server needs: keys for relinearisation, the plan's rotations and the conjugation."""
        parts = self._keys()
        if isinstance(self.plan, EncoderPlan):
            parts += (zero_of(self._encryptor, self.plan),)
        return pack(Message(KEYS, self.plan.digest, self._name, bytes(16), parts))

    def encrypt(self, x: Any) -> bytes:
        """Return a call as ciphertexts.

        Parameters
        ----------
        x : Problem or (n, d) array
            For a Plan a problem of variant "power", its sizes, p, epsilon and scale, NumPy arrays; for a LayerPlan the
            tokens.

        Raises
        ------
        InvalidProblem
            Its sizes or options are not the plan's, or its numbers leave the plan's ranges: the result would be wrong
            without a sign of it.
        """
        shape, slots = self.plan.encoded(x)
        parts: Any = self._zeros.sealed(slots)
        if parts is None:
            parts = tuple(self._encrypted(s, limbs) for s, limbs in slots)
        name = secrets.token_bytes(16)
        self._asked[name], self._stage[name] = shape, 0
        return self._packed(QUERY, name, parts)

    def _packed(self, kind: int, name: bytes, parts: tuple[bytes | memoryview, ...]) -> bytes:
        each = self._zeros.each if sum(map(len, parts)) >= LARGE else map
        return pack(Message(kind, self.plan.digest, self._name, name, parts), each)

    def prepare(self) -> None:
        """Make ahead what takes a client nearly all of its time, and depends on no input: encryptions of zero.

        The next call is then encrypted faster, several ciphertexts at once. Each is used once; for the call after that
        prepare again, e.g. while nobody waits. They are as secret as the input, and stay in this process.
        """
        plan = self.plan
        rounds = plan.rounds if isinstance(plan, EncoderPlan) else 1
        if max(primes(plan.ring)) >= MOST:
            raise UnsupportedProblem("he: a plan with a prime of more than 55 bits cannot be prepared for")
        wanted: Counter[int] = Counter()
        for stage in range(rounds):
            wanted.update(plan.part_limbs(stage) if isinstance(plan, EncoderPlan) else plan.part_limbs())
        zero = np.zeros(plan.ring.slots, np.complex128)
        ready(from_slots(plan.ring, zero), plan.ring, 1)  # tables, and what numba compiles, before threads want them
        if rounds > 1:
            coefficients((zero, zero))
        for limbs in (wanted - self._zeros.count()).elements():
            self._zeros.make(limbs)

    def ask(self, x: Any, attend: Callable[[bytes], bytes], share: Sharing | None = None) -> Float:
        """Return the result of a call: encrypt it, have it computed, answer masked results, decrypt.

        Parameters
        ----------
        x : Problem or (n, d) array
            As :meth:`encrypt` takes it.
        attend : callable
            What brings a message to the server and its answer back, e.g. ``server.attend``.
        share : Sharing, optional
            As :meth:`decrypt` takes it.
        """
        answer = attend(self.encrypt(x))
        while kind_of(answer) == MASKED:
            answer = attend(self.refresh(answer))
        return self.decrypt(answer, share)

    def refresh(self, masked: bytes) -> bytes:
        """Return the answer to a block's masked result: its numbers, which are random here, encrypted anew.

        Raises
        ------
        InvalidInput
            It is no masked result of a query of this client that waits for one, or of another structure.
        """
        plan = self.plan
        if not isinstance(plan, EncoderPlan):
            raise InvalidInput("he: got a masked result, which this plan has none of; it is of an encoder's plan")
        m = unpack(masked, MASKED, plan.digest, plan.reply_most, parts=1 + plan.masked)
        stage = self._stage.get(m.query, 0) + 1
        if m.client != self._name or m.query not in self._asked or stage >= plan.rounds:
            raise InvalidInput("he: got a masked result of another client or of no query that waits for one")
        name = bytes(m.parts[0])
        if len(name) != 16:
            raise InvalidInput(f"he: got a masked result with a name of {len(name)} bytes, expected 16")
        found = [from_bytes("Ciphertext", plan.ring, x) for x in m.parts[1:]]
        scales = check_masked(plan, found)
        jobs = refreshed(plan, stage, [self._opened(x) for x in found], scales, self._zeros.each)
        parts: Any = self._zeros.sealed(jobs)
        if parts is None:
            plains = self._zeros.each(partial(plaintext_of, plan), jobs)
            parts = tuple(self._sent(from_bytes("Plaintext", plan.ring, x)) for x in plains)
        self._stage[m.query] = stage
        return self._packed(FRESH, name, parts)

    def decrypt(self, reply: bytes, share: Sharing | None = None) -> Float:
        """Return the result, e.g. out (b, h, n_q, d_v), of a reply to a query of this client.

        Parameters
        ----------
        reply : bytes
            From the server.
        share : Sharing, optional
            The result will be shown to others: noise is added that drowns the encryption's. Not to be shown otherwise.

        Raises
        ------
        InvalidInput
            It is no reply to a query that waits for one, or one that cannot be right: of another structure, level or
        scale, with numbers that are not finite or larger than the plan's largest value and error. The query then waits
        for another one.
        UnsupportedProblem
            A result to be shared of a plan without a bound on its noise.
        """
        if share is not None and not isinstance(share, Sharing):
            raise InvalidInput(f"share: got {shown(share)}, expected he.Sharing(bits, results) or None")
        if share is not None and not isinstance(self.plan, Plan):
            raise UnsupportedProblem(
                "he: the plan of a layer has no bound on its noise, so nothing says how much drowns it"
            )
        plan = self.plan
        m = unpack(reply, REPLY, plan.digest, plan.reply_most, parts=plan.outs)
        if m.client != self._name or m.query not in self._asked:
            raise InvalidInput("he: got a reply to another client or to no query that waits for one")
        if isinstance(plan, EncoderPlan) and self._stage[m.query] != plan.rounds - 1:
            raise InvalidInput(
                f"he: got a reply after {self._stage[m.query]} of {plan.rounds - 1} masked results; it is not believed"
            )
        found = [from_bytes("Ciphertext", plan.ring, x) for x in m.parts]
        check_reply(plan, found)
        with np.errstate(all="ignore"):  # what is not finite is told below
            out: Float = plan.decoded([self._decrypted(x) for x in found], self._asked[m.query])
        check_out(plan, out)
        del self._asked[m.query], self._stage[m.query]
        if share is None or not isinstance(plan, Plan):
            return out
        return share.drowned(out, plan.noise)


class Server:
    """Computes on ciphertexts with a client's evaluation keys.

    Parameters
    ----------
    program : Plan, Layer or Encoder
        The client's plan; or the layer or encoder whose plan it is.
    keys : bytes
        What ``Client.evaluation_keys`` returned.
    workers : int
        Processes that share a query's blocks; they stay up until ``close``. 1 computes in this process (the binding
        holds Python's lock, so threads gain nothing). A GPU needs one.
    device : {"cpu", "cuda"}
        Where it is computed. On a GPU, the current one of CuPy, keys stay in its memory until ``close``, which writes
        zeros over them; the replies are the same words.
    """

    def __init__(self, program: Plan | Layer | Encoder, keys: bytes, workers: int = 1, device: str = "cpu") -> None:
        if not isinstance(program, Plan | Layer | Encoder):
            raise InvalidInput(f"program: got {type(program).__name__}, expected a plan, a he.Layer or a he.Encoder")
        if not isinstance(keys, bytes | bytearray | memoryview):
            raise InvalidInput(f"keys: got {type(keys).__name__}, expected the bytes of client.evaluation_keys()")
        if not is_count(workers, 1, MOST_WORKERS):
            raise InvalidInput(f"workers: got {shown(workers)}, expected an integer from 1 to {MOST_WORKERS}")
        check_device(device)
        if device == "cuda" and workers > 1:
            raise InvalidInput(f"workers: got {workers}, expected 1 for device='cuda', which has no processes to share")
        self.program, plan = program, program.plan
        self.plan = plan
        masks = isinstance(plan, EncoderPlan)
        m = unpack(keys, KEYS, plan.digest, SLACK * (plan.key_bytes + 2**20), parts=3 if masks else 2)
        self._client = m.client
        self._workers = workers
        self._queries = itertools.count()
        self._pool: ProcessPoolExecutor | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._each: Callable[..., Iterable[Any]] = map  # what needs no lock: digests and files
        self._masks: Masks | DeviceMasks | None = None
        self._worker: Worker | Session
        if device == "cuda":
            self._threads = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
            self._each = self._threads.map
            zero = zero_words(m.parts[2], plan) if isinstance(plan, EncoderPlan) else None  # refused before all else
            self._worker = session = Session(program, m.parts[:2], Card(plan.ring.degree), self._each)
            if isinstance(plan, EncoderPlan) and zero is not None:
                self._masks = DeviceMasks(plan, zero, session.schedules)
            return
        self._worker = Worker(program, m.parts[:2])  # also the check of the keys
        self._masks = Masks(plan, m.parts[2]) if isinstance(plan, EncoderPlan) else None
        if workers > 1:
            self._pool = pool_of(workers, begin, program, tuple(bytes(x) for x in m.parts[:2]))
            self._threads = ThreadPoolExecutor(workers)
            self._each = self._threads.map

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, and write zeros over what a GPU holds."""
        if isinstance(self._masks, DeviceMasks):
            self._masks.close()
        if isinstance(self._worker, Session):
            self._worker.close()
        if self._pool is not None:
            stop(self._pool)
        if self._threads is not None:
            self._threads.shutdown()

    def attend(self, query: bytes) -> bytes:
        """Return the reply to a query; of an encoder the masked result of its next block, until the last.

        Raises
        ------
        InvalidInput
            It is no query of this plan and this client, or was changed on its way; or an answer to no masked result
            that waits for one.
        """
        plan, masks = self.plan, self._masks
        if isinstance(self._worker, Session):
            self._worker.check_open()
        most, kind, stage = SLACK * (plan.upload_bytes + 2**20), QUERY, 0
        if masks is not None and kind_of(query) == FRESH:
            kind, stage = FRESH, masks.stage_of(query_of(query))
        limbs = masks.plan.part_limbs(stage) if masks is not None else plan.part_limbs()
        m = unpack(query, kind, plan.digest, most, self._each, parts=len(limbs))
        if m.client != self._client:
            raise InvalidInput("he: got a query of another client than the one whose keys are here")
        name, mask = m.query, []  # type: bytes, list[Any]
        if masks is not None and kind == FRESH:
            name, mask = masks.taken(m.query)
        if isinstance(self._worker, Session):
            try:
                outs = tuple(self._worker.attend(m.parts, stage, mask))
            finally:
                for x in mask:
                    x[:] = 0
        else:
            outs = self._on_cpu(self._worker, list(map(Sent, m.parts, limbs, mask or [b""] * len(limbs))), stage)
        if masks is not None and stage < masks.plan.rounds - 1:
            parts = masks.masked(name, stage + 1, outs)
            return pack(Message(MASKED, plan.digest, self._client, name, parts))
        return pack(Message(REPLY, plan.digest, self._client, name, outs))

    def _on_cpu(self, worker: Worker, parts: list[Sent], stage: int) -> tuple[bytes, ...]:
        try:
            return tuple(x for block in self._computed(worker, parts, stage) for x in block)
        finally:
            worker.forget()

    def _computed(self, worker: Worker, parts: list[Sent], stage: int) -> list[list[bytes]]:
        """Return the results of the blocks; workers read the ciphertexts from a file that is gone with the reply."""
        if self._pool is None:
            return [worker.block(*task, stage=stage) for task in self.program.tasks(parts)]
        with held([x.data for x in parts if not isinstance(x.data, Slice)], self._each) as slices:
            tasks = self.program.tasks([replace(x, data=s) for x, s in zip(parts, slices, strict=True)])
            groups = len({tuple(shared[:1]) for shared, _ in tasks})
            # blocks that share ciphertexts go to one worker, which loads them once, where that leaves none idle
            together = len(tasks) // groups if groups % self._workers == 0 else 1
            query = itertools.repeat(next(self._queries))
            try:
                stages = itertools.repeat(stage)
                return list(self._pool.map(block, query, stages, *zip(*tasks, strict=True), chunksize=together))
            except BrokenExecutor as e:
                raise WorkerDied(
                    "workers: a process ended before it was done, perhaps for want of memory; make another Server, "
                    "with fewer workers"
                ) from e
