"""SEAL's bytes without SEAL: ciphertexts and keys, read with all that SEAL checks at loading, and what the plan says.

Everything is little endian. An object is a header (a magic number, the header's size, a version, the compression, the
size of all) and a body. The body may be compressed, as a whole; objects inside it are not. A ciphertext: the level's
name, whether it is transformed, polynomials, degree, primes, scale, a factor that CKKS leaves at 1; then an object with
the words. Where the second polynomial is a seed, half of the words are there, and an object with the seed follows.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidInput
from ..seal import HEADER, NONE, ZSTD, zstandard
from .chain import Chain
from .modular import Words
from .seeds import SEED, expanded

__all__ = [
    "Received",
    "ciphertext_bytes",
    "polynomial_bytes",
    "read_ciphertext",
    "read_ciphertexts",
    "read_keys",
    "whole",
]

MAGIC, VERSION = 0xA15E, (4, 3)
LEAST_VERSION = (4, 0)
FIELDS = struct.Struct("<32sBQQQdQ")
FRONT = FIELDS.size + HEADER.size + 8
"""Bytes of a ciphertext's body before its words."""
BLAKE2XB = 1
"""SEAL's number of the generator that expands seeds."""
Data = bytes | memoryview
_OWN = threading.local()
"""Of each thread, what undoes compression: its own memory is not asked for again with each ciphertext."""


@dataclass(frozen=True)
class Received:
    """A ciphertext, or a digit of a key, as it came.

    Attributes
    ----------
    words : (1 or 2, primes, N) array
        Its polynomials; one where the second is a seed.
    seed : bytes
        Of the second, or none.
    """

    words: Words
    seed: bytes = b""


