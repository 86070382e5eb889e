"""Polynomials with large whole coefficients in SEAL's plaintexts and ciphertexts, exactly: words modulo each prime.

SEAL encodes float64 numbers only, and transforms ciphertexts but no plaintexts; both are gone round here by the bytes
that it saves and loads, which it checks.
"""

from __future__ import annotations

import secrets
import struct
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from ..exact.doubledouble import two_prod, two_sum
from .embedding import Pair
from .noise import Ring
from .seal import HEADER, NONE, api, context, from_bytes, level, primes, saved_body, to_bytes
from .structure import check_ciphertext
from .transform import ready

__all__ = [
    "add", "composed", "drawn", "flooded", "plaintext", "residues", "saved", "seeded", "small", "transformed",
    "wide", "words_of",
]  # fmt: skip

Words = NDArray[np.uint64]
"""(primes, N): a polynomial modulo each prime that is left."""
MOST_FIRST = 52
"""Bits of a prime whose residues float64 holds."""
FIELDS = struct.Struct("<?QQQdQ")
"""Of a saved ciphertext, after its level's name: form for products, polynomials, coefficients, primes, scale, and 1."""
FRONT = 32 + FIELDS.size + HEADER.size + 8
"""Bytes before a ciphertext's words."""
PLAIN_FRONT = 32 + 16 + HEADER.size + 8
SEED = HEADER.size + 1 + 64
"""Bytes of a saved seed, which stands where a second polynomial would: a header, a kind, 512 bits."""


@cache
def _header() -> tuple[int, ...]:
    return HEADER.unpack_from(to_bytes(api().Plaintext()))


def saved(data: bytes, compression: int = NONE) -> bytes:
    """Return what SEAL saves of an object, from its body, which may be compressed."""
    magic, size, major, minor, *_ = _header()
    return HEADER.pack(magic, size, major, minor, compression, 0, size + len(data)) + data


def _array(words: Words) -> bytes:
    return saved(struct.pack("<Q", words.size) + words.tobytes())


def _name(ring: Ring, limbs: int) -> bytes:
    return struct.pack("<4Q", *level(ring, limbs))


def ciphertext(ring: Ring, words: Words, scale: float, ready: bool) -> Any:
    """Return a ciphertext of two polynomials' words, (2, primes, N), in the form for products or by coefficients."""
    _, limbs, degree = words.shape
    fields = FIELDS.pack(ready, 2, degree, limbs, scale, 1)
    return from_bytes("Ciphertext", ring, saved(_name(ring, limbs) + fields + _array(words)))


def words_of(ring: Ring, x: Any) -> Words:
    """Return the words of a ciphertext, (2, primes, N), or of a plaintext, (primes, N)."""
    whole = hasattr(x, "coeff_modulus_size")
    found = np.frombuffer(saved_body(to_bytes(x))[FRONT if whole else PLAIN_FRONT :], np.uint64)
    return found.reshape(*((2,) if whole else ()), -1, ring.degree)


def transformed(ring: Ring, words: Words, ready: bool) -> Words:
    """Return a polynomial's words ready for products, from those of its coefficients; or these from those."""
    evaluator = api().Evaluator(context(ring))
    other = np.zeros_like(words)  # 1, the polynomial: SEAL takes no ciphertext whose second one is 0
    other[:, : 1 if ready else None] = 1
    x = ciphertext(ring, np.stack([words, other]), 2.0**ring.middle, not ready)
    (evaluator.transform_to_ntt_inplace if ready else evaluator.transform_from_ntt_inplace)(x)
    return np.asarray(words_of(ring, x)[0])


def plaintext(ring: Ring, p: Pair, limbs: int, scale: float) -> bytes:
    """Return what SEAL saves of a plaintext with given coefficients.

    Parameters
    ----------
    ring : Ring
        The chain.
    p : pair of (N,) float arrays
        Whole numbers, which add up to the coefficients: the first below 2**112, the second below 2**60 in size.
    limbs : int
        Primes left.
    scale : float
        What its numbers are multiplied with.
    """
    return _plain(ring, ready(p, ring, limbs), scale)


def _plain(ring: Ring, words: Words, scale: float) -> bytes:
    return saved(_name(ring, len(words)) + struct.pack("<Qd", words.size, scale) + _array(words))


def residues(p: Pair, moduli: list[int]) -> Words:
    """Return whole numbers modulo some primes below 2**60."""
    high, low = p
    top = np.trunc(high * 2.0**-60)  # of the same sign: what is left is exact
    rest = (high - top * 2.0**60).astype(np.int64)
    top, low = top.astype(np.int64), low.astype(np.int64)
    found = [(_product(top, pow(2, 60, q), q) + rest % q + low % q) % q for q in moduli]
    return np.array(found).astype(np.uint64)


