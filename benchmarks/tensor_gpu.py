"""Trilinear (2-simplicial) attention on a GPU, forward and backward, bfloat16.

Floor: 4·d operations for each pair that a row sees (16·d for the gradients: 8 products), over the rate of a matrix
product, measured first. Only pairs that are seen count, so what masks waste is in the figure. Errors are relative
(Frobenius) against float64, over those of rounding the exact answer once. The baseline, as there is no other kernel to
install here: the pairs of keys and of values of each place written out, then PyTorch's flash attention over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from refattn.bench import Row, gpu_medians, gpu_torch
from refattn.tensor import device

PUBLISHED = 337.0
"""TFLOP/s of the Triton kernel on an H100, bfloat16, d = 128 (PyTorch's blog post on 2-simplicial attention)."""
# places, query heads, key heads, windows, d, least TFLOP/s
CASES = [
    (4096, 64, 1, (512, 32), 128, PUBLISHED),
    (8192, 64, 1, (512, 32), 128, PUBLISHED),
    (8192, 128, 1, (512, 32), 128, PUBLISHED),
    (8192, 64, 1, (1024, 32), 128, PUBLISHED),
    (8192, 64, 1, (256, 32), 128, None),
    (4096, 64, 1, (512, 32), 64, None),
    (4096, 64, 8, (512, 32), 128, None),
    (2048, 8, 8, (512, 32), 128, None),
    (4096, 64, 1, (512, 48), 128, None),
]
BATCH = 4
forward, backward = partial(device.attention, form="trilinear"), cast(Any, device.backward)


def rows() -> Iterator[Row]:
    """TFLOP/s forward and backward, errors, memory, and the speed beside pairs written out."""
    torch = gpu_torch()
    torch.manual_seed(0)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    top = 2 * 8192**3 / gpu_medians(torch, {"product": lambda: x @ x})["product"] / 1e9
    yield Row("matrix product 8192 x 8192 x 8192, bfloat16", top, "TFLOP/s")
    for case in CASES:
        yield from timed(torch, *case, top)
    yield from written_out(torch)
    yield from errors(torch)


def tensors(torch: Any, n: int, heads: int, heads_kv: int, d: int, batch: int = BATCH) -> list[Any]:
    """Return query, k1, k2, v1, v2 and out's gradient, of normal numbers."""
    sizes = (heads, *(heads_kv,) * 4, heads)
    return [torch.randn(batch, h, n, d, device="cuda", dtype=torch.bfloat16) for h in sizes]


def timed(
    torch: Any, n: int, heads: int, heads_kv: int, window: tuple[int, int], d: int, least: float | None, top: float
) -> Iterator[Row]:
    """Forward and backward of one size."""
    *given, d_out = tensors(torch, n, heads, heads_kv, d)
    options: dict[str, Any] = {"causal": "bottom_right", "window": window, "scale": d**-0.5}
    out, lse = forward(*given, **options)
    calls = {
        "forward": lambda: forward(*given, **options),
        "backward": lambda: backward(*given, out, lse, d_out, **options),
    }
    ms = gpu_medians(torch, calls, runs=9)
    operations = 4 * d * BATCH * heads * sum(min(i, window[0]) * min(i, window[1]) for i in range(1, n + 1))
    at = f"n = {n}, {heads} on {heads_kv} heads, windows {window[0]} x {window[1]}, d = {d}"
    speed = operations / ms["forward"] / 1e9
    yield Row(f"forward {at}", speed, "TFLOP/s", at_least=least)
    yield Row(f"forward over the matrix product, {at}", speed / top, "ratio")
    yield Row(f"backward {at}", 4 * operations / ms["backward"] / 1e9, "TFLOP/s")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = calls["forward"]()
    extra = torch.cuda.max_memory_allocated() - before - sum(t.numel() * t.element_size() for t in kept)
    yield Row(f"forward memory beyond the results, {at}", extra / 2**20, "MiB", at_most=1.0)


def written_out(torch: Any) -> Iterator[Row]:
    """The time of a place whose pairs are written out for flash attention, over ours."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    n, heads, d, window, places = 4096, 64, 128, (512, 32), 64
    q, *keys = (x[:1] for x in tensors(torch, n, heads, 1, d)[:5])

    def call() -> Any:
        at = range(n - places, n)
        k1, k2, v1, v2 = (
            torch.stack([x[0, 0, i + 1 - w : i + 1] for i in at]) for x, w in zip(keys, window * 2, strict=True)
        )
        pairs, values = ((a[:, :, None] * b[:, None]).flatten(1, 2)[:, None] for a, b in ((k1, k2), (v1, v2)))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                q[0, :, n - places :].transpose(0, 1)[:, None], pairs, values
            )

    options: dict[str, Any] = {"causal": "bottom_right", "window": window, "scale": d**-0.5}
    ours = gpu_medians(torch, {"ours": lambda: forward(q, *keys, **options), "pairs": call})
    difference = call()[:, 0].transpose(0, 1) - forward(q, *keys, **options)[0][0, :, n - places :]
    yield Row(
        "pairs written out and flash, time by place over ours", ours["pairs"] / places / (ours["ours"] / n), "ratio"
    )
    yield Row("largest difference of the two", float(difference.abs().max()), "absolute")


def errors(torch: Any) -> Iterator[Row]:
    """Relative errors of out and the gradients over those of rounding once, at a size that float64 can hold."""
    n, heads, d, window = 192, 64, 128, (128, 32)
    *given, d_out = tensors(torch, n, heads, 1, d, batch=1)
    options: dict[str, Any] = {"causal": "bottom_right", "window": window, "scale": d**-0.5}
    out, lse = forward(*given, **options)
    found = (out, *backward(*given, out, lse, d_out, **options))
    leaves = [x.double().requires_grad_() for x in given]
    q, k1, k2, v1, v2 = leaves
    i = torch.arange(n, device="cuda")
    seen = [(i[None] <= i[:, None]) & (i[None] > i[:, None] - w) for w in window]
    results = []
    for h in range(heads):
        s = d**-0.5 * torch.einsum("id,jd,kd->ijk", q[0, h], k1[0, 0], k2[0, 0])
        s = s.masked_fill(~(seen[0][:, :, None] & seen[1][:, None]), -torch.inf)
        p = torch.softmax(s.flatten(1), 1).reshape(s.shape)
        row = torch.einsum("ijk,jd,kd->id", p, v1[0, 0], v2[0, 0])
        row.backward(d_out[0, h].double())
        results.append(row.detach())
    exact = (torch.stack(results)[None], *(x.grad for x in leaves))
    for name, x, e in zip(("out", "d query", "d k1", "d k2", "d v1", "d v2"), found, exact, strict=True):
        once = (e.bfloat16().double() - e).norm()
        yield Row(f"error over that of rounding once, {name}", float((x.double() - e).norm() / once), "ratio")
