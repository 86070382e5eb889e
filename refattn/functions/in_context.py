"""In-context decisions by layers of ReLU attention: ridge regression, LinUCB, Thompson sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import array_api_compat as api

from ..errors import InvalidInput
from .arguments import axes, factor, namespace, ordered, whole, within

__all__ = [
    "arm_scores",
    "in_context_ridge",
    "inverse_root",
    "linucb",
    "relu_attention",
    "ridge_layer",
    "ridge_tokens",
    "soft_linucb",
    "thompson_scores",
]


def _like(x: Any) -> dict[str, Any]:
    return {"dtype": x.dtype, "device": api.device(x)}


def _rows(name: str, x: Any, *wanted: str | int) -> None:
    """Check an array's shape as :func:`axes` does, but that a named axis may be empty: nothing may have been seen."""
    if x.ndim != len(wanted) or any(isinstance(w, int) and n != w for n, w in zip(x.shape, wanted, strict=True)):
        said = ", ".join(map(str, wanted))
        raise InvalidInput(f"{name}: shape is {tuple(x.shape)}, expected ({said})")


def relu_attention(h: Any, query: Any, key: Any, value: Any, *, normalize: str = "count") -> Any:
    """Return tokens after causal ReLU attention: ``h_i + (1/i) sum_m sum_{j<=i} relu(Q_m h_i · K_m h_j) V_m h_j``.

    Parameters
    ----------
    h : (n, d) array
        Tokens.
    query, key : (m, r, d) array
        Matrices Q and K of m heads.
    value : (m, d, d) array
        Matrices V.
    normalize : str
        "count" divides by the number i of tokens up to the row's own, "none" by nothing.

    Returns
    -------
    h : (n, d)
        The residual is included.

    Raises
    ------
    InvalidInput
        Shapes that do not fit together, or another `normalize`.

    Notes
    -----
    Logits are not scaled. Source: Transformers as Decision Makers, arXiv 2310.08566 (the released code was read: there
    the division is a switch, and the number of heads is ignored, so that m = 1).
    """
    xp = namespace(h=h, query=query, key=key, value=value)
    axes("h", h, "n", "d")
    n, d = h.shape
    axes("query", query, "m", "r", d)
    axes("key", key, *query.shape)
    axes("value", value, query.shape[0], d, d)
    if normalize not in ("count", "none"):
        raise InvalidInput(f"normalize: got {normalize!r}, expected 'count' or 'none'")
    logits = xp.tril((h @ query.mT) @ (h @ key.mT).mT)
    heads = xp.where(logits > 0, logits, 0 * logits) @ (h @ value.mT)
    added = xp.sum(heads, axis=0)
    return h + (added / xp.asarray([[i + 1] for i in range(n)], **_like(h)) if normalize == "count" else added)


def ridge_tokens(actions: Any, rewards: Any, targets: Any) -> Any:
    """Return tokens ``[w | asks | action | reward | target]`` for :func:`ridge_layer`, all w = 0.

    Parameters
    ----------
    actions : (T, d) array
        What was done; T may be 0.
    rewards : (T,) array
        What it gave.
    targets : (K, d) array
        Vectors b of which ``V^-1 b`` is wanted, ``V = weight I + sum_t a_t a_tᵀ``.

    Returns
    -------
    tokens : (1 + T + K, 3 d + 2)
        One without an action, one for each action (these ask for the estimate), one for each target.

    Raises
    ------
    InvalidInput
        Shapes that do not fit together.
    """
    xp = namespace(actions=actions, rewards=rewards, targets=targets)
    _rows("targets", targets, "K", "d")
    wanted, d = targets.shape
    _rows("actions", actions, "T", d)
    steps = actions.shape[0]
    _rows("rewards", rewards, steps)

    def zeros(*shape: int) -> Any:
        return xp.zeros(shape, **_like(targets))

    seen = xp.concat([zeros(1, d + 1), xp.concat([actions, rewards[:, None]], axis=-1), zeros(wanted, d + 1)], axis=0)
    asks = xp.concat([zeros(1 + steps, 1) + 1, zeros(wanted, 1)], axis=0)
    aimed = xp.concat([zeros(1 + steps, d), targets], axis=0)
    return xp.concat([zeros(1 + steps + wanted, d), asks, seen, aimed], axis=-1)


