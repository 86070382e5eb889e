"""Top-k attention: softmax attention to the first keys, the nearest keys, and those that the query scores highest."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..problem import Problem
from .option import Option, whole
from .shapes import Choices, Selected
from .variant import Variant

__all__ = ["TOPK"]


def scores(q: Any, k: Any, o: Any) -> Any:
    """Return a query's product with each key."""
    return q @ k.T


def choices(n_q: int, n_k: int, o: Any, sink: int = 0, local: int = 0, count: int = 0) -> Choices:
    """Return which keys a row may and must take; what follows the options is for mistakes: so many more."""
    behind = (np.arange(n_q) + n_k - n_q)[:, None] - np.arange(n_k)
    must = (behind >= 0) & ((np.arange(n_k) < o.sink_keys + sink) | (behind < o.local + local))
    return Choices(np.eye(n_k, dtype=bool), (behind >= 0) & ~must, must, max(o.topk + count, 0))


def fits(p: Problem) -> str | None:
    """Refuse calls without a place for every query."""
    if p.cu_seqlens_q is not None:
        return "cu_seqlens_q: choices in packed sequences are not defined; pass one sequence at a time"
    if p.causal != "bottom_right":
        return "causal: keys are chosen among earlier ones; set causal='bottom_right'"
    if p.n_q > p.n_k:
        return f"query: axis seq is {p.n_q}, expected at most key's {p.n_k}: each query stands at a key"
    return None


def wrong(by: Any = scores, **more: int) -> Selected:
    """Return the definition with a mistake."""
    return Selected(by, lambda n_q, n_k, o: choices(n_q, n_k, o, **more), full={"topk": 2**31})


TOPK = Variant(
    name="topk",
    define=Selected(scores, choices, full={"topk": 2**31}),
    formula="softmax attention to the first sink_keys keys, the nearest `local` keys, and of those between the topk "
    "with the largest q_i·k_j",
    unit="u · sum_j p_ij |v_jc|",
    source="Sadhukhan et al., Kinetics, arXiv 2506.05333, and sparsity_utils.py of its release, which averages scores "
    "over a group of heads: here each query head chooses for itself.",
    uses=frozenset({"causal", "sink", "weight"}),
    options={
        "topk": Option(32, "keys that a row chooses", whole(0), (32, 5, 1)),
        "sink_keys": Option(4, "first keys, which a row always takes", whole(0), (4, 0, 2)),
        "local": Option(8, "nearest keys, which a row always takes, its own counted", whole(1), (8, 3, 1)),
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
        "A tie goes to the lower key.",
        "A row with no more keys between than topk takes them all.",
        "Where a kernel's own scores cannot tell two keys apart, it may take either: the row is judged by both.",
    ),
    has_lse=True,
    positive=True,
    cases={
        "few": {"n_q": 67, "n_k": 67, "causal": "bottom_right", "options": {"topk": 5, "local": 3}},
        "one": {"n_q": 37, "n_k": 67, "causal": "bottom_right", "options": {"topk": 1, "sink_keys": 0, "local": 1}},
        "chunk": {"n_q": 9, "n_k": 67, "h": 4, "h_kv": 2, "causal": "bottom_right",
                  "options": {"topk": 7, "sink_keys": 2, "local": 5}},
        "none-chosen": {"n_q": 37, "n_k": 37, "causal": "bottom_right", "options": {"topk": 0, "local": 5}},
    },
    wrong={
        "largest_by_size": ("keys are chosen by the size of their score", wrong(lambda q, k, o: (q @ k.T) * (q @ k.T))),
        "first_keys_not_kept": ("one of the first keys must be chosen like others", wrong(sink=-1)),
        "nearest_one_short": ("the query's own key is not counted, and one near key is left to the choice",
                              wrong(local=1)),
        "one_less_chosen": ("one key less is chosen", wrong(count=-1)),
        "ranked_without_the_query": ("all queries choose the same keys", wrong(lambda q, k, o: (q * 0 + 1) @ k.T)),
    },
    fits=fits,
    always=frozenset({"causal_bottom_right"}),
    never=frozenset({"variable_lengths", "causal_top_left", "no_rows_or_keys"}),
)  # fmt: skip
