"""The selection branch of native sparse attention: the blocks of keys that a group's heads weigh highest, together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal, localcontext
from typing import Any

import numpy as np

from ..problem import Problem
from .loops import DIGITS, chosen, first_weights, products
from .moba import FORCED, MOBA, fits
from .option import Option, one_of, whole
from .shapes import Choices, Lowered, Selected
from .variant import Variant

__all__ = ["NSA_SELECTED"]


def scores(q: Any, k: Any, o: Any) -> Any:
    """Return the softmax weights of each block's mean key, among the blocks that end at or before a query."""
    return weights(q @ ((o.members @ k) / o.sizes).T * o.scale, o)


def weights(s: Any, o: Any) -> Any:
    """Return a softmax over the blocks that a row looks at; zeros where it looks at none."""
    p = (s - s.shift(o.seen)).exp(where=o.seen)
    return p / (p.sum() + o.unseen)


def choices(n_q: int, n_k: int, o: Any, count: int = 0, whole: bool = True) -> Choices:
    """Return blocks of keys: a row takes the forced ones, and chooses among the others before its own.

    The rest is for mistakes: so many more, and whether only blocks that end at or before a query are weighed.
    """
    starts = np.arange(0, n_k, o.block_size)
    at = (np.arange(n_q) + n_k - n_q)[:, None]
    mine, blocks = at // o.block_size, np.arange(len(starts))
    must = blocks == mine
    if o.forced == "first_previous_own":
        must = must | (blocks == mine - 1) | (blocks == 0)
    seen = (starts + o.block_size - 1 <= at) if whole else (blocks <= mine)
    members = np.arange(n_k) // o.block_size == blocks[:, None]
    return Choices(members, (blocks < mine) & ~must, must, max(o.topk - FORCED[o.forced] + count, 0), seen)