def ridge_layer(tokens: Any, *, step: Any, weight: Any = 1) -> Callable[[Any], Any]:
    """Return a layer, a function of tokens, that takes a gradient step in each: ``w_i - step (V_i w_i - b_i)``.

    Two heads, s = 1 and -1, with logits ``s (w_i·a_j - asks_i r_j)`` and values ``-step s a_j`` add up to the gradient
    of the squared error over the actions up to the token's own: relu(t) - relu(-t) = t. A linear network adds
    ``step (target_i - weight w_i)``.

    Parameters
    ----------
    tokens : (n, 3 d + 2) array
        Of :func:`ridge_tokens`; what they hold does not matter.
    step, weight : number
        The step, and what the ridge weighs.

    Returns
    -------
    layer : callable
        Takes such tokens and returns them with another w.

    Raises
    ------
    InvalidInput
        Tokens of another width.

    Notes
    -----
    The construction is ours, after the paper's claim (arXiv 2310.08566): attention without division by the count.
    Tokens without an action have a = 0, so that they add nothing and need no mask.
    """
    xp = namespace(tokens=tokens)
    axes("tokens", tokens, "n", "3 d + 2")
    width = tokens.shape[-1]
    d = (width - 2) // 3
    if width != 3 * d + 2 or d < 1:
        raise InvalidInput(f"tokens: have {width} entries, expected 3 d + 2; use ridge_tokens")
    for name, x in (("step", step), ("weight", weight)):
        if not factor(name, x) >= 0 or math.isinf(float(x)):
            raise InvalidInput(f"{name}: got {x!r}, expected a finite number of at least 0")
    like = _like(tokens)
    sign = xp.asarray([[[1]], [[-1]]], **like)
    query = sign * (xp.eye(d + 1, width, **like) * xp.asarray([[1]] * d + [[-1]], **like))
    key = xp.eye(d + 1, width, k=d + 1, **like) + 0 * query
    place = xp.eye(width, width, k=d + 1, **like) * xp.asarray([[1]] * d + [[0]] * (width - d), **like)
    value = -step * sign * place

    def layer(h: Any) -> Any:
        after = relu_attention(h, query, key, value, normalize="none")
        w = after[:, :d] + step * (h[:, -d:] - weight * h[:, :d])
        return xp.concat([w, after[:, d:]], axis=-1)

    return layer


def in_context_ridge(
    actions: Any, rewards: Any, targets: Any, *, depth: int, weight: float = 1.0, step: float | None = None
) -> tuple[Any, Any]:
    """Return ridge estimates after every step and ``V^-1 b`` of targets, by a stack of layers.

    Parameters
    ----------
    actions, rewards, targets
        As in :func:`ridge_tokens`.
    depth : int
        The number of layers.
    weight : float
        What the ridge weighs, above 0.
    step : float, optional
        By default 2 / (weight + M), M the largest eigenvalue of V.

    Returns
    -------
    estimates : (T + 1, d)
        Row t is of the first t actions.
    solved : (K, d)
        Of the targets.

    Raises
    ------
    InvalidInput
        Shapes that do not fit together; a depth below 0; a weight or step that is not above 0.

    Notes
    -----
    With the default step an error shrinks with every layer by (kappa - 1)/(kappa + 1) at least, kappa = M / weight.
    """
    xp = namespace(actions=actions, rewards=rewards, targets=targets)
    ordered("actions", actions)
    tokens = ridge_tokens(actions, rewards, targets)
    within("weight", weight, 0, math.inf, open_low=True)
    if step is None:
        d = targets.shape[1]
        largest = xp.linalg.eigvalsh(actions.mT @ actions + weight * xp.eye(d, **_like(targets)))[-1]
        step = 2 / (weight + float(largest))
    within("step", step, 0, math.inf, open_low=True)
    layer = ridge_layer(tokens, step=step, weight=weight)
    for _ in range(whole("depth", depth, 0)):
        tokens = layer(tokens)
    first = 1 + actions.shape[0]
    return tokens[:first, : targets.shape[1]], tokens[first:, : targets.shape[1]]


def _gram(xp: Any, actions: Any, like: Any, weight: float) -> Any:
    return actions.mT @ actions + weight * xp.eye(like.shape[1], **_like(like))


def arm_scores(
    actions: Any, rewards: Any, arms: Any, *, weight: float = 1.0, depth: int | None = None, step: float | None = None
) -> tuple[Any, Any]:
    """Return each arm's mean ``a·theta`` and uncertainty ``sqrt(aᵀ V^-1 a)``, by layers or solved.

    Parameters
    ----------
    actions, rewards
        What was done, (T, d), and what it gave, (T,); T may be 0.
    arms : (K, d) array
        To choose from.
    weight, step
        As in :func:`in_context_ridge`.
    depth : int, optional
        The number of layers; None solves the linear systems.

    Returns
    -------
    mean, uncertainty : (K,)
        A square below 0, which few layers may leave, counts as 0.

    Raises
    ------
    InvalidInput
        As in :func:`in_context_ridge`.
    """
    xp = namespace(actions=actions, rewards=rewards, arms=arms)
    _rows("arms", arms, "K", "d")
    if depth is None:
        ridge_tokens(actions, rewards, arms)  # for its errors
        within("weight", weight, 0, math.inf, open_low=True)
        v = _gram(xp, actions, arms, weight)
        theta = xp.linalg.solve(v, (rewards @ actions)[:, None])[:, 0]
        solved = xp.linalg.solve(v, arms.mT).mT
    else:
        estimates, solved = in_context_ridge(actions, rewards, arms, depth=depth, weight=weight, step=step)
        theta = estimates[-1]
    square = xp.sum(arms * solved, axis=-1)
    return arms @ theta, xp.sqrt(xp.where(square > 0, square, 0 * square))


