"""Lightning attention: a linear recurrence with a decay for each head."""

from __future__ import annotations

from typing import Any

from .option import Option, rate_per_head
from .shapes import Steps
from .variant import STEP_BUGS, STEP_LAWS, Variant, packed_at

__all__ = ["LIGHTNING"]


def prepare(o: Any) -> None:
    """Set the decay from one token to the next."""
    o.fade = (o.one * -o.decay).exp()


def step(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    """Take in one token: the state fades and gains k^T v, the query reads it."""
    state = state * o.fade + k.T @ v
    return state, q * o.scale @ state


def dense(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    """Write the same with all tokens at once."""
    w = (q @ k.T * o.scale) * (o.distance * -o.decay).exp(o.allowed)  # ahead of the row it would be beyond all numbers
    out = w @ v
    return (out if o.state is None else out + (q * o.scale @ o.state) * (o.place * -o.decay).exp()), None


def rates(heads: int) -> tuple[tuple[float, ...], ...]:
    """Return decays to try."""
    return tuple(tuple(r[i % 3] for i in range(heads)) for r in ((0.03, 0.4, 0.0), (0.0, 1.5, 0.1)))


def _own_key_faded(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    state = (state + k.T @ v) * o.fade
    return state, q * o.scale @ state


def _fades_late(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    added = k.T @ v
    return state * o.fade + added, q * o.scale @ (state + added)


def _early_read(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    return step(state, q, k, v, o)[0], q * o.scale @ (state * o.fade)


def _whole_start(state: Any, q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    if o.state is None:
        return step(state, q, k, v, o)
    state = (state - o.state) * o.fade + o.state + k.T @ v
    return state, q * o.scale @ state


LIGHTNING = Variant(
    name="lightning",
    define=Steps(step, prepare),
    forms={"dense": dense},
    formula="S_t = exp(-decay) S_(t-1) + k_t^T v_t,  out_t = scale·q_t S_t;  S_0 = state, or 0",
    unit="u · sum_j |w_ij v_jc|",
    source="Qin et al., Lightning Attention-2, arXiv 2401.04658; the released lightning_attn/ops/torch/"
    "linear_attention.py and TransNormerLLM's slopes were read: no scale, no denominator.",
    compared="fla's naive simple_gla at bc3b101, recurrent and in chunks: agrees within bounds of float64; its scale "
    "is 1/sqrt(d_k) where none is given, its gate the decay's logarithm (tests/peers/test_fla.py)",
    uses=frozenset({"causal", "state"}),
    options={"decay": Option((), "rate for each query head, in 1/position", rate_per_head, rates)},
    laws=STEP_LAWS,
    bugs=STEP_BUGS,
    families=("gaussian", "ragged", "peaked", "probe", "drift"),
    contract=(
        "scale None is 1: the paper has none.",
        "A token's own key counts in full: the decay falls on the state before it.",
        "Each packed sequence starts from a state of its own, or from 0, and its decay counts from its first token.",
        "The state is float32 or wider in a kernel of the flash models: what it loses is counted at every step.",
    ),
    default_scale="one",
    cases={
        "decay": {"n_q": 67, "n_k": 67, "causal": "bottom_right", "options": {"decay": (0.03, 0.4)}},
        "fast-decay": {"n_q": 67, "n_k": 67, "causal": "bottom_right", "options": {"decay": (1.5, 0.0)}},
        "one-token": {"n_q": 1, "n_k": 1, "causal": "bottom_right", "options": {"decay": (0.1, 0.2)}},
        "grouped": {
            "n_q": 37,
            "n_k": 37,
            "h": 4,
            "h_kv": 2,
            "causal": "bottom_right",
            "options": {"decay": (0.0, 0.1, 0.2, 0.3)},
        },
        "packed": {
            "n_q": 21,
            "n_k": 21,
            "d": 16,
            "causal": "bottom_right",
            "options": {"decay": (0.1, 0.4)},
            **packed_at(0, 1, 12, 12, 21),
        },
        "state": {"n_q": 37, "n_k": 37, "causal": "bottom_right", "options": {"decay": (0.1, 0.2)}, "state": True},
        # past two chunks of 64, and one of 128
        "long": {
            "n_q": 141,
            "n_k": 141,
            "d": 8,
            "h": 1,
            "h_kv": 1,
            "causal": "bottom_right",
            "options": {"decay": (0.03,)},
        },
    },
    wrong={
        "own_key_faded": ("the decay falls on a token's own key too", Steps(_own_key_faded, prepare)),
        "fades_one_token_late": (
            "the decay comes one token late: a query reads the state before it unfaded",
            Steps(_fades_late, prepare),
        ),
        "read_before_the_token": (
            "a query reads the state that its own token has not joined",
            Steps(_early_read, prepare),
        ),
        "start_not_faded": ("the state that a sequence starts from does not fade", Steps(_whole_start, prepare)),
    },
    always=frozenset({"causal_bottom_right"}),
    never=frozenset({"lengths_differ", "no_rows_or_keys", "causal_top_left"}),
)
