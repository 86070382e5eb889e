import flint
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn.exact import doubledouble as dd
from refattn.exact import elementwise

numbers = st.floats(min_value=-1e150, max_value=1e150).filter(lambda x: x == 0 or abs(x) > 1e-120)


@given(numbers, numbers)
def test_two_sum_and_two_prod_are_exact(a, b):
    with flint.ctx.workprec(3000):
        x, y = flint.arb(a), flint.arb(b)
        s, e = dd.two_sum(a, b)
        assert flint.arb(s) + flint.arb(e) == x + y
        p, e = dd.two_prod(a, b)
        assert flint.arb(p) + flint.arb(e) == x * y
        big, small = (a, b) if abs(a) >= abs(b) else (b, a)
        s, e = dd.fast_two_sum(big, small)
        assert flint.arb(s) + flint.arb(e) == x + y


def worst_error(h, low, out, out_low):
    worst = 0.0
    with flint.ctx.workprec(250):
        two = flint.arb(2)
        for a, b, c, d in zip(h.tolist(), low.tolist(), out.tolist(), out_low.tolist(), strict=True):
            exact = two ** (flint.arb(a) + flint.arb(b))
            worst = max(worst, float(abs((flint.arb(c) + flint.arb(d) - exact) / exact).upper()))
    return worst


def arguments(size, reach, seed=0):
    rng = np.random.default_rng(seed)
    h = -rng.random(size) * reach
    return h, h * 2.0**-53 * (rng.random(size) * 2 - 1)


@pytest.mark.parametrize("reach", [1e-300, 1e-5, 1.0, 20.0, 249.0, -900.0])
def test_exp2_keeps_its_bound(reach):
    h, low = arguments(20000, reach)
    assert worst_error(h, low, *dd.exp2(h, low)) <= dd.EXP2_ERROR


def test_exp2_at_the_ends_of_its_reduction():
    """Arguments half a table step from an integer of the table, where the polynomial's argument is largest."""
    k = np.arange(-4096 * 3, 0, 7)
    h = (k + 0.5) / 4096
    h = np.concatenate([h, np.nextafter(h, 0), np.nextafter(h, -np.inf)])
    low = np.spacing(h) * 0.49 * np.where(np.arange(h.size) % 2, 1, -1)
    assert worst_error(h, low, *dd.exp2(h, low)) <= dd.EXP2_ERROR


def test_exp2_of_what_it_cannot_hold():
    h = np.array([-np.inf, -251.0, -1e308, np.nan, 0.0, -250.0])
    out, low = dd.exp2(h, np.zeros(6))
    assert (out[:4] == 0).all()
    assert (low[:4] == 0).all()
    assert out[4] == 1
    assert out[5] == 2.0**-250


def test_constants_are_within_their_bound():
    with flint.ctx.workprec(300):
        x = 1 / flint.arb(2).log()
        h, low = dd.constant(x)
        assert abs(flint.arb(h) + flint.arb(low) - x) < abs(x) * flint.arb(2) ** -105


def test_compiled_steps_do_what_numpys_do():
    compiled = pytest.importorskip("refattn.exact.compiled", reason="numba is not here")
    rng = np.random.default_rng(0)
    r, w = 16, 40
    for level in range(4):
        levels = [rng.standard_normal((r, w)) * 2.0 ** (-20 * s) for s in range(level + 1)]
        h, low, h2, low2 = (np.empty((r, w)) for _ in range(4))
        elementwise.scores(levels, 1.4426, 1e-17, h, low)
        compiled.scores(levels, 1.4426, 1e-17, h2, low2)
        assert np.abs((h - h2) + (low - low2)).max() < 2.0**-98
        h[:, 5] = h2[:, 5] = -np.inf
        m = np.ceil(h.max(1))
        sigma = np.array([1.5 * 2.0 ** (52 - 20 - s * 21) for s in range(level)])
        p, p2 = np.empty((r, level + 1, w)), np.empty((r, level + 1, w))
        with np.errstate(invalid="ignore"):
            elementwise.weights(h, low, m, sigma, p)
        compiled.weights(h, low, m, sigma, p2)
        assert (p[:, :, 5] == 0).all()
        assert (p2[:, :, 5] == 0).all()
        total, total2 = p.sum(1), p2.sum(1)
        assert np.abs(total - total2).max() <= 2.0**-52
        if level:
            assert (p[:, 0] == p2[:, 0]).mean() > 0.99
        sums, sums2 = np.empty((r, level + 1)), np.empty((r, level + 1))
        elementwise.row_sums(p, sums)
        compiled.row_sums(p, sums2)
        assert (sums[:, :level] == sums2[:, :level]).all()
        a, b, x = rng.standard_normal((3, 4, 5))
        a2, b2 = a.copy(), b.copy()
        elementwise.accumulate(a, b, x)
        compiled.accumulate(a2, b2, x)
        assert (a == a2).all()
        assert (b == b2).all()
