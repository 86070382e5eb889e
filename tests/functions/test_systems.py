"""Recurrences equal masked matrices, in fractions; gates and Taylor's features against 40 digits."""

import itertools
import math
import re
from fractions import Fraction

import flint
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.functions.systems import (
    Recurrence,
    attention_normaliser,
    gated_recurrence,
    linear_recurrence,
    normalised_recurrence,
    recurrence_matrix,
    run_recurrence,
    selective_recurrence,
    taylor_features,
)
from refattn.theory.fields import balls, precise, rational
from refattn.theory.systems import softmax, taylor_bound
from tests.functions.rounding import unit


def fractions(seed, *shape, least=-9, over=5):
    """Return random fractions, none of them 0."""
    drawn = np.random.default_rng(seed).integers(least, 9, shape)
    return np.frompyfunc(lambda a: Fraction(int(a) or 1, over), 1, 1)(drawn)


def test_linear_attention_is_the_masked_matrix():
    q, k, v = (fractions(seed, 7, 3) for seed in range(3))
    system = linear_recurrence(q, k)
    masked = np.tril(q @ k.T)
    out, state = run_recurrence(system, v)
    assert (out == masked @ v).all()
    assert (recurrence_matrix(system) == masked).all()
    assert (state == k.T @ v).all()


def test_any_system_is_its_matrix():
    """Decays for each state and feature; the matrix by the definition's product, one element at a time."""
    decay, write, read, v = (fractions(seed, *shape) for seed, shape in enumerate([(6, 3, 2)] * 3 + [(6, 2)]))
    system = Recurrence(decay, write, read)
    out, _ = run_recurrence(system, v)
    found = recurrence_matrix(system)
    assert found.shape == (2, 6, 6)
    for c in range(2):
        for t in range(6):
            for j in range(6):
                due = sum(
                    read[t, s, c] * math.prod(decay[j + 1 : t + 1, s, c], start=Fraction(1)) * write[j, s, c]
                    for s in range(3)
                )
                assert found[c, t, j] == (due if j <= t else 0)
        assert (out[:, c] == found[c] @ v[:, c]).all()


def test_in_a_prime_field():
    """Modulo 2^61 - 1, where nothing is rounded and any mistake shows."""
    prime = 2**61 - 1
    rng = np.random.default_rng(0)
    field = np.frompyfunc(lambda a: flint.nmod(int(a), prime), 1, 1)
    a, k, q, v = (field(rng.integers(1, 2**60, shape)) for shape in ((9, 1, 1), (9, 3, 1), (9, 3, 1), (9, 2)))
    system = Recurrence(a, k, q)
    out, _ = run_recurrence(system, v)
    gates = [[math.prod(a[j + 1 : t + 1, 0, 0], start=field(1)) for j in range(t + 1)] for t in range(9)]
    for t in range(9):
        due = sum(gates[t][j] * (q[t, :, 0] @ k[j, :, 0]) * v[j] for j in range(t + 1))
        assert (out[t] == due).all()


def test_a_state_goes_on():
    decay, write, read, v = (fractions(seed, *shape) for seed, shape in enumerate([(6, 3, 1)] * 3 + [(6, 2)]))
    whole, last = run_recurrence(Recurrence(decay, write, read), v)
    first, state = run_recurrence(Recurrence(decay[:4], write[:4], read[:4]), v[:4])
    second, state = run_recurrence(Recurrence(decay[4:], write[4:], read[4:]), v[4:], state)
    assert (np.concatenate([first, second]) == whole).all()
    assert (state == last).all()


def test_normalised_attention_divides_nowhere_after_the_state():
    q, k = (fractions(seed, 6, 3, least=1) for seed in range(2))
    v = fractions(2, 6, 2)
    eta = attention_normaliser(q, k)
    p = np.tril(q @ k.T)
    assert (eta == p.sum(1)).all()
    system = normalised_recurrence(q, k, eta=eta)
    out, state = run_recurrence(system, v)
    assert (out == (p @ v) / eta[:, None]).all()
    assert (recurrence_matrix(system).sum(-1) == 1).all()
    assert (state == k.T @ v / eta[-1]).all()
    # not scaled by eta_{t-1}/eta_t it is another operator
    other, _ = run_recurrence(Recurrence(0 * system.decay + 1, system.write, system.read), v)
    assert (other[1:] != out[1:]).any()


