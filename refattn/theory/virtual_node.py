"""A message-passing net with a virtual node computes attention: by sums of features, by all moments, or in n rounds."""

from __future__ import annotations

import itertools
import math
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from .claim import Claim, Evidence, judged, needs, same, total
from .counting import held
from .fields import Q, balls, disjoint, each, exp, meet, precise, rational, rationals, solve, unequal
from .systems import softmax

__all__ = ["CLAIMS"]

Array = NDArray[Any]


def _features(x: Array) -> Array:
    """Return positive features, a feature map of linear attention: squares of x less each of some points."""
    points = rationals(7, 5, x.shape[1])
    return np.asarray(((x[:, None] - points) ** 2).sum(2))


def _round(messages: Array) -> tuple[Array, int]:
    """Return the virtual node's sum of all nodes' messages, and the most numbers that it held."""
    state, most = messages[0], held(messages[0])
    for message in messages[1:]:  # it knows no order and no count
        state = state + message
        most = max(most, held(state))
    return state, most


def _by_sums(q: Array, k: Array, v: Array) -> tuple[Array, int]:
    """Return what nodes read: one sum over all nodes of (features of k times v, features of k), then own work."""
    of_k = _features(k)
    ones = np.concatenate([v, 0 * v[:, :1] + 1], 1)
    state, most = _round(of_k[:, :, None] * ones[:, None])
    found = _features(q) @ state
    return found[:, :-1] / found[:, -1:], most


def _linear(exact: Any, what: str) -> Evidence:
    wrong, states = [], []
    for n in (4, 9, 20):
        q, k, v = rationals(n, 3, n, 3)
        found, state = _by_sums(q, k, v)
        wrong.append(exact(found, q, k, v))
        states.append(state)
    wrong += [same(s, 5 * (3 + 1)) for s in states]  # features times values and one
    return Evidence(total(*wrong), 0, what, {"state for n = 4, 9, 20": states})


def linear() -> Evidence:
    """Kernel attention: one sum and one broadcast, a state of m·(d + 1) numbers whatever n is."""

    def exact(found: Array, q: Array, k: Array, v: Array) -> int:
        a = _features(q) @ _features(k).T
        return unequal(found, (a @ v) / a.sum(1, keepdims=True))

    return _linear(exact, "elements that differ from kernel attention's, and numbers of state beyond m·(d + 1)")


@precise()
def linear_is_not_softmax() -> Evidence:
    """The same node as softmax attention: five features are not exp."""
    return _linear(
        lambda found, q, k, v: disjoint(balls(found), softmax(q, k, v)), "elements that differ from softmax's"
    )


def _exponents(d: int, degree: int) -> list[tuple[int, ...]]:
    """Return all exponents of d numbers of total degree up to some."""
    return [e for e in itertools.product(range(degree + 1), repeat=d) if sum(e) <= degree]


def _moments(x: Array, degree: int) -> tuple[dict[tuple[int, ...], Any], int]:
    """Return what the virtual node holds after one round of monomials as messages: their sums, by exponents."""
    exponents = _exponents(x.shape[1], degree)
    state, most = _round(np.array([[math.prod(row ** np.array(e), start=Q(1)) for e in exponents] for row in x]))
    return dict(zip(exponents, state, strict=True)), most


def _recovered(moments: dict[tuple[int, ...], Any], n: int, along: tuple[int, int]) -> Array:
    """Return the n points in the plane with these moments, from their projections on a direction that keeps them apart.

    Power sums of the projections give their polynomial by Newton's identities, its roots the projections; the other
    coordinates solve the linear system of mixed moments.
    """
    a, b = along
    sums = [sum(math.comb(m, i) * a**i * b ** (m - i) * moments[i, m - i] for i in range(m + 1)) for m in range(n + 1)]
    e = [Q(1)]
    for m in range(1, n + 1):
        e.append(sum((-1) ** (i - 1) * e[m - i] * sums[i] for i in range(1, m + 1)) / m)
    polynomial = flint.fmpq_poly([(-1) ** (n - m) * e[n - m] for m in range(n + 1)])
    roots = [-f[0] / f[1] for f, times in polynomial.factor()[1] for _ in range(times) if f.degree() == 1]
    needs(len(set(roots)) == n, f"{n} nodes that a direction keeps apart, by rational moments; got {len(set(roots))}")
    first = [sum(math.comb(m, i) * a**i * b ** (m - i) * moments[i + 1, m - i] for i in range(m + 1)) for m in range(n)]
    x = solve(np.array([[r**m for r in roots] for m in range(n)]), np.array(first))
    return np.stack([x, (np.array(roots) - a * x) / b], 1)