class _Reader:
    """What is left of some bytes, and what they are called in an error."""

    def __init__(self, what: str, data: memoryview) -> None:
        self.what, self.data, self.at = what, data, 0

    def refuse(self, why: str) -> InvalidInput:
        return InvalidInput(f"he: got bytes that are no {self.what} of this plan: {why}")

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise self.refuse(f"{count} bytes are expected where {len(self.data) - self.at} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def fields(self, form: struct.Struct) -> tuple[Any, ...]:
        return form.unpack(self.take(form.size))

    def number(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def expect(self, name: str, got: Any, *expected: Any) -> None:
        if got not in expected:
            raise self.refuse(f"{name}: got {got!r}, expected {' or '.join(map(repr, expected))}")

    def header(self) -> tuple[int, int]:
        """Return an object's compression and the size of its body."""
        magic, size, major, minor, compression, reserved, total = self.fields(HEADER)
        self.expect("its magic number", magic, MAGIC)
        self.expect("its header's size", size, HEADER.size)
        if not LEAST_VERSION <= (major, minor) <= VERSION:
            raise self.refuse(f"its version is {major}.{minor}, expected {LEAST_VERSION[0]}.0 to 4.{VERSION[1]}")
        self.expect("what its header has left", reserved, 0)
        if total < size:
            raise self.refuse(f"it says that it has {total} bytes")
        return compression, total - size

    def inner(self, size: int) -> None:
        """Read the header of an object inside another, with a body of so many bytes."""
        compression, found = self.header()
        self.expect("the compression of a part", compression, NONE)
        self.expect("the size of a part", found, size)

    def end(self) -> None:
        if self.at != len(self.data):
            raise self.refuse(f"{len(self.data) - self.at} bytes are left over")


def _body(what: str, data: Data, sizes: Iterable[int]) -> _Reader:
    """Return a reader of an object's body, decompressed; it must have one of some sizes."""
    reader = _Reader(what, memoryview(data).cast("B"))
    compression, size = reader.header()
    reader.expect("its size", size + HEADER.size, len(reader.data))
    reader.expect("its compression", compression, NONE, ZSTD)
    if compression == ZSTD:
        reader = _Reader(what, memoryview(_decompressed(reader, sizes)))
    reader.expect("its body's size", len(reader.data) - reader.at, *sizes)
    return reader


def _decompressed(reader: _Reader, sizes: Iterable[int]) -> bytes:
    """Return what one frame of zstd holds that fills the rest and says that it holds one of some sizes."""
    package, rest = zstandard(), reader.take(len(reader.data) - HEADER.size)
    try:
        reader.expect("its body's size", package.frame_content_size(rest), *sizes)
        if not hasattr(_OWN, "zstd"):
            _OWN.zstd = package.ZstdDecompressor()
        return bytes(_OWN.zstd.decompress(rest, allow_extra_data=False))
    except package.ZstdError as e:
        raise reader.refuse(f"what is compressed is damaged: {e}") from e


def read_ciphertext(data: Data, chain: Chain, limbs: int, scale: float, seeded: bool) -> Received:
    """Return a ciphertext: :func:`read_ciphertexts` of one."""
    room = np.empty((1, polynomial_bytes(chain, limbs, seeded)), np.uint8)
    (seed,) = read_ciphertexts([data], chain, limbs, scale, seeded, room)
    return Received(room.view("<u8").reshape(-1, limbs, chain.degree), seed)


def polynomial_bytes(chain: Chain, limbs: int, seeded: bool) -> int:
    """Return the bytes of what is there of a ciphertext's two polynomials."""
    return (8 if seeded else 16) * limbs * chain.degree


def read_ciphertexts(
    given: Sequence[Data], chain: Chain, limbs: int, scale: float, seeded: bool, into: NDArray[np.uint8]
) -> list[bytes]:
    """Write the polynomials of a query's ciphertexts, checked, and return the seeds of the second ones.

    Parameters
    ----------
    given : sequence of bytes
        What came.
    chain : Chain
        The ring's.
    limbs, scale : int, float
        The primes that each must have left, and its scale.
    seeded : bool
        Whether each second polynomial must be a seed, or must be there.
    into : (ciphertexts, bytes) uint8 array
        Where polynomials are written, a row for each. What is there after an error is of no ciphertext.

    Raises
    ------
    InvalidInput
        Some bytes are something else, or a word is not below its prime, or a second polynomial is zero.
    """
    size, seeds = polynomial_bytes(chain, limbs, seeded), []
    for data, row in zip(given, into, strict=True):
        reader = _body("Ciphertext", data, [_size(chain, limbs, seeded)])
        found, seed = _parts(reader, chain, limbs, scale, seeded)
        reader.end()
        row[:size] = np.frombuffer(found, np.uint8)
        seeds.append(seed)
    # all at once: a thread that waits for Python's lock before each check waits for longer than the check takes
    words = into[:, :size].view("<u8").reshape(len(into), -1, limbs, chain.degree)
    most = words.max(axis=3)
    if (most >= chain.q[:limbs]).any():
        raise reader.refuse("a word is not below its prime")
    if not seeded and not most[:, 1].any(axis=1).all():
        raise reader.refuse("its second polynomial is zero: nothing in it is encrypted")
    return seeds


def read_keys(what: str, data: Data, chain: Chain, indices: Iterable[int]) -> dict[int, list[Received]]:
    """Return the digits of some evaluation keys, by index: 0 for relinearisation, (e - 1)/2 for Galois element e.

    Parameters
    ----------
    what : {"RelinKeys", "GaloisKeys"}
        What to call them in an error.
    data : bytes
        What came.
    chain : Chain
        The ring's.
    indices : iterable of int
        The keys that must be there, and no others.

    Raises
    ------
    InvalidInput
        The bytes are something else, or a word is not below its prime.
    """
    wanted, primes = set(indices), len(chain.primes)
    count = 1 if wanted == {0} else chain.degree
    digits = [HEADER.size + _size(chain, primes, seeded) for seeded in (True, False)]
    sizes = [FIELDS_OF_KEYS + 8 * count + len(wanted) * (primes - 1) * size for size in digits]
    reader = _body(what, data, sizes)
    seeded = len(reader.data) - reader.at == sizes[0]
    reader.expect("its level", bytes(reader.take(32)) == chain.name(primes), True)
    reader.expect("its number of keys", reader.number(), count)
    found: dict[int, list[Received]] = {}
    for index in range(count):
        reader.expect(f"the digits of key {index}", reader.number(), primes - 1 if index in wanted else 0)
        if index in wanted:
            found[index] = []
            for _ in range(primes - 1):
                reader.inner(_size(chain, primes, seeded))
                found[index].append(_digit(reader, chain, seeded))
    reader.end()
    return found


FIELDS_OF_KEYS = 32 + 8
"""The level's name, and how many keys follow."""


def _size(chain: Chain, limbs: int, seeded: bool) -> int:
    """Return the size of a ciphertext's body."""
    seed = HEADER.size + 1 + SEED if seeded else 0
    return FRONT + polynomial_bytes(chain, limbs, seeded) + seed


def _parts(reader: _Reader, chain: Chain, limbs: int, scale: float, seeded: bool) -> tuple[memoryview, bytes]:
    """Return a ciphertext's words, not looked at, and its seed; all else that is said about them is checked."""
    _check_front(reader.what, bytes(reader.take(FRONT)), chain, limbs, scale, seeded)
    words = reader.take(polynomial_bytes(chain, limbs, seeded))
    if not seeded:
        return words, b""
    reader.inner(1 + SEED)
    reader.expect("its generator", reader.take(1)[0], BLAKE2XB)
    return words, bytes(reader.take(SEED))


@lru_cache(maxsize=64)  # of one level they are the same bytes
def _check_front(what: str, front: bytes, chain: Chain, limbs: int, scale: float, seeded: bool) -> None:
    """Check what is said about a ciphertext's words before they come."""
    reader = _Reader(what, memoryview(front))
    name, transformed, size, degree, primes, found_scale, factor = reader.fields(FIELDS)
    reader.expect("form for products", transformed, 1)
    reader.expect("polynomials", size, 2)
    reader.expect("coefficients", degree, chain.degree)
    reader.expect("primes", primes, limbs)
    reader.expect("its level", name == chain.name(limbs), True)
    reader.expect("scale", found_scale, scale)  # NaN, too
    reader.expect("its factor", factor, 1)
    size = polynomial_bytes(chain, limbs, seeded)
    reader.inner(8 + size)
    reader.expect("its words", reader.number(), size // 8)


def _digit(reader: _Reader, chain: Chain, seeded: bool) -> Received:
    """Return a digit of a key, at the level of all primes."""
    limbs = len(chain.primes)
    found, seed = _parts(reader, chain, limbs, 1.0, seeded)
    words = np.frombuffer(found, "<u8").reshape(-1, limbs, chain.degree)
    if (words.max(axis=2) >= chain.q).any():
        raise reader.refuse("a word is not below its prime")
    return Received(words, seed)


def whole(x: Received, chain: Chain) -> Words:
    """Return both polynomials, (2, primes, N)."""
    if not x.seed:
        return x.words
    return np.stack([x.words[0], expanded(x.seed, chain, x.words.shape[1])])


def ciphertext_bytes(words: Words, chain: Chain, scale: float) -> bytes:
    """Return what SEAL loads as a ciphertext, not compressed, of (polynomials, primes, N) words."""
    size, limbs, degree = words.shape
    inside = _object(struct.pack("<Q", words.size), np.ascontiguousarray(words, "<u8").tobytes())
    return _object(FIELDS.pack(chain.name(limbs), True, size, degree, limbs, scale, 1), inside)


def _object(*parts: bytes) -> bytes:
    head = HEADER.pack(MAGIC, HEADER.size, *VERSION, NONE, 0, HEADER.size + sum(map(len, parts)))
    return b"".join((head, *parts))
