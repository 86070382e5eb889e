"""Attention within clusters of tokens, as the Routing Transformer has it: k-means, membership, scatter, losses."""

from __future__ import annotations

from typing import Any

import array_api_compat as api
import numpy as np
from numpy.typing import NDArray

from ..arrays import like
from ..errors import InvalidInput
from .arguments import axes, namespace, ordered, places, whole, within
from .dense import check_floats
from .parts import attend, numbers, rounded

__all__ = [
    "cluster_scores",
    "commitment_loss",
    "kmeans",
    "kmeans_step",
    "members_of",
    "moving_average",
    "nearest_mean",
    "normalised",
    "routing_attention",
    "routing_products",
    "scatter_mean",
]

SOURCE_MODES = ("paper", "released")
RELEASED_EPSILON = 1e-5
"""What the release adds to the number of memberships before it divides."""


def normalised(x: Any) -> Any:
    """Return vectors of length 1: ``x / |x|`` along the last axis; a zero vector stays 0."""
    xp = namespace(x=x)
    if x.ndim < 1:
        raise InvalidInput("x: has no axes, expected (..., features)")
    square = xp.sum(x * x, axis=-1, keepdims=True)
    return x / xp.sqrt(xp.where(square > 0, square, xp.ones_like(square)))


def _checked(x: Any, means: Any) -> Any:
    xp = namespace(x=x, means=means)
    axes("x", x, "batch", "heads", "tokens", "features")
    axes("means", means, x.shape[1], "clusters", x.shape[3])
    return xp


def cluster_scores(x: Any, means: Any) -> Any:
    """Return how near tokens are to means: ``s_nc = x_n·mu_c / |x_n|``.

    Parameters
    ----------
    x : (b, h, n, d) array
        Tokens.
    means : (h, c, d) array
        Of each head's clusters.

    Returns
    -------
    (b, h, n, c) array

    Raises
    ------
    InvalidInput
        Other shapes, or arrays of two libraries.
    """
    xp = _checked(x, means)
    return xp.matmul(normalised(x), xp.matrix_transpose(means))


def nearest_mean(x: Any, means: Any) -> Any:
    """Return each token's cluster, that of the highest :func:`cluster_scores`; of equal ones the lowest.

    Returns
    -------
    (b, h, n) integer array
    """
    scores = cluster_scores(x, means)
    ordered("x, means", scores)
    return namespace(x=x).argmax(scores, axis=-1)


def kmeans_step(x: Any, means: Any) -> Any:
    """Return the next means of spherical k-means: ``mu_c = normalised(sum of the tokens nearest to c)``.

    The sum runs over batch and tokens. A cluster without tokens keeps its mean.

    Parameters
    ----------
    x : (b, h, n, d) array
        Tokens. The release sums normalised ones in training, and those of its first batch as they are.
    means : (h, c, d) array

    Returns
    -------
    (h, c, d) array

    Notes
    -----
    Source: Roy et al., Routing Transformer (arXiv 2003.05997); the public code of routing_transformer 1.6.1 was read.
    """
    xp = _checked(x, means)
    own = nearest_mean(x, means)[..., None] == xp.arange(means.shape[1], device=api.device(means))
    sums = xp.sum(xp.matmul(xp.matrix_transpose(xp.astype(own, x.dtype)), x), axis=0)
    return xp.where(xp.any(own, axis=(0, 2))[..., None], normalised(sums), means)


def kmeans(x: Any, means: Any, *, iterations: int = 10) -> Any:
    """Return the means after some steps of :func:`kmeans_step` from given ones.

    Parameters
    ----------
    x : (b, h, n, d) array
    means : (h, c, d) array
        To start from; the release draws tokens.
    iterations : int
        The release's initialisation takes 10.
    """
    for _ in range(whole("iterations", iterations, 0)):
        means = kmeans_step(x, means)
    return means


def moving_average(old: Any, new: Any, *, decay: float = 0.999) -> Any:
    """Return the exponential moving average ``decay·old + (1 - decay)·new``.

    Means that are averaged so are no longer of length 1; neither paper nor release normalises them again.
    """
    namespace(old=old, new=new)
    axes("new", new, *old.shape)
    decay = within("decay", decay, 0, 1)
    return old * decay + new * (1 - decay)


