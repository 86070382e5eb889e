"""Linear attention: a feature map in place of the exponential, an optional decay, an optional denominator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .option import Option, boolean, one_of, per_head
from .variant import Variant

__all__ = ["FEATURES", "LINEAR"]

FEATURES: dict[str, Callable[[Any], Any]] = {
    "identity": lambda x: x,
    "relu": lambda x: x.relu(),
    "elu1": lambda x: x.relu() + (-(-x).relu()).exp(),  # elu(x) + 1: 1 + x above 0, exp(x) below
    "exp": lambda x: x.exp(),
}
"""The feature maps, over any arithmetic's matrices."""


def attention(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    """Define linear attention of one head."""
    phi = FEATURES[o.feature]
    w = phi(q) @ phi(k).T * o.scale
    if o.decay is not None:
        w = w * (o.distance * -o.decay).exp(o.allowed)
    w = w.where(o.allowed)
    return (w @ v) / w.sum() if o.normalize else w @ v, None


def rates(heads: int) -> tuple[Any, ...]:
    """Return decays to try."""
    return None, tuple((0.0, 0.03, 0.4)[i % 3] for i in range(heads))


LINEAR = Variant(
    name="linear",
    define=attention,
    formula="out_i = sum_j w_ij v_j (over sum_j w_ij where normalize),  "
    "w_ij = scale·phi(q_i)·phi(k_j)·exp(-decay·(i' - j))",
    unit="u · sum_j |w_ij v_jc|",
    source="Katharopoulos et al., arXiv 2006.16236, eq. 5 (elu1, normalised); decay as in Lightning Attention-2, "
    "arXiv 2401.04658 (per-head rate, no denominator). Recalled, not read again.",
    uses=frozenset({"causal", "window", "allowed"}),
    options={
        "feature": Option(
            "elu1", "phi: identity, relu, elu1 (elu + 1) or exp", one_of(*FEATURES), ("elu1", "relu", "identity", "exp")
        ),
        "decay": Option(None, "rate for each query head, in 1/position", per_head, rates, "causal", True),
        "normalize": Option(True, "divide by the sum of the weights", boolean, (True, False)),
    },
    cases={
        "feature-identity": {"options": {"feature": "identity", "normalize": False}},
        "feature-relu": {"options": {"feature": "relu"}},
        "feature-exp": {"options": {"feature": "exp"}},
        "decay": {
            "causal": "bottom_right",
            "options": {"feature": "identity", "normalize": False, "decay": (0.03, 0.4)},
        },
    },
    contract=(
        "A row without any key gives out 0.",
        "A denominator that is exactly 0 gives NaN.",
        "scale None is 1: the papers have none.",
        "A key that is not allowed is never read.",
    ),
    default_scale="one",
)
