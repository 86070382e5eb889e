"""What options and head dims cost on a GPU: Hopper's kernel beside plain causal calls, FlashAttention-3 and mma.sync.

bfloat16, 16384 tokens, h·d = 2048; every figure is a median of runs that take turns. Times of options are over that of
a plain causal call for the same work: a window's over the share of scores that it leaves, packed sequences' over the
same sequences as a batch. FlashAttention-3 is the package fa3-fwd, left out where it is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from refattn.bench import Row, gpu_medians, gpu_torch, load

flash3 = load("_flash3").flash3
TOKENS, WIDTH, LENGTH, SEQUENCE = 16384, 2048, 8192, 1024
WINDOWS = (1024, 128)
HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256))
LIMITS = {"sink": 1.1, "softcap 30": 1.3, "bias": 2.5, "packed": 1.15, "window 1024": 1.2}
Call = Callable[[], Any]


def rows() -> Iterator[Row]:
    """Times of options, and TFLOP/s by head dims."""
    torch = gpu_torch()
    torch.manual_seed(0)
    for d in (64, 128):
        yield from options(torch, d)
    for d_k, d_v in HEAD_DIMS:
        for causal in (False, True):
            yield from head_dims(torch, d_k, d_v, causal)


def options(torch: Any, d: int) -> Iterator[Row]:
    """Each option beside the plain causal call."""
    from refattn.gpu import attention

    b, h, n = TOKENS // LENGTH, WIDTH // d, LENGTH
    q, k, v = (torch.randn(b, h, n, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    causal = partial(attention, q, k, v, causal="bottom_right")
    bias = torch.randn(1, 1, n, n, device="cuda", dtype=torch.bfloat16)
    calls: dict[str, Call] = {
        "plain": causal,
        "sink": partial(causal, sink=torch.randn(h, device="cuda")),
        "softcap 30": partial(causal, softcap=30.0),
        "bias": partial(causal, bias=bias),
        "bias, by mma": partial(causal, bias=bias, impl="mma"),
        "mask": partial(causal, allowed=torch.ones(1, 1, n, n, device="cuda", dtype=torch.bool).tril()),
        "high": partial(causal, accuracy="high"),
        **{f"window {w}": partial(causal, window=(w - 1, 0)) for w in WINDOWS},
        **packed(torch, d),
    }
    calls |= flash3(q, k, v, "FA3", causal=True) | flash3(q, k, v, "FA3, softcap 30", causal=True, softcap=30.0)
    ms = gpu_medians(torch, calls)
    scores = n * (n + 1) / 2
    same = dict.fromkeys(calls, ms["plain"]) | {"packed": ms["batch"]}
    same |= {f"window {w}": ms["plain"] * (w * (n - w) + w * (w + 1) / 2) / scores for w in WINDOWS}
    for name, t in ms.items():
        yield Row(f"d={d} n={n} causal, {name}", t, "ms")
        if name not in ("plain", "batch", "FA3"):
            limit = LIMITS.get(name) if d == 128 else None
            yield Row(f"d={d} n={n} causal, {name} over the same work", t / same[name], "ratio", at_most=limit)


def packed(torch: Any, d: int) -> dict[str, Call]:
    """Return packed sequences of one length, and the same as a batch."""
    from refattn.gpu import attention

    h, count = WIDTH // d, TOKENS // SEQUENCE
    q, k, v = (torch.randn(count, SEQUENCE, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    ends = torch.arange(0, TOKENS + 1, SEQUENCE, dtype=torch.int32, device="cuda")
    apart = [x.transpose(1, 2) for x in (q, k, v)]
    together = [x.reshape(1, TOKENS, h, d).transpose(1, 2) for x in (q, k, v)]
    return {
        "packed": partial(attention, *together, causal="bottom_right", cu_seqlens=(ends, ends)),
        "batch": partial(attention, *apart, causal="bottom_right"),
    }


def head_dims(torch: Any, d_k: int, d_v: int, causal: bool) -> Iterator[Row]:
    """TFLOP/s of one pair of head dims."""
    from refattn.gpu import attention

    n, h = 4096, 16 if d_k in (80, 96) else WIDTH // max(d_k, d_v)
    b = TOKENS // n
    q, k, v = (torch.randn(b, h, n, d, device="cuda", dtype=torch.bfloat16) for d in (d_k, d_k, d_v))
    ours = partial(attention, q, k, v, causal="bottom_right" if causal else None)
    calls: dict[str, Call] = {"ours": ours, "mma": partial(ours, impl="mma"), **flash3(q, k, v, "FA3", causal=causal)}
    operations = 2 * b * h * n * n * (d_k + d_v) / (2 if causal else 1)
    speed = {name: operations / ms / 1e9 for name, ms in gpu_medians(torch, calls).items()}
    at = f"d_k={d_k} d_v={d_v} n={n}{' causal' if causal else ''}"
    for name, x in speed.items():
        yield Row(f"{at} {name}", x, "TFLOP/s")
    if "FA3" in speed:
        yield Row(f"{at} ours over FA3", speed["ours"] / speed["FA3"], "ratio", at_least=1.0)
