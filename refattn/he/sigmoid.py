"""Sigmoid attention on ciphertexts: each weight a polynomial of its score, no denominator; planned, and placed."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import to_float64
from ..errors import InvalidInput, InvalidProblem, UnsupportedProblem
from ..masks import visible
from ..problem import Problem
from ..validation import shown
from .arguments import MOST, check_arguments, is_number
from .arithmetic import Counted, Levels
from .circuit import attend_sigmoid
from .inputs import checked, out_of
from .layout import BatchLayout, Layout, layouts_for
from .noise import Bounds, Noisy, Ring, quantile
from .plan import LEAST_MIDDLE, MOST_BITS, MOST_FIRST, MOST_MIDDLE, Plan
from .polynomials import Polynomial, sigmoids

__all__ = ["SigmoidPlan", "plan_sigmoid"]

Float = NDArray[np.float64]
Complex = NDArray[np.complex128]
TRIED = 2
"""Polynomials that are tried: a rougher one may leave too little room for noise."""


@dataclass(frozen=True)
class SigmoidPlan(Plan):
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

    operator = "sigmoid"
    scores: tuple[float, float]
    offset: float
    polynomial: Polynomial

    @property
    def outs(self) -> int:
        """Ciphertexts of a reply."""
        return self.layout.outs * len(self.layout.blocks())

    @property
    def out_most(self) -> float:
        """The largest element of a result: all keys with a whole weight."""
        return self.n_k * self.value_most

    @property
    def value_limbs(self) -> int:
        """Primes that the values' ciphertexts have left: what the weights have when they meet."""
        return self.ring.levels + 1 - self.levels["products"] - self.levels.get("sigmoid", 0)

    @property
    def digest(self) -> bytes:
        """What messages name the plan by."""
        own = repr((self.scores, self.offset, self.polynomial.coefficients)).encode()
        return hashlib.sha256(b"sigmoid" + own + super().digest).digest()

    @property
    def _shares(self) -> bool:
        """Whether all blocks have the same keys and values: those of inputs whose queries see the same."""
        return isinstance(self.layout, BatchLayout)

    @property
    def _slope(self) -> float:
        """What a score is multiplied with to be in [-1, 1]."""
        return 2 / (self.scores[1] - self.scores[0])

    @property
    def _shift(self) -> float:
        """What is added to a product of query and key then."""
        return (self.offset - self.scores[0]) * self._slope - 1

    def compute(self, m: Any, shared: Sequence[Any], queries: Sequence[Any]) -> list[Any]:
        """Return a block's result by an arithmetic."""
        keys, values = shared[: len(shared) // 2], shared[len(shared) // 2 :]
        return attend_sigmoid(m, self.layout, self.polynomial, self._shift, queries, keys, values)

    def encoded(self, problem: Problem) -> tuple[tuple[int, ...], list[tuple[Complex, int]]]:
        """Return the result's shape, and slots and primes of each ciphertext of a query; a masked value is 0."""
        layout, top = self.layout, self.ring.levels + 1
        q, k, v, seen = self._numbers(problem)
        q = q * (self.scale * self._slope)
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

    def decoded(self, slots: Sequence[Complex], shape: tuple[int, ...]) -> Float:
        """Return out from the slots of a reply."""
        layout = self.layout
        pairs = np.zeros((self.heads, layout.queries, layout.pairs), np.complex128)
        for i, block in enumerate(layout.blocks()):
            layout.read(list(slots[layout.outs * i : layout.outs * (i + 1)]), pairs, block)
        return out_of(self, shape, pairs)

    def tasks(self, parts: Sequence[Any]) -> list[tuple[Sequence[Any], Sequence[Any]]]:
        """Return the ciphertexts of each block: keys and values, and queries."""
        if self._shares:
            return super().tasks(parts)
        shared = 2 * self.layout.shared_parts
        each = shared + self.layout.query_parts
        return [(parts[i : i + shared], parts[i + shared : i + each]) for i in range(0, len(parts), each)]

    def report(self) -> dict[str, Any]:
        """Return all that the plan says, as what JSON holds."""
        found = super().report()
        del found["inverse"], found["inverse_degree"]
        return {"scores": self.scores, "polynomial_degree": self.polynomial.degree} | found

    def _numbers(self, p: Problem) -> tuple[Float, Float, Float, NDArray[np.bool_]]:
        """Return query, key and value filled up, what is masked as zeros, and which keys each query sees.

        Raises
        ------
        InvalidProblem
            Sizes, options or numbers that are not the plan's.
        UnsupportedProblem
            Another variant, a bias, or packed sequences.
        """
        _fits(self, p)
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
        low, high = self.scores
        scores = self.scale * np.einsum("hid,hjd->hij", q, k) + self.offset
        outside: Any = seen[:, : p.n_q, : p.n_k] & ~((scores >= low) & (scores <= high))
        if outside.any():
            head, row, key = (int(x) for x in np.argwhere(outside)[0])
            raise InvalidProblem(
                f"scores: head {head}, row {row}, key {key} has {scores[head, row, key]:.4g}, outside the plan's "
                f"({low:.4g}, {high:.4g}), where its polynomial holds; plan a wider range"
            )
        width = 2 * layout.pairs

        def filled(x: Float, rows: int) -> Float:
            return np.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, width - x.shape[2])))

        return filled(q, layout.queries), filled(k, layout.keys), filled(v, layout.keys), seen