def members_of(scores: Any, window: int) -> Any:
    """Return the members of every cluster: the `window` tokens of the highest scores, the lower index where equal.

    Each cluster chooses its tokens. So a token may be in several clusters, or in none.

    Parameters
    ----------
    scores : (..., n, c) array
    window : int
        Tokens of a cluster, at most n.

    Returns
    -------
    (..., c, window) integer array
        From the highest score to the lowest.

    Raises
    ------
    InvalidInput
        A window that is no whole number from 1 to n.
    """
    xp = check_floats(scores=scores)
    if scores.ndim < 2:
        raise InvalidInput(f"scores: shape is {tuple(scores.shape)}, expected (..., tokens, clusters)")
    window = whole("window", window, 1, scores.shape[-2])
    ordered("scores", scores)
    # sorting scores in descending order would put equal ones in descending order, too
    order = xp.argsort(-xp.matrix_transpose(scores), axis=-1, stable=True)
    return order[..., :window]


def scatter_mean(x: Any, members: Any, tokens: int, *, epsilon: float = 0.0) -> Any:
    """Return every token's mean over its memberships: ``sum of x where members = t / (count + epsilon)``.

    Parameters
    ----------
    x : (..., m, d) array
        What each membership gives.
    members : (..., m) integer array
        The token of each.
    tokens : int
        How many there are.
    epsilon : float
        The release in PyTorch adds 1e-5.

    Returns
    -------
    (..., tokens, d) array
        0 for a token without a membership.

    Raises
    ------
    InvalidInput
        Other shapes.
    """
    xp = namespace(x=x, members=members)
    if x.ndim < 2 or tuple(members.shape) != tuple(x.shape[:-1]):
        raise InvalidInput(f"members: shape is {tuple(members.shape)}, expected x's without its last axis")
    tokens, epsilon = whole("tokens", tokens, 1), within("epsilon", epsilon, 0, 1)
    places("members", members, tokens)
    own = xp.astype(members[..., None, :] == xp.arange(tokens, device=api.device(x))[:, None], x.dtype)
    count = xp.sum(own, axis=-1)[..., None]
    none = count == 0
    return xp.where(none, xp.zeros_like(count), xp.matmul(own, x) / (xp.where(none, 1 + count, count) + epsilon))


def commitment_loss(x: Any, means: Any, *, weight: float = 1e-4) -> Any:
    """Return what pulls tokens to the means: ``weight · mean over all elements of (x / |x| - mu of its cluster)²``.

    Parameters
    ----------
    x : (b, h, n, d) PyTorch tensor
    means : (h, c, d) PyTorch tensor
        No gradient flows into them, nor through the choice of a cluster.
    weight : float
        The release's is 1e-4.

    Returns
    -------
    Scalar tensor

    Notes
    -----
    Source: public code of routing_transformer 1.6.1 (read).
    """
    import torch

    for name, t in (("x", x), ("means", means)):
        if not isinstance(t, torch.Tensor):
            raise InvalidInput(f"{name}: got {type(t).__name__}, expected a PyTorch tensor")
    check_floats(x=x, means=means)
    weight = within("weight", weight, 0, float("inf"))
    with torch.no_grad():
        own = torch.nn.functional.one_hot(nearest_mean(x, means), means.shape[1]).to(means.dtype)
        wanted = own @ means
    return weight * ((normalised(x) - wanted) ** 2).mean()


def routing_products(n: int, clusters: int, window: int) -> int:
    """Return the products of vectors that a head computes: ``2·n·clusters + clusters·window²``.

    Every query and key with every mean, and in each cluster every query with every key. With ``n / clusters`` tokens a
    cluster and ``sqrt(n)`` clusters these are ``3·n^1.5``.
    """
    n, clusters = whole("n", n, 1), whole("clusters", clusters, 1)
    return 2 * n * clusters + clusters * whole("window", window, 1, n) ** 2


