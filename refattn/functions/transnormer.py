"""TransNormer's attention layer: SiLU, Lightning attention, a norm of what comes out, a gate."""

from __future__ import annotations

from typing import Any

import array_api_compat as api

from ..errors import InvalidInput
from .arguments import axes, namespace, real
from .dense import check_floats, layer_norm
from .memory import _sigmoid

__all__ = ["simple_rms_norm", "transnormer_attention"]

MODES = ("paper", "released")
EPSILON = {"paper": 1e-6, "released": 1e-5}
"""What is added to mean squares by the release's SRMSNorm, and to variances by PyTorch's LayerNorm."""


def simple_rms_norm(x: Any, epsilon: float = EPSILON["paper"]) -> Any:
    """Return SRMSNorm: features over their root mean square, ``x / sqrt(mean x² + epsilon)``, without weights.

    Parameters
    ----------
    x : (..., d) float array
    epsilon : float
        The paper has none; a row of zeros needs one.

    Returns
    -------
    (..., d)

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: as :func:`transnormer_attention`.
    """
    xp = check_floats(x=x)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise InvalidInput(f"x: shape is {tuple(x.shape)}, expected (..., features), at least 1")
    return x / xp.sqrt(xp.mean(x**2, axis=-1, keepdims=True) + real("epsilon", epsilon, 0))


def transnormer_attention(
    x: Any,
    w_q: Any,
    w_k: Any,
    w_v: Any,
    w_gate: Any,
    w_out: Any,
    decay: Any,
    *,
    norm_weight: Any = None,
    norm_bias: Any = None,
    epsilon: float | None = None,
    mode: str = "paper",
) -> Any:
    """Return TransNormer's gated linear attention of tokens: ``(norm(O) * gate) w_out``.

    ``O_i = sum_{j <= i} exp(-decay_h (i - j)) (q_i·k_j) v_j`` for each head h, without scale or denominator;
    q = silu(x w_q), k = silu(x w_k). The norm is over all heads together.

    ========  ==================  =========  ==================
    mode      v                   norm       gate
    ========  ==================  =========  ==================
    paper     x w_v               SRMSNorm   x w_gate
    released  silu(x w_v)         LayerNorm  sigmoid(x w_gate)
    ========  ==================  =========  ==================

    Parameters
    ----------
    x : (..., n, d) float array
        Tokens; the norm before the layer and the sum with its input are the caller's.
    w_q, w_k : (d, h d_k) arrays
        Head after head.
    w_v, w_gate : (d, h d_v) arrays
        The release's gate is of low rank: the product of a (d, d / h) and a (d / h, h d_v) matrix.
    w_out : (h d_v, e) array
    decay : (h,) array
        Rates in 1/position, from 0 on: ``functions.positions.lightning_slopes``, cast to x's type.
    norm_weight, norm_bias : (h d_v,) arrays, optional
        LayerNorm's, in mode "released"; None is 1, and 0.
    epsilon : float, optional
        The norm's. None is 1e-6, and 1e-5 in mode "released".
    mode : str
        "paper" or "released".

    Returns
    -------
    (..., n, e)

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    Source: Qin et al., TransNormerLLM (arXiv 2307.14995; recalled, not read again); `tnl_attn.py` of
    `OpenNLPLab/lightning-attention`, which was read. Rotary positions (LRPE) are not here.
    """
    if mode not in MODES:
        raise InvalidInput(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
    xp = check_floats(x=x, w_q=w_q, w_k=w_k, w_v=w_v, w_gate=w_gate, w_out=w_out, decay=decay)
    _check(x, w_q, w_k, w_v, w_gate, w_out, decay)
    small = EPSILON[mode] if epsilon is None else real("epsilon", epsilon, 0)
    given = {n: w for n, w in (("norm_weight", norm_weight), ("norm_bias", norm_bias)) if w is not None}
    _check_norm(x, given, w_v.shape[1], mode)
    heads, value = decay.shape[0], x @ w_v
    value = value if mode == "paper" else _silu(xp, value)
    q, k, v = (_heads(xp, y, heads) for y in (_silu(xp, x @ w_q), _silu(xp, x @ w_k), value))
    out = _joined(xp, _lightning(xp, q, k, v, decay))
    gate = x @ w_gate
    if mode == "paper":
        return (simple_rms_norm(out, small) * gate) @ w_out
    out = layer_norm(out, small)
    out = out if norm_weight is None else out * norm_weight
    out = out if norm_bias is None else out + norm_bias
    return (out * _sigmoid(xp, gate)) @ w_out


def _check(x: Any, w_q: Any, w_k: Any, w_v: Any, w_gate: Any, w_out: Any, decay: Any) -> None:
    xp = namespace(decay=decay)
    if x.ndim < 2 or 0 in x.shape:
        raise InvalidInput(f"x: shape is {tuple(x.shape)}, expected (..., tokens, features), each at least 1")
    axes("decay", decay, "heads")
    if not bool(xp.all(xp.isfinite(decay) & (decay >= 0))):
        raise InvalidInput("decay: one is no finite number from 0 on; the release's are lightning_slopes")
    d, heads = x.shape[-1], decay.shape[0]
    axes("w_q", w_q, d, "columns")
    axes("w_k", w_k, *w_q.shape)
    axes("w_v", w_v, d, "columns")
    axes("w_gate", w_gate, *w_v.shape)
    axes("w_out", w_out, w_v.shape[1], "features")
    for name, w in (("w_q", w_q), ("w_v", w_v)):
        if w.shape[1] % heads:
            raise InvalidInput(f"{name}: has {w.shape[1]} columns, expected a multiple of the {heads} heads of decay")


def _check_norm(x: Any, given: dict[str, Any], width: int, mode: str) -> None:
    if given and mode == "paper":
        raise InvalidInput(f"{next(iter(given))}: got an array, expected None for mode 'paper', whose norm has none")
    check_floats(x=x, **given)
    for name, w in given.items():
        axes(name, w, width)


def _silu(xp: Any, x: Any) -> Any:
    return x * _sigmoid(xp, x)


def _heads(xp: Any, x: Any, heads: int) -> Any:
    return xp.moveaxis(xp.reshape(x, (*x.shape[:-1], heads, -1)), -2, -3)


def _joined(xp: Any, x: Any) -> Any:
    x = xp.moveaxis(x, -3, -2)
    return xp.reshape(x, (*x.shape[:-2], -1))


def _lightning(xp: Any, q: Any, k: Any, v: Any, decay: Any) -> Any:
    """Return Lightning attention of heads, all tokens at once."""
    n = q.shape[-2]
    place = xp.arange(n, device=api.device(decay))
    apart = xp.astype(xp.abs(place[:, None] - place[None, :]), decay.dtype)
    fade = xp.tril(xp.exp(-decay[:, None, None] * apart))
    return (q @ xp.matrix_transpose(k) * fade) @ v
