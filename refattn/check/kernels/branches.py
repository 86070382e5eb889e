"""Our kernel for operators that add up several softmaxes, in NumPy: written from the papers, not from the definitions.

Float32 inside, each softmax's P rounded to the input's type.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import from_float64, to_float64
from ...dtypes import FORMATS, Format
from ...errors import UnsupportedProblem
from ...problem import Problem
from ...variants import variant_of
from .sparse import PICKS

__all__ = ["branches"]

Array = NDArray[Any]
Options = dict[str, Any]
Mean = Callable[[Array, Array], Array]


def branches(problem: Problem) -> Array:
    """Return out (b, h_q, n_q, d_v) of an operator that adds up several softmaxes.

    Raises
    ------
    UnsupportedProblem
        Another operator.
    """
    if problem.variant not in HEADS:
        raise UnsupportedProblem(f"refattn-branches: takes {', '.join(HEADS)}, got {problem.variant}")
    p, form, group = problem.to("numpy"), FORMATS[problem.dtype], problem.heads // problem.heads_kv
    q, k, v = (to_float64(x).astype(np.float32) for x in (p.query, p.key, p.value))
    scale = np.float32(1 / np.sqrt(p.d_k) if p.scale is None else p.scale)
    options = variant_of(p.variant).settings(p) | {"scale": scale, "causal": p.causal is not None, "heads": p.heads}
    out = np.zeros(p.out_shape, np.float32)
    with np.errstate(all="ignore"):
        for b, h in product(range(p.batch), range(p.heads)):
            g = h // group
            own = options | {"head": h, "group": q[b, g * group : (g + 1) * group]}
            out[b, h] = HEADS[p.variant](q[b, h], k[b, g], v[b, g], own, lambda s, x: _mean(s, x, form))
    return from_float64(form.round_array(out.astype(np.float64)), p.dtype)


def _mean(s: Array, v: Array, form: Format) -> Array:
    """Return the mean of values by the softmax of a row's scores, P rounded; 0 where there is none."""
    if not len(s):
        return np.zeros(v.shape[1], np.float32)
    w = np.exp(s - s.max())
    total = w.sum(dtype=np.float32)
    return np.asarray((form.round_array(w.astype(np.float64)).astype(np.float32) @ v) / total)


def _nsa(q: Array, k: Array, v: Array, o: Options, mean: Mean) -> Array:
    size, (gates, q, k) = o["block_size"], (q[:, -3:], q[:, :-3], k[:, :-3])
    whole = len(k) // size
    means = [x[: whole * size].reshape(whole, size, x.shape[1]).mean(1, dtype=np.float32) for x in (k, v)]
    picked = PICKS["nsa_selected"](
        q, k, o | {"group": o["group"][:, :, :-3], "weighs": np.ones((len(q), len(k)), bool)}
    )
    out = np.zeros((len(q), v.shape[1]), np.float32)
    for i, keys in enumerate(picked):
        at = i + len(k) - len(q)
        chosen = np.array([j for j in keys if j <= at])
        near = np.arange(max(at - o["window_keys"] + 1, 0), at + 1)
        ended = slice((at + 1) // size)
        pairs = ((means[0][ended], means[1][ended]), (k[chosen], v[chosen]), (k[near], v[near]))
        out[i] = sum(g * mean((x @ q[i]) * o["scale"], y) for g, (x, y) in zip(gates[i], pairs, strict=True))
    return out


HEADS: dict[str, Callable[[Array, Array, Array, Options, Mean], Array]] = {"nsa": _nsa}
"""By operator, the output of a head."""
