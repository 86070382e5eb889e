"""Top-k attention: softmax attention to the first keys, the nearest, and those, or blocks of them, scored highest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..problem import Problem
from ..rules import Rule
from ..rules.rule import Atom
from .loops import chosen, first
from .option import Option, boolean, whole
from .shapes import Choices, Lowered, Selected
from .variant import Variant, packed, unplaced

__all__ = ["TOPK"]


def scores(q: Any, k: Any, o: Any) -> Any:
    """Return the mean of a query's products with a candidate's keys."""
    return q @ ((o.members @ k) / o.sizes).T


def choices(n_q: int, n_k: int, o: Any, sink: int = 0, local: int = 0, count: int = 0, whole: bool = True) -> Choices:
    """Return blocks, from which a row chooses, and single keys, which it takes besides.

    The rest is for mistakes: so many more first, near and chosen ones, and whether a block must lie whole in between.
    """
    first, size = min(max(o.sink_keys + sink, 0), n_k), o.block_size
    key, back = np.arange(n_k), n_k - n_q
    near = back - (o.local + local) + 1 - first  # from first to the nearest keys of row 0
    many = (size if whole else 1) - near
    may = Atom("before the nearest", lambda x: x.k <= (x.q - many) // size)
    return Choices(
        np.where(key < first, -1, (key - first) // size),
        may,
        None,
        max(o.topk + count, 0),
        kept=kept(first, near, size if whole else 1, back),
    )


def kept(first: int, near: int, size: int, back: int) -> Rule:
    """Return the first keys and, from the last whole block on, the nearest ones, up to the query's own."""

    def formula(x: Any) -> Any:
        return (x.k <= x.q + back) & ((x.k < first) | ((x.k - first) // size >= (x.q + near) // size))

    def ranges(rows: Any, call: Any) -> Any:
        ends = np.zeros((len(rows), 2, 2), np.int64)
        ends[:, 0, 1] = first
        ends[:, 1] = np.stack([first + (rows + near) // size * size, rows + back + 1], 1)
        return np.maximum(ends, 0)

    return Atom(f"kept({first}, {near}, {size}, {back})", formula, ranges=ranges)


def fits(p: Problem) -> str | None:
    """Refuse calls without a place for every query."""
    if p.causal != "bottom_right":
        return packed(p, "choices") or "causal: keys are chosen among earlier ones; set causal='bottom_right'"
    return unplaced(p, "choices")


def by_rows(p: Problem, o: Any, ties: bool = False, blind: bool = False) -> Problem:
    """Write the same by a loop over rows: blocks from the first keys on, until one reaches the nearest keys.

    Blind, a mistake, if blocks of keys that nobody sees are chosen, too.
    """

    def take(s: Any, seen: Any, at: int) -> Iterator[int]:
        start, nearest = min(o.sink_keys, len(seen)), at + 1 - o.local
        yield from range(start)
        blocks = {}
        while start + o.block_size <= nearest:
            if blind or seen[start : start + o.block_size].any():
                blocks[start] = s[:, start : start + o.block_size].sum()
            start += o.block_size
        yield from range(start, at + 1)
        for x in first(blocks, o.topk, ties):
            yield from range(x, x + o.block_size)

    return chosen(p, take, together=o.by_group)


DEFINE = Selected(scores, choices, full={"topk": 2**31}, together=lambda o: o.by_group, alone=True)
TOPK = Variant(
    name="topk",
    define=DEFINE,
    forms={"by_rows": Lowered(by_rows)},
    formula="softmax attention to the first sink_keys keys, the nearest `local` keys, and of the blocks of block_size "
    "keys between the topk with the largest mean q_i·k_j",
    unit="u · sum_j p_ij |v_jc|",
    source="Sadhukhan et al., Kinetics, arXiv 2506.05333, and sparsity_utils.py of its release, which averages scores "
    "over a group of heads: by_group=True, as a sum has the same order.",
    uses=frozenset({"causal", "sink", "weight"}),
    options={
        "topk": Option(32, "blocks that a row chooses; 0 is none", whole(0), (32, 5, 1)),
        "block_size": Option(1, "keys of a block", whole(1), (1, 4, 7)),
        "sink_keys": Option(4, "first keys, which a row always takes", whole(0), (4, 0, 2)),
        "local": Option(8, "nearest keys, which a row always takes, its own counted", whole(1), (8, 3, 1)),
        "by_group": Option(False, "whether the query heads of a key head add up their scores", boolean, (False, True)),
    },
    laws=("determinism", "grouped_heads", "batch_independence", "values_doubled", "full_budget_is_dense"),
    bugs=(
        "zeroed_head",
        "last_key_dropped",
        "wrong_scale",
        "heads_tiled",
        "value_of_next_key",
        "neighbour_row",
        "output_too_narrow",
    ),
    contract=(
        "Blocks count from the first key after the sink_keys; keys between the last whole block and the nearest are "
        "taken with these.",
        "With topk=0, or a block longer than the keys between, a row takes the first and the nearest keys alone; the "
        "latter from the last whole block on.",
        "With by_group, heads of a group see the same keys: a weight of 0 for one of them alone is refused.",
        "A tie goes to the lower block; a row with no more blocks between than topk takes them all.",
        "Where a kernel's own scores cannot tell two blocks apart, it may take either: the row is judged by both.",
        "Gradients hold the choice fixed: none goes through the scores that choose blocks.",
        "A NaN or infinite number in a query or key counts as 0 in scores; a row that takes such a key is NaN.",
    ),
    has_lse=True,
    positive=True,
    cases={
        "few": {"n_q": 67, "n_k": 67, "causal": "bottom_right", "options": {"topk": 5, "local": 3}},
        "blocks-of-weight-0": {
            "n_q": 9,
            "n_k": 37,
            "causal": "bottom_right",
            "weight": np.where(np.arange(37) // 4 % 3 == 1, 0.0, 1.5)[None, None, None],
            "options": {"topk": 2, "block_size": 4, "sink_keys": 0, "local": 5},
        },
        "items": {"b": 2, "n_q": 19, "n_k": 37, "causal": "bottom_right", "options": {"topk": 4, "local": 2}},
        "one": {"n_q": 37, "n_k": 67, "causal": "bottom_right", "options": {"topk": 1, "sink_keys": 0, "local": 1}},
        "chunk": {
            "n_q": 9,
            "n_k": 67,
            "h": 4,
            "h_kv": 2,
            "causal": "bottom_right",
            "options": {"topk": 7, "sink_keys": 2, "local": 5},
        },
        "blocks": {
            "n_q": 67,
            "n_k": 67,
            "causal": "bottom_right",
            "options": {"topk": 3, "block_size": 7, "sink_keys": 3, "local": 5},
        },
        "many": {"n_q": 9, "n_k": 259, "causal": "bottom_right", "options": {"topk": 90}},
        "below-zero": {"n_q": 37, "n_k": 37, "causal": "bottom_right", "scale": -0.3, "options": {"topk": 3}},
        "by-group": {
            "n_q": 37,
            "n_k": 67,
            "h": 4,
            "h_kv": 2,
            "causal": "bottom_right",
            "options": {"topk": 5, "by_group": True},
        },
        "none-chosen": {"n_q": 37, "n_k": 37, "causal": "bottom_right", "options": {"topk": 0, "local": 5}},
        "ties": {
            "n_q": 8,
            "n_k": 13,
            "causal": "bottom_right",
            "ties": "equal",
            "options": {"topk": 1, "block_size": 3, "sink_keys": 1, "local": 2},
        },
        "near-ties": {
            "n_q": 8,
            "n_k": 13,
            "causal": "bottom_right",
            "ties": "ulp",
            "options": {"topk": 1, "block_size": 3, "sink_keys": 1, "local": 2},
        },
    },
    wrong={
        "largest_by_size": (
            "keys are chosen by the size of their score",
            DEFINE.changed(lambda *x: scores(*x) * scores(*x)),
        ),
        "first_keys_not_kept": ("one of the first keys must be chosen like others", DEFINE.changed(sink=-1)),
        "own_key_not_counted": ("the query's own key is not counted among the nearest", DEFINE.changed(local=1)),
        "blocks_cut_by_the_nearest": (
            "a block that the nearest keys cut is chosen from, too",
            DEFINE.changed(whole=False),
        ),
        "group_ignored": ("each query head chooses for itself", replace(DEFINE, together=lambda o: False)),
        "one_less_chosen": ("one key less is chosen", DEFINE.changed(count=-1)),
        "ranked_without_the_query": (
            "all queries choose alike",
            DEFINE.changed(lambda q, k, o: scores(q * 0 + 1, k, o)),
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
    always=frozenset({"causal_bottom_right"}),
    never=frozenset({"variable_lengths", "causal_top_left", "no_rows_or_keys"}),
)
