"""Attention as a dynamical system: recurrences equal masked matrices, and softmax is the limit of growing state."""

from __future__ import annotations

import itertools
import math
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from ..functions.systems import Recurrence, run_recurrence
from ..tensor.polynomial import monomials
from .claim import Claim, Evidence, judged, needs, same, worst
from .counting import held
from .fields import Q, balls, disjoint, exp, meet, precise, rationals, unequal, zeros

__all__ = ["CLAIMS", "power_sums", "softmax", "taylor_bound"]

Array = NDArray[Any]


def _call(n: int = 14, d: int = 3) -> Array:
    return rationals(0, 3, n, d)


def _gates(n: int = 14) -> Array:
    return rationals(1, n, least=5, most=8)


def _gated(q: Array, k: Array, v: Array, a: Array, b: Array) -> Array:
    """Return h_t = a_t h_{t-1} + b_t k_t v_tᵀ, o_t = q_t h_t."""
    system = Recurrence(a[:, None, None], (b[:, None] * k)[..., None], q[..., None])
    return np.asarray(run_recurrence(system, v)[0])


def _mask(a: Array, first: int) -> Array:
    """Return L_ts, the product of a from s + first to t."""
    n = len(a)
    return np.array(
        [[math.prod(a[s + first : t + 1], start=Q(1)) if s <= t else Q(0) for s in range(n)] for t in range(n)]
    )


def _from_matrix(first: int, what: str) -> Evidence:
    """Compare the recurrence with (QKᵀ ∘ L) V, in rationals."""
    (q, k, v), a = _call(), _gates()
    found = _gated(q, k, v, a, np.full(len(q), Q(1)))
    return Evidence(unequal(found, ((q @ k.T) * _mask(a, first)) @ v), 0, what)


def recurrence() -> Evidence:
    """h_t = a_t h_{t-1} + k_t v_tᵀ, o_t = q_t h_t, against (QKᵀ ∘ L) V, L_ts the product of a from s + 1 to t."""
    return _from_matrix(1, "elements that differ from the masked matrix's")


def recurrence_off_by_one() -> Evidence:
    """The mask with a's product from s instead of s + 1."""
    return _from_matrix(0, "elements that differ, the product off by one")


def _normalised(scaled: bool, what: str) -> Evidence:
    """Compare a system whose state holds k v / eta with normalised attention; its state is scaled, or not."""
    q, k, v = _call()
    q, k = abs(q), abs(k)
    eta = (q * np.cumsum(k, 0)).sum(1)  # what row t divides by
    before = np.concatenate([[Q(1)], eta[:-1]])
    found = _gated(q, k, v, before / eta if scaled else np.full(len(q), Q(1)), 1 / eta)
    p = np.tril(q @ k.T)
    return Evidence(unequal(found, (p @ v) / p.sum(1, keepdims=True)), 0, what)


def normalised() -> Evidence:
    """A state scaled by eta_{t-1}/eta_t, fed k_t v_tᵀ/eta_t and read by q_t: nothing divides after it."""
    return _normalised(True, "elements that differ from normalised attention's")


def normalised_without() -> Evidence:
    """Without the factor eta_{t-1}/eta_t."""
    return _normalised(False, "elements that differ, the state not scaled")


def _gate(a: Any, sign: int, what: str) -> Evidence:
    with precise():
        x = balls([Q(i, 10) for i in (-300, -30, -1, 0, 5, 40, 400)])
        left = np.array([(-flint.arb(a) * (1 + t.exp()).log()).exp() for t in x])
        right = np.array([(1 / (1 + (sign * t).exp())) ** flint.arb(a) for t in x])
        return Evidence(disjoint(left, right), 0, what)


def selective(a: float = 1.7) -> Evidence:
    """exp(-a·softplus(x)) = sigmoid(-x)^a in balls of 256 bits: S6's decay is a gate of an RNN."""
    needs(a > 0, "a > 0")
    return _gate(a, 1, "places where the two surely differ")


def selective_other() -> Evidence:
    """sigmoid(x)^a, the other sign."""
    return _gate(1.7, -1, "places where the other sign surely differs")


