"""Titans' memory of one matrix: each token moves it down the slope of what it says of the key, with a momentum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..problem import Problem
from .option import Option, whole_or_none
from .shapes import Rows, Steps
from .variant import STEP_BUGS, STEP_LAWS, Variant, packed_at

__all__ = ["TITANS"]


def step(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    """Take in one token: the momentum takes on the slope of its loss, the memory fades and moves by the momentum."""
    memory, momentum, at = state
    at = memory if _first(o) else at
    momentum = momentum * o.eta + k.T @ ((v - k @ at) * o.beta)
    memory = _faded(memory, o) + momentum
    return (memory, momentum, at), q * o.scale @ memory


def _first(o: Any) -> bool:
    """Tell whether a token is the first of those whose slopes are taken at one memory."""
    return bool(o.token % o.chunk == 0 if o.chunk else o.token == 0)


def _faded(memory: Any, o: Any) -> Any:
    return memory if o.alpha is None else memory * o.alpha.T


def dense(q: Any, k: Any, v: Any, o: Any, solved: bool = True) -> tuple[Any, None]:
    """Write the same with all tokens at once; what each of them adds to the momentum, k_s^T u_s, is solved for.

    With F_ts the product of alpha after token s up to t, and G_ts that of eta, it counts W_ts of W = F G in the memory
    after t. The slope of t is taken at the memory after b, the last token before t's chunk, so that

        A_ts = beta_t W_bs k_t·k_s,  U = (I + A)^-1 beta (V - what that memory has of the state),  out_t = q_t M_t.
    """
    n, t = k.shape[0], np.arange(k.shape[0])
    at, size = o.allowed.sum(1) - 1, o.chunk or n
    base = (t // size * size - 1)[:, None]
    ones, end = (k @ k.T).zeros() + 1.0, (o.eta.zeros() + 1.0).where((t == n - 1)[:, None])
    bases, rows = ones.where(t == base), ((q @ k.T).zeros() + 1.0).where(t == at[:, None])
    slow, still = _decays(o.eta, ones, t)
    told: Any = None
    asked = left = told
    alpha = o.eta.zeros() + 1.0 if o.alpha is None else o.alpha
    for c in range(alpha.shape[1]):
        own = np.arange(k.shape[1])[None] == c if alpha.shape[1] > 1 else None  # each channel has its decays, or all
        kept, start = _decays(alpha if own is None else alpha.where(own).sum(), ones, t)
        counts, one = (kept @ slow, start, kept @ still), (k.zeros() + 1.0).where(own)
        told = _sums(told, _counted(k.where(own), k, bases, counts, (start.zeros() + 1.0).where(base < 0)))
        asked = _sums(asked, _counted(q.where(own), k, rows, counts, 0.0))
        ends = (k.where(own) * (counts[0].T @ end), (one * start).T @ end, (one * counts[2]).T @ end)
        left = _sums(left, ends)
    wanted = v if o.state is None else v - told[1] @ o.state[0] - told[2] @ o.state[1]
    a = (told[0] * -o.beta).where(t[:, None] > t)
    change = (a.geometric(n) if solved else a + ones.where(np.eye(n, dtype=bool))) @ (wanted * o.beta)
    out = asked[0].where(t <= at[:, None]) @ change
    memory, momentum = left[0].T @ change, (k * (slow.T @ end)).T @ change
    if o.state is not None:
        out = out + asked[1] @ o.state[0] + asked[2] @ o.state[1]
        memory = memory + o.state[0] * left[1] + o.state[1] * left[2]
        momentum = momentum + o.state[1] * (still.T @ end)
    o.last = memory, momentum
    return out * o.scale, None


def _decays(decay: Any, ones: Any, t: Any) -> tuple[Any, Any]:
    """Return the products of a decay after token s up to t, and those from the start up to t."""
    fade = (decay + ones.zeros()).where(t[:, None] == t + 1).geometric(len(t))
    return fade, fade @ decay.where((t == 0)[:, None])


def _counted(x: Any, k: Any, at: Any, counts: Any, fresh: Any) -> tuple[Any, ...]:
    """Return what rows that read the memory after a token read of what tokens add, of its start, and the momentum's."""
    of_tokens, of_start, of_momentum = (at @ y for y in counts)
    return (x @ k.T) * of_tokens, x * (of_start + fresh), x * of_momentum


def _sums(x: Any, y: Any) -> Any:
    return y if x is None else tuple(a + b for a, b in zip(x, y, strict=True))


def fits(p: Problem) -> str | None:
    """Return why a call has no meaning."""
    for name, what in (("beta", "how far each token moves the momentum"), ("eta", "what it keeps of the momentum")):
        if getattr(p, name) is None:
            return f"{name}: got None, expected {what}, (b, h_q, n_k, 1)"
    return None