def test_keys_times_eta_are_gated_attention():
    """SSD: decay eta_{t-1}/eta_t, and keys as they are."""
    q, k, gates = fractions(0, 6, 3), fractions(1, 6, 3), fractions(2, 6, least=1)
    v = fractions(3, 6, 2)
    eta = np.array([Fraction(1) / math.prod(gates[: t + 1]) for t in range(6)])
    found, _ = run_recurrence(normalised_recurrence(q, eta[:, None] * k, eta=eta), v)
    due, _ = run_recurrence(Recurrence(gates[:, None, None], k[..., None], q[..., None]), v)
    assert (found == due).all()


def test_logarithms_of_eta_do_not_overflow():
    """Eta beyond float64's range, e^(400 t): decays of e^-400 are; with eta as it is, they are not numbers."""
    q = k = np.ones((4, 1))
    log_eta = 400.0 * np.arange(4)
    system = normalised_recurrence(q, k, log_eta=log_eta)
    assert (system.decay[1:] == np.exp(-400.0)).all()
    with np.errstate(all="ignore"):
        eta = np.exp(log_eta)
        assert np.isnan(normalised_recurrence(q, k, eta=eta).decay).any()
    small = np.array([0.5, -1.0, 2.0, 0.25])
    two = [normalised_recurrence(q, k, **x) for x in ({"log_eta": small}, {"eta": np.exp(small)})]
    # exponentials of differences below 3, and quotients of two: a few roundings of each
    assert abs(two[0].decay - two[1].decay).max() <= 8 * unit("float64") * np.exp(3)
    assert abs(two[0].write - two[1].write).max() <= 8 * unit("float64") * np.exp(3)


@pytest.mark.parametrize("kind", ["numpy", "torch", "jax"])
def test_selective_systems_are_their_formula(kind):
    dtype = "float32" if kind == "jax" else "float64"
    make = {"numpy": np.asarray, "torch": torch.asarray, "jax": jnp.asarray}[kind]
    rng = np.random.default_rng(4)
    step, rate = rng.random((5, 2)).astype(dtype), rng.random((3, 2)).astype(dtype)
    write, read, v = (rng.standard_normal(shape).astype(dtype) for shape in ((5, 3), (5, 3), (5, 2)))
    out, _ = run_recurrence(selective_recurrence(*map(make, (step, rate, write, read))), make(v))
    assert type(out) is type(make(v))
    with mpmath.workdps(40):
        for c in range(2):
            for t in range(5):
                due, size = mpmath.mpf(0), mpmath.mpf(0)
                for j in range(t + 1):
                    away = [sum(mpmath.mpf(float(x)) for x in step[j + 1 : t + 1, c]) * float(r) for r in rate[:, c]]
                    parts = [
                        mpmath.mpf(float(read[t, s])) * mpmath.exp(-away[s]) * float(write[j, s]) * float(step[j, c])
                        for s in range(3)
                    ]
                    due += sum(parts) * float(v[j, c])
                    size += sum(map(abs, parts)) * abs(float(v[j, c]))
                # each term: up to 5 decays of 4 roundings (exponents below 1), 4 products, sums of 5 and of 3
                assert abs(float(out[t, c]) - due) <= 40 * unit(dtype) * size


def test_steps_for_all_features_are_one_matrix():
    """SSD: one step and one rate; the matrix is one for all features, and eta's."""
    rng = np.random.default_rng(5)
    step, write, read = rng.random((4, 1)), rng.random((4, 3)), rng.random((4, 3))
    found = recurrence_matrix(selective_recurrence(step, np.array([[0.5]]), write, read))
    assert found.shape == (1, 4, 4)
    passed = np.cumsum(step[:, 0]) * 0.5
    due = np.tril(read @ (write * step).T * np.exp(passed[None, :] - passed[:, None]))
    assert (abs(found[0] - due) <= 40 * unit("float64") * due).all()  # all terms are positive; roundings as above


