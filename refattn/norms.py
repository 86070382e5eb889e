r"""RMS norm of queries and keys, with weights, before they are turned by their positions (qk-norm).

Each row x of a query or key head becomes ``w · x / sqrt(mean(x²) + eps)`` (Zhang and Sennrich, arXiv 1910.07467, eq. 4,
with the epsilon that all implementations have). Qwen3 and Gemma 3 do so for each head, with weights that all heads
share (Gemma's weight is 1 + w). OLMo 2 takes the mean over all heads together: another definition, which is not here.
Formulas recalled, not read again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import dtype_name, kind_of, to_float64, to_numpy
from .dtypes import FORMATS
from .errors import InvalidProblem
from .positions import turned
from .validation import expect_array, is_finite, shown

__all__ = ["NORMS", "check_norms", "has_norms", "multiplied", "normed"]

NORMS = ("query_norm", "key_norm")


def has_norms(p: Any) -> bool:
    """Tell whether a call takes a norm of its queries or keys."""
    return p.query_norm is not None or p.key_norm is not None


def normed(x: Any, weight: Any, o: Any) -> Any:
    """Return rows over their root mean square, times weights, in any arithmetic; `o` is a definition's options."""
    mean = (x * x).sum() / o.norm_width + o.norm_eps
    return (x * mean.rsqrt() * weight).written(np.ones(x.shape[1], bool))


def multiplied(q: Any, k: Any, o: Any) -> tuple[Any, Any]:
    """Return queries and keys as they are multiplied: normed, then turned."""
    if o.query_norm is not None:
        q = normed(q, o.query_norm, o)
    if o.key_norm is not None:
        k = normed(k, o.key_norm, o)
    if o.partner is not None:
        q, k = turned(q, o.cos_q, o.sin_q, o), turned(k, o.cos_k, o.sin_k, o)
    return q, k


def check_norms(p: Any) -> None:
    """Refuse weights that do not fit a call, and an epsilon that is not above 0."""
    given = [n for n in NORMS if getattr(p, n) is not None]
    if not given:
        if p.norm_eps is not None:
            raise InvalidProblem("norm_eps: nothing in the call takes a norm; give query_norm or key_norm, too")
        return
    eps = p.norm_eps
    if eps is None:
        raise InvalidProblem(f"norm_eps: is missing beside {given[0]}; it is added to the mean square, often 1e-6")
    real = isinstance(eps, int | float | np.integer | np.floating) and not isinstance(eps, bool)
    if not real or not is_finite(eps) or eps <= 0:
        raise InvalidProblem(f"norm_eps: got {shown(eps)}, expected a finite number above 0")
    object.__setattr__(p, "norm_eps", float(eps))
    if p.d_k == 0:
        raise InvalidProblem(f"{given[0]}: rows without columns have no mean; leave it out where d_k is 0")
    for name in given:
        x = getattr(p, name)
        expect_array(name, x)
        if kind_of(x) != p.kind:
            raise InvalidProblem(f"{name}: is of {kind_of(x)} and query of {p.kind}; pass arrays of one library")
        if dtype_name(x) not in FORMATS:
            raise InvalidProblem(f"{name}: got dtype {dtype_name(x)}, expected one of {', '.join(FORMATS)}; cast it")
        if tuple(x.shape) != (p.d_k,):
            raise InvalidProblem(
                f"{name}: got shape {tuple(x.shape)}, expected ({p.d_k},), a weight for each column of a head; a norm "
                "over all heads together is not computed here"
            )
        if not np.isfinite(to_float64(to_numpy(x, name))).all():
            raise InvalidProblem(f"{name}: has NaN or inf, expected finite numbers")
