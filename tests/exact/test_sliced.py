"""Products of a few rows of balls by slices: around the exact ones, and Arb's where slices cannot be made."""

from fractions import Fraction

import flint
import numpy as np
import pytest

from refattn import Problem
from refattn.exact import sliced
from refattn.exact.arithmetics import Balls
from refattn.exact.matrix import Matrix
from refattn.exact.run import Work, run

BITS = 128


def matrices(seed, n, k, m, wide=False):
    """A left side of full mantissas below 1 and of one sign, whose sums are the longest, and a right one."""
    rng = np.random.default_rng(seed)
    right = 1 - rng.random((k, m)) * 2.0**-12
    if wide:
        right = rng.standard_normal((k, m)) * 2.0 ** rng.integers(-60, 60, (k, m))
    return 1 - rng.random((n, k)) * 2.0**-12, right


def exactly(left, right):
    """Every element as a fraction."""
    rows, columns = ([[Fraction(x) for x in line] for line in m.tolist()] for m in (left, right.T))
    return [[sum(x * y for x, y in zip(r, c, strict=True)) for c in columns] for r in rows]


def holds(found, exact):
    with Balls(4000).working():
        return all(
            bool(ball.contains(flint.arb(flint.fmpq(x.numerator, x.denominator))))
            for ball, x in zip(np.ravel(found), [x for line in exact for x in line], strict=True)
        )


def product(left, right, bits=BITS):
    f = Balls(bits)
    with f.working():
        return (Matrix(f.array(left), f) @ sliced.taken(f, right)).a


@pytest.mark.parametrize(("n", "k", "m"), [(1, 64, 600), (1, 2100, 16), (2, 2100, 16)])
@pytest.mark.parametrize("wide", [False, True])
def test_products_are_enclosed_to_their_bits(n, k, m, wide):
    left, right = matrices(1, n, k, m, wide)
    right[:, 2] = 0.0
    found = product(left, right)
    assert holds(found, exactly(left, right))
    assert all(x == 0 for x in found[:, 2])
    # at most 2**10 of 2**-BITS of the sum's largest term, times the terms
    most = k * np.abs(right).max(0) * 2.0 ** (10 - BITS)
    assert all(float(x.rad()) <= most[j] for line in found for j, x in enumerate(line))


def test_balls_on_the_left_are_known_within_theirs():
    left, right = matrices(2, 2, 3000, 16)
    f = Balls(BITS)
    with f.working():
        thirds = np.vectorize(lambda x: flint.arb(x) / 3, otypes=[object])(left)
        found = (Matrix(thirds, f) @ sliced.taken(f, right)).a
    assert holds(found, [[x / 3 for x in line] for line in exactly(left, right)])
    assert any(float(x.rad()) > 0 for x in found.ravel())


def test_what_falls_below_float64s_range_is_in_the_radius():
    f = Balls(BITS)
    with f.working():
        assert sliced._four(f.array(np.zeros((1, 2))))[3].max() == 0
        *_, r = sliced._four(np.array([[flint.arb(2) ** -1200]], object))
    assert r[0, 0] > 0


def test_wider_slices_are_seen(monkeypatch):
    left, right = matrices(3, 1, 4096, 8)
    monkeypatch.setattr(sliced, "head_bits", lambda k, level: 23)  # their sums do not fit into 53 bits
    assert not holds(product(left, right), exactly(left, right))


def test_a_remainder_that_is_not_counted_is_seen(monkeypatch):
    left, right = matrices(4, 1, 64, 600, wide=True)
    real, none = sliced._balls, np.zeros_like(left)
    with Balls(400).working():  # Arb's own rounding would cover it
        assert holds(sliced.product(left, none, none, none, right, BITS), exactly(left, right))
        monkeypatch.setattr(sliced, "_balls", lambda x, *r: real(x, *(y * 2.0**-30 for y in r)))
        assert not holds(sliced.product(left, none, none, none, right, BITS), exactly(left, right))


def test_three_numbers_hold_a_sum_within_what_they_leave():
    rng = np.random.default_rng(9)
    terms = [rng.standard_normal((2, 40)) * 2.0 ** (-20 * i - rng.integers(0, 20, (2, 40))) for i in range(12)]
    terms[1][0] = -terms[0][0]
    three, left = sliced._three(terms)
    for at in np.ndindex(2, 40):
        off = sum(Fraction(float(x[at])) for x in terms) - sum(Fraction(float(x[at])) for x in three)
        assert abs(off) <= Fraction(float(left[at]))
    assert (left > 0).any()
    assert left.max() < 2.0**-140


def test_columns_alone_are_those_of_the_whole():
    rng = np.random.default_rng(10)
    p = Problem(*(rng.standard_normal((1, 2, n, 7)) for n in (3, 90, 90)), causal="bottom_right")
    work, f, need = Work(p), Balls(BITS), np.array([[[True, False, True], [False, True, False]]])
    with f.working():
        whole, part = work.run(f, need), work.run(f, need, columns=np.array([2, 5]))
    assert not any(x != 0 for x in part["out"][..., [0, 1, 3, 4, 6]].ravel())
    for name, at in (("out", (need,)), ("lse", (need,))):
        x, y = (found[name][at] for found in (whole, part))
        x, y = (x[:, [2, 5]], y[:, [2, 5]]) if name == "out" else (x, y)
        assert all(a.overlaps(b) and a.rel_accuracy_bits() > 90 for a, b in zip(x.ravel(), y.ravel(), strict=True))


@pytest.mark.parametrize("odd", [1e200, 1e-200, np.inf])
def test_numbers_that_cannot_be_cut_are_arbs(odd, monkeypatch):
    left, right = matrices(5, 1, 64, 600)
    right[3, 5] = odd
    if odd < 1:
        right[:, 5] = odd
    monkeypatch.setattr(sliced, "product", None)
    f = Balls(BITS)
    with f.working():
        theirs = f.matmul(f.array(left), f.array(right))
    assert [str(x) for x in product(left, right).ravel()] == [str(x) for x in theirs.ravel()]


def test_few_numbers_and_many_bits_are_arbs(monkeypatch):
    monkeypatch.setattr(sliced, "product", None)
    left, right = matrices(6, 1, 64, 600)
    product(left[:, :8], right[:8])
    product(left, right, bits=256)
    product(np.repeat(left, 16, 0), right)


def test_a_row_of_many_keys_is_the_definitions():
    rng = np.random.default_rng(7)
    p = Problem(*(rng.standard_normal((1, 1, n, 32)) for n in (1, 3000, 3000)))
    found = []
    for bits in (BITS, 300):  # by slices, by Arb
        f = Balls(bits)
        with f.working():
            found.append(run(p, f))
    for name in ("out", "lse"):
        pairs = zip(found[0][name].ravel(), found[1][name].ravel(), strict=True)
        assert all(x.overlaps(y) and x.rel_accuracy_bits() > 100 for x, y in pairs)


def test_a_matrix_is_made_into_balls_when_it_is_asked_for():
    f, x = Balls(BITS), matrices(8, 300, 200, 1)[0]
    with f.working():
        m = sliced.taken(f, x)
        assert (m.shape, m.T.shape, m.columns([1, 2]).shape) == ((300, 200), (200, 300), (300, 2))
        assert m.made is None
        assert float((m + 1).a[0, 0]) == 1 + x[0, 0]
        assert isinstance(sliced.taken(f, x[:2]), Matrix)
        assert not isinstance(sliced.taken(f, x[:2]), sliced.Plain)
