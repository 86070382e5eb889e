"""SeerAttention: softmax attention to the blocks of keys that a gate picks for a block of queries, by a threshold."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedProblem
from ..problem import Problem
from .loops import CLOSE, DIGITS, first, integers, products
from .moba import MOBA
from .option import Option, finite, whole
from .shapes import Lowered
from .variant import COMMON_BUGS, Variant, packed

__all__ = ["SEER"]

Scores = NDArray[np.object_]
Mask = NDArray[np.bool_]
FARTHEST = 1000
"""Scores that are farther above a block's own leave it a gate below e^-1000, which is below every float64 threshold."""


def spans(n: int, size: int) -> list[slice]:
    """Return blocks of tokens; the last may be shorter."""
    return [slice(a, min(a + size, n)) for a in range(0, n, size)]


def gate_scores(p: Problem, o: Any, by_first: bool = False, by_size: bool = False) -> Scores:
    """Return ``gate_scale · sum of heads mean(x_r)·mean(y_c)`` as fractions, (b, h_kv, blocks, blocks).

    The rest is for mistakes: a block's first query for its mean, and the sizes of whole blocks for a shorter last one.
    """
    d, blocks = gate_width(p, o.gate_dim), spans(p.n_q, o.block_size)
    (q, below), (k, more) = integers(p.query[..., -d:]), integers(p.key[..., -d:])
    x = np.stack([q[:, :, s.start] * (s.stop - s.start) if by_first else q[:, :, s].sum(2) for s in blocks], 2)
    y = np.stack([k[:, :, s].sum(2) for s in blocks], 2)
    sizes = [o.block_size if by_size else s.stop - s.start for s in blocks]
    found = np.empty((p.batch, p.heads_kv, len(blocks), len(blocks)), object)
    group = p.heads // p.heads_kv
    for b, g, r, c in np.ndindex(found.shape):
        total = x[b, g * group : (g + 1) * group, r].sum(0) @ y[b, g, c]
        found[b, g, r, c] = Fraction(o.gate_scale) * Fraction(int(total), below * more * sizes[r] * sizes[c])
    return found


def gate_width(p: Problem, gate_dim: int | None) -> int:
    """Return how many of the last numbers are the gate's."""
    return p.d_k if gate_dim is None else gate_dim


def kept(blocks: int, ratio: float) -> int:
    """Return max(1, floor((1 - sqrt(1 - ratio)) blocks)): no root is taken."""
    below = [i for i in range(1, blocks + 1) if Fraction(blocks - i, blocks) ** 2 >= 1 - Fraction(ratio)]
    return max(below, default=1)


def above(row: list[Fraction], own: int, threshold: Fraction, at_least: bool = False) -> bool:
    """Tell whether a gate, ``exp(row[own]) / sum(exp(row))``, is above a threshold; `at_least` is a mistake.

    Exponentials of different fractions are linearly independent over them (Lindemann and Weierstrass), so that a gate
    is a fraction only where all scores are equal.
    """
    if threshold == 0:
        return True
    if len(set(row)) == 1:
        gate = Fraction(1, len(row))
        return gate > threshold or (at_least and gate == threshold)
    if max(x - row[own] for x in row) > FARTHEST:
        return False
    with localcontext() as context:
        context.prec = DIGITS
        total = sum(_decimal(x - row[own]).exp() for x in row)
        gap = _decimal(1 / threshold) - total
        if abs(gap) <= CLOSE * total:
            raise UnsupportedProblem(f"threshold: a gate differs from {float(threshold)} by less than {CLOSE} of it")
        return gap > 0


def _decimal(x: Fraction) -> Decimal:
    return Decimal(x.numerator) / Decimal(x.denominator)


def above_in_floats(row: list[Fraction], own: int, threshold: Fraction) -> bool:
    """Tell the same from float64 exponentials, off by less than 2^-40 of their sum where none is below 2^-1000."""
    apart = [float(x - row[own]) for x in row]
    if threshold == 0 or not any(apart):
        return threshold == 0 or Fraction(1, len(row)) > threshold
    if threshold < Fraction(1, 2**800):
        raise UnsupportedProblem("threshold: float64's exponentials do not reach it")
    if max(apart) > 600:
        return False  # the gate is below 2^-800
    total = math.fsum(math.exp(x) for x in apart)
    if abs(total * float(threshold) - 1) <= 2.0**-40:
        raise UnsupportedProblem("threshold: float64 cannot tell on which side of it a gate is")
    return total * float(threshold) < 1


