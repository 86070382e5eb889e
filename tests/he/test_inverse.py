import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refattn import InvalidInput, UnsupportedProblem
from refattn.he.arithmetic import Counted, Levels
from refattn.he.inverse import MOST_QUADRATICS, Inverse, choose

INTERVALS = st.tuples(st.floats(1e-3, 1e3), st.floats(1.1, 300)).map(lambda x: (x[0], x[0] * x[1]))
FORMS = st.tuples(st.integers(0, 8), st.integers(0, MOST_QUADRATICS).map(lambda n: 2 * n + 1))


@given(INTERVALS, FORMS)
@example((1.0, 1.25), (8, 1))
@example((1.0, 300.0), (8, 31))
def test_the_error_is_the_chebyshev_polynomials(interval, form):
    f = Inverse(*interval, *form)
    x = np.geomspace(*interval, 4001)
    residual = 1 - x * f(x)
    u = (sum(interval) - 2 * x) / (interval[1] - interval[0])
    expected = np.cos(f.order * np.arccos(np.clip(u, -1, 1))) * f.relative_error
    assert np.abs(residual - expected).max() <= 1e-9
    assert np.abs(residual).max() <= f.relative_error + 1e-9


@given(FORMS)
def test_levels_and_products_are_those_that_it_takes(form):
    f, counted = Inverse(1.0, 10.0, *form), Levels()
    out = f.apply(counted, Counted(49), Counted(50), 0.1)  # the numerator comes a level later
    assert 50 - out.limbs == f.levels
    assert sum(c for (name, _), c in counted.counts.items() if name == "switch_key") == f.products


def test_few_levels_come_first():
    found = choose(1.0, 10.0, 1e-2)
    work = [(f.levels, f.products) for f in found]
    assert work == sorted(work)
    assert all(f.relative_error <= 1e-2 for f in found)
    every = [Inverse(1.0, 10.0, d, odd) for d in range(6) for odd in range(1, 2 * MOST_QUADRATICS + 2, 2)]
    assert work[0] == min((f.levels, f.products) for f in every if f.relative_error <= 1e-2)


@given(st.floats(1.01, 1e4), st.floats(1e-12, 2.0))
def test_there_is_always_one(ratio, tolerance):
    found = choose(1.0, ratio, tolerance)
    assert found
    assert all(f.relative_error <= tolerance for f in found)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Inverse(0.0, 1.0, 2), r"denominator: got \(0.0, 1.0\), expected 0 < low < high"),
        (lambda: Inverse(2.0, 1.0, 2), "expected 0 < low < high"),
        (lambda: Inverse(1.0, 2.0, -1), "inverse: got -1 doublings of order 1, expected 0 or more of an odd order"),
        (lambda: Inverse(1.0, 2.0, 0, 4), "got 0 doublings of order 4"),
        (lambda: choose(1.0, 2.0, 0.0), "tolerance: got 0.0, expected a number above 0"),
    ],
)
def test_what_has_no_meaning(call, text):
    with pytest.raises(InvalidInput, match=text):
        call()


def test_of_a_range_that_is_too_wide_there_is_none():
    assert choose(1e-100, 1e100, 1e-2) == []
    torch = pytest.importorskip("torch")
    from refattn.he.torch import PowerSoftmaxAttention

    assert torch
    with pytest.raises(UnsupportedProblem, match=r"no polynomial is within 0.01 of 1/D on \(1.0, 1e\+100\); narrow it"):
        PowerSoftmaxAttention(4, 1, denominator=(1.0, 1e100))
