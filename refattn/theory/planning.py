"""Planning in finite worlds by a stack of layers: UCB-VI's actions, exactly, and how many layers they take."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..functions.in_context_planning import ucb_vi
from .claim import Claim, Evidence, needs, total
from .decisions import SOURCE
from .fields import Q

__all__ = ["CLAIMS"]

STATES, ACTIONS, BONUS = 3, 2, 1
SHARES = 8
"""Rewards are whole multiples of 1 / SHARES."""


def _world(horizon: int, seed: int) -> tuple[Any, Any, Any]:
    """Return visits, rewards and states after them: every triple 0, 1, 4 or 16 times, so that floats are exact."""
    rng = np.random.default_rng(seed)
    cells = np.array(list(np.ndindex(horizon, STATES, ACTIONS)))
    visits = np.repeat(cells, rng.choice((0, 1, 4, 16), len(cells)), axis=0)
    return visits, rng.integers(0, 2, len(visits)) / SHARES, rng.integers(0, STATES, len(visits))


def _exact(told: tuple[Any, Any, Any], horizon: int) -> Any:
    """Return UCB-VI's values by its definition, a sum for each triple, in rationals."""
    visits, rewards, following = told
    q = np.empty((horizon, STATES, ACTIONS), object)
    for h in reversed(range(horizon)):
        for s, a in np.ndindex(STATES, ACTIONS):
            seen = np.nonzero((visits == (h, s, a)).all(1))[0]
            values = [Q(int(SHARES * rewards[i]), SHARES) for i in seen]
            if h + 1 < horizon:
                values = [v + max(q[h + 1, following[i]]) for v, i in zip(values, seen, strict=True)]
            root = int(np.sqrt(len(seen)))
            q[h, s, a] = min(sum(values, Q(0)) / len(seen) + Q(BONUS, root), Q(horizon)) if root else Q(horizon)
    return q


def _compared(layers: int, horizon: int, what: str) -> Evidence:
    """Count the steps and states of some worlds in which layers take an action whose exact value is not the best."""
    wrong = []
    for seed in range(4):
        told = _world(horizon, seed)
        q, taken = _exact(told, horizon), ucb_vi(*told, (horizon, STATES, ACTIONS), BONUS, layers=layers).argmax(2)
        wrong += [q[h, s, taken[h, s]] < max(q[h, s]) for h, s in np.ndindex(horizon, STATES)]
    return Evidence(total(*wrong), 0, what)


def agreement(horizon: int = 6) -> Evidence:
    """As many layers as the world has steps."""
    needs(horizon >= 1, "at least one step")
    return _compared(horizon, horizon, "actions that are not UCB-VI's")


def one_layer() -> Evidence:
    """One layer for six steps."""
    return _compared(1, 6, "actions that are not UCB-VI's, one layer")


CLAIMS = [
    Claim(
        "decisions-ucb-vi",
        "With as many layers as a world has steps all actions are UCB-VI's",
        SOURCE,
        agreement,
        one_layer,
        ("at least one step",),
    ),
]