def _fits(plan: SigmoidPlan, p: Any) -> None:
    offset = checked(p, "sigmoid")["offset"]
    if p.kind != "numpy" or p.cu_seqlens_q is not None or p.bias is not None:
        raise UnsupportedProblem("he: takes arrays of numpy, without a bias and not packed")
    found = {n: getattr(p, n) for n in ("n_q", "n_k", "d_k", "d_v")} | {"heads": p.batch * p.heads}
    found["scale"] = 1 / math.sqrt(p.d_k) if p.scale is None else p.scale
    found["offset"] = -math.log(p.n_k) if offset is None else offset
    for name, x in found.items():
        if x != getattr(plan, name):
            raise InvalidProblem(f"{name}: got {x}, expected the plan's {getattr(plan, name)}")


class _Grid(Bounds):
    """Bounds at scores on a grid; what the scores' own noise does is left to the polynomial's slope."""

    def within(self, a: Noisy, p: int) -> Noisy:
        self.denominator_variance = np.array([float(a.variance.max())])
        return replace(a, value=self.denominators, variance=np.zeros_like(self.denominators))


def _noise_of(p: SigmoidPlan) -> float:
    """Return the bound on what CKKS noise adds to an element of out."""
    w = np.linspace(-1, 1, 513)
    constant, factors = p.polynomial.factors()
    m = _Grid(p.ring, math.sqrt(2) * p.value_most, w)
    pairs = p.layout.pairs
    q = m.fresh(p.norms[0] * abs(p.scale) * p._slope / 2 / math.sqrt(pairs))
    k = m.fresh(p.norms[1] / math.sqrt(pairs))
    v = m.fresh(math.sqrt(2) * p.value_most * abs(constant))
    shared = p.layout.shared_parts
    out, *_ = attend_sigmoid(
        m, p.layout, p.polynomial, p._shift, [q] * p.layout.query_parts, [k] * shared, [v] * shared
    )
    # Markov: |T_k'| <= k**2; the quadratics share a square, whose noise each of them passes on
    steep = sum(k * k * abs(c) for k, c in enumerate(p.polynomial.coefficients))
    of_scores = p.n_k * 2 * p.value_most**2 * steep**2 * m.denominator_variance
    variance = len(factors) * out.variance + of_scores
    return quantile(p.heads * p.n_q * p.d_v) * math.sqrt(float(variance.max()))


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
        No ring at 128 bits of security does it, or a head's queries do not fit a ciphertext together.
    """
    if not isinstance(scores, tuple | list) or len(scores) != 2 or not all(map(is_number, scores)):
        raise InvalidInput(f"scores: got {shown(scores)}, expected two finite numbers")
    if offset is not None and not is_number(offset):
        raise InvalidInput(f"offset: got {shown(offset)}, expected a finite number, or None for -log(n_k)")
    if upload == "compact":
        raise UnsupportedProblem("he: upload='compact' is not for sigmoid attention; take 'full', or 'whole'")
    check_arguments(
        n_q, n_k, d_k, d_v, heads, 2, (1.0, 2.0), 0.0, norms, value_most, tolerance, "server", mode, upload, 1,
        scale,
    )  # fmt: skip
    offset = -math.log(n_k) if offset is None else float(offset)
    low, high = map(float, scores)
    for name, x in (("scores", low), ("scores", high), ("offset", offset)):
        if abs(x) > MOST:
            raise InvalidInput(f"{name}: got {x:g}, expected from {-MOST:g} to {MOST:g}; choose another unit")
    if not low <= offset <= high or not low < high:
        raise InvalidInput(f"scores: got ({low:g}, {high:g}), expected low < high with the offset, {offset:g}, between")
    d_v = d_k if d_v is None else d_v
    given = {
        "n_q": n_q, "n_k": n_k, "d_k": d_k, "d_v": d_v, "heads": heads, "p": 1, "denominator": (1.0, 1.0),
        "epsilon": 0.0, "scale": 1 / math.sqrt(d_k) if scale is None else float(scale),
        "norms": tuple(map(float, norms)), "value_most": float(value_most), "normalize": "server", "mode": mode,
        "upload": upload, "workers": 1, "tolerance": float(tolerance), "inverse": None, "scores": (low, high),
        "offset": offset,
    }  # fmt: skip
    return _fastest(given)


def _fastest(given: dict[str, Any]) -> SigmoidPlan:
    """Return the fastest plan of checked arguments; errors as of `plan_sigmoid`."""
    low, high = given["scores"]
    n_q, n_k, d_k, d_v, heads = (given[n] for n in ("n_q", "n_k", "d_k", "d_v", "heads"))
    best: SigmoidPlan | None = None
    obstacle = ""
    for polynomial in sigmoids(low, high, given["tolerance"] / n_k / given["value_most"], TRIED):
        if sum(len(f) - 1 for f in polynomial.factors()[1]) < polynomial.degree:
            raise UnsupportedProblem(
                f"he: on ({low:g}, {high:g}) the sigmoid is too near a constant for a polynomial; take scores that "
                "reach nearer to 0"
            )
        for degree in MOST_BITS:
            try:
                layouts = layouts_for(degree // 2, n_q, n_k, d_k, d_v, heads, given["mode"], given["upload"])
            except UnsupportedProblem as e:
                obstacle = str(e).removeprefix("he: ")
                continue
            for layout in layouts:
                if isinstance(layout, Layout) and layout.blocks_per_head > 1:
                    obstacle = f"{n_q} queries do not fit a ciphertext of degree {degree} together; cut them into calls"
                    continue
                made = _with_layout(given, polynomial, degree, layout)
                if isinstance(made, str):
                    obstacle = made
                elif best is None or made.waiting_ms() < best.waiting_ms():
                    best = made
    if best is None:
        raise UnsupportedProblem(f"he: {obstacle}; a narrower range of scores or a larger tolerance would help")
    return best


def _largest(polynomial: Polynomial) -> float:
    """Return a bound on all products of the polynomial's monic factors, for w in [-1, 1]."""
    w = np.linspace(-1, 1, 513)  # a quadratic's largest is at an end, its least has the smaller size or is seen near
    sizes = (np.abs(np.polynomial.polynomial.polyval(w, f)).max() for f in polynomial.factors()[1])
    return math.prod(max(1.0, float(x)) for x in sizes)


