"""In-context planning in a finite world: visits counted by a layer of ReLU attention, and UCB-VI from them."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat as api

from ..errors import InvalidInput
from .arguments import axes, namespace, places, whole, within
from .in_context import relu_attention

__all__ = ["ucb_vi", "visit_sums"]


def _one_hot(xp: Any, index: Any, size: int, like: dict[str, Any]) -> Any:
    return xp.astype(index[:, None] == xp.arange(size, device=like["device"]), like["dtype"])


def _check_sizes(sizes: Any) -> None:
    if not isinstance(sizes, tuple | list) or len(sizes) != 3:
        raise InvalidInput(f"sizes: got {sizes!r}, expected the numbers of steps, states and actions")
    for n in sizes:
        whole("sizes", n, 1)


def visit_sums(visits: Any, values: Any, sizes: tuple[int, int, int]) -> Any:
    """Return sums of values over the visits of every (step, state, action), by one layer of ReLU attention.

    Tokens hold one-hot codes of step, state and action, and a token for each triple asks: the head
    ``relu(query·key - 2)`` is 1 where all three codes match and 0 elsewhere.

    Parameters
    ----------
    visits : (T, 3) integer array
        Step, state and action, from 0 on.
    values : (T, m) float array
        What to add up: a column of ones counts.
    sizes : (int, int, int)
        The number H of steps, S of states and A of actions.

    Returns
    -------
    sums : (H, S, A, m)
        Of the values.

    Raises
    ------
    InvalidInput
        Shapes that do not fit together, or a visit out of range.

    Notes
    -----
    The construction is ours, for what arXiv 2310.08566 claims of UCB-VI.
    """
    xp = namespace(visits=visits, values=values)
    axes("visits", visits, "T", 3)
    axes("values", values, visits.shape[0], "m")
    _check_sizes(sizes)
    if not xp.isdtype(visits.dtype, "integral"):
        raise InvalidInput(f"visits: is of {visits.dtype}, expected integers")
    for i, (what, n) in enumerate(zip(("step", "state", "action"), sizes, strict=True)):
        if not bool(xp.all((visits[:, i] >= 0) & (visits[:, i] < n))):
            raise InvalidInput(f"visits: a {what} is out of range, expected 0 to {n - 1}; see sizes")
    like = {"dtype": values.dtype, "device": api.device(values)}
    cells, m, width = math.prod(sizes), values.shape[1], sum(sizes)
    cell = xp.arange(cells, device=like["device"])
    every = [cell // (sizes[1] * sizes[2]), cell // sizes[2] % sizes[1], cell % sizes[2]]
    codes = xp.concat(
        [
            xp.concat([_one_hot(xp, visits[:, i], n, like), _one_hot(xp, every[i], n, like)], axis=0)
            for i, n in enumerate(sizes)
        ],
        axis=-1,
    )
    given = xp.concat([values, xp.zeros((cells, m), **like)], axis=0)
    rows = codes.shape[0]
    # [codes | 1 | values | sums]
    h = xp.concat([codes, xp.ones((rows, 1), **like), given, xp.zeros((rows, m), **like)], axis=-1)
    key = xp.eye(width + 1, h.shape[1], **like)
    query = key * xp.asarray([[1]] * width + [[-2]], **like)
    value = xp.eye(h.shape[1], k=-m, **like) * xp.asarray([[0]] * (width + 1 + m) + [[1]] * m, **like)
    out = relu_attention(h, query[None], key[None], value[None], normalize="none")
    return xp.reshape(out[-cells:, -m:], (*sizes, m))


def ucb_vi(
    visits: Any, rewards: Any, following: Any, sizes: tuple[int, int, int], bonus: float, *, layers: int | None = None
) -> Any:
    """Return the optimistic values by which UCB-VI acts: backward induction with ``bonus / sqrt(N)`` added.

    ``Q_h(s, a) = min(H, r + sum_s' P(s') max_a' Q_{h+1}(s', a') + bonus / sqrt(N))`` with means r and shares P over the
    N visits of (h, s, a), and H where there are none.

    Parameters
    ----------
    visits, sizes
        As in :func:`visit_sums`.
    rewards : (T,) float array
        Of each visit, from 0 to 1.
    following : (T,) integer array
        The state after it.
    bonus : float
        At least 0.
    layers : int, optional
        How many steps back, each made for all h at once, as a stack of so many layers makes them: values of the last
        so many steps are UCB-VI's, those before look so many steps ahead. None is H, with which all are.

    Returns
    -------
    values : (H, S, A)
        The policy takes the action with the largest.

    Raises
    ------
    InvalidInput
        As in :func:`visit_sums`; a state, a reward or the bonus out of range.

    Notes
    -----
    Recalled from Azar, Osband and Munos 2017, which arXiv 2310.08566 imitates; their bonus has a logarithm in it.
    """
    xp = namespace(visits=visits, rewards=rewards, following=following)
    axes("visits", visits, "T", 3)
    axes("rewards", rewards, visits.shape[0])
    axes("following", following, visits.shape[0])
    within("bonus", bonus, 0, math.inf)
    _check_sizes(sizes)
    horizon, states, _ = sizes
    places("following", following, states)
    if bool(xp.any(~((rewards >= 0) & (rewards <= 1)))):
        raise InvalidInput("rewards: one is out of range, expected numbers from 0 to 1")
    like = {"dtype": rewards.dtype, "device": api.device(rewards)}
    after = _one_hot(xp, following, states, like)
    sums = visit_sums(visits, xp.concat([xp.ones_like(rewards)[:, None], rewards[:, None], after], axis=-1), sizes)
    count = sums[..., 0]
    n = xp.where(count > 0, count, xp.ones_like(count))
    later, past = xp.zeros((horizon, states), **like), xp.zeros((1, states), **like)
    for _ in range(horizon if layers is None else min(whole("layers", layers, 1), horizon)):
        q = (sums[..., 1] + (sums[..., 2:] @ later[:, None, :, None])[..., 0]) / n + bonus / xp.sqrt(n)
        q = xp.where((count > 0) & (q < horizon), q, horizon * xp.ones_like(q))
        later = xp.concat([xp.max(q, axis=-1)[1:], past], axis=0)
    return q
