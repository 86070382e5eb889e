"""Gradients of the polynomial path: those of the polynomial, and near the exact ones."""

import itertools

import numpy as np
import pytest

from refattn import InvalidProblem, tensor
from refattn.tensor.polynomial import coefficients_of, sizes_of
from refattn.tensor.stream import backward

from .test_tensor import arrays


def plain_polynomial(torch, q, keys, values, coefficients, scale):
    """Return attention of order 2 or 3 with a polynomial for exp, over all tuples."""
    letters = "jkl"[: len(keys)]
    s = torch.einsum(",".join(["id", *(f"{x}d" for x in letters)]) + f"->i{letters}", q, *keys) * scale
    p = sum(c * s**m for m, c in enumerate(coefficients))
    top = torch.einsum(",".join([f"i{letters}", *(f"{x}c" for x in letters)]) + "->ic", p, *values)
    return top / p.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("kind", ["taylor", "chebyshev"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_polynomial_gradients_are_those_of_the_polynomial(order, kind):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(order)
    q, *rest = (
        rng.uniform(-0.8, 0.8, (1, 2, n, c))
        for n, c in [(9, 3), *((6 + t, 3) for t in range(order)), *((6 + t, 2) for t in range(order))]
    )
    keys, values, dout = rest[:order], rest[order:], rng.standard_normal((1, 2, 9, 2))
    found = tensor.polynomial_backward(q, keys, values, dout, scale=0.5, degree=5, kind=kind)
    largest = float(sizes_of(q, keys, 0.5).max())
    for h in range(2):
        leaves = [torch.tensor(x[0, h], requires_grad=True) for x in (q, *keys, *values)]
        made = plain_polynomial(
            torch, leaves[0], leaves[1 : order + 1], leaves[order + 1 :], coefficients_of(kind, 5, largest), 0.5
        )
        np.testing.assert_allclose(
            made.detach(), tensor.polynomial(q, keys, values, scale=0.5, degree=5, kind=kind).out[0, h], atol=1e-12
        )
        made.backward(torch.tensor(dout[0, h]))
        for g, leaf in zip((found[0], *found[1], *found[2]), leaves, strict=True):
            np.testing.assert_allclose(g[0, h], leaf.grad, atol=1e-11)


def test_polynomial_gradients_come_near_the_exact_ones():
    q, k1, k2, v1, v2 = arrays(1, 1, 1, 40, 41, 42, 3, 2, size=0.5)
    dout = np.random.default_rng(5).standard_normal((1, 1, 40, 2))
    exact, apart = backward(q, k1, k2, v1, v2, dout), []
    for degree in (2, 5, 8, 11):
        dq, dks, dvs = tensor.polynomial_backward(q, (k1, k2), (v1, v2), dout, degree=degree)
        apart.append(max(np.abs(g - e).max() for g, e in zip((dq, *dks, *dvs), exact, strict=True)))
    assert all(b < a / 10 for a, b in itertools.pairwise(apart)), apart
    with pytest.raises(InvalidProblem, match=r"dout: got shape \(1, 1, 3, 2\), expected \(1, 1, 40, 2\)"):
        tensor.polynomial_backward(q, (k1, k2), (v1, v2), dout[:, :, :3])
