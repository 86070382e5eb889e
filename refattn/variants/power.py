"""Power-softmax: an even power in place of the exponential, so that encrypted arithmetic can compute it."""

from __future__ import annotations

from typing import Any

from .option import Option, above_zero, at_least_zero, even, one_of
from .variant import Variant

__all__ = ["POWER"]


def attention(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    """Define power-softmax attention of one head."""
    x = q @ k.T * o.scale
    if o.form == "stable":
        x = x / (x.absmax(o.allowed) + o.delta)
    w = x.power(o.p, where=o.allowed)
    if o.form == "mean":
        w = w / o.count
    return (w @ v) / (w.sum() + o.epsilon), None


POWER = Variant(
    name="power",
    define=attention,
    formula="out_i = sum_j w_ij v_j / (epsilon + sum_j w_ij),  w_ij = x_ij^p,  x_ij = scale·q_i·k_j;  "
    "stable: x_ij / (max_j |x_ij| + delta);  mean: w_ij / (number of keys that row i sees)",
    unit="u · sum_j p_ij |v_jc|",
    source="Zimerman et al., Power-Softmax, arXiv 2410.09457: the abstract and secondary descriptions were read, "
    "not the equations themselves.",
    uses=frozenset({"causal", "window", "allowed"}),
    options={
        "p": Option(4, "the even power", even, (4, 2, 6)),
        "epsilon": Option(
            1e-3, "added to the denominator, so that the division is Lipschitz", at_least_zero, (1e-3, 1.0, 0.0)
        ),
        "form": Option(
            "plain",
            "plain, stable (divided by the row's largest, for training) or mean (length-agnostic)",
            one_of("plain", "stable", "mean"),
            ("plain", "stable", "mean"),
        ),
        "delta": Option(1e-6, "added to the row's largest in the stable form", above_zero, (1e-6, 0.5)),
    },
    cases={
        "form-stable": {"options": {"form": "stable", "p": 6}},
        "form-mean": {"options": {"form": "mean", "p": 2}},
        "wide-margins": {"options": {"form": "stable", "epsilon": 1.0, "delta": 0.5}},
    },
    contract=(
        "A row without any key gives out 0.",
        "The mean form divides by the number of keys that the row may attend to, so masked padding changes nothing.",
        "A denominator that is exactly 0 (epsilon 0 and all scores 0) gives NaN.",
        "A key that is not allowed is never read.",
    ),
)
