"""Layers against loops and exact algebra, policies against closed forms, and how fast layers become LinUCB."""

import math
import re
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.functions.in_context import (
    arm_scores,
    in_context_ridge,
    inverse_root,
    linucb,
    relu_attention,
    ridge_layer,
    ridge_tokens,
    soft_linucb,
    thompson_scores,
)

KINDS = [np.asarray, torch.asarray, jnp.asarray]
EPS = 2.0**-52


def fractions(rng, *shape):
    return np.vectorize(Fraction)(rng.integers(-8, 9, shape)) / 8


@pytest.mark.parametrize("normalize", ["count", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_the_sum_over_earlier_tokens(kind, normalize):
    """In integers: sums are exact; a division and a residual round, and JAX divides by a rounded reciprocal."""
    rng = np.random.default_rng(0)
    h, q, k, v = (rng.integers(-3, 4, s).astype(np.float32) for s in ((6, 4), (2, 3, 4), (2, 3, 4), (2, 4, 4)))
    due = h.copy()
    for i in range(6):
        heads = range(2)
        terms = [max(q[m] @ h[i] @ (k[m] @ h[j]), 0) * (v[m] @ h[j]) for m in heads for j in range(i + 1)]
        due[i] = h[i] + np.sum(terms, 0, dtype=np.float32) / np.float32(i + 1 if normalize == "count" else 1)
    found = relu_attention(*map(kind, (h, q, k, v)), normalize=normalize)
    assert type(found) is type(kind(h))
    # two roundings there and three here, of numbers of at most this size
    assert (np.abs(np.asarray(found) - due) <= 5 * 2.0**-24 * (2 * np.abs(h) + np.abs(due))).all()


def solved(a, b):
    """Return the solution of a linear system in fractions, by elimination."""
    a = np.concatenate([a, b.reshape(len(a), -1)], 1)
    for i in range(len(a)):
        a[i] = a[i] / a[i, i]  # of positive definite matrices no pivot is 0
        for j in range(len(a)):
            if j != i:
                a[j] = a[j] - a[j, i] * a[i]
    return a[:, len(a) :].reshape(b.shape)


def test_a_layer_is_a_gradient_step_at_every_token():
    rng = np.random.default_rng(1)
    a, r, b = fractions(rng, 5, 3), fractions(rng, 5), fractions(rng, 2, 3)
    step, weight = Fraction(1, 10), Fraction(3)
    tokens = ridge_tokens(a, r, b)
    tokens[:, :3] = fractions(rng, 8, 3)
    found = ridge_layer(tokens, step=step, weight=weight)(tokens)
    for i in range(8):
        seen = min(i, 5)
        aim = a[:seen].T @ r[:seen] if i <= 5 else b[i - 6]
        w = tokens[i, :3]
        assert (found[i, :3] == w - step * (a[:seen].T @ (a[:seen] @ w) + weight * w - aim)).all()
    assert (found[:, 3:] == tokens[:, 3:]).all()


def test_one_head_or_division_by_the_count_is_no_gradient_step():
    """A residual of -1 at the second of two actions: the head of positive ones misses it, division halves it."""
    tokens = ridge_tokens(np.array([[0.0], [1.0]]), np.array([0.0, 1.0]), np.zeros((0, 1)))
    assert ridge_layer(tokens, step=1.0, weight=1.0)(tokens)[-1, 0] == 1
    query, key, value = np.zeros((2, 2, 5)), np.zeros((2, 2, 5)), np.zeros((2, 5, 5))
    for m, s in enumerate((1, -1)):
        query[m, :, :2], key[m, :, 2:4], value[m, 0, 2] = np.diag([s, -s]), np.eye(2), -s
    assert relu_attention(tokens, query, key, value, normalize="none")[-1, 0] == 1
    assert relu_attention(tokens, query[:1], key[:1], value[:1], normalize="none")[-1, 0] == 0
    assert relu_attention(tokens, query, key, value, normalize="count")[-1, 0] == 1 / 3


@pytest.mark.parametrize("depth", [0, 1, 2, 6])
def test_the_error_of_a_depth_is_its_closed_form(depth):
    """After L layers ``V^-1 b - w = (I - step V)^L V^-1 b``, in fractions, for every prefix and target."""
    rng = np.random.default_rng(2)
    a, r, b = fractions(rng, 4, 2), fractions(rng, 4), fractions(rng, 2, 2)
    step, weight = Fraction(1, 4), Fraction(1)
    tokens = ridge_tokens(a, r, b)
    layer = ridge_layer(tokens, step=step, weight=weight)
    for _ in range(depth):
        tokens = layer(tokens)
    eye = np.vectorize(Fraction)(np.eye(2, dtype=int))
    for i in range(7):
        seen = min(i, 4)
        v = a[:seen].T @ a[:seen] + weight * eye
        left = exact = solved(v, a[:seen].T @ r[:seen] if i <= 4 else b[i - 5])
        for _ in range(depth):
            left = left - step * (v @ left)
        assert (exact - tokens[i, :2] == left).all()


@pytest.mark.parametrize("depth", [1, 10, 40])
def test_the_default_step_has_the_rate_of_kappa(depth):
    rng = np.random.default_rng(3)
    a, r, b = rng.standard_normal((20, 3)) / 3, rng.standard_normal(20), rng.standard_normal((2, 3))
    estimates, targets = in_context_ridge(a, r, b, depth=depth, weight=0.5)
    largest = np.linalg.eigvalsh(a.T @ a + 0.5 * np.eye(3))[-1]
    rate, step = (largest - 0.5) / (largest + 0.5), 2 / (0.5 + largest)
    for i, w in enumerate([*estimates, *targets]):
        seen = a[: min(i, 20)]
        v = seen.T @ seen + 0.5 * np.eye(3)
        exact = np.linalg.solve(v, seen.T @ r[: len(seen)] if i <= 20 else b[i - 21])
        # a layer adds at most 20 + 3 + 8 roundings of terms whose sizes this sums
        size = np.linalg.norm(exact) + step * (np.abs(seen).sum() ** 2 * 9 + np.abs(a.T).sum() * np.abs(r).max())
        assert np.linalg.norm(w - exact) <= rate**depth * np.linalg.norm(exact) + depth * 31 * EPS * size


@pytest.mark.parametrize("kind", KINDS)
def test_solved_scores_where_v_is_a_diagonal_of_powers_of_two(kind):
    """V = diag(2, 4, 8) after 1, 3 and 7 unit actions: no float rounds but in the root."""
    actions = np.repeat(np.eye(3, dtype=np.float32), (1, 3, 7), axis=0)
    rewards = np.arange(11, dtype=np.float32)
    arms = np.array([[1, 0, 0], [0, 2, 4], [1, 1, 1]], np.float32)
    mean, uncertainty = arm_scores(*map(kind, (actions, rewards, arms)))
    sums = np.array([0, 6, 49], np.float32)
    assert (np.asarray(mean) == arms @ (sums / [2, 4, 8])).all()
    assert (np.asarray(uncertainty) == np.sqrt(np.array([1 / 2, 3, 7 / 8], np.float32))).all()
    few = arm_scores(*map(kind, (actions, rewards, arms)), depth=1, step=0.125)
    assert (np.asarray(few[0]) == arms @ (sums / 8)).all()
    assert (np.asarray(few[1]) == np.sqrt((arms**2).sum(1) / 8)).all()
    none = arm_scores(*map(kind, (actions[:0], rewards[:0], arms)), weight=4)
    assert (np.asarray(none[0]) == 0).all()
    assert (np.asarray(none[1]) == np.sqrt((arms**2).sum(1)) / 2).all()


def test_a_square_below_zero_counts_as_none():
    """A step of 1 where V is 1 + 16: w goes from 0 to a to -15 a."""
    _, uncertainty = arm_scores(np.array([[4.0]]), np.zeros(1), np.array([[1.0]]), depth=2, step=1.0)
    assert uncertainty[0] == 0


def game(rounds, seed):
    """Yield LinUCB's histories and the arms of each round."""
    rng = np.random.default_rng(seed)
    theta = np.ones(3) / math.sqrt(3)
    actions, rewards = np.zeros((0, 3)), np.zeros(0)
    for _ in range(rounds):
        arms = rng.standard_normal((10, 3))
        arms /= np.linalg.norm(arms, axis=1, keepdims=True)
        yield actions, rewards, arms
        a = arms[linucb(*arm_scores(actions, rewards, arms), 1.0)]
        actions = np.concatenate([actions, a[None]])
        rewards = np.append(rewards, a @ theta + 0.1 * rng.choice((-1, 1)))


def test_more_layers_act_as_linucb():
    """Where scores are off by less than half of the best two's distance the action must be the same."""
    alike, sure = dict.fromkeys((1, 4, 16, 64, 256), 0), dict.fromkeys((1, 4, 16, 64, 256), 0)
    for actions, rewards, arms in game(60, 0):
        mean, uncertainty = arm_scores(actions, rewards, arms)
        best = linucb(mean, uncertainty, 1.0)
        second, first = np.sort(mean + uncertainty)[-2:]
        v = actions.T @ actions + np.eye(3)
        largest = np.linalg.eigvalsh(v)[-1]
        theta, solution = np.linalg.solve(v, actions.T @ rewards), np.linalg.solve(v, arms.T)
        for depth in alike:
            left = ((largest - 1) / (largest + 1)) ** depth
            # |x - y| <= |x² - y²| / x for roots, arms have norm 1
            off = left * (np.linalg.norm(theta) + (np.linalg.norm(solution, axis=0) / uncertainty).max())
            same = best == linucb(*arm_scores(actions, rewards, arms, depth=depth), 1.0)
            alike[depth] += same
            sure[depth] += 2 * off < first - second
            assert same or 2 * off >= first - second
    assert alike[256] == 60 > max(alike[1], alike[4])
    assert sure[256] > 50


def test_more_layers_act_as_thompson_sampling():
    """Of the same draw: the root leaves what its residual is, e to (3 e² + e³)/4, and the mean as above."""
    depths, rng = (1, 4, 16, 64, 256), np.random.default_rng(4)
    alike, sure = dict.fromkeys(depths, 0), dict.fromkeys(depths, 0)
    for actions, rewards, arms in game(40, 1):
        noise = rng.standard_normal(3)
        scores = thompson_scores(actions, rewards, arms, noise, variance=0.25)
        second, first = np.sort(scores)[-2:]
        v = actions.T @ actions + np.eye(3)
        values = np.linalg.eigvalsh(v)
        theta, residual = np.linalg.solve(v, actions.T @ rewards), 1 - values[0] / values.sum()
        for depth in depths:
            left, e = ((values[-1] - 1) / (values[-1] + 1)) ** depth, residual
            for _ in range(depth):
                e = (3 * e**2 + e**3) / 4
            off = left * np.linalg.norm(theta) + 0.5 * e * np.linalg.norm(noise) / np.sqrt(values[0])
            found = thompson_scores(actions, rewards, arms, noise, variance=0.25, depth=depth)
            same = scores.argmax() == found.argmax()
            alike[depth] += same
            sure[depth] += 2 * off < first - second
            assert same or 2 * off >= first - second
            assert abs(found - scores).max() <= off + 2.0**-40
    assert alike[256] == 40 > alike[1]
    assert sure[256] > 35


@pytest.mark.parametrize("kind", KINDS)
def test_policies(kind):
    mean, uncertainty = kind(np.array([1.0, 0, 2, 0.5], np.float32)), kind(np.array([0.5, 1.5, 0, 1], np.float32))
    assert linucb(mean, uncertainty, 0) == 2
    assert linucb(mean, uncertainty, 2) == 1
    assert linucb(mean, uncertainty, 1) == 2
    assert linucb(0 * mean, 0 * mean, 1) == 0  # the first of equals
    p = soft_linucb(mean, uncertainty, 2.0, 0.5)
    x = np.array([2, 3, 2, 2.5]) / 0.5 - 6
    exact = [math.exp(a) / math.fsum(map(math.exp, x)) for a in x]
    # an exponential of an exact number, a sum of four, a division: each a few units of float32's last place
    assert (np.abs(np.asarray(p, np.float64) - exact) <= 10 * 2.0**-23 * np.array(exact)).all()
    assert np.asarray(soft_linucb(mean, uncertainty, 2.0, 1e-3)).tolist() == [0, 1, 0, 0]  # exp(-500)


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_rounds_of_the_root_are_the_recurrence(rounds):
    """A trace of 4 has the root 2, and a few rounds of small dyadic numbers fit into floats."""
    a = np.array([[2, 0.5], [0.5, 2]])
    y, z = np.vectorize(Fraction)(a) / 4, np.vectorize(Fraction)(np.eye(2))
    for _ in range(rounds):
        t = (3 * np.eye(2, dtype=int) - z @ y) / 2
        y, z = y @ t, t @ z
    assert (inverse_root(a, rounds) == z / 2).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_root_converges(kind):
    """Of ``c = trace`` a residual e = 1 - smallest / c goes to (3 e² + e³)/4; the root's error is e times the root."""
    u = np.array([[0.6, -0.8], [0.8, 0.6]])
    a = (u * [1, 9]) @ u.T
    found = np.asarray(inverse_root(kind(a.astype(np.float32)), 10), np.float64)
    e = 1 - 1 / 10
    for _ in range(10):
        e = (3 * e**2 + e**3) / 4
    # ten rounds of six products of two terms, and an input, rounded; condition 9
    assert np.linalg.norm(found - (u / [1, 3]) @ u.T, 2) <= e + 10 * 6 * 4 * 9 * 2.0**-24
    assert e < 2.0**-24


def test_thompson_draws_have_the_posterior_covariance():
    """V = diag(4, 16): scores move with noise by root variance · aᵀ V^-1/2, exactly."""
    actions, rewards = np.repeat(np.eye(2), (3, 15), axis=0), np.ones(18)
    arms = np.array([[1.0, 0], [2, 4], [-1, 8]])
    mean, _ = arm_scores(actions, rewards, arms)
    assert (thompson_scores(actions, rewards, arms, np.zeros(2)) == mean).all()
    moved = [thompson_scores(actions, 0 * rewards, arms, one, variance=4.0) for one in np.eye(2)]
    assert (np.stack(moved, 1) == 2 * arms / [2, 4]).all()
    layers = thompson_scores(actions, 0 * rewards, arms, np.ones(2), depth=12)
    # residual (3e² + e³)/4 from e = 1 - 4/20 is below 1e-16 after 12 rounds; 12 · 6 products of two terms round
    assert np.abs(layers - (arms / [2, 4]).sum(1)).max() <= 12 * 6 * 4 * EPS * np.abs(arms).sum(1).max()


def test_errors():
    a, r, arms = np.ones((4, 2)), np.ones(4), np.ones((3, 2))
    for call, said in (
        (lambda: arm_scores(a, r[:3], arms), "rewards: shape is (3,), expected (4)"),
        (lambda: arm_scores(a[:, :1], r, arms), "actions: shape is (4, 1), expected (T, 2)"),
        (lambda: arm_scores(a, r, arms[0]), "arms: shape is (2,), expected (K, d)"),
        (lambda: arm_scores(a, r, arms, depth=-1), "depth: got -1, expected a whole number from 0 on"),
        (lambda: arm_scores(a, r, arms, weight=0), "weight: got 0, expected a number in (0, inf)"),
        (lambda: arm_scores(a, r, arms, depth=1, weight=0), "weight: got 0, expected a number in (0, inf)"),
        (lambda: arm_scores(a, r, arms, depth=1, step=-1.0), "step: got -1.0, expected a number in (0, inf)"),
        (lambda: linucb(r, r[:2], 1), "uncertainty: shape is (2,), expected (4)"),
        (lambda: linucb(r, r, -1), "width: got -1, expected a number in [0, inf)"),
        (lambda: soft_linucb(r, r, 1, 0), "temperature: got 0, expected a number in (0, inf)"),
        (lambda: inverse_root(a, 3), "matrix: shape is (4, 2), expected (d, 4)"),
        (lambda: inverse_root(a[:2], -3), "rounds: got -3, expected a whole number from 0 on"),
        (lambda: thompson_scores(a, r, arms, r), "noise: shape is (4,), expected (2)"),
        (lambda: thompson_scores(a, r, arms, r[:2], variance=0), "variance: got 0, expected a number in (0, inf)"),
        (lambda: ridge_layer(a, step=1), "tokens: have 2 entries, expected 3 d + 2; use ridge_tokens"),
        (lambda: ridge_layer(np.ones((1, 7)), step=1), "tokens: have 7 entries, expected 3 d + 2; use ridge_tokens"),
    ):
        with pytest.raises(InvalidInput, match=re.escape(said)):
            call()
    h, q, v = np.ones((3, 2)), np.ones((1, 1, 2)), np.ones((1, 2, 2))
    with pytest.raises(InvalidInput, match=re.escape("normalize: got 'sum', expected 'count' or 'none'")):
        relu_attention(h, q, q, v, normalize="sum")
    with pytest.raises(InvalidInput, match=re.escape("key: shape is (1, 2, 2), expected (1, 1, 2)")):
        relu_attention(h, q, v, v)
