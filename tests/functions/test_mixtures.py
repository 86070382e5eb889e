"""The exact update against integrals and another form of it in 50 digits; orders of components; attention; losses."""

import math
import re

import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch

import refattn
from refattn import InvalidInput
from refattn.functions.mixtures import (
    gmm_filter,
    gmm_from_tokens,
    gmm_kl,
    gmm_log_density,
    gmm_nll,
    gmm_posterior,
    gmm_tokens,
    posterior_as_attention,
)

KINDS = [np.asarray, torch.asarray, jnp.asarray]
EPS = 2.0**-52
mp = mpmath.mp.clone()
mp.dps = 50


def mixture(seed, k, d, *batch):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((*batch, k, d, d))
    covariances = a @ a.mT + np.eye(d)
    return rng.dirichlet(np.ones(k), batch), rng.standard_normal((*batch, k, d)), (covariances + covariances.mT) / 2


def observation(seed, d, m):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((m, m))
    return rng.standard_normal((m, d)), a @ a.T + np.eye(m)


LINE = (
    np.array([1.0, 3, 4]),
    np.array([[-1.5], [0.25], [4]]),
    np.array([[[0.25]], [[2.0]], [[1.0]]]),
)
"""A mixture of one variable, in numbers that floats hold."""


def normal(x, mean, variance):
    return mp.exp(-((x - mean) ** 2) / (2 * variance)) / mp.sqrt(2 * mp.pi * variance)


def density(p, x):
    w, mu, s = (list(map(mp.mpf, a.ravel().tolist())) for a in p)
    return mp.fsum(a * normal(x, b, c) for a, b, c in zip(w, mu, s, strict=True)) / mp.fsum(w)


def integral(f):
    return mp.quad(f, [-mp.inf, -6, -3, -2, -1, 0, 1, 2, 4, 6, 8, mp.inf])


def test_the_update_is_bayes_by_integration():
    """Prior times likelihood over its integral, at some points, with 50 digits."""
    z, h, r = 1.25, 0.5, 0.125

    def joint(x):
        return density(LINE, x) * normal(mp.mpf(z), h * x, r)

    evidence = integral(joint)
    posterior = gmm_posterior(*LINE, np.array([z]), np.array([[h]]), np.array([[r]]))
    points = np.array([[-2.0], [0.5], [2], [3.75]])
    found = gmm_log_density(*posterior, points)
    for x, got in zip(points[:, 0], found, strict=True):
        due = mp.log(joint(mp.mpf(x)) / evidence)
        # A logarithm is off by the errors of its terms, of a component as of all: squares over variances, of which each
        # factor has been rounded at most 16 times on the way. The inputs' squares over the least variances bound them.
        size = 10 + (abs(x) + 4) ** 2 / 0.1 + (abs(z) + 2) ** 2 / 0.125
        assert abs(got - due) <= 2 * 16 * EPS * size
    assert abs(math.fsum(posterior[0]) - 1) <= 3 * EPS


def informed(weights, means, covariances, z, H, R):
    """Return the posterior by precisions, with 50 digits: no gain and no covariance of z."""
    H, R, z = mp.matrix(H.tolist()), mp.matrix(R.tolist()), mp.matrix(z.tolist())
    told = H.T * mp.inverse(R)
    logs, found, spread = [], [], []
    for w, mu, sigma in zip(weights.tolist(), means.tolist(), covariances.tolist(), strict=True):
        mu, sigma = mp.matrix(mu), mp.matrix(sigma)
        before = mp.inverse(sigma)
        after = mp.inverse(before + told * H)
        mean = after * (before * mu + told * z)
        # the integral of exp of a quadratic form: what is left of both exponents, and a ratio of determinants
        left = (mean.T * mp.inverse(after) * mean - mu.T * before * mu)[0] / 2
        logs.append(mp.log(w) + left + mp.log(mp.det(after) / mp.det(sigma)) / 2)
        found.append(list(mean))
        spread.append(after.tolist())
    top = mp.fsum(mp.exp(x - max(logs)) for x in logs)
    return [mp.exp(x - max(logs)) / top for x in logs], found, spread


