"""Messages between client and server: a version, what they are, whose, of which plan, and a digest of it all."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from ..errors import InvalidInput

__all__ = ["KEYS", "QUERY", "REPLY", "Message", "pack", "unpack"]

MAGIC, VERSION = b"refattn-he", 1
KEYS, QUERY, REPLY = 1, 2, 3
NAMES = {KEYS: "evaluation keys", QUERY: "a query", REPLY: "a reply"}
HEAD = struct.Struct("<10sBB32s16s16sI")
DIGEST = 32


@dataclass(frozen=True)
class Message:
    """A message.

    Attributes
    ----------
    kind : int
        KEYS, QUERY or REPLY.
    plan, client, query : bytes
        Digest of the plan, and random names of the client and of its query.
    parts : tuple of bytes
        What SEAL saved.
    """

    kind: int
    plan: bytes
    client: bytes
    query: bytes
    parts: tuple[bytes, ...]


def pack(m: Message) -> bytes:
    """Return a message's bytes."""
    head = HEAD.pack(MAGIC, VERSION, m.kind, m.plan, m.client, m.query, len(m.parts))
    body = b"".join((head, struct.pack(f"<{len(m.parts)}Q", *map(len, m.parts)), *m.parts))
    return body + hashlib.sha256(body).digest()


def unpack(data: bytes, kind: int, plan: bytes, most: int) -> Message:
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
    if hashlib.sha256(memoryview(data)[:-DIGEST]).digest() != data[-DIGEST:]:
        raise InvalidInput("he: the message was cut short or changed on its way: its digest does not fit")
    if found != kind:
        raise InvalidInput(f"he: got {NAMES.get(found, f'kind {found}')}, expected {NAMES[kind]}")
    if of_plan != plan:
        raise InvalidInput(f"he: got {NAMES[kind]} of another plan; client and server must use the same one")
    end = len(data) - DIGEST
    at = HEAD.size + 8 * count
    if at > end:
        raise InvalidInput(f"he: the message says it has {count} parts, more than its bytes hold")
    sizes = struct.unpack_from(f"<{count}Q", data, HEAD.size)
    if at + sum(sizes) != end:
        raise InvalidInput("he: the message's parts do not fill it")
    parts = []
    for size in sizes:
        parts.append(data[at : at + size])
        at += size
    return Message(kind, of_plan, client, query, tuple(parts))
