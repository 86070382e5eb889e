"""Native sparse attention: blocks' means, chosen blocks and a window, each softmax attention, each times a gate."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import Problem
from .moba import MOBA
from .moba import fits as moba_fits
from .nsa_selected import NSA_SELECTED, choices, weights
from .nsa_selected import by_rows as selected_by_rows
from .option import Option, whole
from .shapes import Lowered, Selected
from .variant import Variant

__all__ = ["NSA", "NSA_CORES"]

GATES = 3
"""The last numbers of a query are its gates; those of a key are not read."""


def parts(x: Any) -> tuple[Any, list[Any]]:
    """Return a matrix without its last three columns, and these."""
    d = x.shape[1] - GATES
    return x.columns(np.arange(d)), [x.columns(np.array([d + i])) for i in range(GATES)]


def scores(q: Any, k: Any, o: Any) -> Any:
    """Return the softmax weights of each block's mean key, among the blocks that end at or before a query."""
    return weights(parts(q)[0] @ ((o.members @ parts(k)[0]) / o.sizes).T * o.scale, o)


def blocks(n_k: int, size: int) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Return which keys a whole block holds, (m, n_k), and the last key of each."""
    ends = np.arange(size, n_k + 1, size) - 1
    keys = np.arange(n_k)
    return (keys <= ends[:, None]) & (keys > ends[:, None] - size), ends


def attend(s: Any, seen: Any, v: Any) -> Any:
    """Return softmax attention by scores to what is seen; 0 where nothing is."""
    p = (s - s.shift(seen)).exp(where=seen)
    none = (s.zeros().sum() + 1.0).where(~seen.any(1, keepdims=True))  # their weights are all 0
    return (p @ v) / (p.sum() + none)


def branches(
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    order: tuple[int, ...] = (0, 1, 2),
    ragged: bool = False,
    last: int = 0,
    all_columns: bool = False,
) -> tuple[Any, None]:
    """Define the three branches of one head, `allowed` the keys of the chosen blocks.

    The rest is for mistakes: which gate is of which branch, whether the block that a row stands in is seen as a mean,
    how many keys more the window has, and whether products take the gates' columns, too.
    """
    (plain, gates), (keys, _) = parts(q), parts(k)
    q, k = (q, k) if all_columns else (plain, keys)
    s, behind = q @ k.T * o.scale, o.behind
    near = (behind >= 0) & (behind < o.window_keys + last)
    out = attend(s, o.allowed, v) * gates[order[1]] + attend(s, near, v) * gates[order[2]]
    members, ends = blocks(k.shape[0], o.block_size)
    if len(ends):
        mean = o.of_keys(members)
        seen = behind[:, ends] >= (1 - o.block_size if ragged else 0)
        s = q @ ((mean @ k) / o.block_size).T * o.scale
        out = out + attend(s, seen, (mean @ v) / o.block_size) * gates[order[0]]
    return out, None


def by_tokens(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    """Write the same as one weight for each token, of which a block's is the same for all its tokens.

    A block's score is the mean of its tokens' scores, and nothing is taken off before an exponential.
    """
    d = q.shape[1] - GATES
    s = q.columns(np.arange(d)) @ k.columns(np.arange(d)).T * o.scale
    w, behind = s.zeros(), o.behind
    for i, seen in ((1, o.allowed), (2, (behind >= 0) & (behind < o.window_keys))):
        p = s.exp(where=seen)
        w = w + p / p.sum() * q.columns(np.array([d + i]))
    total, each = s.zeros().sum(), []
    size = o.block_size
    for end in range(size, k.shape[0] + 1, size):
        mean = s.columns(np.arange(end - size, end)).sum() / size
        each.append(mean.exp(where=behind[:, [end - 1]] >= 0))
        total = total + each[-1]
    total = total + (total.zeros() + 1.0).where(behind[:, [min(size, k.shape[0]) - 1]] < 0)
    out = w @ v
    for c, p in enumerate(each):
        own = np.zeros(k.shape[0], bool)
        own[c * size : (c + 1) * size] = True
        spread = (s.zeros() + 1.0).where(own[None])
        out = out + (spread * (p / total * q.columns(np.array([d]))) / size) @ v
    return out, None


def core(name: str, define: Any) -> Variant:
    """Return what a call is lowered to: the branches, the choice made."""
    return Variant(
        name=name,
        define=define,
        formula=FORMULA,
        unit=UNIT,
        source=SOURCE,
        uses=frozenset({"causal", "allowed"}),
        options={n: OPTIONS[n] for n in ("block_size", "window_keys")},
        places=True,
    )


def fits(p: Problem) -> str | None:
    """Refuse what the choice refuses, queries without gates, and numbers that a mean would carry to every row."""
    if p.d_k <= GATES:
        return f"query: axis dim is {p.d_k}, expected at least {GATES + 1}: the last {GATES} numbers are the gates"
    if wrong := moba_fits(p):
        return wrong
    p = p.to("numpy")
    for name in ("query", "key", "value"):
        if not np.isfinite(np.asarray(getattr(p, name), np.float64)).all():
            return f"{name}: has NaN or inf, which the means of blocks carry to every later row; remove it"
    return None


def by_rows(p: Problem, o: Any, **change: Any) -> Problem:
    """Write the choice by a loop over rows, and the branches by tokens."""
    taken = selected_by_rows(p, o, columns=p.d_k - GATES, **change)
    own = {"block_size": o.block_size, "window_keys": o.window_keys}
    return taken.replace(variant="nsa_by_tokens", options=own)


def sigmoids(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    """Take gates through a sigmoid, which they have been through."""
    gate = np.arange(q.shape[1]) >= q.shape[1] - GATES
    return branches(q.where(~gate[None]) + q.sigmoid().where(gate[None]), k, v, o)


OPTIONS = {
    **NSA_SELECTED.options,
    "window_keys": Option(128, "keys of the window, the row's own counted", whole(1), (128, 5, 1)),
}
FORMULA = (
    "out_i = g_i1 · attention to the means of the blocks that end at or before i + g_i2 · attention to the keys of the "
    "chosen blocks + g_i3 · attention to the nearest window_keys keys, where (q_i, g_i) is a query and k_j a key "
    "without its last three numbers; blocks are chosen as nsa_selected does"
)
UNIT = "u · sum_b |g_ib| sum_j p_bij |v_jc|"
SOURCE = (
    "Yuan et al., Native Sparse Attention, arXiv 2502.11089, section 3.3, recalled, with the mean in place of its "
    "learned compression, as in SSA's release (modeling_llama_nsa.py, parallel.py), which was read. The gates are a "
    "query's last three numbers, in the order compressed, chosen, window; in a layer sigmoids of a linear map."
)
DEFINE = Selected(scores, choices, full={"topk": 2**31}, together=lambda o: True, core="nsa_branches")
WRONG_BRANCHES: dict[str, tuple[str, Any]] = {
    "gates_turned": ("the first two gates change places", partial(branches, order=(1, 0, 2))),
    "unfinished_block_seen": ("the mean of the block that a row stands in is seen", partial(branches, ragged=True)),
    "window_of_one_more": ("the window has a key more", partial(branches, last=1)),
    "gates_through_a_sigmoid": ("gates are taken through a sigmoid, which they have been through", sigmoids),
    "gates_in_the_product": ("products take the gates' columns, too", partial(branches, all_columns=True)),
}
NSA_CORES = (
    core("nsa_branches", branches),
    core("nsa_by_tokens", by_tokens),
    *(core(f"nsa_{n}", define) for n, (_, define) in WRONG_BRANCHES.items()),
)
CAUSAL = {"causal": "bottom_right"}
GROUP = {"h": 2, "h_kv": 1, "d": 11, **CAUSAL}
NSA = Variant(
    name="nsa",
    define=DEFINE,
    forms={"by_rows": Lowered(by_rows)},
    formula=FORMULA,
    unit=UNIT,
    source=SOURCE,
    compared="none yet; its choice is nsa_selected's, which was",
    uses=frozenset({"causal"}),
    options=OPTIONS,
    laws=("determinism", "batch_independence", "values_doubled", "full_budget_is_dense"),
    bugs=tuple(n for n in MOBA.bugs if n not in ("allowed_ignored", "own_key_dropped")),
    contract=(
        "scale None is 1/sqrt(d_k), d_k with the three gates: pass the layer's own.",
        "Gates may be any numbers. A key's last three numbers are not read: their gradient is 0.",
        "A tie goes to the lower block. Blocks are chosen as by nsa_selected: softmaxes weigh the means of whole ones.",
        "Where no block ends yet, the first branch is 0. A block longer than the keys is none of the means.",
        "Means are exact: a kernel that keeps them in a narrow type is judged by what that loses.",
        "Where a kernel's own weights cannot tell two blocks apart, it may take either: the row is judged by both.",
        "Gradients hold the choice fixed: none goes through the choice; the first branch has its own.",
        "NaN and infinite numbers are refused: means would carry them to every later row.",
    ),
    cases={
        "group": {
            "n_q": 19, "n_k": 29, **GROUP, "h": 4, "h_kv": 2,
            "options": {"block_size": 4, "topk": 3, "window_keys": 7},
        },
        "ties": {
            "n_q": 8, "n_k": 14, **GROUP, "d": 8, "ties": "equal",
            "options": {"block_size": 3, "topk": 2, "window_keys": 4},
        },
        "near-ties": {
            "n_q": 8, "n_k": 14, **GROUP, "d": 8, "ties": "ulp",
            "options": {"block_size": 3, "topk": 2, "window_keys": 4},
        },
        "items": {
            "b": 2, "n_q": 9, "n_k": 19, **CAUSAL, "d": 11,
            "options": {"block_size": 4, "topk": 2, "window_keys": 5},
        },
        "own-block-only": {"n_q": 20, "n_k": 20, **GROUP, "options": {"block_size": 8, "topk": 1, "window_keys": 1}},
        "more-than-there-are": {"n_q": 19, "n_k": 37, **GROUP},
        "one-block": {"n_q": 11, "n_k": 11, **GROUP, "options": {"block_size": 11, "topk": 1, "window_keys": 3}},
        "no-whole-block": {"n_q": 7, "n_k": 11, **GROUP, "options": {"block_size": 12, "window_keys": 4}},
        "forced": {
            "n_q": 11, "n_k": 41, **GROUP,
            "options": {"block_size": 4, "topk": 4, "forced": "first_previous_own", "window_keys": 9},
        },
        "below-zero": {
            "n_q": 13, "n_k": 23, **GROUP, "scale": -0.3,
            "options": {"block_size": 4, "topk": 3, "window_keys": 6},
        },
        "ragged": {"n_q": 11, "n_k": 33, **GROUP, "options": {"block_size": 7, "topk": 2, "window_keys": 13}},
    },
    wrong={
        **{n: (text, replace(DEFINE, core=f"nsa_{n}")) for n, (text, _) in WRONG_BRANCHES.items()},
        "each_head_chooses": ("each query head chooses for itself", replace(DEFINE, together=lambda o: False)),
        "own_block_counted_apart": ("topk blocks are chosen beside the forced ones", DEFINE.changed(count=1)),
        "all_of_a_tie": (
            "all blocks at the score of the last are taken, more than topk at a tie",
            Lowered(by_rows).changed(ties=True),
        ),
    },
    fits=fits,
    tries=lambda n_q, n_k: (
        {"block_size": 4, "topk": 3, "window_keys": 5},
        {"block_size": 2, "topk": 2, "window_keys": 1},
        {"block_size": 7, "topk": 4, "forced": "first_previous_own", "window_keys": 3},
    ),
    narrowest=GATES + 1,
    always=frozenset({"causal_bottom_right"}),
    never=frozenset({"variable_lengths", "causal_top_left", "no_rows_or_keys"}),
)  # fmt: skip
