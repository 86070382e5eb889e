"""Transformers as decision makers: gradient steps by ReLU attention, fast solvers as layers, and counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from ..functions.in_context import ridge_layer, ridge_tokens
from .claim import Claim, Evidence, judged, needs, same
from .fields import Q, orthogonal, precise, rational, rationals, solve, unequal, zeros

__all__ = ["CLAIMS", "relu_step"]

Array = NDArray[Any]


def relu_step(a: Array, r: Array, w: Array, eta: Any, weight: Any) -> Array:
    """Return w after a step of ridge regression, by a layer of ReLU attention at the last action's token.

    Parameters
    ----------
    a : (T, d) array
        Actions, the tokens' keys and values.
    r : (T,) array
        Rewards.
    w : (d,) array
        The estimate.
    eta, weight : number
        The step, and what the ridge weighs.
    """
    tokens = ridge_tokens(a, r, a[:0])
    tokens[-1, : len(w)] = w
    return np.asarray(ridge_layer(tokens, step=eta, weight=weight)(tokens)[-1, : len(w)])


def _one_head(a: Array, r: Array, w: Array, eta: Any, weight: Any) -> Array:
    t = a @ w - r
    return np.asarray(w - eta * (np.maximum(t, 0 * t)[:, None] * a).sum(0) - eta * weight * w)


def _step(step: Any, what: str) -> Evidence:
    """Compare a layer's step with the gradient's, in rationals."""
    a, r, w, eta, weight = rationals(0, 12, 4), rationals(1, 12), rationals(2, 4), Q(1, 100), Q(2)
    exact = w - eta * (a.T @ (a @ w - r) + weight * w)
    return Evidence(unequal(step(a, r, w, eta, weight), exact), 0, what)


def gradient() -> Evidence:
    """A layer against the gradient step, in rationals."""
    return _step(relu_step, "elements that differ from the gradient step's")


def one_head() -> Evidence:
    """One ReLU head: only residuals of one sign."""
    return _step(_one_head, "elements that differ, one head")


def _ridge(along: tuple[int, ...]) -> tuple[Array, Array, Any, tuple[Any, Any], Array]:
    """Return actions, rewards, weight, the smallest and largest eigenvalue, and the solution: a sum of eigenvectors."""
    u, values, weight = orthogonal(5, 3), np.array([Q(1, 2), Q(1), Q(3)]), Q(1)
    a = (u * values).T  # aᵀa has the eigenvectors u and the squares of values
    exact = np.asarray(sum(u[:, i] for i in along))
    r = solve(a.T, (a.T @ a + weight * rational(np.eye(3))) @ exact)
    return a, r, weight, (values[0] ** 2 + weight, values[2] ** 2 + weight), exact


def _descent(step: Any, counts: tuple[int, ...], along: tuple[int, ...]) -> tuple[list[Any], Any, Any]:
    """Return the squared errors after some layers, kappa, and the squared size of the solution."""
    a, r, weight, (low, high), exact = _ridge(along)
    w, errors = zeros(3), []
    for _ in range(max(counts)):
        w = relu_step(a, r, w, step(low, high), weight)
        errors.append(((w - exact) ** 2).sum())
    return [errors[c - 1] for c in counts], high / low, (exact**2).sum()


def layers(counts: tuple[int, ...] = (1, 2, 5, 10)) -> Evidence:
    """L layers of the step 2/(m + M): the error is ((kappa - 1)/(kappa + 1))^L along the extremes, less elsewhere."""
    needs(min(counts) >= 1, "at least one layer")
    pairs: list[Any] = []
    for along, extreme in (((0, 2), True), ((0, 1, 2), False)):
        found, kappa, size = _descent(lambda low, high: 2 / (low + high), counts, along)
        due = [((kappa - 1) / (kappa + 1)) ** (2 * c) * size for c in counts]
        pairs += zip(found, due, strict=True)
        if extreme:
            pairs += zip(due, found, strict=True)
    detail = {"layers": list(counts), "errors": [math.sqrt(float(e)) for e in found]}
    return judged(pairs, "squared error over the bound, and the bound over that of extremes", detail)


def long_step() -> Evidence:
    """A step of 3/M, beyond what converges."""
    errors, _, size = _descent(lambda _, high: 3 / high, (10,), (0, 1, 2))
    return Evidence(errors[0], size, "squared error after 10 layers of a long step, beside the start's")


ERROR = 1e-6
"""The relative error that layers are asked for."""


def _problem(kappa: float) -> tuple[Array, Array, float, Array]:
    """Return actions, rewards, weight and solution: eigenvalues from 1/kappa to 1, and a solution of norm 1."""
    rng = np.random.default_rng(3)
    u = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    weight = 1 / kappa / 2
    a, exact = (u * np.sqrt(np.geomspace(1 / kappa, 1, 6) - weight)).T, u.sum(1) / math.sqrt(6)
    return a, np.linalg.solve(a.T, (a.T @ a + weight * np.eye(6)) @ exact), weight, exact


def _momentum(kappa: float) -> float:
    """Return Nesterov's momentum: along the smallest eigenvalue both roots are then 1 - 1/sqrt(kappa)."""
    return (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)


