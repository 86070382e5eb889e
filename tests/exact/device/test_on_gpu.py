"""The engine on a real GPU: its checks pass, its bits are the CPU's, a long call is decided."""

import numpy as np
import pytest

import refattn
from refattn import Problem, UnsupportedProblem
from refattn.arrays import cupy_with_gpu
from refattn.exact.device.card import card_of
from tests.exact.device.drawn import compare
from tests.exact.device.gate import enclosures, same_bits


def here():
    try:
        cupy_with_gpu()
    except UnsupportedProblem:
        return False
    return True


pytestmark = pytest.mark.skipif(not here(), reason="needs an NVIDIA GPU and CuPy")


def test_random_calls():
    assert same_bits("cuda", 40)[0] == 0
    assert same_bits("cuda", 20, most=(40, 300), gradients=True)[0] == 0
    assert enclosures(20000)[1] == 0


def test_a_long_call_with_tiles_of_full_size():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, 5000, 64)) for _ in range(3))
    mine = refattn.evaluate(Problem(q, k, v, causal="bottom_right"), rounding="float64", device="cuda")
    assert sum(mine.undecided.values()) == 0
    few = Problem(q[:, :, -40:], k, v, causal="bottom_right")
    theirs = refattn.evaluate(few, rounding="float64")
    assert (mine.out[:, :, -40:] == theirs.out).all()
    assert (mine.lse[:, :, -40:] == theirs.lse).all()


def test_gradients_with_tiles_of_full_size():
    rng = np.random.default_rng(2)
    q, k, v, dout = (rng.standard_normal((1, 1, n, 64)) for n in (3000, 5000, 5000, 3000))
    p = Problem(q, k, v, causal="bottom_right")
    mine = refattn.evaluate(p, rounding="float32", gradients=dout, device="cuda")
    assert compare(mine, refattn.evaluate(p, rounding="float32", gradients=dout)) == 0


def test_arrays_on_the_gpu_and_on_the_host_give_the_same():
    cupy, rng = cupy_with_gpu(), np.random.default_rng(1)
    arrays = [rng.standard_normal((1, 2, 70, 16)).astype(np.float32) for _ in range(3)]
    there = Problem(*map(cupy.asarray, arrays))
    mine = refattn.evaluate(there, rounding="float32", device="cuda")
    assert compare(mine, refattn.evaluate(Problem(*arrays), rounding="float32")) == 0
    assert card_of(int(cupy.cuda.Device().id)) is card_of(int(cupy.cuda.Device().id))
