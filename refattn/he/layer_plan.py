"""The plan of a layer: what client and server agree on, and where a token's features lie in the slots."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidProblem
from ..problem import Problem
from .arguments import numbers_of
from .costs import COSTS, Costs, predicted_ms
from .layout import Layout
from .noise import Ring
from .planned import Planned

__all__ = ["LayerPlan", "along", "axes_of", "feature_of", "gathered", "paired", "period_of"]

Float = NDArray[np.float64]
Complex = NDArray[np.complex128]


@dataclass(frozen=True)
class LayerPlan(Planned):
    """What client and server agree on: no weight is in it.

    Attributes
    ----------
    n, d, heads, p : int
        Tokens, features of a token, heads, the even power.
    classes : int
        Scores of the whole input; 0 where the result is (n, d).
    ring, layout
        What was chosen.
    spread, apart : int
        Features of a token in a ciphertext: along f, and in how many repeats others: more take rotations, fewer
        ciphertexts.
    residual_limbs : int
        Primes left of the ciphertext for the residual.
    first_epsilon : float or None
        The client divides each token by the root of its mean square and this; not those of the residual.
    residual_factor, out_factor : float
        What the residual is multiplied with before encryption, and the result afterwards.
    levels : dict of str to int
        Levels by step.
    counts : Counter
        Operations by (name, primes left).
    rotations : tuple of int
        Those that keys are made for.
    upload : str
        "full" or "whole", as in :func:`refattn.he.plan`.
    centred : bool
        Whether the client first takes each token's mean over features from it.
    """

    n: int
    d: int
    heads: int
    p: int
    classes: int
    ring: Ring
    layout: Layout
    spread: int
    apart: int
    residual_limbs: int
    first_epsilon: float | None
    residual_factor: float
    out_factor: float
    levels: dict[str, int]
    counts: Counter[tuple[str, int]] = field(repr=False)
    rotations: tuple[int, ...]
    upload: str = "full"
    centred: bool = False

    @property
    def query_parts(self) -> int:
        """Parts that the tokens come in along i: as many fit beside all of them along j."""
        return -(-self.n // self.layout.queries)

    @property
    def outs(self) -> int:
        """Ciphertexts of a reply."""
        return 1 if self.classes else self.query_parts

    @property
    def copies(self) -> int:
        """Ciphertexts of a part of the tokens along i, and as many of all along j."""
        return -(-self.d // (self.spread * self.apart))

    def loads(self) -> Counter[tuple[str, int]]:
        """Return the ciphertexts of a query by (`load`, primes left)."""
        return Counter((self.load, limbs) for limbs in self.part_limbs())

    def part_limbs(self) -> list[int]:
        """Return the primes left of each ciphertext of a query, in its order."""
        tokens = [self.ring.levels + 1] * (self.query_parts + 1) * self.copies
        return tokens + ([] if self.classes else [self.residual_limbs] * self.query_parts)

    def predicted_ms(self, costs: Costs = COSTS) -> float:
        """Return the server's time on one core."""
        return predicted_ms(costs, self.ring.degree, self.counts + self.loads())

    @property
    def digest(self) -> bytes:
        """What messages name the plan by."""
        text = {
            n: getattr(self, n)
            for n in (
                "n",
                "d",
                "heads",
                "p",
                "classes",
                "spread",
                "apart",
                "residual_limbs",
                "first_epsilon",
                "upload",
                "centred",
            )
        }
        text |= {"ring": asdict(self.ring), "factors": (self.residual_factor, self.out_factor)}
        if self.query_parts > 1:
            text["queries"] = self.layout.queries
        return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).digest()

    def report(self) -> dict[str, Any]:
        """Return all that the plan says, as what JSON holds."""
        return {
            "degree": self.ring.degree,
            "chain_bits": self.ring.bits,
            "levels": self.levels,
            "rotation_keys": len(self.rotations),
            "key_switches": sum(c for (name, _), c in self.counts.items() if name == "switch_key"),
            "predicted_ms": self.predicted_ms(),
            "key_bytes": self.key_bytes,
            "upload_bytes": self.upload_bytes,
        }

    def encoded(self, x: Any) -> tuple[tuple[int, ...], list[tuple[Complex, int]]]:
        """Return the result's shape, and slots and primes of each ciphertext of a query.

        Parameters
        ----------
        x : (n, d) array
            The tokens.

        Raises
        ------
        InvalidProblem
            Another shape, or numbers that are not finite.
        """
        x, y = tokens_of(self, x)
        top = self.ring.levels + 1
        found: list[tuple[Any, int]] = [(slots, top) for slots in along(self, y)]
        if not self.classes:
            found += [(slots * self.residual_factor, self.residual_limbs) for slots in paired(self, x)]
        slots = [(s.astype(np.complex128), limbs) for s, limbs in found]
        return (self.classes,) if self.classes else (self.n, self.d), slots

    def decoded(self, slots: Sequence[Complex], shape: tuple[int, ...]) -> Float:
        """Return the result from the slots of a reply."""
        if not self.classes:
            return gathered(self, slots) * self.out_factor
        f, j, h, i = (x[: period_of(self.layout)] for x in axes_of(self.layout))
        pairs = (slots[0][: len(f)] * self.out_factor)[(j == 0) & (h == 0) & (i == 0)]
        return np.stack([pairs.real, pairs.imag], 1).ravel()[: self.classes]


