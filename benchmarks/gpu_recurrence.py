"""Recurrences on a GPU, forward: ours beside flash-linear-attention's Triton kernels where they can be imported.

2 sequences of 16 heads and 8192 tokens, bfloat16. Floor: a copy that reads and writes as many bytes as q, k, v and out
have. Beside it the same by chunks in plain PyTorch. Every figure is a median of runs that take turns. "queued" is a
call as it is made, with what Python does for it; "graph" the same calls replayed as CUDA graphs: the GPU's time alone.
fla takes (b, n, h, d), ours (b, h, n, d): each is given its own layout, contiguous, and returns the last state.
Errors of out are relative (Frobenius) against float64, over those of rounding the exact answer once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from refattn.bench import Row, gpu_medians, gpu_torch

B, H, N = 2, 16, 8192
CHUNK = 64
Call = Callable[[], Any]


def chunked(torch: Any, q: Any, k: Any, v: Any, log_alpha: Any, beta: Any = None) -> Any:
    """Return out and the last state by chunks of 64 tokens, in q's type; the delta rule where there is a beta.

    log_alpha is (b, h, n). The changes of a chunk are solved for together, as in refattn.variants.gated_delta.
    """
    b, h, n, d = q.shape
    q, k, v = (x.reshape(b, h, n // CHUNK, CHUNK, x.shape[3]) for x in (q, k, v))
    g = log_alpha.to(torch.promote_types(q.dtype, torch.float32)).reshape(b, h, -1, CHUNK).cumsum(3)
    apart = (g[..., :, None] - g[..., None, :]).tril().exp().tril().to(q.dtype)
    since, until = g.exp()[..., None].to(q.dtype), (g[..., -1:] - g).exp()[..., None].to(q.dtype)
    state, out, solve = torch.zeros(b, h, d, v.shape[4], dtype=g.dtype, device=q.device), [], None
    if beta is not None:
        beta = beta.reshape(b, h, -1, CHUNK, 1)
        a = torch.eye(CHUNK, dtype=g.dtype, device=q.device) + (beta * (k @ k.mT) * apart).tril(-1).to(g.dtype)
        both = torch.cat([beta * v, beta * k * since], 4).to(g.dtype)
        solve = torch.linalg.solve_triangular(a, both, upper=False).to(q.dtype)
    weights, keys, queries = (q @ k.mT) * apart, k * until, q * since
    for i in range(n // CHUNK):
        s = state.to(q.dtype)
        new = v[:, :, i] if solve is None else solve[:, :, i, :, : v.shape[4]] - solve[:, :, i, :, v.shape[4] :] @ s
        out.append(queries[:, :, i] @ s + weights[:, :, i] @ new)
        state = state * g[:, :, i, -1, None, None].exp() + (keys[:, :, i].mT @ new).to(g.dtype)
    return torch.cat(out, 2), state


def peer(name: str) -> Callable[..., Any] | None:
    """Return a function of flash-linear-attention, None where it cannot be imported."""
    try:
        module = importlib.import_module(f"fla.ops.{name}")
    except ImportError:
        return None
    found: Callable[..., Any] = getattr(module, f"chunk_{name}")
    return found


def contestants(torch: Any, variant: str, d: int) -> tuple[dict[str, Call], Any]:
    """Return what computes a recurrence of d columns, by name, and out in float64 of the first two heads."""
    from refattn.gpu import gated_delta, lightning

    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, N, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    rates = [2.0 ** -(1 + 8 * i / H) for i in range(H)]
    if variant == "lightning":
        log_alpha, beta = -torch.tensor(rates, device="cuda")[:, None].expand(B, H, N), None
        calls: dict[str, Call] = {"ours": lambda: lightning(q, k, v, decay=rates, scale=1.0)}
        options: dict[str, Any] = {"g_gamma": log_alpha[0, :, 0].contiguous()}
    else:
        k = torch.nn.functional.normalize(k.float(), dim=3).bfloat16()
        log_alpha = -torch.rand(B, H, N, device="cuda") * 0.1
        beta = torch.rand(B, H, N, device="cuda")
        given = {"alpha": log_alpha.exp()[..., None], "beta": beta[..., None]}
        calls = {"ours": lambda: gated_delta(q, k, v, scale=1.0, **given)}
        options = {"g": log_alpha.mT.contiguous(), "beta": beta.mT.contiguous().bfloat16()}
    name = "simple_gla" if variant == "lightning" else "gated_delta_rule"
    fla = peer(name)
    if fla is not None:
        theirs = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        calls["fla"] = lambda: fla(*theirs, scale=1.0, output_final_state=True, **options)
    calls["PyTorch, chunked"] = lambda: chunked(torch, q, k, v, log_alpha, None if beta is None else beta.bfloat16())
    calls["copy of the same bytes"] = lambda: (q.clone(), v.clone())
    one = [x[:1, :2].double() for x in (q, k, v, log_alpha)]
    return calls, chunked(torch, *one, None if beta is None else beta[:1, :2].double())[0]


def graphed(torch: Any, call: Call) -> Call:
    """Return a call's kernels as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.graph(graph):
        call()
    return lambda: graph.replay()


def rows() -> Iterator[Row]:
    """Yield the figures by operator and width: milliseconds, what fla takes over ours, and errors."""
    torch = gpu_torch()
    torch.set_grad_enabled(False)
    for variant in ("lightning", "gated_delta"):
        for d in (128, 64):
            calls, exact = contestants(torch, variant, d)
            named = f"{variant} d={d}"
            cost = gpu_medians(torch, calls)
            graphs = {n: graphed(torch, calls[n]) for n in calls if n != "PyTorch, chunked"}
            alone = gpu_medians(torch, graphs)
            for n, ms in cost.items():
                yield Row(f"{named}, {n}, queued", ms, "ms")
            for n, ms in alone.items():
                yield Row(f"{named}, {n}, graph", ms, "ms")
            if "fla" in calls:
                held = 1.0 if (variant, d) == ("lightning", 128) else None
                yield Row(f"{named}, fla / ours, queued", cost["fla"] / cost["ours"], "ratio", at_least=held)
                yield Row(f"{named}, fla / ours, graph", alone["fla"] / alone["ours"], "ratio", at_least=held)
            once = (exact.bfloat16().double() - exact).norm()
            for n in ("ours", "fla", "PyTorch, chunked"):
                if n in calls:
                    out = calls[n]()[0]
                    out = (out.transpose(1, 2) if n == "fla" else out)[:1, :2].double()
                    yield Row(f"{named}, {n}, error over rounding once", float((out - exact).norm() / once), "ratio")
            del calls, graphs
            torch.cuda.empty_cache()
