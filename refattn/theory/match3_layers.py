"""Match3: one triple-wise layer answers, and pairwise layers of few numbers are led astray, as pigeonholes say."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..tensor import attention, collide, match3
from .claim import Claim, Evidence, judged, needs, same, total
from .fields import Q, rationals

__all__ = ["CLAIMS"]

Float = NDArray[np.float64]


def _near_misses(n: int, modulus: int) -> Float:
    """Return equal tokens whose sums of three are all 1 modulo M: the worst that a label 0 can have."""
    token = next(t for t in range(modulus) if 3 * t % modulus == 1)
    return np.full(n, token)


LEAK = Fraction(1, 11)
"""How far an output can be from its label: n² pairs that miss by one, beside the dummy's exp(beta · gap/2) = 10 n²."""


def _distance(x: Any, modulus: int, shrink: float = 1.0) -> tuple[float, float]:
    """Return the largest distance of an output to its label, and how much of it may be float64's."""
    q, *rest = match3.layer(x, modulus)
    found = attention(q / shrink, *rest, scale=1.0)[0, 0, :, 0]
    # a logit is off by a rounding of each feature's product, and weights by as much as logits
    roundings = sum(float(np.spacing(np.abs(feature).max())) for feature in q.T)
    return float(np.abs(found - match3.labels(x, modulus)).max()), roundings


def solved(sizes: tuple[tuple[int, int], ...] = ((16, 128), (64, 1021), (128, 8191))) -> Evidence:
    """The output's distance to the label, at random tokens and at those that all but match, over what leaks."""
    pairs = []
    for n, m in sizes:
        needs(
            n >= 3 and m >= 2 and m % 3 > 0, "at least three tokens and a modulus of at least 2 that 3 does not divide"
        )
        given = [np.random.default_rng(seed).integers(0, m, n) for seed in range(3)]
        far = [_distance(x, m) for x in (*given, _near_misses(n, m))]
        pairs += [(away - roundings, float(LEAK)) for away, roundings in far]
        attained, roundings = far[-1]
        pairs.append((float(LEAK), attained + roundings))
    return judged(pairs, "largest distance of an output to its label, over what leaks, which is attained")


def small_logits() -> Evidence:
    """The same layer with half its logits."""
    away, roundings = _distance(_near_misses(64, 1021), 1021, 2.0)
    return Evidence(away - roundings, LEAK, "distance with half the logits")


def _random(heads: int, width: int, universe: int, seed: int) -> tuple[Float, Float]:
    """Return the scores of all tokens for token 1, (H, M), and their values, (H, M, m), of a layer drawn at random."""
    rng = np.random.default_rng([heads, width, seed])
    tokens = 8 * universe + 7
    e, (q, k) = rng.standard_normal((tokens, 16)) / 4, rng.standard_normal((2, heads, 16, 8))
    v = e @ rng.standard_normal((heads, 16, width))
    return np.einsum("hc,hmc->hm", e[1] @ q, e @ k) / 8, v


