"""Attention, state-space models and gated RNNs as one linear recurrence, and the masked matrix that it is."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InvalidInput
from .arguments import flag, instance, namespace, numbers, whole
from .dense import as_index

__all__ = [
    "Recurrence", "attention_normaliser", "gated_recurrence", "linear_recurrence", "normalised_recurrence",
    "recurrence_matrix", "run_recurrence", "selective_recurrence", "taylor_features",
]  # fmt: skip


@dataclass(frozen=True)
class Recurrence:
    """A system ``h_t = decay_t ∘ h_{t-1} + write_t ∘ v_t``, ``y_t = sum_s (read_t ∘ h_t)[s]``, h_t of shape (s, d_v).

    Attributes
    ----------
    decay, write, read : (..., n, s, c) arrays
        Of one library; s or c may be 1, and is then the same for all states or all features of values. Any numbers
        that an array of NumPy holds will do, fractions too.

    Raises
    ------
    InvalidInput
        An attribute is no array or of another library, or has other axes.

    Notes
    -----
    Source: Sieber et al., Understanding the differences in foundation models (arXiv 2405.15731; an overview and code
    were read): ``h_i = Lambda_i h_{i-1} + B_i u_i``, ``y_i = C_i h_i``, here with Lambda_i diagonal.
    """

    decay: Any
    write: Any
    read: Any

    def __post_init__(self) -> None:
        parts = {"decay": self.decay, "write": self.write, "read": self.read}
        namespace(**parts)
        for name, x in parts.items():
            if x.ndim < 3 or x.shape[-3] != self.read.shape[-3] or 0 in x.shape:
                raise InvalidInput(
                    f"{name}: shape is {tuple(x.shape)}, expected (..., n, states, features), n as of read's "
                    f"{tuple(self.read.shape)}, each at least 1"
                )


def linear_recurrence(query: Any, key: Any) -> Recurrence:
    """Return causal linear attention ``y_t = sum_{j<=t} (q_t·k_j) v_j`` as a system: nothing decays.

    Parameters
    ----------
    query, key : (..., n, s) arrays
        Features of queries and keys.

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    Source: as :class:`Recurrence`.
    """
    _alike(query=query, key=key)
    return Recurrence(0 * key[..., :1, None] + 1, key[..., None], query[..., None])


def attention_normaliser(query: Any, key: Any) -> Any:
    """Return the row sums of causal attention: ``eta_t = sum_{j<=t} q_t·k_j``.

    Parameters
    ----------
    query, key : (..., n, s) arrays
        Features of queries and keys.

    Returns
    -------
    (..., n)

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    Source: as :class:`Recurrence`.
    """
    xp = _alike(query=query, key=key)
    return xp.sum(query * xp.cumulative_sum(key, axis=-2), axis=-1)


def normalised_recurrence(query: Any, key: Any, *, eta: Any = None, log_eta: Any = None) -> Recurrence:
    """Return causal attention over a normaliser, ``y_t = sum_{j<=t} (q_t·k_j) v_j/eta_t``, as a system.

    The state is scaled: ``decay_t = eta_{t-1}/eta_t``, ``write_t = k_t/eta_t``; nothing divides after it.

    Parameters
    ----------
    query, key : (..., n, s) arrays
        Features of queries and keys.
    eta, log_eta : (..., n) array
        The normaliser or its natural logarithm, just one. With the logarithm ratios do not overflow.

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    Keys that are multiplied by eta first are gated linear attention, ``write_t = k_t``, as in SSD: there the division
    would cancel, so build that from `Recurrence` or `selective_recurrence`, which have none.
    Source: as :class:`Recurrence`; the paper's eta of one key is ``exp(w·u_t)``.
    """
    if (eta is None) == (log_eta is None):
        raise InvalidInput(f"eta: got {'none' if eta is None else 'both'} of eta and log_eta, expected one of them")
    name, x = ("eta", eta) if log_eta is None else ("log_eta", log_eta)
    xp = _alike(query=query, key=key)
    namespace(query=query, **{name: x})
    if tuple(x.shape) != tuple(key.shape[:-1]):
        raise InvalidInput(f"{name}: shape is {tuple(x.shape)}, expected {tuple(key.shape[:-1])}, one for each token")
    before = xp.concat([x[..., :1], x[..., :-1]], axis=-1)  # what the first state is scaled by does not matter: it is 0
    decay, write = (before / x, key / x[..., None]) if log_eta is None else (
        xp.exp(before - x), key * xp.exp(-x)[..., None])  # fmt: skip
    return Recurrence(decay[..., None, None], write[..., None], query[..., None])


def selective_recurrence(step: Any, rate: Any, write: Any, read: Any) -> Recurrence:
    """Return a selective state-space model as a system: S6 with steps for each feature, SSD with one for all.

    ``h_t = exp(-step_t rate) ∘ h_{t-1} + step_t write_t v_tᵀ``, ``y_t = read_tᵀ h_t``.

    Parameters
    ----------
    step : (..., n, d_v) or (..., n, 1) float array
        Delta_t, at least 0.
    rate : (s, d_v), (s, 1) or (1, 1) array
        -A, at least 0.
    write, read : (..., n, s) arrays
        B_t and C_t.

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change: a step or a rate below 0 or NaN, too.

    Notes
    -----
    With ``step = softplus(x)`` the decay is the gate ``sigmoid(-x)^rate`` of `gated_recurrence`.
    Source: as :class:`Recurrence`; the discretisation, exact for A and of first order for B, is the code's of Mamba
    (recalled).
    """
    xp = _alike(write=write, read=read)
    namespace(write=write, step=step, rate=rate)
    if step.ndim != write.ndim or step.shape[:-1] != write.shape[:-1]:
        raise InvalidInput(
            f"step: shape is {tuple(step.shape)}, expected ({', '.join(map(str, write.shape[:-1]))}, features)"
        )
    if rate.ndim != 2 or rate.shape[0] not in (1, write.shape[-1]) or rate.shape[1] not in (1, step.shape[-1]):
        raise InvalidInput(
            f"rate: shape is {tuple(rate.shape)}, expected ({write.shape[-1]} or 1, {step.shape[-1]} or 1)"
        )
    numbers("step", step, 0)
    numbers("rate", rate, 0)
    each = step[..., None, :]
    return Recurrence(xp.exp(-each * rate), write[..., None] * each, read[..., None])


def gated_recurrence(forget: Any, write: Any, read: Any, *, power: Any = None) -> Recurrence:
    """Return a gated RNN of one state a feature, a quasi-LSTM: gates see the input, not the state.

    ``h_t = f_t ∘ h_{t-1} + sigmoid(write_t) ∘ v_t``, ``y_t = sigmoid(read_t) ∘ h_t`` with ``f_t = sigmoid(forget_t)``,
    or ``sigmoid(-forget_t)^relu(power)`` with a power, which is the decay of S6: ``exp(-a softplus(x))``.

    Parameters
    ----------
    forget, write, read : (..., n, d_v) float arrays
        What the gates are the sigmoid of.
    power : (d_v,) array, optional
        See above.

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    Source: as :class:`Recurrence`, whose code calls it qLSTM and the power "reversed".
    """
    xp = _alike(forget=forget, write=write, read=read)

    def log_sigmoid(x: Any) -> Any:
        return -xp.logaddexp(-x, xp.zeros_like(x))

    if power is None:
        decay = xp.exp(log_sigmoid(forget))
    else:
        namespace(forget=forget, power=power)
        if tuple(power.shape) != (forget.shape[-1],):
            raise InvalidInput(
                f"power: shape is {tuple(power.shape)}, expected ({forget.shape[-1]},), forget's features"
            )
        decay = xp.exp(log_sigmoid(-forget) * xp.maximum(power, xp.zeros_like(power)))
    gates = [xp.exp(log_sigmoid(x)) for x in (write, read)]
    return Recurrence(decay[..., None, :], gates[0][..., None, :], gates[1][..., None, :])


def run_recurrence(recurrence: Recurrence, value: Any, state: Any = None) -> tuple[Any, Any]:
    """Return what a system puts out for values, token by token, and its last state.

    Parameters
    ----------
    recurrence : Recurrence
    value : (..., n, d_v) array
    state : (..., s, d_v) array, optional
        What it starts from; None is 0.

    Returns
    -------
    out : (..., n, d_v)
    state : (..., s, d_v)

    Raises
    ------
    InvalidInput
        The values are no array of the system's library, or not as many; the state has another shape, or holds NaN.

    Notes
    -----
    Source: as :class:`Recurrence`.
    """
    instance("recurrence", recurrence, Recurrence, "linear_recurrence makes one")
    xp = namespace(read=recurrence.read, value=value)
    n, parts = recurrence.read.shape[-3], (recurrence.decay, recurrence.write, recurrence.read)
    features = max(x.shape[-1] for x in parts)
    if value.ndim < 2 or value.shape[-2] != n or value.shape[-1] < 1 or features not in (1, value.shape[-1]):
        width = "features" if features == 1 else features
        raise InvalidInput(f"value: shape is {tuple(value.shape)}, expected (..., {n}, {width})")
    if state is not None:
        namespace(value=value, state=state)
        wanted = (*value.shape[:-2], max(x.shape[-2] for x in parts), value.shape[-1])
        if tuple(state.shape) != wanted:
            raise InvalidInput(f"state: shape is {tuple(state.shape)}, expected {wanted}")
        numbers("state", state)
    rows = []
    for t in range(n):
        written = recurrence.write[..., t, :, :] * value[..., t, None, :]
        state = written if state is None else recurrence.decay[..., t, :, :] * state + written
        rows.append(xp.sum(recurrence.read[..., t, :, :] * state, axis=-2))
    return xp.stack(rows, axis=-2), state


def recurrence_matrix(recurrence: Recurrence) -> Any:
    """Return the masked matrix that a system is: ``M_tj = sum_s read_t,s (prod_{j<r<=t} decay_r,s) write_j,s``, j <= t.

    Parameters
    ----------
    recurrence : Recurrence

    Returns
    -------
    (..., c, n, n)
        One for each feature of values, or one for all (c = 1) where the system has but one: ``y = M v``.

    Notes
    -----
    Source: as :class:`Recurrence`.
    """
    instance("recurrence", recurrence, Recurrence, "linear_recurrence makes one")
    xp = namespace(read=recurrence.read)
    n = recurrence.read.shape[-3]
    carried, rows = 0 * recurrence.write, []
    for t in range(n):
        now = as_index((np.arange(n) == t)[:, None, None], recurrence.write)
        carried = carried * recurrence.decay[..., t, None, :, :] + recurrence.write * now
        rows.append(xp.sum(recurrence.read[..., t, None, :, :] * carried, axis=-2))
    return xp.moveaxis(xp.stack(rows, axis=-3), -1, -3)


def taylor_features(x: Any, degree: int, *, coefficients: bool = False) -> Any:
    """Return monomials of which the products sum to Taylor's polynomial: ``phi(q)·psi(k) = sum_{r<=g} (q·k)^r/r!``.

    psi has the monomials ``k^e`` up to degree g, phi the same over ``prod_c e_c!`` (`coefficients`); so both stay
    fractions where x is.

    Parameters
    ----------
    x : (..., d) array
        Queries (with `coefficients`) or keys, by the square root of the scale each.
    degree : int
        g.
    coefficients : bool
        Divide by the factorials; on one side only.

    Returns
    -------
    (..., binomial(d + g, g))

    Raises
    ------
    InvalidInput
        Which argument is wrong, what was expected, what to change.

    Notes
    -----
    Weights are off by a share of ``R^(g+1)/(g+1)! e^(2R)`` or less for scores in [-R, R]; the claim
    ``systems-growing-state`` checks it. An odd degree can make weights negative.
    Source: as :class:`Recurrence`; that monomials suffice, d^r products being equal in groups, is common knowledge.
    """
    xp = namespace(x=x)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise InvalidInput(f"x: shape is {tuple(x.shape)}, expected (..., dim), dim at least 1")
    whole("degree", degree, 0)
    found: dict[tuple[int, ...], Any] = {(): 0 * x[..., 0] + 1}
    for r in range(1, degree + 1):
        for e in itertools.combinations_with_replacement(range(x.shape[-1]), r):
            found[e] = found[e[:-1]] * x[..., e[-1]]
    if flag("coefficients", coefficients):
        found = {e: f / math.prod(map(math.factorial, Counter(e).values())) for e, f in found.items()}
    return xp.stack(list(found.values()), axis=-1)


def _alike(**arrays: Any) -> Any:
    """Return the library of arrays that must be (..., n, features) of one shape."""
    xp = namespace(**arrays)
    first, wanted = next((name, tuple(x.shape)) for name, x in arrays.items())
    for name, x in arrays.items():
        if x.ndim < 2 or 0 in x.shape or tuple(x.shape) != wanted:
            raise InvalidInput(
                f"{name}: shape is {tuple(x.shape)}, expected (..., n, features), each at least 1, "
                f"as {first}'s {wanted}"
            )
    return xp
