"""What storing weights loses, beside weights that are stored."""

import numpy as np
import pytest

from refattn.check.bounds.stores import Stored, largest_of
from refattn.check.model import C, Model, inside_type

U = 2.0**-24


def stored(name, **more):
    model = Model(weights=name, **more)
    return Stored.of(model, 0.5 * inside_type(name).smallest_subnormal)


def test_what_1_becomes():
    assert [largest_of(n) for n in ("int8", "int4", "float8_e4m3fn", "float8_e5m2")] == [127, 7, 256, 32768]


def test_the_largest_errors():
    plain, static = stored("float8_e4m3fn"), stored("float8_e4m3fn", weights_scale="static")
    assert (plain.relative, plain.floor, plain.under()) == (2.0**-4, 2.0**-10, 2.0**-10)
    assert (static.relative, static.floor, static.under()) == (2.0**-4 + 2 * U, 2.0**-18, 0.0)
    whole = stored("int8", weights_scale="row")
    assert (whole.relative, whole.floor) == (2 * U, 0.5 / 127)
    chance = stored("int8", weights_scale="row", stochastic=True)
    assert (chance.floor, stored("float32", stochastic=True).floor) == (1 / 127, 2.0**-150)
    assert stored("float32").variance == 0


@pytest.mark.parametrize("scale", ["static", "row", "block"])
def test_integers_are_as_far_off_as_expected(scale):
    """Rounded to the steps that the scale gives: none further than the floor, and as many squares as are expected."""
    rng = np.random.default_rng(0)
    w = np.exp(-rng.exponential(3.0, (64, 96)))
    w[:8] *= 0.03  # rows far below their maximum
    found = stored("int8", weights_scale=scale, tile=16, block=32)
    tiles = w.reshape(64, 6, 16)
    top = {"static": np.ones((64, 6, 1)), "row": tiles.max(2, keepdims=True)}
    top["block"] = np.repeat(tiles.reshape(2, 32, 6, 16).max((1, 3)), 32, axis=0)[:, :, None]
    step = (top[scale] / 127 + 0 * tiles).reshape(64, 96)
    error = np.rint(w / step) * step - w
    variance, mean = found.expected(w, np.ones_like(w))
    assert (np.abs(error) <= found.floor).all()
    lost = np.rint(w / step) == 0
    assert (mean[lost] == -w[lost]).all()
    assert (mean[~lost] == 0).all()
    assert 0.9 < np.square(error[~lost]).mean() / variance[~lost].mean() < 1.1


@pytest.mark.parametrize(("name", "scale"), [("float8_e4m3fn", "static"), ("int8", "static"), ("int8", "row")])
def test_what_a_scale_is_made_for_is_stored_as_it_is(name, scale):
    """A row's largest weight, and a tile's, is a number of the type: nothing of it scatters."""
    w = np.array([[1.0, 0.9, 0.5, 0.45]])
    variance, mean = stored(name, weights_scale=scale, tile=2).expected(w, np.ones_like(w))
    assert (variance[0] == 0).tolist() == [True, False, scale == "row", False]
    assert not mean.any()
    chance = stored(name, weights_scale=scale, tile=2, stochastic=True).expected(w, np.ones_like(w))[0]
    assert (chance[0] == 0).tolist() == [True, False, scale == "row", False]


def test_by_chance_nothing_is_lost_on_average():
    rng = np.random.default_rng(0)
    w = rng.uniform(0, 1, (40, 50))
    found = stored("int8", weights_scale="static", stochastic=True)
    variance, mean = found.expected(w, np.ones_like(w))
    low = np.floor(w * 127)
    drawn = np.mean([np.square((low + (rng.random(w.shape) < w * 127 - low)) / 127 - w) for _ in range(50)])
    assert not mean.any()
    assert 0.9 < drawn / variance.mean() < 1.1


def test_floats_scatter_as_before():
    w = np.array([[1.0, 0.3, 2.0**-12, 0.0]])
    variance, mean = stored("float8_e4m3fn").expected(w, w > 0)
    assert variance[0, :2].tolist() == [C * 2.0**-8 * x * x + 2.0**-20 / 3 for x in (1.0, 0.3)]
    assert variance[0, 2:].tolist() == [0, 0]
    assert mean.tolist() == [[0, 0, -(2.0**-12), 0]]
    assert stored("float8_e4m3fn").expected(np.zeros((2, 0)), np.zeros((2, 0)))[0].shape == (2, 0)
