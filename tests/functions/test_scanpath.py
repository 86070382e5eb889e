"""Encodings of position against mpmath and the sinusoid, tokens and pointer against loops, decoding by enumeration."""

import itertools
import math
import re

import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.arrays import kind_of
from refattn.functions.scanpath import (
    decode_scanpath,
    fit_similarity_encoding,
    gaussian_similarity_encoding,
    object_tokens,
    pointer_logits,
    similarity_loss,
    step_mask,
)

KINDS = {"numpy": np.asarray, "torch": torch.asarray, "jax": jnp.asarray}
U = 2.0**-53


def sinusoid(n, width):
    at = np.arange(n)[:, None] * np.exp(-np.arange(0, width, 2) * math.log(10000) / width)
    rows = np.stack([np.sin(at), np.cos(at)], 2).reshape(n, -1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def roundings(i, k, h):
    """Return how many u the relative error of entry (i, k) may be, to first order; exp and expm1 within 4 ulp, 8 u.

    The first factor: 3 roundings of the argument, 1.5·(i-k)**2·h, and 8. The binomial: i steps, each a sum, a product
    and p**k with an error of 3kh + 8, of which kh counts by its share in the sum only, kh/(exp(kh) - 1) <= 1: 13 a
    step. The root: k factors of 3 + 8 and a product each, halved: 6k, and 1. Two products.
    """
    return 1.5 * (i - k) ** 2 * h + 13 * i + 6 * k + 11


@pytest.mark.parametrize(("n", "sigma"), [(1, 2.0), (14, 0.5), (14, 2.0), (14, 8.0), (20, 3.0)])
def test_encoding_is_the_cholesky_factor_number_by_number(n, sigma):
    got = gaussian_similarity_encoding(n, sigma)
    with mpmath.workdps(80):  # the condition is below 1e40 here
        h = 1 / mpmath.mpf(sigma) ** 2
        cosines = mpmath.matrix(n, n)
        for i, j in itertools.product(range(n), repeat=2):
            cosines[i, j] = mpmath.exp(-((i - j) ** 2) * h / 2)
        factor = mpmath.cholesky(cosines)
        for i, k in itertools.product(range(n), repeat=2):
            bound = roundings(i, k, float(h)) * U * factor[i, k]
            assert abs(mpmath.mpf(float(got[i, k])) - factor[i, k]) <= bound


@pytest.mark.parametrize("sigma", [0.5, 2.0, 8.0])
def test_every_cosine_has_a_small_relative_error(sigma):
    """All numbers are positive: an inner product's relative error is at most the sum of its factors'."""
    got = gaussian_similarity_encoding(14, sigma)
    with mpmath.workdps(50):
        for i, j in itertools.product(range(14), repeat=2):
            exact = mpmath.exp(-(mpmath.mpf(i - j) ** 2) / (2 * mpmath.mpf(sigma) ** 2))
            dot = mpmath.fsum(mpmath.mpf(float(a)) * mpmath.mpf(float(b)) for a, b in zip(got[i], got[j], strict=True))
            h = sigma**-2
            most = max(roundings(i, k, h) + roundings(j, k, h) for k in range(min(i, j) + 1))
            assert abs(dot - exact) <= 1.01 * most * U * exact


def test_a_numerical_factorisation_is_worse_or_fails():
    """The control: at 14 rows the condition is 2.6e6 for sigma = 2, and beyond 1/u for sigma = 8."""
    at = np.arange(14)[:, None] - np.arange(14)
    cosines = np.exp(-(at**2) / 8)
    assert 2.5e6 < np.linalg.cond(cosines) < 2.7e6
    factor, got = np.linalg.cholesky(cosines), gaussian_similarity_encoding(14)
    assert abs(factor - got).max() > 1000 * U
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(np.exp(-(at**2) / 128))


def test_the_sinusoid_does_not_have_these_cosines():
    """The control: .97 to the neighbour and .66 to the furthest, where .88 and 7e-10 are wanted."""
    rows, got = sinusoid(14, 86), gaussian_similarity_encoding(14, width=86)
    assert got.shape == (14, 86)
    assert (got[:, 14:] == 0).all()
    assert round(rows[0] @ rows[1], 2) == 0.97
    assert round(rows[0] @ rows[13], 2) == 0.66
    assert round(got[0] @ got[1], 2) == 0.88
    assert got[0] @ got[13] < 1e-9
    loss = [float(similarity_loss(torch.tensor(x))) for x in (rows, got)]
    assert loss[0] > 0.1
    # cosines and norms are within 2·roundings·u < 800 u; 196 squares over 14·13, and the mean of 14
    assert loss[1] < 2 * (800 * U) ** 2


def test_large_tables_are_finite():
    """A thousand rows whose factor's diagonal underflows: norms are 1 all the same."""
    i, k = np.arange(1000)[:, None], np.arange(1000)
    for sigma in (1e-3, 2.0, 1e3, 1e6):
        got = gaussian_similarity_encoding(1000, sigma)
        assert np.isfinite(got).all()
        # a square has twice the relative error of its root, and a sum of 1000 may add 1000 roundings of at most 1
        bound = (2 * roundings(i, k, sigma**-2) * got**2).sum(1) + 1000
        assert (abs((got**2).sum(1) - 1) <= bound * U).all()


def test_loss_is_the_loop():
    """Two digits more than the float has come from fsum; a sum of n terms is within n·u of it."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((5, 7))
    norms = [math.sqrt(math.fsum(x * x for x in row)) for row in w]
    terms = []
    for i, j in itertools.product(range(5), repeat=2):
        cosine = math.fsum(a * b for a, b in zip(w[i], w[j], strict=True)) / (norms[i] * norms[j])
        terms.append((cosine - math.exp(-((i - j) ** 2) / 4.5)) ** 2)
    mean = math.fsum(norms) / 5
    terms += [(x - mean) ** 2 / 5 for x in norms]
    got = float(similarity_loss(torch.tensor(w), 1.5))
    # each cosine is within 20 u of 1 or less, so each square within 2·2·20 u; then 30 sums
    assert abs(got - math.fsum(terms) / 20) <= (25 * 80 + 30 * 20) * U


def test_loss_has_the_gradient_of_its_formula():
    w = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(similarity_loss, w)


def test_the_fit_comes_near_the_closed_form():
    """300 of the release's 10,000 steps; the loss starts near the sinusoid's and falls a hundredfold."""
    start, end = (fit_similarity_encoding(14, steps=s, generator=torch.Generator().manual_seed(0)) for s in (0, 300))
    assert similarity_loss(end) < similarity_loss(start) / 100
    assert not end.requires_grad
    again = fit_similarity_encoding(14, steps=300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(end, again)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_concatenation(kind):
    make = KINDS[kind]
    rng = np.random.default_rng(1)
    features = rng.standard_normal((6, 5)).astype(np.float32)
    table = gaussian_similarity_encoding(4, width=7).astype(np.float32)
    rows, columns, targets = rng.integers(0, 4, 6), rng.integers(0, 4, 6), np.array([0, 0, 1, 0, 0, 1])
    got = object_tokens(make(features), make(rows), make(columns), make(targets), make(table), width=20)
    assert kind_of(got) == kind
    for i, token in enumerate(np.asarray(got)):
        want = [*features[i], *table[rows[i]], *table[columns[i]], *table[targets[i]]][:-1]
        np.testing.assert_array_equal(token, want)
    whole = object_tokens(make(features), make(rows), make(columns), make(targets), make(table))
    assert whole.shape == (6, 26)


def test_products_of_tokens_add_the_cosines_of_row_column_and_target():
    table = gaussian_similarity_encoding(5)
    place = np.array([(i, j) for i in range(3) for j in range(5)])
    targets = (np.arange(15) == 7).astype(int)
    tokens = object_tokens(np.zeros((15, 1)), place[:, 0], place[:, 1], targets, table)
    for a, b in itertools.product(range(15), repeat=2):
        steps = [*(place[a] - place[b]), targets[a] - targets[b]]
        want = math.fsum(math.exp(-(s**2) / 8) for s in steps)
        # relative errors of the table's products as above, at most 2·(0.75·16 + 63 + 11) u, and 16 sums
        assert abs(tokens[a] @ tokens[b] - want) <= 200 * U * want


@pytest.mark.parametrize("kind", KINDS)
def test_pointer_is_the_loop(kind):
    """Small whole numbers and d = 4: all products, sums and the root are exact."""
    rng = np.random.default_rng(2)
    query, key, mix = (rng.integers(-8, 9, s).astype(np.float32) for s in ((2, 3, 4), (2, 5, 4), (2,)))
    got = pointer_logits(KINDS[kind](query), KINDS[kind](key), KINDS[kind](mix), bias=0.5)
    assert kind_of(got) == kind
    want = np.full((3, 6), 0.5)
    for h in range(2):
        for t in range(3):
            for s in range(5):
                want[t, s] += mix[h] * sum(float(a * b) for a, b in zip(query[h, t], key[h, s], strict=True)) / 2
    np.testing.assert_array_equal(np.asarray(got), want)
    assert (np.asarray(got)[:, -1] == 0.5).all()


def test_pointer_has_the_gradient_of_its_formula():
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(*s, dtype=torch.float64, generator=g, requires_grad=True) for s in ((2, 3, 4), (2, 5, 4), (2,))]
    assert torch.autograd.gradcheck(pointer_logits, x)


def test_mask_of_steps():
    mask = step_mask(3, 5)
    assert mask.tolist() == [[True, True, True, False, False]] + 2 * [[True, True, True, True, False]]


def table_of(path):
    """Return logits over three objects, END and padding, different for every path; END and padding are large."""
    rng = np.random.default_rng([len(path), *path])
    return rng.standard_normal(5) + np.array([0, 0, 0, 0.5, 3])


def every_path(steps):
    """Return the probability of every scanpath, by the rule: no END first, no padding ever."""
    done, open_ = {}, {(): 1.0}
    for step in range(steps):
        further = {}
        for path, p in open_.items():
            weights = [math.exp(x) for x in table_of(path)][: 3 if step == 0 else 4]
            for slot, w in enumerate(weights):
                target = done if slot == 3 else further
                target[(path, True) if slot == 3 else (*path, slot)] = p * w / math.fsum(weights)
        open_ = further
    return done | {(path, False): p for path, p in open_.items()}


def test_samples_have_the_probabilities_of_the_paths():
    exact = every_path(3)
    assert abs(math.fsum(exact.values()) - 1) <= len(exact) * 16 * U
    rng, n = np.random.default_rng(3), 4000
    counts = dict.fromkeys(exact, 0)
    for _ in range(n):
        path = decode_scanpath(table_of, steps=3, rng=rng)
        counts[path.objects, path.ended] += 1
        p = exact[path.objects, path.ended]
        # at most 3 logarithms of probabilities, each within 20 u of its value or of 1
        assert abs(path.log_probability - math.log(p)) <= 3 * 20 * U * (1 - math.log(p))
    # Hoeffding: all frequencies are that near with probability 1 - 1e-6
    near = math.sqrt(math.log(2 * len(exact) / 1e-6) / (2 * n))
    assert all(abs(counts[path] / n - p) <= near for path, p in exact.items())
    assert len(exact) == 3 + 9 + 27


class Recorder(np.random.Generator):
    """A generator that keeps the probabilities that it is asked to draw by."""

    def choice(self, n, p):
        self.asked = [*getattr(self, "asked", []), p]
        return super().choice(n, p=p)


def test_each_draw_is_by_the_softmax_of_what_its_step_allows():
    lengths = set()
    for seed in range(20):
        rng = Recorder(np.random.PCG64(seed))
        path = decode_scanpath(table_of, steps=6, rng=rng).objects
        lengths.add(len(rng.asked))
        for step, p in enumerate(rng.asked):
            allowed = 3 if step == 0 else 4
            weights = [math.exp(x) for x in table_of(path[:step])[:allowed]]
            want = np.array(weights) / math.fsum(weights)
            # a logit less the largest one is below 8, and so is a logarithm: arguments within 16 u each, 10 others
            assert (abs(p[:allowed] - want) <= 60 * U * want).all()
            assert (p[allowed:] == 0).all()
    assert len(lengths) > 2


def test_greedy_takes_the_largest_allowed():
    for bias in range(40):
        path, ended = [], False
        while len(path) < 4:
            x = table_of((*path, bias))[: 4 if path else 3]
            slot = max(range(len(x)), key=lambda s: x[s])
            if slot == 3:
                ended = True
                break
            path.append(slot)
        got = decode_scanpath(lambda p, bias=bias: torch.tensor(table_of((*p, bias))), steps=4)
        assert (got.objects, got.ended) == (tuple(path), ended)


def test_end_first_and_padding_are_never_chosen():
    for rng in (None, np.random.default_rng(4)):
        got = decode_scanpath(lambda p: np.array([0.0, -np.inf, 1000.0, 2000.0]), steps=5, rng=rng)
        assert got.objects == (0,)
        assert got.ended
        assert got.log_probability == 0
    assert decode_scanpath(lambda p: np.array([0.0, 0.0, -1.0, 9.0]), steps=3).objects == (0, 0, 0)


def test_bad_arguments_are_refused():
    w = torch.ones(3, 4, dtype=torch.float64)
    f, i, t = np.zeros((3, 2)), np.zeros(3, int), np.eye(3)
    q = np.ones((2, 3, 4))
    for call, text in [
        (lambda: gaussian_similarity_encoding(0), "n: got 0, expected a whole number from 1 to 1000"),
        (lambda: gaussian_similarity_encoding(3, 0), "sigma: got 0, expected a number in [0.001, 1000000.0]"),
        (lambda: gaussian_similarity_encoding(3, width=2), "width: got 2, expected a whole number from 3 on"),
        (lambda: similarity_loss(t), "encoding: got 'ndarray', expected a PyTorch tensor"),
        (lambda: similarity_loss(w[0]), "encoding: shape is (4,), expected (rows, width)"),
        (lambda: similarity_loss(w[:1]), "encoding: got '1 row', expected at least 2 rows"),
        (lambda: similarity_loss(w.int()), "encoding: got 'torch.int32', expected a floating type"),
        (lambda: fit_similarity_encoding(1), "n: got 1, expected a whole number from 2 on"),
        (lambda: fit_similarity_encoding(3, rate=0), "rate: got 0, expected a number in (0, 1]"),
        (lambda: object_tokens(f[0], i, i, i, t), "features: shape is (2,), expected (objects, d)"),
        (lambda: object_tokens(f, i[:2], i, i, t), "rows: shape is (2,), expected (3)"),
        (lambda: object_tokens(f, i + 3, i, i, t), "rows: got '3 to 3', expected 0 to 2"),
        (lambda: object_tokens(f, i, i - 1, i, t), "columns: got '-1 to -1', expected 0 to 2"),
        (lambda: object_tokens(f, i, i, i + 2, t), "targets: got '2 to 2', expected 0 to 1"),
        (lambda: object_tokens(f, i * 0.5, i, i, t), "rows: got 'float64', expected whole numbers"),
        (lambda: object_tokens(f, i, i, i, t.astype(np.float32)), "table: type is float32, expected features' float64"),
        (lambda: object_tokens(f, i, i, i, t, width=10), "width: got 10, expected a whole number from 1 to 9"),
        (lambda: pointer_logits(q, q[:1], q[:, 0, 0]), "key: shape is (1, 3, 4), expected (2, slots, 4)"),
        (lambda: pointer_logits(q, q, q[0, 0]), "mix: shape is (4,), expected (2)"),
        (lambda: pointer_logits(q, q.astype(int), q[:, 0, 0]), "key: type is int64, expected one floating type"),
        (lambda: pointer_logits(q, q, q[:, 0, 0], bias=None), "bias: got None, expected a number in"),
        (lambda: step_mask(0, 3), "steps: got 0, expected a whole number from 1 on"),
        (lambda: step_mask(1, 2), "slots: got 2, expected a whole number from 3 on"),
        (lambda: decode_scanpath(lambda p: t, steps=1), "logits: shape is (3, 3), expected (slots)"),
        (lambda: decode_scanpath(lambda p: [1, 2], steps=1), "logits: got list, expected an array"),
        (lambda: decode_scanpath(lambda p: t[0] * np.nan, steps=1), "logits: got array([ nan"),
        (lambda: decode_scanpath(lambda p: t[0] - np.inf, steps=1), "expected numbers, not all of them -inf"),
        (lambda: decode_scanpath(table_of, steps=0), "steps: got 0, expected a whole number from 1 on"),
        (lambda: decode_scanpath(table_of, steps=1, rng=3), "rng: got int, expected a numpy.random.Generator; use"),
    ]:
        with pytest.raises(InvalidInput, match=re.escape(text)):
            call()