def _spread_out(universe: int, width: int) -> tuple[Float, Float]:
    """Return a layer that keeps all sets as far apart as it can: its sums are the binary numbers of the set.

    With two values a token every other element counts for the second; tokens that no input has are far off.
    """
    tokens = 8 * universe + 7
    values = np.full((1, tokens, width), 99.0)
    used = [1, *range(2, 2 + universe), 5 * universe + 1, 5 * universe + 3, *(tokens - 3 - np.arange(universe))]
    values[0, used] = 0
    for t in range(universe):
        values[0, tokens - 3 - t, t % width] = 2.0 ** (t // width - universe // width)
    return np.zeros((1, tokens)), values


def _tokens(universe: int, modulus: int) -> tuple[list[int], int, list[int], int]:
    """Return the tokens of A's elements, A's blank, the tokens of B's elements, and B's blank."""
    of_a, of_b = [2 + t for t in range(universe)], [modulus - 3 - t for t in range(universe)]
    return of_a, 5 * universe + 1, of_b, 5 * universe + 3


def _strays(inputs: Any, universe: int, modulus: int) -> int:
    """Return how many tokens of inputs are neither an element's nor a blank at its place."""
    first, blank, second, other = _tokens(universe, modulus)
    may = [(1,), *((x, blank) for x in first), *((x, other) for x in second)]
    return sum(x not in pair for row in inputs for x, pair in zip(row, may, strict=True))


def _box(sums: Any, universe: int) -> tuple[Any, Any, Any]:
    """Return the least and the largest sums that an input has, and how far sets B alone move them."""
    first, blank, second, other = _tokens(universe, len(sums))
    sides = abs(sums[second] - sums[other]).sum(axis=0)
    # token 1; of A one element and else blanks; of B elements or blanks
    fixed, of_a = sums[1] + (universe - 1) * sums[blank], sums[[*first, blank]]
    least = fixed + of_a.min(axis=0) + np.minimum(sums[second], sums[other]).sum(axis=0)
    most = fixed + of_a.max(axis=0) + np.maximum(sums[second], sums[other]).sum(axis=0)
    return least, most, sides


def _squared(sums: Any, universe: int) -> Any:
    """Return the square of `_pigeonhole` from what each token adds: (tokens, H, m + 1), denominators first."""
    least, most, sides = _box(sums, universe)
    moved = sides > 0
    cells = math.ceil(2 ** (universe / int(moved.sum()))) - 1
    r = ((sides / cells) ** 2).sum()
    least_d = least[:, :1]
    turned = np.maximum(abs(least), abs(most))[:, 1:] / least_d * moved[:, :1]
    return (r * (1 + turned**2) / least_d**2).max()


def _pigeonhole(scores: Float, values: Float, universe: int) -> float:
    """Return a bound on the least difference of outputs of two sets, from how many sets there are.

    The sums of numerators N and denominators D of 2**universe sets lie in a box; with fewer cells than sets two are in
    one cell. Sums that differ by r move a quotient N/D by at most r·sqrt(1 + (N/D)²)/D, by r/D where D is one number.
    """
    weights = np.exp(scores - scores.max(1, keepdims=True))
    sums = np.concatenate([weights[..., None], weights[..., None] * values], 2).transpose(1, 0, 2)
    return math.sqrt(_squared(sums, universe))


def _enumerated(sums: Any, universe: int) -> Any:
    """Return the square of `_pigeonhole` another way: from all inputs one by one, and cells that are counted."""
    first, blank, second, other = _tokens(universe, len(sums))
    sets = list(itertools.product(*((x, other) for x in second)))
    lefts = [[x if t == i else blank for t, x in enumerate(first)] for i in range(universe + 1)]
    found = np.array([[sums[[1, *left, *right]].sum(axis=0) for right in sets] for left in lefts])
    sides = (found.max(axis=1) - found.min(axis=1)).max(axis=0)
    moved = sum(side > 0 for side in sides.ravel())
    cells = max(c for c in range(1, len(sets)) if c**moved < len(sets))  # pigeonholes, fewer than pigeons
    r = sum(side**2 for side in sides.ravel()) / cells**2
    most = 0
    for head, side in enumerate(sides):
        d = found[..., head, 0].min()
        for n in abs(found[..., head, 1:]).max(axis=(0, 1)):
            # the slopes of N/D by N and D are D/D² and -N/D²
            most = max(most, r * (d**2 + n**2) / d**4 if side[0] else r / d**2)
    return most


def _exactly() -> int:
    """Return in how many layers of rational sums the bound's square is not that of all inputs."""
    universe, wrong = 5, 0
    for heads, width in ((1, 1), (2, 1), (1, 2), (2, 2)):
        sums = rationals(width, 8 * universe + 7, heads, 1 + width)
        sums[..., 0] = abs(sums[..., 0])
        wrong += _squared(sums, universe) != _enumerated(sums, universe)
        sums[..., 0] = Q(1)
        wrong += _squared(sums, universe) != _enumerated(sums, universe)
    return wrong


def collision(
    shapes: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (2, 1)), universe: int = 12, layers: int = 3
) -> Evidence:
    """Inputs of opposite labels with outputs within the pigeonhole bound, for layers drawn and for a spread-out one."""
    needs(
        all(h * (m + 1) < universe for h, m in shapes),
        "a layer of H(m + 1) numbers, fewer than the universe's elements",
    )
    drawn = [_random(*shape, universe, seed) for shape in shapes for seed in range(layers)]
    pairs, strays = [], 0
    for scores, values in [*drawn, _spread_out(universe, 2), _spread_out(universe, 1)]:
        found = collide(scores, values, universe=universe)
        needs(found.labels[0] != found.labels[1], "two sets of opposite labels")
        strays += _strays(found.inputs, universe, found.modulus)
        pairs.append((found.difference, _pigeonhole(scores, values, universe)))
    rounding = float(np.spacing(np.abs(found.outputs).max()))  # of the last layer's outputs, which attain the bound
    shares = [a / b for a, b in pairs]
    far, bound = pairs.pop()
    found_ = [*pairs, (far, bound + rounding), (bound, far + rounding), same(total(strays, _exactly()), 0)]
    return judged(found_, "difference of the outputs over the pigeonhole bound", {"shares": shares})


def triple_is_apart() -> Evidence:
    """The same two inputs in a triple-wise layer of one head."""
    scores, values = _random(1, 1, 12, 0)
    found = collide(scores, values, universe=12)
    out = [float(match3.solve(x, found.modulus)[0]) for x in found.inputs]
    bound = _pigeonhole(scores, values, 12)
    return Evidence(abs(out[0] - out[1]), bound, "difference of a triple-wise layer's outputs")


SOURCE = "Sanford, Hsu and Telgarsky, arXiv 2306.02896 (its abstract was read); the construction is ours"
CLAIMS = [
    Claim(
        "match3-one-layer",
        "One triple-wise head with five features answers Match3 up to 1/11, which equal tokens that all but match"
        " attain",
        SOURCE,
        solved,
        small_logits,
        ("at least three tokens", "a modulus of at least 2 that 3 does not divide, for the worst tokens"),
    ),
    Claim(
        "match3-pairwise",
        "A pairwise layer with H heads of m values has inputs of opposite labels whose outputs are as near as"
        " 2^N sets in a box of H(m + 1) dimensions must be",
        SOURCE,
        collision,
        triple_is_apart,
        ("H(m + 1) is below N",),
    ),
]
