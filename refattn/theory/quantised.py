"""Quantised attention: what rounding queries, keys, values and weights to eight bits costs, by the scales' grain."""

from __future__ import annotations

import math
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from ..dtypes import format_of
from .claim import Claim, Evidence, judged, needs, same
from .fields import Q, balls, each, exp, meet, precise, rational, rationals

__all__ = ["CLAIMS", "FORMATS", "GRAINS", "attended", "error_bound", "largest", "rounded_to"]

Array = NDArray[Any]
Float = NDArray[np.float64]
SOME = np.array([4.0, 0.25])
"""Scales."""
FORMATS = ("int8", "float8_e4m3fn", "float8_e5m2")
# the rows that share a scale: of (heads, tokens), how many heads and tokens
GRAINS = {"tensor": (2, 8), "head": (1, 8), "block": (1, 4), "token": (1, 1)}
"""Grains of scales, from the coarsest to the finest: heads and tokens that share one."""


def largest(name: str) -> float:
    """Return the largest number of a format."""
    return float(np.iinfo(np.int8).max) if name == "int8" else format_of(name).largest


def _scales(x: Float, name: str, grain: str) -> Float:
    """Return each element's scale: a power of two at which the largest element of its group fits the format."""
    heads, tokens = GRAINS[grain]
    h, n, d = x.shape
    groups = np.abs(x).reshape(h // heads, heads, n // tokens, tokens, d).max((1, 3, 4), keepdims=True)
    scales = 2.0 ** np.ceil(np.log2(groups / largest(name)))
    return np.asarray(np.broadcast_to(scales, (h // heads, heads, n // tokens, tokens, d)).reshape(x.shape))


def rounded_to(x: Float, name: str, scales: Float) -> Float:
    """Return numbers rounded to a format at some scales."""
    y = x / scales
    return np.asarray((np.rint(y).astype(np.int8) if name == "int8" else format_of(name).round_array(y)) * scales)


def _steps(x: Float, name: str, scales: Float) -> Float:
    """Return how far rounding moves an element at most: half a step of int8, a share of a float, or half its least."""
    if name == "int8":
        return np.asarray(scales / 2)
    form = format_of(name)
    return np.maximum(form.unit_roundoff * np.abs(x), scales * form.smallest_subnormal / 2)


def _call(outlier: float = 16.0) -> tuple[Float, Float, Float]:
    """Return queries, keys and values of two heads; a token of the second head has much larger keys and values."""
    q, k, v = np.rint(np.random.default_rng(0).standard_normal((3, 2, 8, 4)) * 2**20) / 2**20
    k[1, 5] *= outlier
    v[1, 5] *= outlier
    return q / 4, k, v


def attended(q: Any, k: Any, v: Any) -> Array:
    """Return softmax attention of one head in balls."""
    p = exp(balls(rational(q) @ rational(k).T))
    return np.asarray((p @ balls(rational(v))) / p.sum(1, keepdims=True))


def error_bound(q: Float, k: Float, v: Float, steps: tuple[Float, Float, Float]) -> Array:
    """Return a bound on the error of each row of softmax attention, scale 1, from how far q, k and v are moved.

    Scores move by at most m = sum abs(q) dk + dq abs(k) + dq dk, weights by tanh(2m/4) in total variation, the output
    by that times the values' range, and by the values' largest move.

    Parameters
    ----------
    q, k, v : (n, d) arrays
        One head.
    steps : three arrays
        The largest move of each element.
    """
    (q_, k_, v_), (dq, dk, dv) = ([rational(x) for x in group] for group in ((q, k, v), steps))
    moved = (abs(q_) @ dk.T + dq @ abs(k_).T + dq @ dk.T).max(1)
    apart = (v_.max(0) - v_.min(0)).max()
    return each(lambda m: (2 * flint.arb(m) / 4).tanh() * apart + dv.max(), moved)


def _attained() -> list[int]:
    """Return whether moves of keys, of queries, of both and of values attain the bound, as those do that lose the most.

    The second coordinate sets scores -m/2 and m/2, or the moves lead there: weights are then exchanged.
    """
    o = 0.0
    key = [[o, 1.0]], [[o, -0.25], [o, 0.25]], [[o, o]], [[o, 0.5], [o, 0.5]]
    query = [[-0.25, o]], [[1.0, o], [-1.0, o]], [[0.5, o]], [[o, o], [o, o]]
    both = [[o, 1.0]], [[o, -0.125], [o, 0.125]], [[0.5, o]], [[0.5, o], [0.5, o]]
    moved = (
        ([[o, 1.0]], [[o, 0.25], [o, -0.25]]),
        ([[0.25, o]], query[1]),
        ([[0.5, 1.0]], [[0.5, -0.125], [-0.5, 0.125]]),
    )
    v, still = np.array([[1.0], [-1.0]]), np.zeros((2, 1))
    found = []
    for given, after in zip((key, query, both), moved, strict=True):
        (q, k, dq, dk), (q_after, k_after) = map(np.array, given), map(np.array, after)
        off = abs(attended(q_after, k_after, v) - attended(q, k, v)).max()
        found.append(same(meet(off, error_bound(q, k, v, (dq, dk, still))[0]), True))
    one, two = np.array(both[0]), np.array(both[1])
    off = (attended(one, two, v + 0.5) - attended(one, two, v)).max()
    bound = error_bound(one, two, v, (0 * one, 0 * two, still + 0.5))[0]
    return [*found, same(meet(off, bound), True)]


def _halfway(name: str) -> list[int]:
    """Return whether halves of the format's least number, which round to 0, move by just their steps."""
    x = SOME * (1.0 if name == "int8" else format_of(name).smallest_subnormal) / 2
    moved = np.abs(rounded_to(x, name, SOME) - x)
    return [same(m, s) for m, s in zip(moved, _steps(x, name, SOME), strict=True)]


def _pairs(name: str, grain: str, held_to: str) -> list[tuple[Any, Any]]:
    """Return errors of rows with scales of one grain beside bounds from those of another."""
    given = _call()
    rounded = [rounded_to(x, name, _scales(x, name, grain)) for x in given]
    steps = [_steps(x, name, _scales(x, name, held_to)) for x in given]
    pairs: list[tuple[Any, Any]] = []
    for h in range(2):
        off = abs(attended(*(x[h] for x in rounded)) - attended(*(x[h] for x in given)))
        (q, k, v), (dq, dk, dv) = ([x[h] for x in group] for group in (given, steps))
        bound = error_bound(q, k, v, (dq, dk, dv))
        pairs += [(one, most) for row, most in zip(off, bound, strict=True) for one in row]
    return pairs


@precise()
def inputs(formats: tuple[str, ...] = FORMATS) -> Evidence:
    """Errors of every row for every format and grain against the bound, and steps that shrink with the grain."""
    needs(set(formats) <= set(FORMATS), f"formats out of {', '.join(FORMATS)}")
    bounds = {}
    pairs: list[Any] = []
    for name in formats:
        pairs += _halfway(name)
        for grain in GRAINS:
            found = _pairs(name, grain, grain)
            pairs += found
            bounds[f"{name}, {grain}"] = float(max(b for _, b in found))
            steps = [_steps(x, name, _scales(x, name, grain)) for x in _call()]
            moved = [np.abs(rounded_to(x, name, _scales(x, name, grain)) - x) for x in _call()]
            # no element moves by more than its step
            pairs += [
                (float(m), float(s))
                for ms in zip(moved, steps, strict=True)
                for m, s in zip(*map(np.ravel, ms), strict=True)
            ]
    return judged([*pairs, *_attained()], "error over its bound, which some attain, and moves over steps", bounds)


@precise()
def outlier() -> Evidence:
    """One scale for the tensor, held to what a scale a token allows: a token of large values spoils the others."""
    return judged(_pairs("int8", "tensor", "token"), "error with one scale over the bound of a scale a token")


LOST = (9, 6, Q(3), Q(8))
"""Eight of nine weights move by a twelfth each, values are 3 apart, and weights of 8 are kept: a quarter."""


def _levels(p: Array, levels: int) -> Array:
    """Return weights rounded to multiples of 1/levels, ties up."""
    return each(lambda a: Q(math.floor(a * levels + Q(1, 2)), levels), p)


def _rows(levels: int) -> list[tuple[Array, Array]]:
    """Return weights up to 1 with their values; in the last row all but one are lost, just below half a level."""
    drawn = [rationals(s, 9, over=999, least=1, most=999) for s in range(4)]
    lost = np.array([Q(1), *[Q(999, 1000) / (2 * levels)] * 8])
    return [(p / p.max(), rationals(s + 9, 9)) for s, p in enumerate(drawn)] + [(lost, 1 * (lost < 1) * Q(1))]


def _lost(count: int, levels: int, apart: Any, kept: Any) -> Any:
    """Return how far weights move a mean that move by half a level each, all but the largest of them."""
    return Q(count - 1, 2 * levels) * apart / kept


def _weighed(levels: int, held_to: int, what: str) -> Evidence:
    """Compare errors of outputs by rounded weights with (n - 1)/(2·levels) of the values' range over their sum."""
    pairs: list[Any] = []
    for p, v in _rows(levels):
        rounded = _levels(p, levels)
        off = abs((p @ v) / p.sum() - (rounded @ v) / rounded.sum())
        pairs.append((off, _lost(len(p), held_to, v.max() - v.min(), rounded.sum())))
    pairs.append(same(_lost(*LOST), Q(1, 4)))
    return judged(pairs, what, {"errors over their bounds": [float(a / b) for a, b in pairs[:-1]]})


def weights(levels: int = 255) -> Evidence:
    """P over its largest rounded to multiples of 1/255, in rationals; the last row all but attains the bound."""
    needs(levels >= 1, "at least one level")
    return _weighed(levels, levels, "error over (n - 1)/(2·levels) of the values' range over the weights' sum")


def weights_coarse() -> Evidence:
    """15 levels held to the bound of 255."""
    return _weighed(15, 255, "error of 15 levels over the bound of 255")


CLAIMS = [
    Claim(
        "quantised-inputs",
        "Rounding q, k and v moves a row by at most tanh(half the scores' largest move)·range and the values'"
        " largest move",
        "derived here, for int8, float8_e4m3fn and float8_e5m2 with scales of a tensor, a head, a block or a token",
        inputs,
        outlier,
        ("formats out of int8, float8_e4m3fn, float8_e5m2",),
    ),
    Claim(
        "quantised-weights",
        "Rounding P over its largest to L levels moves a row by at most (n - 1)/(2L) of the values' range over the"
        " weights' sum",
        "derived here",
        weights,
        weights_coarse,
        ("at least one level",),
    ),
]