def _left(kappa: float, momentum: float) -> Iterator[float]:
    """Yield how far ReLU layers of a problem of condition kappa are from the solution, before and after each."""
    a, r, weight, exact = _problem(kappa)
    z = p = np.zeros(6)
    tokens = ridge_tokens(a, r, a[:0])
    layer = ridge_layer(tokens, step=1.0, weight=weight)
    while True:
        yield float(np.linalg.norm(p - exact))
        tokens[-1, :6] = z
        after = layer(tokens)[-1, :6]
        z, p = after + momentum * (after - p), after


def _depth(kappa: float, error: float, momentum: float) -> int:
    """Return how many ReLU layers a problem of condition kappa takes to an error."""
    return next(count for count, left in enumerate(_left(kappa, momentum)) if left <= error)


@precise()
def _condition(kappa: float) -> float:
    """Return the condition of the problem that is made for kappa, from balls around its eigenvalues."""
    a, _, weight, _ = _problem(kappa)
    m = flint.arb_mat(a.tolist())
    found = m.transpose() * m + flint.arb_mat((weight * np.eye(6)).tolist())
    values = sorted((x.real for x in flint.acb_mat(found).eig()), key=float)
    return float((values[-1] / values[0]).upper())


def _equal_roots() -> list[int]:
    """Return whether a momentum makes two equal roots."""
    # roots of r² - (1 + momentum)(1 - 1/kappa) r + momentum (1 - 1/kappa), in numbers that are not rounded
    return [same((1 + _momentum(k)) ** 2 * (k - 1), 4 * _momentum(k) * k) for k in (9, 49)]


def _fast_bound(kappa: float, error: float) -> float:
    """Return the steps that Nesterov's method takes: |x - x*|² <= (kappa + 1)(1 - 1/sqrt(kappa))^k |x*|²."""
    return 1 + math.log((kappa + 1) / error**2) / -math.log1p(-1 / math.sqrt(kappa))


def _steps(kappa: float, error: float) -> int:
    """Return the steps of `_fast_bound` by taking them."""
    left, count = float(kappa + 1), 0
    while left > error**2:
        left, count = left * (1 - 1 / math.sqrt(kappa)), count + 1
    return count


def accelerated(kappas: tuple[float, ...] = (10, 100, 1000), error: float = ERROR) -> Evidence:
    """Layers of accelerated steps, counted, against 2·sqrt(kappa)·log(sqrt(kappa + 1)/error)."""
    needs(min(kappas) > 1, "kappa > 1")
    conditions = [_condition(k) for k in kappas]  # kappa up to the roundings of the problem's numbers
    found = [_depth(k, error, _momentum(c)) for k, c in zip(kappas, conditions, strict=True)]
    pairs: list[Any] = [(f, _fast_bound(c, error)) for f, c in zip(found, conditions, strict=True)]
    pairs += [same(math.floor(_fast_bound(k, error)), _steps(k, error)) for k in (2, *kappas)]
    return judged([*pairs, *_equal_roots()], "layers over the bound", {"kappa": conditions, "layers": found})


def plain() -> Evidence:
    """Plain steps held to the same depth."""
    bound = _fast_bound(_condition(1000), ERROR)
    return Evidence(_depth(1000, ERROR, 0), bound, "layers of plain steps beside the bound")


def _inf(a: Any) -> Any:
    """Return the largest row sum of a flint matrix: a norm of products."""
    return max(sum(abs(x) for x in row) for row in a.tolist())


