"""Attention to a codebook that stands for all tokens, and the codebook by moving averages, as LargeGT has them."""

from __future__ import annotations

from typing import Any, NamedTuple

import array_api_compat as api
import numpy as np

from ..arrays import to_numpy
from ..errors import InvalidInput
from .arguments import axes, instance, namespace, ordered, whole, within
from .parts import attend, numbers, rounded

__all__ = ["Codebook", "batch_norm", "codebook_attention", "codebook_step", "denormalised", "nearest_code"]


class Codebook(NamedTuple):
    """Codes and the moving averages that they are quotients of."""

    codes: Any
    """(m, d): `sums` over `sizes`."""
    sizes: Any
    """(m,): how many tokens a code has, averaged and smoothed."""
    sums: Any
    """(m, d): the sum of a code's tokens, averaged."""


def codebook_attention(query: Any, codes: Any, values: Any, counts: Any, *, scale: float | None = None) -> Any:
    """Return attention to codes, each as often as tokens have it: ``out_i = sum_c n_c e^s_ic v_c / sum_c n_c e^s_ic``.

    It is softmax attention with log n_c added to the scores; a code that no token has is not seen.

    Parameters
    ----------
    query : (b, h_q, n, d) float array
        Of NumPy, PyTorch, CuPy or JAX.
    codes, values : (b, h_kv, m, d), (b, h_kv, m, d_v) arrays
    counts : (m,) array
        Of at least 0: the tokens that have the code.
    scale : float, optional
        None is 1/sqrt(d).

    Returns
    -------
    (b, h_q, n, d_v) array
        Correctly rounded to float64, then to query's type.

    Raises
    ------
    InvalidInput, InvalidProblem
        Which argument is wrong; counts below 0, or all 0.

    Notes
    -----
    Equal to attention to every token's own code, so exact where each token is its own. Source: Dwivedi et al., LargeGT
    (arXiv 2312.11109; public code was read).
    """
    namespace(query=query, codes=codes, values=values, counts=counts)
    axes("codes", codes, "batch", "heads", "codes", "features")
    axes("values", values, *codes.shape[:3], "features")
    axes("counts", counts, codes.shape[2])
    n = to_numpy(counts, "counts").astype(np.float64)
    if not np.isfinite(n).all() or (n < 0).any() or not n.any():
        raise InvalidInput("counts: expected finite numbers of at least 0, and one above it")
    given = [numbers(name, x) for name, x in (("query", query), ("codes", codes), ("values", values))]
    return rounded(attend(*given, scale=scale, weight=n[None, None, None])[0], query)


def nearest_code(x: Any, codes: Any) -> Any:
    """Return each row's nearest code in the Euclidean distance, the lowest where equal.

    Parameters
    ----------
    x : (n, d) array
    codes : (m, d) array

    Returns
    -------
    (n,) integer array

    Raises
    ------
    InvalidInput
        Other shapes, or arrays of two libraries.
    """
    xp = namespace(x=x, codes=codes)
    axes("x", x, "tokens", "features")
    axes("codes", codes, "codes", x.shape[1])
    ordered("x", x)
    ordered("codes", codes)
    # differences, not |x|² + |c|² - 2x·c, which may order near codes wrongly
    return xp.argmin(xp.sum((x[:, None] - codes[None]) ** 2, axis=-1), axis=1)


def codebook_step(x: Any, book: Codebook, *, decay: float = 0.99, epsilon: float = 1e-5) -> tuple[Codebook, Any]:
    """Return the codebook after a batch, by moving averages with Laplace's smoothing, and the batch's codes.

    ``s = decay·sizes + (1 - decay)·counts``, ``N = sum s``, ``sizes' = N·(s + epsilon)/(N + m·epsilon)``,
    ``sums' = decay·sums + (1 - decay)·(sum of a code's rows)``, ``codes' = sums'/sizes'``.

    Parameters
    ----------
    x : (n, d) array
        Rows, normalised by :func:`batch_norm` in the release.
    book : Codebook
        Before.
    decay : float
        What stays of the averages.
    epsilon : float
        Above 0: gives a code without rows a size. Smoothed sizes have the sum N, too, and the next step starts from
        them.

    Returns
    -------
    book : Codebook
    labels : (n,) integer array
        By the codes before.

    Raises
    ------
    InvalidInput
        Other shapes; `decay` not in [0, 1], `epsilon` not above 0.

    Notes
    -----
    Source: LargeGT's public code (read), whose quantiser is that of VQ-VAE (arXiv 1711.00937, appendix A.1; recalled).
    """
    instance("book", book, Codebook, "make one of codes, sizes and sums")
    xp = namespace(x=x, codes=book.codes, sizes=book.sizes, sums=book.sums)
    labels = nearest_code(x, book.codes)
    m = book.codes.shape[0]
    axes("sizes", book.sizes, m)
    axes("sums", book.sums, *book.codes.shape)
    decay, epsilon = within("decay", decay, 0, 1), within("epsilon", epsilon, 0, 1, open_low=True)
    own = xp.astype(labels == xp.arange(m, device=api.device(x))[:, None], x.dtype)
    sizes = book.sizes * decay + (1 - decay) * xp.sum(own, axis=1)
    total = xp.sum(sizes)
    sizes = (sizes + epsilon) / (total + m * epsilon) * total
    sums = book.sums * decay + (1 - decay) * xp.matmul(own, x)
    return Codebook(sums / sizes[:, None], sizes, sums), labels


def batch_norm(
    x: Any, mean: Any, variance: Any, *, momentum: float = 0.1, epsilon: float = 1e-5
) -> tuple[Any, Any, Any]:
    """Return a batch less its mean over ``sqrt(variance + epsilon)``, and the running mean and variance after it.

    The batch is divided by its biased variance; the running one averages unbiased variances, as PyTorch's BatchNorm
    without weights does.

    Parameters
    ----------
    x : (n, d) array
        At least two rows.
    mean, variance : (d,) arrays
        Running ones before.
    momentum : float
        The new batch's share of the running ones.
    epsilon : float
        At least 0.

    Returns
    -------
    x : (n, d), mean : (d,), variance : (d,) arrays
    """
    xp = namespace(x=x, mean=mean, variance=variance)
    axes("x", x, "rows", "features")
    whole("x's rows", x.shape[0], 2)
    axes("mean", mean, x.shape[1])
    axes("variance", variance, x.shape[1])
    momentum, epsilon = within("momentum", momentum, 0, 1), within("epsilon", epsilon, 0, 1)
    own, spread = xp.mean(x, axis=0), xp.var(x, axis=0)
    unbiased = spread * (x.shape[0] / (x.shape[0] - 1))
    scaled = (x - own) / xp.sqrt(spread + epsilon)
    return scaled, mean + momentum * (own - mean), variance + momentum * (unbiased - variance)


def denormalised(codes: Any, mean: Any, variance: Any, *, epsilon: float = 1e-5) -> Any:
    """Return codes as they stand for tokens before :func:`batch_norm`: ``codes·sqrt(variance + epsilon) + mean``."""
    xp = namespace(codes=codes, mean=mean, variance=variance)
    axes("codes", codes, "codes", "features")
    axes("mean", mean, codes.shape[1])
    axes("variance", variance, codes.shape[1])
    return codes * xp.sqrt(variance + within("epsilon", epsilon, 0, 1)) + mean
