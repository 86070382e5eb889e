"""Ciphertexts: the arithmetic on TenSEAL's binding of Microsoft SEAL, its keys, and their bytes."""

from __future__ import annotations

import atexit
import importlib
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO, FileIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput, UnsupportedProblem, install
from .arithmetic import Arithmetic
from .noise import Ring
from .shared import Slice, copied

__all__ = [
    "Sealed",
    "context",
    "decode",
    "encode",
    "fill",
    "from_bytes",
    "from_slice",
    "galois_elements",
    "level",
    "primes",
    "saved_body",
    "to_bytes",
    "unpacked",
    "whole_bytes",
]

KEPT = 2**24
"""Bytes that a file in memory keeps until its next use: fresh pages cost more than what is written to them."""
HEADER = struct.Struct("<HBBBBHQ")
"""SEAL's: a magic number, its own size, a version, the compression, nothing, and the size of all."""
ZSTD, NONE = 2, 0


def api() -> Any:
    """Return TenSEAL's raw binding of SEAL."""
    try:
        return importlib.import_module("tenseal.sealapi")
    except ModuleNotFoundError as e:
        raise UnsupportedProblem(f"he: needs the package tenseal; {install('he')}") from e


@cache
def context(ring: Ring) -> Any:
    """Return SEAL's context of a ring, at 128 bits of security.

    Raises
    ------
    UnsupportedProblem
        The chain is longer than 128 bits of security allow, or has no primes of its sizes.
    """
    s = api()
    parameters = s.EncryptionParameters(s.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(ring.degree)
    parameters.set_coeff_modulus(s.CoeffModulus.Create(ring.degree, ring.bits))
    made = s.SEALContext(parameters, True, s.SEC_LEVEL_TYPE.TC128)
    if not made.parameters_set():  # it does not raise by itself
        raise UnsupportedProblem(
            f"he: a chain of {sum(ring.bits)} bits at degree {ring.degree} is refused: "
            f"{made.parameters_error_message()}"
        )
    return made


def galois_elements(ring: Ring, rotations: Iterable[int]) -> list[int]:
    """Return the Galois elements of some rotations, and that of the conjugation."""
    steps = sorted({r % ring.slots for r in rotations} - {0})
    return [*(pow(3, r, 2 * ring.degree) for r in steps), 2 * ring.degree - 1]


def encode(encoder: Any, x: NDArray[np.complex128], ring: Ring, limbs: int) -> Any:
    """Return slots as a plaintext with some primes left."""
    plain = api().Plaintext()
    encoder.encode(x.tolist(), level(ring, limbs), 2.0**ring.middle, plain)
    return plain


@cache
def level(ring: Ring, limbs: int) -> Any:
    """Return SEAL's name of the level with some primes left."""
    data = context(ring).first_context_data()
    while data.chain_index() + 1 > limbs:
        data = data.next_context_data()
    return data.parms_id()


@cache
def primes(ring: Ring) -> list[int]:
    """Return the chain's primes, the last one that remains first."""
    data = context(ring).first_context_data()
    return [int(x.value()) for x in data.parms().coeff_modulus()]


def decode(encoder: Any, plain: Any) -> NDArray[np.complex128]:
    """Return a plaintext's slots."""
    return np.array(encoder.decode_complex(plain))


_free: list[FileIO] = []
"""Files in memory that nobody uses now."""


def _close() -> None:
    while _free:
        _free.pop().close()


atexit.register(_close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close)  # a child's files would be its parent's


@contextmanager
def _scratch() -> Iterator[tuple[FileIO, str]]:
    """Give a file and its path: where the system can, one in memory that has no other name and is used again."""
    if not hasattr(os, "memfd_create"):
        handle, path = tempfile.mkstemp()
        try:
            with FileIO(handle, "r+") as file:
                yield file, path
        finally:
            os.unlink(path)
        return
    file = _free.pop() if _free else FileIO(os.memfd_create("refattn"), "r+")
    try:
        yield file, f"/proc/self/fd/{file.fileno()}"
    finally:
        if os.fstat(file.fileno()).st_size > KEPT:
            file.truncate(KEPT)
        _free.append(file)


def to_bytes(x: Any) -> bytes:
    """Return what SEAL saves of an object."""
    with _scratch() as (file, path):
        x.save(path)
        file.seek(0)
        return file.readall()


def whole_bytes(encryptor: Any, plain: Any) -> bytes:
    """Return a ciphertext of a plaintext with both its polynomials, not compressed."""
    made = api().Ciphertext()
    encryptor.encrypt_symmetric(plain, made)
    return unpacked(to_bytes(made))


def unpacked(saved: bytes) -> bytes:
    """Return what SEAL saved, not compressed."""
    magic, size, major, minor, compression, reserved, _ = HEADER.unpack_from(saved)
    if compression == NONE:
        return saved
    body = saved_body(saved)
    return HEADER.pack(magic, size, major, minor, NONE, reserved, size + len(body)) + body


def saved_body(saved: bytes, most: int | None = None) -> bytes:
    """Return what SEAL saved, not compressed, without its header; no more than `most` bytes and one.

    Raises
    ------
    InvalidInput
        The bytes are none that SEAL saved, or compressed in another way than zstandard's.
    """
    if len(saved) < HEADER.size:
        raise InvalidInput(f"he: got {len(saved)} bytes, fewer than SEAL's header has")
    compression, body = HEADER.unpack_from(saved)[4], saved[HEADER.size :]
    if compression == NONE:
        return body if most is None else body[: most + 1]
    package = zstandard()
    try:
        if compression != ZSTD:
            raise InvalidInput(f"he: got bytes of SEAL's compression {compression}, expected {ZSTD} or {NONE}")
        with package.ZstdDecompressor().stream_reader(BytesIO(body)) as reader:
            return bytes(reader.read(-1 if most is None else most + 1))
    except package.ZstdError as e:
        raise InvalidInput(f"he: got bytes that zstandard does not know: {e}") from e


def zstandard() -> Any:
    """Return the package that undoes SEAL's compression."""
    try:
        return importlib.import_module("zstandard")
    except ModuleNotFoundError as e:
        raise UnsupportedProblem(
            f"he: what is sent uncompressed, and encoders, need the package zstandard; {install('he')}"
        ) from e


def from_bytes(kind: str, ring: Ring, data: bytes | memoryview) -> Any:
    """Return an object that SEAL saved: a Ciphertext, RelinKeys or GaloisKeys.

    Raises
    ------
    InvalidInput
        The bytes are none, or not of this ring.
    """
    with _scratch() as (file, path):
        fill(file, data)
        return _from_file(kind, ring, path)


def from_slice(kind: str, ring: Ring, part: Slice) -> Any:
    """Return an object of bytes that another process holds, as `from_bytes` does of bytes."""
    with _scratch() as (file, path):
        copied(part, file.fileno())
        return _from_file(kind, ring, path)


def fill(file: FileIO, data: bytes | memoryview) -> None:
    """Make a file hold these bytes and no others, in the pages that it has."""
    file.truncate(len(data))
    file.seek(0)
    rest = memoryview(data)
    while len(rest):
        rest = rest[file.write(rest) :]


def _from_file(kind: str, ring: Ring, path: str) -> Any:
    made = getattr(api(), kind)()
    try:
        made.load(context(ring), path)
    except (RuntimeError, ValueError, OverflowError, IndexError) as e:
        raise InvalidInput(f"he: got bytes that are no {kind} of this plan: {e}") from e
    return made


class Sealed(Arithmetic):
    """The arithmetic on ciphertexts; every operation leaves its operands as they are."""

    def __init__(self, ring: Ring, relin_keys: Any, galois_keys: Any) -> None:
        self.api, self.ring = api(), ring
        self.relin_keys, self.galois_keys = relin_keys, galois_keys
        made = context(ring)
        self.evaluator, self.encoder = self.api.Evaluator(made), self.api.CKKSEncoder(made)
        # one for each of the server's numbers at each level, whatever scales ciphertexts come with
        self._plains: dict[tuple[Any, int], tuple[float, Any]] = {}

    def _new(self, operation: Any, *operands: Any) -> Any:
        """Return a new ciphertext with an operation's result."""
        out = self.api.Ciphertext()
        operation(*operands, out)
        return out

    def _alike(self, a: Any, b: Any) -> tuple[Any, Any]:
        """Return both at the level of the lower."""
        x, y = a.coeff_modulus_size(), b.coeff_modulus_size()
        if x == y:
            return a, b
        higher, lower = (a, b) if x > y else (b, a)
        down = self._new(self.evaluator.mod_switch_to, higher, lower.parms_id())
        return (down, b) if x > y else (a, down)

    def mul(self, a: Any, b: Any, out: Any = None) -> Any:
        out = self.api.Ciphertext() if out is None else out
        self.evaluator.multiply(*self._alike(a, b), out)
        return out

    def square(self, a: Any) -> Any:
        return self._new(self.evaluator.square, a)

    def dot(self, a: Any, b: Any) -> Any:
        total, each = self.mul(a[0], b[0]), self.api.Ciphertext()
        for x, y in zip(a[1:], b[1:], strict=True):
            # as the sum is nobody else's, and always into the same memory
            self.evaluator.add_inplace(total, self.mul(x, y, each))
        return self.rescale(self.relinearize(total))

    def add(self, a: Any, b: Any) -> Any:
        return self._new(self.evaluator.add, *self._alike(a, b))

    def _constant(self, a: Any, c: float) -> Any:
        plain = self.api.Plaintext()
        self.encoder.encode(float(c), a.parms_id(), a.scale, plain)
        return plain

    def add_constant(self, a: Any, c: float) -> Any:
        return self._new(self.evaluator.add_plain, a, self._constant(a, c))

    def negate(self, a: Any) -> Any:
        return self._new(self.evaluator.negate, a)

    def times_constant(self, a: Any, c: float) -> Any:
        return self._new(self.evaluator.multiply_plain, a, self._constant(a, c))

    def times(self, a: Any, plain: Any) -> Any:
        return self._new(self.evaluator.multiply_plain, a, self._encoded(a, plain, plain.scale or a.scale))

    def plus(self, a: Any, plain: Any) -> Any:
        return self._new(self.evaluator.add_plain, a, self._encoded(a, plain, a.scale))

    def _encoded(self, a: Any, plain: Any, scale: float) -> Any:
        """Return a server's numbers at a ciphertext's level and a scale, encoded once while the scale is the same."""
        key = (plain, a.coeff_modulus_size())
        kept, made = self._plains.get(key, (None, None))
        if kept != scale:
            made = self.api.Plaintext()
            self.encoder.encode(plain.slots.tolist(), a.parms_id(), scale, made)
            self._plains[key] = (scale, made)
        return made

    def like(self, a: Any, b: Any) -> Any:
        limbs = b.coeff_modulus_size() + 1
        if a.coeff_modulus_size() < limbs:
            raise UnsupportedProblem("he: no level is left to bring numbers to one scale")
        if a.coeff_modulus_size() > limbs:
            a = self._new(self.evaluator.mod_switch_to, a, level(self.ring, limbs))
        one = self.api.Plaintext()
        prime = float(primes(self.ring)[limbs - 1])
        self.encoder.encode(1.0, a.parms_id(), b.scale * prime / a.scale, one)
        found = self.rescale(self._new(self.evaluator.multiply_plain, a, one))
        found.scale = b.scale  # but for rounding it is
        return found

    def relinearize(self, a: Any) -> Any:
        return self._new(self.evaluator.relinearize, a, self.relin_keys)

    def rescale(self, a: Any) -> Any:
        return self._new(self.evaluator.rescale_to_next, a)

    def rotate(self, a: Any, k: int) -> Any:
        k %= self.ring.slots
        step = k if k <= self.ring.slots // 2 else k - self.ring.slots
        return self._new(self.evaluator.rotate_vector, a, step, self.galois_keys)

    def conjugate(self, a: Any) -> Any:
        return self._new(self.evaluator.complex_conjugate, a, self.galois_keys)
