"""CRATE: the coding rate and its gradient; what its attention step does to the rate, and what it does not; ISTA."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from ..functions.crate import ista_step
from .claim import Claim, Evidence, judged, needs, same, total
from .fields import Q, balls, disjoint, each, exp, meet, orthogonal, precise, rational, rationals, solve, unequal, zeros

__all__ = ["CLAIMS", "gradient", "heads"]

Array = NDArray[Any]


def _eye(n: int) -> Array:
    return rational(np.eye(n))


def gradient(z: Array, bases: Array, beta: Any) -> Array:
    """Return the gradient of R^c = sum over k of log det(I + beta W Wᵀ) / 2, W = U_kᵀ Z: beta · U (I + beta W Wᵀ)⁻¹ W.

    Parameters
    ----------
    z : (d, n) array of rationals
        Tokens as columns.
    bases : (K, d, p) array of rationals
        U_k.
    beta : rational
        p / (n eps²).
    """
    parts = [(u, u.T @ z) for u in bases]
    return np.asarray(sum(beta * u @ solve(_eye(len(w)) + beta * w @ w.T, w) for u, w in parts))


def heads(z: Array, bases: Array) -> Array:
    """Return the sum of U W softmax(WᵀW), softmax over each column, of balls: multi-head subspace self-attention."""
    found = 0 * z
    for u in bases:
        w = u.T @ z
        p = exp(w.T @ w)
        found = found + u @ w @ (p / p.sum(0))
    return found


def _slope(z: Array, bases: Array, beta: Any, along: Array) -> Any:
    """Return the rate's derivative along a direction, from the determinants as polynomials of the step."""
    found = Q(0)
    for u in bases:
        w = u.T @ each(lambda a, b: flint.fmpq_poly([a, b]), z, along)
        m = _eye(len(w)) + beta * w @ w.T
        det = m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0]
        found += det[1] / det[0] / 2
    return found


def _against_slope(form: Callable[[Array, Array, Any], Array], what: str) -> Evidence:
    """Compare a gradient with slopes along the axes, exactly; two bases of two columns."""
    z, bases, beta = rationals(0, 4, 3), rationals(1, 2, 4, 2), Q(3, 5)
    slopes = 0 * z
    for at in np.ndindex(z.shape):
        along = 0 * z
        along[at] = Q(1)
        slopes[at] = _slope(z, bases, beta, along)
    return Evidence(unequal(form(z, bases, beta), slopes), 0, what)


def formula() -> Evidence:
    """The gradient against the derivative of the determinants along each axis, in rationals."""
    return _against_slope(gradient, "elements that differ from the slopes of the determinants")


def formula_without_inverse() -> Evidence:
    """beta · U UᵀZ, the gradient where Z is small."""
    what = "elements of the first term that differ from the slopes"
    return _against_slope(lambda z, bases, beta: beta * sum(u @ (u.T @ z) for u in bases), what)


def _rate(z: Array, bases: Array, beta: Any) -> Any:
    """Return the rate of balls."""
    found = flint.arb(0)
    for u in bases:
        w = u.T @ z
        found += flint.arb_mat((balls(_eye(len(w))) + beta * (w @ w.T)).tolist()).det().log() / 2
    return found


def _rated() -> int:
    """Return 0 where exp of twice a rate is the product of det(I + beta WᵀW), an identity of Sylvester's, else 2."""
    z, bases, beta = rationals(0, 4, 3), rationals(1, 2, 4, 2), Q(3, 5)
    within = [_eye(z.shape[1]) + beta * (u.T @ z).T @ (u.T @ z) for u in bases]
    rate = _rate(balls(z), balls(bases), flint.arb(beta))
    return same(meet((2 * rate).exp(), math.prod(flint.fmpq_mat(m.tolist()).det() for m in within)), True)


def _unit(z: Array) -> Array:
    return np.asarray(z / each(lambda a: a.sqrt(), (z * z).sum(0)))


