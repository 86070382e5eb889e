"""Each operator's bound alone, the soundness gate, and gates that must fail."""

from fractions import Fraction

import flint
import numpy as np
import pytest

from refattn.exact import backward, levels, stream
from refattn.exact import run as runner
from refattn.exact.levels import Bounded, Level

from .gate import FAMILIES, gate

ELEMENTS = 10**6


def points(rng, m):
    """One exact number of every element: its middle or an end."""
    parts = [np.broadcast_to(x, m.h.shape) for x in (m.h, m.l, m.r)]
    out = np.empty(m.h.shape, object)
    for index in np.ndindex(*m.h.shape):
        h, low, r = (flint.arb(float(x[index])) for x in parts)
        out[index] = h + low + r * int(rng.integers(-1, 2))
    return out


def noisy(rng, shape, size=1.0, by_row=False):
    """A matrix of enclosures of double-doubles with radii, some of them 0."""
    h = FAMILIES[list(FAMILIES)[rng.integers(len(FAMILIES))]](rng, shape) * size
    low = h * 2.0**-53 * (rng.random(shape) - 0.5)
    r = np.abs(h) * 2.0 ** -rng.integers(40, 110) * (rng.random(shape) < 0.7)
    return Bounded(Level(int(rng.integers(4))), h, low, r.max(1, keepdims=True) if by_row else r)


MASK = np.random.default_rng(0).random((5, 7)) < 0.6
BINARY = {
    "add": (lambda a, b: a + b, lambda x, y: x + y),
    "subtract": (lambda a, b: a - b, lambda x, y: x - y),
    "multiply": (lambda a, b: a * b, lambda x, y: x * y),
    "divide": (lambda a, b: a / b, lambda x, y: x / y),
}
UNARY = {
    "negate": (lambda a: -a, lambda x: -x),
    "exp": (lambda a: a.exp(), lambda x: x.exp()),
    "sigmoid": (lambda a: a.sigmoid(), lambda x: 1 / (1 + (-x).exp())),
    "tanh": (lambda a: a.tanh(), lambda x: x.tanh()),
    "relu": (lambda a: a.relu(), lambda x: x.nonnegative_part()),
    "power": (lambda a: a.power(4), lambda x: x**4),
    "log": (lambda a: (a * a).log(), lambda x: (x * x).log()),
    "rsqrt": (lambda a: (a * a).rsqrt(), lambda x: (x * x).rsqrt()),
}
SHAPES = [((5, 7), (5, 7)), ((5, 7), (5, 1)), ((5, 7), (1, 1)), ((5, 90), (1, 1)), ((5, 90), (5, 1))]


def covers(result, exact):
    """Assert that each enclosure holds its exact number; one that proves nothing holds any."""
    parts = [np.broadcast_to(x, result.h.shape) for x in (result.h, result.l, result.r)]
    for index, want in np.ndenumerate(exact):
        h, low, r = (float(x[index]) for x in parts)
        if want.is_finite() and np.isfinite([h, low, r]).all():
            assert abs(flint.arb(h) + flint.arb(low) - want).lower() <= r, (index, h, low, r, want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BINARY)
def test_binary_operators_enclose(name, shape):
    rng = np.random.default_rng(SHAPES.index(shape) * 10 + len(name))
    f, g = BINARY[name]
    with flint.ctx.workprec(600), np.errstate(all="ignore"):
        for _ in range(40):
            a = noisy(rng, shape[0], by_row=shape[0][1] > 64)
            b = noisy(rng, shape[1], 2.0 ** rng.integers(-8, 8))
            b.f = a.f
            x, y = points(rng, a), np.broadcast_to(points(rng, b), shape[0])
            covers(f(a, b), np.frompyfunc(g, 2, 1)(x, y))


@pytest.mark.parametrize("name", UNARY)
def test_functions_enclose(name):
    rng = np.random.default_rng(len(name))
    f, g = UNARY[name]
    with flint.ctx.workprec(600), np.errstate(all="ignore"):
        for i in range(60):
            a = noisy(rng, (4, 6), 2.0 ** rng.integers(-6, 6), by_row=i % 2 == 1)
            covers(f(a), np.frompyfunc(g, 1, 1)(points(rng, a)))


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("shape", [(3, 1, 4), (5, 17, 6), (2, 300, 3), (4, 8, 90)])
def test_products_enclose(level, shape):
    n, k, m = shape
    rng = np.random.default_rng(level * 100 + k)
    with flint.ctx.workprec(900):
        for _ in range(8):
            a, b = noisy(rng, (n, k)), noisy(rng, (k, m))
            a.f = b.f = Level(level)
            x, y = points(rng, a), points(rng, b)
            covers(a @ b, x @ y)
            covers(a.sum(), x.sum(1, keepdims=True))