def exact_gate(x, power=1):
    """Return sigmoid(x)^power with 40 digits."""
    return (1 / (1 + mpmath.exp(-mpmath.mpf(x)))) ** mpmath.mpf(power)


def test_gates_are_sigmoids_and_powers_of_them():
    x = np.array([[-700.0, -30.0, -1.0], [0.0, 5.0, 700.0]])
    power = np.array([1.7, -1.0, 0.25])
    plain, reverse = gated_recurrence(x, x, x), gated_recurrence(x, x, x, power=power)
    with mpmath.workdps(40):
        for t in range(2):
            for c in range(3):
                a = max(power[c], 0)
                # the logarithm is off by a few of its roundings: a share |log| u of the gate
                for found, due in (
                    (plain.decay, exact_gate(x[t, c])), (plain.write, exact_gate(x[t, c])),
                    (plain.read, exact_gate(x[t, c])), (reverse.decay, exact_gate(-x[t, c], a)),
                    (reverse.decay, mpmath.exp(-mpmath.mpf(a) * mpmath.log1p(mpmath.exp(mpmath.mpf(x[t, c]))))),
                ):  # fmt: skip
                    assert abs(float(found[t, 0, c]) - due) <= 4 * (2 + abs(mpmath.log(due))) * unit("float64") * due


def test_a_gated_network_is_a_loop():
    rng = np.random.default_rng(6)
    f, i, o, v = (torch.asarray(rng.standard_normal((5, 3))) for _ in range(4))
    out, last = run_recurrence(gated_recurrence(f, i, o), v)
    h = torch.zeros(3, dtype=torch.float64)
    most = float(abs(v).sum(0).max())
    for t in range(5):
        h = torch.sigmoid(f[t]) * h + torch.sigmoid(i[t]) * v[t]
        # gates of at most 1 and off by 8 roundings or fewer, for 5 steps
        assert float(abs(torch.sigmoid(o[t]) * h - out[t]).max()) <= 100 * unit("float64") * most
    assert float(abs(last[0] - h).max()) <= 100 * unit("float64") * most


@pytest.mark.parametrize(("d", "degree"), [(1, 5), (3, 0), (3, 4), (2, 6)])
def test_taylor_features_give_the_polynomial(d, degree):
    q, k = fractions(7, 5, d), fractions(8, 4, d)
    found = taylor_features(q, degree, coefficients=True) @ taylor_features(k, degree).T
    s = q @ k.T
    assert (found == sum(s**r * Fraction(1, math.factorial(r)) for r in range(degree + 1))).all()
    assert taylor_features(k, degree).shape[-1] == math.comb(d + degree, degree)


@precise()
def test_growing_states_come_to_softmax():
    """Causal softmax: within theory's bound, and nearer for each degree."""
    rng = np.random.default_rng(9)
    q, k, v = (rational(rng.integers(-8, 9, (8, 3)) / 16) for _ in range(3))
    exact = softmax(q, k, v, causal=True)
    errors = []
    for degree in (2, 4, 6, 8):
        a, b = taylor_features(q, degree, coefficients=True), taylor_features(k, degree)
        out, _ = run_recurrence(normalised_recurrence(a, b, eta=attention_normaliser(a, b)), v)
        error = abs(balls(out) - exact)
        assert all(x.contains(0) for x in error[0]), "one key has all of the weight, whatever the polynomial"
        assert (error[1:] <= taylor_bound(q, k, v, degree, causal=True)[1:]).all()
        errors.append(float(error.max()))
    assert all(a > b for a, b in itertools.pairwise(errors))


def test_heads_and_batches():
    rng = np.random.default_rng(10)
    q, k, v = (rng.integers(-8, 9, (2, 3, 5, 4)).astype(float) for _ in range(3))
    system = normalised_recurrence(abs(q) + 1, abs(k) + 1, eta=2.0 ** rng.integers(-3, 4, (2, 3, 5)))
    out, _ = run_recurrence(system, v)
    matrix = recurrence_matrix(system)
    assert matrix.shape == (2, 3, 1, 5, 5)
    assert (out == (matrix[:, :, 0] @ v)).all()  # whole numbers over powers of two


