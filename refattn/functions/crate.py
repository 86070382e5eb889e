"""CRATE: the coding rate of tokens, its gradient, and the layers that are said to step along it."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat as api

from ..errors import InvalidInput
from .arguments import axes, factor, namespace, within
from .dense import check_floats, layer_norm, masked_softmax

__all__ = [
    "coding_rate", "crate_block", "crate_decoder_block", "ista_step", "mssa", "subspace_coding_gradient",
    "subspace_coding_rate",
]  # fmt: skip

MODES = ("paper", "released")
EPSILON = 1e-5
"""What PyTorch adds to variances."""


def coding_rate(z: Any, eps: float) -> Any:
    """Return the coding rate of tokens: ``R(Z) = log det(I + d/(n eps²) ZᵀZ)/2`` in nats.

    Parameters
    ----------
    z : (..., n, d) float array
        Tokens as rows. (The paper has them as columns.)
    eps : float
        The precision to which tokens are coded, above 0.

    Returns
    -------
    (...)

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    Source: Yu et al., CRATE (arXiv 2306.01129; its abstract and code were read, formulas are recalled).
    """
    xp = check_floats(z=z)
    n, d = _tokens(z)
    return _half_log_det(xp, z, d / (n * _above("eps", eps) ** 2))


def subspace_coding_rate(z: Any, bases: Any, eps: float) -> Any:
    """Return the coding rate of tokens against subspaces: ``R^c = sum_k log det(I + beta (Z U_k)ᵀ Z U_k)/2``.

    ``beta = p/(n eps²)``.

    Parameters
    ----------
    z : (..., n, d) float array
        Tokens as rows.
    bases : (K, d, p) array
        U_k, orthonormal columns each.
    eps : float
        Above 0.

    Returns
    -------
    (...)

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    Source: as `coding_rate`.
    """
    xp = check_floats(z=z, bases=bases)
    beta = _beta(z, bases, eps)
    return xp.sum(_half_log_det(xp, z[..., None, :, :] @ bases, beta), axis=-1)


def subspace_coding_gradient(z: Any, bases: Any, eps: float) -> Any:
    """Return the gradient of `subspace_coding_rate`: ``beta sum_k W_k (I + beta W_kᵀ W_k)⁻¹ U_kᵀ``, ``W_k = Z U_k``.

    Parameters
    ----------
    z, bases, eps
        As in `subspace_coding_rate`.

    Returns
    -------
    (..., n, d)

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    Source: as `coding_rate`.
    """
    xp = check_floats(z=z, bases=bases)
    beta = _beta(z, bases, eps)
    w = z[..., None, :, :] @ bases
    solved = xp.linalg.solve(_gram(xp, w, beta), xp.matrix_transpose(w))
    return beta * xp.sum(xp.matrix_transpose(solved) @ xp.matrix_transpose(bases), axis=-3)


def mssa(z: Any, bases: Any, eps: float) -> Any:
    """Return multi-head subspace self-attention: ``beta sum_k softmax(W_k W_kᵀ) W_k U_kᵀ``, ``W_k = Z U_k``.

    Queries, keys and values are the same W_k, and scores have no scale.

    Parameters
    ----------
    z, bases, eps
        As in `subspace_coding_rate`.

    Returns
    -------
    (..., n, d)

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    Added to tokens as it is, it raises `subspace_coding_rate` where the bases stay: see `crate_block`.
    Source: as `coding_rate`.
    """
    xp = check_floats(z=z, bases=bases)
    beta = _beta(z, bases, eps)
    heads = _heads(xp, z, bases, 1.0)
    return beta * xp.sum(heads @ xp.matrix_transpose(bases), axis=-3)


def ista_step(x: Any, z: Any, dictionary: Any, eta: Any, weight: Any) -> Any:
    """Return a step of ISTA for the non-negative lasso: ``relu(z + eta (x - z Dᵀ) D - eta weight)``.

    The loss is ``|x - z Dᵀ|²/2 + weight sum z``; the step lowers it for eta up to ``1/|D|²``, of the largest singular
    value.

    Parameters
    ----------
    x, z : (..., m), (..., k) arrays
        Tokens and their codes, as rows. Any numbers that an array of NumPy holds will do, fractions too.
    dictionary : (m, k) array
        D.
    eta, weight : number
        The step, above 0, and lambda, at least 0.

    Returns
    -------
    (..., k)

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    CRATE's layer has x = z: the tokens before the step are what is coded, too.
    Source: as `coding_rate`.
    """
    xp = namespace(x=x, z=z, dictionary=dictionary)
    if x.ndim < 1 or z.ndim < 1 or tuple(x.shape[:-1]) != tuple(z.shape[:-1]):
        raise InvalidInput(f"z: shape is {tuple(z.shape)}, expected x's {tuple(x.shape)} before the last axis")
    if dictionary.ndim != 2 or tuple(dictionary.shape) != (x.shape[-1], z.shape[-1]):
        raise InvalidInput(
            f"dictionary: shape is {tuple(dictionary.shape)}, expected ({x.shape[-1]}, {z.shape[-1]}), x's and z's dim"
        )
    if not factor("eta", eta) > 0 or math.isinf(float(eta)):
        raise InvalidInput(f"eta: got {eta!r}, expected a finite number above 0")
    if not factor("weight", weight) >= 0 or math.isinf(float(weight)):
        raise InvalidInput(f"weight: got {weight!r}, expected a finite number of at least 0")
    return xp.maximum(z + eta * ((x - z @ dictionary.T) @ dictionary) - eta * weight, 0 * z)


def crate_block(
    z: Any,
    bases: Any,
    dictionary: Any,
    *,
    kappa: float = 1.0,
    eps: float | None = None,
    eta: float = 0.1,
    weight: float = 0.1,
    out: Any = None,
    out_bias: Any = None,
    mode: str = "paper",
) -> Any:
    """Return a CRATE layer: a step that compresses tokens, `mssa`, and a step that makes them sparse, `ista_step`.

    "paper": ``Y = (1 - kappa beta) Z + kappa MSSA(Z)``, ``ista_step(Y, Y, D)``.
    "released": ``Y = Z + concat_k(softmax(W_k W_kᵀ/sqrt(p)) W_k) outᵀ + out_bias``, ``W_k = LN(Z) U_k``,
    ``ista_step(LN(Y), LN(Y), D)``.

    Parameters
    ----------
    z : (..., n, d) float array
        Tokens as rows.
    bases : (K, d, p) array
        U_k.
    dictionary : (d, d) array
        D.
    kappa, eps : float
        The step and the precision, of "paper"; both above 0. The code has neither.
    eta, weight : float
        As in `ista_step`; 0.1 both in the code, and a weight of 0.5 in its autoencoder.
    out, out_bias : (d, K p), (d,) arrays
        Of "released": the learned projection of the heads, which stands where the paper has the bases again.
    mode : {"paper", "released"}
        Which of both. LN of the code is as it starts, with gain 1 and bias 0, and 1e-5 added to variances.

    Returns
    -------
    (..., n, d)

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    Source: as `coding_rate`; the place of beta in the step is recalled.
    """
    check_floats(z=z, bases=bases, dictionary=dictionary)
    _, d = _tokens(z)
    axes("dictionary", dictionary, d, d)
    if mode == "released":
        y = layer_norm(z + _projected_heads(z, bases, out, out_bias), EPSILON)
    elif mode != "paper":
        raise InvalidInput(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
    elif out is not None or out_bias is not None:
        raise InvalidInput("out: got an array, expected None for mode 'paper', which has the bases in its place")
    else:
        if eps is None:
            raise InvalidInput("eps: got None, expected a number above 0 for mode 'paper'")
        kappa = _above("kappa", kappa)
        y = (1 - kappa * _beta(z, bases, eps)) * z + kappa * mssa(z, bases, eps)
    return ista_step(y, y, dictionary, eta, weight)


def crate_decoder_block(z: Any, bases: Any, matrix: Any, *, out: Any, out_bias: Any) -> Any:
    """Return a layer of the released decoder: a linear step, then attention taken away.

    ``Y = LN(Z) Aᵀ``, ``Y - concat_k(softmax(W_k W_kᵀ/sqrt(p)) W_k) outᵀ - out_bias``, ``W_k = LN(Y) U_k``.

    Parameters
    ----------
    z : (..., n, d) float array
        Tokens as rows.
    bases : (K, d, p) array
        U_k.
    matrix : (d, d) array
        A.
    out, out_bias : (d, K p), (d,) arrays
        As in `crate_block`.

    Returns
    -------
    (..., n, d)

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    Source: the code of CRATE's autoencoder, ``model/crate_ae/crate_decoder.py``.
    """
    check_floats(z=z, bases=bases, matrix=matrix)
    _, d = _tokens(z)
    axes("matrix", matrix, d, d)
    y = layer_norm(z, EPSILON) @ matrix.T
    return y - _projected_heads(y, bases, out, out_bias)


def _tokens(z: Any) -> tuple[int, int]:
    """Return n and d of (..., n, d) tokens."""
    if z.ndim < 2 or 0 in z.shape:
        raise InvalidInput(f"z: shape is {tuple(z.shape)}, expected (..., tokens, dim), each at least 1")
    return int(z.shape[-2]), int(z.shape[-1])


def _above(name: str, x: Any) -> float:
    return within(name, x, 0, math.inf, open_low=True)


def _beta(z: Any, bases: Any, eps: float) -> float:
    """Return beta = p/(n eps²), after checking the shapes."""
    n, d = _tokens(z)
    axes("bases", bases, "subspaces", d, "p")
    return float(bases.shape[-1] / (n * _above("eps", eps) ** 2))


def _gram(xp: Any, w: Any, by: float) -> Any:
    """Return I + by·WᵀW."""
    g = by * (xp.matrix_transpose(w) @ w)
    return g + xp.eye(g.shape[-1], dtype=g.dtype, device=api.device(g))


def _half_log_det(xp: Any, w: Any, by: float) -> Any:
    """Return log det(I + by·WᵀW)/2, of the smaller of WᵀW and WWᵀ, whose determinants are the same."""
    small = w if w.shape[-1] <= w.shape[-2] else xp.matrix_transpose(w)
    return xp.linalg.slogdet(_gram(xp, small, by))[1] / 2


def _heads(xp: Any, z: Any, bases: Any, scale: float) -> Any:
    """Return softmax(scale·W Wᵀ) W of each head: (..., K, n, p)."""
    w = z[..., None, :, :] @ bases
    p, _ = masked_softmax(w @ xp.matrix_transpose(w) * scale)
    return p @ w


def _projected_heads(z: Any, bases: Any, out: Any, out_bias: Any) -> Any:
    """Return the released attention on LN(Z)."""
    if out is None or out_bias is None:
        name = "out" if out is None else "out_bias"
        raise InvalidInput(f"{name}: got None, expected an array for mode 'released'")
    xp = check_floats(z=z, bases=bases, out=out, out_bias=out_bias)
    _, d = _tokens(z)
    axes("bases", bases, "subspaces", d, "p")
    count, p = bases.shape[0], bases.shape[2]
    axes("out", out, d, count * p)
    axes("out_bias", out_bias, d)
    heads = xp.moveaxis(_heads(xp, layer_norm(z, EPSILON), bases, p**-0.5), -3, -2)
    return xp.reshape(heads, (*z.shape[:-1], count * p)) @ out.T + out_bias
