"""CRATE's rates against determinants in 40 digits, the gradient against fractions, the layers against torch."""

import re
from fractions import Fraction

import flint
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.functions.crate import (
    coding_rate,
    crate_block,
    crate_decoder_block,
    ista_step,
    mssa,
    subspace_coding_gradient,
    subspace_coding_rate,
)
from refattn.theory import crate as theory
from refattn.theory.fields import balls, precise, rational
from tests.functions.rounding import softmax_error, unit

EPS = 0.5


def call(seed, n=6, d=5, p=2, heads=3, dtype="float64"):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)).astype(dtype), rng.standard_normal((heads, d, p)).astype(dtype)


def log_det_error(w, by, u):
    """Return the most that log det(I + by WᵀW) is off.

    The matrix G is off by (n + 3) u of the sums of |w||w|, below |W|_F²; elimination solves a matrix that is off by
    3 p² u |G| (growth p at most, as in practice); G >= I, so the logarithm moves by p times what G is off.
    """
    n, p = w.shape[-2:]
    size = p + by * float((w * w).sum())
    return p * (n + 3 + 3 * p * p) * u * size


@pytest.mark.parametrize("shape", [(4, 3), (3, 5)])
@pytest.mark.parametrize("kind", ["numpy", "torch", "jax"])
def test_coding_rate_is_that_of_the_determinant(shape, kind):
    dtype = "float32" if kind == "jax" else "float64"
    make = {"numpy": np.asarray, "torch": torch.asarray, "jax": jnp.asarray}[kind]
    z, _ = call(0, *shape, dtype=dtype)
    found = coding_rate(make(z), EPS)
    n, d = shape
    with mpmath.workdps(40):
        w = mpmath.matrix(z.astype(float).tolist())
        due = mpmath.log(mpmath.det(mpmath.eye(d) + mpmath.mpf(d) / (n * EPS**2) * (w.T * w))) / 2
    assert abs(float(found) - due) <= log_det_error(z, d / (n * EPS**2), unit(dtype))


def test_subspace_rate_is_the_sum_over_subspaces():
    z, bases = call(1)
    beta, due, most = 2 / (6 * EPS**2), mpmath.mpf(0), 0
    with mpmath.workdps(40):
        for u in bases:
            w = mpmath.matrix(z.tolist()) * mpmath.matrix(u.tolist())
            due += mpmath.log(mpmath.det(mpmath.eye(2) + beta * (w.T * w))) / 2
            # W itself is off by d u |Z||U|
            most += log_det_error(np.abs(z) @ np.abs(u), beta, (1 + 2 * 5) * unit("float64"))
    assert abs(float(subspace_coding_rate(z, bases, EPS)) - due) <= most
    two = np.stack([z, 2 * z])
    assert (subspace_coding_rate(two, bases, EPS) == [subspace_coding_rate(x, bases, EPS) for x in two]).all()


def gradient_error(z, bases, eps):
    """Return the most that the gradient is off: sums over K heads of beta U G⁻¹ W, |G⁻¹| <= 1, G off as above."""
    (n, d), (count, _, p) = z.shape, bases.shape
    beta = p / (n * eps**2)
    w = float((np.abs(z) @ np.abs(bases)).max())
    size = p + beta * n * p * w * w
    return count * beta * float(np.abs(bases).max()) * p * w * (n + 2 * d + 8 + 3 * p * p) * size * unit("float64")


def test_gradient_is_theorys_in_fractions():
    z, bases = call(2)
    beta = flint.fmpq(2) / 6 * 4
    due = theory.gradient(rational(z.T), np.stack([rational(u) for u in bases]), beta)
    found = subspace_coding_gradient(z, bases, EPS)
    nearest = np.vectorize(lambda a: int(a.p) / int(a.q))(due)
    assert abs(found.T - nearest).max() <= gradient_error(z, bases, EPS)


def test_gradient_is_that_of_the_rate():
    z, bases = (torch.asarray(x) for x in call(3))
    z.requires_grad_()
    (due,) = torch.autograd.grad(subspace_coding_rate(z, bases, EPS), z)
    found = subspace_coding_gradient(z, bases, EPS).detach()
    # both ways solve the same systems
    assert float(abs(found - due).max()) <= 2 * gradient_error(z.detach().numpy(), bases.numpy(), EPS)


@pytest.mark.parametrize("make", [np.asarray, torch.asarray])
@precise()
def test_attention_is_theorys_in_balls(make):
    z, bases = call(4)
    found = np.asarray(mssa(make(z), make(bases), EPS))
    due = theory.heads(balls(z.T), balls(bases))
    beta = 2 / (6 * EPS**2)
    w = np.abs(z) @ np.abs(bases)
    bound, _ = softmax_error(w, w, w, 1, 12 * unit("float64"))  # W is off by d u, on both sides of a score
    most = 2 * 3 * 2 * float(np.abs(bases).max()) * bound * beta  # sums over 3 heads of 2 features
    assert max(abs(float((x * beta).mid()) - f) for x, f in zip(due.T.ravel(), found.ravel(), strict=True)) <= most


