"""Calls that models in use make, the same in every run: what is drawn comes on top of them.

Lengths are shorter than in use where nothing but time depends on them, and lie beside the edges of tiles.
"""

from __future__ import annotations

from ..model import Capabilities
from .calls import Call

__all__ = ["LONGER", "LONGEST", "MODELS", "known"]

DOWN = "bottom_right"
MODELS: dict[str, tuple[Call, bool]] = {
    # Llama 3: groups of 4; cached keys in (batch, seq, head, dim); late keys that outweigh all before them
    "llama-decode": (Call("decode", 3, 8, 2, ((1, 4097),), 128, 128, "needles", "bshd", causal=DOWN), False),
    "llama-prefill": (Call("prefill", 2, 4, 1, ((257, 257),), 128, 128, "jump", "fused", causal=DOWN), True),
    "llama-chunk": (Call("chunk", 1, 4, 1, ((65, 449),), 128, 128, "needles", causal=DOWN), False),
    "llama-even": (Call("prefill", 1, 4, 1, ((128, 256),), 64, 64, "sharp", causal=DOWN), True),
    "long-decode": (Call("decode", 2, 2, 1, ((1, 16385),), 64, 64, "needles", causal=DOWN), False),
    "long-jump": (Call("few", 1, 2, 1, ((3, 2049),), 64, 64, "jump"), False),
    # gpt-oss: a sink, a sliding window, groups of 8
    "gpt-oss-chunk": (Call("chunk", 1, 8, 1, ((130, 390),), 64, 64, causal=DOWN, window=(127, None), sink=True), True),
    "gpt-oss-decode": (
        Call("decode", 2, 8, 1, ((1, 600),), 64, 64, "sharp", causal=DOWN, window=(127, None), sink=True),
        False,
    ),
    # Gemma 2: wide heads, a cap of 50, a window in every second layer
    "gemma-prefill": (
        Call("prefill", 1, 2, 1, ((113, 113),), 256, 256, "sharp", causal=DOWN, softcap=50.0, window=(60, 0)),
        True,
    ),
    "gemma-decode": (Call("decode", 2, 4, 2, ((1, 1025),), 256, 256, "faint", causal=DOWN, softcap=50.0), False),
    # DeepSeek-V3: values narrower than keys; decoding on compressed keys with all heads in one group
    "deepseek-chunk": (Call("chunk", 1, 2, 2, ((97, 300),), 192, 128, "needles", causal=DOWN, scale=0.13), True),
    "deepseek-decode": (Call("decode", 1, 16, 1, ((1, 513),), 576, 512, causal=DOWN, scale=0.13), False),
    # Stable Diffusion: 77 tokens of text; its window is never asked for, but a wide one must change nothing
    "diffusion-text": (Call("cross", 2, 4, 4, ((300, 77),), 40, 40, layout="bshd"), True),
    "diffusion-window": (Call("cross", 1, 2, 2, ((150, 77),), 160, 160, "sharp", window=(150, 150)), False),
    "vision": (Call("batches", 2, 4, 4, ((257, 257),), 80, 80, layout="fused"), False),
    "vision-causal": (Call("prefill", 1, 2, 2, ((129, 129),), 80, 80, "needles", causal=DOWN), True),
    # BERT: padding of each batch; T5: a bias by head; ALiBi: a bias by key
    "bert": (Call("batches", 3, 4, 4, ((100, 100),), 64, 64, hidden="nan", allowed="padding"), True),
    "bert-bias": (Call("batches", 3, 2, 2, ((33, 70),), 64, 64, bias="padding"), True),
    # Longformer: a window on both sides beside padding
    "longformer": (Call("batches", 2, 2, 2, ((100, 100),), 64, 64, "sharp", window=(16, 16), allowed="padding"), True),
    "t5": (Call("batches", 2, 4, 4, ((129, 129),), 64, 64, scale=1.0, bias="batches"), True),
    "alibi-decode": (Call("decode", 3, 4, 4, ((1, 1025),), 128, 128, "sharp", causal=DOWN, bias="rows"), False),
    # AlphaFold: a bias of pairs in float32 beside 16-bit queries
    "pair-bias": (Call("batches", 2, 2, 2, ((67, 67),), 32, 32, bias="batches", wide_bias=True), True),
    # servers: packed sequences, keys that were there before, a tree of guesses
    "packed": (
        Call("packed", 1, 4, 2, ((0, 0), (1, 6), (65, 70), (130, 135), (3, 8)), 128, 128, "sharp", causal=DOWN),
        True,
    ),
    "packed-window": (
        Call("packed", 1, 2, 1, ((20, 25), (0, 0), (70, 75), (20, 35)), 64, 64, "sharp", window=(3, 3), sink=True),
        False,
    ),
    # sequences at different lengths, one token each
    "packed-decode": (
        Call("packed", 1, 4, 2, ((1, 20), (1, 131), (1, 1), (1, 64)), 64, 64, "sharp", causal=DOWN, softcap=30.0),
        False,
    ),
    "tree": (Call("few", 2, 4, 1, ((7, 1030),), 128, 128, "sharp", "bshd", causal=DOWN, allowed="heads"), False),
    "mask-for-all": (Call("batches", 2, 2, 2, ((140, 257),), 64, 64, "sharp", allowed="all", hidden="large"), True),
    "mask-of-rows": (Call("batches", 2, 2, 2, ((100, 100),), 64, 64, allowed="row"), False),
    # groups of 6, 7 and 64, widths that no vector divides, more tiles than a GPU has multiprocessors
    "groups-of-6": (Call("few", 1, 12, 2, ((17, 65),), 96, 96, causal=DOWN), True),
    "groups-of-8": (Call("decode", 1, 32, 4, ((1, 300),), 64, 64, "sharp", "cache", causal=DOWN), False),
    "groups-of-7": (Call("decode", 2, 14, 2, ((1, 257),), 128, 128, "sharp", causal=DOWN), False),
    "groups-of-64": (Call("decode", 1, 64, 1, ((1, 400),), 128, 128, "sharp"), False),
    "width-33": (Call("prefill", 1, 2, 2, ((67, 67),), 33, 33, "sharp", causal="top_left"), True),
    "second-wave": (Call("few", 4, 40, 40, ((2, 100),), 64, 64, "sharp"), False),
    # servers: a cache longer than what is in it, rows and keys behind each item's, chunks that say where they start
    "cache-decode": (
        Call("decode", 4, 8, 2, ((1, 300),), 128, 128, "sharp", hidden="nan", causal=DOWN, used="k"),
        False,
    ),
    "cache-ragged": (Call("batches", 3, 4, 2, ((70, 90),), 64, 64, hidden="nan", causal=DOWN, used="both"), True),
    "packed-gaps": (
        Call("packed", 1, 4, 2, ((20, 25), (1, 70), (65, 70)), 64, 64, "sharp", causal=DOWN, used="both"),
        True,
    ),
    "chunk-at-offset": (Call("chunk", 2, 2, 1, ((65, 193),), 64, 64, "sharp", causal="top_left", offset=64), True),
    # scores of more bits than 16-bit types have
    "matched": (Call("cross", 1, 2, 2, ((8, 1024),), 64, 64, "matched"), False),
    "faint": (Call("cross", 1, 2, 2, ((40, 600),), 64, 64, "faint"), False),
}
"""Calls by name, and whether their gradients are asked for."""
LONGER: dict[str, tuple[Call, bool]] = {
    # more rows and keys than one launch or one split takes; a context of 131,072 tokens and one to come
    "long-prefill": (Call("prefill", 1, 1, 1, ((552, 552),), 64, 64, "needles", causal=DOWN), True),
    "longest-decode": (Call("decode", 1, 2, 1, ((1, 131_073),), 64, 64, "needles", causal=DOWN), False),
    "wide-decode": (Call("decode", 1, 1, 1, ((1, 9001),), 128, 128, "needles"), False),
    # Mistral: a window shorter than the keys
    "mistral": (Call("chunk", 1, 2, 1, ((136, 720),), 48, 48, "sharp", causal=DOWN, window=(256, None)), True),
    # more batches, sequences, key heads and queries to a key head than fit a few bits
    "nine-batches": (Call("decode", 9, 4, 2, ((1, 72),), 64, 64, "sharp", causal=DOWN), False),
    "many-sequences": (
        Call(
            "packed", 1, 4, 2, tuple((n % 5 + 1, 7 * n + 3) for n in range(19)), 64, 64, "sharp", "views", causal=DOWN
        ),
        True,
    ),
    "key-heads-of-8": (Call("few", 1, 24, 8, ((5, 90),), 64, 64, "sharp", "columns"), True),
    "groups-of-12": (Call("few", 1, 24, 2, ((3, 144),), 112, 112, "sharp", causal=DOWN), False),
    # what lies in memory as no kernel's author has it: views with gaps, and one row for all
    "views": (Call("batches", 2, 4, 2, ((40, 72),), 64, 64, "sharp", "views", sink=True, bias="full"), True),
    "views-of-masks": (Call("batches", 2, 4, 4, ((72, 136),), 64, 64, "sharp", "views", allowed="full"), True),
    "views-spread": (Call("batches", 2, 2, 2, ((40, 72),), 64, 64, "sharp", "views", bias="batches"), True),
    "columns": (Call("batches", 2, 4, 2, ((40, 72),), 64, 64, "sharp", "columns"), True),
    "turned": (Call("batches", 2, 4, 2, ((40, 72),), 64, 64, "sharp", "turned"), True),
    "odd-start": (Call("batches", 2, 2, 2, ((40, 72),), 64, 64, "sharp", "odd"), True),
    # more batches, heads, sequences, rows and columns than fit a few bits
    "batches-of-32": (Call("decode", 32, 4, 2, ((1, 40),), 64, 64, "sharp", causal=DOWN), False),
    "heads-of-128": (Call("few", 1, 128, 1, ((2, 70),), 32, 32, "sharp", causal=DOWN), False),
    "sequences-of-40": (
        Call("packed", 1, 2, 1, tuple((n % 3 + 1, 3 * n + 5) for n in range(40)), 32, 32, "sharp", causal=DOWN),
        False,
    ),
    "rows-past-2048": (Call("cross", 1, 1, 1, ((2100, 70),), 32, 32, "sharp"), True),
    "wider-values": (Call("prefill", 1, 2, 2, ((67, 67),), 128, 256, "sharp", causal=DOWN), True),
    "width-224": (Call("prefill", 1, 2, 1, ((65, 65),), 224, 224, "sharp"), True),
    # one mask, or one bias, for every batch and row; a bias by key for each head, with its gradient
    "mask-of-keys": (Call("batches", 3, 2, 2, ((40, 40),), 64, 64, allowed="column"), True),
    "bias-for-all": (Call("batches", 3, 2, 2, ((40, 50),), 64, 64, bias="all"), True),
    "alibi": (Call("batches", 3, 2, 2, ((40, 40),), 64, 64, bias="heads-columns"), True),
    # more rows than keys under a window; a cap that 16-bit types round; gradients as of a mean over many
    "window-of-more-rows": (Call("cross", 1, 2, 2, ((150, 77),), 64, 64, "sharp", window=(5, 80)), True),
    "cap-of-14.3": (Call("batches", 2, 2, 2, ((70, 70),), 64, 64, "sharp", softcap=14.3), True),
    "faint-gradient": (Call("batches", 2, 2, 2, ((70, 70),), 64, 64, faint_dout=True), True),
    # keys that count several times, beside each other option
    "weight-groups": (Call("few", 2, 8, 2, ((5, 300),), 64, 64, weight="heads"), True),
    "weight-decode": (Call("decode", 2, 4, 2, ((1, 600),), 64, 64, causal=DOWN, weight="padding"), False),
    "weight-options": (
        Call(
            "batches",
            2,
            2,
            1,
            ((70, 70),),
            64,
            64,
            causal=DOWN,
            window=(40, None),
            softcap=5.0,
            sink=True,
            bias="batches",
            weight="full",
        ),
        True,
    ),
    "weight-packed": (Call("packed", 1, 2, 1, ((20, 25), (40, 45)), 64, 64, causal=DOWN, weight="keys"), True),
}
"""The same, of calls that take longer or are rarer: not in quick."""
LONGEST: dict[str, tuple[Call, bool]] = {
    # more heads than 16 bits count, as the second and third axis of a grid
    "heads-past-16-bits": (Call("batches", 4100, 16, 16, ((1, 5),), 16, 16, "sharp"), False),
}
"""Those of nightly alone: a kernel that goes from head to head takes seconds."""


