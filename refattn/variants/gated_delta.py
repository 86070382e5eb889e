"""The gated delta rule: a state that fades, and that each token moves from what it says of its key to the value."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..problem import Problem
from .shapes import Rows, Steps
from .variant import STEP_BUGS, STEP_LAWS, Variant, packed_at

__all__ = ["GATED_DELTA"]

CHUNK = 8


def step(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    """Take in one token: the state fades, then what it says of the key moves towards the value."""
    state = _faded(state, o)
    state = state + k.T @ ((v - k @ state) * o.beta)
    return state, q * o.scale @ state


def _faded(state: Any, o: Any) -> Any:
    return state if o.alpha is None else state * o.alpha.T


def chunked(q: Any, k: Any, v: Any, o: Any, solved: bool = True, size: int = CHUNK) -> tuple[Any, None]:
    """Write the same by chunks of so many tokens, whose changes U of the state are solved for together (the WY form).

    With L_ts the product of alpha after token s up to t, and L_t that from the chunk's start up to t, in a chunk

        A_ts = beta_t k_t (L_ts k_s)^T below the diagonal,  U = (I + A)^-1 beta (V - (K L) S),
        out = (Q L) S + (scores within) U,  S' = L_end S + (K L_(end, .))^T U,  S the state before it.
    """
    n, t = k.shape[0], np.arange(k.shape[0])
    at = o.allowed.sum(1) - 1  # where the rows stand
    below, reads, start, end = _products(q, k, o, t, at, size)
    within = t[:, None] // size == t // size
    a = (below * o.beta).where(within & (t[:, None] > t))
    solve = (-a).geometric(size) if solved else -a + _unit(a)
    state, changes, before = o.state, None, None
    for i in range(0, n, size):
        here, last = (t // size == i // size)[:, None], (t == min(i + size, n) - 1)[:, None]
        told = v if state is None else v - (k * start) @ state
        change = (solve @ (told * o.beta).where(here)).where(here)
        changes = _sum(changes, change)
        if state is not None:
            before = _sum(before, ((q * _at(start, q, k, at)) @ state).where((at // size == i // size)[:, None]))
            state = state * start.where(last).T.sum()
        state = _sum(state, (k * end).where(here).T @ change)
    o.last = state
    seen = (at[:, None] // size == t // size) & (t <= at[:, None])
    return _sum(before, reads.where(seen) @ changes) * o.scale, None


def _products(q: Any, k: Any, o: Any, t: Any, at: Any, size: int) -> tuple[Any, Any, Any, Any]:
    """Return K K^T and Q K^T with the decays between, and by token those since its chunk's start and to its end."""
    n, found = len(t), (None, None, None, None)
    alpha = o.beta.zeros() + 1.0 if o.alpha is None else o.alpha
    begins, ends = (t % size == 0)[:, None], ((t % size == size - 1) | (t == n - 1))[:, None]
    behind = (t[:, None] == t + 1) & ~begins  # from a token to the next of its chunk
    for c in range(alpha.shape[1]):
        own = np.arange(k.shape[1])[None] == c if alpha.shape[1] > 1 else None  # each channel has its decays, or all
        decay = alpha if own is None else alpha.where(own).sum()
        fade = (decay + (k @ k.T).zeros()).where(behind).geometric(size)
        one = (k.zeros() + 1.0).where(own)
        channel = (
            (k.where(own) @ k.T) * fade,
            (q.where(own) @ k.T) * _at(fade, q, k, at),
            one * (fade @ decay.where(begins)),
            one * (fade.T @ (decay.zeros() + 1.0).where(ends)),
        )
        found = tuple(map(_sum, found, channel))
    return found


def _at(x: Any, q: Any, k: Any, at: Any) -> Any:
    """Return the rows of a matrix by token at which queries stand."""
    if np.array_equal(at, np.arange(x.shape[0])):
        return x
    return ((q @ k.T).zeros() + 1.0).where(np.arange(x.shape[0]) == at[:, None]) @ x


def _sum(x: Any, y: Any) -> Any:
    return y if x is None else x + y


def _unit(a: Any) -> Any:
    return (a.zeros() + 1.0).where(np.eye(a.shape[0], dtype=bool))