def routing_attention(
    query: Any,
    key: Any,
    value: Any,
    means: Any,
    *,
    window: int,
    causal: str | None = None,
    scale: float | None = None,
    memory: tuple[Any, Any] | None = None,
    mode: str = "paper",
) -> tuple[Any, tuple[Any, Any]]:
    """Return attention within clusters, each token's mean over the clusters that it is in.

    Each cluster takes its `window` nearest queries and its `window` nearest keys, whose softmax attention is computed
    exactly and rounded to float64. The mean is taken in float64 and rounded to query's type. No gradient.

    Parameters
    ----------
    query : (b, h, n, d) float array
        Of NumPy, PyTorch, CuPy or JAX.
    key : (b, h, n_k, d) array or None
        None shares query: keys are normalised queries, the members are the same, and a token sees itself only where it
        sees no other key.
    value : (b, h, n_k, d_v) array
    means : (h, c, d) array
        Of the clusters.
    window : int
        Queries and keys of a cluster, at most n and n_k.
    causal : {None, "bottom_right", "top_left"}
        By places in the sequence. It does not make the operator causal: see Notes.
    scale : float, optional
        None is 1/sqrt(d).
    memory : pair of (h, c, m, d) and (h, c, m, d_v) arrays, optional
        Keys and values that every query of a cluster sees besides.
    mode : {"paper", "released"}
        The release divides by the number of memberships plus 1e-5.

    Returns
    -------
    out : (b, h, n, d_v) array
        0 for a token that no cluster took. A token that sees no key in a cluster has 0 from there.
    members : pair of (b, h, c, window) integer arrays
        The queries and the keys of each cluster.

    Raises
    ------
    InvalidInput, InvalidProblem
        Which argument is wrong, what was expected.

    Notes
    -----
    A cluster's membership depends on all tokens, later ones, too. So with `causal` earlier outputs still change when
    later tokens do. Source: Roy et al., Routing Transformer (arXiv 2003.05997); public code of routing_transformer
    1.6.1 was read, whose self score of -50000 for shared queries has weight 0 beside any other key.
    """
    if mode not in SOURCE_MODES:
        raise InvalidInput(f"mode: got {mode!r}, expected one of {', '.join(SOURCE_MODES)}")
    if causal not in (None, "bottom_right", "top_left"):
        raise InvalidInput(f"causal: got {causal!r}, expected None, 'bottom_right' or 'top_left'")
    namespace(query=query, value=value, means=means, **({} if key is None else {"key": key}))
    axes("query", query, "batch", "heads", "tokens", "features")
    b, h, n, d = query.shape
    shared, key = key is None, query if key is None else key
    axes("key", key, b, h, "tokens", d)
    n_k = key.shape[2]
    axes("value", value, b, h, n_k, "features")
    axes("means", means, h, "clusters", d)
    window = whole("window", window, 1, min(n, n_k))
    q, k, v, mu = (numbers(m, x) for m, x in (("query", query), ("key", key), ("value", value), ("means", means)))
    chosen = members_of(cluster_scores(q, mu), window)
    taken = chosen if shared else members_of(cluster_scores(k, mu), window)
    k = normalised(k) if shared else k
    seen = _seen(chosen, taken, causal, n_k - n if causal == "bottom_right" else 0)
    if shared:
        own = chosen[..., :, None] == taken[..., None, :]
        others = (seen & ~own).any(-1, keepdims=True) | (memory is not None)
        seen &= ~own | ~others
    inner = [_gathered(q, chosen), _gathered(k, taken), _gathered(v, taken)]
    if memory is not None:
        inner[1:], seen = _with_memory(inner[1:], seen, memory, (h, mu.shape[1], d, v.shape[3]))
    parts, _ = attend(*inner, scale=scale, allowed=seen.reshape(b, -1, window, seen.shape[-1]))
    flat = chosen.reshape(b, h, -1)
    out = scatter_mean(parts.reshape(b, h, flat.shape[2], -1), flat, n, epsilon=RELEASED_EPSILON * (mode != "paper"))
    return rounded(out, query), (like(chosen, query), like(taken, query))


def _seen(chosen: NDArray[Any], taken: NDArray[Any], causal: str | None, shift: int) -> NDArray[Any]:
    """Return which key of a cluster each of its queries sees: all, or those at its place and before."""
    if causal is None:
        return np.ones((*chosen.shape, taken.shape[-1]), bool)
    return np.asarray(chosen[..., :, None] + shift >= taken[..., None, :])


def _gathered(x: NDArray[Any], members: NDArray[Any]) -> NDArray[Any]:
    """Return tokens (b, h, n, d) by cluster, one head a cluster: (b, h·c, window, d)."""
    b, h, c, w = members.shape
    return np.take_along_axis(x, members.reshape(b, h, c * w, 1), axis=2).reshape(b, h * c, w, x.shape[3])


def _with_memory(
    inner: list[NDArray[Any]], seen: NDArray[Any], memory: tuple[Any, Any], sizes: tuple[int, int, int, int]
) -> tuple[list[NDArray[Any]], NDArray[Any]]:
    """Put a cluster's memory before its keys and values."""
    h, c, d, d_v = sizes
    if not isinstance(memory, tuple | list) or len(memory) != 2:
        raise InvalidInput(f"memory: got {type(memory).__name__}, expected a pair of keys and values")
    k, v = (numbers(f"memory {name}", x) for name, x in zip(("key", "value"), memory, strict=True))
    axes("memory key", k, h, c, "memory", d)
    m = k.shape[2]
    axes("memory value", v, h, c, m, d_v)
    b = inner[0].shape[0]
    before = [x.reshape(1, h * c, m, -1) for x in (k, v)]
    joined = [np.concatenate([np.repeat(x, b, 0), y], 2) for x, y in zip(before, inner, strict=True)]
    return joined, np.concatenate([np.ones((*seen.shape[:-1], m), bool), seen], -1)
