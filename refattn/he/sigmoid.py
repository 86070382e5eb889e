"""Sigmoid attention on ciphertexts: each weight a polynomial of its score, no denominator; planned, and placed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import to_float64
from ..errors import InvalidProblem
from ..masks import visible
from ..problem import Problem
from .arguments import plans
from .layout import BatchLayout, Layout, layouts_for
from .plan import Plan
from .polynomials import Polynomial
from .sigmoid_parts import Sigmoid, arguments, fastest

__all__ = ["SigmoidPlan", "plan_sigmoid"]

Float = NDArray[np.float64]
Complex = NDArray[np.complex128]


@dataclass(frozen=True)
class SigmoidPlan(Sigmoid, Plan):
    """Sigmoid attention, planned. Of a ``Plan``'s attributes p, denominator, epsilon and inverse mean nothing here.

    Attributes
    ----------
    scores : (float, float)
        The range of scale·q_i·k_j + offset over all pairs that are seen: the client refuses inputs outside it.
    offset : float
        Added to every score.
    polynomial : Polynomial
        What stands for the sigmoid on that range.
    """

    scores: tuple[float, float]
    offset: float
    polynomial: Polynomial

    @property
    def _shares(self) -> bool:
        """Whether all blocks have the same keys and values: those of inputs whose queries see the same."""
        return isinstance(self.layout, BatchLayout)

    def encoded(self, problem: Problem) -> tuple[tuple[int, ...], list[tuple[Complex, int]]]:
        """Return the result's shape, and slots and primes of each ciphertext of a query; a masked value is 0."""
        layout, top = self.layout, self.ring.levels + 1
        q, k, v, seen = self._numbers(problem)
        q = q * (self.scale * self.slope)
        v = v * self.polynomial.factors()[0]
        found: list[tuple[Complex, int]] = []
        # where all queries see the same keys, values of the others are 0 already
        mask: dict[str, Any] = {} if self._shares else {"seen": seen}
        for block in layout.blocks():
            if not found or not self._shares:
                found += [(x, top) for x in layout.key_slots(k, seen, block)]
                found += [(x, self.value_limbs) for x in layout.value_slots(v, block, **mask)]
            found += [(x, top) for x in layout.query_slots(q, seen, block)]
        return problem.out_shape, found

    def tasks(self, parts: Sequence[Any]) -> list[tuple[Sequence[Any], Sequence[Any]]]:
        """Return the ciphertexts of each block: keys and values, and queries."""
        if self._shares:
            return super().tasks(parts)
        shared = 2 * self.layout.shared_parts
        each = shared + self.layout.query_parts
        return [(parts[i : i + shared], parts[i + shared : i + each]) for i in range(0, len(parts), each)]

    def _numbers(self, p: Problem) -> tuple[Float, Float, Float, NDArray[np.bool_]]:
        """Return query, key and value filled up, what is masked as zeros, and which keys each query sees.

        Raises
        ------
        InvalidProblem
            Sizes, options or numbers that are not the plan's.
        UnsupportedProblem
            Another variant, a bias, or packed sequences.
        """
        self.fits(p)
        layout = self.layout
        q, k, v = (to_float64(np.asarray(x)) for x in (p.query, p.key, p.value))
        k, v = (np.repeat(x, p.heads // p.heads_kv, 1) for x in (k, v))
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        seen = np.zeros((self.heads, layout.queries, layout.keys), bool)
        for head in range(self.heads):
            of = (head // p.heads, head % p.heads)
            seen[head, : p.n_q, : p.n_k] = visible(p, *of, slice(0, p.n_q), slice(0, p.n_k))
        read = np.asarray(seen.any(1))[:, : p.n_k, None]
        k, v = np.where(read, k, 0.0), np.where(read, v, 0.0)  # a key that nobody sees is not read
        for name, sizes, most in (
            ("query", np.linalg.norm(q, axis=2), self.norms[0]), ("key", np.linalg.norm(k, axis=2), self.norms[1]),
            ("value", np.abs(v), self.value_most),
        ):  # fmt: skip
            if not sizes.max() <= most:  # NaN, too
                raise InvalidProblem(f"{name}: its largest is {sizes.max():.4g}, beyond the plan's {most:.4g}")
        self.check_scores(q, k, seen[:, : p.n_q, : p.n_k])
        width = 2 * layout.pairs

        def filled(x: Float, rows: int) -> Float:
            return np.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, width - x.shape[2])))

        return filled(q, layout.queries), filled(k, layout.keys), filled(v, layout.keys), seen


@plans("sigmoid", "call he.plan")
def plan_sigmoid(
    n_q: int,
    n_k: int,
    d_k: int,
    d_v: int | None = None,
    heads: int = 1,
    *,
    scores: tuple[float, float],
    offset: float | None = None,
    scale: float | None = None,
    norms: tuple[float, float],
    value_most: float,
    tolerance: float = 1e-2,
    upload: str = "full",
    mode: str = "latency",
) -> SigmoidPlan:
    """Return the fastest plan for sigmoid attention on ciphertexts within a tolerance.

    o_i = sum_j p(scale·q_i·k_j + offset) v_j, which is within n_k · value_most · p.error, and the noise, of
    sum_j sigmoid(scale·q_i·k_j + offset) v_j.

    p is a polynomial with a certified error on the range of scores. A value that is masked is a zero, so a masked key
    weighs nothing. Source: Ramapuram et al., arXiv 2409.04431, section 2 (the operator).

    Parameters
    ----------
    n_q, n_k, d_k, d_v, heads : int
        Sizes; d_v is d_k by default. heads counts those of all batches.
    scores : (low, high)
        The range of scale·q_i·k_j + offset over all pairs that are seen; the offset itself is in it.
    offset, scale : float
        As of the variant "sigmoid": -log(n_k) and 1/sqrt(d_k) by default.
    norms, value_most, tolerance
        As :func:`refattn.he.plan` takes them.
    upload : {"full", "whole"}
        As :func:`refattn.he.plan` takes it.
    mode : {"latency", "throughput"}
        As :func:`refattn.he.plan` takes it.

    Raises
    ------
    InvalidInput
        A size, range or name that has no meaning.
    UnsupportedProblem
        No ring at 128 bits of security does it, or a head's queries do not fit a ciphertext together; or
        arguments of power-softmax attention.
    """
    sizes = (n_q, n_k, d_k, d_v, heads)
    given = arguments(sizes, scores, offset, scale, norms, value_most, tolerance, upload, mode)

    def layouts(slots: int) -> Sequence[Layout | BatchLayout]:
        return layouts_for(slots, n_q, n_k, d_k, given["d_v"], heads, mode, upload)

    return fastest(SigmoidPlan, given, layouts)


def plan_of(what: dict[str, Any]) -> SigmoidPlan:
    """Return the plan of what JSON holds of it; errors as of `plan_sigmoid`."""
    sizes = [what.pop(n) for n in ("n_q", "n_k", "d_k", "d_v", "heads")]
    rest: dict[str, Any] = {n: tuple(x) if isinstance(x, list) else x for n, x in what.items()}
    return plan_sigmoid(*sizes, **rest)


def arguments_of(plan: SigmoidPlan) -> dict[str, Any]:
    """Return what JSON holds of a plan: what it was made of."""
    names = (
        "n_q", "n_k", "d_k", "d_v", "heads", "scores", "offset", "scale", "norms", "value_most", "tolerance", "upload",
        "mode",
    )  # fmt: skip
    return {n: getattr(plan, n) for n in names}
