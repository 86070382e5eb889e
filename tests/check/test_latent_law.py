"""Latent attention's two ways: equal images in a prime field, forward and gradients; kernels by the law."""

from dataclasses import replace

import numpy as np
import pytest

from refattn import Capabilities, Problem, check_kernel
from refattn.check.bugs.planted import planted
from refattn.check.kernels.tiled import gradients, tiled
from refattn.check.latent_law import Latent
from refattn.check.model import FEATURES, GRADIENTS
from refattn.exact.field import Field
from refattn.exact.run import Work

ABLE = Capabilities({"float32"}, lse=True, gradients=GRADIENTS)
SMALL = Latent.drawn(2, 2, 2, 4, (4, 2, 3, 6))
DOUT = np.random.default_rng(0).integers(-2, 3, (2, 2, 2, 3)).astype(float)


def images(tensors, dout, f, **more):
    """The call's numbers in the field; none of them is a proof by chance."""
    found = Work(Problem(*tensors, causal="bottom_right", **more), dout).run(f)
    return {n: np.vectorize(lambda z: int(z) % f.p, otypes=[object])(x) for n, x in found.items() if n != "lse"}


@pytest.mark.parametrize("scale", [0.5, -0.25])
def test_both_ways_have_equal_images(scale):
    f = Field(1)
    one = images(SMALL.absorbed(), SMALL.arriving(DOUT), f, scale=scale)
    two = images(SMALL.expanded(), DOUT, f, scale=scale)
    assert ((SMALL.projected(one["out"]) - two["out"]) % f.p == 0).all()
    mine = SMALL.of_absorbed(*(one[n] for n in ("dq", "dk", "dv")))
    theirs = SMALL.of_expanded(*(two[n] for n in ("dq", "dk", "dv")))
    for x, y in zip(mine, theirs, strict=True):
        assert x.shape == y.shape
        assert ((x - y) % f.p == 0).all()
        assert (x % f.p != 0).any()


@pytest.mark.parametrize(
    "change",
    [
        {"w_uv": SMALL.w_uv[::-1].copy()},  # the next head's values
        {"w_uk": -SMALL.w_uk},
        {"key_rope": 2 * SMALL.key_rope},
    ],
)
def test_another_way_has_other_images(change):
    f = Field(1)
    one, wrong = images(SMALL.absorbed(), None, f, scale=0.5), replace(SMALL, **change)
    two = images(wrong.expanded(), None, f, scale=0.5)
    assert ((SMALL.projected(one["out"]) - two["out"]) % f.p != 0).any()


def judged(kernel, able=ABLE, dtype="float32"):
    (check,) = check_kernel(kernel, only=f"law/latent_expanded[{dtype}]", capabilities=able, dtypes=[dtype]).checks
    return check


def test_right_kernels_keep_it_in_every_format():
    for dtype in ("float64", "float16", "float8_e5m2"):
        able = replace(ABLE, dtypes=frozenset({dtype}), gradients=frozenset())
        check = judged(lambda p: (tiled(p)[0].astype(p.query.dtype), tiled(p)[1]), able, dtype)
        assert check.verdict == "passed", check.message
    only = replace(
        ABLE, head_dims=frozenset({576, 512})
    )  # a kernel of latents alone: the exact answer stands beside it
    assert judged(tiled, only).verdict == "passed"
    assert judged(tiled, replace(ABLE, features=FEATURES - {"d_v_differs"})).verdict == "unsupported"
    assert judged(tiled, replace(ABLE, d_max=256)).message.endswith("dim 576")


def with_gradients(change):
    def kernel(p):
        return tiled(p)

    kernel.gradients = lambda p, dout: change(p, gradients(p, dout))
    return kernel


def test_wrong_kernels_do_not():
    check = judged(planted("scale_of_latent_width"))
    assert check.verdict == "failed"
    assert "the call over a latent differs from that over each head's own keys and values" in check.message
    only = replace(ABLE, head_dims=frozenset({576, 512}))
    assert judged(planted("scale_of_latent_width"), only).verdict == "failed"

    def value_alone(p, found):
        """Forgets that the value is a part of the key: adds dv to dk itself, which the caller does again."""
        return found | ({"dk": found["dk"] + np.pad(found["dv"], [(0, 0)] * 3 + [(0, 64)])} if p.d_k == 576 else {})

    def heads_forgotten(p, found):
        return found | ({"dk": found["dk"] / 2} if p.heads_kv == 1 else {})

    assert judged(with_gradients(lambda p, found: found)).verdict == "passed"
    for change in (value_alone, heads_forgotten):
        check = judged(with_gradients(change))
        assert check.verdict == "failed"
        assert "in what becomes of dk" in check.message
