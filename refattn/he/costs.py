"""What SEAL's operations cost: milliseconds by operation, degree and primes left; a table, or measured here."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

import numpy as np

from .noise import Ring
from .wire import QUERY, Message, pack, unpack

__all__ = ["COSTS", "Costs", "measure", "predicted_ms"]

COLD = 32
Costs = Mapping[str, tuple[float, float]]
"""By operation (a, b): a·l**2 + b·l milliseconds with l primes left at degree 16384."""
COSTS: Costs = {
    "switch_key": (0.165, 0.780),
    "multiply": (0.0, 0.220),
    "square": (0.0, 0.155),
    "rescale": (0.0, 0.335),
    "multiply_plain": (0.0, 0.105),
    "add": (0.0, 0.045),
    "add_plain": (0.0, 0.033),
    "negate": (0.0, 0.029),
    "load": (0.0, 0.630),
    "load_whole": (0.0, 0.063),
}
"""One core of an AMD EPYC (Zen 5) at 2.6 GHz: what `measure` found at degrees 8192, 16384 and 32768, between."""


def predicted_ms(costs: Costs, degree: int, counts: Counter[tuple[str, int]]) -> float:
    """Return the time of some operations, by (operation, primes left)."""
    # number-theoretic transforms: N log N
    size = degree * np.log2(degree) / (16384 * 14)
    each = ((costs[name], limbs, count) for (name, limbs), count in counts.items())
    return float(size * math.fsum(count * (a * limbs**2 + b * limbs) for (a, b), limbs, count in each))


def measure(ring: Ring, seconds: float = 2.0) -> Costs:
    """Return the costs on this machine, fitted to timings at all levels of a ring, for about some seconds.

    Parameters
    ----------
    ring : Ring
        The ring; its costs serve other rings by N log N.
    seconds : float
        How long to measure in all.
    """
    from .seal import Sealed, api, context, encode, galois_elements, to_bytes, whole_bytes

    s, made = api(), context(ring)
    generator = s.KeyGenerator(made)
    relin, galois = s.RelinKeys(), s.GaloisKeys()
    generator.create_relin_keys(relin)
    generator.create_galois_keys(galois_elements(ring, [1]), galois)
    m = Sealed(ring, relin, galois)
    encryptor = s.Encryptor(made, _public(s, generator), generator.secret_key())
    found: dict[str, list[tuple[int, float]]] = {n: [] for n in COSTS}
    share = seconds / (ring.levels * len(COSTS))
    for limbs in range(ring.levels + 1, 1, -1):
        plain = encode(m.encoder, np.zeros(ring.slots, complex), ring, limbs)
        calls = _calls(m, to_bytes(encryptor.encrypt_symmetric(plain)), whole_bytes(encryptor, plain))
        for name, call in calls.items():
            times: list[float] = []
            end = time.perf_counter() + share
            while len(times) < 5 or time.perf_counter() < end:
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            found[name].append((limbs, float(np.median(times)) * 1e3))
    size = ring.degree * np.log2(ring.degree) / (16384 * 14)
    return {n: _fit(points, size, n == "switch_key") for n, points in found.items()}


def _calls(m: Any, saved: bytes, whole: bytes) -> dict[str, Callable[[], Any]]:
    """Return a call of each operation, on operands that are not in the caches: a program has very many ciphertexts."""
    from .seal import from_bytes

    operands = cycle([from_bytes("Ciphertext", m.ring, saved) for _ in range(COLD)])
    return {
        "switch_key": lambda: m.rotate(next(operands), 1),
        "multiply": lambda: m.mul(next(operands), next(operands)),
        "square": lambda: m.square(next(operands)),
        "rescale": lambda: m.rescale(next(operands)),
        "multiply_plain": lambda: m.times_constant(next(operands), 0.5),
        "add": lambda: m.add(next(operands), next(operands)),
        "add_plain": lambda: m.add_constant(next(operands), 0.5),
        "negate": lambda: m.negate(next(operands)),
        "load": lambda: _received(m.ring, saved),
        "load_whole": lambda: _received(m.ring, whole),
    }


def _received(ring: Ring, saved: bytes) -> Any:
    """Return a ciphertext that came in a message."""
    from .seal import from_bytes

    sent = pack(Message(QUERY, bytes(32), bytes(16), bytes(16), (saved,)))
    return from_bytes("Ciphertext", ring, unpack(sent, QUERY, bytes(32), len(sent)).parts[0])


def _public(s: Any, generator: Any) -> Any:
    key = s.PublicKey()
    generator.create_public_key(key)
    return key


def _fit(points: list[tuple[int, float]], size: float, quadratic: bool) -> tuple[float, float]:
    """Return (a, b) of a·l**2 + b·l by least squares of relative errors."""
    limbs, ms = (np.array(x, float) for x in zip(*points, strict=True))
    columns = np.stack([limbs**2, limbs] if quadratic else [limbs], 1) / (ms / size)[:, None]
    answer = np.linalg.lstsq(columns, np.ones_like(ms), rcond=None)[0]
    return (float(answer[0]), float(answer[1])) if quadratic else (0.0, float(answer[0]))
