"""DeepSeek sparse attention: softmax attention to the keys that an indexer scores highest, by ReLUs of products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..problem import Problem
from ..rules.rule import Atom
from .loops import chosen, first, integers, products
from .option import Option, whole
from .shapes import Choices, Lowered, Selected
from .topk import fits as topk_fits
from .variant import Variant

__all__ = ["DSA"]


def scores(q: Any, k: Any, o: Any, weighed: bool = True, last: bool = False, scaled: bool = False) -> Any:
    """Return a query head's weight, its last number, times the ReLU of its product with each key by the other numbers.

    The rest is for mistakes: whether heads have weights, whether a product takes the last numbers, too, and whether it
    is scaled.
    """
    d = k.shape[1] - 1
    own = np.arange(d + last)
    s = q.columns(own) @ (o.members @ k).columns(own).T
    s = (s * o.scale if scaled else s).relu()
    return s * q.columns(np.array([d])) if weighed else s


def linear(q: Any, k: Any, o: Any) -> Any:
    """Leave the ReLU out."""
    own = np.arange(k.shape[1] - 1)
    return (q.columns(own) @ (o.members @ k).columns(own).T) * q.columns(own[-1:] + 1)


def choices(n_q: int, n_k: int, o: Any, count: int = 0, behind: int = 0) -> Choices:
    """Return keys one by one, of which a row chooses among those up to its own.

    The rest is for mistakes: so many more, and how far behind its own a row's last key is.
    """
    back = n_k - n_q - behind
    return Choices(np.arange(n_k), Atom("up to its own", lambda x: x.k <= x.q + back), None, o.topk + count)


def by_rows(p: Problem, o: Any, ties: bool = False, blind: bool = False) -> Problem:
    """Write the same by a loop over rows, on integers; blind, a mistake, if keys that nobody sees are chosen, too."""
    weight = integers(p.query)[0][..., -1:]
    s = products(p, p.d_k - 1)[0]
    s = weight * np.where(s > 0, s, 0)

    def take(s: Any, seen: Any, at: int) -> Iterator[int]:
        yield from first({j: s[:, j].sum() for j in range(at + 1) if seen[j] or blind}, o.topk, ties)

    return chosen(p, take, together=True, scores=s)


def fits(p: Problem) -> str | None:
    """Refuse calls without a place for every query, or without a product beside the weights."""
    if p.d_k < 2:
        return f"query: axis dim is {p.d_k}, expected at least 2: the last number is the weight of an index head"
    return topk_fits(p)


DEFINE = Selected(scores, choices, full={"topk": 2**31}, together=lambda o: True, alone=True)
GROUP = {"h": 4, "h_kv": 1, "causal": "bottom_right"}
DSA = Variant(
    name="dsa",
    define=DEFINE,
    forms={"by_rows": Lowered(by_rows)},
    formula="softmax attention to the topk keys j <= i of the largest  sum_h w_ih · relu(q'_ih·k'_j),  summed over the "
    "query heads h of a key head, where (q', w) is a query and k' a key without its last number",
    unit="u · sum_j p_ij |v_jc|",
    source="DeepSeek-V3.2, arXiv 2512.02556, recalled; of V3.2-Exp's report, section 1, eq. 1 and 2, a transcription "
    "was read. Its index heads have queries, a key and weights of their own. Here they are query heads beside the "
    "others, and all have one key: (k, k_index, 0), queries (q, 0, 0), index queries (0, q_index, w). A weight of 0 is "
    "a head that scores nothing, so the other heads' rows are the layer's; rows of index heads attend to the same keys "
    "(docs/functions/native.md).",
    uses=frozenset({"causal", "sink", "weight"}),
    options={"topk": Option(2048, "keys of a row", whole(1), (2048, 5, 1))},
    laws=("determinism", "batch_independence", "values_doubled", "full_budget_is_dense"),
    bugs=(
        "zeroed_head",
        "wrong_scale",
        "value_of_next_key",
        "neighbour_row",
        "output_too_narrow",
    ),
    contract=(
        "A tie goes to the lower key: where all products are at most 0, scores are 0 and the first keys are taken.",
        "All query heads of a key head read the same keys, and see the same: a weight of 0 for one of them alone is "
        "refused. A row with no more keys than topk reads them all.",
        "A row's own key is chosen like others.",
        "Gradients hold the choice fixed: those of what only the indexer reads are those of softmax attention, 0 where "
        "its columns are 0.",
        "Where a kernel's own scores cannot tell two keys apart, it may take either: the row is judged by both.",
        "A NaN or infinite number in a query or key counts as 0 in scores; a row that takes such a key is NaN.",
    ),
    has_lse=True,
    positive=True,
    cases={
        "few": {"n_q": 37, "n_k": 67, **GROUP, "options": {"topk": 5}},
        "keys-of-weight-0": {
            "n_q": 9,
            "n_k": 37,
            **GROUP,
            "weight": np.where(np.arange(37) % 3 == 1, 0.0, 1.5)[None, None, None],
            "options": {"topk": 5},
        },
        "one": {"n_q": 21, "n_k": 37, **GROUP, "options": {"topk": 1}},
        "chunk": {"n_q": 9, "n_k": 67, **GROUP, "options": {"topk": 7}},
        "items": {"b": 2, "n_q": 9, "n_k": 20, **GROUP, "h_kv": 2, "options": {"topk": 4}},
        "many": {"n_q": 9, "n_k": 259, **GROUP, "options": {"topk": 30}},
        "below-zero": {"n_q": 37, "n_k": 37, **GROUP, "scale": -0.3, "options": {"topk": 3}},
        "all": {"n_q": 21, "n_k": 37, **GROUP, "options": {"topk": 37}},
        "ties": {"n_q": 6, "n_k": 7, **GROUP, "ties": "equal", "options": {"topk": 1}},
        "near-ties": {"n_q": 6, "n_k": 7, **GROUP, "ties": "ulp", "options": {"topk": 1}},
    },
    wrong={
        "relu_left_out": ("products below 0 count", DEFINE.changed(linear)),
        "weights_left_out": (
            "index heads are added up without weights",
            DEFINE.changed(partial(scores, weighed=False)),
        ),
        "weight_in_the_product": (
            "a product takes the weights' column, too",
            DEFINE.changed(partial(scores, last=True)),
        ),
        "relu_of_the_weighed": ("the ReLU comes after the weight", DEFINE.changed(lambda *x: scores(*x).relu())),
        "each_head_chooses": ("each query head chooses for itself", replace(DEFINE, together=lambda o: False)),
        "unseen_keys_compete": (
            "keys of weight 0 are chosen like others, which leaves fewer that count",
            Lowered(by_rows).changed(blind=True),
        ),
        "signed_scale": (
            "products are scaled before the ReLU, which a scale below 0 turns",
            DEFINE.changed(partial(scores, scaled=True)),
        ),
        "own_key_not_scored": ("a query's own key is none to choose", DEFINE.changed(behind=1)),
        "one_less_chosen": ("one key less is chosen", DEFINE.changed(count=-1)),
        "all_of_a_tie": (
            "all keys at the score of the last are taken, more than topk at a tie",
            Lowered(by_rows).changed(ties=True),
        ),
    },
    fits=fits,
    narrowest=2,
    always=frozenset({"causal_bottom_right"}),
    never=frozenset({"variable_lengths", "causal_top_left", "no_rows_or_keys"}),
)
