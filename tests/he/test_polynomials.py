"""Polynomial stand-ins: within their certified errors, of few degrees, in a form that multiplies out to themselves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import InvalidInput, UnsupportedProblem
from refattn.he.arithmetic import Counted, Levels, Numbers
from refattn.he.inverse import product
from refattn.he.polynomials import ACTIVATIONS, activation, inverse_sqrt


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("most", "tolerance"), [(1.5, 1e-3), (4.0, 1e-2), (7.0, 5e-2)])
def test_an_activation_is_within_its_error(name, most, tolerance):
    import torch

    made = activation(name, most, tolerance)
    u = np.linspace(-most, most, 40001)
    exact = getattr(torch.nn.functional, name)(torch.tensor(u)).numpy()
    found = np.abs(made(u) - exact).max()
    assert found <= made.error <= tolerance
    assert made.error <= 1.1 * found + 1e-4  # the certificate is not far from what is there
    # one degree less is not enough
    assert made.even.degree == 1 or activation(name, most, made.error / 2).even.degree > made.even.degree
    circuit = made.apply(Numbers(), u / most) * made.constant
    np.testing.assert_allclose(circuit, made(u), atol=1e-11)


@given(low=st.floats(0.05, 2), ratio=st.floats(1.5, 20), tolerance=st.floats(0.01, 0.2))
def test_an_inverse_root_is_within_its_error(low, ratio, tolerance):
    high = low * ratio
    made = inverse_sqrt(low, high, tolerance)
    x = np.linspace(low, high, 5001)
    assert np.abs(1 - np.sqrt(x) * made(x)).max() <= made.error <= tolerance
    w = (2 * x - low - high) / (high - low)
    whole = made.factors()[0] * product(Numbers(), made.apply(Numbers(), w))
    np.testing.assert_allclose(whole, made(x), rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: activation("relu", 1.0, 0.1), InvalidInput, "activation: got 'relu', expected one of gelu, silu"),
        (lambda: activation("gelu", 0.0, 0.1), InvalidInput, "activation: got a largest input of 0"),
        (lambda: activation("gelu", 1.0, 0.0), InvalidInput, "tolerance: got 0.0, expected a number above 0"),
        (lambda: activation("gelu", 50.0, 1e-6), UnsupportedProblem, r"gelu on \[-50, 50\] is within .* at degree 30"),
        (lambda: inverse_sqrt(0.0, 1.0, 0.1), InvalidInput, r"got the interval \(0.0, 1.0\)"),
        (lambda: inverse_sqrt(1e-4, 1.0, 1e-3), UnsupportedProblem, "degree 14 has a relative error of"),
    ],
)
def test_what_cannot_be_had_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_an_activation_of_degree_two_takes_one_level():
    made = activation("gelu", 0.5, 1e-2)
    assert made.even.degree == 1
    u = np.linspace(-1, 1, 101)
    found = made.apply(Numbers(), u) * made.constant
    # a few roundings of numbers of at most 1
    assert np.abs(found - made(made.most * u)).max() < 32 * 2.0**-52
    assert made.apply(Levels(), Counted(5)).limbs == 4
