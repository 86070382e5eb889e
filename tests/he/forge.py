"""Messages that nobody honest sends, with digests that fit."""

import os
import struct

from refattn.he import wire
from refattn.he.seal import HEADER, NONE, zstandard

FIELDS = {"ntt": (32, "<?"), "size": (33, "<Q"), "scale": (57, "<d")}


def parts_of(message, kind, plan):
    return [bytes(p) for p in wire.unpack(message, kind, plan.digest, 2**32).parts]


def repacked(message, kind, plan, parts, query=None):
    m = wire.unpack(message, kind, plan.digest, 2**32)
    return wire.pack(wire.Message(kind, m.plan, m.client, m.query if query is None else query, tuple(parts)))


def body(saved):
    """Return what SEAL saved, not compressed, without its header."""
    compression = HEADER.unpack_from(saved)[4]
    data = saved[HEADER.size :]
    return data if compression == NONE else zstandard().ZstdDecompressor().decompressobj().decompress(data)


def saved_as(like, data):
    magic, size, major, minor, _, reserved, _ = HEADER.unpack_from(like)
    return HEADER.pack(magic, size, major, minor, NONE, reserved, size + len(data)) + data


def with_fields(saved, *, noise=False, zero=False, times=1.0, **fields):
    """Return a saved ciphertext with some fields changed, its scale times a factor, or its numbers drawn or 0."""
    data = bytearray(body(saved))
    for name, value in fields.items():
        at, form = FIELDS[name]
        struct.pack_into(form, data, at, value)
    if times != 1.0:
        struct.pack_into("<d", data, 57, struct.unpack_from("<d", data, 57)[0] * times)
    if noise or zero:
        data[65:] = os.urandom(len(data) - 65) if noise else bytes(len(data) - 65)
    return saved_as(saved, bytes(data))


def with_digits(keys, count):
    """Return saved keys of one element with its first digits only."""
    data = body(keys)
    at = 48  # after the level's name, the number of elements and that of digits
    for _ in range(count):
        at += HEADER.unpack_from(data, at)[-1]
    return saved_as(keys, data[:40] + struct.pack("<Q", count) + data[48:at])