@precise()
def wide(sizes: tuple[int, ...] = (2, 3, 4, 6), alike: bool = False) -> Evidence:
    """The nodes' set recovered from C(n + d, d) sums, d = 2, and softmax attention of it: exact for every n."""
    wrong, widths = [], []
    for n in sizes:
        x = rationals(n, n, 2, over=100, least=-100, most=100)
        x = np.tile(x[:1], (n, 1)) if alike else x
        moments, width = _moments(x, n)
        read = _recovered(moments, n, (3, 7))
        wrong += [disjoint(softmax(x, read, read), softmax(x, x, x)), same(width, math.comb(n + 2, 2))]
        widths.append(width)
    what = "elements that surely differ from softmax attention's, and numbers beyond C(n + d, d)"
    return Evidence(total(*wrong), 0, what, {"n": list(sizes), "width": widths})


@precise()
def narrow() -> Evidence:
    """Moments up to n - 1 of two sets that agree in all of them (0, 4, 5 and 1, 2, 6): attention differs."""
    sets = [rational(np.array([[i, 0] for i in s])) / 8 for s in ((0, 4, 5), (1, 2, 6))]
    held_alike = _moments(sets[0], 2) == _moments(sets[1], 2)
    q = rational(np.array([[1, 0]]))
    return Evidence(
        disjoint(*(softmax(q, x, x[:, :1]) for x in sets)) * held_alike,
        0,
        "outputs that differ though moments up to n - 1 agree",
    )


def _read(x: Array, selector: Array, beta: int) -> Array:
    """Return what the virtual node reads: the softmax of a selector's scores over the nodes."""
    p = exp(balls(x @ selector) * beta)
    return np.asarray((p @ balls(x)) / p.sum())


def _deep(x: Array, selectors: Array, beta: int) -> tuple[Array, int, int]:
    """Return attention by rounds, what a node holds, and the rounds: in each the virtual node reads one node."""
    total, weight, rounds, state = balls(0 * x), balls(0 * x[:, 0]), 0, 0
    for s in selectors:
        read = _read(x, s, beta)
        w = exp(balls(x) @ read)
        total, weight, rounds = total + w[:, None] * read, weight + w, rounds + 1
        state = max(state, held((total[0], weight[0], read)))
    return total / weight[:, None], state, rounds


def _norm(x: Any) -> Any:
    return (x * x).sum(-1).sqrt() if np.ndim(x) == 1 else each(lambda a: a.sqrt(), (x * x).sum(-1))


def _nodes(separated: bool, n: int = 10) -> Array:
    """Return nodes on the unit circle, rational; the first one at the mean of the others where none selects it."""
    t = rationals(1, 3 * n, over=5)
    t = np.array(list(dict.fromkeys(t.tolist())))[:n]
    x = np.stack([(1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)], 1)
    if not separated:
        x[0] = x[1:].sum(0) / (n - 1)
    return np.asarray(x)


def _separation(x: Array, selectors: Array) -> Any:
    """Return by how much selectors score their node above all others, at least."""
    scores = x @ selectors.T
    return min(scores[i, i] - scores[j, i] for i in range(len(x)) for j in range(len(x)) if i != j)


def _reads_off(x: Array, beta: int) -> Array:
    """Return how far each node's read is off at most: others have shares of exp(-beta·gap) at most, at their distance.

    The gap is how much higher the node's selector, itself, scores it than the other.
    """
    scores = x @ x.T
    gaps = np.diag(scores)[:, None] - scores
    return np.asarray((exp(-beta * balls(gaps)) * _norm(balls(x[:, None] - x))).sum(1))


def _rows_off(x: Array, off: Array) -> Array:
    """Return how far each row of attention among unit nodes is off at most that reads them as far off.

    A logit is off by as much as its node, so that a weight p becomes one between p·exp(-off) and p·exp(off) over the
    sums of all such. The row is off by these weights' mean of `off`, and by how much they move times how far the nodes
    are from the row.
    """
    p = exp(balls(x @ x.T))
    p = p / p.sum(1, keepdims=True)
    more, less = p * exp(off), p * exp(-off)
    low, high = less.sum(1, keepdims=True), more.sum(1, keepdims=True)
    moved = each(max, more / low - p, p - less / high)
    return np.asarray((more / low * off).sum(1) + (moved * _norm((p @ balls(x))[:, None] - balls(x))).sum(1))