def softmax(q: Array, k: Array, v: Array, causal: bool = False) -> Array:
    """Return softmax attention of rationals, scale 1, in balls."""
    p = exp(balls(q @ k.T))
    p = np.tril(p) if causal else p
    return np.asarray((p @ balls(v)) / p.sum(1, keepdims=True))


def power_sums(q: Array, k: Array, v: Array, degree: int, causal: bool) -> tuple[Array, int]:
    """Return attention with Taylor's polynomial of exp by sums over keys of monomials, and the numbers held.

    Parameters
    ----------
    q, k, v : (n, d) arrays of rationals
        One head, scale 1.
    degree : int
        Of the polynomial.
    causal : bool
        Whether row t reads what came up to t, or all.
    """
    exponents, _, _ = monomials(q.shape[1], degree)
    of_q, of_k = (np.array([[math.prod(row**e, start=Q(1)) for e in exponents.tolist()] for row in x]) for x in (q, k))
    of_q = of_q * np.array([Q(1, math.prod(math.factorial(e) for e in es)) for es in exponents.tolist()])
    with_one = np.concatenate([v, np.full((len(v), 1), Q(1))], 1)
    state, most, rows = zeros(of_k.shape[1], with_one.shape[1]), 0, []
    for t in range(len(k)):
        state = state + np.multiply.outer(of_k[t], with_one[t])
        most = max(most, held(state))
        rows.append(of_q[t] @ state if causal else None)
    found = np.array(rows) if causal else of_q @ state
    return found[:, :-1] / found[:, -1:], most


def _remainder(r: Any, degree: int) -> Any:
    """Return what Taylor's polynomial is off on [-R, R] over the exponential: R^(g+1)/(g+1)!·exp(R) at most.

    At s it is off by |s|^(g+1)/(g+1)! times exp of something between 0 and s, which is at most exp(s)·exp(R).
    """
    return flint.arb(r ** (degree + 1) / math.factorial(degree + 1)) * flint.arb(r).exp()


def _moved(e: Any, apart: Any) -> Any:
    """Return how far p' = p(1 + t), |t| <= e, moves a mean o: by sum p·t·(v - o) over 1 - e, half of the range times e.

    Half of the range is the most that numbers are away from their mean in the mean: where they lie at both ends alike.
    """
    return e / (1 - e) * apart / 2


def _taylor(s: Any, degree: int) -> Any:
    return sum(s**m / math.factorial(m) for m in range(degree + 1))


def _held(degrees: tuple[int, ...]) -> list[Any]:
    """Return the parts of `taylor_bound`, held from both sides: at -R what is left out has terms of both signs."""
    found: list[Any] = [same(_moved(Q(1, 5), Q(2)), Q(1, 4))]
    for r, g in itertools.product((Q(1, 8), Q(1, 2)), degrees):
        above, below = (abs(1 - _taylor(s, g) / flint.arb(s).exp()) for s in (r, -r))
        found += [(above, _remainder(r, g)), (below, _remainder(r, g))]
        # so many of them that the rest is below what is known of a ball
        found.append(same(meet(below, sum((-1) ** i * _remainder(r, g + i) for i in range(64))), True))
    return found


def taylor_bound(q: Array, k: Array, v: Array, degree: int, causal: bool = False) -> Array:
    """Return for each element the error that Taylor's remainder leaves.

    Parameters
    ----------
    q, k, v : (n, d) arrays of rationals
        One head, scale 1.
    degree : int
        Of the polynomial.
    causal : bool
        Whether row t reads what came up to t, or all.

    Returns
    -------
    (n, d) array of balls
        With scores up to R in a row, its weights are off by a share of `_remainder`, and its mean by `_moved`.
    """
    bounds = []
    for t, row in enumerate(q @ k.T):
        seen = slice(t + 1 if causal else None)
        e = _remainder(abs(row[seen]).max(), degree)
        needs(e < 1, "logits small enough that the remainder is below 1")
        bounds.append([_moved(e, x.max() - x.min()) for x in v[seen].T])
    return np.array(bounds)


def _errors(degrees: tuple[int, ...], large: int = 1) -> tuple[list[Array], list[Array], list[int]]:
    """Return errors, their bounds and the numbers held for each degree."""
    q, k, v = _call()
    q, k = q * large / 2, k / 2
    exact, errors, bounds, states = softmax(q, k, v, causal=True), [], [], []
    for g in degrees:
        found, state = power_sums(q, k, v, g, causal=True)
        errors.append(abs(balls(found) - exact))
        bounds.append(taylor_bound(q, k, v, g, causal=True))
        states.append(state)
    return errors, bounds, states


