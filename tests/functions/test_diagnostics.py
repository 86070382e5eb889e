"""Grades at their exact boundaries, intervals against their definition and SciPy, spectra against mpmath."""

import itertools
import math
import re
from decimal import Decimal
from fractions import Fraction

import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from refattn import InvalidInput
from refattn.arrays import kind_of
from refattn.functions.diagnostics import (
    effective_rank,
    grade_approximation,
    parse_answer,
    spectral_entropy,
    trace_covariance,
    two_proportion_z,
    wilson_interval,
)

KINDS = {"numpy": np.asarray, "torch": torch.asarray, "jax": jnp.asarray}
U = 2.0**-53


@pytest.mark.parametrize(
    ("text", "exact", "released"),
    [
        ("Final answer: 43", "43", "43"),
        ("3 tickets at 14; FINAL  answer : -43.50 dollars", "-43.5", "-43.5"),
        ("Final answer: 1,200", "1200", "1"),
        ("Final answer: 1,234,567.89!", "1234567.89", "1"),
        ("A 5 dollar fare. Final answer: $20", "20", "5"),
        ("A 5 dollar fare. Final answer: about 20", "20", "5"),
        ("7 rides. **Final answer:** -$20.", "-20", "7"),
        ("Final answer: none, of 5", "5", "5"),
        ("5 of them. Final answer: none", "5", "5"),
        ("about 1,200.5, or 7", "1200.5", "1200.5"),
        ("1,2345", "1", "12345"),
        (".5", "0.5", "0.5"),
    ],
)
def test_answers_in_texts(text, exact, released):
    assert parse_answer(text) == Fraction(exact)
    assert parse_answer(text, mode="released") == Fraction(released)


def test_a_text_without_a_number_has_no_answer():
    for text in ("", "Final answer: none"):
        assert parse_answer(text) is None
        assert parse_answer(text, mode="released") is None


@pytest.mark.parametrize("mode", ["exact", "released"])
@pytest.mark.parametrize(
    ("answer", "grade"),
    [
        (100, "exact"),
        (99.9999995, "exact"),
        (100.000002, "good"),
        (120, "good"),
        (80.0, "good"),
        (120.0001, "mildly off"),
        (160, "mildly off"),
        (Decimal("160.0001"), "way off"),
        (161, "way off"),
        (-100, "way off"),
        (None, "uncategorized"),
    ],
)
def test_grades(answer, grade, mode):
    assert grade_approximation(answer, 100, mode=mode) == grade


def test_boundaries_belong_to_the_better_grade_and_a_hair_beyond_does_not():
    """In rational arithmetic, for numbers of money, both signs; each a float or text that prints as the decimal."""
    hair = Fraction(1, 10**30)
    for cents in range(1, 500, 7):
        for e in (Fraction(cents, 100), Fraction(-cents, 100)):
            for share, inside, beyond in [("0.2", "good", "mildly off"), ("0.6", "mildly off", "way off")]:
                for sign in (1, -1):
                    off = sign * Fraction(share) * abs(e)
                    assert grade_approximation(e + off, e) == inside
                    assert grade_approximation(e + off + sign * hair, e) == beyond
                    assert grade_approximation(float(e + off), float(e)) == inside
            assert grade_approximation(e + Fraction(1, 10**6), e) == "exact"
            assert grade_approximation(e + Fraction(1, 10**6) + hair, e) != "exact"


def test_the_release_decides_boundaries_in_float64():
    assert grade_approximation(3.6, 3) == "good"
    assert grade_approximation(3.6, 3, mode="released") == "mildly off"
    assert grade_approximation(np.float32(3.6), np.int64(3)) == "good"


def test_nothing_is_near_zero_but_zero():
    for mode in ("exact", "released"):
        assert grade_approximation(0, 0, mode=mode) == "exact"
        assert grade_approximation(1e-6, 0, mode=mode) == "exact"
        assert grade_approximation(1e-5, 0, mode=mode) == "way off"


