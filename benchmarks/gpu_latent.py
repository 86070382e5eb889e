"""Latent attention on a GPU: keys of 576 columns, values their first 512, 128 query heads on one key head.

bfloat16; every figure is a median of runs that take turns. Operations are 2·b·h·n²·(576 + 512), half where causal;
their floor is the time of as many at the rate of a product of two matrices of 8192². Decoding is beside a copy of as
many bytes as the latents have. "Apart" is the same call with values in memory of their own. The peers are PyTorch's
kernels, those that take the widths; they are given keys and values for each head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from refattn.bench import Row, gpu_medians, gpu_torch

HEADS, D_K, D_V, LENGTH = 128, 576, 512, 4096
DECODE = ((128, 4096, 1), (64, 8192, 1), (64, 8192, 2), (16, 8192, 1), (1, 32768, 1))
"""Sequences, keys and queries."""
LEAST = {"prefill": 0.6, "prefill causal": 0.5, "prefill apart": 0.4}
"""Of the floor, what figures are held to."""
Call = Callable[[], Any]


def rows() -> Iterator[Row]:
    """TFLOP/s of prefills, their share of the floor, decoding's rates, and the error."""
    torch = gpu_torch()
    torch.manual_seed(0)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    matrix = 2 * 8192**3 / gpu_medians(torch, {"matrix": lambda: x @ x})["matrix"] / 1e9
    yield Row("product of two matrices of 8192²", matrix, "TFLOP/s")
    yield from prefill(torch, matrix)
    yield from decoding(torch, matrix)
    yield error(torch)


def tensors(torch: Any, b: int, h: int, n_q: int, n_k: int) -> tuple[Any, Any]:
    """Return queries and latents."""
    shapes = (b, h, n_q, D_K), (b, 1, n_k, D_K)
    q, k = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)
    return q, k


def prefill(torch: Any, matrix: float) -> Iterator[Row]:
    """As many queries as keys."""
    from refattn.gpu import attention

    q, k = tensors(torch, 1, HEADS, LENGTH, LENGTH)
    v = k[..., :D_V]
    calls: dict[str, Call] = {
        "prefill": partial(attention, q, k, v),
        "prefill causal": partial(attention, q, k, v, causal="bottom_right"),
        "prefill apart": partial(attention, q, k, v.clone()),
    }
    operations = 2 * HEADS * LENGTH**2 * (D_K + D_V)
    for name, ms in gpu_medians(torch, calls).items():
        speed = operations / (2 if "causal" in name else 1) / ms / 1e9
        yield Row(f"n={LENGTH} {name}", speed, "TFLOP/s")
        yield Row(f"n={LENGTH} {name}, of the floor", speed / matrix, "ratio", at_least=LEAST[name])
    yield from peers(torch, q[:, :16], k)


def peers(torch: Any, q: Any, k: Any) -> Iterator[Row]:
    """PyTorch's kernels on some of the heads, and ours."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from refattn.gpu import attention

    h = q.shape[1]
    each = k.expand(-1, h, -1, -1)
    operations = 2 * h * LENGTH**2 * (D_K + D_V)

    def by(backend: Any) -> Any:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, each, each[..., :D_V])

    calls: dict[str, Call] = {"ours": partial(attention, q, k, k[..., :D_V])}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        calls |= taken(torch, backend.name.lower(), partial(by, backend))
    calls["math"] = partial(by, SDPBackend.MATH)
    for name, ms in gpu_medians(torch, calls, runs=5).items():
        yield Row(f"n={LENGTH}, {h} heads, {name}", operations / ms / 1e9, "TFLOP/s")


def taken(torch: Any, name: str, call: Call) -> dict[str, Call]:
    """Return a peer's call, or none where it refuses the widths."""
    try:
        call()
        torch.cuda.synchronize()
    except RuntimeError:
        return {}
    return {name: call}


def decoding(torch: Any, matrix: float) -> Iterator[Row]:
    """A query or two of each sequence."""
    from refattn.gpu import attention

    for b, n, n_q in DECODE:
        q, k = tensors(torch, b, HEADS, n_q, n)
        other = torch.empty_like(k)
        causal = "bottom_right" if n_q > 1 else None
        calls: dict[str, Call] = {
            "ours": partial(attention, q, k, k[..., :D_V], causal=causal),
            "copy": partial(other.copy_, k),
        }
        ms = gpu_medians(torch, calls, ahead=True)
        at = f"{b} × {n} keys, {n_q} queries"
        yield Row(f"{at}, latents read", 2 * k.numel() / ms["ours"] / 1e9, "TB/s")
        yield Row(f"{at}, a copy moves", 4 * k.numel() / ms["copy"] / 1e9, "TB/s")
        speed = 2 * b * HEADS * n_q * n * (D_K + D_V) / ms["ours"] / 1e9
        yield Row(f"{at}", speed, "TFLOP/s")
        yield Row(f"{at}, of the floor", speed / matrix, "ratio")


def error(torch: Any) -> Row:
    """The error over that of rounding once, by float64."""
    from refattn.gpu import attention

    q, k = tensors(torch, 1, 2, LENGTH, LENGTH)
    a, b = q.double(), k.double()
    exact = torch.softmax(a @ b.transpose(2, 3) / D_K**0.5, 3) @ b[..., :D_V]
    found = attention(q, k, k[..., :D_V]).double()
    once = (exact.to(q.dtype).double() - exact).norm()
    return Row(f"n={LENGTH}, error over that of rounding once", float((found - exact).norm() / once), "ratio")
