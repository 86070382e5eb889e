"""Decays as ratios: a right kernel passes under their model and not under the other; what leaks fails under both."""

import numpy as np
import pytest
import torch

from refattn import Problem, check_problem, evaluate
from refattn.check.kernels import chunked as kernel
from refattn.check.kernels.gradients import with_gradients
from refattn.check.model import MODELS, flash
from refattn.exact.heads import heads
from refattn.variants import gated_delta

CHUNK = 8
EPS = 2.0**-53


def call(seed, n=13, channels=1, state=True):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, 1, n, d)).astype(np.float32) for d in (4, 4, 3))
    k /= np.sqrt((k * k).sum(-1, keepdims=True))
    gates = {
        "alpha": rng.uniform(0.5, 1, (1, 1, n, channels)).astype(np.float32),
        "beta": rng.uniform(0, 1, (1, 1, n, 1)).astype(np.float32),
    }
    start = {"state": rng.standard_normal((1, 1, 4, 3)).astype(np.float32)} if state else {}
    return Problem(q, k, v, causal="bottom_right", variant="gated_delta", **gates, **start), rng.standard_normal(
        v.shape
    ).astype(np.float32)


def by_logarithms(alpha):
    """Return decays between tokens and from the start as kernels make them of the sums of their logarithms."""
    g = alpha.log().cumsum(2)
    behind = torch.ones(g.shape[2], g.shape[2]).tril()[:, :, None] > 0
    return torch.where(behind, (g[:, :, :, None] - g[:, :, None]).exp(), torch.zeros(())), g.exp()


def by_products(alpha):
    c = alpha.cumprod(2)
    behind = torch.ones(c.shape[2], c.shape[2]).tril()[:, :, None] > 0
    return torch.where(behind, c[:, :, :, None] / c[:, :, None], torch.zeros(())), c


def leaking(problem, dout):
    """Give the first alpha a quarter of the second one's gradient, too."""
    found = kernel._gradients(problem, dout)
    found["dalpha"][:, :, 0] += found["dalpha"][:, :, 1] / 4
    return found


@pytest.mark.parametrize("decays", [by_logarithms, by_products])
@pytest.mark.parametrize("channels", [1, 4])
def test_the_model_tells_ratios_from_leaks(monkeypatch, decays, channels):
    monkeypatch.setattr(kernel, "_decays", decays)
    wrong = with_gradients(leaking)(lambda p: kernel.chunked(p))
    p, dout = call(0, channels=channels, state=False)
    first = kernel._gradients(p, dout)["dalpha"][0, 0, 0]
    assert (evaluate(p, gradients=dout).dalpha[0, 0, 0] == 0).all()
    assert (first != 0).any()
    assert check_problem(kernel.chunked, p, "call", gradients=dout, model=MODELS["flash-ratios"]).passed
    assert not check_problem(kernel.chunked, p, "call", gradients=dout, model=flash).passed
    assert not check_problem(wrong, p, "call", gradients=dout, model=MODELS["flash-ratios"]).passed


def met_by_loops(one, dout):
    """Return the gradient by log alpha from what all tokens solve for at once."""
    q, k, v, n = one.q, one.k, one.v, len(one.k)
    alpha, beta = np.broadcast_to(one.gates["alpha"], k.shape), one.gates["beta"][:, 0]
    decay = np.zeros((n, n, k.shape[1]))
    for s in range(n):
        for t in range(s, n):
            decay[t, s] = np.prod(alpha[s + 1 : t + 1], axis=0)
    begun = np.array([np.prod(alpha[: t + 1], axis=0) for t in range(n)])
    a = np.eye(n) + np.tril(beta[:, None] * np.einsum("tc,tsc,sc->ts", k, decay, k), -1)
    u = np.linalg.solve(a, beta[:, None] * (v - (k * begun) @ one.state))
    g = np.linalg.solve(a.T, np.einsum("tc,tsc,sc->ts", q, decay, k).T @ dout)
    gradient = np.zeros(k.shape)
    for r in range(n):
        for t in range(r, n):
            for s in range(r):
                of_q, of_k = q[t] * (dout[t] @ u[s]), beta[t] * k[t] * (g[t] @ u[s])
                gradient[r] += (of_q - of_k) * decay[t, s] * k[s]
            gradient[r] += begun[t] * (q[t] * (one.state @ dout[t]) - beta[t] * k[t] * (one.state @ g[t]))
    return gradient


def test_what_meets_is_the_gradient_before_it_cancels():
    """With the sizes left out, each token's terms less the same terms from behind are alpha's own gradient."""
    p, dout = call(1, n=7, channels=4)
    (one,) = heads(p)
    due = met_by_loops(one, dout[0, 0].astype(float))
    exact = evaluate(p, gradients=dout)
    scale = np.abs(due).max()
    # sums of some hundred products of numbers of this size in float64
    assert np.abs(due - exact.dalpha[0, 0] * one.gates["alpha"]).max() <= 2**12 * EPS * scale
    for tokens in (3, 7, 64):
        products, sums = gated_delta.cumulated(one, dout[0, 0].astype(float), tokens)
        assert (products >= sums * (1 - 2**6 * EPS)).all()
        assert (sums >= np.abs(due) * (1 - 2**12 * EPS) - 2**12 * EPS * scale).all()


def test_the_model_is_checked():
    from refattn import InvalidInput

    with pytest.raises(InvalidInput, match="cumulated=-1"):
        MODELS["flash-ratios"]("float32").__class__(cumulated=-1)
    assert MODELS["flash-ratios"]("bfloat16").cumulated == 64
