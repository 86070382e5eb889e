"""The bound holds for right kernels and is not a thousand times too wide."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import VARIANTS, InvalidInput, Problem, evaluate
from refattn.arrays import from_float64, to_float64
from refattn.check import FEATURES, FURTHER, LAWS, Capabilities, Model, check_kernel, flash, materialised
from refattn.check.bounds.forward import bounds
from refattn.check.bugs.planted import plain
from refattn.check.compare import compare
from refattn.check.kernels.tiled import tiled
from refattn.check.model import GRADIENTS
from refattn.dtypes import FORMATS

from ...conftest import SMALL


@pytest.mark.parametrize("variant", ["softmax", "linear", "power", "sigmoid"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_right_kernel_is_within_its_bound_everywhere(variant, dtype):
    able = Capabilities({dtype}, FEATURES | FURTHER, lse=variant == "softmax")
    model = replace(flash(dtype), split=64 if variant == "softmax" else 0)  # the tiled kernel merges parts of 64 keys
    report = check_kernel(
        plain, variant, model=model, capabilities=able, dtypes=[dtype], only="!calls/*" if dtype == "float32" else SMALL
    )
    assert report.passed, [report.describe(c) for c in report.failures]
    lacking = [c.message.rpartition(" ")[2] for c in report.checks if c.verdict == "unsupported"]
    assert lacking == [LAWS[n].needs for n in VARIANTS[variant].laws if LAWS[n].needs in GRADIENTS]
    assert report.worst(dtype) > 0.05  # the bound is not idle


@given(st.integers(0, 10**6), st.sampled_from(["float32", "bfloat16", "float16"]), st.integers(1, 64))
def test_random_shapes_and_tiles(seed, dtype, tile):
    rng = np.random.default_rng(seed)
    n_q, n_k, d = rng.integers(1, 20), rng.integers(1, 90), rng.integers(1, 40)
    size = 2.0 ** rng.integers(-4, 4)
    form = FORMATS[dtype]
    q, k, v = (from_float64(form.round_array(rng.standard_normal((1, 1, n, d)) * size), dtype) for n in (n_q, n_k, n_k))
    p = Problem(q, k, v, causal=[None, "bottom_right", "top_left"][seed % 3])
    a = evaluate(p, 96)
    limit = bounds(a, Model(weights=dtype, tile=tile))
    out, lse = tiled(p, tile)
    with np.errstate(invalid="ignore"):
        assert (a.enclosures["out"].error(to_float64(out)) <= limit["out"]).all()
        seen = np.isfinite(a.lse)
        assert (np.abs(to_float64(lse) - a.lse) <= limit["lse"])[seen].all()
        assert np.isneginf(lse[~seen]).all()


def test_the_bound_uses_the_row_and_not_a_global_maximum(make):
    """One head with values 64 times smaller has a bound 64 times smaller."""
    p = make(8, 16, 8, h=2)
    value = np.repeat(p.value[:, :1], 2, 1)
    value[:, 1] /= 64
    p = p.replace(query=np.repeat(p.query[:, :1], 2, 1), key=np.repeat(p.key[:, :1], 2, 1), value=value)
    limit = bounds(evaluate(p), flash("float32"))["out"]
    assert np.allclose(limit[:, 0] / limit[:, 1], 64, rtol=1e-6)


def test_a_common_offset_of_the_values_does_not_widen_the_score_part(make):
    """An error in a score moves the output by |v - o|, which an offset leaves as it is."""
    p = make(4, 16, 8, h=1, scale=3.0)
    model = Model(accumulator="float64", weights="float64", scores="bfloat16", lse="float64")
    base = bounds(evaluate(p), model)["out"]
    moved = p.replace(value=p.value + np.float32(4096))
    assert (bounds(evaluate(moved), model)["out"] < base + 4096 * 2.0**-23).all()


def test_rows_without_keys_allow_nothing(make):
    allowed = np.ones((1, 1, 5, 7), bool)
    allowed[..., 1, :] = False
    limit = bounds(evaluate(make(allowed=allowed)), flash("float32"))
    assert (limit["out"][:, :, 1] == 0).all()
    assert (limit["lse"][:, :, 1] == 0).all()
    assert (limit["out"][:, :, 0] > 0).all()


def test_wider_types_have_narrower_bounds(make):
    a = evaluate(make(16, 32, 16))
    order = [
        Model("float64", "float64", "float64", lse="float64"),
        flash("float32"),
        Model(weights="float16"),
        Model(weights="bfloat16"),
        materialised("bfloat16"),
    ]
    limits = [bounds(a, m)["out"] for m in order]
    assert all((x <= y).all() and (x < y).any() for x, y in pairwise(limits))


def test_flushed_subnormals_are_allowed_only_where_declared(make):
    p = make()
    p = p.replace(value=(p.value * np.float32(1e-40)).astype(np.float32))
    a = evaluate(p)
    zero = np.zeros(p.out_shape)
    kept = bounds(a, Model())["out"]
    flushed = bounds(a, Model(subnormals=False))["out"]
    assert (a.enclosures["out"].error(zero) > kept).any()
    assert (a.enclosures["out"].error(zero) <= flushed).all()


def test_a_model_is_checked():
    with pytest.raises(InvalidInput, match="dtype: got 'int8'"):
        Model(weights="int8")
    with pytest.raises(
        InvalidInput, match="model: got exp_ulps=0, tile=16, chain=512, block=128 and split=0, expected more than 0"
    ):
        Model(exp_ulps=0)
    with pytest.raises(InvalidInput, match="capabilities: features has 'rope'"):
        Capabilities(features={"rope"})
    with pytest.raises(InvalidInput, match="capabilities: dtypes has 'int8'"):
        Capabilities({"int8"})


def test_an_output_below_float64_may_be_zero(make):
    """A sink far above the only key: the exact output is e^-1000 or so, and no float64 but 0 is near."""
    p = make(1, 1, 2, h=1, dtype="float64", sink=np.array([1000.0]))
    answer = evaluate(p)
    limit = bounds(answer, flash("float64"))["out"]
    assert (limit > 0).all()
    assert compare("out", np.zeros(p.out_shape), answer, limit, "float64").passed
