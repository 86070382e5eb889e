"""What plans of sigmoid attention compute, say and are made by, of a call and of decoding alike."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput, InvalidProblem, UnsupportedProblem
from ..problem import Problem
from ..validation import shown
from .arguments import MOST, check_arguments, is_number
from .arithmetic import Counted, Levels
from .circuit import attend_sigmoid
from .inputs import checked, out_of
from .layout import BatchLayout, Layout
from .linear import Plain
from .noise import Bounds, Noisy, Ring, quantile
from .plan import LEAST_MIDDLE, MOST_BITS, MOST_FIRST, MOST_MIDDLE, Attention
from .polynomials import Polynomial, sigmoids

__all__ = ["Sigmoid", "arguments", "fastest"]

Float = NDArray[np.float64]
Complex = NDArray[np.complex128]
S = TypeVar("S", bound="Sigmoid")
TRIED = 2
"""Polynomials that are tried: a rougher one may leave too little room for noise."""


class Sigmoid(Attention):
    """What plans of sigmoid attention have in place of a power's: a polynomial of scores, and no denominator."""

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
    def slope(self) -> float:
        """What a score is multiplied with to be in [-1, 1]."""
        return 2 / (self.scores[1] - self.scores[0])

    @property
    def shift(self) -> float:
        """What is added to a product of query and key then."""
        return (self.offset - self.scores[0]) * self.slope - 1

    def compute(self, m: Any, shared: Sequence[Any], queries: Sequence[Any]) -> list[Any]:
        """Return a block's result by an arithmetic."""
        keys, values = shared[: len(shared) // 2], shared[len(shared) // 2 :]
        return attend_sigmoid(m, self.layout, self.polynomial, self.shift, queries, keys, values)

    def decoded(self, slots: Sequence[Complex], shape: tuple[int, ...]) -> Float:
        """Return out from the slots of a reply."""
        layout = self.layout
        pairs = np.zeros((self.heads, layout.queries, layout.pairs), np.complex128)
        for i, block in enumerate(layout.blocks()):
            layout.read(list(slots[layout.outs * i : layout.outs * (i + 1)]), pairs, block)
        return out_of(self, shape, pairs)

    def report(self) -> dict[str, Any]:
        """Return all that the plan says, as what JSON holds."""
        found = super().report()
        del found["inverse"], found["inverse_degree"]
        return {"scores": self.scores, "polynomial_degree": self.polynomial.degree} | found

    def fits(self, p: Problem) -> None:
        """Refuse a problem that is not the plan's."""
        offset = checked(p, "sigmoid")["offset"]
        if p.kind != "numpy" or p.cu_seqlens_q is not None or p.bias is not None:
            raise UnsupportedProblem("he: takes arrays of numpy, without a bias and not packed")
        found = {n: getattr(p, n) for n in ("n_q", "n_k", "d_k", "d_v")} | {"heads": p.batch * p.heads}
        found["scale"] = 1 / math.sqrt(p.d_k) if p.scale is None else p.scale
        found["offset"] = -math.log(p.n_k) if offset is None else offset
        for name, x in found.items():
            if x != getattr(self, name):
                raise InvalidProblem(f"{name}: got {x}, expected the plan's {getattr(self, name)}")

    def check_scores(self, q: Float, keys: Float, seen: Any, first: int = 0) -> None:
        """Refuse queries (heads, rows, d) whose scores with keys that they see leave the range; `first` is a row's."""
        low, high = self.scores
        scores = self.scale * np.einsum("hid,hjd->hij", q, keys) + self.offset
        outside: Any = seen & ~((scores >= low) & (scores <= high))
        if outside.any():
            head, row, key = (int(x) for x in np.argwhere(outside)[0])
            raise InvalidProblem(
                f"scores: head {head}, row {first + row}, key {key} has {scores[head, row, key]:.4g}, outside the "
                f"plan's ({low:.4g}, {high:.4g}), where its polynomial holds; plan a wider range"
            )


class _Grid(Bounds):
    """Bounds at scores on a grid; what the scores' own noise does is left to the polynomial's slope."""

    def within(self, a: Noisy, p: int) -> Noisy:
        self.denominator_variance = np.array([float(a.variance.max())])
        return replace(a, value=self.denominators, variance=np.zeros_like(self.denominators))


def noise_of(p: Any) -> float:
    """Return the bound on what CKKS noise adds to an element of out."""
    w = np.linspace(-1, 1, 513)
    constant, factors = p.polynomial.factors()
    m = _Grid(p.ring, math.sqrt(2) * p.value_most, w)
    pairs = p.layout.pairs
    q = m.fresh(p.norms[0] * abs(p.scale) * p.slope / 2 / math.sqrt(pairs))
    k = m.fresh(p.norms[1] / math.sqrt(pairs))
    v = m.fresh(math.sqrt(2) * p.value_most * abs(constant))
    shared, known = p.shared_of(p.layout, p.n_k, getattr(p, "context", 0))
    keys, values = (
        [replace(x, variance=p.sums * x.variance)] * shared + [Plain(x.value.astype(complex), x.scale)] * known
        for x in (k, v)
    )
    out, *_ = attend_sigmoid(m, p.layout, p.polynomial, p.shift, [q] * p.layout.query_parts, keys, values)
    # Markov: |T_k'| <= k**2; the quadratics share a square, whose noise each of them passes on
    steep = sum(k * k * abs(c) for k, c in enumerate(p.polynomial.coefficients))
    of_scores = p.n_k * 2 * p.value_most**2 * steep**2 * m.denominator_variance
    variance = len(factors) * out.variance + of_scores
    return quantile(p.heads * p.n_q * p.d_v * p.replies) * math.sqrt(float(variance.max()))


def arguments(
    sizes: tuple[int, int, int, int | None, int], scores: Any, offset: float | None, scale: float | None, norms: Any,
    value_most: float, tolerance: float, upload: str, mode: str,
) -> dict[str, Any]:  # fmt: skip
    """Return what a plan is made of, checked: of sizes n_q, n_k, d_k, d_v and heads; others as of `plan_sigmoid`.

    Raises
    ------
    InvalidInput
        A size, range or name that has no meaning.
    UnsupportedProblem
        What sigmoid attention is not computed with.
    """
    n_q, n_k, d_k, d_v, heads = sizes
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
    return {
        "n_q": n_q, "n_k": n_k, "d_k": d_k, "d_v": d_v, "heads": heads, "p": 1, "denominator": (1.0, 1.0),
        "epsilon": 0.0, "scale": 1 / math.sqrt(d_k) if scale is None else float(scale),
        "norms": tuple(map(float, norms)), "value_most": float(value_most), "normalize": "server", "mode": mode,
        "upload": upload, "workers": 1, "tolerance": float(tolerance), "inverse": None, "scores": (low, high),
        "offset": offset,
    }  # fmt: skip


def fastest(kind: type[S], given: dict[str, Any], layouts: Callable[[int], Sequence[Layout | BatchLayout]]) -> S:
    """Return the fastest plan of a kind, from arguments of `arguments`, and the layouts for some slots.

    Raises
    ------
    UnsupportedProblem
        No ring at 128 bits of security does it, or a head's queries do not fit a ciphertext together.
    """
    low, high = given["scores"]
    best: S | None = None
    obstacle = ""
    for polynomial in sigmoids(low, high, given["tolerance"] / given["n_k"] / given["value_most"], TRIED):
        if sum(len(f) - 1 for f in polynomial.factors()[1]) < polynomial.degree:
            raise UnsupportedProblem(
                f"he: on ({low:g}, {high:g}) the sigmoid is too near a constant for a polynomial; take scores that "
                "reach nearer to 0"
            )
        for degree in MOST_BITS:
            try:
                found = layouts(degree // 2)
            except UnsupportedProblem as e:
                obstacle = str(e).removeprefix("he: ")
                continue
            for layout in found:
                if isinstance(layout, Layout) and layout.blocks_per_head > 1:
                    n_q = given["n_q"]
                    obstacle = f"{n_q} queries do not fit a ciphertext of degree {degree} together; cut them into calls"
                    continue
                made = _with_layout(kind, given, polynomial, degree, layout)
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
    kind: type[S], given: dict[str, Any], polynomial: Polynomial, degree: int, layout: Layout | BatchLayout
) -> S | str:
    """Return the plan with a layout, or what was in the way."""
    shared, more = kind.shared_of(layout, given["n_k"], given.get("context", 0))
    known: list[Any] = [Plain(np.zeros(1, complex))] * more

    def ran(top: int, at_values: int) -> tuple[Levels, int]:
        counting = Levels()
        keys, values = ([Counted(limbs)] * shared + known for limbs in (top, at_values))
        out, *_ = attend_sigmoid(counting, layout, polynomial, 0.0, [Counted(top)] * layout.query_parts, keys, values)
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
    making: Any = kind
    made: S = making(
        **given, ring=ring, layout=layout, levels={s: n for s, n in exact.levels.items() if n},
        counts=Counter(exact.counts), rotations=tuple(sorted({r % ring.slots for r in exact.rotations})),
        approximation=polynomial.error * given["n_k"] * given["value_most"], noise=0.0, polynomial=polynomial,
    )  # fmt: skip
    made = replace(made, noise=noise_of(made))
    if not made.error <= made.tolerance:
        return (
            f"at degree {degree} the error's bound is {made.approximation:.2g} + {made.noise:.2g} (approximation, "
            f"noise), above the tolerance {made.tolerance:.2g}"
        )
    return made
