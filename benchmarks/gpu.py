"""The GPU kernel beside PyTorch's flash (FlashAttention-2), cuDNN and memory-efficient kernels, forward, in one run.

Floor: 4·b·h·n²·d operations (half if causal) over the matrix units' rate, which is measured first. Every figure is a
median of runs that take turns, 16384 tokens a batch, h·d = 2048. Errors are relative (Frobenius) against float64, over
those of rounding the exact answer once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from refattn.bench import Row
from refattn.errors import UnsupportedProblem

TOKENS, WIDTH = 16384, 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
RUNS = 20
PEERS = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
Call = Callable[[], Any]


def medians(torch: Any, calls: dict[str, Call]) -> dict[str, float]:
    """Return the median milliseconds of each call, the calls taking turns."""
    times: dict[str, list[float]] = {n: [] for n in calls}
    for run in range(RUNS + 3):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if run >= 3:
                times[name].append(start.elapsed_time(end))
    return {n: statistics.median(t) for n, t in times.items()}


def contestants(torch: Any, q: Any, k: Any, v: Any, causal: bool) -> dict[str, Call]:
    """Return our kernel in both accuracies, and its peers."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from refattn.gpu import attention

    def peer(backend: str) -> Call:
        def call() -> Any:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return call

    def ours(accuracy: str) -> Call:
        return lambda: attention(q, k, v, causal="bottom_right" if causal else None, accuracy=accuracy)

    return {"fast": ours("fast"), "high": ours("high")} | {n: peer(b) for n, b in PEERS.items()}


def errors(torch: Any, calls: dict[str, Call], q: Any, k: Any, v: Any) -> dict[str, float]:
    """Return relative errors over that of the exact answer rounded once, over two heads of the first batch."""
    a, b, c = (x[:1, :2].double() for x in (q, k, v))
    exact = torch.softmax(a @ b.transpose(2, 3) / math.sqrt(q.shape[3]), 3) @ c
    once = (exact.to(q.dtype).double() - exact).norm()
    return {n: float((call()[:1, :2].double() - exact).norm() / once) for n, call in calls.items()}


def ceiling(torch: Any) -> float:
    """Return the TFLOP/s of a bfloat16 matrix product."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / medians(torch, {"product": lambda: x @ x})["product"] / 1e9


def rows() -> Iterator[Row]:
    """TFLOP/s, ratios to the peers and errors, by type, head dim, length and mask."""
    try:
        import torch
    except ModuleNotFoundError as e:
        raise UnsupportedProblem("bench gpu: needs PyTorch and an NVIDIA GPU") from e
    if not torch.cuda.is_available():
        raise UnsupportedProblem("bench gpu: needs an NVIDIA GPU")
    torch.manual_seed(0)
    top = ceiling(torch)
    yield Row("matrix product 8192 x 8192 x 8192, bfloat16", top, "TFLOP/s")
    for dtype in ("bfloat16", "float16"):
        for d in (64, 128, 256):
            for n in LENGTHS:
                b, h = TOKENS // n, WIDTH // d
                kind = getattr(torch, dtype)
                q, k, v = (torch.randn(b, h, n, d, device="cuda", dtype=kind) for _ in range(3))
                for causal in (False, True):
                    at = f"{dtype} d={d} n={n}{' causal' if causal else ''}"
                    calls = contestants(torch, q, k, v, causal)
                    speed = {
                        name: 4 * b * h * n * n * d / (2 if causal else 1) / ms / 1e9
                        for name, ms in medians(torch, calls).items()
                    }
                    for name, x in speed.items():
                        yield Row(f"{at} {name}", x, "TFLOP/s")
                    least = (1.5 if d == 128 and n >= 4096 else 1.0) if n >= 1024 else None
                    yield Row(f"{at} fast over flash", speed["fast"] / speed["flash"], "ratio", at_least=least)
                    least = 0.8 if d == 128 and n >= 4096 else None
                    yield Row(f"{at} fast over cuDNN", speed["fast"] / speed["cuDNN"], "ratio", at_least=least)
                    yield Row(f"{at} fast over the matrix product", speed["fast"] / top, "ratio")
                    yield Row(f"{at} time of high over fast", speed["fast"] / speed["high"], "ratio", at_most=2.0)
                if n == 4096:
                    found = errors(torch, contestants(torch, q, k, v, False), q, k, v)
                    least_peer = min(found[n] for n in PEERS)
                    for name, x in found.items():
                        limit = {"high": 1.05, "fast": least_peer * 1.01}.get(name)
                        yield Row(f"{at.removesuffix(' causal')} error of {name}", x, "times", at_most=limit)
