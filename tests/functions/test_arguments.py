"""Errors of arguments name what was given, what is expected, and what to change."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.functions.arguments import axes, namespace, numbers, real, whole, within


def test_one_library_for_all():
    x = np.zeros(3)
    assert namespace(x=x).__name__.endswith("numpy")
    with pytest.raises(InvalidInput, match=re.escape("y: is an array of torch, expected numpy's, as x is")):
        namespace(x=x, y=torch.zeros(3))
    with pytest.raises(InvalidInput, match=re.escape("x: got list, expected an array; use numpy.asarray(x)")):
        namespace(x=[1, 2])


@pytest.mark.parametrize("shape", [(3,), (3, 0), (2, 4), (3, 4, 1)])
def test_axes(shape):
    axes("x", np.zeros((3, 4)), 3, "keys")
    with pytest.raises(InvalidInput, match=re.escape(f"x: shape is {shape}, expected (3, keys), each at least 1")):
        axes("x", np.zeros(shape), 3, "keys")


def test_numbers():
    assert whole("n", np.int64(3), 1) == 3
    assert within("p", 1, 0, 1) == 1.0
    for wrong in (0, 1.5, True, "2"):
        with pytest.raises(InvalidInput, match=re.escape(f"n: got {wrong!r}, expected a whole number from 1 to 2")):
            whole("n", wrong, 1, 2)
    for wrong in (0, 1.5, float("nan"), None):
        with pytest.raises(InvalidInput, match=re.escape(f"p: got {wrong!r}, expected a number in (0, 1]")):
            within("p", wrong, 0, 1, open_low=True)


def test_real_numbers_stay_as_they_are():
    assert real("x", 3, 1) == 3
    assert type(real("x", 2**60 + 1, 1)) is int
    assert real("x", Fraction(1, 3), 0, 1) == Fraction(1, 3)
    for wrong in (-1, 2, float("nan"), True, "1", None, 1j):
        text = f"x: got {wrong!r}, expected a finite number from 0 to 1"
        with pytest.raises(InvalidInput, match=re.escape(text)):
            real("x", wrong, 0, 1)
    for check in (real, within):
        with pytest.raises(InvalidInput, match=r"x: got 1000.*, expected a (finite )?number"):
            check("x", 10**400, 0, math.inf)
    for wrong in (0, math.inf):
        with pytest.raises(InvalidInput, match=re.escape(f"x: got {wrong!r}, expected a finite number from 1 on")):
            real("x", wrong, 1)


def test_numpys_whole_numbers_do_not_wrap():
    assert type(real("n", np.int8(100), 0)) is int


@pytest.mark.parametrize("make", [np.asarray, torch.asarray, lambda x: np.array(x, object)])
def test_numbers_of_arrays(make):
    numbers("x", make([0.0, math.inf]), 0)
    numbers("x", make([-1.0, -math.inf]))
    with pytest.raises(InvalidInput, match=r"^x: holds a number below 0, expected numbers of at least 0$"):
        numbers("x", make([1.0, -(2.0**-60)]), 0)
    for least, said in ((None, "numbers"), (0, "numbers of at least 0")):
        with pytest.raises(InvalidInput, match=f"^x: holds NaN, expected {said}; mend what made them$"):
            numbers("x", make([1.0, math.nan]), least)


def test_fractions_and_empty_arrays_are_numbers():
    numbers("x", np.array([Fraction(1, 3)]), 0)
    numbers("x", np.zeros((0, 2)), 1)
    with pytest.raises(InvalidInput, match="x: holds a number below 0"):
        numbers("x", np.array([Fraction(-1, 3)]), 0)