def linucb(mean: Any, uncertainty: Any, width: float) -> int:
    """Return the arm that LinUCB takes: the first with the largest ``mean + width uncertainty``.

    Parameters
    ----------
    mean, uncertainty : (K,) array
        Of :func:`arm_scores`.
    width : float
        How much uncertainty is worth, at least 0.

    Returns
    -------
    arm : int
        Its place.

    Raises
    ------
    InvalidInput
        Shapes that do not fit together, or a width below 0.

    Notes
    -----
    The released code takes a width of 2 and its first arm at random.
    """
    xp = namespace(mean=mean, uncertainty=uncertainty)
    axes("mean", mean, "K")
    axes("uncertainty", uncertainty, *mean.shape)
    ordered("mean", mean)
    ordered("uncertainty", uncertainty)
    return int(xp.argmax(mean + within("width", width, 0, math.inf) * uncertainty))


def soft_linucb(mean: Any, uncertainty: Any, width: float, temperature: float) -> Any:
    """Return probabilities of arms that grow with LinUCB's scores: ``exp(score / temperature)`` over their sum.

    Parameters
    ----------
    mean, uncertainty, width
        As in :func:`linucb`.
    temperature : float
        Above 0; LinUCB is the limit at 0.

    Returns
    -------
    probabilities : (K,)
        Of the arms.

    Raises
    ------
    InvalidInput
        As in :func:`linucb`; a temperature that is not above 0.

    Notes
    -----
    Recalled from arXiv 2310.08566.
    """
    xp = namespace(mean=mean, uncertainty=uncertainty)
    best = linucb(mean, uncertainty, width)
    scores = mean + width * uncertainty
    p = xp.exp((scores - scores[best]) / within("temperature", temperature, 0, math.inf, open_low=True))
    return p / xp.sum(p)


def inverse_root(matrix: Any, rounds: int) -> Any:
    """Return ``matrix^-1/2`` by Newton-Schulz iterations: products only, as layers can compute them.

    From ``Y = A / c, Z = I`` with c the trace, each round takes ``T = (3 I - Z Y) / 2``, Y to Y T and Z to T Z.

    Parameters
    ----------
    matrix : (d, d) array
        Symmetric and positive definite.
    rounds : int
        The residual ``|I - Z Y|`` goes from e to (3 e² + e³)/4 at most: about 1.2 log(c / smallest eigenvalue) rounds
        and a few more.

    Returns
    -------
    root : (d, d)
        Z / sqrt(c).

    Raises
    ------
    InvalidInput
        A matrix that is not square, or rounds below 0.
    """
    xp = namespace(matrix=matrix)
    axes("matrix", matrix, "d", *matrix.shape[:1])
    eye = xp.eye(matrix.shape[0], **_like(matrix))
    c = xp.linalg.trace(matrix)
    y, z = matrix / c, eye
    for _ in range(whole("rounds", rounds, 0)):
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
    return z / xp.sqrt(c)


def thompson_scores(
    actions: Any, rewards: Any, arms: Any, noise: Any, *,
    weight: float = 1.0, variance: float = 1.0, depth: int | None = None,
) -> Any:  # fmt: skip
    """Return scores of arms under a draw from the posterior, ``a·(theta + sqrt(variance) V^-1/2 noise)``.

    Parameters
    ----------
    actions, rewards, arms
        As in :func:`arm_scores`.
    noise : (d,) array
        Standard normal numbers; the arm with the largest score is Thompson sampling's.
    weight, variance : float
        Of the reward's noise the variance; the weight is that over the prior's, both above 0.
    depth : int, optional
        Layers for theta and rounds for the root; None solves, with a root by eigenvectors.

    Returns
    -------
    scores : (K,)
        Of the arms.

    Raises
    ------
    InvalidInput
        As in :func:`in_context_ridge`.
    """
    xp = namespace(actions=actions, rewards=rewards, arms=arms, noise=noise)
    mean, _ = arm_scores(actions, rewards, arms, weight=weight, depth=depth)
    axes("noise", noise, arms.shape[1])
    v = _gram(xp, actions, arms, weight)
    if depth is None:
        values, vectors = xp.linalg.eigh(v)
        root = (vectors / xp.sqrt(values)) @ vectors.mT
    else:
        root = inverse_root(v, depth)
    return mean + math.sqrt(within("variance", variance, 0, math.inf, open_low=True)) * (arms @ (root @ noise))