def subspaces(noise):
    """Return unit tokens near four subspaces of 3 dimensions in R^24, and these."""
    rng = np.random.default_rng(5)
    bases = np.linalg.qr(rng.standard_normal((24, 24)))[0][:, :12].reshape(24, 4, 3).transpose(1, 0, 2)
    z = np.concatenate([rng.standard_normal((50, 3)) @ u.T for u in bases]) + noise * rng.standard_normal((200, 24))
    return z / np.linalg.norm(z, axis=1, keepdims=True), bases


def test_the_step_lowers_the_rate_and_attention_alone_raises_it():
    """A negative result: what is added, MSSA, raises the rate; the step lowers it because it shrinks the tokens."""
    z, bases = subspaces(0.05)
    eps = 0.5
    beta = 3 / (200 * eps**2)
    before, far = subspace_coding_rate(z, bases, eps), log_det_error(np.ones((200, 24)), beta, 25 * unit("float64"))
    literal = subspace_coding_rate(z + mssa(z, bases, eps), bases, eps)
    assert literal - before > 2 * far
    rates = []
    for s in (0.1, 0.5, 1.0):
        stepped = (1 - s) * z + s / beta * mssa(z, bases, eps)
        rates.append(subspace_coding_rate(stepped, bases, eps))
        assert rates[-1] - subspace_coding_rate((1 - s) * z, bases, eps) > 2 * far
    assert before > rates[0] > rates[1] > rates[2]
    # the block is that step, then ISTA; a dictionary of 0 and a weight of 0 keep what is positive
    block = crate_block(z, bases, np.zeros((24, 24)), kappa=0.5 / beta, eps=eps, weight=0.0)
    stepped = 0.5 * z + 0.5 / beta * mssa(z, bases, eps)
    assert abs(block - np.maximum(stepped, 0)).max() <= 8 * unit("float64") * abs(z).max() * (1 + 1 / beta)


def fractions(x):
    return np.frompyfunc(lambda a: Fraction(int(a)), 1, 1)(x)


@pytest.mark.parametrize(("times", "lowers"), [(1, True), (Fraction(1, 3), True), (40, False)])
def test_ista_lowers_the_lasso_in_fractions(times, lowers):
    """By |z' - z|²/(2 eta) or more for eta up to 1/|D|², here over Frobenius' norm; a long step raises it."""
    rng = np.random.default_rng(6)
    d, x, z = (fractions(rng.integers(-5, 6, shape)) for shape in ((4, 3), (2, 4), (2, 3)))
    z, weight = abs(z), Fraction(1, 7)
    eta = times / (d * d).sum()

    def loss(code):
        away = x - code @ d.T
        return (away * away).sum(-1) / 2 + weight * code.sum(-1)

    for _ in range(4):
        after = ista_step(x, z, d, eta, weight)
        fell = loss(z) - loss(after) >= ((after - z) ** 2).sum(-1) / (2 * eta)
        assert fell.all() == lowers
        assert (after >= 0).all()
        z = after


def released(z, bases, dictionary, out, bias):
    """Return the released layer from torch's functions."""
    f = torch.nn.functional
    heads, d, p = bases.shape
    qkv = bases.permute(0, 2, 1).reshape(heads * p, d)  # the weight of one linear layer
    y = f.layer_norm(z, (d,))
    w = f.linear(y, qkv).reshape(*z.shape[:-1], heads, p).transpose(-2, -3)
    attended = f.scaled_dot_product_attention(w, w, w).transpose(-2, -3).reshape(*z.shape[:-1], heads * p)
    y = z + f.linear(attended, out, bias)
    n = f.layer_norm(y, (d,))
    step = f.linear(n, dictionary.T) - f.linear(f.linear(n, dictionary), dictionary.T)
    return f.relu(n + 0.1 * step - 0.01), y


def layer_error(z, bases, out, bias):
    """Return the most that z + attention of LN(z) is off, and 4 times (d + 6) u the same for LN of it.

    LN is off by a share 4 (d + 6) u (1 + |z|/deviation) of sqrt(d) at most: mean, difference and variance. That share
    is the roundoff of what follows: products with U, softmax, sums over heads.
    """
    (n, d), (heads, _, p) = z.shape[-2:], bases.shape
    share = 4 * (d + 6) * unit("float64") * (1 + np.abs(z).max() / z.std(-1).min())
    w = d**0.5 * float(np.abs(bases).sum(1).max()) * np.ones((n, p))
    bound, _ = softmax_error(w, w, w, p**-0.5, (d + 2) * share)
    return 2 * heads * p * float(np.abs(out).max()) * bound + 4 * unit("float64") * float(
        np.abs(z).max() + np.abs(bias).max()
    )


