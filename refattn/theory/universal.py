"""One attention layer and a shared ReLU network approximate any continuous map of sequences, if positions are told."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from .claim import Claim, Evidence, judged, needs, same
from .fields import Q, meet, precise

__all__ = ["CLAIMS"]

Array = NDArray[Any]
Float = NDArray[np.float64]
N = 3
BETA, BLUNT = 30.0, 5.0
"""How much heads prefer the token of their position, nearly all or not."""
KNOTS = (1, 3, 7, 15, 31, 63)
"""Chords: odd numbers, so that the kink of |a·x| is in the middle of one, where it is as far off as may be."""


@dataclass(frozen=True)
class Ridge:
    """A continuous function of a·x, how far a chord between knots is from it at most, and its steepest slope."""

    g: Callable[[Any], Any]
    between: Callable[[float], float]
    slope: Callable[[float], float]


# of |g''| at most m a chord is off by m·step²/8; of slope at most 1 by step/2
RIDGES = {
    "square": Ridge(lambda t: t * t, lambda step: 2 * step**2 / 8, lambda size: 2 * size),
    "size": Ridge(np.abs, lambda step: step / 2, lambda size: 1.0),
    "sine": Ridge(lambda t: np.sin(3 * t), lambda step: 9 * step**2 / 8, lambda size: 3.0),
}
# output i = sum of c · g(a·x): for every function a different map for every place
TERMS = [
    [(0.5, (1.0, -0.5, 0.3)), (-0.4, (0.2, 0.8, 0.1))],
    [(0.7, (0.3, 0.3, -0.9))],
    [(-0.6, (1.0, 0.0, 0.5)), (0.3, (0.0, 1.0, 1.0))],
]


def _target(x: Float, ridge: Ridge) -> Float:
    return np.stack([sum(c * ridge.g(x @ np.array(a)) for c, a in terms) for terms in TERMS], 1)


def _read(x: Float, beta: Any) -> Array:
    """Return what N heads read in every place, keys being one-hot positions: all tokens; (batch, token)."""
    p = np.exp(np.eye(N) * beta)
    p /= p.sum(1, keepdims=True)
    return np.asarray(x @ p.T)


@dataclass(frozen=True)
class Network:
    """Weights of one hidden layer that every place shares: inputs are what heads read, then the place, one-hot."""

    first: Float
    bias: Float
    second: Float

    def __call__(self, read: Float, place: int, positions: bool) -> Float:
        told = np.eye(N)[place] if positions else np.full(N, 1 / N)
        hidden = np.maximum(np.concatenate([read, np.tile(told, (len(read), 1))], 1) @ self.first + self.bias, 0)
        return np.asarray(hidden @ self.second)


def _reach(a: tuple[float, ...]) -> float:
    """Return how far from 0 the argument of a term gets on [-1, 1]^N."""
    return sum(map(abs, a))


def _knots(a: tuple[float, ...], knots: int) -> Float:
    """Return the ends of a term's chords."""
    return np.linspace(-_reach(a), _reach(a), knots + 1)


def _built(knots: int, ridge: Ridge) -> Network:
    """Return the network: units relu(a·x - t - R(1 - place_i)), off in all places but one, and a constant a term."""
    first, bias, second = [], [], []
    for place, terms in enumerate(TERMS):
        for c, a in terms:
            at = _knots(a, knots)
            slopes = np.diff(ridge.g(at)) / np.diff(at)
            gate = 2 * _reach(a) * np.eye(N)[place]
            for knot, change in zip(at[:-1], np.diff(slopes, prepend=0), strict=True):
                first.append([*a, *gate])
                bias.append(-knot - 2 * _reach(a))
                second.append(c * change)
            first.append([0.0] * N + list(np.eye(N)[place]))
            bias.append(0.0)
            second.append(c * ridge.g(at[0]))
    return Network(np.array(first).T, np.array(bias), np.array(second))


def _elsewhere(beta: Any) -> Any:
    """Return how far a token in [-1, 1] is off that is read with others' shares."""
    return 2 * (N - 1) / (np.exp(beta) + N - 1)


def _bounds(knots: int, beta: float, ridge: Ridge) -> list[float]:
    """Return each place's sup error: of chords, and of tokens that are read with others' shares."""
    off = _elsewhere(beta)
    return [
        float(
            sum(
                abs(c) * (ridge.between(np.diff(_knots(a, knots)).max()) + ridge.slope(_reach(a)) * _reach(a) * off)
                for c, a in terms
            )
        )
        for terms in TERMS
    ]


def _points(knots: int) -> Float:
    """Return points of [-1, 1]^N: a grid, and for every term the way to where it is largest, with its chords' middles.

    There, between the knots, a chord is furthest off.
    """
    grid = np.array(list(itertools.product(np.linspace(-1, 1, 9), repeat=N)))
    ways = [np.linspace(-1, 1, 2 * knots + 1)[:, None] * np.sign(a) for terms in TERMS for _, a in terms]
    return np.concatenate([grid, *ways])


def _read_off() -> int:
    """Return 0 where a token that all others are opposite to is read just `_elsewhere` off, else 2."""
    beta, others = flint.arb(6).log(), np.array([[1.0, *[-1.0] * (N - 1)]])  # shares of eighths
    off = (others - _read(others, beta))[0, 0]
    return same(meet(off, Q(1, 2)) and meet(_elsewhere(beta), Q(1, 2)), True)


def _errors(knots: int, beta: float, ridge: Ridge, positions: bool) -> tuple[list[float], int]:
    """Return each place's sup error over points of [-1, 1]^N, and the network's width."""
    x = _points(knots)
    net, target = _built(knots, ridge), _target(x, ridge)
    found = np.stack([net(_read(x, beta), place, positions) for place in range(N)], 1)
    return np.abs(found - target).max(0).tolist(), len(net.bias)


