"""Block-sparse softmax attention: a mask says for each block of queries which blocks of keys it sees."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..masks import both
from ..problem import Problem
from ..rules import Rule
from ..rules.atoms import labelled
from .option import Option, whole
from .shapes import Lowered
from .variant import COMMON_BUGS, COMMON_LAWS, Variant, packed

__all__ = ["BLOCK_SPARSE"]

EXPECTED = "None, a tuple of rows of True and False, or a tuple of such tuples, one for each query head"


def rule_of(p: Problem, o: Any, late: bool = False, turned: bool = False, one: bool = False) -> Rule:
    """Return which keys a row sees, for all heads or for each; what follows the options is for mistakes."""
    blocks = by_heads(o.blocks)
    if one:
        blocks = np.broadcast_to(blocks[:1], blocks.shape)
    size_q, size_k = (o.block_k, o.block_q) if turned else (o.block_q, o.block_k)
    row, key = np.arange(p.n_q), np.arange(p.n_k)
    if late:
        row = row + -p.n_q % size_q
    at = np.minimum(row // size_q, blocks.shape[1] - 1), np.minimum(key // size_k, blocks.shape[2] - 1)
    return labelled(blocks, *at)


def by_heads(blocks: Any) -> NDArray[np.bool_]:
    """Return block masks as an array (1 or h_q, blocks of queries, blocks of keys)."""
    found = np.array(blocks, bool)
    return found[None] if found.ndim == 2 else found


def lower(p: Problem, o: Any, **change: bool) -> Problem:
    """Write the blocks as a mask."""
    allowed = p.allowed if o.blocks is None else both(p.allowed, rule_of(p, o, **change))
    return p.replace(variant="softmax", options={}, allowed=allowed)


def by_loops(p: Problem, o: Any) -> Problem:
    """Write the same mask by loops over heads and blocks."""
    masks = () if o.blocks is None else (o.blocks,) if isinstance(o.blocks[0][0], bool) else o.blocks
    seen = np.full((1, len(masks) or 1, p.n_q, p.n_k), o.blocks is None)
    for h, blocks in enumerate(masks):
        for a, row in enumerate(blocks):
            for b, on in enumerate(row):
                seen[0, h, a * o.block_q : (a + 1) * o.block_q, b * o.block_k : (b + 1) * o.block_k] = on
    return p.replace(variant="softmax", options={}, allowed=both(p.allowed, seen))


def mask_of_blocks(value: Any, heads: int) -> str | None:
    """Check for a block mask, or one for each query head."""
    if value is None:
        return None
    rows = (value,) if _is_mask(value) else value
    ok = isinstance(rows, tuple) and len(rows) in (1, heads) and all(_is_mask(x) for x in rows)
    return None if ok and len({(len(x), len(x[0])) for x in rows}) == 1 else EXPECTED


def _is_mask(x: Any) -> bool:
    rows = isinstance(x, tuple) and x and all(isinstance(row, tuple) and row for row in x)
    return bool(rows) and len({len(row) for row in x}) == 1 and all(isinstance(y, bool) for row in x for y in row)


def fits(p: Problem) -> str | None:
    """Refuse block masks of another size than the call's."""
    blocks = p.options.get("blocks")
    if blocks is None or p.cu_seqlens_q is not None:
        return packed(p, "blocks")
    sizes = [p.options.get(n, OPTIONS[n].default) for n in ("block_q", "block_k")]
    expected = tuple(-(-n // size) for n, size in zip((p.n_q, p.n_k), sizes, strict=True))
    got = by_heads(blocks).shape[1:]
    if got != expected:
        return f"blocks: got {got[0]} by {got[1]} blocks of {sizes[0]} queries and {sizes[1]} keys, expected {expected}"
    return None


def tries(n_q: int, n_k: int) -> list[dict[str, Any]]:
    """Return block masks for a call of some size."""
    found: list[dict[str, Any]] = [{}]
    for size_q, size_k in ((1, 2), (2, 1), (4, 3)):
        rows = range(-(-n_q // size_q))
        blocks = tuple(tuple((a * 5 + b * 3) % 4 != 1 for b in range(-(-n_k // size_k))) for a in rows)
        if blocks and blocks[0]:
            found.append({"blocks": blocks, "block_q": size_q, "block_k": size_k})
    return found


def scattered(n_q: int, n_k: int, block_q: int, block_k: int, seed: int, heads: int = 0) -> dict[str, Any]:
    """Return options of a case: about half of the blocks, at random, and a row of blocks that sees none."""
    shape = (max(heads, 1), -(-n_q // block_q), -(-n_k // block_k))
    mask = np.random.default_rng(seed).random(shape) < 0.5
    mask[:, -1, -1] = True
    mask[:, 1] = False
    blocks = tuple(tuple(tuple(map(bool, row)) for row in x) for x in mask)
    return {"blocks": blocks if heads else blocks[0], "block_q": block_q, "block_k": block_k}


OPTIONS = {
    "blocks": Option(
        None, "which blocks of keys each block of queries sees; None is all", mask_of_blocks,
        (None, ((True, False), (True, True))), by_head=False,
    ),
    "block_q": Option(128, "queries of a block; the last may be shorter", whole(1), (128, 15)),
    "block_k": Option(128, "keys of a block; the last may be shorter", whole(1), (128, 25)),
}  # fmt: skip
DEFINE = Lowered(lower)
BLOCK_SPARSE = Variant(
    name="block_sparse",
    define=DEFINE,
    forms={"by_loops": Lowered(by_loops)},
    formula="softmax attention of row i to the keys j with blocks[i // block_q][j // block_k]",
    unit="u · sum_j p_ij |v_jc|",
    source="Dao et al., FlashAttention, arXiv 2205.14135, section 3.3, with blocks of any size; the release has blocks "
    "of 16 by 256, and rounds the number of keys up to 256.",
    compared="refattn.gpu.attention(block_mask=), in tests/gpu",
    uses=frozenset({"causal", "window", "softcap", "sink", "bias", "allowed", "weight"}),
    options=OPTIONS,
    laws=tuple(n for n in COMMON_LAWS if n != "key_permutation"),
    bugs=tuple(n for n in COMMON_BUGS if n != "sequences_joined"),
    contract=(
        "Blocks count from the first query and the first key, whatever the causal corner.",
        "A row that sees no key gives out 0 and lse -inf.",
    ),
    has_lse=True,
    positive=True,
    cases={
        "scattered": {"n_q": 67, "n_k": 67, "options": scattered(67, 67, 16, 8, 0)},
        "wide-blocks": {"n_q": 67, "n_k": 61, "options": scattered(67, 61, 8, 24, 1)},
        "by-head": {"n_q": 37, "n_k": 67, "h": 4, "h_kv": 2, "options": scattered(37, 67, 8, 16, 2, heads=4)},
        "causal-blocks": {"n_q": 37, "n_k": 67, "causal": "bottom_right", "options": scattered(37, 67, 16, 16, 3)},
        "many-blocks": {"n_q": 9, "n_k": 141, "options": scattered(9, 141, 3, 2, 5)},
        "large-blocks": {"n_q": 37, "n_k": 259, "options": scattered(37, 259, 8, 80, 6)},
        "blocks-of-one": {"n_q": 21, "n_k": 37, "options": scattered(21, 37, 1, 1, 4)},
    },
    wrong={
        "blocks_from_the_last_query": ("blocks of queries count from the last one", DEFINE.changed(late=True)),
        "block_sizes_swapped": ("block_q and block_k are swapped", DEFINE.changed(turned=True)),
        "mask_of_the_first_head": ("all heads take the blocks of the first", DEFINE.changed(one=True)),
        "blocks_ignored": (
            "the mask of blocks is not read",
            Lowered(lambda p, o: p.replace(variant="softmax", options={})),
        ),
    },
    fits=fits,
    tries=tries,
    never=frozenset({"variable_lengths"}),
)
