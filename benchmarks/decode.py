"""Few queries over many keys on the GPU, beside PyTorch's flash (FlashAttention-2), cuDNN, and FlashAttention-3.

The floor is the bytes of K and V over the rate of a device-to-device copy (bytes read and written), which is measured
first. Every figure is a median of runs that take turns, each of at least a millisecond of replays of a CUDA graph:
Python's time to queue a call is given apart. FlashAttention-3 is the package fa3-fwd, where it is installed. Errors are
of the worst element over the bound of the check.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from refattn.arrays import from_float64
from refattn.bench import Row, gpu_medians, gpu_torch, load
from refattn.check.bounds.expected import expected
from refattn.check.call import call_kernel
from refattn.check.compare import compare
from refattn.check.kernels import KERNELS
from refattn.dtypes import FORMATS
from refattn.problem import Problem

flash3 = load("_flash3").flash3
PEERS = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}
AIMED = (
    (8, 65536, 128, 32, 8, 1), (1, 131072, 128, 32, 8, 1), (64, 8192, 128, 32, 8, 1), (1, 65536, 128, 1, 1, 1),
)  # fmt: skip
OTHERS = ((8, 4096, 128, 32, 8, 1), (1, 8192, 128, 32, 8, 1), (8, 65536, 64, 32, 8, 1), (8, 32768, 128, 32, 8, 4))
"""Batch, keys, head dim, heads, key heads, queries."""
Call = Callable[[], Any]


def rows() -> Iterator[Row]:
    """Bandwidths, ratios to the copy and the peers, time to queue, errors."""
    torch = gpu_torch()
    torch.manual_seed(0)
    copied = copy(torch)
    yield Row("copy on the device", copied, "TB/s")
    for sizes in (*AIMED, *OTHERS):
        yield from decoded(torch, sizes, copied)
    yield from cached(torch)
    yield from bounded()


def copy(torch: Any) -> float:
    """Return the TB/s of a copy on the device, read and written."""
    x = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return 4 * x.numel() / gpu_medians(torch, {"copy": lambda: y.copy_(x)})["copy"] / 1e9


def contestants(torch: Any, q: Any, k: Any, v: Any) -> dict[str, Call]:
    """Return our kernels and their peers."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from refattn.gpu import attention

    def peer(backend: str) -> Call:
        def call() -> Any:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return call

    calls: dict[str, Call] = {"fast": lambda: attention(q, k, v)}
    calls["high"] = lambda: attention(q, k, v, accuracy="high")
    calls |= {n: peer(b) for n, b in PEERS.items()}
    return calls | flash3(q, k, v, num_splits=0)


def replayed(torch: Any, call: Call) -> Call:
    """Return a call as the replay of a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(), call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kept = call()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def decoded(torch: Any, sizes: tuple[int, ...], copied: float) -> Iterator[Row]:
    """One shape."""
    b, n_k, d, h, h_kv, n_q = sizes
    q = torch.randn(b, h, n_q, d, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(b, h_kv, n_k, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    at = f"bfloat16 {b} x {n_k} keys, {n_q} queries, {h} heads on {h_kv}, d={d}"
    calls = contestants(torch, q, k, v)
    if sizes == AIMED[0]:
        yield from queued(torch, calls)
    times = gpu_medians(torch, {name: replayed(torch, call) for name, call in calls.items()})
    speed = {name: 4 * b * h_kv * n_k * d / ms / 1e9 for name, ms in times.items()}
    for name, x in speed.items():
        yield Row(f"{at} {name}", x, "TB/s")
    yield Row(f"{at} fast over the copy", speed["fast"] / copied, "ratio", at_least=0.85 if sizes in AIMED else None)
    peers = {name: x for name, x in speed.items() if name not in ("fast", "high")}
    for name, x in peers.items():
        yield Row(f"{at} fast over {name}", speed["fast"] / x, "ratio")
    best = speed["fast"] / max(peers.values())
    yield Row(f"{at} fast over the best peer", best, "ratio", at_least=1.0 if sizes in AIMED else None)


def cached(torch: Any) -> Iterator[Row]:
    """The first shape from a cache: by lengths, in pages, in float8, over the time of whole arrays."""
    from refattn.gpu import attention, attention_with_cache

    b, n_k, d, h, h_kv, n_q = AIMED[0]
    q = torch.randn(b, h, n_q, d, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(b, h_kv, n_k, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    narrow = [x.to(torch.float8_e4m3fn) for x in (k, v)]
    lengths = torch.full((b,), n_k, device="cuda", dtype=torch.int32)
    token = torch.ones(b, h_kv, n_k, device="cuda")
    calls: dict[str, Call] = {
        "whole": lambda: attention(q, k, v),
        "lengths": lambda: attention_with_cache(q, k, v, lengths=lengths),
        "float8": lambda: attention_with_cache(q, *narrow, lengths=lengths, key_scale=0.5, value_scale=0.5),
        "float8, a scale by token": lambda: attention_with_cache(
            q, *narrow, lengths=lengths, key_scale=token, value_scale=token
        ),
    }
    for size in (16, 256):
        table = torch.randperm(b * n_k // size, device="cuda", dtype=torch.int32).reshape(b, -1)
        pages, few = ([x.reshape(-1, h_kv, size, d) for x in pair] for pair in ((k, v), narrow))
        more = {"lengths": lengths, "page_table": table}
        calls[f"pages of {size}"] = partial(attention_with_cache, q, *pages, **more)
        calls[f"float8, pages of {size}"] = partial(attention_with_cache, q, *few, **more)
    times = gpu_medians(torch, {name: replayed(torch, call) for name, call in calls.items()})
    for name, ms in times.items():
        if name != "whole":
            most = 0.6 if name.startswith("float8") else None
            yield Row(f"bfloat16 {b} x {n_k} keys, {name}: time over whole", ms / times["whole"], "ratio", at_most=most)


def queued(torch: Any, calls: dict[str, Call]) -> Iterator[Row]:
    """The time that Python takes to queue a call."""
    for name, call in calls.items():
        for _ in range(5):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            call()
        yield Row(f"time to queue a call of {name}", (time.perf_counter() - start) * 5e4, "us")
        torch.cuda.synchronize()


def bounded() -> Iterator[Row]:
    """The worst element's error over its bound, of one query of 4 heads on 1 of 4096 keys."""
    rng = np.random.default_rng(0)
    shapes = ((1, 4, 1, 128), (1, 1, 4096, 128), (1, 1, 4096, 128))
    q, k, v = (from_float64(FORMATS["bfloat16"].round_array(rng.standard_normal(s)), "bfloat16") for s in shapes)
    p = Problem(q, k, v)
    for name in ("refattn-gpu-decode", "cuda-flash", "cuda-cudnn"):
        entry = KERNELS[name]
        known = expected(p, entry.model("bfloat16"))
        out = call_kernel(entry.kernel().call, p).out
        found = compare("out", out, known.answer, known.allowed["out"], "bfloat16", known.variance.get("out"))
        yield Row(f"bfloat16 4096 keys worst error/bound of {name}", found.ratio, "ratio", at_most=1.0)