def _newton_schulz(a: Any, rounds: int) -> list[tuple[Any, Any]]:
    """Return |I - Z Y| beside e' = (3 e² + e³)/4 and |Y² - A| beside |A||I - Z Y| after each round, exactly.

    The recurrence of e is that of the residual itself, E' = (3 E² + E³)/4, all matrices being polynomials of A.
    """
    n = a.nrows()
    one = flint.fmpq_mat(n, n, [int(i == j) for i in range(n) for j in range(n)])
    y, z, pairs = a, one, []
    e = _inf(one - a)
    for _ in range(rounds):
        t = (3 * one - z * y) / 2
        y, z = y * t, t * z
        e = (3 * e**2 + e**3) / 4
        pairs += [(_inf(one - z * y), e), (_inf(y * y - a), _inf(a) * _inf(one - z * y))]
    return pairs


def _spectrum(high: int) -> list[Any]:
    """Return matrices whose distance to I is below 1 where high is 1; a multiple of I attains the bounds."""
    return [
        flint.fmpq_mat(2, 2, [Q(high, 4), 0, 0, Q(high, 4)]),
        flint.fmpq_mat(2, 2, [high * Q(3, 4), Q(1, 8), Q(1, 8), high * Q(1, 2)]),
    ]


def root(high: int = 1) -> Evidence:
    """Newton-Schulz for a matrix square root, products only: what Thompson sampling needs."""
    given = _spectrum(high)
    one = flint.fmpq_mat(2, 2, [1, 0, 0, 1])
    needs(all(_inf(one - a) < 1 for a in given), "a distance to I below 1 after scaling")
    multiple, other = (_newton_schulz(a, 4) for a in given)
    back = [(bound, error) for error, bound in multiple]
    return judged([*multiple, *other, *back], "residuals over their bounds, which a multiple of I attains")


def root_unscaled() -> Evidence:
    """A spectrum up to 8: residuals grow from round to round."""
    a = _spectrum(8)[1]
    first, *_, last = (error for error, _ in _newton_schulz(a, 3)[::2])
    return Evidence(last, first, "residual after 3 rounds beside that after one, spectrum up to 8")


def _visits(threshold: int) -> int:
    rng = np.random.default_rng(5)
    sizes = (5, 4, 3)
    seen = np.stack([rng.integers(m, size=60) for m in sizes], 1)
    one = [np.eye(m, dtype=int)[seen[:, i]] for i, m in enumerate(sizes)]
    wrong = 0
    for query in np.ndindex(*sizes):
        match = sum(o[:, q] for o, q in zip(one, query, strict=True))
        wrong += int(np.maximum(match - threshold, 0).sum() != (seen == query).all(1).sum())
    return wrong


def visits() -> Evidence:
    """Counts of (step, state, action) by relu(one-hot match - 2): exact, as UCB-VI needs them."""
    return Evidence(_visits(2), 0, "wrong counts")


def visits_without() -> Evidence:
    """relu(match - 1)."""
    return Evidence(_visits(1), 0, "wrong counts with the threshold 1")


SOURCE = "Lin, Bai and Mei, Transformers as Decision Makers (arXiv 2310.08566; abstract read, constructions are ours)"
CLAIMS = [
    Claim(
        "decisions-gradient",
        "Two ReLU attention heads do an exact gradient step of ridge regression",
        SOURCE,
        gradient,
        one_head,
    ),
    Claim(
        "decisions-layers",
        "L layers leave an error of ((kappa - 1)/(kappa + 1))^L",
        SOURCE,
        layers,
        long_step,
        ("at least one layer",),
    ),
    Claim(
        "decisions-accelerated",
        "Accelerated steps take O(sqrt(kappa) log(kappa/e)) layers",
        SOURCE,
        accelerated,
        plain,
        ("kappa > 1",),
    ),
    Claim(
        "decisions-root",
        "Newton-Schulz iterations, products only, give the matrix root of Thompson sampling: residuals e go to"
        " (3e² + e³)/4",
        SOURCE,
        root,
        root_unscaled,
        ("a distance to I below 1 after scaling",),
    ),
    Claim("decisions-counts", "One ReLU layer counts visits exactly, as UCB-VI needs", SOURCE, visits, visits_without),
]
