"""Every operator's gradient against a central difference in mpmath's precision."""

import numpy as np
import pytest

from refattn.exact.arithmetics import Balls, Multiprecision
from refattn.exact.matrix import Matrix
from refattn.exact.tape import Tape, gradients

MP = Multiprecision(200)
MASK = np.array([[True, False, True], [True, True, False]])
OPERATORS = {
    "matmul": lambda a, b: a @ b.T,
    "transpose": lambda a, b: a.T @ b,
    "add-column": lambda a, b: a + b.sum(),
    "subtract-column": lambda a, b: b.sum() - a.sum() + a,
    "multiply-spread": lambda a, b: a.sum() * b,
    "divide": lambda a, b: a / b,
    "divide-column": lambda a, b: a / b.sum(),
    "negate": lambda a, b: -a + b,
    "number": lambda a, b: (a * MP.number(3)) / MP.number(7) + MP.number(1) - MP.number(2) + b,
    "exp": lambda a, b: a.exp(where=MASK) + b.exp(),
    "sigmoid": lambda a, b: a.sigmoid(where=MASK) + b.sigmoid(),
    "log": lambda a, b: (a * a).log() + b,
    "tanh": lambda a, b: a.tanh() * b,
    "rsqrt": lambda a, b: (a * a + MP.number(1)).rsqrt() * b,
    "relu": lambda a, b: a.relu() + b,
    "power": lambda a, b: a.power(4, where=MASK) + b.power(2),
    "where": lambda a, b: a.where(MASK) * b,
    "shared": lambda a, b: a * a * b + a,
    "softmax": lambda a, b: (a - a.shift(MASK)).exp(where=MASK) / (a - a.shift(MASK)).exp(where=MASK).sum() + b,
}


def matrix(x):
    return Matrix(MP.array(x), MP)


@pytest.mark.parametrize("name", OPERATORS)
def test_gradient_is_the_central_difference(name):
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((2, 3)), rng.standard_normal((2, 3))
    f = OPERATORS[name]
    tapes = Tape(matrix(a)), Tape(matrix(b))
    out = f(*tapes)
    seed = matrix(rng.standard_normal(out.shape))
    grads = gradients([out], [seed], list(tapes))
    h = MP.number(2) ** -80
    for which, g in enumerate(grads):
        assert g.shape == (2, 3)
        for i in range(2):
            for j in range(3):
                sides = []
                for sign in (1, -1):
                    moved = [matrix(a), matrix(b)]
                    moved[which].a[i, j] += sign * h
                    sides.append((f(*moved) * seed).a.sum())
                assert abs((sides[0] - sides[1]) / (2 * h) - g.a[i, j]) < MP.number(2) ** -100


def test_a_leaf_that_does_not_matter_gets_exact_zeros():
    f = Balls(64)
    a, b = (Tape(Matrix(f.array(np.ones((2, 2))), f)) for _ in range(2))
    grads = gradients([a @ a], [a.value], [a, b])
    assert all(x == 0 and x.rad() == 0 for x in grads[1].a.ravel())