def test_gradient_passes():
    x, v = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda g: run_recurrence(gated_recurrence(g, g, g), v), x)


X = np.ones((4, 3))


@pytest.mark.parametrize(
    ("do", "text"),
    [
        (lambda: linear_recurrence(X, X[:, :2]), "key: shape is (4, 2), expected (..., n, features), each at least 1"),
        (lambda: normalised_recurrence(X, X), "eta: got none of eta and log_eta, expected one of them"),
        (
            lambda: normalised_recurrence(X, X, eta=X, log_eta=X),
            "eta: got both of eta and log_eta, expected one of them",
        ),
        (lambda: normalised_recurrence(X, X, log_eta=X), "log_eta: shape is (4, 3), expected (4,), one for each token"),
        (lambda: selective_recurrence(X[:3], X, X, X), "step: shape is (3, 3), expected (4, features)"),
        (lambda: selective_recurrence(X, X, X, X), "rate: shape is (4, 3), expected (3 or 1, 3 or 1)"),
        (lambda: gated_recurrence(X, X, X, power=X), "power: shape is (4, 3), expected (3,), forget's features"),
        (lambda: Recurrence(X, X, X), "decay: shape is (4, 3), expected (..., n, states, features)"),
        (
            lambda: Recurrence(X[:3, :, None], X[..., None], X[..., None]),
            "decay: shape is (3, 3, 1), expected (..., n,",
        ),
        (lambda: run_recurrence(linear_recurrence(X, X), X[:3]), "value: shape is (3, 3), expected (..., 4, features)"),
        (
            lambda: run_recurrence(linear_recurrence(X, X), X, X[:3] * np.nan),
            "state: holds NaN, expected numbers; mend what made them",
        ),
        (
            lambda: selective_recurrence(X - 1.5, X[:3, :1], X, X),
            "step: holds a number below 0, expected numbers of at least 0",
        ),
        (
            lambda: selective_recurrence(X * np.nan, X[:3, :1], X, X),
            "step: holds NaN, expected numbers of at least 0; mend what made them",
        ),
        (
            lambda: selective_recurrence(X, -X[:3, :1], X, X),
            "rate: holds a number below 0, expected numbers of at least 0",
        ),
        (lambda: taylor_features(X, -1), "degree: got -1, expected a whole number from 0 on"),
        (lambda: linear_recurrence(X, torch.ones(4, 3)), "key: is an array of torch, expected numpy's, as query is"),
    ],
)
def test_errors_name_the_argument(do, text):
    with pytest.raises(InvalidInput, match=re.escape(text)):
        do()


@pytest.mark.parametrize("make", [torch.asarray, jnp.asarray])
def test_a_state_of_other_libraries_that_is_no_number_is_refused(make):
    x = make(X)
    with pytest.raises(InvalidInput, match="state: holds NaN"):
        run_recurrence(linear_recurrence(x, x), x, make(np.where(np.eye(3) > 0, np.nan, 0.0)))


def test_steps_of_zero_and_infinite_states_are_taken():
    """Zero is at least 0; a state of infinity is one that a caller may mean."""
    system = selective_recurrence(0 * X, 0 * X[:3, :1], X, X)
    assert (system.decay == 1).all()
    assert np.isinf(run_recurrence(system, X, X[:3] * np.inf)[0]).all()


def test_numbers_are_not_asked_for_where_there_are_none_yet():
    """While JAX or PyTorch trace, nothing is checked, and the answer is the same."""

    def run(step, state):
        x = 1.0 + 0 * step
        return run_recurrence(selective_recurrence(step, x[:3, :1], x, x), x, state)[0]

    import jax

    one, start = jnp.ones((4, 3), "float32"), jnp.ones((3, 3), "float32")
    assert jax.jit(run)(one, start).shape == (4, 3)
    found = torch.func.vmap(run)(torch.ones(2, 4, 3), torch.ones(2, 3, 3))
    assert (found[1] == run(torch.ones(4, 3), torch.ones(3, 3))).all()
