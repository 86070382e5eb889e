"""Gradients of the gated delta rule by chunks, in PyTorch's matrix products: the states and their gradients first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

from ..arrays import kind_of
from ..errors import InvalidProblem, UnsupportedProblem
from . import recurrence
from .views import library

__all__ = ["gated_delta_backward"]

CHUNK = 64
ALIVE = 2**28
"""Numbers of decays between two tokens of a chunk that are in memory at a time."""


def gated_delta_backward(
    query: Any, key: Any, value: Any, dout: Any, *, beta: Any, alpha: Any = None, scale: float | None = None,
    state: Any = None, cu_seqlens: Any = None, dstate_out: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the gradients of the gated delta rule by name: dq, dk, dv, dbeta, and dalpha and dstate where these are.

    In a chunk, with L the products of alpha, T = (I + tril(beta K K^T L, -1))^-1 and W = T beta K L,

    - a state is S' = M S + (K L_end)^T T beta V, M = diag(L_end) - (K L_end)^T W,
    - the gradient by it is dS = M^T dS' + C^T dout, C = Q L - tril(Q K^T L) W.

    These are two short products a chunk. With both known all chunks' gradients are taken at once, by PyTorch's graph
    of one chunk. Sums, products and the inverse are in float32, and no product in TF32.

    Parameters
    ----------
    query, key, value, alpha, beta, scale, state, cu_seqlens
        PyTorch tensors, as :func:`refattn.gpu.gated_delta` takes them; of any width, on any device.
    dout : (b, h_q, n, d_v) tensor
        The gradient by out.
    dstate_out : tensor, optional
        The gradient by the last state, of its shape.

    Returns
    -------
    dict
        Each of the shape and type of what it is by, dstate in float32.

    Raises
    ------
    UnsupportedProblem
        Arrays that are not PyTorch's.
    InvalidProblem
        A dout or dstate_out of another shape than what it is by.

    Notes
    -----
    Derived from the recurrence. Chunks in the WY form: Yang et al., arXiv 2412.06464, recalled. `cu_seqlens` is read.
    """
    if kind_of(query) != "torch":
        raise UnsupportedProblem(
            f"gpu: gradients of gated_delta take PyTorch tensors, got an array of {kind_of(query)}; convert it"
        )
    torch = library("torch")
    b, h, n, d_k = query.shape
    group, d_v = h // key.shape[1], value.shape[3]
    if tuple(dout.shape) != (b, h, n, d_v):
        raise InvalidProblem(f"dout: got shape {tuple(dout.shape)}, expected that of out, {(b, h, n, d_v)}")
    cuts = [0, n] if cu_seqlens is None else [int(i) for i in cu_seqlens.tolist()]
    many = b if cu_seqlens is None else len(cuts) - 1
    if dstate_out is not None and tuple(dstate_out.shape) != (many, h, d_k, d_v):
        raise InvalidProblem(f"dstate_out: got shape {tuple(dstate_out.shape)}, expected {(many, h, d_k, d_v)}")
    zeros = torch.zeros(many, h, d_k, d_v, device=query.device)
    start, end = (zeros if x is None else x.float() for x in (state, dstate_out))
    given = {"q": query, "k": key.repeat_interleave(group, 1), "v": value.repeat_interleave(group, 1)}
    given |= {"beta": beta, "dout": dout} | ({} if alpha is None else {"alpha": alpha})
    given = {name: x.detach().float() for name, x in given.items()}
    parts = []
    with _in_float32(torch):
        for i, (at, stop) in enumerate(pairwise(cuts)):
            own = slice(None) if cu_seqlens is None else slice(i, i + 1)
            here = {name: x[:, :, at:stop] for name, x in given.items()}
            parts.append(_sequence(torch, here, start[own], end[own], 1.0 if scale is None else float(scale)))
    found = {name: torch.cat([x[name] for x in parts], 2) for name in parts[0] if name != "state"}
    of = {"q": query, "k": key, "v": value, "beta": beta, "alpha": alpha}
    for name in ("k", "v"):
        found[name] = found[name].reshape(b, h // group, group, n, found[name].shape[3]).sum(2)
    named = {f"d{name}": x.to(of[name].dtype) for name, x in found.items()}
    return named if state is None else named | {"dstate": torch.cat([x["state"] for x in parts])}


def _sequence(torch: Any, x: dict[str, Any], start: Any, end: Any, scale: float) -> dict[str, Any]:
    """Return the gradients of one sequence of each batch item, "state" by what it starts from."""
    n = x["q"].shape[2]
    if n == 0:
        return {name: torch.zeros_like(y) for name, y in x.items() if name != "dout"} | {"state": end}
    b, h = x["q"].shape[:2]
    chunks = -(-n // CHUNK)
    padded = {}
    for name, y in x.items():  # tokens past the last move nothing
        more = y.new_full((b, h, chunks * CHUNK - n, y.shape[3]), float(name == "alpha"))
        padded[name] = torch.cat([y, more], 2).reshape(b, h, chunks, CHUNK, y.shape[3])
    width = padded["alpha"].shape[4] if "alpha" in padded else 1
    step = max(1, ALIVE // (b * h * CHUNK * CHUNK * width))
    groups = [slice(i, i + step) for i in range(0, chunks, step)]
    with torch.no_grad():
        made = [_linear(torch, {name: y[:, :, at] for name, y in padded.items()}, scale) for at in groups]
        moves, gains, arriving = (torch.cat([y[i] for y in made], 2) for i in range(3))
        states, after = [start], [end]
        for i in range(chunks):
            states.append(moves[:, :, i] @ states[-1] + gains[:, :, i])
        for i in reversed(range(1, chunks)):
            after.append(moves[:, :, i].mT @ after[-1] + arriving[:, :, i])
        first = moves[:, :, 0].mT @ after[-1] + arriving[:, :, 0]
        before, behind = torch.stack(states[:-1], 2), torch.stack(after[::-1], 2)
    found: dict[str, list[Any]] = {name: [] for name in padded if name != "dout"}
    for at in groups:
        leaves = {name: padded[name][:, :, at].requires_grad_() for name in found}
        with torch.enable_grad():
            out, last = _chunk(torch, leaves, before[:, :, at], scale)
            seeds = [padded["dout"][:, :, at], behind[:, :, at]]
            grads = torch.autograd.grad([out, last], list(leaves.values()), seeds)
        for name, g in zip(found, grads, strict=True):
            found[name].append(g)
    joined = {name: torch.cat(g, 2).reshape(b, h, chunks * CHUNK, -1)[:, :, :n] for name, g in found.items()}
    return joined | {"state": first}


def _parts(torch: Any, x: dict[str, Any], scale: float) -> tuple[Any, ...]:
    """Return of chunks tril(Q K^T L), T beta, Q and K with decays from the start, K to the end, and L_end."""
    q, k, v, beta = x["q"] * scale, x["k"], x["v"], x["beta"]
    alpha = x["alpha"] if "alpha" in x else torch.ones_like(v[..., :1])
    ones = torch.ones(CHUNK, CHUNK, 1, device=v.device)
    below, behind = ones[..., 0].tril(-1)[..., None] > 0, ones[..., 0].tril()[..., None]
    apart = torch.where(below, alpha[..., :, None, :], ones).cumprod(-3) * behind
    start = alpha.cumprod(-2)
    if alpha.shape[-1] == 1:
        scores, own = (q @ k.mT) * apart[..., 0], (k @ k.mT) * apart[..., 0]
    else:
        scores, own = (torch.einsum("...ic,...ijc,...jc->...ij", y, apart, k) for y in (q, k))
    a = _unit(torch, v) + (beta * own).tril(-1)
    solve = torch.linalg.solve_triangular(a, _unit(torch, v) * beta.mT, upper=False, unitriangular=True)
    return scores, solve, q * start, k * start, k * apart[..., -1, :, :], start[..., -1, :, None]


def _unit(torch: Any, like: Any) -> Any:
    return torch.eye(CHUNK, device=like.device)


def _linear(torch: Any, x: dict[str, Any], scale: float) -> tuple[Any, Any, Any]:
    """Return of chunks M, what a state gains, and C^T dout."""
    scores, solve, q, k, to_end, fade = _parts(torch, x, scale)
    w = solve @ k
    moves = torch.diag_embed(fade.expand(*fade.shape[:-2], k.shape[-1], 1)[..., 0]) - to_end.mT @ w
    return moves, to_end.mT @ (solve @ x["v"]), (q - scores @ w).mT @ x["dout"]


def _chunk(torch: Any, x: dict[str, Any], state: Any, scale: float) -> tuple[Any, Any]:
    """Return out of chunks and the states after them."""
    scores, solve, q, k, to_end, fade = _parts(torch, x, scale)
    change = solve @ (x["v"] - k @ state)
    return q @ state + scores @ change, state * fade + to_end.mT @ change


@contextmanager
def _in_float32(torch: Any) -> Iterator[None]:
    """Keep products of float32 numbers from TF32 for a while."""
    at, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    at.allow_tf32 = False
    try:
        yield
    finally:
        at.allow_tf32 = before


@cache
def function() -> Any:
    """Return the gated delta rule as a function of PyTorch's graph; made once, as importing it imports PyTorch."""
    torch = library("torch")

    class GatedDelta(torch.autograd.Function):  # type: ignore[misc, name-defined]
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any, alpha: Any, beta: Any, state: Any, cu: Any, scale: Any) -> Any:
            given = {"query": q, "key": k, "value": v, "alpha": alpha, "beta": beta}
            ctx.save_for_backward(q, k, v, alpha, beta, state, cu)
            ctx.scale = scale
            return recurrence.run("gated_delta", given, scale, state, cu, {})

        @staticmethod
        @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
        def backward(ctx: Any, dout: Any, dlast: Any) -> Any:
            q, k, v, alpha, beta, state, cu = ctx.saved_tensors
            more = {"alpha": alpha, "beta": beta, "state": state, "cu_seqlens": cu, "dstate_out": dlast}
            found = gated_delta_backward(q, k, v, dout, scale=ctx.scale, **more)
            dstate = None if state is None else found["dstate"].to(state.dtype)
            return *(found.get(n) for n in ("dq", "dk", "dv", "dalpha", "dbeta")), dstate, None, None

    return GatedDelta
