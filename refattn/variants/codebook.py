"""Attention to a codebook: keys and values are the means of clusters of tokens, each as often as it has tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import Problem
from .option import Option, whole
from .shapes import Rows
from .variant import Variant, packed

__all__ = ["CODEBOOK"]

EXPECTED = "None or a tuple of one tuple of codes from 0 on, or one for each query head"


def clusters(n_k: int, o: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the number of each key's code, and how many keys a code has, by key."""
    codes = np.arange(n_k) if o.codes is None else np.array(o.codes, np.int64)
    _, of, many = np.unique(codes, return_inverse=True, return_counts=True)
    return of, many[of]


def means(k: Any, o: Any, divided: bool = True) -> Any:
    """Return for each key the mean, or for a mistake the sum, of the keys that have its code."""
    of, many = clusters(k.shape[0], o)
    same = o.of_keys((of[:, None] == of).astype(np.float64)) @ k
    return same / o.of_keys(many[:, None].astype(np.float64)) if divided else same


def attention(q: Any, k: Any, v: Any, o: Any, mean: Any = means, share: Any = None, of: Any = None) -> tuple[Any, Any]:
    """Define the attention of one head: softmax attention in which every key is the mean of its code's.

    A code's keys have one weight, so that the sum over them is their number times the mean value. The rest is for
    mistakes: other means, a factor of each weight, and other values.
    """
    s = q @ mean(k, o).T * o.scale
    m = s.shift(o.allowed)
    p = (s - m).exp(where=o.allowed)
    if share is not None:
        p = p * o.matrix(np.broadcast_to(share(clusters(k.shape[0], o)[1].astype(np.float64)), p.shape))
    z = p.sum()
    return (p @ (v if of is None else of(v, o))) / z, m + z.log()


def by_codes(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    """Write the same as a loop over codes, of n_c exp(s_c) and n_c exp(s_c) times the mean value."""
    codes = tuple(range(k.shape[0])) if o.codes is None else o.codes
    z: Any = None
    out: Any = None
    for code in sorted(set(codes)):
        own = np.array([[x == code] for x in codes])
        n = int(own.sum())
        key, value = k.T.where(own.T).sum().T / n, v.T.where(own.T).sum().T / n
        e = (q @ key.T * o.scale).exp() * n
        z, out = (e, e @ value) if z is None else (z + e, out + e @ value)
    return out / z, z.log()


def first_of(v: Any, o: Any) -> Any:
    """Return for each key the value of the first that has its code: a mistake."""
    of, _ = clusters(v.shape[0], o)
    first = np.unique(of, return_index=True)[1][of]
    return o.of_keys(np.eye(len(of))[first]) @ v


def all_codes(value: Any, heads: int) -> str | None:
    """Check for None, or the codes of keys for all heads or for each."""
    ok = value is None or (isinstance(value, tuple) and len(value) in (1, heads) and all(_codes(x) for x in value))
    return None if ok else EXPECTED


def _codes(x: Any) -> bool:
    return isinstance(x, tuple) and all(whole(0)(y, 0) is None for y in x)


def fits(p: Problem) -> str | None:
    """Refuse codes of another number of keys than the call's."""
    lengths = {len(x) for x in p.options.get("codes") or ()} - {p.n_k}
    if lengths:
        return f"codes: got {max(lengths)} codes, expected one for each of {p.n_k} keys"
    return packed(p, "codes")


def tries(n_q: int, n_k: int) -> list[dict[str, Any]]:
    """Return codes for a call of some size: each its own, two, three uneven ones, one."""
    of = (lambda j: j % 2, lambda j: 7 * min(j // 2, 2), lambda j: 0)
    return [{}, *({"codes": (tuple(f(j) for j in range(n_k)),)} for f in of)]


def wrong(text: str, **change: Any) -> tuple[str, Rows]:
    """Return a mistake."""
    return text, Rows(lambda q, k, v, o: attention(q, k, v, o, **change))


UNEVEN = tuple(min(j * j % 23, 9) for j in range(67))
CODEBOOK = Variant(
    name="codebook",
    define=attention,
    forms={"by_codes": by_codes},
    formula="out_i = sum_c n_c exp(s_ic) V_c / sum_c n_c exp(s_ic),  s_ic = scale·q_i·K_c,  K_c and V_c the means of "
    "the keys and values of the n_c tokens that have code c;  lse_i = log sum_c n_c exp(s_ic)",
    unit="u · sum_j p_ij |v_jc|",
    source="Dwivedi et al., LargeGT, arXiv 2312.11109 (log n_c is added to scores; public code was read), whose codes "
    "are moving averages; with means it is the estimated zone of RetroInfer, arXiv 2505.02922 (recalled). Codes that "
    "are given as keys are softmax attention with weight=counts (docs/functions/codebooks.md).",
    uses=frozenset(),
    options={
        "codes": Option(None, "which code each key has, for all heads or for each; None is its own", all_codes, (None,),
                        places=True),
    },
    laws=("determinism", "grouped_heads", "batch_independence", "batch_invariance", "values_doubled"),
    bugs=("zeroed_head", "wrong_scale", "heads_tiled", "last_key_dropped", "value_of_next_key", "neighbour_row",
          "output_too_narrow"),
    families=("gaussian", "peaked", "drift", "ragged"),
    contract=(
        "Means are of the exact keys and values.",
        "Codes are names: which numbers they are changes nothing.",
        "Every key has a code, and every row sees all codes.",
        "Gradients hold the codes fixed, and go through the means.",
        "A NaN or infinite number in a key is in all rows.",
    ),
    has_lse=True,
    cases={
        "even": {"n_q": 37, "n_k": 67, "options": {"codes": (tuple(j % 8 for j in range(67)),)}},
        "uneven": {"n_q": 37, "n_k": 67, "options": {"codes": (UNEVEN,)}},
        "by-head": {
            "n_q": 21, "n_k": 36, "h": 4, "h_kv": 2,
            "options": {"codes": tuple(tuple((j * s) % 7 // t for j in range(36)) for s, t in
                                       ((1, 1), (3, 2), (5, 3), (2, 1)))},
        },
        "one-code": {"n_q": 9, "n_k": 20, "options": {"codes": ((5,) * 20,)}},
        "sharp": {"n_q": 37, "n_k": 67, "scale": 2.0, "options": {"codes": (UNEVEN,)}},
        "runs": {"n_q": 9, "n_k": 131, "options": {"codes": (tuple(j // 30 for j in range(131)),)}},
    },
    wrong={
        "counts_left_out": wrong("every code counts once, log n_c is not added", share=lambda n: 1 / n),
        "counts_squared": wrong("log n_c is added twice", share=lambda n: n),
        "sums_of_keys": wrong("a code's key is the sum of its keys, not their mean",
                              mean=lambda k, o: means(k, o, divided=False)),
        "value_of_the_first_key": wrong("a code's value is that of its first token", of=first_of),
        "keys_as_they_are": wrong("scores are those of the tokens' own keys", mean=lambda k, o: k),
    },
    fits=fits,
    tries=tries,
    never=frozenset({"variable_lengths", "no_rows_or_keys"}),
)  # fmt: skip