def by_rows(p: Problem, o: Any, ties: bool = False, blind: bool = False, columns: int | None = None) -> Problem:
    """Write the same by a loop over rows that sums exponentials in decimals, and compares their terms at a tie.

    Products are of the first `columns` numbers of queries and keys, by default of all. Blind, a mistake, if blocks of
    keys that nobody sees are weighed, too.
    """
    found, below = products(p, columns)
    with localcontext() as context:
        context.prec = 2 * DIGITS
        scale = 1 / Decimal(p.d_k).sqrt() if p.scale is None else Decimal(p.scale)
        unit = scale / below / o.block_size  # only whole blocks are weighed

    def take(s: Any, seen: Any, at: int) -> Iterator[int]:
        own = at // o.block_size
        forced = {own} if o.forced == "own" else {own, own - 1, 0} & set(range(own + 1))
        spans = {b: slice(b * o.block_size, (b + 1) * o.block_size) for b in range((at + 1) // o.block_size)}
        spans = {b: x for b, x in spans.items() if blind or seen[x].any()}
        sums = [[row[x].sum() for x in spans.values()] for row in s]
        among = [n for n, b in enumerate(spans) if b < own and b not in forced]
        best = first_weights(sums, unit, among, o.topk - FORCED[o.forced], ties) if among else []
        for b in {*forced, *(list(spans)[n] for n in best)}:
            yield from range(b * o.block_size, min((b + 1) * o.block_size, len(seen)))

    return chosen(p, take, together=True, scores=found)


DEFINE = Selected(scores, choices, full={"topk": 2**31}, together=lambda o: True)
NSA_SELECTED = Variant(
    name="nsa_selected",
    define=DEFINE,
    forms={"by_rows": Lowered(by_rows)},
    formula="softmax attention to the keys of block(i) and of the topk - 1 earlier blocks b with the largest "
    "sum_h softmax_b(scale·q_ih·mean(K_b)), summed over the query heads h of a key head",
    unit="u · sum_j p_ij |v_jc|",
    source="Yuan et al., Native Sparse Attention, arXiv 2502.11089, section 3.3, recalled; the selection of SSA's "
    "release (modeling_llama_nsa.py, parallel.py) was read, and that of fla-core 0.6.0 (forced). NSA adds to it "
    "attention to the blocks' means and a window, each times a gate.",
    compared="fla's naive NSA at bc3b101 (topk, selection, compression) with forced='first_previous_own': agrees "
    "within bounds of float64. It takes the group's mean where ours takes the sum, of equal weights any block. It "
    "forces blocks by a score of 1, so that one may be dropped where another's weight is 1 (tests/peers/test_fla.py). "
    "native-sparse-attention-pytorch 0.2.3: agrees where each query head has a key head of its own; it counts the own "
    "block apart and adds up products of a group (tests/peers/test_nsa.py)",
    uses=frozenset({"causal", "sink", "weight"}),
    options={
        "block_size": Option(16, "keys of a block; the last may be shorter", whole(1), (16, 4, 7)),
        "topk": Option(16, "blocks of a row, the forced ones counted", whole(1), (16, 3, 4)),
        "forced": Option(
            "own",
            "blocks that a row always takes: its own, or the first and the one before its own, too (fla-core)",
            one_of(*FORCED),
            ("own", "first_previous_own"),
        ),
    },
    laws=("determinism", "batch_independence", "values_doubled", "full_budget_is_dense"),
    bugs=MOBA.bugs,
    contract=(
        "A tie goes to the lower block.",
        "A block is weighed against those that end at or before the query; its own may be among these.",
        "A block longer than the keys is the one block, ragged: rows attend to all keys up to their own.",
        "All query heads of a key head choose the same blocks, and see the same keys: a weight of 0 for one of them "
        "alone is refused.",
        "Where a kernel's own weights cannot tell two blocks apart, it may take either: the row is judged by both.",
        "Gradients hold the choice fixed: none goes through the scores that choose blocks.",
        "A NaN or infinite number in a query or key counts as 0 in scores; a row that takes such a key is NaN.",
    ),
    has_lse=True,
    positive=True,
    cases={
        "group": {
            "n_q": 67,
            "n_k": 67,
            "h": 4,
            "h_kv": 2,
            "causal": "bottom_right",
            "options": {"block_size": 8, "topk": 3},
        },
        "blocks-of-weight-0": {
            "n_q": 9,
            "n_k": 37,
            "h": 4,
            "h_kv": 2,
            "causal": "bottom_right",
            "weight": np.where(np.arange(37) // 4 % 3 == 1, 0.0, 1.5)[None, None, None],
            "options": {"block_size": 4, "topk": 3},
        },
        "items": {"b": 2, "n_q": 19, "n_k": 37, "causal": "bottom_right", "options": {"block_size": 8, "topk": 2}},
        "own-block-only": {"n_q": 67, "n_k": 67, "causal": "bottom_right", "options": {"block_size": 16, "topk": 1}},
        "more-than-there-are": {"n_q": 37, "n_k": 67, "causal": "bottom_right"},
        "forced": {
            "n_q": 67,
            "n_k": 103,
            "h": 4,
            "h_kv": 1,
            "causal": "bottom_right",
            "options": {"block_size": 8, "topk": 4, "forced": "first_previous_own"},
        },
        "peaked": {
            "n_q": 131,
            "n_k": 131,
            "h": 4,
            "h_kv": 1,
            "d": 4,
            "causal": "bottom_right",
            "scale": 2.0,
            "options": {"block_size": 8, "topk": 2},
        },
        "below-zero": {
            "n_q": 37,
            "n_k": 37,
            "h": 4,
            "h_kv": 2,
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
        "ties": {
            "n_q": 11,
            "n_k": 20,
            "h": 4,
            "h_kv": 2,
            "causal": "bottom_right",
            "ties": "equal",
            "options": {"block_size": 5, "topk": 2},
        },
        "near-ties": {
            "n_q": 11,
            "n_k": 20,
            "h": 4,
            "h_kv": 2,
            "causal": "bottom_right",
            "ties": "ulp",
            "options": {"block_size": 5, "topk": 2},
        },
    },
    wrong={
        "each_head_chooses": ("each query head chooses for itself", replace(DEFINE, together=lambda o: False)),
        "products_summed": (
            "heads add up their products, not their weights",
            DEFINE.changed(lambda q, k, o: q @ ((o.members @ k) / o.sizes).T * o.scale),
        ),
        "own_block_counted_apart": ("topk blocks are chosen beside the forced ones", DEFINE.changed(count=1)),
        "unscaled": (
            "weights are softmaxes of products without a scale",
            DEFINE.changed(lambda q, k, o: weights(q @ ((o.members @ k) / o.sizes).T, o)),
        ),
        "unfinished_block_weighed": (
            "the block that a query stands in is weighed with the whole ones, later keys and all",
            DEFINE.changed(whole=False),
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
        {"block_size": 4, "topk": 3},
        {"block_size": 2, "topk": 2},
        {"block_size": 7, "topk": 4, "forced": "first_previous_own"},
        {"block_size": 2, "topk": 3, "forced": "first_previous_own"},
    ),
    always=frozenset({"causal_bottom_right"}),
    never=frozenset({"variable_lengths", "causal_top_left", "no_rows_or_keys"}),
)
