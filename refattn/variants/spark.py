"""Spark's attention: softmax weights by a query's first features, times softplus of scores by the others."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..problem import Problem
from .option import Option
from .option import whole as whole_number
from .shapes import Rows
from .variant import COMMON_LAWS, Variant

__all__ = ["SPARK"]


def parts(q: Any, k: Any, o: Any, swapped: bool = False, whole: bool = False) -> tuple[Any, Any]:
    """Return the scores of the softmax, and those of the gate.

    The rest is for mistakes: whether the parts change places, and whether the softmax has all features.
    """
    d, r = q.shape[1], o.predictor
    r = q.shape[1] // 2 if r is None else r
    columns = [np.arange(d) if whole else np.arange(r), np.arange(r, d)]
    first, rest = (q.columns(at) @ k.columns(at).T * o.scale for at in (columns[::-1] if swapped else columns))
    return first, rest


def softplus(x: Any) -> Any:
    """Return log(1 + exp(x)) without a large exponential, as (x + |x|)/2 + log(1 + exp(-|x|)).

    Where x is exactly 0 the slope of |x| counts as 0, so that this one's is 1/2, as it is.
    """
    size = x.relu() + (-x).relu()
    return (x + size) / 2 + ((-size).exp() + 1.0).log()


def attention(q: Any, k: Any, v: Any, o: Any, gate: Any = softplus, **change: bool) -> tuple[Any, None]:
    """Define the attention of one head: the gate comes after the denominator, which does not know of it."""
    s, rest = parts(q, k, o, **change)
    p = (s - s.shift(o.allowed)).exp(where=o.allowed)
    return ((p * gate(rest)) @ v) / p.sum(), None


def by_channels(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    """Write the same with scores added up by channel, and the gate in two parts, each pooled by itself."""
    d = q.shape[1]
    found: tuple[list[Any], list[Any]] = ([], [])
    for c in range(d):
        own = np.arange(d)[None] == c
        late = int(c >= (d // 2 if o.predictor is None else o.predictor))
        found[late].append(q.where(own).sum() * o.scale @ k.where(own).sum().T)
    s, rest = (sum(x[1:], x[0]) for x in found)
    p = (s - s.shift(o.allowed)).exp(where=o.allowed)
    near = ((-(rest.relu() + (-rest).relu())).exp() + 1.0).log()
    return (p * rest.relu() @ v + p * near @ v) / p.sum(), None


def renormalised(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    """Divide by the sum of the gated weights: a mistake."""
    s, rest = parts(q, k, o)
    p = (s - s.shift(o.allowed)).exp(where=o.allowed) * softplus(rest)
    return (p @ v) / p.sum(), None


def predictor(value: Any, heads: int) -> str | None:
    """Check for None or a number of features."""
    return None if value is None or whole_number(1)(value, heads) is None else "None or an integer of at least 1"


def fits(p: Problem) -> str | None:
    """Refuse calls whose features cannot be parted."""
    if p.d_k < 2:
        return f"query: axis dim is {p.d_k}, expected at least 2: some features choose, the others gate"
    r = p.options.get("predictor")
    if r is not None and r >= p.d_k:
        return f"predictor: got {r}, expected at most {p.d_k - 1} of {p.d_k} features: the others gate"
    return None


def wrong(text: str, **change: Any) -> tuple[str, Rows]:
    """Return a mistake."""
    return text, Rows(lambda q, k, v, o: attention(q, k, v, o, **change))


SPARK = Variant(
    name="spark",
    define=attention,
    forms={"by_channels": by_channels},
    formula="out_i = sum_j exp(s_ij) log(1 + exp(g_ij)) v_j / sum_j exp(s_ij),  s_ij = scale·q_i·k_j over the first "
    "`predictor` features,  g_ij = scale·q_i·k_j over the others,  j over the keys that row i sees",
    unit="u · sum_j |w_ij v_jc|",
    source="You et al., Spark Transformer, arXiv 2506.06644, of which a description was read; there is no official "
    "code. Which keys pass the statistical threshold is the call's `allowed`: "
    "refattn.functions.statistical.statistical_topk(mode='mask') makes it, and spark_attention is both.",
    compared="refattn.functions.statistical.spark_attention; no code was released",
    uses=frozenset({"causal", "window", "allowed"}),
    options={
        "predictor": Option(None, "features whose products the softmax has; None is half of them, rounded down",
                            predictor, (None, 1, 2), by_head=False),
    },
    laws=COMMON_LAWS,
    bugs=("zeroed_head", "wrong_scale", "causal_ignored", "causal_off_by_one", "window_ignored", "allowed_ignored",
          "heads_tiled", "last_key_dropped", "value_of_next_key", "neighbour_row", "output_too_narrow",
          "masked_value_read"),
    contract=(
        "A row without any key gives out 0.",
        "Both products have the same scale, and scale None is 1: the paper has none.",
        "Weights do not sum to 1: the gate is not in the denominator.",
        "A key that is not allowed is never read.",
    ),
    default_scale="one",
    cases={
        "halves": {"n_q": 37, "n_k": 37, "d": 8, "causal": "bottom_right"},
        "narrow": {"n_q": 21, "n_k": 37, "d": 8, "options": {"predictor": 2}},
        "wide": {"n_q": 21, "n_k": 37, "d": 7, "h": 4, "h_kv": 2, "scale": 0.25, "options": {"predictor": 6}},
    },
    wrong={
        "sigmoid_gate": wrong("the gate is a sigmoid", gate=lambda x: x.sigmoid()),
        "relu_gate": wrong("the gate is a ReLU", gate=lambda x: x.relu()),
        "gate_left_out": wrong("there is no gate", gate=lambda x: x.zeros() + 1.0),
        "renormalised": ("the gated weights are divided by their own sum", Rows(renormalised)),
        "parts_swapped": wrong("the first features gate, the others choose", swapped=True),
        "softmax_of_all_features": wrong("the softmax has all features", whole=True),
    },
    fits=fits,
)  # fmt: skip
