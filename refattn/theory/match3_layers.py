"""Match3: one triple-wise layer answers, and pairwise layers of few numbers are led astray, as pigeonholes say."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..tensor import attention, collide, match3
from .claim import Claim, Evidence, needs, worst

__all__ = ["CLAIMS"]

Float = NDArray[np.float64]


def _near_misses(n: int, modulus: int) -> Float:
    """Return equal tokens whose sums of three are all 1 modulo M: the worst that a label 0 can have."""
    token = next(t for t in range(modulus) if 3 * t % modulus == 1)
    return np.full(n, token)


LEAK = Fraction(1, 11)
"""How far an output can be from its label: n² pairs that miss by one, beside the dummy's exp(beta · gap/2) = 10 n²."""


def _distance(x: Any, modulus: int, shrink: float = 1.0) -> float:
    q, *rest = match3.layer(x, modulus)
    found = attention(q / shrink, *rest, scale=1.0)[0, 0, :, 0]
    # logits of size beta are off by d roundings, and weights by as much as logits
    beta = float(np.abs(q).max()) / shrink
    return float(np.abs(found - match3.labels(x, modulus)).max()) - 2 * beta * 5 * 2.0**-53


def solved(sizes: tuple[tuple[int, int], ...] = ((16, 128), (64, 1021), (128, 8191))) -> Evidence:
    """The output's distance to the label, at random tokens and at those that all but match, over what leaks."""
    pairs = []
    for n, m in sizes:
        needs(
            n >= 3 and m >= 2 and m % 3 > 0, "at least three tokens and a modulus of at least 2 that 3 does not divide"
        )
        given = [np.random.default_rng(seed).integers(0, m, n) for seed in range(3)]
        pairs += [(_distance(x, m), float(LEAK)) for x in (*given, _near_misses(n, m))]
    return Evidence(worst(pairs), 1, "largest distance of an output to its label, over what leaks")


def small_logits() -> Evidence:
    """The same layer with half its logits."""
    return Evidence(_distance(_near_misses(64, 1021), 1021, 2.0), LEAK, "distance with half the logits")


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


def _pigeonhole(scores: Float, values: Float, universe: int) -> float:
    """Return a bound on the least difference of outputs of two sets, from how many sets there are.

    The sums of numerators N and denominators D of 2**universe sets lie in a box; with fewer cells than sets two are in
    one cell. Sums that differ by r move a quotient N/D by at most r·sqrt(1 + (N/D)²)/D, by r/D where D is one number.
    """
    weights = np.exp(scores - scores.max(1, keepdims=True))
    sums = np.concatenate([weights[..., None], weights[..., None] * values], 2).transpose(1, 0, 2)
    blanks, elements = (5 * universe + 1, 5 * universe + 3), len(sums) - 3 - np.arange(universe)
    change = (sums[elements] - sums[blanks[1]]).reshape(universe, -1)
    sides = np.abs(change).sum(0)
    cells = math.ceil(2 ** (universe / int((sides > 0).sum()))) - 1
    r = math.sqrt(((sides / cells) ** 2).sum())
    # token 1; of A one element and else blanks; of B elements or blanks
    of_a = np.concatenate([sums[2 : 2 + universe], sums[blanks[0]][None]])
    of_b = np.minimum(sums[elements], sums[blanks[1]]), np.maximum(sums[elements], sums[blanks[1]])
    fixed = sums[1] + (universe - 1) * sums[blanks[0]]
    least, most = fixed + of_a.min(0) + of_b[0].sum(0), fixed + of_a.max(0) + of_b[1].sum(0)
    largest = np.maximum(np.abs(least[:, 1:]), np.abs(most[:, 1:])) / least[:, :1]
    turned = largest * (sides.reshape(len(change[0]) // sums.shape[2], -1)[:, :1] > 0)
    return float((r * np.hypot(1, turned) / least[:, :1]).max())


def collision(
    shapes: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (2, 1)), universe: int = 12, layers: int = 3
) -> Evidence:
    """Inputs of opposite labels with outputs within the pigeonhole bound, for layers drawn and for a spread-out one."""
    needs(
        all(h * (m + 1) < universe for h, m in shapes),
        "a layer of H(m + 1) numbers, fewer than the universe's elements",
    )
    drawn = [_random(*shape, universe, seed) for shape in shapes for seed in range(layers)]
    pairs = []
    for scores, values in [*drawn, _spread_out(universe, 2), _spread_out(universe, 1)]:
        found = collide(scores, values, universe=universe)
        needs(found.labels[0] != found.labels[1], "two sets of opposite labels")
        pairs.append((found.difference, _pigeonhole(scores, values, universe)))
    rounding = 2 * 2.0**-53 * float(np.abs(found.outputs).max())  # of the last layer's outputs, which attain the bound
    far, bound = pairs[-1]
    shares = [a / b for a, b in pairs]
    found_ = [*pairs[:-1], (far, bound + rounding), (bound, far + rounding)]
    return Evidence(worst(found_), 1, "difference of the outputs over the pigeonhole bound", {"shares": shares})


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
