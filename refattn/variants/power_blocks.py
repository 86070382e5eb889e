"""PowerAttention: softmax attention whose blocks of keys lie a power of two of blocks behind."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..masks import both
from ..problem import Problem
from ..rules import Rule, behind, sinks
from .option import Option, whole
from .shapes import Lowered
from .softmax import attention
from .variant import COMMON_BUGS, COMMON_LAWS, Variant, unplaced

__all__ = ["POWER_BLOCKS", "block_mask"]


def block_rule(n_q: int, n_k: int, block: int, window: int, sink: int) -> Rule:
    """Return which keys a row's blocks hold: 0 or a power of two of blocks behind, near ones, first ones.

    Rows are aligned to the bottom right: the last query stands at the last key.
    """
    most = -(-n_k // block)
    near = {0, *(2**e for e in range(most.bit_length())), *range(min(window, most))}
    kept = sinks(min(sink, most) * block) & behind(range(most + 1), block)
    return behind(sorted(near), block) | kept


def block_mask(n_q: int, n_k: int, block: int, window: int, sink: int) -> NDArray[np.bool_]:
    """Return it as an array, (n_q, n_k)."""
    return block_rule(n_q, n_k, block, window, sink).dense(n_q, n_k)


def lower(p: Problem, o: Any, blocks: Any = block_rule) -> Problem:
    """Write the blocks as a mask."""
    rule = blocks(p.n_q, p.n_k, o.block_size, o.window_blocks, o.sink_blocks)
    return p.replace(variant="softmax", options={}, allowed=both(p.allowed, rule))


def by_blocks(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    """Write the same as softmax over a mask that a loop over blocks makes."""
    n_q, n_k = q.shape[0], k.shape[0]
    seen = np.zeros((n_q, n_k), bool)
    for i in range(n_q):
        own = (i + n_k - n_q) // o.block_size
        for b in range(own + 1):
            near = own - b < o.window_blocks or b < o.sink_blocks
            if near or own - b in (0, *(2**e for e in range(own.bit_length() + 1))):
                seen[i, b * o.block_size : (b + 1) * o.block_size] = True
    o.allowed = o.allowed & seen
    return attention(q, k, v, o)


def fits(p: Problem) -> str | None:
    """Refuse calls without a place for every query."""
    if p.causal == "top_left" and p.n_q != p.n_k:
        return unplaced(p, "blocks") or "causal: blocks count from the bottom right; set causal='bottom_right'"
    return unplaced(p, "blocks")


def without_one(n_q: int, n_k: int, block: int, window: int, sink: int) -> Rule:
    """Leave out the block before, unless the window has it: 1 is a power of two."""
    found = block_rule(n_q, n_k, block, window, sink)
    return found if window > 1 else found & (~behind([1], block) | sinks(sink * block))


SIZES = {"block_size": 8, "window_blocks": 2, "sink_blocks": 1}
DEFINE = Lowered(lower)
POWER_BLOCKS = Variant(
    name="power_blocks",
    define=DEFINE,
    forms={"by_blocks": by_blocks},
    formula="softmax attention of row i in block a to the keys of blocks b with a - b = 0, 1, 2, 4, 8, ...,  "
    "a - b < window_blocks,  or b < sink_blocks",
    unit="u · sum_j p_ij |v_jc|",
    source="PowerAttention, arXiv 2503.03588, section 3 and the README were read; no code was released.",
    uses=frozenset({"causal", "softcap", "sink", "bias", "allowed", "weight"}),
    options={
        "block_size": Option(256, "keys of a block; the last may be shorter", whole(1), (256, 8, 1)),
        "window_blocks": Option(5, "how many nearest blocks a row sees, its own counted", whole(0), (5, 7, 0)),
        "sink_blocks": Option(1, "how many first blocks every row sees", whole(0), (1, 0, 2)),
    },
    laws=tuple(n for n in COMMON_LAWS if n != "key_permutation"),
    bugs=tuple(n for n in COMMON_BUGS if n not in ("window_off_by_one", "window_ignored", "sequences_joined")),
    contract=("A row without any key gives out 0 and lse -inf.", "A row's own block is always among its blocks."),
    has_lse=True,
    positive=True,
    cases={
        "blocks": {"n_q": 67, "n_k": 67, "causal": "bottom_right", "options": SIZES},
        "blocks-of-one": {"n_q": 37, "n_k": 67, "options": {"block_size": 1, "window_blocks": 0, "sink_blocks": 0}},
        # 6 behind is no power of two, and neither are 5 and 7: a window that is one block off shows
        "near-blocks": {"n_q": 67, "n_k": 67, "options": {"block_size": 4, "window_blocks": 7, "sink_blocks": 0}},
        "far-blocks": {"n_q": 5, "n_k": 515, "options": {"block_size": 1, "window_blocks": 0, "sink_blocks": 0}},
        "no-window": {"n_q": 131, "n_k": 131, "options": {**SIZES, "window_blocks": 0, "sink_blocks": 2}},
    },
    wrong={
        "one_behind_left_out": (
            "the block before is left out: 1 is a power of two",
            DEFINE.changed(blocks=without_one),
        ),
        "window_one_more": (
            "one near block more is seen",
            DEFINE.changed(blocks=lambda a, b, c, w, s: block_rule(a, b, c, w + 1, s)),
        ),
        "first_blocks_hidden": (
            "no first block is kept",
            DEFINE.changed(blocks=lambda a, b, c, w, s: block_rule(a, b, c, w, 0)),
        ),
        "powers_of_tokens": (
            "powers of two count tokens, not blocks",
            DEFINE.changed(blocks=lambda a, b, c, w, s: block_rule(a, b, 1, w * c, s * c)),
        ),
    },
    fits=fits,
    never=frozenset({"variable_lengths", "causal_top_left", "window"}),
)