def _tokens(n: int = 24, over: int = 200, pairs: bool = False, seed: int = 0) -> tuple[Array, Array, Any]:
    """Return unit tokens near three planes in 8 dimensions, the planes, and beta.

    Up to 8/`over` is added outside the planes, nothing where it is 0; with pairs, -z is a token where z is.
    """
    whole, rng = orthogonal(seed, 8), np.random.default_rng(seed)
    bases = np.stack([whole[:, 2 * k : 2 * k + 2] for k in range(3)])
    m = n // 2 if pairs else n
    near = np.stack([bases[k] @ x for k, x in zip(rng.integers(3, size=m), rationals(seed + 1, m, 2), strict=True)], 1)
    z = near + rationals(seed + 2, 8, m, over=over) if over else near
    z = np.concatenate([z, -z], 1) if pairs else z
    return _unit(balls(z)), balls(bases), flint.arb(2) / n * 4


def _after(s: Any, by: Callable[[Any, Any], Any] | None) -> Any:
    """Return the rate of (1 - s) Z plus or minus s · MSSA(Z), or alone."""
    z, bases, beta = _tokens()
    kept = (1 - flint.arb(s)) * z
    return _rate(by(kept, flint.arb(s) * heads(z, bases)) if by else kept, bases, beta)


STEPS = (Q(1, 10), Q(1, 4), Q(1, 2))


@precise()
def shrinks(steps: tuple[Any, ...] = STEPS, size: int = 1) -> Evidence:
    """The rate of (1 - s) Z, over that of (1 - s) Z + s · MSSA(Z): the attention term raises it."""
    needs(all(0 < s < 1 for s in steps), "steps s in (0, 1)")
    z, bases, beta = _tokens()
    z = size * z
    needs(disjoint((z * z).sum(0), 1 + balls(zeros(z.shape[1]))) == 0, "tokens of unit norm")
    before, alone = _rate(z, bases, beta), [_after(s, None) for s in steps]
    found = [_after(s, operator.add) for s in steps]
    detail = {
        "s": [float(s) for s in steps],
        "rate over before": [float(a / before) for a in found],
        "rate over before of (1 - s) Z": [float(a / before) for a in alone],
    }
    pairs = [*zip(alone, found, strict=True), *((f, before) for f in found), _rated()]
    return judged(pairs, "rate of (1 - s) Z over that with MSSA, and of that over the one before", detail)


@precise()
def turned() -> Evidence:
    """(1 - s) Z - s · MSSA(Z): with its sign turned the attention term lowers the rate."""
    return Evidence(_after(STEPS[0], None), _after(STEPS[0], operator.sub), "rate of (1 - s) Z, beside that with -MSSA")


def _uniform(z: Array, bases: Array) -> Array:
    """Return the sum of U W with each column replaced by the columns' mean: attention of equal weights."""
    return np.asarray(sum(u @ (u.T @ z).mean(1, keepdims=True) for u in bases) + 0 * z)


TURNS = tuple(sign * s / (1 - s) for sign in (1, -1) for s in STEPS)
"""t of Z + t · MSSA(Z): scaled back to unit norm it is (1 - s) Z + s · MSSA(Z) for t = s/(1 - s)."""
Term = Callable[[Array, Array], Array]
KINDS = ((0, False), (10, True))
"""What is outside the planes, as `over` of `_tokens`, and whether + MSSA then raises the rate."""


@precise()
def _scaled(term: Term, seeds: tuple[int, ...], pairs: bool, what: str) -> Evidence:
    """Count the steps, scaled back to unit norm, whose rate is not surely on the side of the one before that is said.

    With its sign turned the term must do the opposite.
    """
    wrong, curves = [], {}
    for (over, raised), seed in itertools.product(KINDS, seeds):
        z, bases, beta = _tokens(over=over, pairs=pairs, seed=seed)
        before, moved, ratios = _rate(z, bases, beta), term(z, bases), []
        for t in TURNS:
            after = _rate(_unit(z + flint.arb(t) * moved), bases, beta)
            wrong.append(not (after > before if raised == (t > 0) else after < before))
            ratios.append(float(after / before))
        curves[f"rate over before, {'far from' if raised else 'in'} the planes"] = ratios
    return Evidence(total(*wrong), 0, what, {"t": [float(t) for t in TURNS], **curves})


