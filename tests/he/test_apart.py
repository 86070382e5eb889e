"""What comes back from a process of its own."""

import os

import numpy as np
import pytest

from .apart import apart


def test_what_work_returns_comes_back_and_nothing_else_does():
    seen = []

    @apart
    def work(n):
        seen.append(bytearray(n))
        return np.arange(3), os.getpid()

    numbers, process = work(10)
    assert (numbers.tolist(), seen) == ([0, 1, 2], [])
    assert process != os.getpid()


def test_what_work_raises_comes_back():
    with pytest.raises(AssertionError, match=r"ZeroDivisionError: division by zero"):
        apart(lambda: 1 / 0)()
    with pytest.raises(AssertionError, match=r"1 == 2"):
        apart(lambda: _one_is_two())()
    with pytest.raises(pytest.skip.Exception, match="no such package"):
        apart(lambda: pytest.skip("no such package"))()
    with pytest.raises(AssertionError, match="the process ended with 3"):
        apart(lambda: os._exit(3))()


def _one_is_two():
    assert 1 == 2


@apart
def test_a_test_of_its_own_takes_what_pytest_gives(tmp_path):
    assert tmp_path.is_dir()
