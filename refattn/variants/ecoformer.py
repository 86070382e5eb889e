"""EcoFormer's attention on codes: a weight is the product of two codes and a constant that keeps it at least 1."""

from __future__ import annotations

from typing import Any

import numpy as np

from .shapes import Rows
from .variant import Variant

__all__ = ["ECOFORMER"]


def attention(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    """Define attention on codes of one head."""
    w = (q @ k.T * o.scale + (q.shape[1] + 1.0)).where(o.allowed)
    return (w @ v) / w.sum(), None


def sums(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    """Write the same by sums over keys, which each query reads: of v, of each bit times v, of each bit.

    Where every key is in sight these are the same for all queries, so that attention is linear in their number.
    """
    seen = ((q @ k.T).zeros() + 1.0).where(o.allowed)
    most = k.shape[1] + 1.0
    over, under = seen @ v * most, seen.sum() * most
    for c in range(k.shape[1]):
        bit = np.arange(k.shape[1])[None] == c
        own, of_key = q.where(bit).sum() * o.scale, k.where(bit).sum()
        over, under = over + own * (seen @ (of_key * v)), under + own * (seen @ of_key)
    return over / under, None


def _wrong(text: str, define: Any) -> tuple[str, Rows]:
    return text, Rows(define)


def _own_value(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    w, most = (q @ k.T * o.scale).where(o.allowed), q.shape[1] + 1.0
    own = (-(o.distance * o.distance) + 1.0).relu()  # 1 at the row's own key alone: distances are whole
    return (w @ v + own @ v * most) / (w + most).where(o.allowed).sum(), None


def _bits_alone(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    w = (q @ k.T * o.scale + float(q.shape[1])).where(o.allowed)
    return (w @ v) / w.sum(), None


def _equal_bits(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    w = ((q @ k.T * o.scale + float(q.shape[1])) * 0.5 + 1.0).where(o.allowed)
    return (w @ v) / w.sum(), None


def _all_counted(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    w, most = (q @ k.T * o.scale).where(o.allowed), q.shape[1] + 1.0
    return ((w + most).where(o.allowed) @ v) / (w.sum() + o.length * most), None


def _undivided(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, None]:
    w = (q @ k.T * o.scale + (q.shape[1] + 1.0)).where(o.allowed)
    return (w @ v) / o.count, None


ECOFORMER = Variant(
    name="ecoformer",
    define=attention,
    formula="out_i = sum_j w_ij v_j / sum_j w_ij,  w_ij = scale·q_i·k_j + d_k + 1, q and k codes of -1, 0 and 1",
    unit="u · sum_j |w_ij v_jc| / |sum_j w_ij|",
    source="Liu et al., EcoFormer, arXiv 2209.09004, recalled; the released pvt/hashing/ksh.py and pvt/performer.py "
    "were read. The release's numerator has (d_k + 1) v_i in place of (d_k + 1) sum_j v_j, which refattn.functions."
    "code_attention computes as mode='released'.",
    compared="linear_attention_bias of the release at a277f9e on a CPU, 100 calls of codes: refattn.functions."
    "code_attention with mode='released' agrees within roundings of float32; this, the paper's, differs",
    uses=frozenset({"allowed"}),
    forms={"sums": sums},
    laws=(
        "determinism",
        "key_permutation",
        "masked_keys_unread",
        "grouped_heads",
        "batch_independence",
        "batch_invariance",
        "values_doubled",
    ),
    bugs=("zeroed_head", "wrong_scale", "allowed_ignored", "heads_tiled", "last_key_dropped", "value_of_next_key"),
    families=("gaussian",),
    cases={
        "codes": {"n_q": 7, "n_k": 9, "d": 8, "codes": True},
    },
    quick=frozenset({"gaussian/plain", "gaussian/codes", "gaussian/codes-and-all"}),
    wrong={
        "bias_on_the_own_value": _wrong("the constant meets the row's own value alone, as in the release", _own_value),
        "one_less": _wrong("the constant is the number of bits, so that opposite codes weigh nothing", _bits_alone),
        "equal_bits_counted": _wrong("a weight is 1 and the number of equal bits, half of what it is", _equal_bits),
        "hidden_keys_counted": _wrong(
            "the denominator counts the constant of keys that a row may not see", _all_counted
        ),
        "divided_by_the_keys": _wrong("the sum is divided by the number of keys, not by the weights", _undivided),
    },
    contract=(
        "A row without any key gives out 0.",
        "Codes are taken as they are: of -1, 0 and 1, and with a scale of at most 1, every weight is at least 1.",
        "Of other numbers a denominator may be 0, which gives NaN.",
        "scale None is 1: the paper has none.",
        "A key that is not allowed is never read.",
    ),
    default_scale="one",
)
