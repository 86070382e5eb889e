"""Kinetics' cost model: keys read under a budget in closed form against a count, and the released formula's error."""

from __future__ import annotations

import numpy as np

from ..errors import InvalidInput
from .claim import Claim, Evidence, needs

__all__ = ["CLAIMS", "context_of_equal_cost", "keys_read"]

GRID = [(4096, 512, 16384), (1024, 512, 4096), (2048, 2048, 100), (64, 10, 1000), (1000, 1, 999)]


def keys_read(budget: int, context: int, generated: int) -> float:
    """Return the sum over generated tokens of min(budget, context + t), for t from 1.

    Parameters
    ----------
    budget : int
        The most keys that a token reads.
    context, generated : int
        Tokens of the prompt, and after it.
    """
    if min(budget, context + 1, generated) < 1:
        raise InvalidInput(f"keys_read: got budget {budget}, context {context}, generated {generated}")
    short = min(max(0, budget - context), generated)  # tokens with fewer keys than the budget
    return (
        budget * generated - (budget - context) * short + short * (short + 1) / 2
        if short
        else float(budget * generated)
    )


def context_of_equal_cost(
    parameters: float, layers: int, heads: int, heads_kv: int, d: int, intensity: float = 562.5
) -> float:
    """Return the context at which a token's attention costs as much as its 2·P operations.

    Parameters
    ----------
    parameters : float
        P of the model.
    layers, heads, heads_kv, d : int
        Its shape.
    intensity : float
        Operations that a byte read is worth: 562.5 is 4.5 PFLOP/s over 8 TB/s.
    """
    return 2 * parameters / (4 * heads * d * layers + 4 * intensity * heads_kv * d * layers)


def _counted(budget: int, context: int, generated: int) -> float:
    return float(np.minimum(budget, context + np.arange(1, generated + 1)).sum())


def closed(grid: tuple[tuple[int, int, int], ...] = tuple(GRID)) -> Evidence:
    """The closed form against the count, exactly."""
    needs(all(min(x) >= 1 for x in grid), "budget, context and generated tokens of at least 1")
    return Evidence(max(abs(keys_read(*x) - _counted(*x)) for x in grid), 0.0, "keys from the count")


def released() -> Evidence:
    """The released formula, budget·T + ½·max(0, budget - context)², whose sign is that of the other branch."""
    away = [(b * t + 0.5 * max(0, b - c) ** 2) / _counted(b, c, t) - 1 for b, c, t in GRID[:2]]
    return Evidence(max(map(abs, away)), 0.01, "relative distance from the count", {"share too much": away})


CLAIMS = [
    Claim(
        "kinetics-keys",
        "Keys read under a budget: budget·T less the triangle of the tokens before it is reached",
        "Sadhukhan et al., Kinetics (public code was read: its sparse cost has the wrong sign)",
        closed,
        released,
        ("budget, context and generated tokens of at least 1",),
    ),
]