def test_wilson_holds_the_proportions_whose_score_is_within_z():
    """The definition, exactly: p is in it where (k - np)**2 <= z**2 n p (1 - p)."""
    square = Fraction(1.96) ** 2
    for n in (1, 2, 7, 20, 41):
        for k in range(n + 1):
            low, high = wilson_interval(k, n)
            for i in range(65):
                p = Fraction(i, 64)
                assert (low <= p <= high) == ((k - n * p) ** 2 <= square * n * p * (1 - p))


def test_wilson_ends_at_0_and_1():
    """Rounding would miss them for many n."""
    for n in range(1, 200):
        assert wilson_interval(0, n)[0] == 0
        assert wilson_interval(n, n)[1] == 1


@pytest.mark.parametrize(("k", "n"), [(0, 5), (1, 10_000), (3, 7), (5, 5), (5727, 10_000)])
def test_wilson_is_scipys(k, n):
    """Both subtract a root from the middle, p + z**2/2n, with 8 roundings of each at most."""
    z = stats.norm.ppf(0.975)
    want = stats.binomtest(k, n).proportion_ci(method="wilson")
    got = wilson_interval(k, n, z=float(z))
    bound = 2 * 16 * U * (k / n + z * z / n)
    assert abs(got[0] - want.low) <= bound
    assert abs(got[1] - want.high) <= bound
    assert 0 <= got[0] < got[1] <= 1


def test_z_squared_is_the_chi_squared_of_the_table():
    """Exactly, in rational numbers; the float is 4 roundings from it, its square 8 u and one more."""
    for k1, n1, k2, n2 in [(1, 2, 1, 3), (5727, 10_000, 6679, 10_000), (3, 70, 20, 100), (0, 5, 3, 5), (7, 7, 1, 9)]:
        table = [[k1, n1 - k1], [k2, n2 - k2]]
        total = n1 + n2
        chi = Fraction(0)
        for i, j in itertools.product(range(2), repeat=2):
            expected = Fraction(sum(table[i]) * (table[0][j] + table[1][j]), total)
            chi += (table[i][j] - expected) ** 2 / expected
        z, p = two_proportion_z(k1, n1, k2, n2)
        assert abs(Fraction(z) ** 2 - chi) <= 10 * Fraction(U) * chi
        assert (z > 0) == (Fraction(k1, n1) > Fraction(k2, n2))
        # the tail's logarithm changes by about z**2 times the relative error of z
        want = 2 * stats.norm.sf(abs(z))
        assert abs(p - want) <= 16 * U * (4 + z**2) * want


def test_the_p_value_does_not_vanish():
    """The release's 1 - erf(|z|/sqrt(2)) is 0 at z = 13.9; the tail is 1e-43."""
    z, p = two_proportion_z(5727, 10_000, 6679, 10_000)
    assert round(z, 1) == -13.9
    assert 2 * (1 - 0.5 * (1 + math.erf(abs(z) / math.sqrt(2)))) == 0
    assert 9e-44 < p < 1e-43


def entropy_of(s):
    total = mpmath.fsum(s)
    return -mpmath.fsum(x / total * mpmath.log(x / total) for x in s if x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 5), (6, 4), (1, 4)])