def _over(errors: Array, bounds: Array) -> list[Any]:
    """Return errors beside bounds, and whether an element's row sees one value only where its bound is 0."""
    n, v = len(bounds), _call()[2]
    alike = np.array([[len(set(x[: t + 1])) == 1 for x in v.T] for t in range(n)])
    unlike = [*zip(errors[~alike], bounds[~alike], strict=True)]
    none = zeros(int(alike.sum()))
    return [*unlike, same(disjoint(errors[alike], none), 0), same(disjoint(bounds[alike], none), 0)]


def _opposite(degrees: tuple[int, ...]) -> list[Any]:
    """Return ratios of a row whose two keys have scores -R and R and weights off to both sides, as for even degrees.

    They are off by at least e·(1 - R/(g + 2)) and e·exp(-2R) of themselves, their product is 1/(2·cosh R)², and the
    bound is e/2, all but for terms of e²: so the error is above exp(-2R) of the bound, and all of it as R falls to 0.
    """
    found: list[Any] = []
    for r, g in itertools.product((Q(1, 64), Q(1, 4)), degrees):
        call = np.array([[Q(1)]]), np.array([[-r], [r]]), np.array([[Q(0)], [Q(1)]])
        error = abs(balls(power_sums(*call, g, causal=False)[0]) - softmax(*call))[0, 0]
        bound, shrunk = taylor_bound(*call, g)[0, 0], flint.arb(-r).exp()
        found += [(error, bound), (bound * shrunk**2, error)]
    return found


@precise()
def growing(degrees: tuple[int, ...] = (4, 6, 8, 10), large: int = 1) -> Evidence:
    """Causal softmax as a recurrence that holds C(d + g, g)(d_v + 1) numbers: within its bound, smaller for each g.

    The bound is that of the worst row: scores of both ends alike, whose weights are off to both sides. There it is
    attained, as `_opposite` has it; rows of the call drawn come to a fifth of it, for most of their scores are smaller.
    """
    errors, bounds, states = _errors(degrees, large)
    largest, needed = [worst(e.ravel()) for e in errors], [math.comb(3 + g, g) * 4 for g in degrees]
    pairs = [*_held(degrees), *_opposite(degrees), *((b, a) for a, b in itertools.pairwise(largest))]
    pairs += [same(a, b) for a, b in zip(states, needed, strict=True)]
    each = [_over(e, b) for e, b in zip(errors, bounds, strict=True)]
    ratios = [float(worst(x for x in of if isinstance(x, tuple))) for of in each]
    detail = {"numbers held": states, "errors": [float(e) for e in largest], "over bounds": ratios}
    pairs += itertools.chain(*each)
    return judged(pairs, "error over its bound and over that of the smaller state", detail)


@precise()
def fixed_state() -> Evidence:
    """A state of degree 4 held to the bound of degree 10."""
    errors, bounds, _ = _errors((4, 10))
    return judged(_over(errors[0], bounds[1]), "error of degree 4 over the bound of degree 10")


SOURCE = "Sieber et al., Understanding the differences in foundation models (arXiv 2405.15731; an overview was read)"
CLAIMS = [
    Claim(
        "systems-recurrence",
        "Linear attention with decays is a recurrence and a masked matrix: the same",
        SOURCE,
        recurrence,
        recurrence_off_by_one,
    ),
    Claim(
        "systems-normalised",
        "Normalised attention is a system whose state is scaled down as its normaliser grows",
        SOURCE,
        normalised,
        normalised_without,
    ),
    Claim(
        "systems-selective",
        "S6's decay exp(-a softplus(x)) is the gate sigmoid(-x)^a",
        SOURCE,
        selective,
        selective_other,
        ("a > 0",),
    ),
    Claim(
        "systems-growing-state",
        "Softmax attention is the limit of recurrences whose state grows: each state within its bound",
        SOURCE,
        growing,
        fixed_state,
        ("logits small enough that the remainder is below 1",),
    ),
]