@pytest.mark.parametrize("level", range(4))
def test_where_absmax_and_shift(level):
    rng = np.random.default_rng(level)
    a = noisy(rng, (5, 7))
    kept = a.where(MASK)
    assert (kept.h[~MASK] == 0).all()
    assert (kept.r[~MASK] == 0).all()
    with flint.ctx.workprec(300):
        rows = zip(np.abs(points(rng, a)), MASK, strict=True)
        largest = [max(row[seen], key=lambda e: e.mid(), default=flint.arb(0)) for row, seen in rows]
        covers(a.absmax(MASK), np.array([[e] for e in largest], object))
    shift = a.shift(MASK)
    assert (shift.r == 0).all()
    assert (shift.h[:, 0] == np.where(MASK, a.h, -np.inf).max(1)).all()
    assert not a.shift(np.zeros((5, 7), bool)).h.any()


def test_a_number_that_is_a_float_is_exact_and_a_fraction_is_enclosed():
    f = Level(2)
    assert f.number(0.5).r == 0
    assert 0 < f.number(Fraction(1, 3)).r < 2.0**-103
    with flint.ctx.workprec(300):
        covers(f.number(Fraction(1, 3)), np.array([[flint.arb(1) / 3]], object))
        covers(f.rsqrt(2), np.array([[1 / flint.arb(2).sqrt()]], object))
        covers(f.log2(), np.array([[flint.arb(2).log()]], object))


def test_overflow_and_lost_numbers_prove_nothing():
    f = Level(1)
    with np.errstate(all="ignore"):
        a = f.array(np.array([[1e300, 1.0]]))
        assert not np.isfinite((a * a).r[0, 0])
        assert not np.isfinite((f.number(1) / f.number(0)).r[0, 0])
        assert not np.isfinite((a * f.number(1000)).exp().r[0, 0])
    wide = Bounded(f, np.ones((1, 1)), np.zeros((1, 1)), np.full((1, 1), 2.0))
    assert not np.isfinite((f.number(1) / wide).r[0, 0])


@pytest.fixture(autouse=True)
def both_paths(monkeypatch):
    monkeypatch.setattr(runner, "STREAM_FROM", 32)


def test_the_gate():
    count, violations, worst, lost = gate(ELEMENTS)
    assert count >= ELEMENTS
    assert violations == 0
    assert lost < count / 200  # over 10^8 comparisons it is 1 in 800
    assert {"out", "lse", "dq", "dk", "dv", "dbias", "dsink"} == {name for name, _ in worst}
    assert {level for _, level in worst} == {0, 1, 2, 3}
    assert max(worst.values()) < 1


PLANTED = {
    "no rounding in the last level": {"gamma": lambda k: 0.0},
    "one rounding in the last level": {"gamma": lambda k: 2.0**-53},
    "an exp2 that is too good": {"EXP2_ERROR": 2.0**-100},
    "heads that are too wide": {"head_bits": lambda k, level: int((53 - np.log2(max(k * max(level, 1), 1))) // 2) + 3},
    "the wrong column": {"most": lambda x, wide: np.abs(x).min(0, keepdims=True)},
    "radii of operands forgotten": {"radius_sum": lambda x: np.zeros((x.h.shape[0], 1))},
    "sums of rows forgotten": {"row_sum": lambda x: np.abs(x).max(1, keepdims=True) * 0},
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_in_a_bound_is_caught(name, monkeypatch):
    for attribute, wrong in PLANTED[name].items():
        for module in (levels, stream, backward):
            if hasattr(module, attribute):
                monkeypatch.setattr(module, attribute, wrong)
    count, violations, *_ = gate(ELEMENTS, stop=1)
    assert violations > 0
    assert count < ELEMENTS


OPERATORS = {
    "__add__": "radii of a sum",
    "__mul__": "radii of a product of elements",
    "__truediv__": "radii of a quotient",
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_radius_forgotten_in_an_operator_is_caught(operator, monkeypatch):
    right = getattr(Bounded, operator)

    def wrong(self, o):
        result = right(self, o)
        result.rest, result.relative = np.zeros_like(result.rest), None
        return result

    monkeypatch.setattr(Bounded, operator, wrong)
    monkeypatch.setattr(runner, "STREAM_FROM", 10**9)
    _, violations, *_ = gate(ELEMENTS, stop=1)
    assert violations > 0


def test_a_tail_charged_at_the_wrong_slice_is_caught(monkeypatch):
    """The mistake that Gaussian data never showed: the rounding of a tail counted as if it were one slice smaller."""
    right = Bounded.__matmul__

    def wrong(self, o):
        result = right(self, o)
        level = self.f.level
        if level:
            result.rest = result.rest * 2.0 ** -levels.head_bits(self.h.shape[1], level)
        return result

    monkeypatch.setattr(Bounded, "__matmul__", wrong)
    _, violations, *_ = gate(ELEMENTS, stop=1)
    assert violations > 0
