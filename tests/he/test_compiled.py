"""Compiled transforms beside NumPy's: the same words, and the same numbers to the last bit."""

import sys

import numpy as np
import pytest

from refattn import he
from refattn.he import embedding, fast, transform
from refattn.he.device import encode
from refattn.he.device.chain import chain_of
from refattn.he.noise import Ring

pytest.importorskip("numba")
RING = Ring(8192, 55, 40, 60, 2)  # of rows and columns that differ


def both(monkeypatch, call):
    """Return what a call gives compiled, and by NumPy."""
    first = call()
    for module in (transform, embedding, encode):
        monkeypatch.setattr(module, "compiled", lambda: None)
    second = call()
    monkeypatch.undo()
    return first, second


def test_a_polynomial_is_added_to_words(monkeypatch):
    """Beside whole numbers of Python, too, of what a transform of nothing else can be told of: 0 and constants."""
    rng, q = np.random.default_rng(0), np.array(chain_of(RING).primes[:3], np.uint64)[:, None]
    assert q[0] > transform.LARGE > q[1]
    high = np.rint(rng.uniform(-1, 1, 8192) * 2.0 ** rng.integers(0, 112, 8192))
    high[:4] = 2.0**112 * (1 - 2.0**-53), -(2.0**112) * (1 - 2.0**-53), 2.0**60, -(2.0**60)
    low = rng.integers(-(2**53), 2**53, 8192) * 2.0**6
    place = rng.integers(0, q, (3, 8192), dtype=np.uint64)
    place[:, :2] = 0
    place[:, 2:4] = q - np.uint64(1)

    def added(p):
        found = place.copy()
        transform.add_whole(found, p, RING)
        return found

    first, second = both(monkeypatch, lambda: added((high, low)))
    assert np.array_equal(first, second)
    one = np.zeros(8192)
    one[0] = -(2.0**100)  # a constant has itself at all points
    expected = [[(int(x) - 2**100) % int(p) for x in row] for row, p in zip(place, q[:, 0], strict=True)]
    for found in both(monkeypatch, lambda: added((one, 0 * one))):
        assert found.tolist() == expected


@pytest.mark.parametrize("degree", [4, 8192])
def test_double_doubles_are_numpys(monkeypatch, degree):
    rng = np.random.default_rng(1)
    p = np.rint(rng.uniform(-1, 1, (3, degree)) * 2.0**92), np.rint(rng.uniform(-1, 1, (3, degree)) * 2.0**38)
    first, second = both(monkeypatch, lambda: embedding.slots(p))
    assert np.array_equal(first, second)
    first, second = both(monkeypatch, lambda: embedding.coefficients(embedding.slots(p)))
    assert np.array_equal(first, second)
    assert np.array_equal(first[0] + first[1], p[0] + p[1])


def test_seals_encoder_is_numpys(monkeypatch):
    rng = np.random.default_rng(2)
    z = rng.standard_normal(4096) + 1j * rng.standard_normal(4096)
    first, second = both(monkeypatch, lambda: encode.nearest(z, 8192, 2.0**40))
    assert np.array_equal(first, second)
    assert np.abs(first).max() > 2**33


def test_without_numba_there_is_none(monkeypatch):
    assert fast.compiled() is not None
    monkeypatch.setitem(sys.modules, "refattn.he.compiled", None)
    monkeypatch.delattr(he, "compiled")
    fast.compiled.cache_clear()
    try:
        assert fast.compiled() is None
    finally:
        fast.compiled.cache_clear()


def test_polynomials_of_another_degree_are_refused():
    place = np.zeros((1, 8192), np.uint64)
    with pytest.raises(ValueError, match=r"shapes \(8,\) and \(8,\), expected \(8192,\)"):
        transform.add_whole(place, (np.zeros(8), np.zeros(8)), RING)