def lower(
    p: Problem,
    o: Any,
    later: bool = False,
    own: bool = False,
    relative: bool = False,
    at_least: bool = False,
    by_row: bool = False,
    **change: Any,
) -> Problem:
    """Write the blocks that the gate picks as a mask.

    The rest is for mistakes: whether later blocks are weighed, the own one is always taken, a threshold is a part of a
    row's largest gate, a gate at it is taken, and a ratio is of the blocks of a row.
    """
    s = gate_scores(p, o, **change)
    taken = np.zeros(s.shape, bool)
    for b, g, r in np.ndindex(s.shape[:3]):
        row = list(s[b, g, r, : s.shape[3] if later else r + 1])
        if o.ratio is not None:
            most = kept(r + 1 if by_row else s.shape[3], o.ratio)
            taken[b, g, r, first(dict(enumerate(row)), most)] = True
        elif relative:
            best = max(row)
            taken[b, g, r, : len(row)] = [above([x, best], 0, _part(o.threshold)) for x in row]
        else:
            limit = Fraction(o.threshold)
            taken[b, g, r, : len(row)] = [above(row, c, limit, at_least) for c in range(len(row))]
        taken[b, g, r, r] |= own
    return written(p, o, taken)


def _part(threshold: float) -> Fraction:
    """Return the t of x / (x + y) > t where x > threshold · y."""
    return Fraction(threshold) / (1 + Fraction(threshold))


def written(p: Problem, o: Any, taken: Mask) -> Problem:
    """Return softmax over the keys of the blocks that are taken, (b, h_kv, blocks, blocks)."""
    at, group = np.arange(p.n_q) // o.block_size, p.heads // p.heads_kv
    mask = np.repeat(taken[:, :, at][..., at], group, 1)
    return p.replace(variant="softmax", options={}, allowed=mask)


def by_pairs(p: Problem, o: Any) -> Problem:
    """Write the same from the products of all pairs of tokens, a block's gate their mean, compared in float64."""
    d = gate_width(p, o.gate_dim)
    last = p.replace(query=np.ascontiguousarray(p.query[..., -d:]), key=np.ascontiguousarray(p.key[..., -d:]))
    (s, below), group, blocks = products(last), p.heads // p.heads_kv, spans(p.n_q, o.block_size)
    taken = np.zeros((p.batch, p.heads_kv, len(blocks), len(blocks)), bool)
    for b, g, r in np.ndindex(taken.shape[:3]):
        row = []
        for c in range(r + 1):
            pairs = s[b, g * group : (g + 1) * group, blocks[r], blocks[c]]
            row.append(Fraction(o.gate_scale) * Fraction(int(pairs.sum()) * group, below * pairs.size))
        if o.ratio is None:
            taken[b, g, r, : r + 1] = [above_in_floats(row, c, Fraction(o.threshold)) for c in range(r + 1)]
            continue
        m, count = len(blocks), 1
        while count < m and (m - count - 1) ** 2 >= m * m * (1 - Fraction(o.ratio)):
            count += 1
        order = sorted(range(r + 1), key=lambda c: -row[c])  # keeps the lower one first
        taken[b, g, r, order[:count]] = True
    return written(p, o, taken)


def part(low_open: bool) -> Any:
    """Check for a number from 0 to 1; with `low_open` None or one above 0."""

    def check(value: Any, heads: int) -> str | None:
        if value is None:
            return None if low_open else "a number from 0 to 1"
        ok = finite(value, heads) is None and (0 < value <= 1 if low_open else 0 <= value <= 1)
        return None if ok else ("None or a number above 0, at most 1" if low_open else "a number from 0 to 1")

    return check


def number(value: Any, heads: int) -> str | None:
    """Check for a finite number."""
    return "a finite number" if value is None else finite(value, heads)


def width(value: Any, heads: int) -> str | None:
    """Check for None or an integer of at least 1."""
    return None if value is None or whole(1)(value, heads) is None else "None or an integer of at least 1"


def fits(p: Problem) -> str | None:
    """Refuse calls in which blocks of queries and keys are not the same, and two rules at once."""
    if wrong := packed(p, "blocks"):
        return wrong
    if p.causal != "bottom_right":
        return "causal: a block of queries chooses among earlier blocks; set causal='bottom_right'"
    if p.n_q != p.n_k:
        return f"key: axis seq is {p.n_k}, expected query's {p.n_q}: blocks of queries and keys are the same tokens"
    if p.options.get("ratio") is not None and p.options.get("threshold", 0.002) != 0.002:
        return "ratio: got one, and a threshold; leave one out"
    if (p.options.get("gate_dim") or 1) > p.d_k:
        return f"gate_dim: got {p.options['gate_dim']}, expected at most query's dim {p.d_k}"
    return None


