"""HyperAttention: softmax attention to a query's own block of sorted keys, and to a sample that stands for the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import Problem
from .option import Option, one_of, whole
from .shapes import Rows
from .variant import Variant, packed

__all__ = ["HYPER"]

Whole = NDArray[np.int64]
ORDER = "None or a tuple of one permutation, or one for each query head: a tuple of the places 0 to n - 1"
DRAWN = "None or a tuple of one tuple of places from 0 on, or one for each query head"


def counts(n_q: int, n_k: int, o: Any, sizes: bool = False, back: bool = True, sort: bool = True) -> tuple[Whole, ...]:
    """Return which of the blocks each query and each key is in, and how often each key was drawn.

    The rest is for mistakes: whether blocks are cut at multiples of their size, whether a query's block is the one of
    its place after sorting, and whether a drawn place is one among sorted keys.
    """
    blocks = -(-n_k // o.block_size)
    order_q, order_k = np.arange(n_q) if o.order_q is None else o.order_q, _order(n_k, o)
    rank_q, rank_k = np.argsort(order_q) if back else np.asarray(order_q, np.int64), np.argsort(order_k)
    of_q, of_k = (rank // o.block_size if sizes else rank * blocks // n for rank, n in ((rank_q, n_q), (rank_k, n_k)))
    often = np.bincount(np.array(o.drawn or (), np.int64), minlength=n_k)
    return of_q, of_k, often[rank_k] if sort else often


def weights(n_q: int, n_k: int, o: Any, rest: bool = True, once: bool = False, **change: bool) -> tuple[Whole, int]:
    """Return how often each row counts each key, as whole numbers over one denominator, the number of draws.

    The rest is for mistakes: whether a draw counts n_k over the draws, and whether a key counts once however often it
    was drawn.
    """
    of_q, of_k, often = counts(n_q, n_k, o, **change)
    own, draws = of_q[:, None] == of_k, len(o.drawn or ())
    if not draws or -(-n_k // o.block_size) == 1:
        return own.astype(np.int64), 1
    often = (np.minimum(often, 1) if once else often) * (n_k if rest else draws)
    return np.where(own, draws + (often if o.mode == "released" else 0), often), draws


def attention(q: Any, k: Any, v: Any, o: Any, **change: bool) -> tuple[Any, Any]:
    """Define the attention of one head."""
    often, over = weights(o.queries, k.shape[0], o, **change)
    s = q @ k.T * o.scale
    m = s.shift(o.allowed)
    p = (s - m).exp(where=o.allowed) * (o.matrix(often[o.rows]) / over)
    z = p.sum()
    return (p @ v) / z, m + z.log()


def by_parts(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    """Write the same as a loop over blocks, then over draws, whose sums are added and divided at last."""
    n_q, n_k = o.queries, k.shape[0]
    blocks = -(-n_k // o.block_size)
    order_q, order_k = list(range(n_q)) if o.order_q is None else o.order_q, _order(n_k, o)
    s = q @ k.T * o.scale
    m = s.shift(o.allowed)
    p = (s - m).exp(where=o.allowed)
    own = np.zeros((n_q, n_k), bool)
    for b in range(blocks):
        keys = [place for place in range(n_k) if place * blocks // n_k == b]
        for place in range(n_q):
            if place * blocks // n_q == b:
                own[order_q[place], [order_k[x] for x in keys]] = True
    z, out, drawn = p.where(own[o.rows]).sum(), p.where(own[o.rows]) @ v, o.drawn or () if blocks > 1 else ()
    for place in drawn:
        one = np.zeros((n_q, n_k), bool)
        one[:, order_k[place]] = True if o.mode == "released" else ~own[:, order_k[place]]
        part = p.where(one[o.rows]) * n_k / len(drawn)
        z, out = z + part.sum(), out + part @ v
    return out / z, m + z.log()


def _order(n_k: int, o: Any) -> Any:
    return list(range(n_k)) if o.order_k is None else o.order_k


def orders(value: Any, heads: int) -> str | None:
    """Check for None, or permutations."""
    ok = value is None or (isinstance(value, tuple) and len(value) in (1, heads) and all(_permutes(x) for x in value))
    return None if ok else ORDER


def _permutes(x: Any) -> bool:
    return isinstance(x, tuple) and all(whole(0)(y, 0) is None for y in x) and sorted(x) == list(range(len(x)))


def places(value: Any, heads: int) -> str | None:
    """Check for None, or tuples of places."""
    ok = value is None or (isinstance(value, tuple) and len(value) in (1, heads) and all(_places(x) for x in value))
    return None if ok else DRAWN


def _places(x: Any) -> bool:
    return isinstance(x, tuple) and bool(x) and all(whole(0)(y, 0) is None for y in x)


def fits(p: Problem) -> str | None:
    """Refuse orders of another length than the call's, and places past the last key."""
    for name, n, axis in (("order_q", p.n_q, "queries"), ("order_k", p.n_k, "keys")):
        lengths = {len(x) for x in p.options.get(name) or ()}
        if lengths - {n}:
            return f"{name}: got {max(lengths - {n})} places, expected one for each of {n} {axis}"
    last = max((max(x) for x in p.options.get("drawn") or ()), default=0)
    if last >= max(p.n_k, 1):
        return f"drawn: got the place {last}, expected at most {p.n_k - 1}, that of the last of {p.n_k} sorted keys"
    return packed(p, "blocks")


def turned(n: int, step: int, first: int = 0) -> tuple[int, ...]:
    """Return a permutation for a case: steps through 0 to n - 1, which have no divisor in common."""
    return tuple((first + step * i) % n for i in range(n))


