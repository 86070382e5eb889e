"""The plan of an encoder: what client and server agree on, round by round, and what a refresh promises."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidProblem
from .costs import COSTS, Costs, predicted_ms
from .embedding import Pair, error, scaled, spread
from .layer_plan import along, axes_of, gathered, paired, period_of, tokens_of
from .layout import Layout
from .noise import Ring
from .planned import Planned

__all__ = ["MOST_DRIFT", "REFRESHED", "EncoderPlan"]

Float = NDArray[np.float64]
Complex = NDArray[np.complex128]
REFRESHED = 2
"""Primes that a block's result has left where it is masked: values and mask fit below them."""
CHANCE = 2.0**-40
MOST_DRIFT = 16
"""A result whose scale is further off is none: it would have few bits left."""


@dataclass(frozen=True)
class EncoderPlan(Planned):
    """What client and server agree on: no weight is in it.

    Attributes
    ----------
    n, d, heads : int
        Tokens, features of a token, heads.
    classes : int
        Scores of the whole input; 0 where the result is (n, d).
    ring, layout, spread, apart
        As in a layer's plan, for all blocks.
    limbs : tuple of (int, int, int)
        By block, primes left of the ciphertexts of tokens, residual and mean squares.
    factors : tuple of (float, float)
        By block, what the residual and the mean squares are multiplied with before encryption.
    first_epsilon : float or None
        The client divides each token by the root of its mean square and this.
    out_factor : float
        What the result is multiplied with.
    levels : dict of str to int
        Levels by step, of the block with the most.
    counts : Counter
        Operations of all blocks by (name, primes left).
    rotations : tuple of int
        Those that keys are made for.
    upload : str
        "full" or "whole", as in :func:`refattn.he.plan`.
    centred : bool
        Whether the client first takes each token's mean over features from it.
    drift : (float, float)
        The factors, at least 2, within which the scales of masked results and of the reply are the ring's: primes are
        not quite 2**middle, and each square doubles what a scale is off by.
    """

    n: int
    d: int
    heads: int
    classes: int
    ring: Ring
    layout: Layout
    spread: int
    apart: int
    limbs: tuple[tuple[int, int, int], ...]
    factors: tuple[tuple[float, float], ...]
    first_epsilon: float | None
    out_factor: float
    levels: dict[str, int]
    counts: Counter[tuple[str, int]] = field(repr=False)
    rotations: tuple[int, ...]
    upload: str = "full"
    centred: bool = False
    drift: tuple[float, float] = (2.0, 2.0)

    @property
    def rounds(self) -> int:
        """Messages of a query: one for each block."""
        return len(self.limbs)

    @property
    def outs(self) -> int:
        """Ciphertexts of the reply."""
        return 1 if self.classes else self.query_parts

    @property
    def query_parts(self) -> int:
        """Parts that the tokens come in along i: as many fit beside all of them along j."""
        return -(-self.n // self.layout.queries)

    @property
    def copies(self) -> int:
        """Ciphertexts of a part of the tokens along i, and as many of all along j."""
        return -(-self.d // (self.spread * self.apart))

    def part_limbs(self, stage: int = 0) -> list[int]:
        """Return the primes left of each ciphertext of a round's message, in its order."""
        (tokens, residual, squares), parts = self.limbs[stage], self.query_parts
        found = [tokens] * (parts + 1) * self.copies + [residual] * parts
        return found + ([squares] * (parts + 1) if stage else [])

    def loads(self) -> Counter[tuple[str, int]]:
        """Return the ciphertexts of all rounds by (`load`, primes left)."""
        return Counter((self.load, limbs) for stage in range(self.rounds) for limbs in self.part_limbs(stage))

    @property
    def reply_most(self) -> int:
        """The most bytes of a reply, or of a masked result: two ciphertexts for each part."""
        return self.masked * (16 * REFRESHED * self.ring.degree + 2**10) + 2**10

    @property
    def masked(self) -> int:
        """Ciphertexts of a masked result: of each part the tokens, then of each their sums of squares."""
        return 2 * self.query_parts

    @property
    def refresh_most(self) -> float:
        """The largest root mean square of a part's slots with which its refresh is right but for a chance of 2**-40.

        Value and mask wrap round the modulus Q at coefficient c with the chance abs(c)/Q; the sum of abs(c) is at most
        sqrt(N) times their norm, which is the slots' root mean square times the scale, at most `drift` of 2**middle.
        """
        modulus = 2.0 ** (self.ring.first + self.ring.middle - 1)
        return CHANCE * modulus / (math.sqrt(self.ring.degree) * self.drift[0] * 2.0**self.ring.middle)

    @property
    def refresh_error(self) -> float:
        """A bound on what a refresh adds to a slot besides a fresh ciphertext's noise, but for a chance of 2**-40.

        Client and server each transform twice, and round N coefficients once; the scale is at least 2**middle / drift.
        """
        degree, half = self.ring.degree, math.sqrt(self.ring.degree / 2)
        largest = spread(degree, 2 ** (self.ring.first + self.ring.middle), CHANCE)
        factor = max(1.0, *(abs(x) for pair in self.factors for x in pair))
        transforms = 4 * error(degree) * half * largest * self.drift[0] * factor
        return (transforms + half * math.sqrt(degree)) / 2.0**self.ring.middle

    def predicted_ms(self, costs: Costs = COSTS) -> float:
        """Return the server's time on one core, without that of masks."""
        return predicted_ms(costs, self.ring.degree, self.counts + self.loads())

    @property
    def digest(self) -> bytes:
        """What messages name the plan by."""
        names = ("n", "d", "heads", "classes", "spread", "apart", "limbs", "factors", "first_epsilon", "out_factor")
        text = {n: getattr(self, n) for n in (*names, "upload", "centred", "drift")}
        text |= {"ring": asdict(self.ring), "layout": asdict(self.layout), "rotations": self.rotations}
        return hashlib.sha256(json.dumps({"encoder": text}, sort_keys=True).encode()).digest()

    def report(self) -> dict[str, Any]:
        """Return all that the plan says, as what JSON holds."""
        return {
            "degree": self.ring.degree,
            "chain_bits": self.ring.bits,
            "levels": self.levels,
            "rounds": self.rounds,
            "rotation_keys": len(self.rotations),
            "key_switches": sum(c for (name, _), c in self.counts.items() if name == "switch_key"),
            "predicted_ms": self.predicted_ms(),
            "key_bytes": self.key_bytes,
            "upload_bytes": self.upload_bytes,
            "refresh_hides": "all: what is decrypted is uniform modulo Q",
            "refresh_modulus_bits": self.ring.first + self.ring.middle,
            "refresh_is_right_for_root_mean_squares_up_to": self.refresh_most,
            "refresh_wrong_with_chance": CHANCE * self.query_parts,
            "refresh_error": self.refresh_error,
        }

    def encoded(self, x: Any) -> tuple[tuple[int, ...], list[tuple[Complex, int]]]:
        """Return the result's shape, and slots and primes of each ciphertext of the first message.

        Parameters
        ----------
        x : (n, d) array
            The tokens.

        Raises
        ------
        InvalidProblem
            Another shape, numbers that are not finite, or tokens so large that no refresh is right.
        """
        x, y = tokens_of(self, x)
        residuals = [z * self.factors[0][0] for z in paired(self, x)]
        slots = [*along(self, y), *residuals]
        size = max(float(np.sqrt((np.abs(z) ** 2).mean())) for z in residuals)
        if size > self.refresh_most:
            raise InvalidProblem(
                f"x: its tokens have a root mean square of {size:.3g} in their slots, above the "
                f"{self.refresh_most:.3g} that a refresh is right for; scale them as in training"
            )
        shape = (self.classes,) if self.classes else (self.n, self.d)
        return shape, list(zip([np.asarray(s, np.complex128) for s in slots], self.part_limbs(), strict=True))

    def decoded(self, slots: Sequence[Complex], shape: tuple[int, ...]) -> Float:
        """Return the result from the slots of a reply."""
        if not self.classes:
            return gathered(self, slots) * self.out_factor
        of = self.layout
        pairs = slots[0][: period_of(of)].reshape(of.groups, of.keys, -1)[:, 1, 0] * self.out_factor
        return np.stack([pairs.real, pairs.imag], 1).ravel()[: self.classes]

    def taken(self, slots: Sequence[Pair]) -> tuple[Pair, Pair]:
        """Return tokens, (n, d), and sums of squares, (n,), from a block's results: places only, no arithmetic."""
        whole, squares = slots[: self.query_parts], slots[self.query_parts :]
        _, j, h, _ = axes_of(self.layout)
        at = np.flatnonzero((j == 1) & (h == 0))[: self.layout.queries]
        high, low = (gathered(self, x) for x in zip(*whole, strict=True))
        sums_high, sums_low = (np.concatenate([y.real[at] for y in x])[: self.n] for x in zip(*squares, strict=True))
        return (high, low), (sums_high, sums_low)

    def placed(self, stage: int, tokens: Pair, squares: Pair) -> list[tuple[Pair, int]]:
        """Return slots and primes of each ciphertext of a later message: linear in tokens and squares."""
        _, j, _, i = axes_of(self.layout)
        residual, square = self.factors[stage]
        found: list[Pair] = list(zip(*(along(self, x) for x in tokens), strict=True))
        found += [scaled(z, residual) for z in zip(*(paired(self, x) for x in tokens), strict=True)]
        rows = (0, self.layout.keys - self.n)
        every = [*(i + part * self.layout.queries for part in range(self.query_parts)), j]
        found += [scaled((np.pad(squares[0], rows)[t], np.pad(squares[1], rows)[t]), square) for t in every]
        return list(zip(found, self.part_limbs(stage), strict=True))
