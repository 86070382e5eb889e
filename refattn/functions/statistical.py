"""Spark Transformer: a top-k by mean and deviation instead of a sort, and the layers that it makes sparse."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import array_api_compat as api
import numpy as np

from ..errors import InvalidInput
from .arguments import axes, factor, namespace, ordered, whole, within
from .dense import check_floats, masked_softmax
from .probabilities import attended, causal_mask, scored

__all__ = ["count_error", "spark_attention", "spark_ffn", "statistical_topk"]


def statistical_topk(x: Any, k: int, *, ddof: int = 1, mode: str = "soft", smooth: float = 0.0) -> Any:
    """Return what of each row lies above the threshold that k of n normal numbers would pass.

    ``theta = mean(x) + std(x) Phi^-1(1 - k/n)``; "soft" is ``relu(x - theta)``, "mask" says where ``x >= theta``.

    Parameters
    ----------
    x : (..., n)
        Floats.
    k : int
        From 1 to n - 1: how many should pass. How many do is far off where numbers are not normal.
    ddof : {0, 1}
        The deviation's divisor is n - ddof.
    mode : {"soft", "mask"}
        Where rounding lets nothing pass, as in a row of equal numbers, a mask has the first of the largest.
    smooth : float
        A width w: "soft" is ``u^2 / (2 w)`` for u = x - theta in (0, w) and ``u - w/2`` above, whose slope is
        continuous. 0 is relu.

    Returns
    -------
    (..., n)
        Of x's type, or bool for a mask.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: You et al., Spark Transformer, arXiv 2506.06644, of which a description was read; there is no official code.
    ddof is 1 in one port that was read and 0 in Hugging Face's Gemma 3n. Recalled: the smooth form, Huber's.
    """
    xp = namespace(x=x)
    if not x.ndim or x.shape[-1] < 2:
        raise InvalidInput(f"x: shape is {tuple(x.shape)}, expected a last axis of 2 or more numbers")
    n = x.shape[-1]
    whole("k", k, 1, n - 1)
    whole("ddof", ddof, 0, 1)
    within("smooth", smooth, 0, math.inf)
    if mode not in ("soft", "mask"):
        raise InvalidInput(f"mode: got {mode!r}, expected 'soft' or 'mask'")
    check_floats(x=x)
    ordered("x", x)
    above = x - _threshold(xp, x, xp.ones_like(x, dtype=xp.bool), np.asarray([n]), k, ddof)
    if mode == "mask":
        return _passed(xp, x, above)
    over = xp.where(above > 0, above, 0.0)
    return over if not smooth else xp.where(over < smooth, over * over / (2 * smooth), over - smooth / 2)


def count_error(n: int, k: int, *, failure: float, ddof: int = 1) -> float:
    """Return how far from k the number of independent normal numbers that pass may be, but for a chance `failure`.

    The share above a threshold is off by ``sqrt(log(2/f) / 2n)`` at most for all thresholds at once, the mean by
    ``sqrt(2 log(2/f) / n)`` deviations, and the squared deviation by ``2 sqrt(t/m) + 2t/m`` upwards and ``2 sqrt(t/m)``
    downwards of 1 (m = n - 1, t = log(2/f)), each but for the chance f = failure / 3.

    Parameters
    ----------
    n, k, ddof
        As in :func:`statistical_topk`.
    failure : float
        In (0, 1].

    Returns
    -------
    float

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Our derivation, by the inequalities of Dvoretzky, Kiefer and Wolfowitz (Massart's constant), of normal tails, and of
    Laurent and Massart for chi-squared numbers. The paper's theorem, O(sqrt(log n / n)) of n, was not read.
    """
    whole("n", n, 2)
    whole("k", k, 1, n - 1)
    t, m = math.log(6 / within("failure", failure, 0, 1, open_low=True)), n - 1
    normal, z = NormalDist(), NormalDist().inv_cdf(1 - k / n)
    share, mean = math.sqrt(t / (2 * n)), math.sqrt(2 * t / n)
    divisor = n - whole("ddof", ddof, 0, 1)
    most = math.sqrt((m + 2 * math.sqrt(m * t) + 2 * t) / divisor)
    least = math.sqrt(max(m - 2 * math.sqrt(m * t), 0) / divisor)
    low, high = min(z * most, z * least) - mean, max(z * most, z * least) + mean
    return n * (share + max(normal.cdf(high) - (1 - k / n), 1 - k / n - normal.cdf(low)))


def spark_ffn(x: Any, k1: Any, k2: Any, v: Any, *, k: int, ddof: int = 1, smooth: float = 0.0) -> Any:
    """Return Spark's feed-forward layer, in which about k neurons fire: ``(gelu(topk(x_1 K_1)) * (x_2 K_2)) V``.

    ``x_1`` are the first r features of a token, ``x_2`` the others; topk is :func:`statistical_topk`.

    Parameters
    ----------
    x : (..., d)
    k1, k2 : (r, neurons), (d - r, neurons)
        The predictor's keys and the rest's.
    v : (neurons, d_out)
    k, ddof, smooth
        As in :func:`statistical_topk`.

    Returns
    -------
    (..., d_out)

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: as :func:`statistical_topk`. Recalled: that the activation is GELU, here in its form by tanh. As gelu(0) is
    0, a neuron below the threshold gives exactly nothing.
    """
    xp = namespace(x=x, k1=k1, k2=k2, v=v)
    axes("k1", k1, "features", "neurons")
    r, neurons = k1.shape
    if not x.ndim or x.shape[-1] <= r:
        raise InvalidInput(f"x: shape is {tuple(x.shape)}, expected a last axis of more than k1's {r} features")
    axes("k2", k2, x.shape[-1] - r, neurons)
    axes("v", v, neurons, "features")
    ordered("x", x)
    ordered("k1", k1)
    fired = statistical_topk(x[..., :r] @ k1, k, ddof=ddof, smooth=smooth)
    gelu = fired * (1 + xp.tanh(math.sqrt(2 / math.pi) * (fired + 0.044715 * fired**3))) / 2
    return (gelu * (x[..., r:] @ k2)) @ v


def spark_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    r: int,
    k: int,
    scale: float = 1.0,
    causal: str | None = "bottom_right",
    ddof: int = 1,
) -> Any:
    """Return Spark's attention, in which a row attends to about k keys: ``sum_j p_ij softplus(s2_ij) v_j``.

    ``p`` is the softmax of ``s1 = scale q_1·k_1`` over the keys that pass :func:`statistical_topk`'s threshold among
    those that the row sees; ``s2 = scale q_2·k_2``. The first r features of query and key are ``q_1`` and ``k_1``.

    Parameters
    ----------
    query, key, value : (b, h_q, n_q, d), (b, h_kv, n_k, d), (b, h_kv, n_k, d_v)
        RoPE, if any, is on both parts already.
    r : int
        From 1 to d - 1.
    k : int
        Rows that see no more than k keys attend to all of them.
    scale : float
        Of both products.
    causal : {"bottom_right", None}
        Row i sees the keys up to ``i + n_k - n_q``, or all.
    ddof : {0, 1}
        As in :func:`statistical_topk`.

    Returns
    -------
    (b, h_q, n_q, d_v)
        In query's type; weights do not sum to 1.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: as :func:`statistical_topk`. The threshold that softmax subtracts or not cancels.
    """
    xp = attended(query, key, value)
    b, heads, n_q, d = query.shape
    n_k = key.shape[2]
    namespace(query=query, value=value)
    factor("scale", scale)
    whole("r", r, 1, d - 1)
    whole("k", k, 1)
    whole("ddof", ddof, 0, 1)
    if causal not in (None, "bottom_right"):
        raise InvalidInput(f"causal: got {causal!r}, expected 'bottom_right' or None")
    seen = causal_mask(xp, n_q, n_k, query)
    seen = seen if causal else xp.ones_like(seen)
    counts = np.asarray([[i + n_k - n_q + 1 if causal else n_k] for i in range(n_q)])
    s1 = scored(xp, query[..., :r], key[..., :r], scale)
    s2 = xp.where(seen, scored(xp, query[..., r:], key[..., r:], scale), 0.0)
    above = xp.where(seen, s1, 0.0) - _threshold(xp, s1, seen, counts, k, ddof)
    passed = _passed(xp, xp.where(seen, s1, -math.inf), xp.where(seen, above, -math.inf))
    weights = masked_softmax(s1, passed)[0] * xp.logaddexp(s2, xp.zeros_like(s2))
    return xp.reshape(xp.matmul(weights, value[:, :, None]), (b, heads, n_q, value.shape[3]))


def _threshold(xp: Any, x: Any, seen: Any, counts: Any, k: int, ddof: int) -> Any:
    """Return each row's threshold, (..., 1), -inf for a row of no more than k; `counts` says how many a row sees."""
    place = {"dtype": x.dtype, "device": api.device(x)}
    z = [-math.inf if c <= k else NormalDist().inv_cdf(1 - k / c) for c in counts.ravel().tolist()]
    n, times = (xp.asarray(np.reshape(y, counts.shape).tolist(), **place) for y in (counts, z))
    x = xp.where(seen, x, 0.0)
    mean = xp.sum(x, axis=-1, keepdims=True) / n
    off = xp.where(seen, x - mean, 0.0)
    std = xp.sqrt(xp.sum(off * off, axis=-1, keepdims=True) / xp.where(n > ddof, n - ddof, 1.0))
    return xp.where(times == -math.inf, -math.inf, mean + std * xp.where(times == -math.inf, 0.0, times))


def _passed(xp: Any, x: Any, above: Any) -> Any:
    first = xp.argmax(x, axis=-1, keepdims=True)
    return (above >= 0) | (xp.arange(x.shape[-1], device=api.device(x)) == first)