def universal(knots: tuple[int, ...] = KNOTS, beta: float = BETA, positions: bool = True) -> Evidence:
    """The sup error of a network of measured width against its bound, for three kinds of maps, sharp heads and not."""
    needs(positions, "positions are told: without them a layer commutes with permutations, and most maps do not")
    needs(beta > 0, "heads that prefer the token of their position")
    curves = {}
    pairs: list[Any] = [_read_off()]
    for name, ridge in RIDGES.items():
        found = [_errors(m, beta, ridge, True) for m in knots]
        for (errors, _), m in zip(found, knots, strict=True):
            pairs += zip(errors, _bounds(m, beta, ridge), strict=True)
        pairs += zip(_errors(max(knots), BLUNT, ridge, True)[0], _bounds(max(knots), BLUNT, ridge), strict=True)
        curves[name] = [max(errors) for errors, _ in found]
        curves[f"{name}, bound"] = [max(_bounds(m, beta, ridge)) for m in knots]
        widths = [w for _, w in found]
    terms = sum(map(len, TERMS))
    pairs += [same(w, (m + 1) * terms) for w, m in zip(widths, knots, strict=True)]
    return judged(pairs, "a place's sup error over its bound", {"width": widths, **curves})


def equivariant() -> Evidence:
    """The same network where every place is told the same."""
    ridge = RIDGES["square"]
    pairs = zip(_errors(max(KNOTS), BETA, ridge, False)[0], _bounds(max(KNOTS), BETA, ridge), strict=True)
    return judged(pairs, "a place's sup error without positions, over its bound")


def _average(chosen: Sequence[Any]) -> Any:
    """Return the Boltzmann average of balls."""
    return sum(t * t.exp() for t in chosen) / sum(t.exp() for t in chosen)


def _claimed(n: int, r: Any) -> Any:
    """Return the claimed gap of averages of n values up to r in size."""
    return flint.arb(n).log() ** 2 * (-2 * flint.arb(r)).exp()


def _averages(delta: float, n: int) -> tuple[Any, Any]:
    """Return the least gap of Boltzmann averages of n of 7 values that are delta apart, and the claimed one."""
    values = [flint.arb(delta) * i for i in range(-3, 4)]
    found = sorted(map(_average, itertools.combinations(values, n)))
    return min(b - a for a, b in itertools.pairwise(found)), _claimed(n, max(map(abs, values)))


STEP = 1 / 16


def _threshold(n: int) -> float:
    """Return how far apart values of sets of n are to be."""
    return 2 * math.log(n) + 3


def _first(n: int) -> float:
    """Return the largest multiple of STEP below the threshold at which the claimed gap is surely not there."""
    steps = range(math.floor(_threshold(n) / STEP), 0, -1)
    return next(i * STEP for i in steps if operator.gt(*_averages(i * STEP, n)[::-1]))


def _otherwise() -> list[int]:
    """Return whether an average of two and the claimed gap are what they are in another form, 0 where they are."""
    a, b, r = flint.arb(-1), flint.arb(2), flint.arb(3)
    half = (b - a) / 2
    two = a + half + half * half.tanh()
    return [
        same(meet(_average([a, b]), two), True),
        same(meet(_claimed(5, r), (flint.arb(5).log() / r.exp()) ** 2), True),
    ]


@precise()
def contextual(beyond: tuple[float, ...] = (STEP, 2.0), sizes: tuple[int, ...] = (2, 3, 4)) -> Evidence:
    """Softmax averages of different sets differ by more than (log n)² exp(-2r), in balls, from the threshold on."""
    pairs: list[Any] = [*_otherwise()]
    for more, n in itertools.product(beyond, sizes):
        needs(more > 0, f"values more than 2·log n + 3 = {_threshold(n):.3g} apart, got {_threshold(n) + more:.3g}")
        gap, claimed = _averages(_threshold(n) + more, n)
        pairs.append((claimed, gap))
    first = [_first(n) for n in sizes]
    needed = [_threshold(n) for n in sizes]
    pairs += [same(4 * at < most, True) for at, most in zip(first, needed, strict=True)]
    detail = {"n": list(sizes), "threshold": needed, "distance at which the claim fails": first}
    return judged(pairs, "claimed gap over the least one found", detail)


@precise()
def crowded() -> Evidence:
    """Values as far apart as they can be for the claim to fail: a fifth of the threshold, which is not sharp."""
    n = 4
    gap, claimed = _averages(_first(n), n)
    return Evidence(claimed / gap, 1, f"claimed gap over the least one found, values {_first(n):.3g} apart")


CLAIMS = [
    Claim(
        "single-layer-universal",
        "One attention layer and a ReLU network, shared by all places, approximate any continuous map of sequences on a"
        " compact set as well as the map's modulus of continuity lets chords",
        "arXiv 2507.10581 (abstract read; corrected here: positions are needed; the construction is ours)",
        universal,
        equivariant,
        ("positions are told", "heads that prefer the token of their position"),
    ),
    Claim(
        "boltzmann-gap",
        "Boltzmann averages of different sets of values are more than (log n)² exp(-2r) apart; the distance that this"
        " needs is not sharp: sets of 2 to 4 values that are a quarter as far apart are, too",
        "Kajitsuka and Sato, arXiv 2307.14023 (its abstract was read, the gap is recalled)",
        contextual,
        crowded,
        ("values more than 2 log n + 3 apart",),
    ),
]