def cumulated(one: Any, dout: Any, tokens: int, of_state: Any = None) -> Any:
    """Return what meets in the gradient by log c_t, c_t the product of alpha since the start of t's chunk.

    There are u_t = beta_t (v_t - k_t S'), its gradient g_t = k_t dS_t, and L_ts = c_t / c_s. In a chunk the pair (t, s)
    adds ``q_t L_ts k_s (dout_t·u_s) - beta_t k_t L_ts k_s (g_t·u_s)`` to t's gradient, and takes it off s's; the state
    before adds to t's what q_t and k_t read of it; at the end all that S' holds adds to the last, and what each s left
    in it is taken off s's.

    Returns
    -------
    sizes, values : (n_k, 1 or d_k)
        Added up from a token on: the sizes of all products in them, and the sizes of these sums.
    """
    scale = 1.0 if one.problem.scale is None else float(one.problem.scale)
    q, k, v, n = one.q * scale, one.k, one.v, one.k.shape[0]
    alpha, beta = np.broadcast_to(one.gates["alpha"], k.shape), one.gates["beta"]
    states, u = [np.zeros((k.shape[1], v.shape[1])) if one.state is None else one.state], np.zeros_like(v)
    for t in range(n):
        faded = states[-1] * alpha[t][:, None]
        u[t] = beta[t] * (v[t] - k[t] @ faded)
        states.append(faded + np.outer(k[t], u[t]))
    g, later, ends = np.zeros_like(v), np.zeros_like(states[0]) if of_state is None else of_state, {}
    for t in reversed(range(n)):
        ends[t] = later
        moved = later + np.outer(q[t], dout[t])
        g[t] = k[t] @ moved
        later = (moved - np.outer(k[t], beta[t] * g[t])) * alpha[t][:, None]
    found = np.zeros((2, n, one.gates["alpha"].shape[1]))
    for i in range(0, n, tokens):
        here = slice(i, min(i + tokens, n))
        parts = [x[here] for x in (q, k, dout, u, g)] + [states[i], ends[here.stop - 1]]
        found[0, here] = _met([abs(x) for x in parts], alpha[here], beta[here], found.shape[2])
        found[1, here] = _met(parts, alpha[here], -beta[here], found.shape[2])
    return found


def _met(parts: list[Any], alpha: Any, beta: Any, width: int) -> Any:
    """Return the sizes of a chunk's terms, those from each token on added up; beta comes with its sign."""

    def size(x: Any) -> Any:
        return abs(x) if width > 1 else abs(x.sum(-1, keepdims=True))

    q, k, d, u, g, begun, end = parts
    c, n = alpha.cumprod(0), len(alpha)
    fade = np.zeros((n, n, k.shape[1]))
    for s in range(n):
        fade[s + 1 :, s] = alpha[s + 1 :].cumprod(0)
    last = np.concatenate([fade[-1, :-1], np.ones((1, k.shape[1]))])
    of_q, of_k = q[:, None] * (d @ u.T)[..., None], k[:, None] * (beta * (g @ u.T))[..., None]
    pairs = size((of_q + of_k) * fade * k)
    left = size(last * k * (u @ end.T))
    met = pairs.sum(0) + pairs.sum(1) + left + size(c * (q * (d @ begun.T) + beta * k * (g @ begun.T)))
    met[-1] += size(c[-1] * (begun * end).sum(1)) + left.sum(0)
    return met[::-1].cumsum(0)[::-1]


def fits(p: Problem) -> str | None:
    """Return why a call has no meaning."""
    return "beta: got None, expected how far each token moves the state, (b, h_q, n_k, 1)" if p.beta is None else None


def _wrong(text: str, take: Any) -> tuple[str, Steps]:
    return text, Steps(take)