def tries(n_q: int, n_k: int) -> list[dict[str, Any]]:
    """Return options for a call of some size: with one block, with blocks alone, and with draws."""
    if not n_q or not n_k:
        return [{}]
    orders = {"order_q": (turned(n_q, 1, 1),), "order_k": (tuple(reversed(range(n_k))),)}
    found: list[dict[str, Any]] = [{}, {"block_size": 2}, {"block_size": 3, **orders}]
    drawn = (tuple(i * i % n_k for i in range(1, 6)),)
    return [*found, {"block_size": 2, **orders, "drawn": drawn}, {"block_size": 3, "drawn": drawn, "mode": "released"}]


def wrong(text: str, **change: bool) -> tuple[str, Rows]:
    """Return a mistake in how often keys count."""
    return text, Rows(lambda q, k, v, o: attention(q, k, v, o, **change), together=True)


def again(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    """Count drawn keys of the own block again, as the release does."""
    o.mode = "released"
    return attention(q, k, v, o)


SORTED = {"order_q": (turned(37, 5, 3),), "order_k": (turned(61, 7, 2),)}
DRAWS = (3, 60, 17, 17, 0, 41, 28, 9, 52, 17, 33)
HYPER = Variant(
    name="hyper",
    define=Rows(attention, together=True),
    forms={"by_parts": Rows(by_parts, together=True)},
    formula="out_i = sum_j w_ij exp(s_ij) v_j / sum_j w_ij exp(s_ij),  s_ij = scale·q_i·k_j,  w_ij = 1 for a key of "
    "row i's block, else n_k / m times how often it is among m draws;  blocks are of sorted queries and keys",
    unit="u · sum_j p_ij |v_jc|",
    source="Han et al., HyperAttention, arXiv 2310.05869, of which the opening was read, and hyper_attn.py of the "
    "release. The call brings what sorts (refattn.functions.hyper.angular_hash) and what was drawn; its causal form "
    "is calls of these (refattn.functions.hyper.hyper_attention).",
    compared="refattn.functions.hyper.hyper_weight, which was run beside the release at 68b91e9",
    uses=frozenset(),
    options={
        "block_size": Option(256, "keys of a block, at most; blocks are of nearly equal sizes", whole(1), (256, 8, 1),
                             places=True),
        "order_q": Option(None, "the queries as they are sorted, for all heads or for each; None is as they come",
                          orders, (None,), places=True),
        "order_k": Option(None, "the keys as they are sorted, likewise", orders, (None,), places=True),
        "drawn": Option(None, "places among the sorted keys, drawn with replacement, likewise; None draws none",
                        places, (None,), places=True),
        "mode": Option("paper", "paper: a drawn key of the own block counts once; released: once more for each draw",
                       one_of("paper", "released"), ("paper", "released")),
    },
    laws=("determinism", "grouped_heads", "batch_independence", "batch_invariance", "values_doubled"),
    families=("gaussian", "peaked", "drift", "ragged"),
    bugs=("zeroed_head", "wrong_scale", "heads_tiled", "last_key_dropped", "value_of_next_key",
          "neighbour_row", "output_too_narrow"),
    contract=(
        "Place i of n sorted queries or keys is in block i·b // n, b = ceil(n_k / block_size): no block is empty.",
        "Where there is one block, every key counts once, whatever was drawn.",
        "A key that is drawn several times counts as often.",
        "There are no masks: a call whose keys are hidden is softmax attention with `weight` and `allowed`.",
        "What a NaN or an infinite number does in a key that a row does not count is not said.",
        "The lse is that of the weighted sum.",
        "Gradients hold the order and the draws fixed: none goes through what sorts.",
    ),
    has_lse=True,
    cases={
        "blocks": {"n_q": 37, "n_k": 61, "options": {"block_size": 8, **SORTED}},
        "drawn": {"n_q": 37, "n_k": 61, "options": {"block_size": 8, **SORTED, "drawn": (DRAWS,)}},
        "by-head": {
            "n_q": 21, "n_k": 36, "h": 4, "h_kv": 2,
            "options": {
                "block_size": 5,
                "order_q": tuple(turned(21, s, s) for s in (1, 2, 4, 5)),
                "order_k": tuple(turned(36, s, s) for s in (5, 7, 1, 11)),
                "drawn": ((3, 4, 3), (35, 0, 20, 7), (9,), (9, 9, 9, 9, 1)),
            },
        },
        "one-draw": {"n_q": 37, "n_k": 61, "options": {"block_size": 30, **SORTED, "drawn": ((44,),)}},
        "one-block": {"n_q": 9, "n_k": 20, "options": {"block_size": 20, "drawn": ((3, 3, 19),)}},
        "blocks-of-one": {"n_q": 37, "n_k": 61, "options": {"block_size": 1, **SORTED, "drawn": (DRAWS[:4],)}},
        "released": {
            "n_q": 37, "n_k": 61, "options": {"block_size": 16, **SORTED, "drawn": (DRAWS,), "mode": "released"},
        },
    },
    wrong={
        "own_keys_drawn_again": ("a drawn key of the own block counts again, as in the release",
                                 Rows(again, together=True)),
        "draws_count_once": wrong("a draw counts once, not n_k over the draws", rest=False),
        "repeats_count_once": wrong("a key that is drawn several times counts once", once=True),
        "places_of_unsorted_keys": wrong("drawn places are taken among the keys as they came", sort=False),
        "rows_left_sorted": wrong("a query takes the block of its number in the order, not of its place", back=False),
        "blocks_cut_by_size": wrong("blocks are cut at multiples of block_size, so that the last is short", sizes=True),
    },
    fits=fits,
    tries=tries,
    never=frozenset({"variable_lengths", "no_rows_or_keys"}),
)  # fmt: skip