def test_spectra_are_mpmaths(kind, shape):
    """LAPACK's singular values are within a modest multiple of u·max(s), here 4·(rows + features)."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    u = 2.0**-24
    with mpmath.workdps(40):
        s = sorted(mpmath.svd_r(mpmath.matrix(x.astype(np.float64).tolist()), compute_uv=False), reverse=True)
        h = entropy_of(s)
        total = mpmath.fsum(s)
        # dH = sum |dp|·(|log p| + 1), |dp| <= (1 + n p)·off/total, beside 2n roundings of the terms
        off, n = 4 * sum(shape) * u * s[0], len(s)
        change = sum((1 + n * x / total) * off / total * (abs(mpmath.log(x / total)) + 1) for x in s)
        bound = float(change + 4 * n * u * (h + 1))
        shares = [float(x / s[0]) for x in s]
    got = spectral_entropy(KINDS[kind](x))
    assert kind_of(got) == kind
    assert abs(float(got) - float(h)) <= bound
    for a, b in itertools.pairwise([*shares, 0.0]):
        threshold = (a + b) / 2
        assert effective_rank(KINDS[kind](x), threshold=threshold) == sum(x > threshold for x in shares)


def test_entropy_is_of_the_values_and_not_of_their_squares():
    """A Hadamard matrix times diag(3, 1, 0, 0): shares 3/4 and 1/4, where squares would give 9/10 and 1/10."""
    h = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2.0
    x = h * np.array([3.0, 1.0, 0.0, 0.0])
    want = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    # singular values within 16 u·3, shares within 16 u, logarithms of the two zeros' below 37: 4·16·37 u
    assert abs(spectral_entropy(x) - want) <= 4 * 16 * 37 * U
    assert effective_rank(x) == 2
    assert effective_rank(x, threshold=0.5) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_trace_is_the_loop(kind):
    """Eight rows of small whole numbers: means, squares and sums are exact in float32."""
    x = np.random.default_rng(1).integers(-8, 9, (8, 5)).astype(np.float32)
    want = Fraction(0)
    for column in x.T:
        mean = Fraction(int(column.sum()), 8)
        want += sum((Fraction(int(v)) - mean) ** 2 for v in column) / 8
    got = trace_covariance(KINDS[kind](x))
    assert kind_of(got) == kind
    assert Fraction(float(got)) == want


def test_spectral_gradients():
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(spectral_entropy, x)
    assert torch.autograd.gradcheck(trace_covariance, x)


def test_bad_arguments_are_refused():
    x = np.ones((2, 3))
    for call, text in [
        (lambda: parse_answer(3), "text: got 3, expected a string"),
        (lambda: parse_answer("3", mode="paper"), "mode: got 'paper', expected 'exact' or 'released'"),
        (lambda: grade_approximation("3", 3), "answer: got '3', expected a finite int, float, Decimal or Fraction"),
        (lambda: grade_approximation(3, None), "exact: got None, expected a finite int"),
        (lambda: grade_approximation(math.nan, 3), "answer: got nan, expected a finite int"),
        (lambda: grade_approximation(3, True), "exact: got True, expected a finite int"),
        (lambda: grade_approximation(3, 3, mode=""), "mode: got '', expected 'exact' or 'released'"),
        (lambda: wilson_interval(0, 0), "trials: got 0, expected a whole number from 1 on"),
        (lambda: wilson_interval(3, 2), "successes: got 3, expected a whole number from 0 to 2"),
        (lambda: wilson_interval(1, 2, z=0), "z: got 0, expected a number in (0, 1000000.0]"),
        (lambda: two_proportion_z(1, 2, 4, 3), "successes_2: got 4, expected a whole number from 0 to 3"),
        (lambda: two_proportion_z(1, 0, 1, 3), "trials_1: got 0, expected a whole number from 1 on"),
        (lambda: two_proportion_z(0, 2, 0, 3), "successes: 0 of 5, expected successes and failures; these"),
        (lambda: two_proportion_z(2, 2, 3, 3), "successes: 5 of 5, expected successes and failures; these"),
        (lambda: spectral_entropy(x[0]), "states: shape is (3,), expected (rows, features)"),
        (lambda: spectral_entropy(x * 0), "states: holds only zeros, which have no shares; leave such layers out"),
        (lambda: spectral_entropy(x * np.nan), "states: type is float64, expected finite numbers of a floating type"),
        (lambda: trace_covariance(x.astype(int)), "states: type is int64, expected finite numbers of a floating type"),
        (lambda: effective_rank(x, threshold=2), "threshold: got 2, expected a number in [0, 1]"),
        (lambda: effective_rank([[1.0]]), "states: got list, expected an array"),
    ]:
        with pytest.raises(InvalidInput, match=re.escape(text)):
            call()
