"""Gaussian mixtures: tokens, the exact update by linear observations, and losses, as Distribution Transformers use."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat as api
import numpy as np

from ..errors import InvalidInput
from .arguments import axes, namespace, under, whole

__all__ = [
    "gmm_filter",
    "gmm_from_tokens",
    "gmm_kl",
    "gmm_log_density",
    "gmm_nll",
    "gmm_posterior",
    "gmm_tokens",
    "posterior_as_attention",
]

WIDE, CELLS, NODES = 12, 48, 8
"""Quadrature covers 12 standard deviations each way of every component (beyond lies a mass of 4e-33), in 48 cells of
at most half a standard deviation, with 8 Gauss-Legendre points each (degree 15)."""


def _lower(xp: Any, name: str, x: Any) -> Any:
    """Return Cholesky factors, or say that a matrix has none."""
    if not bool(xp.all(x == x.mT)):
        raise InvalidInput(f"{name}: a matrix is not symmetric to the last bit; use (C + C.mT) / 2")
    try:
        lower = xp.linalg.cholesky(x)
    except (ValueError, RuntimeError):  # LinAlgError of NumPy and of PyTorch; JAX answers NaN
        lower = None
    if lower is None or bool(xp.any(xp.isnan(lower))):
        raise InvalidInput(f"{name}: a matrix is not positive definite; all of its eigenvalues must be above 0")
    return lower


def _floats(**arrays: Any) -> Any:
    """Return the library of arrays after checking that they are finite numbers of one floating type."""
    xp = namespace(**arrays)
    first = next(iter(arrays))
    for name, x in arrays.items():
        if not xp.isdtype(x.dtype, "real floating") or x.dtype != arrays[first].dtype:
            raise InvalidInput(f"{name}: is of {x.dtype}, expected floats, of one type for all; cast it")
        if not bool(xp.all(xp.isfinite(x))):
            raise InvalidInput(f"{name}: holds NaN or infinity, expected finite numbers")
    return xp


def _mixture(weights: Any, means: Any, covariances: Any, **others: Any) -> tuple[Any, Any]:
    """Return the library of arrays, and factors of the covariances, after checking mixtures."""
    xp = _floats(weights=weights, means=means, covariances=covariances, **others)
    axes("weights", weights, *weights.shape[:-1], "k")
    axes("means", means, *weights.shape, "d")
    axes("covariances", covariances, *means.shape, means.shape[-1])
    if not bool(xp.all(weights > 0)):
        raise InvalidInput(
            "weights: one is not above 0; drop the component, or use gmm_filter, which keeps weights that underflow"
        )
    return xp, _lower(xp, "covariances", covariances)


def _observed(xp: Any, means: Any, H: Any, R: Any) -> None:
    axes("H", H, "m", means.shape[-1])
    axes("R", R, H.shape[0], H.shape[0])
    _lower(xp, "R", R)


def _log_sum(xp: Any, s: Any) -> Any:
    """Return log sum exp over the last axis, kept.

    Terms are added in order of size: the order of components then changes no bit.
    """
    most = xp.max(s, axis=-1, keepdims=True)
    return most + xp.log(xp.sum(xp.sort(xp.exp(s - most), axis=-1), axis=-1, keepdims=True))


def _log_normal(xp: Any, off: Any, lower: Any) -> Any:
    """Return log N(off; 0, L Lᵀ) of vectors (..., m) and factors (..., m, m)."""
    white = xp.linalg.solve(lower, off[..., None])[..., 0]
    half_log_det = xp.sum(xp.log(xp.linalg.diagonal(lower)), axis=-1)
    return -xp.sum(white * white, axis=-1) / 2 - half_log_det - off.shape[-1] * math.log(2 * math.pi) / 2


def _symmetric(x: Any) -> Any:
    return (x + x.mT) / 2


def _update(xp: Any, log_w: Any, means: Any, covariances: Any, z: Any, H: Any, R: Any) -> tuple[Any, Any, Any]:
    """Return log weights, means and covariances after an observation."""
    cross = H @ covariances
    spread = _symmetric(cross @ H.mT + R)
    off = z[..., None, :] - (H @ means[..., None])[..., 0]
    gain = xp.linalg.solve(spread, cross).mT
    score = log_w + _log_normal(xp, off, _lower(xp, "H Sigma H^T + R", spread))
    # Joseph's form: a sum of two squares stays positive definite where Sigma - K H Sigma may not
    rest = xp.eye(means.shape[-1], dtype=means.dtype, device=api.device(means)) - gain @ H
    after = _symmetric(rest @ covariances @ rest.mT + gain @ R @ gain.mT)
    return score - _log_sum(xp, score), means + (gain @ off[..., None])[..., 0], after


def gmm_posterior(weights: Any, means: Any, covariances: Any, z: Any, H: Any, R: Any) -> tuple[Any, Any, Any]:
    """Return the exact posterior of a Gaussian mixture prior after an observation ``z = H x + noise``.

    ``w'_i`` is proportional to ``w_i N(z; H mu_i, S_i)``, ``S_i = H Sigma_i Hᵀ + R``; with the gain
    ``K_i = Sigma_i Hᵀ S_i^-1`` means become ``mu_i + K_i (z - H mu_i)`` and covariances
    ``(I - K_i H) Sigma_i (I - K_i H)ᵀ + K_i R K_iᵀ``. No covariance is inverted.

    Parameters
    ----------
    weights : (..., k) float array
        Of the components, above 0; what they add up to does not matter.
    means : (..., k, d) float array
        Of the components.
    covariances : (..., k, d, d) float array
        Symmetric and positive definite.
    z : (..., m) float array
        What was observed; one observation for each mixture.
    H : (m, d) float array
        What an observation shows of x.
    R : (m, m) float array
        The covariance of the noise, positive definite.

    Returns
    -------
    weights, means, covariances
        Of the posterior, in the order of the components given; weights add up to 1, and may underflow to 0.

    Raises
    ------
    InvalidInput
        Shapes or types that do not fit together, a weight of 0, a matrix that is not symmetric positive definite.

    Notes
    -----
    Another order of the components gives the same numbers in that order, to the last bit.
    Source: the linear Gaussian update, the reference for Distribution Transformers (the released code and a summary
    of the paper were read). Its weights are softmax attention: :func:`posterior_as_attention`.
    """
    namespace(weights=weights, z=z, H=H)
    axes("z", z, *weights.shape[:-1], *H.shape[:1])
    return gmm_filter(weights, means, covariances, z[..., None, :], H, R)


def gmm_filter(weights: Any, means: Any, covariances: Any, z: Any, H: Any, R: Any) -> tuple[Any, Any, Any]:
    """Return the exact posterior after several observations, one after another.

    Weights are kept as logarithms in between, so that a component may come back after its weight has underflown.

    Parameters
    ----------
    weights, means, covariances, H, R
        As in :func:`gmm_posterior`.
    z : (..., n, m) float array
        n observations with noises of their own.

    Returns
    -------
    weights, means, covariances
        Of the posterior.

    Raises
    ------
    InvalidInput
        As in :func:`gmm_posterior`.
    """
    xp, _ = _mixture(weights, means, covariances, z=z, H=H, R=R)
    _observed(xp, means, H, R)
    axes("z", z, *weights.shape[:-1], "n", H.shape[0])
    log_w = xp.log(weights)
    for i in range(z.shape[-2]):
        log_w, means, covariances = _update(xp, log_w, means, covariances, z[..., i, :], H, R)
    return xp.exp(log_w), means, covariances


def posterior_as_attention(weights: Any, means: Any, covariances: Any, z: Any, H: Any, R: Any) -> tuple[Any, Any, Any]:
    """Return query, key and bias for which softmax attention over the components gives the posterior's weights.

    ``query·key_i + bias_i = log w_i + log N(z; H mu_i, S_i) + c`` for one number c (our derivation):
    ``query = (z zᵀ, z)``, ``key_i = (-S_i^-1 / 2, S_i^-1 H mu_i)``,
    ``bias_i = log w_i - log det S_i / 2 - (H mu_i)ᵀ S_i^-1 H mu_i / 2``.

    Parameters
    ----------
    weights, means, covariances
        One mixture, as in :func:`gmm_posterior`, without a batch.
    z : (n, m) float array
        Observations, each of which meets the prior by itself: the rows of attention.
    H, R
        As in :func:`gmm_posterior`.

    Returns
    -------
    query : (n, m*m + m)
        Of the observations; no scale is to be applied.
    key : (k, m*m + m)
        Of the components.
    bias : (k,)
        To be added to the logits.

    Raises
    ------
    InvalidInput
        As in :func:`gmm_posterior`.
    """
    xp, _ = _mixture(weights, means, covariances, z=z, H=H, R=R)
    axes("weights", weights, "k")
    _observed(xp, means, H, R)
    m = H.shape[0]
    axes("z", z, "n", m)
    spread = _symmetric(H @ covariances @ H.mT + R)
    middle = H @ means[..., None]
    lower = _lower(xp, "H Sigma H^T + R", spread)
    eye = xp.eye(m, dtype=z.dtype, device=api.device(z)) + 0 * spread
    turned = xp.linalg.solve(spread, middle)
    query = xp.concat([xp.reshape(z[:, :, None] * z[:, None, :], (-1, m * m)), z], axis=-1)
    key = xp.concat([xp.reshape(xp.linalg.solve(spread, eye), (-1, m * m)) / -2, turned[..., 0]], axis=-1)
    half_log_det = xp.sum(xp.log(xp.linalg.diagonal(lower)), axis=-1)
    return query, key, xp.log(weights) - half_log_det - xp.sum((middle * turned)[..., 0], axis=-1) / 2


def gmm_log_density(weights: Any, means: Any, covariances: Any, x: Any) -> Any:
    """Return the logarithm of a mixture's density, ``log sum_i w_i N(x; mu_i, Sigma_i)``, weights scaled to sum 1.

    Parameters
    ----------
    weights, means, covariances
        As in :func:`gmm_posterior`.
    x : (..., n, d) float array
        n points for each mixture.

    Returns
    -------
    log_density : (..., n)
        In nats.

    Raises
    ------
    InvalidInput
        As in :func:`gmm_posterior`.
    """
    xp, lower = _mixture(weights, means, covariances, x=x)
    axes("x", x, *weights.shape[:-1], "n", means.shape[-1])
    log_w = xp.log(weights)
    each = _log_normal(xp, x[..., :, None, :] - means[..., None, :, :], lower[..., None, :, :, :])
    return (_log_sum(xp, log_w[..., None, :] + each) - _log_sum(xp, log_w)[..., None, :])[..., 0]


def gmm_nll(weights: Any, means: Any, covariances: Any, x: Any) -> Any:
    """Return the mean negative log density of points, the loss that trains a posterior: ``-mean log q(x | z)``.

    Parameters
    ----------
    weights, means, covariances, x
        As in :func:`gmm_log_density`.

    Returns
    -------
    loss : () array
        In nats.

    Raises
    ------
    InvalidInput
        As in :func:`gmm_posterior`.

    Notes
    -----
    Over points of the true posterior p its mean is the KL divergence of q from p, plus p's entropy.
    """
    xp = namespace(weights=weights, means=means, covariances=covariances, x=x)
    return -xp.mean(gmm_log_density(weights, means, covariances, x))


def gmm_kl(p: tuple[Any, Any, Any], q: tuple[Any, Any, Any]) -> Any:
    """Return the KL divergence ``integral p log(p / q)`` of mixtures of one variable, by quadrature.

    Gauss-Legendre points in cells of half a standard deviation, between marks that every component of both mixtures
    sets up to 12 standard deviations from its mean.

    Parameters
    ----------
    p, q : (weights, means, covariances)
        As in :func:`gmm_posterior` with d = 1 and one batch shape; each may have its own number of components.

    Returns
    -------
    kl : (...)
        In nats.

    Raises
    ------
    InvalidInput
        As in :func:`gmm_posterior`; more than one variable; other batch axes.
    """
    marks = []
    for name, given in (("p", p), ("q", q)):
        xp, _ = under(name, given, "(weights, means, covariances)", _mixture)
        weights, means, covariances = given
        if means.shape[-1] != 1 or weights.shape[:-1] != p[0].shape[:-1]:
            raise InvalidInput(
                f"{name}: means have shape {tuple(means.shape)}, expected {(*p[0].shape[:-1], 'k', 1)}: one variable, "
                "and one batch shape for both"
            )
        at = xp.asarray(np.linspace(-WIDE, WIDE, CELLS + 1), dtype=means.dtype, device=api.device(means))
        marks.append(xp.reshape(means + xp.sqrt(covariances[..., 0]) * at, (*weights.shape[:-1], -1)))
    edges = xp.sort(xp.concat(marks, axis=-1), axis=-1)
    node, share = (xp.asarray(a, dtype=at.dtype, device=api.device(at)) for a in np.polynomial.legendre.leggauss(NODES))
    half = (edges[..., 1:] - edges[..., :-1])[..., None] / 2
    points = xp.reshape(edges[..., :-1, None] + half * (1 + node), (*edges.shape[:-1], -1, 1))
    log_p, log_q = gmm_log_density(*p, points), gmm_log_density(*q, points)
    return xp.sum(xp.reshape(half * share, log_p.shape) * xp.exp(log_p) * (log_p - log_q), axis=-1)


def _places(xp: Any, x: Any, at: list[int]) -> Any:
    """Return some places of the last axis."""
    return xp.take(x, xp.asarray(at, device=api.device(x)), axis=-1)


def _below(d: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(d) for j in range(i)]


def gmm_tokens(weights: Any, means: Any, covariances: Any) -> Any:
    """Return the components of a mixture as tokens ``[logit w | mu | log diag L | L below its diagonal]``.

    ``Sigma = L Lᵀ`` with L lower triangular; below the diagonal L is read row by row.

    Parameters
    ----------
    weights, means, covariances
        As in :func:`gmm_posterior`; weights below 1 each, so k is at least 2.

    Returns
    -------
    tokens : (..., k, 1 + 2 d + d (d - 1) / 2)
        In the order of the components.

    Raises
    ------
    InvalidInput
        As in :func:`gmm_posterior`, or a weight that is not below 1.

    Notes
    -----
    Source: the released code of Distribution Transformers, which was read; its order below the diagonal is not known.
    """
    xp, lower = _mixture(weights, means, covariances)
    if not bool(xp.all(weights < 1)):
        raise InvalidInput("weights: one is not below 1, where its logit is infinite; use two components or more")
    d = means.shape[-1]
    lower = xp.reshape(lower, (*means.shape[:-1], d * d))
    logit = (xp.log(weights) - xp.log1p(-weights))[..., None]
    parts = [logit, means, xp.log(_places(xp, lower, [i * d + i for i in range(d)]))]  # the last one: log diag L
    return xp.concat([*parts, _places(xp, lower, [i * d + j for i, j in _below(d)])] if d > 1 else parts, axis=-1)


def gmm_from_tokens(tokens: Any, d: int) -> tuple[Any, Any, Any]:
    """Return the mixture that tokens describe, the inverse of :func:`gmm_tokens` for weights that add up to 1.

    ``w_i = sigmoid(logit_i) / sum_j sigmoid(logit_j)``.

    Parameters
    ----------
    tokens : (..., k, 1 + 2 d + d (d - 1) / 2) float array
        Any numbers, a network's for example.
    d : int
        The number of variables.

    Returns
    -------
    weights, means, covariances
        Of the mixture.

    Raises
    ------
    InvalidInput
        Tokens that are no floats, or have another number of entries.

    Notes
    -----
    The released code divides by the sum as here; a summary of the paper says softmax, which is no inverse of the logit.
    The release also adds 1e-6 to the diagonal of L.
    """
    xp, below = _floats(tokens=tokens), _below(whole("d", d, 1))
    axes("tokens", tokens, *tokens.shape[:-2], "k", 1 + 2 * d + len(below))
    logit = tokens[..., 0]
    log_w = xp.where(logit < 0, logit, xp.zeros_like(logit)) - xp.log1p(xp.exp(-xp.abs(logit)))  # log sigmoid
    # what L holds at each place: the diagonal's entries, those below, and the zero at the end
    entries = xp.concat(
        [xp.exp(tokens[..., 1 + d : 1 + 2 * d]), tokens[..., 1 + 2 * d :], 0 * tokens[..., :1]], axis=-1
    )
    at = [i if i == j else d + below.index((i, j)) if j < i else d + len(below) for i in range(d) for j in range(d)]
    lower = xp.reshape(_places(xp, entries, at), (*tokens.shape[:-1], d, d))
    return xp.exp(log_w - _log_sum(xp, log_w)), tokens[..., 1 : 1 + d], _symmetric(lower @ lower.mT)
