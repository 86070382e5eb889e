"""Client and server: the client holds the secret key, the server evaluation keys only."""

from __future__ import annotations

import itertools
import math
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput, UnsupportedProblem, WorkerDied
from .device.card import Card
from .device.session import Session
from .layer import Layer
from .layer_plan import LayerPlan
from .plan import Plan
from .plausible import check_out, check_reply
from .processes import pool_of, stop
from .seal import api, context, decode, encode, from_bytes, galois_elements, to_bytes, whole_bytes
from .shared import held
from .wire import KEYS, QUERY, REPLY, Message, pack, unpack
from .worker import Sent, Worker, begin, block

__all__ = ["Client", "Server", "Sharing"]

Float = NDArray[np.float64]
MOST_THREADS = 16
"""Threads that check a query's ciphertexts for a GPU."""
SLACK = 2
"""How many times the planned bytes a message may have."""


@dataclass(frozen=True)
class Sharing:
    """How a decrypted result is made fit to be shown (noise flooding): see the page on security.

    Attributes
    ----------
    bits : int
        s: an attacker's advantage is at most about 2**-s (statistical security).
    results : int
        How many results of one key will be shown in all.
    """

    bits: int = 30
    results: int = 1

    def __post_init__(self) -> None:
        if self.bits < 1 or self.results < 1:
            raise InvalidInput(f"he: got {self.bits} bits and {self.results} results, expected at least 1")

    def deviation(self, noise: float) -> float:
        """Return the standard deviation to add where the encryption's noise is at most so large.

        sqrt(12·results)·2**(bits/2) times it: Li, Micciancio, Schultz and Sorrell, 2022 (ePrint 2022/816), as OpenFHE
        uses it; recalled from OpenFHE's documentation, not from the paper.
        """
        return float(math.sqrt(12 * self.results) * 2.0 ** (self.bits / 2) * noise)


class Client:
    """Holds a secret key: encrypts queries, decrypts replies. The secret key has no way out of it.

    Parameters
    ----------
    plan : Plan or LayerPlan
        What the server will compute.
    """

    def __init__(self, plan: Plan | LayerPlan) -> None:
        self.plan = plan
        s, made = api(), context(plan.ring)
        self._generator = s.KeyGenerator(made)
        secret = self._generator.secret_key()
        self._public = s.PublicKey()
        self._generator.create_public_key(self._public)
        self._encryptor = s.Encryptor(made, self._public, secret)
        self._decryptor = s.Decryptor(made, secret)
        self._encoder = s.CKKSEncoder(made)
        self._name = secrets.token_bytes(16)
        self._asked: dict[bytes, tuple[int, ...]] = {}  # shapes of the replies that are waited for

    def __repr__(self) -> str:
        return f"Client(degree {self.plan.ring.degree}, {len(self._asked)} queries without a reply)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a client holds a secret key and is not pickled or copied")

    def evaluation_keys(self) -> bytes:
        """Return what a server needs: keys for relinearisation, the plan's rotations and the conjugation."""
        relin = self._generator.create_relin_keys()
        galois = self._generator.create_galois_keys(galois_elements(self.plan.ring, self.plan.rotations))
        parts = (to_bytes(relin), to_bytes(galois))
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
        parts = tuple(self._encrypted(s, limbs) for s, limbs in slots)
        name = secrets.token_bytes(16)
        self._asked[name] = shape
        return pack(Message(QUERY, self.plan.digest, self._name, name, parts))

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
        if share is not None and not isinstance(self.plan, Plan):
            raise UnsupportedProblem(
                "he: the plan of a layer has no bound on its noise, so nothing says how much drowns it"
            )
        plan = self.plan
        m = unpack(reply, REPLY, plan.digest, plan.reply_most, parts=plan.outs)
        if m.client != self._name or m.query not in self._asked:
            raise InvalidInput("he: got a reply to another client or to no query that waits for one")
        found = [from_bytes("Ciphertext", plan.ring, x) for x in m.parts]
        check_reply(plan, found)
        with np.errstate(all="ignore"):  # what is not finite is told below
            out = plan.decoded([self._decrypted(x) for x in found], self._asked[m.query])
        check_out(plan, out)
        del self._asked[m.query]
        if share is None or not isinstance(plan, Plan):
            return out
        draw = secrets.SystemRandom().gauss
        deviation = share.deviation(plan.noise)
        return np.asarray(out + np.array([draw(0.0, deviation) for _ in range(out.size)]).reshape(out.shape))

    def _encrypted(self, slots: Any, limbs: int) -> bytes:
        plain = encode(self._encoder, slots, self.plan.ring, limbs)
        if self.plan.upload == "whole":
            return whole_bytes(self._encryptor, plain)
        return to_bytes(self._encryptor.encrypt_symmetric(plain))

    def _decrypted(self, ciphertext: Any) -> Any:
        plain = api().Plaintext()
        self._decryptor.decrypt(ciphertext, plain)
        return decode(self._encoder, plain)


