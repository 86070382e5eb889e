"""BLAS's threads: one for us, as many as before for a kernel that is judged."""

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from refattn import check_kernel
from refattn.check.kernels.tiled import tiled
from refattn.exact.blas import as_before, one_thread


def threads():
    return [x.num_threads for x in ThreadpoolController().lib_controllers if x.user_api == "blas"]


@pytest.fixture
def two():
    """Give BLAS two threads."""
    np.ones((2, 2)) @ np.ones((2, 2))
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        if threads()[:1] != [2]:
            pytest.skip("NumPy's BLAS has no threads here")
        yield


def test_one_thread_and_back(two):
    before = threads()
    with as_before():
        assert threads() == before
    with one_thread():
        assert set(threads()) == {1}
        with one_thread(), as_before():
            assert threads() == before
        assert set(threads()) == {1}
    assert threads() == before
    with pytest.raises(ValueError, match="stop"), one_thread():
        raise ValueError("stop")
    assert threads() == before


def test_a_kernel_has_the_threads_that_its_caller_has(two):
    seen = []

    def kernel(p):
        seen.append(threads())
        return tiled(p)

    assert check_kernel(kernel, only="gaussian/plain[float32]", seed=0).right
    assert seen
    assert {n for x in seen for n in x} == {2}  # a library may have been loaded meanwhile
    assert set(threads()) == {2}
