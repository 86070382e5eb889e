"""The mask of Titans' memory as context: persistent keys, then causal attention in segments or in a sliding window."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..masks import both
from ..problem import Problem
from ..rules import Rule
from ..rules.rule import Atom
from .option import Option, boolean, whole
from .shapes import Lowered
from .softmax import attention
from .variant import COMMON_BUGS, COMMON_LAWS, Variant, packed

__all__ = ["TITANS_MAC", "segment_mask"]


def segment_rule(
    persistent: int, segment: int, sliding: bool, start: int = 0, far: int = 0, always: bool = True
) -> Rule:
    """Return which keys a token sees: the first ones always, of the others those of its segment up to it.

    The last query stands at the last key. The rest is for mistakes: `start` moves segments, `far` makes a sliding
    window longer, `always` is whether tokens of all segments see the persistent keys.
    """

    def formula(x: Any) -> Any:
        token, key = x.behind("bottom_right") - persistent, x.k - persistent
        near = token - key <= segment + far if sliding else (token + start) // segment == (key + start) // segment
        kept = key < 0
        return (kept if always else kept & near) | (~kept & (key <= token) & near)

    return Atom(f"segments({persistent}, {segment}, {sliding})", formula)


def segment_mask(n_q: int, n_k: int, persistent: int, segment: int, sliding: bool) -> NDArray[np.bool_]:
    """Return it as an array, (n_q, n_k)."""
    return segment_rule(persistent, segment, sliding).dense(n_q, n_k)


def lower(p: Problem, o: Any, from_first: bool = False, **change: Any) -> Problem:
    """Write the segments as a mask; a mistake is that they count from the first key."""
    if from_first:
        change["start"] = o.persistent
    rule = segment_rule(o.persistent, o.segment, o.sliding, **change)
    return p.replace(variant="softmax", options={}, allowed=both(p.allowed, rule))


def by_segments(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    """Write the same as softmax over a mask that a loop over segments, or over tokens, makes."""
    n_q, n_k = q.shape[0], k.shape[0]
    seen = np.zeros((n_k - o.persistent, n_k), bool)
    seen[:, : o.persistent] = True
    for first in range(0, len(seen), 1 if o.sliding else o.segment):
        rows = slice(first, first + 1 if o.sliding else first + o.segment)
        oldest = max(first - o.segment, 0) if o.sliding else first
        width = seen[rows].shape[0]
        seen[rows, o.persistent + oldest : o.persistent + first + width] = np.tri(
            width, first - oldest + width, first - oldest, dtype=bool
        )
    o.allowed = o.allowed & seen[len(seen) - n_q :]
    return attention(q, k, v, o)


def fits(p: Problem) -> str | None:
    """Refuse calls in which a query has no key of its own."""
    persistent = p.options.get("persistent", 0)
    if p.n_q + persistent > p.n_k:
        return packed(p, "segments") or (
            f"key: axis seq is {p.n_k}, expected at least {p.n_q + persistent}: {persistent} persistent keys, and one "
            f"for each of {p.n_q} queries"
        )
    return packed(p, "segments")


DEFINE = Lowered(lower)
TITANS_MAC = Variant(
    name="titans_mac",
    define=DEFINE,
    forms={"by_segments": by_segments},
    formula="softmax attention of token t to the first `persistent` keys, and to the tokens s <= t of its segment "
    "(s // segment = t // segment), or with t - s <= segment where it slides",
    unit="u · sum_j p_ij |v_jc|",
    source="Behrouz et al., Titans, arXiv 2501.00663, section 4.1; create_mac_block_mask of titans-pytorch 0.5.5 was "
    "read. Memory tokens are keys like others: put them where the call has them.",
    compared="titans-pytorch 0.5.5: the same keys, in segments and sliding (tests/peers/test_titans.py)",
    uses=frozenset({"softcap", "sink", "bias", "allowed", "weight"}),
    options={
        "persistent": Option(0, "first keys, which every token sees", whole(0), (0, 3)),
        "segment": Option(512, "tokens of a segment, or how far back a sliding window reaches", whole(1), (512, 8, 1)),
        "sliding": Option(False, "whether a window slides in place of segments", boolean, (False, True)),
    },
    laws=tuple(n for n in COMMON_LAWS if n not in ("key_permutation", "past_31_bits", "row_invariance")),
    bugs=tuple(n for n in COMMON_BUGS if not {"causal", "window", "own", "sequences", "empty"} & set(n.split("_"))),
    contract=(
        "Segments count from the first key that is not persistent.",
        "A sliding window holds segment + 1 tokens, the token's own among them.",
        "No row is empty, unless `allowed` makes it so: it gives out 0 and lse -inf.",
    ),
    has_lse=True,
    positive=True,
    cases={
        "segments": {"n_q": 67, "n_k": 67, "options": {"segment": 16}},
        "persistent": {"n_q": 61, "n_k": 67, "h": 4, "h_kv": 2, "options": {"segment": 16, "persistent": 5}},
        "chunk": {"n_q": 21, "n_k": 67, "options": {"segment": 16, "persistent": 5}},
        "sliding": {"n_q": 61, "n_k": 67, "options": {"segment": 9, "persistent": 3, "sliding": True}},
        "odd-segments": {"n_q": 61, "n_k": 81, "options": {"segment": 12, "persistent": 20}},
        "far-sliding": {"n_q": 5, "n_k": 803, "options": {"segment": 700, "sliding": True}},
        "alone": {"n_q": 33, "n_k": 37, "options": {"segment": 1, "persistent": 2}},
    },
    wrong={
        "segments_from_the_first_key": (
            "segments count from the first key, the persistent ones among them",
            DEFINE.changed(from_first=True),
        ),
        "sliding_one_short": ("a sliding window holds `segment` tokens, one less", DEFINE.changed(far=-1)),
        "sliding_one_more": ("a sliding window reaches one token further back", DEFINE.changed(far=1)),
        "persistent_keys_in_a_window": (
            "persistent keys are seen only where the window reaches",
            DEFINE.changed(always=False),
        ),
    },
    fits=fits,
    never=frozenset({"variable_lengths", "causal_bottom_right", "causal_top_left", "window"}),
)
