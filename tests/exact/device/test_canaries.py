"""A device whose arithmetic is not as the levels take it is refused, with the name of what failed."""

from collections import Counter

import numpy as np
import pytest

import refattn
from refattn import Problem, UnsupportedProblem
from refattn.dtypes import FORMATS
from refattn.exact.device import canaries, card, finish, taken
from refattn.exact.device.card import Card, card_of
from tests.he.device.emulated import GXX

pytestmark = GXX


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Check small products: what stands for a GPU has one way of computing them."""
    monkeypatch.setattr(canaries, "SHAPES", ((24, 32, 40), (32, 16, 64)))


def truncated(a, b, found):
    """Products whose last sum is rounded towards zero."""
    exact_low = a.astype(np.longdouble) @ b.astype(np.longdouble) - found.astype(np.longdouble)
    wrong = np.sign(exact_low) * np.sign(found) < 0
    return np.where(wrong, np.nextafter(found, 0.0), found)


def fixed_point(a, b, found):
    """Products of numbers cut to 60 places below the largest of their row or column."""

    def cut(x, axis):
        unit = np.ldexp(1.0, np.frexp(np.abs(x).max(axis, keepdims=True))[1] - 60)
        return np.rint(x / unit) * unit

    return cut(a, 1) @ cut(b, 0)


def flushed(a, b, found):
    return np.where(np.abs(found) < 2.0**-1022, 0.0, found)


def single(a, b, found):
    return (a.astype(np.float32) @ b.astype(np.float32)).astype(np.float64)


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (single, "exact products"),
        (fixed_point, "small terms"),
        (flushed, "sums to nearest"),
        (truncated, "sums to nearest"),
    ],
)
def test_a_product_that_is_not_float64s_is_refused(stand_in, broken, named):
    with np.errstate(all="ignore"):
        module = stand_in(broken=broken)
        with pytest.raises(UnsupportedProblem, match=f"device: 'cuda:0' is not trusted, the check '{named}' failed"):
            canaries.check(Card(module, 0))


def test_a_product_that_is_off_now_and_then_is_refused(stand_in):
    """Only the bound for sums in any order sees an error in sums that are not checked exactly."""

    def broken(a, b, found):
        return found + 2.0**-40 if (a % 1 != 0).mean() > 0.9 else found

    with pytest.raises(UnsupportedProblem, match="the check 'sums in any order' failed"):
        canaries.check(Card(stand_in(broken=broken), 0))


@pytest.mark.parametrize(
    ("named", "right", "wrong"),
    [
        ("rounding", "x = rint(", "x = floor("),
        ("rounding", "least = whole ? h : nextafter(least, -infinite())", "least = h"),
        ("narrow types", "* up;", "* (size >> fraction ? up : 0.0);"),  # subnormal numbers are flushed
        ("narrow types", ">> (52 - fraction);", ">> (52 - fraction); size = size >> fraction ? size : 0;"),
    ],
)
def test_a_rounding_that_is_not_the_cpus_is_refused(stand_in, monkeypatch, named, right, wrong):
    text = finish.text_finish
    assert right in text(0)
    monkeypatch.setattr(finish, "text_finish", lambda level: text(level).replace(right, wrong))
    with pytest.raises(UnsupportedProblem, match=f"the check '{named}' failed"):
        canaries.check(Card(stand_in(), 0))


def test_emulation_that_is_switched_on_is_refused(stand_in, monkeypatch):
    module = stand_in()
    monkeypatch.setenv("CUBLAS_EMULATE_DOUBLE_PRECISION", "1")
    with pytest.raises(
        UnsupportedProblem, match=r"the check 'native float64' failed .*CUBLAS_EMULATE_DOUBLE_PRECISION"
    ):
        canaries.check(Card(module, 0))
    monkeypatch.delenv("CUBLAS_EMULATE_DOUBLE_PRECISION")
    with pytest.raises(UnsupportedProblem, match="the check 'native float64' failed"):
        canaries.check(Card(stand_in(mode=8), 0))


def test_steps_that_are_fused_are_refused(stand_in, monkeypatch):
    text = card.text_of
    fused = text(0).replace("in[1] * in[2] + in[3]", "fma(in[1], in[2], in[3])")
    assert fused != text(0)
    module = stand_in()
    monkeypatch.setattr(card, "text_of", lambda level: fused)
    with pytest.raises(UnsupportedProblem, match="the check 'steps' failed"):
        canaries.check(Card(module, 0))


def test_array_functions_of_other_bits_are_refused(stand_in, monkeypatch):
    from .cupys_part import Array

    ufunc = Array.__array_ufunc__

    def broken(self, function, method, *inputs, **more):
        found = ufunc(self, function, method, *inputs, **more)
        return Array(np.nextafter(found.a, 0.0)) if function is np.sqrt else found

    monkeypatch.setattr(Array, "__array_ufunc__", broken)
    with pytest.raises(UnsupportedProblem, match="the check 'elementwise' failed"):
        canaries.check(Card(stand_in(), 0))


def test_what_is_not_broken_is_trusted_once(stand_in):
    module = stand_in()
    assert card_of(0) is card_of(0)
    narrow = len(taken.KERNELS_KNOW)
    launched = {"trusted": 1, "settle": len(FORMATS), "widen": narrow, "narrow": narrow}
    assert Counter(name for name, _ in module.seen.launched) == launched


def test_every_check_has_its_reason():
    assert all(check.__doc__ for check in canaries.CHECKS.values())


def test_an_old_device_is_refused(stand_in):
    stand_in(capability="75")
    with pytest.raises(UnsupportedProblem, match=r"'cuda:0' has compute capability 7.5, expected 8.0 or more"):
        card_of(0)


def test_a_device_that_is_not_there_is_refused(stand_in):
    p = Problem(*(np.ones((1, 1, 2, 2)) for _ in range(3)))
    stand_in(gpus=2)
    with pytest.raises(UnsupportedProblem, match=r"device: got 'cuda:2', this machine has 2 GPU"):
        refattn.evaluate(p, rounding="float64", device="cuda:2")
