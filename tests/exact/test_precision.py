"""FLINT has one working precision: threads that evaluate beside each other get the bits that each gets alone."""

import sys
import threading
from fractions import Fraction

import flint
import numpy as np

from refattn import Problem, evaluate


def hard():
    """A call whose out lies above a midpoint of two bfloat16 numbers by 2·exp(-1500): decided by many bits."""
    zero = np.zeros((1, 1, 1, 1), np.float32)
    value = np.array([1 + 2**-8, 3], np.float32).reshape(1, 1, 2, 1)
    bias = np.array([0, -1500.0], np.float32).reshape(1, 1, 1, 2)
    return Problem(zero, np.zeros((1, 1, 2, 1), np.float32), value, bias=bias)


def thirds():
    value = np.array([1.0, 2.0, 4.0]).reshape(1, 1, 3, 1)
    return Problem(np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 3, 1)), value)


def test_eight_threads_get_the_same_bits():
    noise = Problem(*(np.random.default_rng(0).standard_normal((1, 1, 6, 4)) for _ in range(3)))
    wrong, before, interval = [], flint.ctx.prec, sys.getswitchinterval()

    def few_bits():
        for _ in range(20):
            evaluate(noise, bits=32)

    def many_bits():
        for _ in range(20):
            answer = evaluate(hard(), rounding="bfloat16")
            if float(answer.out.item()) != 1.0078125 or any(answer.undecided.values()):
                wrong.append(answer.out.item())
            found = evaluate(thirds(), bits=500).enclosures["out"]
            middle = Fraction(found.mid.item()) + Fraction(found.tail.item())
            if abs(middle - Fraction(7, 3)) > Fraction(found.radius.item()):
                wrong.append(middle)

    threads = [threading.Thread(target=t) for t in (few_bits, many_bits) * 4]
    sys.setswitchinterval(2e-5)
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert flint.ctx.prec == before
