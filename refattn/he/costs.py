"""What SEAL's operations cost: milliseconds by operation, degree and primes left; a table, or measured here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from .noise import Ring

__all__ = ["COSTS", "Costs", "measure", "predicted_ms"]

Costs = Mapping[str, tuple[float, float]]
"""By operation (a, b): a·l**2 + b·l milliseconds with l primes left at degree 16384."""
COSTS: Costs = {
    "switch_key": (0.172, 0.512),
    "multiply": (0.0, 0.168),
    "square": (0.0, 0.120),
    "rescale": (0.0, 0.290),
    "multiply_plain": (0.0, 0.078),
    "add": (0.0, 0.030),
    "add_plain": (0.0, 0.030),
    "negate": (0.0, 0.020),
}
"""Two cores of an AMD EPYC (Zen 5), one of them used."""


def predicted_ms(costs: Costs, degree: int, counts: Counter[tuple[str, int]]) -> float:
    """Return the time of some operations, by (operation, primes left)."""
    # number-theoretic transforms: N log N
    size = degree * np.log2(degree) / (16384 * 14)
    total = 0.0
    for (name, limbs), count in counts.items():
        square, linear = costs[name]
        total += count * (square * limbs**2 + linear * limbs)
    return float(total * size)


def measure(ring: Ring, seconds: float = 2.0) -> Costs:
    """Return the costs on this machine, fitted to timings at all levels of a ring, for about some seconds.

    Parameters
    ----------
    ring : Ring
        The ring; its costs serve other rings by N log N.
    seconds : float
        How long to measure in all.
    """
    from .seal import Sealed, api, context, galois_elements

    s, made = api(), context(ring)
    generator = s.KeyGenerator(made)
    relin, galois = s.RelinKeys(), s.GaloisKeys()
    generator.create_relin_keys(relin)
    generator.create_galois_keys(galois_elements(ring, [1]), galois)
    m = Sealed(ring, relin, galois)
    encryptor = s.Encryptor(made, _public(s, generator))
    plain, x = s.Plaintext(), s.Ciphertext()
    m.encoder.encode(0.5, 2.0**ring.middle, plain)
    encryptor.encrypt(plain, x)
    found: dict[str, list[tuple[int, float]]] = {n: [] for n in COSTS}
    share = seconds / (ring.levels * len(COSTS))
    for limbs in range(ring.levels + 1, 1, -1):
        calls: dict[str, Callable[[], Any]] = {
            "switch_key": partial(m.rotate, x, 1),
            "multiply": partial(m.mul, x, x),
            "square": partial(m.square, x),
            "rescale": partial(m.rescale, x),
            "multiply_plain": partial(m.times_constant, x, 0.5),
            "add": partial(m.add, x, x),
            "add_plain": partial(m.add_constant, x, 0.5),
            "negate": partial(m.negate, x),
        }
        for name, call in calls.items():
            times: list[float] = []
            end = time.perf_counter() + share
            while len(times) < 3 or time.perf_counter() < end:
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            found[name].append((limbs, float(np.median(times)) * 1e3))
        down = s.Ciphertext()
        m.evaluator.mod_switch_to_next(x, down)
        x = down
    size = ring.degree * np.log2(ring.degree) / (16384 * 14)
    return {n: _fit(points, size, n == "switch_key") for n, points in found.items()}


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