def _old_error(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    state = _faded(state, o) + k.T @ ((v - k @ state) * o.beta)
    return state, q * o.scale @ state


def _faded_after(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    state = _faded(state + k.T @ ((v - k @ state) * o.beta), o)
    return state, q * o.scale @ state


def _whole_error(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    state = _faded(state, o)
    state = state + k.T @ (v * o.beta - k @ state)
    return state, q * o.scale @ state


def _early_read(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    return step(state, q, k, v, o)[0], q * o.scale @ _faded(state, o)


def _no_delta(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    state = _faded(state, o) + k.T @ (v * o.beta)
    return state, q * o.scale @ state


def _clamped(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    o.beta = o.beta - (o.beta - 1.0).relu()
    return step(state, q, k, v, o)


GATED_DELTA = Variant(
    name="gated_delta",
    define=Steps(step, linear=True),
    forms={"chunked": Rows(chunked, together=True, cuts=(CHUNK, 64))},
    formula="S' = alpha_t S_(t-1),  S_t = S' + beta_t k_t^T (v_t - k_t S'),  out_t = scale·q_t S_t;  S_0 = state, or 0",
    unit="u · the sizes that meet in S_t",
    source="Yang et al., Gated Delta Networks, arXiv 2412.06464, recalled: one alpha for each head. Kimi Linear, arXiv "
    "2510.26692, recalled: an alpha for each channel of the keys; the reference in fla/ops/kda/naive.py was read.",
    compared="fla's naive delta_rule, gated_delta_rule and kda at bc3b101, recurrent and in chunks: agree within "
    "bounds of float64; their scale is 1/sqrt(d_k) where none is given, their gate log alpha (tests/peers/test_fla.py)",
    uses=frozenset({"causal", "state", "alpha", "beta"}),
    laws=STEP_LAWS,
    bugs=STEP_BUGS,
    families=("gaussian",),
    contract=(
        "scale None is 1: the paper has none; fla's functions take 1/sqrt(d_k).",
        "alpha is the decay itself, not its logarithm; beta the step, not its logit. Without alpha nothing fades.",
        "beta may go up to 2 (allow_neg_eigval in fla's layers): above 1 a step overshoots the value.",
        "Keys are taken as they are: the papers' have length 1, which the caller sees to.",
        "Each packed sequence starts from a state of its own, or from 0.",
        "The state is float32 or wider in a kernel of the flash models: what it loses is counted at every step.",
    ),
    default_scale="one",
    cases={
        label: {"n_q": n, "n_k": n, "d": 8, "causal": "bottom_right", "beta": True, **more}
        for label, n, more in (
            ("gated", 13, {"alpha": True}),
            ("delta", 11, {"d_v": 5}),
            ("channels", 10, {"alpha": "channels"}),
            ("one-token", 1, {"alpha": True, "state": True}),
            ("chunk-end", CHUNK, {"alpha": True}),
            ("grouped", 9, {"alpha": True, "h": 4, "h_kv": 2}),
            ("state", 12, {"alpha": "channels", "state": True}),
            ("large-steps", 14, {"alpha": True, "beta": "large"}),
            ("packed", 21, {"alpha": True, **packed_at(0, 1, 12, 12, 21)}),
            ("long", 141, {"alpha": "strong", "d_v": 12, "h": 1, "h_kv": 1}),  # past two chunks of 64, one of 128
            ("wide", 9, {"alpha": "strong channels", "d": 72}),
        )
    },
    quick=frozenset(
        {
            f"gaussian/{n}"
            for n in ("delta", "chunk-end", "state", "gated-and-all", "packed-and-all", "large-steps", "long")
        }
    ),
    wrong={
        "error_of_the_old_state": _wrong("the error is that of the state before it fades", _old_error),
        "fades_after_the_token": _wrong("the state fades after the token has moved it", _faded_after),
        "beta_on_the_value_alone": _wrong("beta multiplies the value alone, not what the state says", _whole_error),
        "read_before_the_token": _wrong("a query reads the state that its own token has not moved", _early_read),
        "steps_clamped_to_one": _wrong("beta above 1 counts as 1, so that no step turns the state round", _clamped),
        "no_delta": _wrong("the value is added, whatever the state says of the key", _no_delta),
        "inverse_to_first_order": (
            "in a chunk a change counts for later tokens, but not what it does to their changes",
            Rows(partial(chunked, solved=False), together=True),
        ),
    },
    cumulated=cumulated,
    fits=fits,
    always=frozenset({"causal_bottom_right", "beta"}),
    never=frozenset({"lengths_differ", "no_rows_or_keys", "causal_top_left"}),
)
