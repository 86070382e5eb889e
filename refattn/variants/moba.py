"""MoBA: softmax attention to a query's own block of keys and the earlier blocks whose mean key it scores highest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..problem import Problem
from .loops import chosen, first
from .option import Option, boolean, one_of, whole
from .shapes import Choices, Lowered, Selected
from .variant import Variant, packed, unplaced

__all__ = ["MOBA"]


def scores(q: Any, k: Any, o: Any) -> Any:
    """Return a query's product with the mean of each block's keys."""
    return q @ ((o.members @ k) / o.sizes).T


def choices(n_q: int, n_k: int, o: Any, count: int = 0, own_block: bool = True) -> Choices:
    """Return which keys a block holds, and which blocks a row may and must take.

    The rest is for mistakes: so many blocks more, and whether a row's own block is taken whatever its score.
    """
    block = np.arange(n_k) // o.block_size
    own = (np.arange(n_q) + n_k - n_q)[:, None] // o.block_size
    blocks = np.arange(-(-n_k // o.block_size))
    must = blocks == own
    if o.forced == "first_previous_own":
        must = must | (blocks == own - 1) | (blocks == 0)
    if not own_block:
        return Choices(blocks[:, None] == block, blocks <= own, np.zeros((n_q, len(blocks)), bool), o.topk)
    may = (blocks < own) & ~must
    return Choices(blocks[:, None] == block, may, must, max(o.topk - FORCED[o.forced] + count, 0))


FORCED = {"own": 1, "first_previous_own": 3}


def fits(p: Problem) -> str | None:
    """Refuse calls in which a query has no block of its own, and budgets below what is forced."""
    topk, forced = p.options.get("topk", 3), p.options.get("forced", "own")
    if topk < FORCED[forced]:
        return f"topk: got {topk}, expected at least {FORCED[forced]}, the blocks that forced={forced!r} takes"
    if p.causal != "bottom_right":
        return packed(p, "blocks") or "causal: blocks are chosen among earlier ones; set causal='bottom_right'"
    return unplaced(p, "blocks")


def by_rows(p: Problem, o: Any, ties: bool = False, blind: bool = False) -> Problem:
    """Write the same by a loop over rows: earlier blocks are whole, so that their sums stand as their means do.

    Blind, a mistake, if blocks of keys that nobody sees are chosen, too.
    """

    def take(s: Any, seen: Any, at: int) -> Iterator[int]:
        size, own = o.block_size, at // o.block_size
        forced = {own} if o.forced == "own" else {own, own - 1, 0} & set(range(own + 1))
        among = [x for x in range(own) if x not in forced and (seen[x * size : (x + 1) * size].any() or blind)]
        best = first({x: s[:, x * size : (x + 1) * size].sum() for x in among}, o.topk - FORCED[o.forced], ties)
        for x in (*best, *forced):
            yield from range(x * size, min((x + 1) * size, len(seen)))

    return chosen(p, take, together=o.by_group)


DEFINE = Selected(scores, choices, full={"topk": 2**31}, together=lambda o: o.by_group, alone=True)
MOBA = Variant(
    name="moba",
    define=DEFINE,
    forms={"by_rows": Lowered(by_rows)},
    formula="softmax attention to the keys of block(i) and of the topk - 1 earlier blocks b with the largest "
    "q_i·mean(K_b)",
    unit="u · sum_j p_ij |v_jc|",
    source="Lu et al., MoBA, arXiv 2502.13189, eq. 4 to 6; the released moba_naive.py was read.",
    compared="moba_attn_varlen_naive of the release at 61e456b on a CPU, in float64 where it casts to float32: 40 calls"
    " of 5 to 89 tokens agree",
    uses=frozenset({"causal", "sink", "weight"}),
    options={
        "block_size": Option(64, "keys of a block; the last may be shorter", whole(1), (64, 8, 5)),
        "topk": Option(3, "blocks of a row, the forced ones counted", whole(1), (3, 1, 2)),
        "forced": Option(
            "own",
            "blocks that a row always takes: its own, or the first and the one before its own, too",
            one_of(*FORCED),
            ("own", "first_previous_own"),
        ),
        "by_group": Option(False, "whether the query heads of a key head add up their scores", boolean, (False, True)),
    },
    laws=("determinism", "grouped_heads", "batch_independence", "values_doubled", "full_budget_is_dense"),
    bugs=(
        "zeroed_head",
        "own_key_dropped",
        "last_key_dropped",
        "tail_tile_dropped",
        "wrong_scale",
        "causal_off_by_one",
        "causal_ignored",
        "allowed_ignored",
        "heads_tiled",
        "value_of_next_key",
        "neighbour_row",
        "output_too_narrow",
    ),
    contract=(
        "A tie goes to the lower block.",
        "With by_group, heads of a group see the same keys: a weight of 0 for one of them alone is refused.",
        "A block longer than the keys is the one block, ragged: rows attend to all keys up to their own.",
        "Means are of the exact keys of a block, the ragged last one's of those that are there.",
        "Where a kernel's own scores cannot tell two blocks apart, it may take either: the row is judged by both.",
        "Gradients hold the choice fixed: none goes through the scores that choose blocks.",
        "A NaN or infinite number in a query or key counts as 0 in scores; a row that takes such a key is NaN.",
    ),
    has_lse=True,
    positive=True,
    cases={
        "blocks": {"n_q": 67, "n_k": 67, "causal": "bottom_right", "options": {"block_size": 8, "topk": 3}},
        "blocks-of-weight-0": {
            "n_q": 9,
            "n_k": 37,
            "causal": "bottom_right",
            "weight": np.where(np.arange(37) // 4 % 3 == 1, 0.0, 1.5)[None, None, None],
            "options": {"block_size": 4, "topk": 3},
        },
        "items": {"b": 2, "n_q": 19, "n_k": 37, "causal": "bottom_right", "options": {"block_size": 8, "topk": 2}},
        "own-block-only": {"n_q": 67, "n_k": 67, "causal": "bottom_right", "options": {"block_size": 16, "topk": 1}},
        "more-than-there-are": {
            "n_q": 37,
            "n_k": 67,
            "causal": "bottom_right",
            "options": {"block_size": 16, "topk": 9},
        },
        "many-blocks": {"n_q": 67, "n_k": 1003, "causal": "bottom_right", "options": {"block_size": 16, "topk": 3}},
        "below-zero": {
            "n_q": 37,
            "n_k": 37,
            "causal": "bottom_right",
            "scale": -0.3,
            "options": {"block_size": 4, "topk": 3},
        },
        "ragged": {
            "n_q": 37,
            "n_k": 61,
            "h": 4,
            "h_kv": 2,
            "causal": "bottom_right",
            "options": {"block_size": 7, "topk": 2},
        },
        "by-group": {
            "n_q": 13,
            "n_k": 29,
            "h": 4,
            "h_kv": 2,
            "causal": "bottom_right",
            "options": {"block_size": 4, "topk": 4, "forced": "first_previous_own", "by_group": True},
        },
        "ties": {
            "n_q": 11,
            "n_k": 20,
            "causal": "bottom_right",
            "ties": "equal",
            "options": {"block_size": 5, "topk": 2},
        },
        "near-ties": {
            "n_q": 11,
            "n_k": 20,
            "causal": "bottom_right",
            "ties": "ulp",
            "options": {"block_size": 5, "topk": 2},
        },
    },
    wrong={
        "own_block_counted_apart": ("topk earlier blocks are chosen beside the own one", DEFINE.changed(count=1)),
        "group_ignored": ("each query head chooses for itself", replace(DEFINE, together=lambda o: False)),
        "own_block_competes": ("the own block must be chosen like others", DEFINE.changed(own_block=False)),
        "blocks_by_size": (
            "blocks are chosen by the size of their score",
            DEFINE.changed(lambda *x: scores(*x) * scores(*x)),
        ),
        "lowest_scores": ("the blocks of the lowest scores are chosen", DEFINE.changed(lambda *x: scores(*x) * -1)),
        "means_of_squares": (
            "the mean of squares stands for the mean",
            DEFINE.changed(lambda q, k, o: q @ ((o.members @ (k * k)) / o.sizes).T),
        ),
        "unseen_blocks_compete": (
            "blocks whose keys all have weight 0 are chosen like others, which leaves fewer that count",
            Lowered(by_rows).changed(blind=True),
        ),
        "all_of_a_tie": (
            "all blocks at the score of the last are taken, more than topk at a tie",
            Lowered(by_rows).changed(ties=True),
        ),
    },
    fits=fits,
    tries=lambda n_q, n_k: (
        {"block_size": 8, "topk": 1},
        {"block_size": 5, "topk": 2},
        {"block_size": 2, "topk": 4, "forced": "first_previous_own"},
        {"block_size": 3, "topk": 2, "by_group": True},
    ),
    always=frozenset({"causal_bottom_right"}),
    never=frozenset({"variable_lengths", "causal_top_left", "no_rows_or_keys"}),
)
