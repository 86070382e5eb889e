"""Makers of sequences that are decoded, of plans that fit them, and of sessions."""

import numpy as np

from refattn import Problem, he
from refattn.he import decoding_plan
from refattn.he.layout import Layout

from .make import ranges


def sequence(n=8, context=0, d=6, d_v=None, heads=3, p=2, epsilon=1.0, seed=0):
    """Return the call that all steps of a sequence are together: a row sees the context and what came so far."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((1, heads, n, d))
    k, v = (rng.standard_normal((1, heads, context + n, f)) for f in (d, d_v or d))
    return Problem(q, k, v, variant="power", causal="bottom_right", options={"p": p, "epsilon": epsilon})


def planned(x, tolerance=1e-2, **more):
    given = ranges(x) | {"epsilon": x.options["epsilon"], "tolerance": tolerance, "context": x.n_k - x.n_q} | more
    return he.plan_decoding(x.n_q, x.d_k, x.d_v, x.heads, x.options["p"], **given)


def with_layouts(monkeypatch, rows, groups, columns=4):
    """Make plans have small spans of keys, as those of long sequences have; the slots stay partly empty."""

    def layouts(slots, n_k, d, heads):
        keys, pairs = (1 << (n - 1).bit_length() for n in (n_k, -(-d // 2)))
        return [Layout(slots, keys, columns, groups, pairs // groups, 1, heads, spans=keys // rows)]

    monkeypatch.setattr(decoding_plan, "token_layouts", layouts)


def taken(x):
    """Return q, k, v of the tokens of a call, and its context's keys and values, or None."""
    q, k, v = (np.asarray(a)[0] for a in (x.query, x.key, x.value))
    n = x.n_k - x.n_q
    return q, k[:, n:], v[:, n:], (k[:, :n], v[:, :n]) if n else None


def begun(x, plan, known=True):
    """Return a client, which knows the context's keys or does not, and a server."""
    context = taken(x)[3]
    client = he.DecodingClient(plan, context[0] if context and known else None)
    return client, he.DecodingServer(plan, client.evaluation_keys(), context)


def token(client, x, i):
    q, k, v, _ = taken(x)
    return client.encrypt_token(q[:, i], k[:, i], v[:, i])


def decoded(client, server, x, steps=None):
    """Return what a client gets for each token, (heads, steps, d_v)."""
    every = range(x.n_q if steps is None else steps)
    return np.stack([client.decrypt(server.step(token(client, x, i))) for i in every], 1)