def wide(p: Pair) -> Words:
    """Return whole numbers as words, (2, N): the lower 64 bits of their size, the upper ones with the sign on top.

    Parameters
    ----------
    p : pair of (N,) float arrays
        As :func:`plaintext` takes it.
    """
    high, low = p
    top = np.trunc(high * 2.0**-60)  # of the same sign: what is left is exact
    rest = (high - top * 2.0**60).astype(np.int64) + low.astype(np.int64)
    top = top.astype(np.int64)
    lower = top.astype(np.uint64) << np.uint64(60)
    total = lower + rest.astype(np.uint64)
    upper = (top >> 4) + (rest >> 63) + (total < lower)
    negative = upper < 0
    upper = np.where(negative, ~upper + (total == 0), upper).astype(np.uint64)
    signs = negative.astype(np.uint64) << np.uint64(63)
    return np.stack([np.where(negative, np.uint64(0) - total, total), upper | signs])


def _product(a: Any, b: int, q: int) -> Any:
    """Return a·b modulo q for whole numbers a below 2**52 in size: the quotient is near, the rest wraps rightly."""
    near = np.rint(a.astype(np.float64) * (b / q)).astype(np.int64)
    with np.errstate(over="ignore"):
        return (a * np.int64(b) - near * np.int64(q)) % q


def composed(words: Words, moduli: list[int]) -> Pair:
    """Return the whole numbers with two residues, exactly, out of Q = q0·q1 that follow one another, near 0.

    Parameters
    ----------
    words : (2, N) array
        The residues.
    moduli : list of int
        q0 and q1, below 2**52.

    Returns
    -------
    pair of float arrays
        x0 + q0·k with k from -(q1 - 1)/2 to (q1 - 1)/2.
    """
    q0, q1 = moduli
    first, second = words.astype(np.int64)
    k = _product((second - first) % q1, pow(q0, -1, q1), q1)
    k = np.where(k > q1 // 2, k - q1, k)
    high, low = two_prod(np.float64(q0), k.astype(np.float64))
    high, more = two_sum(high, first.astype(np.float64))
    return two_sum(high, low + more)  # whole numbers below 2**53: no rounding


def drawn(moduli: list[int], degree: int) -> Words:
    """Return a polynomial drawn from all that there are modulo Q, by the system's random numbers."""
    return np.array([_uniform(q, degree) for q in moduli])


def _uniform(q: int, count: int) -> Words:
    found = np.empty(0, np.uint64)
    mask = np.uint64((1 << q.bit_length()) - 1)
    while len(found) < count:  # those above q are drawn anew
        more = np.frombuffer(secrets.token_bytes(16 * count), np.uint64) & mask
        found = np.concatenate([found, more[more < q]])
    return found[:count]


def small(moduli: list[int], degree: int, ternary: bool) -> Words:
    """Return a small polynomial as words: of -1, 0 and 1, or of differences of two sums of 21 bits (SEAL's errors)."""
    if ternary:
        p = _uniform(3, degree).astype(np.int64) - 1
    else:
        bits = np.frombuffer(secrets.token_bytes(8 * degree), np.uint8).reshape(2, degree, 4)
        counts = np.unpackbits(bits, axis=2)[..., :21].sum(2, dtype=np.int64)
        p = counts[0] - counts[1]
    return np.array([p % q for q in moduli]).astype(np.uint64)


def add(a: Words, b: Words, moduli: list[int]) -> Words:
    """Return the sum of two polynomials modulo each prime."""
    return np.asarray((a + b) % np.array(moduli, np.uint64)[:, None])


def flooded(ring: Ring, x: Any, zero: Any, mask: Words) -> Any:
    """Return a ciphertext with a mask added and its second polynomial hidden.

    (c0, c1) becomes (c0 + b·u + mask, c1 + a·u + e), (b, a) an encryption of zero whose a nobody has chosen, u and e
    small and fresh: a·u + e is uniform to whoever cannot solve the ring learning-with-errors problem, knowing the
    secret key or not.

    Parameters
    ----------
    x : Ciphertext
        With two primes left.
    zero : Ciphertext
        An encryption of zero by the client, from a seed.
    mask : (2, N) array
        The mask's words, ready for products.
    """
    limbs = x.coeff_modulus_size()
    moduli = primes(ring)[:limbs]
    evaluator = api().Evaluator(context(ring))
    u, e = (transformed(ring, small(moduli, ring.degree, t), True) for t in (True, False))
    plain = from_bytes("Plaintext", ring, _plain(ring, u, 1.0))
    made = api().Ciphertext()
    evaluator.multiply_plain(zero, plain, made)
    made.scale = x.scale
    evaluator.add_inplace(made, x)
    first, second = words_of(ring, made)
    return ciphertext(ring, np.stack([add(first, mask, moduli), add(second, e, moduli)]), x.scale, True)


def seeded(ring: Ring, data: bytes | memoryview, limbs: int) -> Any:
    """Return an encryption of zero whose second polynomial SEAL expands from a seed, so that nobody chose it.

    Raises
    ------
    InvalidInput
        The bytes are none, or hold a second polynomial of their own.
    """
    size = limbs * ring.degree
    body = saved_body(bytes(data), FRONT + 16 * size)
    count = struct.unpack_from("<Q", body, FRONT - 8)[0] if len(body) >= FRONT else 0
    if count != size or len(body) != FRONT + 8 * size + SEED:
        raise InvalidInput("he: got an encryption of zero that is not made from a seed; make it by the plan's client")
    made = from_bytes("Ciphertext", ring, data)
    check_ciphertext("the encryption of zero", made, ring, limbs, 1.0)
    return made
