"""Decoding with an encrypted cache: a client that encrypts tokens, a server that keeps those before."""

from __future__ import annotations

import os
import secrets
import struct
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from ..validation import shown
from .arguments import check_device
from .cache import Cache, Tokens, context_of
from .decoding_plan import DecodingPlan
from .device.card import Card
from .device.decoding import DecodingSession, is_zero, kind_of
from .linear import Plain
from .plausible import check_out, check_reply
from .seal import encode, from_bytes, to_bytes
from .secret import Holder, Sharing
from .sessions import MOST_THREADS, SLACK
from .wire import KEYS, REPLY, TOKEN, Message, pack, unpack
from .worker import Sent, Worker

__all__ = ["DecodingClient", "DecodingServer"]

Float = NDArray[np.float64]
PLACE = struct.Struct("<16sI")
"""A sequence's random name, and a token's number in it."""
MOST_SEQUENCES = 2**16
"""Names of sequences that a server remembers, so that none comes twice."""


class DecodingClient(Holder):
    """Holds a secret key: encrypts the tokens of a sequence one by one, decrypts replies.

    Parameters
    ----------
    plan : DecodingPlan
        What the server will compute.
    context_keys : (heads, context, d) array, optional
        Keys of the tokens in the clear, where the client knows them. Without them it cannot refuse a query whose
        denominator leaves the plan's range by what the server's context adds: the result is then wrong.
    """

    def __init__(self, plan: DecodingPlan, context_keys: Any = None) -> None:
        if not isinstance(plan, DecodingPlan):
            raise InvalidInput(f"plan: got {type(plan).__name__}, expected that of he.plan_decoding(...)")
        if context_keys is not None and plan.context == 0:
            raise InvalidInput("context_keys: got some, expected None: the plan has no tokens in the clear")
        super().__init__(plan)
        self._context_keys = context_keys
        self._asked: set[bytes] = set()
        self.begin()

    def __repr__(self) -> str:
        return f"DecodingClient(degree {self.plan.ring.degree}, {self.tokens} tokens of {self.plan.longest})"

    @property
    def tokens(self) -> int:
        """Tokens of the sequence that were encrypted."""
        return self._tokens.count

    def begin(self) -> None:
        """Begin another sequence, of which no token was encrypted; the server must drop its cache."""
        self._tokens, self._sequence = Tokens(self.plan, self._context_keys), secrets.token_bytes(16)

    def evaluation_keys(self) -> bytes:
        """Return what a server needs: keys for relinearisation, the plan's rotations and the conjugation."""
        return pack(Message(KEYS, self.plan.digest, self._name, bytes(16), self._keys()))

    def encrypt_token(self, q: Any, k: Any, v: Any) -> bytes:
        """Return the sequence's next token as ciphertexts: its query, and the key and value that the server keeps.

        Parameters
        ----------
        q, k : (heads, d) arrays
            The query and the key.
        v : (heads, d_v) array
            The value.

        Raises
        ------
        InvalidInput
            The sequence has its longest length.
        InvalidProblem
            Shapes that are not the plan's, or numbers that leave its ranges: the result would be wrong without a sign
            of it. The token is then none of the sequence.
        """
        place = PLACE.pack(self._sequence, self.tokens)
        parts = [self._encrypted(slots, limbs) for slots, limbs in self._tokens.encoded(q, k, v)]
        name = secrets.token_bytes(16)
        self._asked.add(name)
        return pack(Message(TOKEN, self.plan.digest, self._name, name, (place, *parts)))

    def decrypt(self, reply: bytes, share: Sharing | None = None) -> Float:
        """Return the attention of a token to all before it and itself, (heads, d_v), from the reply to it.

        Parameters
        ----------
        reply : bytes
            From the server.
        share : Sharing, optional
            As ``Client.decrypt`` takes it; each step's result counts as one.

        Raises
        ------
        InvalidInput
            It is no reply to a token that waits for one, or one that cannot be right. The token then waits for another.
        """
        if share is not None and not isinstance(share, Sharing):
            raise InvalidInput(f"share: got {shown(share)}, expected he.Sharing(bits, results) or None")
        plan = self.plan
        m = unpack(reply, REPLY, plan.digest, plan.reply_most, parts=plan.outs)
        if m.client != self._name or m.query not in self._asked:
            raise InvalidInput("he: got a reply to another client or to no token that waits for one")
        found = [from_bytes("Ciphertext", plan.ring, x) for x in m.parts]
        check_reply(plan, found)
        with np.errstate(all="ignore"):  # what is not finite is told below
            out: Float = plan.decoded([self._decrypted(x) for x in found], (plan.heads, plan.d_v))
        check_out(plan, out)
        self._asked.discard(m.query)
        return out if share is None else share.drowned(out, plan.noise)


