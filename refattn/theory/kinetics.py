"""Kinetics' cost model: keys read under a budget in closed form against a count, and the released formula's error."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from ..errors import InvalidInput
from ..functions.costs import context_of_equal_cost, keys_read
from .claim import Claim, Evidence, judged, needs, same, total

__all__ = ["CLAIMS"]

GRID = [(64, 12, 256), (33, 16, 40), (48, 48, 10), (9, 30, 50), (100, 1, 99), (100, 1, 98), (7, 1, 3), (1, 1, 1)]
# the least sizes, and those just below them: whether they are refused
LEAST = {(1, 0, 1): False, (0, 0, 1): True, (1, -1, 1): True, (1, 0, 0): True}


def _read(budget: int, context: int, generated: int) -> int:
    """Return the keys that a decoding loop reads, which keeps the last ones of its budget."""
    cache, read = list(range(context)), 0
    for token in range(generated):
        cache = [*cache, context + token][-budget:]
        read += len(cache)
    return read


def _refused(budget: int, context: int, generated: int) -> bool:
    try:
        keys_read(budget, context, generated)
    except InvalidInput:
        return True
    return False


def closed(grid: tuple[tuple[int, int, int], ...] = tuple(GRID)) -> Evidence:
    """The closed form against a loop that reads them; sizes that are no sizes are refused, no others."""
    needs(all(min(x) >= 1 for x in grid), "budget, context and generated tokens of at least 1")
    wrong = sum(_refused(*x) != refused for x, refused in LEAST.items())
    away = max(abs(keys_read(*x) - _read(*x)) for x in grid)
    return Evidence(total(away, wrong), 0, "keys from those that a loop reads, and sizes taken or refused wrongly")


def released() -> Evidence:
    """The released formula, budget·T + ½·max(0, budget - context)², whose sign is that of the other branch."""
    away = [b * t + max(0, b - c) ** 2 // 2 - _read(b, c, t) for b, c, t in GRID[:2]]
    return Evidence(
        max(map(abs, away)), 0, "keys from those that a loop reads, the released formula", {"too many": away}
    )


# (P, layers, heads, heads of keys, d): Qwen3-0.6B and -8B, from their public configurations
SHAPES = ((752_000_000, 28, 16, 8, 128), (8_190_000_000, 36, 32, 8, 128))


def _costs(context: int | Fraction, shape: tuple[int, ...], intensity: Fraction, memory: bool) -> Any:
    """Return a token's cost in operations, added up head by head, at 2 bytes a number of the cache."""
    _, layers, heads, heads_kv, d = shape
    operations = sum(2 * 2 * context * d for _ in range(layers) for _ in range(heads))  # QKᵀ and PV
    numbers = sum(2 * context * d for _ in range(layers) for _ in range(heads_kv))  # K and V
    return operations + intensity * 2 * numbers * memory


def _crossing(memory: bool, intensities: tuple[Fraction, ...], what: str) -> Evidence:
    """Compare the costs at the crossover, in fractions, and at the contexts just below and above it with 2·P."""
    found: list[Any] = []
    places = []
    exactly: Any = context_of_equal_cost
    for shape in SHAPES:
        for i in intensities:
            at = context_of_equal_cost(*shape, intensity=float(i))
            below, above = (_costs(math.floor(at) + more, shape, i, memory) / (2 * shape[0]) for more in (0, 1))
            there = same(_costs(exactly(*shape, intensity=i), shape, i, memory), 2 * shape[0])
            found += [below, 1 / above, there]
            places.append((float(i), at, f"{shape[0] / 10**9:.3g}e9 parameters"))
    detail = {n: list(x) for n, x in zip(("intensity", "context", "series"), zip(*places, strict=True), strict=True)}
    return judged(found, what, detail)


RATIOS = tuple(map(Fraction, ("1", "141.5", "281.25", "562.5", "2000")))
"""Operations that a byte read is worth, from hardware of one to far beyond today's."""


def crossover(intensities: tuple[Fraction, ...] = RATIOS) -> Evidence:
    """Attention's cost on both sides of the crossover, for hardware ratios: below 2·P before, above it after."""
    needs(all(i >= 0 for i in intensities), "operations a byte of at least 0")
    return _crossing(True, intensities, "cost over 2·P before the crossover, or 2·P over the cost after it")


def without_memory() -> Evidence:
    """The operations alone: the crossover comes far later."""
    return _crossing(False, RATIOS, "the same by operations alone")


CLAIMS = [
    Claim(
        "kinetics-crossover",
        "Attention's cost passes the parameters' at 2P over 4(H + I·H_kv)·d·L tokens, for any hardware ratio I",
        "Sadhukhan et al., Kinetics (public code was read; the hardware ratio is a parameter here)",
        crossover,
        without_memory,
        ("operations a byte of at least 0",),
    ),
    Claim(
        "kinetics-keys",
        "Keys read under a budget: budget·T less the triangle of the tokens before it is reached",
        "Sadhukhan et al., Kinetics (public code was read: its sparse cost has the wrong sign)",
        closed,
        released,
        ("budget, context and generated tokens of at least 1",),
    ),
]
