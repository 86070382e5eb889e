"""Client and server: the client holds the secret key, the server evaluation keys only."""

from __future__ import annotations

import itertools
import math
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput, UnsupportedProblem
from .layer import Layer
from .layer_plan import LayerPlan
from .plan import Plan
from .seal import (
    Sealed,
    api,
    context,
    decode,
    encode,
    fill,
    folder_for,
    from_bytes,
    from_file,
    galois_elements,
    to_bytes,
    whole_bytes,
)
from .wire import KEYS, QUERY, REPLY, Message, pack, unpack

__all__ = ["Client", "Server", "Sharing"]

Float = NDArray[np.float64]
Part = bytes | memoryview | Path
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
            It is no reply to a query that waits for one.
        UnsupportedProblem
            A result to be shared of a plan without a bound on its noise.
        """
        if share is not None and not isinstance(self.plan, Plan):
            raise UnsupportedProblem(
                "he: the plan of a layer has no bound on its noise, so nothing says how much drowns it"
            )
        plan = self.plan
        m = unpack(reply, REPLY, plan.digest, SLACK * (plan.upload_bytes + 2**20))
        if m.client != self._name or m.query not in self._asked:
            raise InvalidInput("he: got a reply to another client or to no query that waits for one")
        if len(m.parts) != plan.outs:
            raise InvalidInput(f"he: got a reply of {len(m.parts)} ciphertexts, expected {plan.outs}")
        slots = [self._decrypted(x) for x in m.parts]
        out = plan.decoded(slots, self._asked.pop(m.query))
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

    def _decrypted(self, data: bytes | memoryview) -> Any:
        plain = api().Plaintext()
        self._decryptor.decrypt(from_bytes("Ciphertext", self.plan.ring, data), plain)
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
        holds Python's lock, so threads gain nothing).
    """

    def __init__(self, program: Plan | Layer, keys: bytes, workers: int = 1) -> None:
        if workers < 1:
            raise InvalidInput(f"workers: got {workers}, expected at least 1")
        self.program, plan = program, program.plan
        self.plan = plan
        m = unpack(keys, KEYS, plan.digest, SLACK * (plan.key_bytes + 2**20))
        if len(m.parts) != 2:
            raise InvalidInput(f"he: got {len(m.parts)} evaluation keys, expected 2: relinearisation and rotations")
        self._client = m.client
        self._worker = _Worker(program, m.parts)  # also the check of the keys
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        # folders with a query's ciphertexts, written over by the next one: fresh pages cost more than the writing
        self._queries = itertools.count()
        self._made: list[str] = []
        self._free: list[str] = []
        self._gone = weakref.finalize(self, _remove, self._made)
        self._each: Callable[..., Iterable[Any]] = map  # what needs no lock: digests and files
        if workers > 1:
            given = (program, tuple(bytes(x) for x in m.parts))
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, given)
            self._each = ThreadPoolExecutor(workers).map

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, and give up the memory of their queries."""
        if self._pool is not None:
            self._pool.shutdown()
        self._gone()

    def attend(self, query: bytes) -> bytes:
        """Return the reply to a query.

        Raises
        ------
        InvalidInput
            It is no query of this plan and this client, or was changed on its way.
        """
        plan = self.plan
        most = SLACK * (plan.upload_bytes + 2**20)
        m = unpack(query, QUERY, plan.digest, most, self._each)
        if m.client != self._client:
            raise InvalidInput("he: got a query of another client than the one whose keys are here")
        wanted = plan.loads().total()
        if len(m.parts) != wanted:
            raise InvalidInput(f"he: got a query of {len(m.parts)} ciphertexts, expected {wanted}")
        if self._pool is None:
            found = [self._worker.block(*task) for task in self.program.tasks(m.parts)]
        else:
            found = self._shared_out(m.parts)
        return pack(Message(REPLY, plan.digest, self._client, m.query, tuple(x for outs in found for x in outs)))

    def _shared_out(self, parts: Sequence[bytes | memoryview]) -> list[list[bytes]]:
        """Return the results of the blocks, computed by the workers; they read the ciphertexts from files."""
        assert self._pool is not None
        try:
            folder = self._free.pop()
        except IndexError:
            folder = tempfile.mkdtemp(dir=folder_for(sum(map(len, parts))))
            self._made.append(folder)
        try:
            paths = [Path(folder, str(i)) for i in range(len(parts))]
            list(self._each(_write_over, paths, parts))
            tasks = self.program.tasks(paths)
            groups = len({tuple(shared[:1]) for shared, _ in tasks})
            # blocks that share ciphertexts go to one worker, which loads them once, where that leaves none idle
            together = len(tasks) // groups if groups % self._workers == 0 else 1
            query = itertools.repeat(next(self._queries))
            return list(self._pool.map(_block, query, *zip(*tasks, strict=True), chunksize=together))
        finally:
            self._free.append(folder)


def _remove(folders: list[str]) -> None:
    while folders:
        shutil.rmtree(folders.pop(), ignore_errors=True)


def _write_over(path: Path, data: bytes | memoryview) -> None:
    with FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        fill(file, data)


class _Worker:
    """What computes blocks: keys, and the last heads' keys and values."""

    def __init__(self, program: Plan | Layer, parts: Sequence[bytes | memoryview]) -> None:
        self.program, self.ring = program, program.plan.ring
        names = ("RelinKeys", "GaloisKeys")
        relin, galois = (from_bytes(n, self.ring, x) for n, x in zip(names, parts, strict=True))
        self._arithmetic = Sealed(self.ring, relin, galois)
        self._shared: tuple[Sequence[Part], list[Any]] = ((), [])
        self._query = -1

    def block(self, shared: Sequence[Part], queries: Sequence[Part], query: int = 0) -> list[bytes]:
        """Return the ciphertexts of a block's result, of ciphertexts as bytes or in files, of the query of a number."""
        # the files of another query may have the same names
        if query != self._query or not _same(self._shared[0], shared):
            self._shared, self._query = (shared, self._loaded(shared)), query
        outs = self.program.compute(self._arithmetic, self._shared[1], self._loaded(queries))
        return [to_bytes(x) for x in outs]

    def _loaded(self, parts: Sequence[Part]) -> list[Any]:
        name = "Ciphertext"
        return [
            from_file(name, self.ring, str(x)) if isinstance(x, Path) else from_bytes(name, self.ring, x) for x in parts
        ]


def _same(a: Sequence[Part], b: Sequence[Part]) -> bool:
    """Return whether these are the same files or the same objects; not what is in them, which takes long."""
    return len(a) == len(b) and all(x is y or (isinstance(x, Path) and x == y) for x, y in zip(a, b, strict=True))


_HERE: dict[str, _Worker] = {}
"""The worker of a process of the pool."""


def _begin(program: Plan | Layer, parts: tuple[bytes, ...]) -> None:
    _HERE["worker"] = _Worker(program, parts)


def _block(query: int, shared: Sequence[Path], queries: Sequence[Path]) -> list[bytes]:
    return _HERE["worker"].block(shared, queries, query)
