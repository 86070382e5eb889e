"""Makers of power-softmax calls and of plans that fit them."""

from dataclasses import replace

import numpy as np

from refattn import Problem, he
from refattn.he import layer as layers


def problem(n_q=5, n_k=7, d=6, d_v=None, heads=1, p=2, epsilon=0.5, seed=0, batch=1, **more):
    rng = np.random.default_rng(seed)
    shapes = ((batch, heads, n_q, d), (batch, heads, n_k, d), (batch, heads, n_k, d_v or d))
    q, k, v = (rng.standard_normal(s) for s in shapes)
    return Problem(q, k, v, variant="power", options={"p": p, "epsilon": epsilon}, **more)


def ranges(x):
    """Return what a plan must be told of a problem's numbers, with a little room."""
    from refattn.masks import visible

    q, k, v = (np.asarray(a) for a in (x.query, x.key, x.value))
    k, v = (np.repeat(a, x.heads // x.heads_kv, 1) for a in (k, v))
    q, k, v = (a.reshape(-1, *a.shape[2:]) for a in (q, k, v))
    scale = 1 / np.sqrt(x.d_k) if x.scale is None else x.scale
    places = [(b, h) for b in range(x.batch) for h in range(x.heads)]
    seen = np.stack([visible(x, *at, slice(0, x.n_q), slice(0, x.n_k)) for at in places])
    sums = ((scale * q @ k.swapaxes(1, 2)) ** x.options["p"] * seen).sum(2) + x.options["epsilon"]
    sums = sums[seen.any(2)]
    return {
        "denominator": (max(x.options["epsilon"], 0.95 * sums.min()), 1.05 * sums.max()),
        "norms": (np.linalg.norm(q, axis=2).max(), np.linalg.norm(k, axis=2).max()),
        "value_most": np.abs(v).max(),
    }


def planned(x, tolerance=1e-2, **more):
    given = ranges(x) | {"epsilon": x.options["epsilon"], "scale": x.scale, "tolerance": tolerance} | more
    return he.plan(x.n_q, x.n_k, x.d_k, x.d_v, x.batch * x.heads, x.options["p"], **given)


def in_parts(monkeypatch, queries):
    """Have layers' queries come in parts of so many, as of more tokens than a ciphertext has room for."""
    least_of = layers.least_of

    def fewer(weights):
        x = least_of(weights)
        return replace(x, slots=x.slots // x.queries * queries, columns=x.heads * queries, queries=queries)

    monkeypatch.setattr(layers, "least_of", fewer)
