"""TransNormer's layers: Lightning attention with its norm, gate and positions (LRPE), and SGLU for the channels."""

from __future__ import annotations

from typing import Any

import array_api_compat as api
import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from .arguments import axes, namespace, real, whole
from .dense import check_floats, layer_norm
from .memory import _sigmoid

__all__ = ["lrpe", "lrpe_angles", "sglu", "simple_rms_norm", "transnormer_attention"]

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


def lrpe_angles(heads: int, width: int) -> NDArray[np.float64]:
    """Return the angles by which LRPE starts, ``10000^(-2 i / (h d))`` for column i of all heads' columns together.

    They are parameters: a model that is trained has others.

    Parameters
    ----------
    heads, width : int
        h, and a head's columns d.

    Returns
    -------
    (h, d) float64 array
        In radians for each position.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: as :func:`lrpe`.
    """
    columns = whole("heads", heads, 1, 2**31 // whole("width", width, 1, 2**31)) * width
    return np.asarray(10000.0 ** (-2.0 * np.arange(columns) / columns)).reshape(heads, width)


def lrpe(x: Any, angles: Any, offset: int = 0) -> Any:
    """Return LRPE of queries or keys, twice as wide: ``x_i cos(i angle)`` and then ``x_i sin(i angle)``.

    The product of a query and a key so written is ``sum_c q_ic k_jc cos((i - j) angle_c)``: it knows their distance
    alone, as rotary positions do, but each column has an angle of its own, and no pair of columns is turned.

    Parameters
    ----------
    x : (..., h, n, d) float array
        Queries or keys by head, after their activation.
    angles : (h, d) array
        Of x's type: :func:`lrpe_angles`, cast to it, or trained ones.
    offset : int
        The position of the first row, from 0 on; the last is one that the angles' arithmetic holds.

    Returns
    -------
    (..., h, n, 2 d)
        Angles, and their cosines and sines, are computed in float32 at least.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: Qin et al., Linearized Relative Positional Encoding, arXiv 2307.09270 (recalled), as TransNormerLLM's
    released model code has it in its first layer (a copy was read).
    """
    xp = check_floats(x=x, angles=angles)
    if x.ndim < 3 or 0 in x.shape:
        raise InvalidInput(f"x: shape is {tuple(x.shape)}, expected (..., heads, tokens, features), each at least 1")
    axes("angles", angles, x.shape[-3], x.shape[-1])
    wide = x.dtype if xp.finfo(x.dtype).bits >= 32 else xp.float32  # narrower types hold few positions
    held = 2**53 if xp.finfo(wide).bits == 64 else 2**24
    first = whole("offset", offset, 0, held - x.shape[-2])
    place = xp.astype(xp.arange(first, first + x.shape[-2], device=api.device(x)), wide)
    turn = place[:, None] * xp.astype(angles, wide)[:, None, :]
    return xp.concat([x * xp.astype(f(turn), x.dtype) for f in (xp.cos, xp.sin)], axis=-1)


def sglu(x: Any, w_gate: Any, w_value: Any, w_out: Any) -> Any:
    """Return TransNormer's layer that mixes channels, ``((x w_gate) * (x w_value)) w_out``: a GLU without activation.

    Parameters
    ----------
    x : (..., d) float array
    w_gate, w_value : (d, m) arrays
    w_out : (m, e) array

    Returns
    -------
    (..., e)

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: as :func:`transnormer_attention`: SGLU.
    """
    check_floats(x=x, w_gate=w_gate, w_value=w_value, w_out=w_out)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise InvalidInput(f"x: shape is {tuple(x.shape)}, expected (..., features), at least 1")
    axes("w_gate", w_gate, x.shape[-1], "columns")
    axes("w_value", w_value, *w_gate.shape)
    axes("w_out", w_out, w_gate.shape[1], "features")
    return ((x @ w_gate) * (x @ w_value)) @ w_out


def transnormer_attention(
    x: Any,
    w_q: Any,
    w_k: Any,
    w_v: Any,
    w_gate: Any,
    w_out: Any,
    decay: Any,
    *,
    angles: Any = None,
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
    angles : (h, d_k) array, optional
        LRPE's, of the paper's first layer: q and k are written by :func:`lrpe`. None leaves positions to the decay.
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
    `OpenNLPLab/lightning-attention`, which was read.
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
    if angles is not None:
        q, k = lrpe(q, angles), lrpe(k, angles)
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
