"""An encrypted attention call: its sizes and ranges, and what the planner chose; nothing here computes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass

from .inverse import Inverse
from .layout import BatchLayout, Layout
from .noise import Ring
from .planned import Planned

__all__ = ["Call"]


@dataclass(frozen=True)
class Call(Planned):
    """An encrypted call, planned.

    Attributes
    ----------
    n_q, n_k, d_k, d_v, heads, p : int
        Sizes and the even power.
    denominator : (float, float)
        The range of the denominators, epsilon included: the client refuses inputs outside it.
    epsilon, scale : float
        Added to the denominator; multiplies the scores.
    norms : (float, float)
        The largest Euclidean norms of a query and of a key row.
    value_most : float
        The largest size of an element of value.
    normalize : str
        Who divides: "server" by a polynomial, or "client", who then learns the denominators.
    mode : str
        "latency" (a call's numbers share ciphertexts) or "throughput" (a slot is an input).
    upload : str
        "full"; "compact": the queries come once; "whole": nothing of the ciphertexts is left to the server to expand.
    workers : int
        Processes of the server that the layout is for.
    tolerance : float
        The largest error wanted of an element of out.
    ring, layout, inverse
        What was chosen.
    levels : dict of str to int
        Levels by step.
    counts : Counter
        Operations of a block by (name, primes left).
    rotations : tuple of int
        Those that keys are made for.
    approximation, noise : float
        Bounds of the two parts of the error; the noise's holds but for a chance of 2**-40.
    """

    n_q: int
    n_k: int
    d_k: int
    d_v: int
    heads: int
    p: int
    denominator: tuple[float, float]
    epsilon: float
    scale: float
    norms: tuple[float, float]
    value_most: float
    normalize: str
    mode: str
    upload: str
    workers: int
    tolerance: float
    ring: Ring
    layout: Layout | BatchLayout
    inverse: Inverse | None
    levels: dict[str, int]
    counts: Counter[tuple[str, int]]
    rotations: tuple[int, ...]
    approximation: float
    noise: float

    @property
    def sums(self) -> int:
        """How many fresh ciphertexts are added up in one of the keys or values."""
        return 1

    @property
    def replies(self) -> int:
        """How many results the chance of a larger noise is for, together."""
        return 1

    @property
    def outs(self) -> int:
        """Ciphertexts of a reply."""
        return (self.layout.outs + (self.inverse is None)) * len(self.layout.blocks())

    @property
    def out_most(self) -> float:
        """The largest element of a result: that of the values, of which it is a mean."""
        return self.value_most

    @property
    def input_factor(self) -> float:
        """What sums of powers are multiplied with before the circuit sees them."""
        return 1 / self.denominator[1] if self.inverse is None else self.inverse.input_factor

    @property
    def value_limbs(self) -> int:
        """Primes that the values' ciphertexts have left: what the weights have when they meet."""
        return self.ring.levels + 1 - self.levels["products"] - self.levels["power"]

    def loads(self) -> Counter[tuple[str, int]]:
        """Return the ciphertexts of a query by (`load`, primes left)."""
        blocks = self.layout.blocks()
        groups, top = len({h for h, _ in blocks}), self.ring.levels + 1
        shared = self.layout.shared_parts * groups
        found = Counter({(self.load, top): self.layout.query_parts * len(blocks) + shared})
        found[self.load, self.value_limbs] += shared
        return found

    def part_limbs(self) -> list[int]:
        """Return the primes left of each ciphertext of a query, in its order."""
        top, shared, found, previous = self.ring.levels + 1, self.layout.shared_parts, [], None
        for head, _ in self.layout.blocks():
            if head != previous:
                previous = head
                found += [top] * shared + [self.value_limbs] * shared
            found += [top] * self.layout.query_parts
        return found

    @property
    def error(self) -> float:
        """The bound on an element of out."""
        return self.approximation + self.noise

    @property
    def digest(self) -> bytes:
        """What messages name the plan by."""
        names = ("n_q", "n_k", "d_k", "d_v", "heads", "p", "denominator", "epsilon", "scale", "norms", "value_most")
        text = {n: getattr(self, n) for n in names} | {"ring": asdict(self.ring), "layout": asdict(self.layout)}
        text["mode"], text["upload"] = self.mode, self.upload
        text["inverse"] = None if self.inverse is None else [self.inverse.doublings, self.inverse.odd]
        return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).digest()
