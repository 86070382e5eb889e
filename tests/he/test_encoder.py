"""Several blocks: the simulation against the formulas, and ciphertexts with refreshes against the simulation."""

import math

import numpy as np
import pytest

from refattn import he, power_attention
from refattn.he.polynomials import activation, inverse_sqrt
from refattn.he.weights import EncoderWeights, Feedforward, Weights


def encoder(n=4, d=8, heads=1, hidden=8, blocks=2, classes=3, p=2, seed=0, tolerance=5e-2):
    """Return an encoder's weights, tokens, and what the formulas give with the stand-ins."""
    rng = np.random.default_rng(seed)

    def normal(*shape, size=1.0):
        return rng.standard_normal(shape) * size

    x = normal(n, d)
    made, y, d_k = [], x, d // heads
    for k in range(blocks):
        square = (y**2).mean(1, keepdims=True) + 1e-5
        first = inverse_sqrt(0.8 * square.min(), 1.2 * square.max(), tolerance)
        z = y * (first(square) if k else 1 / np.sqrt(square))
        maps = [normal(heads, d, d_k, size=1 / math.sqrt(d)) for _ in range(3)]
        biases = [normal(heads, n, d_k, size=0.3) for _ in range(3)]
        q, key, v = ((np.einsum("nd,hdc->hnc", z, w) + b)[None] for w, b in zip(maps, biases, strict=True))
        a = power_attention(q, key, v, p=p, epsilon=2.0)[0]
        sums = ((q[0] @ key[0].swapaxes(1, 2) / math.sqrt(d_k)) ** p).sum(2) + 2.0
        out, out_bias = normal(heads, d_k, d, size=1 / math.sqrt(d)), normal(d, size=0.1)
        y = y + np.einsum("hic,hcd->id", a, out) + out_bias
        square = (y**2).mean(1, keepdims=True) + 1e-5
        norm = inverse_sqrt(0.8 * square.min(), 1.2 * square.max(), tolerance)
        up, up_bias = normal(d, hidden, size=1 / math.sqrt(d)), normal(hidden, size=0.1)
        u = (y * norm(square)) @ up + up_bias
        act = activation("gelu", 1.2 * np.abs(u).max(), tolerance)
        down, down_bias = normal(hidden, d, size=0.5 / math.sqrt(hidden)), normal(d, size=0.1)
        then = Feedforward(out, out_bias, norm, 1e-5, up, up_bias, act, down, down_bias)
        y = y + act(u) @ down + down_bias
        ranges = (max(2.0, 0.95 * sums.min()), 1.05 * sums.max())
        made.append(
            Weights(*maps, *biases, p, 2.0, 1 / math.sqrt(d_k), ranges, False, then, 1e-5, first if k else None)
        )
    if not classes:
        return EncoderWeights(tuple(made)), x, y
    head, bias = normal(d, classes), normal(classes)
    return EncoderWeights(tuple(made), head, bias), x, y.mean(0) @ head + bias


SIZES = {
    "two blocks and scores": {},
    "three blocks, tokens": {"blocks": 3, "classes": 0},
    "one block, as many scores as fit": {"d": 10, "blocks": 1, "classes": 16, "hidden": 16},
    "sizes that fill nothing": {"n": 5, "d": 6, "heads": 3, "hidden": 7, "classes": 2},
    "p = 4": {"p": 4, "hidden": 4},
}


@pytest.mark.parametrize("name", SIZES)
def test_the_simulation_is_the_formulas(name):
    weights, x, expected = encoder(**SIZES[name])
    made = he.Encoder(weights, 1e-5 if SIZES[name].get("p") != 4 else 1e-3)
    # the polynomials for 1/D are all that differs: their relative errors pass on to all that follows
    slack = 300 * max(b.inverse.relative_error for b in made.stages) * np.abs(expected).max()
    assert np.abs(made.simulate(x) - expected).max() <= slack


@pytest.fixture(scope="module")
def session():
    """Return a small encoder's program, its client, keys, server and tokens."""
    pytest.importorskip("tenseal")
    weights, x, _ = encoder(n=3, d=4, hidden=4, tolerance=0.3)  # few levels: this is about ciphertexts
    made = he.Encoder(weights, 0.3)
    client = he.Client(made.plan)
    keys = client.evaluation_keys()
    return made, client, keys, he.Server(made, keys), x


def test_encrypted_blocks_are_the_simulation(session):
    made, client, _, server, x = session
    out = client.ask(x, server.attend)
    expected = made.simulate(x)
    # noise: as drawn, but for what one draw may be off by
    drawn = np.abs(made.simulate(x, seed=0) - expected).max()
    assert np.abs(out - expected).max() <= 20 * drawn + 300 * made.plan.refresh_error
    assert np.abs(out - expected).max() <= 1e-4 * np.abs(expected).max()