def _with_layout(
    given: dict[str, Any], polynomial: Polynomial, degree: int, layout: Layout | BatchLayout
) -> SigmoidPlan | str:
    """Return the plan with a layout, or what was in the way."""
    shared = layout.shared_parts

    def ran(top: int, at_values: int) -> tuple[Levels, int]:
        counting = Levels()
        parts = [Counted(top)] * layout.query_parts, [Counted(top)] * shared, [Counted(at_values)] * shared
        out, *_ = attend_sigmoid(counting, layout, polynomial, 0.0, *parts)
        return counting, top - out.limbs

    counting, depth = ran(99, 99)
    # the first prime holds the largest result: two outputs, and a sign
    above = max(3, math.ceil(math.log2(max(1.0, math.sqrt(2) * given["n_k"] * given["value_most"]))) + 2)
    middle = min(MOST_MIDDLE, (MOST_BITS[degree] - MOST_FIRST - above) // (depth + 1))
    middle = min(middle, MOST_FIRST - above)
    if middle < LEAST_MIDDLE:
        return f"{depth} levels are needed, for which degree {degree} has no room at 128 bits of security"
    ring = Ring(degree, middle + above, middle, MOST_FIRST, depth)
    largest = _largest(polynomial)
    if largest > 2.0 ** (ring.first - 3):  # weights and their parts have a prime beside the first one, at least
        return (
            f"the polynomial's factors have products up to {largest:.2g}, too large for degree {degree}: those of "
            "scores nearer to 0 are smaller"
        )
    exact, _ = ran(depth + 1, depth + 1 - counting.levels["products"] - counting.levels.get("sigmoid", 0))
    made = SigmoidPlan(
        **given, ring=ring, layout=layout, levels={s: n for s, n in exact.levels.items() if n},
        counts=Counter(exact.counts), rotations=tuple(sorted({r % ring.slots for r in exact.rotations})),
        approximation=polynomial.error * given["n_k"] * given["value_most"], noise=0.0, polynomial=polynomial,
    )  # fmt: skip
    made = replace(made, noise=_noise_of(made))
    if not made.error <= made.tolerance:
        return (
            f"at degree {degree} the error's bound is {made.approximation:.2g} + {made.noise:.2g} (approximation, "
            f"noise), above the tolerance {made.tolerance:.2g}"
        )
    return made


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