def test_the_released_layer_is_torchs():
    rng = np.random.default_rng(7)
    z, bases = rng.standard_normal((2, 6, 4)), rng.standard_normal((2, 4, 2))
    d, out, bias = rng.standard_normal((4, 4)), rng.standard_normal((4, 4)), rng.standard_normal(4)
    due, y = released(*(torch.asarray(x) for x in (z, bases, d, out, bias)))
    most = layer_error(z, bases, out, bias)
    found = crate_block(z, bases, d, out=out, out_bias=bias, mode="released")
    # LN divides by the deviation, and has its own share; ISTA is linear but for relu
    share = 4 * 10 * unit("float64") * (1 + float(abs(y).max()) / float(y.std(-1, correction=0).min()))
    most = 2 * (3 * most / float(y.std(-1, correction=0).min()) + 2 * share)
    most *= 1 + 0.1 * (4 * np.abs(d).max() + 16 * np.abs(d).max() ** 2)
    assert abs(found - due.numpy()).max() <= 2 * most
    assert (found == 0).any()
    assert (found > 0).any()


def test_the_decoder_is_torchs():
    rng = np.random.default_rng(8)
    z, bases = rng.standard_normal((1, 5, 4)), rng.standard_normal((2, 4, 2))
    a, out, bias = rng.standard_normal((4, 4)), rng.standard_normal((4, 4)), rng.standard_normal(4)
    found = crate_decoder_block(z, bases, a, out=out, out_bias=bias)
    y = torch.nn.functional.layer_norm(torch.asarray(z), (4,)) @ torch.asarray(a).T
    _, kept = released(*(torch.asarray(x) for x in (y.numpy(), bases, a, -out, -bias)))
    # y is off by the share of LN, 2 |A| of it; so is all that follows, where LN divides by y's deviation
    share = 4 * 10 * (1 + np.abs(z).max() / z.std(-1).min())
    most = share * 8 * (1 + np.abs(a).max() / float(y.std(-1, correction=0).min()))
    assert abs(found - kept.numpy()).max() <= 2 * most * layer_error(y.numpy(), bases, out, bias)


@pytest.mark.parametrize(
    ("do", "text"),
    [
        (lambda z, u: coding_rate(z[0], 1.0), "z: shape is (5,), expected (..., tokens, dim), each at least 1"),
        (lambda z, u: coding_rate(z, 0), "eps: got 0, expected a number in (0, inf)"),
        (lambda z, u: subspace_coding_rate(z, u[:, :4], 1.0), "bases: shape is (3, 4, 2), expected (subspaces, 5, p)"),
        (lambda z, u: mssa(z, u, -1.0), "eps: got -1.0, expected a number in (0, inf)"),
        (
            lambda z, u: ista_step(z, z, np.eye(4), 1, 0),
            "dictionary: shape is (4, 4), expected (5, 5), x's and z's dim",
        ),
        (lambda z, u: ista_step(z, z, np.eye(5), 0, 0), "eta: got 0, expected a finite number above 0"),
        (lambda z, u: ista_step(z, z, np.eye(5), 1, -1), "weight: got -1, expected a finite number of at least 0"),
        (lambda z, u: crate_block(z, u, np.eye(5), mode="code"), "mode: got 'code', expected one of paper, released"),
        (lambda z, u: crate_block(z, u, np.eye(4)), "dictionary: shape is (4, 4), expected (5, 5), each at least 1"),
        (lambda z, u: crate_block(z, u, np.eye(5)), "eps: got None, expected a number above 0 for mode 'paper'"),
        (
            lambda z, u: crate_block(z, u, np.eye(5), eps=1.0, out=z),
            "out: got an array, expected None for mode 'paper'",
        ),
        (
            lambda z, u: crate_block(z, u, np.eye(5), mode="released"),
            "out: got None, expected an array for mode 'released'",
        ),
        (
            lambda z, u: crate_decoder_block(z, u, np.eye(5), out=np.ones((5, 6)), out_bias=None),
            "out_bias: got None, expected an array",
        ),
        (
            lambda z, u: crate_decoder_block(z, u, np.eye(5), out=np.ones((5, 5)), out_bias=np.ones(5)),
            "out: shape is (5, 5), expected (5, 6), each at least 1",
        ),
    ],
)
def test_errors_name_the_argument(do, text):
    with pytest.raises(InvalidInput, match=re.escape(text)):
        do(*call(0))
