import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refattn import InvalidInput
from refattn.he.inverse import ChebyshevInverse, ProductInverse, choose

INTERVALS = st.tuples(st.floats(1e-3, 1e3), st.floats(1.1, 300)).map(lambda x: (x[0], x[0] * x[1]))
FORMS = st.sampled_from([(ProductInverse, s) for s in range(1, 5)] + [(ChebyshevInverse, s) for s in range(1, 9)])


@given(INTERVALS, FORMS)
@example((1.0, 1.25), (ChebyshevInverse, 8))
def test_the_error_is_the_chebyshev_polynomials(interval, form):
    make, steps = form
    f = make(*interval, steps)
    x = np.geomspace(*interval, 4001)
    residual = 1 - x * f(x)
    u, t0 = (sum(interval) - 2 * x) / (interval[1] - interval[0]), f.centre
    expected = np.cos(f.order * np.arccos(np.clip(u, -1, 1))) * f.relative_error
    # the product form loses digits in its constants: its factors are far from 1 where t0 is large
    assert np.abs(residual - expected).max() <= 1e-9 * max(1, t0)
    assert np.abs(residual).max() <= f.relative_error + 1e-9 * max(1, t0)


def test_few_levels_come_first():
    found = choose(1.0, 10.0, 1e-2)
    levels = [f.steps + isinstance(f, ChebyshevInverse) for f in found]
    assert levels == sorted(levels)
    assert isinstance(found[0], ProductInverse)
    assert all(f.relative_error <= 1e-2 for f in found)
    assert ProductInverse(1.0, 10.0, found[0].steps - 1).relative_error > 1e-2


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ProductInverse(0.0, 1.0, 2), r"denominator: got \(0.0, 1.0\), expected 0 < low < high"),
        (lambda: ChebyshevInverse(2.0, 1.0, 2), "expected 0 < low < high"),
        (lambda: ChebyshevInverse(1.0, 2.0, 0), "inverse: got 0 steps, expected at least 1"),
        (lambda: choose(1.0, 2.0, 0.0), "tolerance: got 0.0, expected a number above 0"),
    ],
)
def test_what_has_no_meaning(call, text):
    with pytest.raises(InvalidInput, match=text):
        call()
