"""Gradients on the GPU beside PyTorch's flash (FlashAttention-2), cuDNN and memory-efficient kernels.

Operations: 10·b·h·n²·d (half if causal), five products, whatever a kernel computes twice. Every figure is a median of
runs that take turns, each of at least a millisecond of calls, all queued before the GPU begins (the time to queue one
is given apart), 16384 tokens a batch, h·d = 2048. Errors are relative (Frobenius) against float64, over those of
rounding the exact gradients once; and the worst element's over the bound of the check. "ours" has one order of sums;
"ours, any order" adds the parts of dq as they come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from refattn.arrays import from_float64
from refattn.bench import Row, gpu_medians, gpu_torch
from refattn.check.bounds.expected import expected
from refattn.check.call import call_gradients
from refattn.check.compare import compare
from refattn.check.kernels import KERNELS
from refattn.dtypes import FORMATS
from refattn.problem import Problem

TOKENS, WIDTH = 16384, 2048
PEERS = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}
JUDGED = ("refattn-gpu", "refattn-gpu-simt", "cuda-flash", "cuda-cudnn")
NAMES = ("dq", "dk", "dv")
Call = Callable[[], Any]


def rows() -> Iterator[Row]:
    """TFLOP/s, ratios and errors by head dim, length and mask; float32; memory; time to queue."""
    torch = gpu_torch()
    torch.manual_seed(0)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    top = 2 * 8192**3 / gpu_medians(torch, {"product": lambda: x @ x})["product"] / 1e9
    yield Row("matrix product 8192 x 8192 x 8192, bfloat16", top, "TFLOP/s")
    yield host(torch)
    for d in (64, 128, 256):
        for n in (512, 2048, 4096, 16384):
            for causal in (False, True):
                yield from dense(torch, "bfloat16", d, n, causal, top)
    for d in (64, 128, 256):
        yield from options(torch, d)
    yield from dense(torch, "float16", 128, 4096, False, top)
    for d in (64, 128):
        yield from single(torch, d)
    yield memory(torch)
    for d in (64, 128):
        yield from bounded("bfloat16", d)


def contestants(torch: Any, given: list[Any], causal: bool, peers: dict[str, str]) -> dict[str, Call]:
    """Return calls of our backward pass and its peers', each with its forward pass done."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from refattn.gpu import attention, attention_backward

    *tensors, dout = given
    corner = "bottom_right" if causal else None
    out, lse = attention(*tensors, causal=corner, return_lse=True)

    def ours(deterministic: bool) -> Any:
        found = attention_backward(*tensors, out, lse, dout, causal=corner, deterministic=deterministic)
        return tuple(found[n] for n in NAMES)

    calls: dict[str, Call] = {"ours": partial(ours, True)}
    if given[0].dtype.itemsize == 2:
        calls["ours, any order"] = partial(ours, False)
    for name, backend in peers.items():
        leaves = [x.detach().requires_grad_() for x in tensors]
        with sdpa_kernel(getattr(SDPBackend, backend)):
            answer = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal)

        def peer(answer: Any = answer, leaves: Any = leaves) -> Any:
            return torch.autograd.grad(answer, leaves, dout, retain_graph=True)

        calls[name] = peer
    return calls


def dense(torch: Any, dtype: str, d: int, n: int, causal: bool, top: float) -> Iterator[Row]:
    """One head dim, length and mask."""
    b, h = TOKENS // n, WIDTH // d
    given = [torch.randn(b, h, n, d, device="cuda", dtype=getattr(torch, dtype)) for _ in range(4)]
    at = f"{dtype} d={d} n={n}{' causal' if causal else ''}"
    calls = contestants(torch, given, causal, PEERS)
    operations = 10 * b * h * n * n * d / (2 if causal else 1)
    speed = {name: operations / ms / 1e9 for name, ms in gpu_medians(torch, calls, ahead=True).items()}
    for name, x in speed.items():
        yield Row(f"{at} {name}", x, "TFLOP/s")
    long = n >= 2048 and dtype == "bfloat16"
    for name in PEERS:
        yield Row(f"{at} ours over {name}", speed["ours"] / speed[name], "ratio")
        least = {"flash": 1.6, "cuDNN": 1.0 if d == 256 else 0.85}[name] if long else None
        yield Row(f"{at} any order over {name}", speed["ours, any order"] / speed[name], "ratio", at_least=least)
    least = 0.8 if long else None
    yield Row(f"{at} ours over any order", speed["ours"] / speed["ours, any order"], "ratio", at_least=least)
    yield Row(f"{at} any order over the matrix product", speed["ours, any order"] / top, "ratio")
    if n == 4096:
        yield from errors(torch, calls, given, causal, at)