def known(able: Capabilities, uses: frozenset[str], budget: str = "ci") -> list[tuple[str, Call, bool]]:
    """Return those calls that an operator has the options for, and a kernel can do."""
    calls = MODELS | (LONGER if budget != "quick" else {}) | (LONGEST if budget == "nightly" else {})
    return [(n, c, back) for n, (c, back) in calls.items() if _fits(c, able, uses)]


def _fits(c: Call, able: Capabilities, uses: frozenset[str]) -> bool:
    options = {n for n in ("window", "softcap", "sink", "bias", "allowed", "weight") if getattr(c, n)}
    if c.causal:
        options.add("causal")
    q, k = (sum(x) for x in zip(*c.lengths, strict=True))
    needed = (options - {"causal"}) | ({f"causal_{c.causal}"} if c.causal else set())
    needed |= {"variable_lengths"} if len(c.lengths) > 1 else set()
    needed |= {"grouped_heads"} if c.h != c.h_kv else set()
    needed |= {"d_v_differs"} if c.d != c.d_v else set()
    needed |= {"lengths_differ"} if q != k else set()
    needed |= {"scale"} if c.scale is not None else set()
    used = {"k": {"lengths_k"}, "both": {"lengths_q", "lengths_k"}}.get(c.used, set())
    used |= {n for n in ("offset", "alignment") if getattr(c, n) is not None}
    needed |= used
    options |= used
    wide = not able.head_dims or {c.d, c.d_v} <= able.head_dims
    even = all(x % able.seq_multiple == 0 for pair in c.lengths for x in pair)
    kept = not able.always & {"causal_bottom_right", "causal_top_left"} or f"causal_{c.causal}" in able.always
    laid = not (able.last_axis_contiguous and c.layout in ("columns", "turned"))
    here = options <= uses and needed <= able.features and max(c.d, c.d_v) <= able.d_max
    return here and wide and even and kept and laid
