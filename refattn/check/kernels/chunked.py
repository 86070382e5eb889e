"""Our kernel for recurrences, in PyTorch: chunks of 8 tokens; of the delta rule the state's changes are solved for.

Written from the recurrence, not from the operator's forms: the decays between two tokens of a chunk are running
products, and a triangular system is solved where the form multiplies by an inverse. Float32 inside. Titans' memory goes
token by token, but for the slopes of a chunk, which are taken at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import from_float64, to_float64
from ...dtypes import FORMATS
from ...errors import UnsupportedProblem
from ...problem import Problem
from .gradients import with_gradients

__all__ = ["chunked"]

CHUNK = 8
TAKES = ("gated_delta", "lightning", "titans")
NAMES = ("query", "key", "value", "alpha", "beta", "eta", "state")


def _tensors(problem: Problem) -> dict[str, Any]:
    """Return a call's arrays in float32, and an alpha for each token: 1 where the call has none, lightning's decay."""
    import torch

    if problem.variant not in TAKES:
        raise UnsupportedProblem(f"refattn-chunked: takes {', '.join(TAKES)}, got {problem.variant}")
    given = {n: x for n, x in problem.to("numpy").arrays().items() if n in NAMES}
    found = {n: torch.from_numpy(to_float64(x)).float() for n, x in given.items()}
    rates = torch.tensor(problem.options.get("decay", (0.0,)), dtype=torch.float32)
    fade = torch.exp(-rates)[:, None, None].expand(problem.batch, problem.heads, problem.n_q, 1)
    return {"alpha": fade} | found


def _run(problem: Problem, x: dict[str, Any]) -> tuple[Any, Any]:
    """Return out and the last state."""
    import torch

    group = problem.heads // problem.heads_kv
    q = x["query"] * (1.0 if problem.scale is None else problem.scale)
    k, v = (x[n].repeat_interleave(group, 1) for n in ("key", "value"))
    start = x.get("state", torch.zeros(*problem.state_shape))
    out, states = [], []
    for i, (rows, _) in enumerate(problem.segments()):
        state = start if problem.cu_seqlens_q is None else start[i : i + 1]
        tokens = {"q": q, "k": k, "v": v} | {n: x[n] for n in ("alpha", "beta", "eta") if n in x}
        here = {n: y[:, :, rows] for n, y in tokens.items()}
        part, state = _taught(here, state, problem.options.get("chunk", 1)) if "eta" in x else _sequence(here, state)
        out.append(part)
        states.append(state)
    return torch.cat(out, 2), torch.cat(states)


def _sequence(x: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """Return out and the last state of one sequence of each batch item."""
    import torch

    out = [torch.zeros_like(x["v"][:, :, :0])]
    for i in range(0, x["q"].shape[2], CHUNK):
        q, k, v, alpha = (x[n][:, :, i : i + CHUNK] for n in ("q", "k", "v", "alpha"))
        fade, start = _decays(alpha)
        wide = fade.expand(*fade.shape[:-1], k.shape[-1])
        change = v
        if "beta" in x:
            beta = x["beta"][:, :, i : i + CHUNK]
            a = torch.eye(k.shape[2]) + beta * torch.einsum("bhic,bhijc,bhjc->bhij", k, wide, k).tril(-1)
            change = torch.linalg.solve_triangular(a, beta * (v - (k * start) @ state), upper=False)
        out.append((q * start) @ state + torch.einsum("bhic,bhijc,bhjc->bhij", q, wide, k) @ change)
        state = state * start[:, :, -1:].mT + (k * fade[:, :, -1]).mT @ change
    return torch.cat(out, 2), state


def _taught(x: dict[str, Any], state: Any, size: int | None) -> tuple[Any, Any]:
    """Return out of Titans' memory and the last one, with its momentum below it, of one sequence of each batch item."""
    import torch

    memory, momentum = state.chunk(2, 2)
    out, change, start, n = [torch.zeros_like(x["v"][:, :, :0])], x["v"], 0, x["q"].shape[2]
    for t in range(n):
        if t % (size or n) == 0:
            k, v, beta = (x[name][:, :, t : t + (size or n)] for name in ("k", "v", "beta"))
            change, start = beta * (v - k @ memory), t
        q, k, alpha, eta = (x[name][:, :, t : t + 1] for name in ("q", "k", "alpha", "eta"))
        momentum = momentum * eta + k.mT @ change[:, :, t - start : t - start + 1]
        memory = memory * alpha.mT + momentum
        out.append(q @ memory)
    return torch.cat(out, 2), torch.cat([memory, momentum], 2)


def _decays(alpha: Any) -> tuple[Any, Any]:
    """Return the products of alpha from after token j up to token i, (b, h, i, j, c), and from the start up to i."""
    import torch

    rows: list[Any] = []
    start: list[Any] = []
    for i in range(alpha.shape[2]):
        here = alpha[:, :, i : i + 1]
        before = [rows[-1][:, :, :i] * here] if i else []
        ahead = torch.zeros_like(alpha[:, :, i + 1 :])
        rows.append(torch.cat([*before, torch.ones_like(here), ahead], 2))
        start.append(start[-1] * here if i else here)
    return torch.stack(rows, 2), torch.cat(start, 2)


def _gradients(problem: Problem, dout: NDArray[Any], dstate_out: NDArray[Any] | None = None) -> dict[str, NDArray[Any]]:
    import torch

    p, x = problem.to("numpy"), _tensors(problem)
    leaves = {n: x[n].requires_grad_() for n in NAMES if getattr(p, n) is not None}
    arriving = [dout] if dstate_out is None else [dout, dstate_out]
    ends, seeds = _run(p, x)[: len(arriving)], [torch.from_numpy(to_float64(g)).float() for g in arriving]
    back = torch.autograd.grad(ends, list(leaves.values()), seeds)
    short = {"query": "q", "key": "k", "value": "v"}
    return {f"d{short.get(n, n)}": _typed(g, getattr(p, n).dtype.name) for n, g in zip(leaves, back, strict=True)}


@with_gradients(_gradients)
def chunked(problem: Problem) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return out (b, h_q, n_q, d_v) and the state after the last token, of ``problem.state_shape``.

    Raises
    ------
    UnsupportedProblem
        Another operator.
    """
    out, state = _run(problem, _tensors(problem))
    return _typed(out, problem.dtype), np.asarray(state.numpy())


def _typed(x: Any, dtype: str) -> NDArray[Any]:
    return from_float64(FORMATS[dtype].round_array(x.double().numpy()), dtype)