class DecodingServer:
    """Keeps the encrypted keys and values of one sequence of a client, and answers its tokens.

    Parameters
    ----------
    plan : DecodingPlan
        The client's plan.
    keys : bytes
        What ``DecodingClient.evaluation_keys`` returned.
    context : (k, v), optional
        Keys and values in the clear, (heads, context, d) and (heads, context, d_v): of as many tokens as the plan says.
        They stay here.
    device : {"cpu", "cuda"}
        Where it is computed. On a GPU, the current one of CuPy, keys and cache stay in its memory until ``close``,
        which writes zeros over them; the replies are the same words.
    """

    def __init__(self, plan: DecodingPlan, keys: bytes, context: Any = None, device: str = "cpu") -> None:
        if not isinstance(plan, DecodingPlan):
            raise InvalidInput(f"plan: got {type(plan).__name__}, expected that of he.plan_decoding(...)")
        if not isinstance(keys, bytes | bytearray | memoryview):
            raise InvalidInput(f"keys: got {type(keys).__name__}, expected the bytes of client.evaluation_keys()")
        check_device(device)
        self.plan = plan
        m = unpack(keys, KEYS, plan.digest, SLACK * (plan.key_bytes + 2**20), parts=2)
        self._client, self._sequence = m.client, b""
        self._threads: ThreadPoolExecutor | None = None
        self._held: OnCpu | DecodingSession
        if device == "cuda":
            known = context_of(plan, context, partial(is_zero, plan))
            self._threads = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
            self._held = DecodingSession(plan, known, m.parts, Card(plan.ring.degree), self._threads.map)
        else:
            self._held = OnCpu(plan, m.parts, context)
        self._dropped: set[bytes] = set()
        self._lock = threading.Lock()  # a step is of the cache as it was

    def __repr__(self) -> str:
        return f"DecodingServer(degree {self.plan.ring.degree}, {self.tokens} tokens of {self.plan.longest})"

    def __enter__(self) -> DecodingServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Write zeros over what a GPU holds, and stop the threads that it needs."""
        if isinstance(self._held, DecodingSession):
            self._held.close()
        if self._threads is not None:
            self._threads.shutdown()

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return self._held.count

    @property
    def cache_bytes(self) -> int:
        """Of the ciphertexts in the cache now."""
        plan, spans = self.plan, kind_of(self.plan, self.tokens - 1)[0] if self.tokens else 0
        most = plan.shared_of(plan.layout, plan.n_k, plan.context)[0]
        return plan.cache_bytes // most * spans * plan.layout.parts

    def step(self, token: bytes) -> bytes:
        """Return the reply to a token, whose key and value are then in the cache.

        Raises
        ------
        InvalidInput
            It is no token of this plan and this client, was changed on its way, or is not the next one of the sequence
            in the cache. The cache is then as it was.
        """
        plan = self.plan
        with self._lock:
            parts = 1 + len(plan.part_limbs())
            m = unpack(token, TOKEN, plan.digest, SLACK * (plan.upload_bytes + 2**20), parts=parts)
            if m.client != self._client:
                raise InvalidInput("he: got a token of another client than the one whose keys are here")
            sequence = self._next(bytes(m.parts[0]))
            outs = tuple(self._held.step(m.parts[1:]))
            self._sequence = sequence
        return pack(Message(REPLY, plan.digest, self._client, m.query, outs))

    def drop(self) -> None:
        """Forget the cache: the next token is the first one of another sequence."""
        with self._lock:
            self._held.drop()
            if self._sequence:
                self._dropped.add(self._sequence)
            self._sequence = b""

    def _next(self, place: bytes) -> bytes:
        """Return the sequence of a token's place, where that is the next one."""
        if len(place) != PLACE.size:
            raise InvalidInput(f"he: got a token whose place has {len(place)} bytes, expected {PLACE.size}")
        sequence, number = PLACE.unpack(place)
        count, longest = self.tokens, self.plan.longest
        if sequence in self._dropped:
            raise InvalidInput("he: got a token of a sequence whose cache was dropped; begin another one")
        if self._sequence and sequence != self._sequence:
            raise InvalidInput(
                f"he: got a token of another sequence than the one in the cache, of {count} tokens; drop that first"
            )
        if count >= longest:
            raise InvalidInput(f"he: the cache has its longest, {longest} tokens; drop it, or plan a longer one")
        if number != count:
            again = "again" if number < count else "before those between"
            raise InvalidInput(f"he: got token {number} {again}, expected token {count}: each comes once, in order")
        if not self._sequence and len(self._dropped) >= MOST_SEQUENCES:
            raise InvalidInput(f"he: {MOST_SEQUENCES} sequences of this client were dropped; make another client")
        return bytes(sequence)


class OnCpu:
    """A cache of SEAL's ciphertexts, with a client's keys.

    Parameters
    ----------
    plan : DecodingPlan
        What is computed.
    parts : two of bytes
        Relinearisation keys and rotation keys.
    context : (k, v) or None
        Keys and values in the clear.
    """

    def __init__(self, plan: DecodingPlan, parts: Sequence[bytes | memoryview], context: Any) -> None:
        self.plan, self._worker = plan, Worker(plan, parts)
        self.arithmetic = self._worker.arithmetic
        self.cache = self._empty = Cache(plan, context_of(plan, context, self._zero))

    @property
    def count(self) -> int:
        """Tokens in the cache."""
        return self.cache.count

    def step(self, parts: Sequence[bytes | memoryview]) -> list[bytes]:
        """Return the ciphertexts of a reply; the token is then in the cache, and not where anything fails."""
        loaded = self._worker.loaded(list(map(Sent, parts, self.plan.part_limbs())))
        try:
            after = self.cache.appended(self.arithmetic, loaded)
            found = [to_bytes(x) for x in after.attend(self.arithmetic, loaded)]
        except (RuntimeError, ValueError) as e:  # SEAL's: honest ciphertexts do not come so far
            raise InvalidInput(f"he: the token cannot be computed: {e}; encrypt it anew") from e
        self.cache = after
        return found

    def drop(self) -> None:
        """Forget the cache."""
        self.cache = self._empty

    def _zero(self, plain: Plain) -> bool:
        """Tell whether numbers are all zero once they are encoded: SEAL takes no product with those."""
        ring = self.plan.ring
        return bool(encode(self.arithmetic.encoder, plain.slots, ring, ring.levels + 1).is_zero())
