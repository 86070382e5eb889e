"""Makers of calls of sigmoid attention and of plans that fit them."""

import math

import numpy as np

from refattn import Problem, he


def call(n_q=5, n_k=7, d=6, d_v=None, heads=2, seed=0, **more):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, heads, n, f)) for n, f in ((n_q, d), (n_k, d), (n_k, d_v or d)))
    return Problem(q, k, v, variant="sigmoid", **more)


def planned(x, **more):
    q, k, v = (np.asarray(a)[0] for a in (x.query, x.key, x.value))
    offset = x.options.get("offset")
    offset = -math.log(x.n_k) if offset is None else offset
    scale = 1 / math.sqrt(x.d_k) if x.scale is None else x.scale
    s = scale * np.einsum("hid,hjd->hij", q, k) + offset
    given = {
        "scores": (min(s.min(), offset) - 0.1, max(s.max(), offset) + 0.1), "offset": offset, "scale": x.scale,
        "norms": tuple(np.linalg.norm(a, axis=-1).max() for a in (q, k)), "value_most": np.abs(v).max(),
    }  # fmt: skip
    return he.plan_sigmoid(x.n_q, x.n_k, x.d_k, x.d_v, x.heads, **given | more)