def options(torch: Any, d: int) -> Iterator[Row]:
    """Return softcap and packed sequences, causal, over the same without."""
    from refattn.gpu import attention, attention_backward

    h, n = WIDTH // d, 2048
    count = TOKENS // n
    given = [torch.randn(count, n, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    ends = torch.arange(0, TOKENS + 1, n, dtype=torch.int32, device="cuda")
    apart, together = ([x.reshape(b, -1, h, d).transpose(1, 2) for x in given] for b in (count, 1))

    def call(tensors: list[Any], deterministic: bool, **more: Any) -> Call:
        *inputs, dout = tensors
        more |= {"causal": "bottom_right"}
        out, lse = attention(*inputs, return_lse=True, **more)
        return partial(attention_backward, *inputs, out, lse, dout, deterministic=deterministic, impl="sm90", **more)

    for order, deterministic in (("one order", True), ("any order", False)):
        calls = {
            "plain": call(apart, deterministic),
            "softcap 30": call(apart, deterministic, softcap=30.0),
            "packed": call(together, deterministic, cu_seqlens=(ends, ends)),
        }
        ms = gpu_medians(torch, calls, ahead=True)
        for name in ("softcap 30", "packed"):
            yield Row(f"bfloat16 d={d} n={n} causal, {order}, {name} over plain", ms[name] / ms["plain"], "ratio")


def errors(torch: Any, calls: dict[str, Call], given: list[Any], causal: bool, at: str) -> Iterator[Row]:
    """Relative errors over that of the exact gradients rounded once, over two heads of the first batch."""
    *tensors, dout = (x[:1, :2].double() for x in given)
    leaves = [x.requires_grad_() for x in tensors]
    s = leaves[0] @ leaves[1].transpose(2, 3) / given[0].shape[3] ** 0.5
    if causal:
        s = s.masked_fill(torch.ones_like(s[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    exact = torch.autograd.grad(torch.softmax(s, 3) @ leaves[2], leaves, dout)
    for name, call in calls.items():
        for gradient, got, x in zip(NAMES, call(), exact, strict=True):
            once = (x.to(got.dtype).double() - x).norm()
            error = float((got[:1, :2].double() - x).norm() / once)
            yield Row(f"{at} error of {gradient} of {name} over rounding once", error, "times")


def bounded(dtype: str, d: int) -> Iterator[Row]:
    """The worst element's error over its bound, of one head of 256 rows and keys."""
    rng = np.random.default_rng(0)
    draw = [FORMATS[dtype].round_array(rng.standard_normal((1, 1, 256, d))) for _ in range(4)]
    q, k, v, dout = (from_float64(x, dtype) for x in draw)
    p = Problem(q, k, v)
    for name in JUDGED:
        entry = KERNELS[name]
        known = expected(p, entry.model(dtype), dout)
        found, _ = call_gradients(entry.kernel().call, p, dout)
        worst = max(
            compare(n, x, known.answer, known.allowed[n], dtype, known.variance.get(n)).ratio for n, x in found.items()
        )
        yield Row(f"{dtype} d={d} n=256 worst error/bound of {name}", worst, "ratio", at_most=1.0)


def single(torch: Any, d: int) -> Iterator[Row]:
    """float32 beside the memory-efficient kernel; no tf32 anywhere."""
    b, h, n = 4, 16, 4096
    given = [torch.randn(b, h, n, d, device="cuda") for _ in range(4)]
    calls = contestants(torch, given, False, {"efficient": "EFFICIENT_ATTENTION"})
    for name, ms in gpu_medians(torch, calls, runs=7, ahead=True).items():
        yield Row(f"float32 d={d} n={n} {name}", 10 * b * h * n * n * d / ms / 1e9, "TFLOP/s")
    yield from errors(torch, calls, given, False, f"float32 d={d} n={n}")


def host(torch: Any) -> Row:
    """The time that Python takes to queue a backward pass."""
    given = [torch.randn(1, 1, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    call = contestants(torch, given, False, {})["ours"]
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(100):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return Row("time to queue a backward pass", spent * 1e4, "us")


def memory(torch: Any) -> Row:
    """Memory beyond inputs and gradients."""
    n = 65536
    given = [torch.randn(1, 1, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    call = contestants(torch, given, False, {})["ours"]
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = call()
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before - sum(2 * x.numel() for x in found)
    return Row(f"bfloat16 d=64 n={n} memory beyond inputs and gradients", used / n, "bytes a row")
