"""The GPU kernels beside PyTorch's flash (FlashAttention-2), cuDNN, memory-efficient, flex, and Triton, forward.

Floor: 4·b·h·n²·d operations (half if causal) over the matrix units' rate, which is measured first. Every figure is a
median of runs that take turns, each of at least a millisecond of calls, 16384 tokens a batch, h·d = 2048. Errors are
relative (Frobenius) against float64, over those of rounding the exact answer once; and the worst element's over the
bound of the check.
"""

from __future__ import annotations

import math
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

_FLASH3 = load("_flash3")
FA3, flash3 = _FLASH3.FA3, _FLASH3.flash3
TOKENS, WIDTH = 16384, 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
PEERS = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
JUDGED = ("gpu", "gpu-high", "gpu-mma", "flash", "cudnn", "efficient", "triton")
Call = Callable[[], Any]


def contestants(torch: Any, q: Any, k: Any, v: Any, causal: bool, with_flex: bool = False) -> dict[str, Call]:
    """Return our kernels, and their peers."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from refattn.check.kernels.triton_forward import forward as triton  # type: ignore[attr-defined]
    from refattn.gpu import attention

    corner = "bottom_right" if causal else None

    def peer(backend: str) -> Call:
        def call() -> Any:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return call

    def ours(accuracy: str, impl: str | None = None) -> Call:
        return lambda: attention(q, k, v, causal=corner, accuracy=accuracy, impl=impl)

    calls = {"fast": ours("fast"), "high": ours("high"), "mma": ours("fast", "mma")}
    calls |= {n: peer(b) for n, b in PEERS.items()}
    if q.dtype == torch.bfloat16:
        calls |= flash3(q, k, v, causal=causal)
    calls["triton"] = lambda: triton(q, k, v, 1 / math.sqrt(q.shape[3]), corner, 1)[0]
    if with_flex:
        calls["flex"] = flex(torch, q, k, v, (lambda b, h, i, j: i >= j) if causal else None)
    return calls


def flex(torch: Any, q: Any, k: Any, v: Any, seen: Any = None) -> Call:
    """Return a compiled flex_attention; `seen` tells of (batch, head, row, key) whether the row sees the key."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = 64  # past it, it runs without a compiled kernel
    n, compiled = q.shape[2], torch.compile(flex_attention, dynamic=False)
    mask = None if seen is None else create_block_mask(seen, None, None, n, n, device="cuda")
    return lambda: compiled(q, k, v, block_mask=mask)


def errors(torch: Any, calls: dict[str, Call], q: Any, k: Any, v: Any) -> dict[str, float]:
    """Return relative errors over that of the exact answer rounded once, over two heads of the first batch."""
    a, b, c = (x[:1, :2].double() for x in (q, k, v))
    exact = torch.softmax(a @ b.transpose(2, 3) / math.sqrt(q.shape[3]), 3) @ c
    once = (exact.to(q.dtype).double() - exact).norm()
    return {n: float((call()[:1, :2].double() - exact).norm() / once) for n, call in calls.items()}


def random(torch: Any, shape: tuple[int, ...], dtype: str) -> list[Any]:
    """Return query, key and value of normal numbers."""
    return [torch.randn(shape, device="cuda", dtype=getattr(torch, dtype)) for _ in range(3)]


def rows() -> Iterator[Row]:
    """TFLOP/s, ratios to the peers and errors, by type, head dim, length and mask; block masks, float32, memory."""
    torch = gpu_torch()
    torch.manual_seed(0)
    top = ceiling(torch)
    yield Row("matrix product 8192 x 8192 x 8192, bfloat16", top, "TFLOP/s")
    yield from host(torch)
    for dtype in ("bfloat16", "float16"):
        for d in (64, 128, 256):
            for n in LENGTHS:
                yield from dense(torch, dtype, d, n, top)
            yield from bounded(dtype, d)
    for d in (64, 128):
        yield from single(torch, d)
        yield from sparse(torch, d)
    yield from memory(torch)