def scaled(seeds: tuple[int, ...] = (0, 1, 2), pairs: bool = True) -> Evidence:
    """Tokens in the planes, whose rate + MSSA lowers and - MSSA raises, and tokens far from them: the opposite."""
    needs(pairs, "tokens in pairs of z and -z: the mean of others moves a rate, too")
    return _scaled(heads, seeds, pairs, "steps whose rate at unit norm is not on its side")


def scaled_uniform() -> Evidence:
    """Equal weights in the place of softmax: of pairs z and -z they are 0, and move no rate."""
    return _scaled(_uniform, (0,), True, "steps whose rate at unit norm is not on its side, equal weights")


def _two_terms(sizes: Array) -> tuple[Any, Any]:
    """Return the squares of beta · lambda and of the relative error of two terms, for tokens along axes of U."""
    u, beta = orthogonal(1, 4)[:, :3], Q(1, 2)
    w = np.array([[sizes[i] if i == j else Q(0) for j in range(3)] for i in range(3)])
    z = u @ w
    exact = gradient(z, u[None], beta)
    found = beta * u @ (w - beta * w @ w.T @ w)
    away = found - exact
    return max(beta * s * s for s in sizes) ** 2, (away * away).sum() / (exact * exact).sum()


def neumann(size: float = 1.0) -> Evidence:
    """(I + beta W Wᵀ)⁻¹ as I - beta W Wᵀ: a relative error of (beta·lambda)², attained where W has one value."""
    by = Q(*size.as_integer_ratio())
    cases = [by * np.array(c) for c in ([Q(1), Q(1), Q(1)], [Q(1), Q(1, 2), Q(1, 4)], [Q(0), Q(5, 4), Q(0)])]
    found = [_two_terms(c) for c in cases]
    needs(all(spectrum < 1 for spectrum, _ in found), "beta · lambda below 1: the series does not converge")
    pairs = [(error, spectrum**2) for spectrum, error in found]
    first, _, last = (same(*pair) for pair in pairs)  # of one value: the error is the bound
    return judged([*pairs, first, last], "squared relative error of two terms, over the bound's")


def neumann_large() -> Evidence:
    """The same two terms where beta·lambda is 2: a larger error than that of no term at all."""
    return Evidence(_two_terms(np.array([Q(2), Q(1), Q(1)]))[1], 1, "squared relative error of two terms, large tokens")


def _dictionary() -> tuple[Array, Any]:
    """Return a dictionary with singular values from 1/2 to 2, and the square of its norm, all rational."""
    values = np.array([Q(1, 2), Q(1), Q(3, 2), Q(2)])
    return orthogonal(2, 4) * values @ orthogonal(3, 4), Q(4)


def _loss(x: Array, z: Array, d: Array, weight: Any) -> Any:
    away = x - d @ z
    return (away * away).sum() / 2 + weight * z.sum()


def _due(after: Array, z: Array, eta: Any) -> Any:
    """Return the descent that is due: |z' - z|²/(2 eta)."""
    return ((after - z) ** 2).sum() / (2 * eta)


def _descent(step: Any, rounds: int = 6) -> Any:
    """Return the most that a step falls short of the descent that is due."""
    d, norm = _dictionary()
    x, z, weight, eta, short = rationals(4, 4) * 4, zeros(4), Q(1, 10), step / norm, []
    for _ in range(rounds):
        after = ista_step(x, z, d, eta, weight)
        short.append(_loss(x, after, d, weight) - _loss(x, z, d, weight) + _due(after, z, eta))
        z = after
    return max(short)


