"""Client and server: the client holds the secret key, the server evaluation keys only."""

from __future__ import annotations

import secrets
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from ..problem import Problem
from .circuit import attend
from .inputs import divided, out_of, slots_of
from .plan import Plan
from .seal import Sealed, api, context, decode, encode, from_bytes, galois_elements, to_bytes
from .wire import KEYS, QUERY, REPLY, Message, pack, unpack

__all__ = ["Client", "Server"]

Float = NDArray[np.float64]
SLACK = 2
"""How many times the planned bytes a message may have."""


class Client:
    """Holds a secret key: encrypts queries, decrypts replies. The secret key has no way out of it.

    Parameters
    ----------
    plan : Plan
        What the server will compute.
    """

    def __init__(self, plan: Plan) -> None:
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

    def encrypt(self, problem: Problem) -> bytes:
        """Return a call as ciphertexts.

        Parameters
        ----------
        problem : Problem
            Of variant "power", the plan's sizes, p, epsilon and scale; NumPy arrays.

        Raises
        ------
        InvalidProblem
            Its sizes or options are not the plan's, or its numbers leave the plan's ranges: the result would be wrong
            without a sign of it.
        """
        q, k, v, seen = slots_of(self.plan, problem)
        layout, plan = self.plan.layout, self.plan
        parts: list[bytes] = []
        done: set[int] = set()
        for block in layout.blocks():
            if block[0] not in done:
                done.add(block[0])
                parts += [self._encrypted(x) for x in layout.key_slots(k, block)]
                parts += [self._encrypted(x, plan.value_limbs) for x in layout.value_slots(v, block)]
            parts += [self._encrypted(x) for x in layout.query_slots(q, seen, block)]
        name = secrets.token_bytes(16)
        self._asked[name] = problem.out_shape
        return pack(Message(QUERY, plan.digest, self._name, name, tuple(parts)))

    def decrypt(self, reply: bytes) -> Float:
        """Return out, (b, h, n_q, d_v), of a reply to a query of this client.

        Raises
        ------
        InvalidInput
            It is no reply to a query that waits for one.
        """
        plan = self.plan
        m = unpack(reply, REPLY, plan.digest, SLACK * (plan.upload_bytes + 2**20))
        if m.client != self._name or m.query not in self._asked:
            raise InvalidInput("he: got a reply to another client or to no query that waits for one")
        layout, each = plan.layout, plan.layout.outs + (plan.inverse is None)
        blocks = layout.blocks()
        if len(m.parts) != each * len(blocks):
            raise InvalidInput(f"he: got a reply of {len(m.parts)} ciphertexts, expected {each * len(blocks)}")
        pairs = np.zeros((plan.heads, layout.queries, layout.pairs), np.complex128)
        for i, block in enumerate(blocks):
            slots = [self._decrypted(x) for x in m.parts[each * i : each * (i + 1)]]
            layout.read(divided(plan, slots), pairs, block)
        return out_of(plan, self._asked.pop(m.query), pairs)

    def _encrypted(self, slots: Any, limbs: int | None = None) -> bytes:
        ring = self.plan.ring
        plain = encode(self._encoder, slots, ring, ring.levels + 1 if limbs is None else limbs)
        return to_bytes(self._encryptor.encrypt_symmetric(plain))

    def _decrypted(self, data: bytes) -> Any:
        plain = api().Plaintext()
        self._decryptor.decrypt(from_bytes("Ciphertext", self.plan.ring, data), plain)
        return decode(self._encoder, plain)


class Server:
    """Computes on ciphertexts with a client's evaluation keys.

    Parameters
    ----------
    plan : Plan
        The client's plan.
    keys : bytes
        What ``Client.evaluation_keys`` returned.
    workers : int
        Processes that share a query's blocks; they stay up until ``close``. 1 computes in this process (the binding
        holds Python's lock, so threads gain nothing).
    """

    def __init__(self, plan: Plan, keys: bytes, workers: int = 1) -> None:
        if workers < 1:
            raise InvalidInput(f"workers: got {workers}, expected at least 1")
        self.plan = plan
        m = unpack(keys, KEYS, plan.digest, SLACK * (plan.key_bytes + 2**20))
        if len(m.parts) != 2:
            raise InvalidInput(f"he: got {len(m.parts)} evaluation keys, expected 2: relinearisation and rotations")
        self._client = m.client
        self._worker = _Worker(plan, m.parts)  # also the check of the keys
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (plan, m.parts))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers."""
        if self._pool is not None:
            self._pool.shutdown()

    def attend(self, query: bytes) -> bytes:
        """Return the reply to a query.

        Raises
        ------
        InvalidInput
            It is no query of this plan and this client, or was changed on its way.
        """
        plan, layout = self.plan, self.plan.layout
        m = unpack(query, QUERY, plan.digest, SLACK * (plan.upload_bytes + 2**20))
        if m.client != self._client:
            raise InvalidInput("he: got a query of another client than the one whose keys are here")
        wanted = plan.loads().total()
        if len(m.parts) != wanted:
            raise InvalidInput(f"he: got a query of {len(m.parts)} ciphertexts, expected {wanted}")
        tasks, at, shared = [], 0, 2 * layout.shared_parts
        previous = None
        for head, _ in layout.blocks():
            if head != previous:
                previous, first = head, at
                at += shared
            tasks.append((m.parts[first : first + shared], m.parts[at : at + layout.query_parts]))
            at += layout.query_parts
        if self._pool is None:
            found = [self._worker.block(*t) for t in tasks]
        else:
            found = list(self._pool.map(_block, *zip(*tasks, strict=True)))
        return pack(Message(REPLY, plan.digest, self._client, m.query, tuple(x for outs in found for x in outs)))


class _Worker:
    """What computes blocks: keys, and the last heads' keys and values."""

    def __init__(self, plan: Plan, parts: tuple[bytes, ...]) -> None:
        self.plan = plan
        names = ("RelinKeys", "GaloisKeys")
        relin, galois = (from_bytes(n, plan.ring, x) for n, x in zip(names, parts, strict=True))
        self._arithmetic = Sealed(plan.ring, relin, galois)
        self._shared: tuple[tuple[bytes, ...], list[Any]] = ((), [])

    def block(self, shared: tuple[bytes, ...], queries: tuple[bytes, ...]) -> list[bytes]:
        """Return the ciphertexts of a block's result."""
        plan, half = self.plan, self.plan.layout.shared_parts
        if self._shared[0] != shared:
            self._shared = (shared, self._loaded(shared))
        keys, values = self._shared[1][:half], self._shared[1][half:]
        inputs = (self._loaded(queries), keys, values)
        outs = attend(self._arithmetic, plan.layout, plan.p, plan.inverse, plan.epsilon, plan.most, *inputs)
        return [to_bytes(x) for x in outs]

    def _loaded(self, parts: tuple[bytes, ...]) -> list[Any]:
        return [from_bytes("Ciphertext", self.plan.ring, x) for x in parts]


_HERE: dict[str, _Worker] = {}
"""The worker of a process of the pool."""


def _begin(plan: Plan, parts: tuple[bytes, ...]) -> None:
    _HERE["worker"] = _Worker(plan, parts)


def _block(shared: tuple[bytes, ...], queries: tuple[bytes, ...]) -> list[bytes]:
    return _HERE["worker"].block(shared, queries)