def tokens_of(plan: Any, x: Any) -> tuple[Float, Float]:
    """Return a client's tokens, checked, and what the first norm makes of them, (n, d) each."""
    if isinstance(x, Problem):
        raise InvalidProblem(f"x: got a Problem, expected an array of shape {(plan.n, plan.d)}")
    x = numbers_of("x", x)
    if x.shape != (plan.n, plan.d):
        raise InvalidProblem(f"x: got shape {x.shape}, expected {(plan.n, plan.d)}")
    if not np.isfinite(x).all():
        raise InvalidProblem("x: has numbers that are not finite")
    x = x - x.mean(1, keepdims=True) if plan.centred else x
    return x, x if plan.first_epsilon is None else x / np.sqrt((x**2).mean(1, keepdims=True) + plan.first_epsilon)


def along(plan: Any, x: Float) -> list[Float]:
    """Return the slots of an input's tokens, (n, d): those of queries, part by part, then those of keys."""
    _, j, _, i = axes_of(plan.layout)
    features = [feature_of(plan.layout, plan.spread, plan.apart, c) for c in range(plan.copies)]
    x = np.pad(x, ((0, plan.layout.keys - plan.n), (0, 1 + max(int(c.max()) for c in features))))
    tokens = [i + part * plan.layout.queries for part in range(plan.query_parts)]
    return [x[t, c] for t in (*tokens, j) for c in features]


def paired(plan: Any, x: Float) -> list[Complex]:
    """Return the slots, part by part, of (n, d) tokens where residuals lie: pairs of features, in row j = 0."""
    layout = plan.layout
    f, j, h, i = axes_of(layout)
    pair = 2 * (f * layout.heads + h)
    x = np.pad(x, ((0, layout.keys - len(x)), (0, 2 * layout.pairs * layout.heads)))
    tokens = [i + part * layout.queries for part in range(plan.query_parts)]
    return [np.where(j == 0, x[t, pair] + 1j * x[t, pair + 1], 0) for t in tokens]


def gathered(plan: Any, parts: Sequence[Any]) -> Float:
    """Return a layer's result, (n, d), from its parts' slots: it lies in row j = 1, where that of f holds f + 1."""
    layout, found = plan.layout, []
    _, j, _, _ = (x[: period_of(layout)] for x in axes_of(layout))
    for slots in parts:
        rows = slots[: len(j)][j == 1].reshape(layout.groups, layout.heads, -1)
        pairs = np.roll(rows, 1, 0).reshape(-1, layout.queries)
        found.append(np.stack([pairs.real, pairs.imag], 1).reshape(-1, layout.queries).T)
    return np.concatenate(found)[: plan.n, : plan.d]


def axes_of(layout: Layout) -> tuple[NDArray[np.int64], ...]:
    """Return f, j, h and i of each slot."""
    shape = (layout.slots // period_of(layout), layout.groups, layout.keys, layout.heads, layout.queries)
    return tuple(x.ravel() for x in np.indices(shape)[1:])


def period_of(layout: Layout) -> int:
    """Return after how many slots everything but the tokens' features repeats."""
    return layout.groups * layout.keys * layout.columns


def feature_of(layout: Layout, spread: int, apart: int, copy: int) -> NDArray[np.int64]:
    """Return which of a token's features a ciphertext's slots hold: `spread` along f, others in `apart` repeats."""
    repeat = np.arange(layout.slots) // period_of(layout) % apart
    return np.asarray((copy * apart + repeat) * spread + axes_of(layout)[0] % spread)