DEFINE = Lowered(lower)
CAUSAL = {"causal": "bottom_right", "d": 8}
SEER = Variant(
    name="seer",
    define=DEFINE,
    forms={"by_pairs": Lowered(by_pairs)},
    formula="softmax attention to the keys of the blocks c <= block(i) with G_rc > threshold, or of the largest G_rc; "
    "G_r = softmax_c(gate_scale · sum_h mean(x_hr)·mean(y_c)), x and y the last gate_dim numbers of queries and keys, "
    "summed over the query heads h of a key head",
    unit="u · sum_j p_ij |v_jc|",
    source="Gao et al., SeerAttention, arXiv 2410.13276, not read; attn_gate.py and modules/common.py of its release "
    "were. Its gate's queries and keys are linear in means of blocks, but for the largest and least keys: give each "
    "token of a block the block's own key. For a layer query heads stand in pairs with a key head of their own, as "
    "dsa's do: (q, 0), (0, x) and (k, y); rows of the gate's heads attend to the same keys.",
    uses=frozenset({"causal", "sink"}),
    options={
        "block_size": Option(64, "tokens of a block; the last may be shorter", whole(1), (64, 4, 7)),
        "threshold": Option(0.002, "what a gate must be above", part(False), (0.002, 0.25, 0.0)),
        "ratio": Option(None, "in place of a threshold: the part of the triangle to keep", part(True), (None, 0.5)),
        "gate_dim": Option(None, "the last numbers of a token that the gate reads; None is all", width, (None, 3)),
        "gate_scale": Option(1.0, "what the gate's products are multiplied with", number, (1.0, 0.5)),
    },
    laws=("determinism", "batch_independence", "values_doubled", "batch_invariance"),
    bugs=tuple(n for n in MOBA.bugs if n in COMMON_BUGS and n not in ("allowed_ignored", "own_key_dropped")),
    contract=(
        "Nothing is taken by force: a row whose gates are all at or below the threshold is empty, out 0 and lse -inf.",
        "A gate at the threshold is not above it. With a ratio a tie goes to the lower block.",
        "A ratio z keeps the max(1, floor((1 - sqrt(1 - z)) blocks)) largest of each row; shorter rows keep all.",
        "At threshold 0 all blocks up to the own one are taken. Means are of the tokens that are there.",
        "Rows are judged by the exact choice alone, also where a kernel's own gate may round across the threshold.",
        "Gradients hold the choice fixed: none goes through the gate.",
        "A NaN or infinite number in a query or key counts as 0 in the gate; a row that takes such a key is NaN.",
    ),
    has_lse=True,
    positive=True,
    cases={
        "threshold": {"n_q": 37, "n_k": 37, **CAUSAL, "options": {"block_size": 5, "threshold": 0.25}},
        "ratio": {"n_q": 30, "n_k": 30, **CAUSAL, "options": {"block_size": 4, "ratio": 0.5}},
        "ties": {"n_q": 12, "n_k": 12, **CAUSAL, "ties": "equal", "options": {"block_size": 2, "threshold": 0.25}},
        "ties-of-a-ratio": {
            "n_q": 12, "n_k": 12, **CAUSAL, "ties": "equal", "options": {"block_size": 2, "ratio": 0.5},
        },
        "gate-columns": {
            "n_q": 23, "n_k": 23, "h": 4, "h_kv": 2, **CAUSAL,
            "options": {"block_size": 4, "threshold": 0.25, "gate_dim": 3, "gate_scale": 2.0},
        },
        "items": {"b": 2, "n_q": 19, "n_k": 19, **CAUSAL, "options": {"block_size": 4, "ratio": 0.25}},
        "nothing-chosen": {"n_q": 9, "n_k": 9, **CAUSAL, "options": {"block_size": 2, "threshold": 1.0}},
        "all": {"n_q": 13, "n_k": 13, **CAUSAL, "options": {"block_size": 3, "threshold": 0.0}},
        "one-block": {"n_q": 7, "n_k": 7, **CAUSAL, "options": {"block_size": 64}},
    },
    wrong={
        "at_the_threshold": ("a gate at the threshold is taken", DEFINE.changed(at_least=True)),
        "own_block_forced": ("the own block is always taken", DEFINE.changed(own=True)),
        "later_blocks_weighed": ("the gate's softmax is over later blocks, too", DEFINE.changed(later=True)),
        "threshold_of_the_largest": ("a threshold is a part of the row's largest gate", DEFINE.changed(relative=True)),
        "ratio_of_each_row": ("a ratio is of the blocks that a row has", DEFINE.changed(by_row=True)),
        "first_query_asks": ("a block's first query stands for their mean", DEFINE.changed(by_first=True)),
        "short_mean_over_a_whole_block": (
            "a shorter block's mean is divided by block_size", DEFINE.changed(by_size=True),
        ),
    },
    fits=fits,
    tries=lambda n_q, n_k: (
        {"block_size": 2, "threshold": 0.25},
        {"block_size": 3, "ratio": 0.5},
        {"block_size": 2, "threshold": 0.25, "gate_dim": 1, "gate_scale": 0.5},
    ),
    always=frozenset({"causal_bottom_right"}),
    never=frozenset({"variable_lengths", "causal_top_left", "no_rows_or_keys", "lengths_differ"}),
)  # fmt: skip