def off(found, due):
    return float(np.abs(np.vectorize(mp.mpf)(np.asarray(found, np.float64)) - np.array(due)).max())


def bound(mix, z, H, R, eps=EPS):
    """Return how much a few solutions of linear systems may lose: 64 roundings a number, times condition and size."""
    spread = H @ mix[2] @ H.T + R
    condition = max(np.linalg.cond(spread).max(), np.linalg.cond(mix[2]).max())
    size = 1 + np.abs(mix[1]).max() ** 2 + np.abs(z).max() ** 2 + np.abs(mix[2]).max()
    return 64 * eps * condition * size * (1 + np.abs(H).max() ** 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_the_one_by_precisions(kind):
    mix, (H, R) = [np.float32(x) for x in mixture(0, 4, 3)], [np.float32(x) for x in observation(1, 3, 2)]
    z = np.array([0.5, -1], np.float32)
    due = informed(*mix, z, H, R)
    eps = 2.0**-23
    for found, exact in zip(gmm_posterior(*map(kind, (*mix, z, H, R))), due, strict=True):
        assert type(found) is type(kind(z))
        assert off(found, exact) <= bound(mix, z, H, R, eps)


def test_one_at_a_time_is_all_at_once():
    mix, (H, R) = mixture(2, 3, 3), observation(3, 3, 2)
    z = np.random.default_rng(4).standard_normal((4, 2))
    stacked = np.tile(H, (4, 1)), np.kron(np.eye(4), R)
    due = informed(*mix, z.ravel(), *stacked)
    one = gmm_filter(*mix, z, H, R)
    at_once = gmm_posterior(*mix, z.ravel(), *stacked)
    back = gmm_filter(*mix, z[::-1], H, R)
    for found in (one, at_once, back):
        for a, exact in zip(found, due, strict=True):
            assert off(a, exact) <= 4 * bound(mix, z, *stacked)
    wrong = gmm_posterior(*mix, z[0], H, R)
    assert all(off(a, exact) > 1000 * 4 * bound(mix, z, *stacked) for a, exact in zip(wrong, due, strict=True))


def test_a_component_comes_back_after_its_weight_underflowed():
    mix = np.array([0.5, 0.5]), np.array([[0.0], [100]]), np.ones((2, 1, 1))
    H = R = np.ones((1, 1))
    gone = gmm_posterior(*mix, np.array([0.0]), H, R)
    assert gone[0].tolist() == [1, 0]
    back = gmm_filter(*mix, np.array([[0.0], [400]]), H, R)
    assert back[0].tolist() == [0, 1]  # exp(-2500 + 12500) to 1
    with pytest.raises(InvalidInput, match=re.escape("weights: one is not above 0; drop the component, or use gmm_f")):
        gmm_posterior(*gone, np.array([400.0]), H, R)


@pytest.mark.parametrize("kind", KINDS)
def test_another_order_of_components_changes_no_bit(kind):
    H, R = observation(6, 3, 2)
    z = np.random.default_rng(7).standard_normal((20, 2))
    for seed in range(20):
        mix = mixture(seed, 7, 3)
        mix = [np.float32(x) for x in mix]
        order = np.random.default_rng(seed).permutation(7)
        rest = [kind(np.float32(x)) for x in (z[seed], H, R)]
        found = gmm_posterior(*map(kind, mix), *rest)
        moved = gmm_posterior(*(kind(x[order]) for x in mix), *rest)
        for a, b in zip(found, moved, strict=True):
            assert (np.asarray(a)[order] == np.asarray(b)).all()
        x = kind(np.float32(np.ones((2, 3))))
        one, other = gmm_log_density(*found, x), gmm_log_density(*moved, x)
        assert (np.asarray(one) == np.asarray(other)).all()


def test_a_batch_is_one_after_another():
    mix, (H, R) = mixture(8, 3, 2, 4, 2), observation(9, 2, 1)
    z, x = np.random.default_rng(10).standard_normal((4, 2, 1)), np.random.default_rng(11).standard_normal((4, 2, 5, 2))
    found, at = gmm_posterior(*mix, z, H, R), gmm_log_density(*mix, x)
    for i in np.ndindex(4, 2):
        one = gmm_posterior(*(a[i] for a in mix), z[i], H, R)
        assert all((a[i] == b).all() for a, b in zip(found, one, strict=True))
        assert (at[i] == gmm_log_density(*(a[i] for a in mix), x[i])).all()


def test_weights_are_softmax_attention_with_a_bias():
    mix, (H, R) = mixture(12, 5, 3), observation(13, 3, 2)
    z = np.random.default_rng(14).standard_normal((6, 2))
    query, key, bias = posterior_as_attention(*mix, z, H, R)
    call = [x[None, None] for x in (query, key, np.eye(5))]
    found = refattn.softmax_attention(*call, scale=1.0, bias=bias[None, None, None])[0, 0]
    unbiased = refattn.softmax_attention(*call, scale=1.0)[0, 0]
    for row, plain, one in zip(found, unbiased, z, strict=True):
        due = informed(*mix, one, H, R)
        limit = bound(mix, one, H, R)
        assert off(row, due[0]) <= limit
        assert off(plain, due[0]) > 1000 * limit
    values = np.array(mix[1])
    means = refattn.softmax_attention(*call[:2], values[None, None], scale=1.0, bias=bias[None, None, None])[0, 0]
    assert off(means, found @ values) <= 8 * EPS * np.abs(values).max()


def test_density_and_loss():
    points = np.array([[-2.0], [0.5], [7]])
    found = gmm_log_density(*LINE, points)
    for x, got in zip(points[:, 0], found, strict=True):
        # squares over variances, logarithms and a few sums, each rounded a few times
        assert abs(got - mp.log(density(LINE, mp.mpf(x)))) <= 16 * EPS * (10 + (abs(x) + 4) ** 2 / 0.25)
    assert gmm_nll(*LINE, points) == -found.mean()
    many = mixture(15, 3, 2)
    due = [
        mp.log(
            mp.fsum(
                w
                * mp.exp(-((mp.matrix(list(m)).T * mp.inverse(mp.matrix(s.tolist())) * mp.matrix(list(m)))[0] / 2))
                / mp.sqrt(mp.det(2 * mp.pi * mp.matrix(s.tolist())))
                for w, m, s in zip(*many, strict=True)
            )
        )
    ]
    got = gmm_log_density(*many, np.zeros((1, 2)))
    assert off(got, due) <= bound(many, np.zeros(2), np.eye(2), np.eye(2))


def test_the_divergence_of_two_gaussians_has_a_closed_form():
    one, two = [np.array([1.0])] * 2
    for m, s, n, t in ((0, 1, 1, 2), (3, 0.25, -2, 1), (0, 1, 0.5, 1), (1, 1e-3, 0, 1)):
        p = (one, np.array([[m]], float), np.array([[[s * s]]], float))
        q = (two, np.array([[n]], float), np.array([[[t * t]]], float))
        due = mp.log(mp.mpf(t) / s) + (mp.mpf(s) ** 2 + (m - n) ** 2) / (2 * mp.mpf(t) ** 2) - 0.5
        # 776 points, each with a few roundings of exponents up to 12² / 2 and the other's square, p adding up to 1
        assert abs(gmm_kl(p, q) - due) <= 776 * EPS * (12**2 / 2 + 2 * due + 10 + abs(m) / s)
        assert gmm_kl(p, p) == 0


def test_the_divergence_of_mixtures_is_the_integral():
    p = LINE
    q = np.array([0.5, 0.5]), np.array([[0.0], [2]]), np.array([[[4.0]], [[1 / 1024]]])

    def integrand(x):
        a = density(p, x)
        return a * mp.log(a / density(q, x))

    marks = [2 + mp.mpf(i) / 32 for i in (-20, -12, -8, -4, -2, 0, 2, 4, 8, 12, 20)]
    due = mp.quad(integrand, [-30, -10, -5, -3, -2, -1, 0, 1, *marks, 3, 4, 6, 10, 40])
    assert abs(gmm_kl(p, q) - due) <= 1960 * EPS * (12**2 / 2 + 10 + 2 * due)
    both = tuple(np.stack([a, a]) for a in p), tuple(np.stack([a, a[::-1]]) for a in q)
    assert (gmm_kl(*both) == gmm_kl(p, q)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_a_mixture(kind):
    w, mu = np.array([0.5, 0.5], np.float32), np.array([[1, 2], [3, 4]], np.float32)
    s = np.array([[[4, 2], [2, 5]], [[1, 0], [0, 16]]], np.float32)
    tokens = gmm_tokens(*map(kind, (w, mu, s)))
    lower = np.array([[2, 2, 1], [1, 4, 0]], np.float32)  # diagonal, and what is below
    assert (np.asarray(tokens[:, :3]) == [[0, 1, 2], [0, 3, 4]]).all()
    # a logarithm in float32 is off by a unit of its last place at most
    assert (np.abs(np.asarray(tokens[:, 3:5], np.float64) - np.log(lower[:, :2])) <= 2.0**-22).all()
    assert (np.asarray(tokens[:, 5]) == lower[:, 2]).all()
    weights, means, covariances = (np.asarray(x) for x in gmm_from_tokens(tokens, 2))
    assert (weights == w).all()
    assert (means == mu).all()
    # factors of at most 4 come back off by a few units, and their products add up
    assert (np.abs(covariances - s) <= 16 * 2.0**-23 * 16).all()


@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_tokens_there_and_back(d):
    mix = mixture(16 + d, 5, d, 3)
    tokens = gmm_tokens(*mix)
    assert tokens.shape == (3, 5, 1 + 2 * d + d * (d - 1) // 2)
    back = gmm_from_tokens(tokens, d)
    # a logit of size x gives its weight back up to x roundings, and all are scaled to sum 1
    assert (np.abs(back[0] - mix[0]) <= 8 * EPS * (2 + np.abs(tokens[..., 0]).max()) * mix[0]).all()
    assert (back[1] == mix[1]).all()
    assert (np.abs(back[2] - mix[2]) <= 8 * d * EPS * np.trace(mix[2], axis1=-2, axis2=-1)[..., None, None]).all()


def test_tokens_of_a_network_make_a_mixture():
    tokens = np.array([[1000.0, 1, 0], [-1000, 2, 1], [0, 3, -1], [-1, 4, 0]])
    weights, means, covariances = gmm_from_tokens(tokens, 1)
    share = [1, mp.exp(-1000), mp.mpf(1) / 2, 1 / (1 + mp.e)]
    assert off(weights, [a / mp.fsum(share) for a in share]) <= 8 * EPS
    assert means[:, 0].tolist() == [1, 2, 3, 4]
    assert off(covariances[:, 0, 0], [1, mp.e**2, mp.e**-2, 1]) <= 4 * EPS * math.e**2
    soft = np.exp(tokens[2:, 0]) / np.exp(tokens[2:, 0]).sum()  # softmax of logits is no inverse
    assert np.abs(weights[2:] / weights[2:].sum() - soft).min() > 0.05


@pytest.mark.parametrize("loss", ["nll", "kl", "posterior"])
def test_gradients(loss):
    """Through tokens, so that covariances stay symmetric."""
    rng = np.random.default_rng(20)
    d = 1 if loss == "kl" else 2
    tokens = torch.tensor(rng.standard_normal((3, 1 + 2 * d + d * (d - 1) // 2)), requires_grad=True)
    x, H = torch.tensor(rng.standard_normal((4, d))), torch.tensor(rng.standard_normal((1, 2)))
    one = torch.ones(1, 1, dtype=torch.float64)

    def value(t):
        mix = gmm_from_tokens(t, d)
        if loss == "nll":
            return gmm_nll(*mix, x)
        if loss == "kl":
            return gmm_kl(mix, gmm_from_tokens(t.flip(0) * 0.5, d))
        return gmm_posterior(*mix, one[0], H, one)

    assert torch.autograd.gradcheck(value, tokens)


def test_errors():
    w, mu, s = mixture(21, 3, 2)
    H, R, z = np.ones((1, 2)), np.ones((1, 1)), np.ones(1)
    for call, said in (
        (lambda: gmm_posterior(w, mu, s, np.ones(2), H, R), "z: shape is (2,), expected (1)"),
        (lambda: gmm_posterior(w, mu[:2], s, z, H, R), "means: shape is (2, 2), expected (3, d)"),
        (lambda: gmm_posterior(w, mu, s[:, :1], z, H, R), "covariances: shape is (3, 1, 2), expected (3, 2, 2)"),
        (lambda: gmm_posterior(w, mu, s, z, H[:, :1], R), "H: shape is (1, 1), expected (m, 2)"),
        (lambda: gmm_posterior(w, mu, s, z, H, np.ones((2, 2))), "R: shape is (2, 2), expected (1, 1)"),
        (lambda: gmm_posterior(w, mu, s, z, H, -R), "R: a matrix is not positive definite; all of its eigenvalues"),
        (lambda: gmm_posterior(w, mu, -s, z, H, R), "covariances: a matrix is not positive definite"),
        (lambda: gmm_posterior(w, mu, np.triu(s), z, H, R), "covariances: a matrix is not symmetric to the last bit; "),
        (lambda: gmm_posterior(w - 1, mu, s, z, H, R), "weights: one is not above 0; drop the component"),
        (lambda: gmm_posterior(w, mu * np.nan, s, z, H, R), "means: holds NaN or infinity, expected finite numbers"),
        (lambda: gmm_posterior(w, mu, s, z.astype(int), H, R), "z: is of int64, expected floats, of one type for all"),
        (lambda: gmm_posterior(w, mu, np.float32(s), z, H, R), "covariances: is of float32, expected floats, of one"),
        (lambda: gmm_filter(w, mu, s, z, H, R), "z: shape is (1,), expected (n, 1)"),
        (lambda: posterior_as_attention(w, mu, s, z, H, R), "z: shape is (1,), expected (n, 1)"),
        (lambda: gmm_log_density(w, mu, s, z), "x: shape is (1,), expected (n, 2)"),
        (lambda: gmm_nll(w, mu, s, [1]), "x: got list, expected an array; use numpy.asarray(x)"),
        (lambda: gmm_kl((w, mu, s), (w, mu, s)), "p: means have shape (3, 2), expected ('k', 1)"),
        (lambda: gmm_tokens(w[:1] / w[:1], mu[:1], s[:1]), "weights: one is not below 1, where its logit is infinite"),
        (lambda: gmm_from_tokens(mu, 1), "tokens: shape is (3, 2), expected (k, 3)"),
        (lambda: gmm_from_tokens(mu, 0), "d: got 0, expected a whole number from 1 on"),
    ):
        with pytest.raises(InvalidInput, match=re.escape(said)):
            call()
    for kind in KINDS[1:]:
        with pytest.raises(InvalidInput, match=re.escape("covariances: a matrix is not positive definite")):
            gmm_log_density(*map(kind, map(np.float32, (w, mu, -s, mu))))