def _early_momentum(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    (memory, momentum, at), _ = step(state, q, k, v, o)
    memory = _faded(state[0], o) + state[1]
    return (memory, momentum, at), q * o.scale @ memory


def _mixed(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    memory, momentum, at = state
    at = memory if _first(o) else at
    down = k.T @ ((v - k @ at) * o.beta)
    momentum = momentum * o.eta + down * (-o.eta + 1.0)
    memory = _faded(memory, o) + momentum
    return (memory, momentum, at), q * o.scale @ memory


def _faded_slope(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    memory, momentum, at = state
    at = _faded(memory, o) if _first(o) else at
    momentum = momentum * o.eta + k.T @ ((v - k @ at) * o.beta)
    memory = _faded(memory, o) + momentum
    return (memory, momentum, at), q * o.scale @ memory


def _faded_after(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    memory, momentum, at = state
    at = memory if _first(o) else at
    momentum = momentum * o.eta + k.T @ ((v - k @ at) * o.beta)
    memory = _faded(memory + momentum, o)
    return (memory, momentum, at), q * o.scale @ memory


def _early_read(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    return step(state, q, k, v, o)[0], q * o.scale @ state[0]


def _lost_momentum(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    memory, momentum, at = state
    return step((memory, momentum.zeros() if _first(o) else momentum, at), q, k, v, o)


def _each_at_its_own(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    return step((state[0], state[1], state[0]), q, k, v, o)


def _whole_error(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    memory, momentum, at = state
    at = memory if _first(o) else at
    momentum = momentum * o.eta + k.T @ (v * o.beta - k @ at)
    memory = _faded(memory, o) + momentum
    return (memory, momentum, at), q * o.scale @ memory


def _clamped(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    o.beta = o.beta - (o.beta - 1.0).relu()
    return step(state, q, k, v, o)


STEPS = Steps(step, linear=True, held=1)
"""A memory, its momentum, and what is held: the memory at which the slopes of the chunk's tokens are taken."""


def _wrong(text: str, take: Any) -> tuple[str, Steps]:
    return text, replace(STEPS, step=take)


TITANS = Variant(
    name="titans",
    define=STEPS,
    forms={"dense": Rows(dense, together=True)},
    formula="S_t = eta_t S_(t-1) + beta_t k_t^T (v_t - k_t M_b),  M_t = alpha_t M_(t-1) + S_t,  out_t = scale·q_t M_t; "
    "b = t - 1, or the last token before t's chunk;  (M_0, S_0) = state, or 0",
    unit="u · the sizes that meet in M_t",
    source="Behrouz et al., Titans, arXiv 2501.00663, eqs. 9-14, from a summary: the memory of one matrix, whose loss "
    "is |k M - v|^2. titans-pytorch 0.5.5 was read: its gradients at one memory, by chunks.",
    compared="titans-pytorch 0.5.5 with a memory of one matrix, without norms, at both memories: it agrees with "
    "functions.memory within a bound of float64 (tests/peers/test_titans.py), and that with this in fractions",
    uses=frozenset({"causal", "state", "alpha", "beta", "eta"}),
    options={
        "chunk": Option(1, "tokens whose slopes are taken at the memory before them; None: all", whole_or_none(1), (4,))
    },
    laws=STEP_LAWS,
    bugs=STEP_BUGS,
    families=("gaussian",),
    contract=(
        "alpha is what the memory keeps, 1 less the paper's alpha; beta is 2 theta: the slope of |k M - v|^2 is "
        "2 k^T (k M - v). titans-pytorch's loss is the mean over features: there beta is 2 theta / d_v.",
        "The slope is taken at the memory before it fades.",
        "A state is (b, h_q, 2 d_k, d_v): the memory, and below it the momentum. Without one both are 0.",
        "A call begins a chunk, and so does each packed sequence. chunk=None is what titans-pytorch does without a "
        "batch size: all slopes are taken at the memory that comes in.",
        "scale None is 1. Keys are taken as they are: bring them to length 1 first if your layer does.",
        "The state is float32 or wider in a kernel of the flash models: what it loses is counted at every step.",
    ),
    default_scale="one",
    cases={
        label: {"n_q": n, "n_k": n, "d": 4, "causal": "bottom_right", "alpha": True, "beta": True, "eta": True, **more}
        for label, n, more in (
            ("momentum", 9, {}),
            ("nothing-forgotten", 7, {"alpha": None, "d_v": 5, "beta": "large"}),
            ("one-token", 1, {"state": True}),
            ("chunks", 10, {"options": {"chunk": 4}, "state": True, "h": 4, "h_kv": 2}),
            ("at-the-start", 7, {"options": {"chunk": None}, "state": True, "h": 1, "h_kv": 1}),
            ("channels", 6, {"alpha": "channels"}),
            ("packed", 21, {"options": {"chunk": 4}, **packed_at(0, 1, 12, 12, 21)}),
            ("long", 67, {"alpha": "strong", "h": 1, "h_kv": 1}),  # past a chunk of 64
        )
    },
    quick=frozenset({f"gaussian/{n}" for n in ("nothing-forgotten", "chunks", "at-the-start", "momentum-and-all")}),
    wrong={
        "momentum_of_the_token_before": _wrong("the memory moves by the momentum before the token", _early_momentum),
        "slope_times_one_less_eta": _wrong("momentum is a mean of slopes: each counts 1 - eta", _mixed),
        "slope_at_the_faded_memory": _wrong("the slope is taken at the memory after it has faded", _faded_slope),
        "fades_after_the_token": _wrong("the memory fades after it has moved", _faded_after),
        "read_before_the_token": _wrong("a query reads the memory that its own token has not taught", _early_read),
        "momentum_lost_at_chunks": _wrong("each chunk starts from no momentum", _lost_momentum),
        "slopes_at_each_memory": _wrong(
            "in a chunk each slope is taken at the memory before its token", _each_at_its_own
        ),
        "steps_clamped_to_one": _wrong("beta above 1 counts as 1", _clamped),
        "beta_on_the_value_alone": _wrong("beta multiplies the value alone, not what the memory says", _whole_error),
    },
    fits=fits,
    always=frozenset({"causal_bottom_right", "beta", "eta"}),
    never=frozenset({"lengths_differ", "no_rows_or_keys", "causal_top_left"}),
)
