"""What one rounding may lose, and how partial sums walk, against numbers worked out by hand."""

from fractions import Fraction
from math import log

import numpy as np
import pytest

from refattn.check.bounds.rules import Rules, floor, in_logarithm, logistic, moves, slope_of_tanh, tanh
from refattn.check.model import C, Model
from refattn.dtypes import FORMATS

MODEL = Model("float16", "float8_e5m2", "bfloat16", tile=2, subnormals=True)


@pytest.mark.parametrize(("dtype", "kept", "flushed"), [
    ("float16", 2.0**-25, 2.0**-14), ("float32", 2.0**-150, 2.0**-126), ("float64", 2.0**-1074, 2.0**-1022),
])  # fmt: skip
def test_underflow_costs_half_the_smallest_number_or_the_smallest_normal_one(dtype, kept, flushed):
    """Half of float64's smallest would be 0."""
    assert floor(FORMATS[dtype], Model()) == kept
    assert floor(FORMATS[dtype], Model(subnormals=False)) == flushed


def test_a_model_in_numbers():
    r = Rules(MODEL, 5)
    assert (r.u, r.u_scores, r.u_weights) == (2.0**-11, 2.0**-8, 2.0**-3)
    assert (r.cu, r.exp, r.tiles) == (C * 2.0**-22, 3.0, 3)
    assert (r.floor, r.floor_weights) == (2.0**-25, 2.0**-17)
    flushed = Rules(Model("float16", "float8_e5m2", subnormals=False), 5)
    assert (flushed.floor, flushed.floor_weights) == (2.0**-14, 2.0**-14)
    assert r.model is MODEL


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_roundings_one_after_another_multiply(n):
    exact = (1 + Fraction(2) ** -11) ** n - 1
    # log1p, the product and expm1 are each off by an ulp at most: 2**-52 of n u, and this grows by n u
    assert abs(Rules(MODEL, 5).times(n) / float(exact) - 1) <= 3 * 2.0**-52 * (1 + n * 2.0**-11)


@pytest.mark.parametrize(("terms", "walk"), [
    ((1, 2, 3), (1 + 9 + 36) / 3),  # the sums 1, 3, 6
    ((1, 1, 4), 36 / 3 + 18 / 6),  # in this order they are small, over all orders s**2/3 + T/6
    ((2,), 4.0),
    ((1,) * 16, 4 * 204 / 8),  # looked at in eight places: 2, 4, ..., 16
    ((1,) * 9, (4 * 2 + 9 + 16 + 25 + 36 + 49 + 64 + 81) / 9),  # the first part has two terms
    ((), 0.0),
])  # fmt: skip
def test_partial_sums_walk(terms, walk):
    x = np.array([terms], np.float64).reshape(1, -1)
    found, squares = Rules(MODEL, 5).walk(x, np.ones((len(terms), 2)))
    assert found.shape == squares.shape == (1, 2)
    assert (squares == sum(t * t for t in terms)).all()
    # a few sums and products of positive numbers, each off by 2**-53
    assert (abs(found - walk) <= 16 * 2.0**-53 * walk).all()


def test_partial_sums_are_of_both_operands():
    found, squares = Rules(MODEL, 5).walk(np.array([[1.0, 2.0]]), np.array([[3.0], [4.0]]))
    assert (found.item(), squares.item()) == ((9 + 121) / 2, 9 + 64)


def test_tiles_whose_share_rounds_to_nothing_are_idle():
    """Tiles of two keys; of a sum of 2**12 a share of 2**-11 is 2, which is no less than u."""
    weights = np.array([[2.0**12 - 4, 0, 2, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    assert Rules(MODEL, 6).idle(weights).tolist() == [[1.0], [0.0]]
    assert Rules(MODEL, 6).idle(weights[:, :0]).tolist() == [[0.0], [0.0]]
    assert Rules(MODEL, 6).idle(np.array([[2.0**30, 0, 1, 0, 1, 0]])).tolist() == [[2.0]]


def test_a_logarithm_moves_by_as_much_as_the_relative_error_down():
    found = in_logarithm([0.0, 0.5, 1 - 2.0**-53, 1.0, 2.0])
    assert found[0] == 0
    assert abs(found[1:3] / (log(2) * np.array([1, 53])) - 1).max() <= 2.0**-52
    assert found[3] == found[4] == np.inf


def test_functions_and_how_far_they_move():
    assert logistic(np.array([0.0, -np.inf, np.inf, 800.0, -800.0])).tolist() == [0.5, 0.0, 1.0, 1.0, 0.0]
    assert logistic(np.array([1.0])).item() == 1 / (1 + np.exp(-1.0))
    assert logistic(np.array([-1.0])).item() == np.exp(-1.0) / (1 + np.exp(-1.0))
    assert slope_of_tanh(np.array([0.0, 0.5, -1.0])).tolist() == [1.0, 0.75, 0.0]
    assert tanh(np.array([0.0, np.inf, -np.inf])).tolist() == [0.0, 1.0, -1.0]
    cube = moves(lambda x: x**3, np.array([2.0, -2.0, 0.0]), 1.0)
    assert cube.tolist() == [19 + 8 * 2.0**-51, 19 + 8 * 2.0**-51, 1.0]  # 27 - 8, and -27 + 8