class Server:
    """Computes on ciphertexts with a client's evaluation keys.

    Parameters
    ----------
    program : Plan or Layer
        The client's plan; or the layer whose plan it is.
    keys : bytes
        What ``Client.evaluation_keys`` returned.
    workers : int
        Processes that share a query's blocks; they stay up until ``close``. 1 computes in this process (the binding
        holds Python's lock, so threads gain nothing). A GPU needs one.
    device : {"cpu", "cuda"}
        Where it is computed. On a GPU, the current one of CuPy, keys stay in its memory until ``close``, which writes
        zeros over them; the replies are the same words.
    """

    def __init__(self, program: Plan | Layer, keys: bytes, workers: int = 1, device: str = "cpu") -> None:
        if workers < 1:
            raise InvalidInput(f"workers: got {workers}, expected at least 1")
        if device not in ("cpu", "cuda"):
            raise InvalidInput(f"device: got {device!r}, expected 'cpu' or 'cuda'")
        if device == "cuda" and workers > 1:
            raise InvalidInput(f"workers: got {workers}, expected 1 for device='cuda', which has no processes to share")
        self.program, plan = program, program.plan
        self.plan = plan
        m = unpack(keys, KEYS, plan.digest, SLACK * (plan.key_bytes + 2**20), parts=2)
        self._client = m.client
        self._workers = workers
        self._queries = itertools.count()
        self._pool: ProcessPoolExecutor | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._each: Callable[..., Iterable[Any]] = map  # what needs no lock: digests and files
        self._worker: Worker | Session
        if device == "cuda":
            self._threads = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
            self._each = self._threads.map
            self._worker = Session(program, m.parts, Card(plan.ring.degree), self._each)
            return
        self._worker = Worker(program, m.parts)  # also the check of the keys
        if workers > 1:
            self._pool = pool_of(workers, begin, program, tuple(bytes(x) for x in m.parts))
            self._threads = ThreadPoolExecutor(workers)
            self._each = self._threads.map

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, and write zeros over what a GPU holds."""
        if isinstance(self._worker, Session):
            self._worker.close()
        if self._pool is not None:
            stop(self._pool)
        if self._threads is not None:
            self._threads.shutdown()

    def attend(self, query: bytes) -> bytes:
        """Return the reply to a query.

        Raises
        ------
        InvalidInput
            It is no query of this plan and this client, or was changed on its way.
        """
        plan = self.plan
        most = SLACK * (plan.upload_bytes + 2**20)
        limbs = plan.part_limbs()
        m = unpack(query, QUERY, plan.digest, most, self._each, parts=len(limbs))
        if m.client != self._client:
            raise InvalidInput("he: got a query of another client than the one whose keys are here")
        if isinstance(self._worker, Session):
            found = [self._worker.attend(m.parts)]
            return pack(Message(REPLY, plan.digest, self._client, m.query, tuple(found[0])))
        try:
            found = self._computed(self._worker, m.parts, limbs)
        finally:
            self._worker.forget()
        return pack(Message(REPLY, plan.digest, self._client, m.query, tuple(x for outs in found for x in outs)))

    def _computed(self, worker: Worker, parts: Sequence[bytes | memoryview], limbs: Sequence[int]) -> list[list[bytes]]:
        """Return the results of the blocks; workers read the ciphertexts from a file that is gone with the reply."""
        if self._pool is None:
            return [worker.block(*task) for task in self.program.tasks(list(map(Sent, parts, limbs)))]
        with held(parts, self._each) as slices:
            tasks = self.program.tasks(list(map(Sent, slices, limbs)))
            groups = len({tuple(shared[:1]) for shared, _ in tasks})
            # blocks that share ciphertexts go to one worker, which loads them once, where that leaves none idle
            together = len(tasks) // groups if groups % self._workers == 0 else 1
            query = itertools.repeat(next(self._queries))
            try:
                return list(self._pool.map(block, query, *zip(*tasks, strict=True), chunksize=together))
            except BrokenExecutor as e:
                raise WorkerDied(
                    "workers: a process ended before it was done, perhaps for want of memory; make another Server, "
                    "with fewer workers"
                ) from e
