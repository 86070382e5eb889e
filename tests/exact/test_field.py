import flint
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import UnsupportedProblem
from refattn.exact.field import Field, _prime, _square_part

floats = st.floats(min_value=-1e6, max_value=1e6, width=32)


def test_the_prime_is_safe_and_has_the_roots():
    p = _prime()
    assert flint.fmpz(p).is_probable_prime()
    assert flint.fmpz((p - 1) // 2).is_probable_prime()
    assert p.bit_length() == 505
    for d in range(1, 257):
        root = Field(d).root
        assert root * root % p == _square_part(d)[1] % p


def test_generators_have_prime_order():
    f = Field(2)
    for g in (f.x, f.y):
        assert g != 1
        assert pow(g, f.q, f.p) == 1
    assert f.x != f.y


@given(st.lists(floats, min_size=4, max_size=4), st.sampled_from([1, 2, 3, 12, 64, 96, 128]))
def test_exponentials_add(xs, width):
    f = Field(width)
    scale = f.rsqrt(width)
    a, b = (f.array(np.array([[x, y]])) * scale for x, y in (xs[:2], xs[2:]))
    left, right = a.exp() * b.exp(), (a + b).exp()
    assert (left.image == right.image).all()
    assert ((a.exp() * (-a).exp()).image == 1).all()


@given(floats, floats, floats)
def test_arithmetic_is_a_ring_homomorphism(x, y, z):
    f = Field(5)
    a, b, c = (f.number(v) * f.rsqrt(5) + f.number(1) for v in (x, y, z))
    assert ((a + b) * c - a * c - b * c).is_zero().all()
    assert (a / b * b - a).is_zero().all() or b.is_zero().any()
    exact_a, exact_b = (a * b).exact
    assert f._image(exact_a[0, 0], exact_b[0, 0]) == (a * b).image[0, 0]


def test_the_surd_is_irrational_to_it():
    f = Field(2)
    root = f.rsqrt(2)
    assert ((root * root) * f.number(2) - f.number(1)).is_zero().all()
    assert not (root - f.number(0.7071067811865476)).is_zero().any()
    assert not (root.exp() - f.number(0.7071067811865476).exp()).is_zero().any()


def test_functions_without_an_image_are_refused_or_stood_in_for():
    f = Field(4)
    x = f.array(np.array([[0.5, -0.5, 0.0]]))
    t = x.tanh()
    assert (t.image[0, 0] + t.image[0, 1]) % f.p == 0
    assert t.image[0, 2] == 0
    assert f.number(1).log().is_zero().all()
    with pytest.raises(UnsupportedProblem, match="the largest score is not known in the field"):
        x.absmax(np.ones((1, 3), bool))
    with pytest.raises(UnsupportedProblem, match="the sign of this number is not known"):
        x.exp().relu()
    with pytest.raises(ZeroDivisionError):
        x / f.number(0)
    assert x.relu().is_zero().tolist() == [[False, True, True]]


def test_a_width_with_a_large_prime_is_refused():
    p = _prime()
    width = next(n for n in (263, 269, 271, 277, 281) if pow(n, (p - 1) // 2, p) != 1)
    with pytest.raises(UnsupportedProblem, match=f"widths whose prime factors are at most 257, got {width}"):
        Field(width)
