"""Makers of power-softmax calls and of plans that fit them."""

import numpy as np

from refattn import Problem, he


def problem(n_q=5, n_k=7, d=6, d_v=None, heads=1, p=2, epsilon=0.5, seed=0, **more):
    rng = np.random.default_rng(seed)
    shapes = ((1, heads, n_q, d), (1, heads, n_k, d), (1, heads, n_k, d_v or d))
    q, k, v = (rng.standard_normal(s) for s in shapes)
    return Problem(q, k, v, variant="power", options={"p": p, "epsilon": epsilon}, **more)


def ranges(x):
    """Return what a plan must be told of a problem's numbers, with a little room."""
    from refattn.masks import visible

    q, k, v = (np.asarray(a)[0] for a in (x.query, x.key, x.value))
    k, v = (np.repeat(a, x.heads // x.heads_kv, 0) for a in (k, v))
    scale = 1 / np.sqrt(x.d_k) if x.scale is None else x.scale
    seen = np.stack([visible(x, 0, h, slice(0, x.n_q), slice(0, x.n_k)) for h in range(x.heads)])
    sums = ((scale * q @ k.swapaxes(1, 2)) ** x.options["p"] * seen).sum(2) + x.options["epsilon"]
    sums = sums[seen.any(2)]
    return {
        "denominator": (max(x.options["epsilon"], 0.95 * sums.min()), 1.05 * sums.max()),
        "norms": (np.linalg.norm(q, axis=2).max(), np.linalg.norm(k, axis=2).max()),
        "value_most": np.abs(v).max(),
    }


def planned(x, tolerance=1e-2, **more):
    given = ranges(x) | {"epsilon": x.options["epsilon"], "scale": x.scale, "tolerance": tolerance} | more
    return he.plan(x.n_q, x.n_k, x.d_k, x.d_v, x.heads, x.options["p"], **given)
