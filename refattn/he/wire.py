"""Messages between client and server: a version, what they are, whose, of which plan, and a digest of it all."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..errors import InvalidInput

__all__ = ["FRESH", "KEYS", "MASKED", "QUERY", "REPLY", "TOKEN", "Message", "kind_of", "pack", "query_of", "unpack"]

MAGIC, VERSION = b"refattn-he", 2
KEYS, QUERY, REPLY, MASKED, FRESH, TOKEN = 1, 2, 3, 4, 5, 6
NAMES = {
    KEYS: "evaluation keys",
    QUERY: "a query",
    REPLY: "a reply",
    MASKED: "a masked result",
    FRESH: "a refreshed result",
    TOKEN: "a token",
}
HEAD = struct.Struct("<10sBB32s16s16sI")
DIGEST = 32
MOST_PARTS = 2**16


@dataclass(frozen=True)
class Message:
    """A message.

    Attributes
    ----------
    kind : int
        KEYS, QUERY, REPLY, MASKED (of a block that is not the last), FRESH (the client's answer to it) or TOKEN (a
        query with the key and value that are kept; its first part is its place in its sequence).
    plan, client, query : bytes
        Digest of the plan, and random names of the client and of its query; of FRESH the name of the masked result.
    parts : tuple of bytes or memoryview
        What SEAL saved.
    """

    kind: int
    plan: bytes
    client: bytes
    query: bytes
    parts: tuple[bytes | memoryview, ...]


def pack(m: Message, each: Callable[..., Iterable[bytes]] = map) -> bytes:
    """Return a message's bytes; `each` as of `unpack`."""
    head = HEAD.pack(MAGIC, VERSION, m.kind, m.plan, m.client, m.query, len(m.parts))
    head += struct.pack(f"<{len(m.parts)}Q", *map(len, m.parts))
    return b"".join((head, *m.parts, _digest(head, m.parts, each)))


def _digest(head: bytes, parts: Sequence[bytes | memoryview], each: Callable[..., Iterable[bytes]]) -> bytes:
    """Return the digest of a message: of its head and its parts' digests."""
    most = max(1, min(8, len(parts) // 16))  # what a thread takes at a time: few large parts are for as many threads
    some = [parts[i : i + most] for i in range(0, len(parts), most)]
    return hashlib.sha256(b"".join((head, *each(_digests, some)))).digest()


def _digests(parts: Sequence[bytes | memoryview]) -> bytes:
    return b"".join(hashlib.sha256(x).digest() for x in parts)


def unpack(
    data: bytes,
    kind: int,
    plan: bytes,
    most: int,
    each: Callable[..., Iterable[bytes]] = map,
    parts: int | None = None,
) -> Message:
    """Return the message of some bytes.

    Parameters
    ----------
    data : bytes
        What came.
    kind : int
        What it must be.
    plan : bytes
        Digest of the plan that it must be of.
    most : int
        The most bytes that such a message may have.
    each : callable
        What maps a function over the parts: threads', to look at several at once.
    parts : int, optional
        How many parts it must have; by default any number up to `MOST_PARTS`. They are counted before any is looked at.

    Raises
    ------
    InvalidInput
        It is something else, of another version or plan, too long, cut short or changed.
    """
    if len(data) > most:
        raise InvalidInput(f"he: got {len(data)} bytes, expected at most {most} for {NAMES[kind]} of this plan")
    if len(data) < HEAD.size + DIGEST or data[: len(MAGIC)] != MAGIC:
        raise InvalidInput(f"he: got {len(data)} bytes that are no message; expected {NAMES[kind]}")
    _, version, found, of_plan, client, query, count = HEAD.unpack_from(data)
    if version != VERSION:
        raise InvalidInput(f"he: got a message of version {version}, expected {VERSION}")
    if found != kind:
        raise InvalidInput(f"he: got {NAMES.get(found, f'kind {found}')}, expected {NAMES[kind]}")
    if of_plan != plan:
        raise InvalidInput(f"he: got {NAMES[kind]} of another plan; client and server must use the same one")
    if count > MOST_PARTS if parts is None else count != parts:
        expected = f"at most {MOST_PARTS}" if parts is None else str(parts)
        raise InvalidInput(f"he: got {NAMES[kind]} of {count} parts, expected {expected} by the plan")
    changed = "he: the message was cut short or changed on its way: "
    end, at = len(data) - DIGEST, HEAD.size + 8 * count
    if at > end:
        raise InvalidInput(f"{changed}it says it has {count} parts, more than its bytes hold")
    sizes = struct.unpack_from(f"<{count}Q", data, HEAD.size)
    if at + sum(sizes) != end:
        raise InvalidInput(f"{changed}its parts do not fill it")
    whole, ends = memoryview(data), [at, *(at + x for x in accumulate(sizes))]
    found_parts = tuple(whole[i:j] for i, j in pairwise(ends))
    if _digest(data[:at], found_parts, each) != data[end:]:
        raise InvalidInput(f"{changed}its digest does not fit")
    return Message(kind, of_plan, client, query, found_parts)


def kind_of(data: bytes) -> int:
    """Return what a message says it is, without a look at anything else in it; 0 where it is none."""
    return int(HEAD.unpack_from(data)[2]) if len(data) >= HEAD.size and data.startswith(MAGIC) else 0


def query_of(data: bytes) -> bytes:
    """Return what a message names its query by, without a look at anything else in it; nothing where it is none."""
    return bytes(HEAD.unpack_from(data)[5]) if len(data) >= HEAD.size and data.startswith(MAGIC) else b""
