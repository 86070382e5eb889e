"""What a call makes of its scores, as FlexAttention's ``score_mod``: softcap, ALiBi, bias and weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arrays import to_float64, to_numpy
from .errors import InvalidInput, UnsupportedProblem
from .masks import band
from .positions import places
from .problem import VARIANT, Problem
from .rules import Rule, Term
from .rules import score_mod as term_mod
from .validation import SCALES, shown

__all__ = ["score_mod"]

OUTSIDE = ("query_norm", "key_norm", "rotary", "sink", "dropout_mask", "philox_layout", "block_table", *SCALES)
"""What acts before or behind the scores."""
HIDING = ("causal", "window", "lengths_q", "lengths_k", "cu_seqlens_q")
"""What leaves each query a stretch of keys."""


def score_mod(problem: Problem, device: Any = None) -> Callable[[Any, Any, Any, Any, Any], Any]:
    r"""Return a call's ``score_mod(score, b, h, q_idx, kv_idx)``, its tables as tensors.

    With s = scale q·k, which FlexAttention makes, it returns ::

        softcap tanh(s / softcap) - slope_bh |place_i - place_j| + bias_bhij + log weight_bhij

    without the terms that the call has not, and -inf for a key that the query does not see by causal, window, lengths,
    cu_seqlens or an array in `allowed`. A rule in `allowed` is not in it: ``refattn.rules.mask_mod`` and ``block_mask``
    say it, and let FlexAttention skip tiles. A bias of -inf and a weight of 0 hide their keys.

    Parameters
    ----------
    problem : Problem
        A call of softmax attention.
    device : str or torch.device, optional
        Where the tables lie; None is where a call of PyTorch's tensors has its own, else the CPU.

    Returns
    -------
    callable
        For ``flex_attention(..., score_mod=...)``. A bias of PyTorch's is not copied, so gradients reach it.

        A term in `bias` is computed there, each of its operations in float32 (float64 where queries are).

    Raises
    ------
    InvalidInput
        It is no Problem.
    UnsupportedProblem
        Another operator, or what acts before or behind the scores: rotary positions, a sink, dropout, scales, pages.

    Notes
    -----
    FlexAttention's documentation in PyTorch 2.13 was read.
    """
    if not isinstance(problem, Problem):
        raise InvalidInput(f"problem: got {shown(problem)}, expected a Problem")
    p = problem
    if p.variant != VARIANT:
        raise UnsupportedProblem(f"variant: score_mod is of {VARIANT} attention, got {p.variant}")
    for name in OUTSIDE:
        if getattr(p, name) is not None:
            raise UnsupportedProblem(f"{name}: is no term of a score; give FlexAttention what it makes of the call")
    import torch

    device = (p.query.device if p.kind == "torch" else "cpu") if device is None else device
    whole = (p.batch, p.heads, p.n_q, p.n_k)

    def tensor(x: Any) -> Any:
        return torch.as_tensor(np.array(x, order="C"), device=device)

    bias, term = p.bias, None
    if isinstance(bias, Term):
        wide = "float64" if p.dtype == "float64" else "float32"
        term = term_mod(bias, p.n_q, p.n_k, device, kind=wide)
        bias = None
    if bias is not None:
        bias = bias.to(device) if p.kind == "torch" else tensor(to_float64(to_numpy(bias)).astype(np.float32))
        bias = bias.expand(whole)
    weight = None if p.weight is None else tensor(_logs(p)).expand(whole)
    slopes, at, cap, stretch, allowed = None, _places(p), p.softcap, _stretch(p), None
    if p.allowed is not None and not isinstance(p.allowed, Rule):
        allowed = (p.allowed.to(device) if p.kind == "torch" else tensor(to_numpy(p.allowed))).expand(whole)
    if p.alibi_slopes is not None:
        given = to_float64(to_numpy(p.alibi_slopes)).astype(np.float32)
        slopes = tensor(np.broadcast_to(given, (p.batch, p.heads)))
    at_q, at_k = (tensor(x) for x in at)
    ends = None if stretch is None else [tensor(x) for x in stretch]

    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        if cap is not None:
            score = torch.tanh(score / cap) * cap
        if slopes is not None:
            score = score - slopes[b, h] * (at_q[b, q_idx] - at_k[b, kv_idx]).abs()
        if bias is not None:
            score = score + bias[b, h, q_idx, kv_idx]
        if term is not None:
            score = term(score, b, h, q_idx, kv_idx)
        if weight is not None:
            score = score + weight[b, h, q_idx, kv_idx]
        if ends is not None:
            seen = (kv_idx >= ends[0][b, q_idx]) & (kv_idx < ends[1][b, q_idx])
            score = torch.where(seen, score, -torch.inf)
        return score if allowed is None else torch.where(allowed[b, h, q_idx, kv_idx], score, -torch.inf)

    return mod


def _logs(p: Problem) -> Any:
    with np.errstate(divide="ignore"):
        return np.log(to_float64(to_numpy(p.weight))).astype(np.float32)


def _places(p: Problem) -> tuple[Any, Any]:
    """Return the positions (b, n_q) of queries and (b, n_k) of keys, 0 where these are not used."""
    found = np.zeros((p.batch, p.n_q), np.int64), np.zeros((p.batch, p.n_k), np.int64)
    for b in range(p.batch if p.alibi_slopes is not None else 0):
        for rows, keys in p.segments(b):
            found[0][b, rows], found[1][b, keys] = places(p, b, rows, keys)
    return found


def _stretch(p: Problem) -> tuple[Any, Any] | None:
    """Return the first key that each query sees and the one behind its last, (b, n_q) each; None where nothing hides.

    An unused row, and one that sees none, have two that are equal.
    """
    if all(getattr(p, n) is None for n in HIDING):
        return None
    bare = p.replace(allowed=None, bias=None, weight=None)
    first, end = (np.zeros((p.batch, p.n_q), np.int64) for _ in range(2))
    for b in range(p.batch):
        for rows, keys in p.segments(b):
            found = band(bare, b, rows, keys)
            assert found is not None  # it has no mask but the diagonal's
            first[b, rows], end[b, rows] = (x + keys.start for x in found)
    return first, end
