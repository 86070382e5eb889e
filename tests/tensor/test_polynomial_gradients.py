"""Gradients of the polynomial path: those of the polynomial, and near the exact ones."""

import itertools
import sys

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


@pytest.mark.parametrize("order", [1, 2, 3])
def test_causal_polynomial_gradients_are_those_of_the_polynomial(order, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(sys.modules["refattn.tensor.polynomial"], "MOST_STEPS", 1)
    rng = np.random.default_rng(order)
    shapes = [(20, 3), *[(20, 3)] * order, *[(20, 2)] * order]
    q, *rest = (rng.uniform(-0.8, 0.8, (1, 1, *s)) for s in shapes)
    keys, values, dout = rest[:order], rest[order:], rng.standard_normal((1, 1, 20, 2))
    options = {"scale": 0.5, "degree": 4, "kind": "taylor", "causal": True}
    found = tensor.polynomial_backward(q, keys, values, dout, **options)
    leaves = [torch.tensor(x[0, 0], requires_grad=True) for x in (q, *keys, *values)]
    letters = "jkl"[:order]
    s = torch.einsum(",".join(["id", *(f"{x}d" for x in letters)]) + f"->i{letters}", *leaves[: order + 1]) * 0.5
    for axis in range(1, order + 1):  # a row sees each kind up to its own place
        shape = [1] * (order + 1)
        shape[axis] = 20
        later = torch.arange(20).reshape(shape) > torch.arange(20).reshape([20] + [1] * order)
        s = s.masked_fill(later, -np.inf)
    p = sum(c * torch.where(s == -np.inf, 0.0, s) ** m for m, c in enumerate(coefficients_of("taylor", 4, 1.0)))
    p = torch.where(s == -np.inf, 0.0, p)
    top = torch.einsum(",".join([f"i{letters}", *(f"{x}c" for x in letters)]) + "->ic", p, *leaves[order + 1 :])
    made = top / p.flatten(1).sum(1, keepdim=True)
    np.testing.assert_allclose(
        made.detach(), tensor.polynomial(q, keys, values, **options).out[0, 0], rtol=1e-12, atol=1e-13
    )
    made.backward(torch.tensor(dout[0, 0]))
    for g, leaf in zip((found[0], *found[1], *found[2]), leaves, strict=True):
        np.testing.assert_allclose(g[0, 0], leaf.grad, atol=1e-12)