def _otherwise() -> list[int]:
    """Return whether both bounds are what they are in another form, of two opposite nodes."""
    x = rational(np.array([[1, 0], [-1, 0]]))
    beta, grown = 3, flint.arb(4)
    share = (-beta * flint.arb(_separation(x, x))).exp()
    off = _norm(_read(x, x[0], beta) - balls(x[0])) * (1 + share)  # the other's share is this over 1 + this
    found = [same(meet(off, _reads_off(x, beta)[0]), True)]
    # both are read as far off: weights grow up to the square of exp(off) of what they are, and the mean is tanh(1)
    row = grown**2 * grown.log() + (grown**2 - 1) * (1 - flint.arb(1).tanh() ** 2)
    found.append(same(meet(_rows_off(x, balls(np.ones(2)) * grown.log())[0], row), True))
    # only the other is: its weight grows by grown over the least sum, the node's own shrinks by the largest
    t = flint.arb(1).tanh()
    own, other = (1 + t) / 2, (1 - t) / 2
    more, less = grown * other / (own + other / grown), own / (own + grown * other)
    row = more * grown.log() + (own - less) * (1 - t) + (more - other) * (1 + t)
    return [*found, same(meet(_rows_off(x, balls(np.array([0, 1])) * grown.log())[0], row), True)]


def _deep_pairs(x: Array, judged_by: Array, betas: tuple[int, ...]) -> list[list[Any]]:
    """Return for each beta errors of rows beside their bounds, and whether a node holds 2d + 1 numbers in n rounds.

    Reads are off by what the gaps of `judged_by` allow, the nodes themselves or others.
    """
    exact, found = softmax(x, x, x), []
    for beta in betas:
        out, state, rounds = _deep(x, x, beta)
        bounds = _rows_off(x, _reads_off(judged_by, beta))
        pairs: list[Any] = list(zip(_norm(out - exact), bounds, strict=True))
        found.append([*pairs, same(state, 2 * x.shape[1] + 1), same(rounds, len(x))])
    return found


BETAS = (50, 100, 200, 400, 800)


@precise(1024)
def deep(betas: tuple[int, ...] = BETAS, separated: bool = True) -> Evidence:
    """n rounds of nodes that hold 2d + 1 numbers, with selectors that pick one node each: errors for beta 50 to 800."""
    x = _nodes(separated)
    delta = _separation(x, x)
    needs(delta > 0, f"every node has a selector that scores it above all others, got a gap of {float(delta):.2g}")
    found = _deep_pairs(x, x, betas)
    opposite = rational(np.array([[1, 0], [-1, 0]]))  # where reads are off by nearly all that the bound allows
    near = _deep_pairs(opposite, opposite, (1, 2, 4))
    curves = [[max(float(pair[i]) for pair in one[:-2]) for one in found] for i in range(2)]
    detail = {"beta": list(betas), "error": curves[0], "bound": curves[1]}
    every = [one for ones in (*found, *near) for one in ones]
    return judged([*every, *_otherwise()], "error of a row over its bound", detail)


@precise(1024)
def unselectable() -> Evidence:
    """A node at the mean of the others, which no selector scores above all: the errors do not fall with beta."""
    found = _deep_pairs(_nodes(False), _nodes(True), BETAS[:2])
    what = "error of a row over the bound of separable nodes, one node at the mean of the others"
    return judged([one for ones in found for one in ones], what)


SOURCE = "Cai et al., MPNN and Graph Transformer (arXiv 2301.11956; a summary was read, constructions are ours)"
CLAIMS = [
    Claim(
        "virtual-node-linear",
        "One round with a virtual node computes linear attention exactly, its state independent of n",
        SOURCE,
        linear,
        linear_is_not_softmax,
    ),
    Claim(
        "virtual-node-wide",
        "One round of width C(n + d, d), of order n^d, computes softmax attention exactly; moments up to n - 1 do not",
        SOURCE,
        wide,
        narrow,
        ("nodes that a direction keeps apart",),
    ),
    Claim(
        "virtual-node-deep",
        "n rounds of constant width compute softmax attention on separable features",
        SOURCE,
        deep,
        unselectable,
        ("features are separable",),
    ),
]
