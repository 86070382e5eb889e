"""ReLU attention: a key whose score is below 0 weighs nothing; the sum is divided by how many keys a row sees."""

from __future__ import annotations

from typing import Any

import numpy as np

from .option import Option, one_of
from .shapes import Rows
from .variant import Variant

__all__ = ["RELU"]


def attention(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    """Define ReLU attention of one head."""
    w = (q @ k.T * o.scale).relu().where(o.allowed)
    return (w @ v) / o.count if o.normalize == "count" else w @ v, None


def by_channels(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    """Write the same as linear attention on keys whose scores are above 0: scale·q_i times their sum of k_j^T v_j."""
    s = q @ k.T * o.scale
    kept, out = (s.zeros() + 1.0).where(s.positive() & o.allowed), s.zeros() @ v
    for c in range(k.shape[1]):
        own = np.arange(k.shape[1])[None] == c
        out = out + q.where(own).sum() * o.scale * (kept @ (k.where(own).sum() * v))
    return out / o.count if o.normalize == "count" else out, None


def _all_counted(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    w = (q @ k.T * o.scale).relu().where(o.allowed)
    return (w @ v) / o.length, None


def _positive_counted(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    w = (q @ k.T * o.scale).relu().where(o.allowed)
    return (w @ v) / w.sum(), None


def _sizes(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    s = (q @ k.T * o.scale).where(o.allowed)
    return ((s.relu() + (-s).relu()) @ v) / o.count, None


def _late(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    return ((q @ k.T * o.scale).where(o.allowed) @ v).relu() / o.count, None


def _squared(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    w = (q @ k.T * o.scale).relu().where(o.allowed)
    return ((w * w) @ v) / o.count, None


RELU = Variant(
    name="relu",
    define=attention,
    forms={"by_channels": by_channels},
    formula="out_i = sum_j relu(scale·q_i·k_j) v_j, over the number of keys that row i sees where normalize is count",
    unit="u · sum_j |w_ij v_jc|",
    source="Lin, Bai, Mei, Transformers as Decision Makers, arXiv 2310.08566; the released code was read, where the "
    "division is a switch. Its layer, with matrices of its own and the residual, is refattn.functions.relu_attention.",
    uses=frozenset({"causal", "window", "allowed"}),
    options={
        "normalize": Option(
            "count",
            "count: divide by how many keys a row sees; none: by nothing",
            one_of("count", "none"),
            ("count", "none"),
        ),
    },
    cases={
        "not-normalized": {"options": {"normalize": "none"}},
        "counted": {"n_q": 37, "n_k": 37, "causal": "bottom_right"},
    },
    wrong={
        "divided_by_all_keys": (
            "the sum is divided by all keys, those that a row does not see too",
            Rows(_all_counted),
        ),
        "divided_by_the_weights": ("the sum is divided by the weights' sum, as softmax's is", Rows(_positive_counted)),
        "sizes_of_scores": ("a score below 0 weighs as much as one above", Rows(_sizes)),
        "relu_of_the_output": ("relu is taken of the output, not of the scores", Rows(_late)),
        "squared_scores": ("a score's square is the weight", Rows(_squared)),
    },
    contract=(
        "A row without any key gives out 0, and so does one whose scores are all 0 or below.",
        "The slope of relu at 0 is 0: a key whose score is exactly 0 gets no gradient from it.",
        "scale None is 1: the paper has none.",
        "A key that is not allowed is never read.",
    ),
    default_scale="one",
)