def ceiling(torch: Any) -> float:
    """Return the TFLOP/s of a bfloat16 matrix product."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / gpu_medians(torch, {"product": lambda: x @ x})["product"] / 1e9


def host(torch: Any) -> Iterator[Row]:
    """The time that Python takes to queue a call."""
    q, k, v = random(torch, (1, 1, 64, 64), "bfloat16")
    for name, call in contestants(torch, q, k, v, False).items():
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            call()
        yield Row(f"time to queue a call of {name}", (time.perf_counter() - start) * 1e4, "us")
        torch.cuda.synchronize()


def dense(torch: Any, dtype: str, d: int, n: int, top: float) -> Iterator[Row]:
    """One head dim and length, causal and not."""
    b, h = TOKENS // n, WIDTH // d
    q, k, v = random(torch, (b, h, n, d), dtype)
    for causal in (False, True):
        at = f"{dtype} d={d} n={n}{' causal' if causal else ''}"
        calls = contestants(torch, q, k, v, causal, with_flex=dtype == "bfloat16" and n == 4096 and d < 256)
        operations = 4 * b * h * n * n * d / (2 if causal else 1)
        speed = {name: operations / ms / 1e9 for name, ms in gpu_medians(torch, calls).items()}
        for name, x in speed.items():
            yield Row(f"{at} {name}", x, "TFLOP/s")
        least = (1.5 if d == 128 and n >= 4096 else 1.0) if n >= 1024 else None
        yield Row(f"{at} fast over flash", speed["fast"] / speed["flash"], "ratio", at_least=least)
        least = 1.0 if n >= 2048 else 0.95
        yield Row(f"{at} fast over cuDNN", speed["fast"] / speed["cuDNN"], "ratio", at_least=least)
        if FA3 in speed:
            yield Row(f"{at} fast over {FA3}", speed["fast"] / speed[FA3], "ratio", at_least=least)
        yield Row(f"{at} fast over the matrix product", speed["fast"] / top, "ratio")
        yield Row(f"{at} time of high over fast", speed["fast"] / speed["high"], "ratio", at_most=2.0)
        if n == 4096:
            found = errors(torch, calls, q, k, v) if not causal else {}
            for name, x in found.items():
                # the least of the peers, and three standard errors of a root mean square of so many errors
                least = min(found[n] for n in PEERS) * (1 + 3 / math.sqrt(2 * 2 * n * d))
                limit = {"high": 1.05, "fast": least}.get(name)
                yield Row(f"{at} error of {name} over rounding once", x, "times", at_most=limit)


def bounded(dtype: str, d: int) -> Iterator[Row]:
    """The worst element's error over its bound, of one head of 512 rows and keys."""
    rng = np.random.default_rng(0)
    model = KERNELS["refattn-gpu"].model(dtype)
    q, k, v = (from_float64(FORMATS[dtype].round_array(rng.standard_normal((1, 1, 512, d))), dtype) for _ in range(3))
    p = Problem(q, k, v)
    known = expected(p, model)
    for name in JUDGED:
        entry = KERNELS[f"{'refattn' if name.startswith('gpu') else 'cuda'}-{name}"]
        out = call_kernel(entry.kernel().call, p).out
        found = compare("out", out, known.answer, known.allowed["out"], dtype, known.variance["out"])
        yield Row(f"{dtype} d={d} n=512 worst error/bound of {entry.name}", found.ratio, "ratio", at_most=1.0)


def single(torch: Any, d: int) -> Iterator[Row]:
    """float32 beside the memory-efficient kernel; no tf32 anywhere."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from refattn.gpu import attention

    b, h, n = 4, 16, 4096
    q, k, v = random(torch, (b, h, n, d), "float32")

    def efficient() -> Any:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    calls = {"simt": lambda: attention(q, k, v), "efficient": efficient}
    speed = {name: 4 * b * h * n * n * d / ms / 1e9 for name, ms in gpu_medians(torch, calls).items()}
    found = errors(torch, calls, q, k, v)
    for name in calls:
        least = 34.0 if name == "simt" else None
        yield Row(f"float32 d={d} n={n} {name}", speed[name], "TFLOP/s", at_least=least)
        limit = found["efficient"] if name == "simt" else None
        yield Row(f"float32 d={d} n={n} error of {name} over rounding once", found[name], "times", at_most=limit)


def sparse(torch: Any, d: int) -> Iterator[Row]:
    """Time under block masks of 128 x 128, over density times the time without a mask."""
    from refattn.gpu import attention

    n = 16384
    q, k, v = random(torch, (1, WIDTH // d, n, d), "bfloat16")
    masks = {x: torch.rand(1, 1, n // 128, n // 128, device="cuda") < x for x in (1.0, 0.5, 0.25, 0.1)}
    for impl in ("sm90", "mma", *(("flex",) if d == 128 else ())):

        def call(mask: Any = None, impl: str = impl) -> Call:
            if impl == "flex":
                seen = None if mask is None else lambda b, h, i, j: mask[0, 0, i // 128, j // 128]
                return flex(torch, q, k, v, seen)
            return partial(attention, q, k, v, block_mask=None if mask is None else (mask, 128, 128), impl=impl)

        ms = gpu_medians(torch, {str(x): call(m) for x, m in masks.items()} | {"dense": call()})
        for density, mask in masks.items():
            at = f"bfloat16 d={d} n={n} {impl} block mask of density {density}"
            share = float(mask.float().mean())
            yield Row(f"{at}, time over density x dense", ms[str(density)] / share / ms["dense"], "ratio")
        yield Row(f"bfloat16 d={d} n={n} {impl} block mask of density 0.1", ms["0.1"], "ms")


def memory(torch: Any) -> Iterator[Row]:
    """Memory beyond inputs and outputs, up to 262144 keys."""
    from refattn.gpu import attention

    for n in (65536, 262144):
        q, k, v = random(torch, (1, 1, n, 64), "bfloat16")
        attention(q, k, v)
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info()[0]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, lse = attention(q, k, v, return_lse=True)
        torch.cuda.synchronize()
        used = torch.cuda.max_memory_allocated() - before + free - torch.cuda.mem_get_info()[0]
        outputs = out.numel() * 2 + lse.numel() * 4
        yield Row(f"bfloat16 d=64 n={n} memory beyond inputs and outputs", used - outputs, "bytes", at_most=2.0**21)