def ista(step: Any = 1) -> Evidence:
    """Each step lowers the non-negative lasso by |z' - z|²/(2 eta) or more, for eta up to 1/|D|²."""
    needs(0 < step <= 1, f"eta up to 1/|D|², got {step}/|D|²")
    # of equal singular values and where no element becomes 0 the descent is just what is due
    d, eta, weight = 2 * orthogonal(3, 4), Q(1, 4), Q(1, 10)
    z, x = rationals(6, 4, least=1), d @ rationals(5, 4, least=1)
    after = ista_step(x, z, d, eta, weight)
    attained = same(_loss(x, z, d, weight) - _loss(x, after, d, weight), _due(after, z, eta))
    what = "most by which the loss falls short of its descent"
    return Evidence(_descent(Q(step)), 0, what, unequal=attained)


def ista_long() -> Evidence:
    """eta = 3/|D|²."""
    return Evidence(_descent(Q(3)), 0, "most by which the loss falls short, eta = 3/|D|²")


def _solution(weight_of_step: Any) -> int:
    """Return how many elements of a solution a step moves: z >= 0, Dᵀ(x - D z) <= lambda, and = where z > 0."""
    d, norm = _dictionary()
    z, weight = np.array([Q(1), Q(0), Q(1, 3), Q(0)]), Q(1, 10)
    below = np.array([Q(0), Q(1, 7), Q(0), Q(1, 20)])  # how far Dᵀ(x - D z) is below lambda where z is 0
    x = d @ z + solve(d.T, weight - below)
    moved = [ista_step(x, z, d, eta, weight_of_step) for eta in (1 / norm, 1 / (3 * norm))]
    return sum(unequal(m, z) for m in moved)


def fixed() -> Evidence:
    """A code made to satisfy the conditions of Karush, Kuhn and Tucker: the step leaves it as it is."""
    return Evidence(_solution(Q(1, 10)), 0, "elements of a solution that a step moves")


def doubled_threshold() -> Evidence:
    """The step with twice the threshold: it solves another lasso."""
    return Evidence(_solution(Q(1, 5)), 0, "elements of a solution that a step of twice the threshold moves")


SOURCE = "Yu et al., CRATE (arXiv 2306.01129; its abstract and code were read, the theorems are recalled)"
CLAIMS = [
    Claim(
        "crate-gradient",
        "The coding rate's gradient is beta · sum of U (I + beta W Wᵀ)⁻¹ W",
        SOURCE,
        formula,
        formula_without_inverse,
    ),
    Claim(
        "crate-descent",
        "(1 - s) Z + s · MSSA(Z) lowers the coding rate of unit tokens near the subspaces, but less than (1 - s) Z"
        " does, which only shrinks them",
        SOURCE,
        shrinks,
        turned,
        ("steps s in (0, 1)", "tokens of unit norm"),
    ),
    Claim(
        "crate-descent-unit",
        "A negative result: of tokens scaled back to unit norm + MSSA lowers the coding rate where they are in the"
        " subspaces, and raises it where they are far from them; - MSSA does the opposite",
        SOURCE,
        scaled,
        scaled_uniform,
        ("tokens in pairs of z and -z",),
    ),
    Claim(
        "crate-neumann",
        "Two terms of the Neumann series give the gradient up to (beta · lambda)²",
        SOURCE,
        neumann,
        neumann_large,
        ("beta · lambda < 1",),
    ),
    Claim(
        "crate-ista",
        "The sparsifying step lowers the lasso by |z' - z|²/(2 eta) or more for eta up to 1/|D|²",
        SOURCE,
        ista,
        ista_long,
        ("eta <= 1/|D|²",),
    ),
    Claim(
        "crate-ista-solution",
        "A solution of the non-negative lasso is a fixed point of the sparsifying step",
        SOURCE,
        fixed,
        doubled_threshold,
    ),
]
