"""Operators of the catalogue by block masks on a GPU: time over that of attention to all keys, beside their density.

16,384 tokens, bfloat16, 2 heads of 128. The density is the part of blocks of 128 by 128 that have a pair that is seen:
what the kernel computes. Queries of MoBA and of NSA's selection are alike within 128 tokens, so that their rows choose
alike; of independent ones nearly every block is chosen by some row. "/ dense" is held to fall with the density.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from refattn import Problem
from refattn.bench import Row, gpu_medians, gpu_torch

N, H, D, BLOCK = 16384, 2, 128, 128
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

    given = [torch.from_numpy(x).to("cuda", torch.bfloat16) for x in tokens()]
    for name, (variant, settings) in CALLS.items():
        causal = None if variant == "neighborhood" else "bottom_right"
        calls: dict[str, Any] = {"dense": partial(attention, *given, causal=causal)}
        density: dict[str, float] = {}
        for options in settings:
            p = Problem(*given, causal=causal, variant=variant, options=options)
            made = lowered(p, BLOCK, BLOCK)
            said = ", ".join(f"{n}={x}" for n, x in options.items() if n not in ("shape", "stride"))
            seen = made["block_mask"][0].float().expand(1, H, -1, -1)
            every = torch.ones_like(seen)
            density[said] = float(seen.tril().sum() / every.tril().sum() if causal else seen.mean())
            calls[said] = partial(attention, *given, **made)
        cost, before = gpu_medians(torch, calls), 1.0
        yield Row(f"n={N} dense{', causal' if causal else ''}", cost["dense"], "ms")
        for said, part in density.items():
            of = cost[said] / cost["dense"]
            yield Row(f"n={N} {name} {said}, density", part, "of blocks")
            yield Row(f"n={N} {name} {said} / dense", of, "ratio", at_most=before)
            before = of
