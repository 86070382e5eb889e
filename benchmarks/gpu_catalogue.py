"""Operators of the catalogue by block masks on a GPU: time over that of attention to all keys, beside their density.

16,384 tokens, bfloat16, 16 batches of 2 heads of 128 that all choose alike. The density is the part of blocks of 128 by
128 that have a pair that is seen: what the kernel computes. Queries of MoBA and of NSA's selection are alike within 128
tokens, so that their rows choose alike; of independent ones nearly every block is chosen by some row.

Blocks that are seen in part have bits, which the kernel by mma.sync takes and the one by wgmma does not: "/ dense" is
over the fastest dense kernel, "/ dense by mma" over mma.sync's. Both are held to fall with the density. MoBA is held to
1.2 times its density by mma.sync; "whole" are its blocks without bits, by wgmma: what a kernel with bits could reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from refattn import Problem
from refattn.bench import Row, gpu_medians, gpu_torch

N, H, D, BLOCK, BATCHES = 16384, 2, 128, 128, 16
SIDE = 128
"""Tokens along each side of the image."""
CALLS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "MoBA": ("moba", [{"block_size": 512, "topk": k} for k in (16, 8, 3)]),
    "NSA selected": ("nsa_selected", [{"block_size": 128, "topk": k} for k in (64, 32, 16)]),
    "neighborhood 2-D": (
        "neighborhood",
        [{"shape": (SIDE, SIDE), "window": (w, w), "stride": (8, 8)} for w in (64, 32, 16)],
    ),
    "PowerAttention": ("power_blocks", [{"block_size": b, "window_blocks": 2} for b in (1024, 512, 128)]),
}


def tokens() -> list[Any]:
    """Return query, key and value in float32: queries that are alike within a block."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, H, N, D), np.float32) for _ in range(3))
    return [np.repeat(q[:, :, ::BLOCK], BLOCK, axis=2) + np.float32(2.0**-10) * q, k, v]


def rows() -> Iterator[Row]:
    torch = gpu_torch()
    from refattn.gpu import attention
    from refattn.gpu.lowered import lowered

    one = [torch.from_numpy(x).to("cuda", torch.bfloat16) for x in tokens()]
    given = [x.repeat(BATCHES, 1, 1, 1) for x in one]
    for name, (variant, settings) in CALLS.items():
        causal = None if variant == "neighborhood" else "bottom_right"
        calls: dict[str, Any] = {
            "dense": partial(attention, *given, causal=causal),
            "dense by mma": partial(attention, *given, causal=causal, impl="mma"),
        }
        density: dict[str, float] = {}
        for options in settings:
            p = Problem(*one, causal=causal, variant=variant, options=options)
            made = lowered(p, BLOCK, BLOCK)
            said = ", ".join(f"{n}={x}" for n, x in options.items() if n not in ("shape", "stride"))
            seen = (made["block_mask"][0] != 0).float().expand(1, H, -1, -1)
            every = torch.ones_like(seen)
            density[said] = float(seen.tril().sum() / every.tril().sum() if causal else seen.mean())
            calls[said] = partial(attention, *given, **made)
            if variant == "moba":
                whole = made | {"block_mask": (made["block_mask"][0] != 0, BLOCK, BLOCK)}
                calls[f"{said}, whole"] = partial(attention, *given, **whole, impl="sm90")
        cost = gpu_medians(torch, calls)
        for dense in ("dense", "dense by mma"):
            yield Row(f"n={N} {dense}{', causal' if causal else ''}", cost[dense], "ms")
        before = dict.fromkeys(("dense", "dense by mma"), math.inf)
        for said, part in density.items():
            yield Row(f"n={N} {name} {said}, density", part, "of blocks")
            for dense, most in before.items():
                of = cost[said] / cost[dense]
                yield Row(f"n={N} {name} {said} / {dense}", of, "ratio", at_most=None if most == math.inf else most)
                before[dense] = of
            if variant == "moba":
                of = cost[said] / cost["dense by mma"] / part
                yield Row(f"n={N} {name} {said} / dense by mma / density", of, "ratio", at_most=1.2)
                yield Row(f"n={N} {name} {said}, whole / dense", cost[f"{said}, whole"] / cost["dense"], "ratio")
