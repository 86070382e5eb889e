from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from refattn import (
    Capabilities,
    InvalidInput,
    Model,
    Problem,
    UnsupportedProblem,
    check_kernel,
    check_problem,
    evaluate,
)
from refattn.check.bounds.gradients import gradient_bounds
from refattn.check.bugs.planted import plain
from refattn.check.kernels import declared
from refattn.check.kernels.tiled import gradients, tiled
from refattn.check.model import MODELS, flash, inside_type, model_named, narrowed
from refattn.cli.main import main

from ..conftest import tensor
from .narrow import float8, tf32, to_tf32

CASES = "gaussian/*", "ragged/*", "probe/*", "drift/*", "shifted/*", "extreme/tiny-values*", "law/*"


def judged(kernel, name, dtype, only=CASES):
    able = Capabilities({dtype}, features={"scale", "d_v_differs", "lengths_differ"}, lse=True)
    kernel = declared(kernel, able)
    reports = [check_kernel(kernel, model=MODELS[name], capabilities=able, only=o) for o in only]
    return [c for r in reports for c in r.checks if c.verdict != "unsupported"]


@pytest.mark.parametrize(
    ("kernel", "name", "dtype"),
    [
        (tf32(1), "tf32", "float32"),
        (tf32(3), "tf32x3", "float32"),
        (float8("tensor"), "float8", "bfloat16"),
        (float8("tensor"), "float8", "float16"),
        (float8("block"), "float8-block", "bfloat16"),
    ],
)
def test_a_right_kernel_passes_and_is_predicted(kernel, name, dtype):
    checks = judged(kernel, name, dtype)
    assert len(checks) > 25
    assert [(c.name, c.message) for c in checks if c.verdict == "failed"] == []
    rms = [c.arrays[0].figures.rms for c in checks if c.arrays and c.name.startswith("gaussian")]
    assert 0.5 < np.nanmedian(rms) < 1.1  # nothing is predicted where scores are far apart


@pytest.mark.parametrize(
    ("kernel", "claims", "dtype"),
    [
        (tf32(1), "tf32x3", "float32"),
        (tf32(1), "flash", "float32"),
        (float8("block"), "flash", "bfloat16"),
    ],
)
def test_a_kernel_narrower_than_its_model_fails(kernel, claims, dtype):
    assert any(c.verdict == "failed" for c in judged(kernel, claims, dtype, ["gaussian/*"]))


def test_one_scale_for_all_heads_does_not_pass_for_a_scale_a_block():
    """A head of small values among large ones loses them to the tensor's scale."""
    rng = np.random.default_rng(0)
    q, k, v = (tensor(rng, (1, 2, n, 32), "bfloat16") for n in (37, 67, 67))
    q, v[:, 1] = (4 * q).astype(q.dtype), v[:, 1] * v.dtype.type(2.0**-24)  # peaked rows, each its own
    problem = Problem(q, k, v)
    assert check_problem(float8("tensor"), problem, "scales", model=MODELS["float8"]).passed
    assert check_problem(float8("block"), problem, "scales", model=MODELS["float8-block"]).passed
    assert not check_problem(float8("tensor"), problem, "scales", model=MODELS["float8-block"]).passed


def test_tf32_rounds_to_nearest_even():
    x = np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-12, -1 - 2.0**-11 - 2.0**-20], np.float32)
    assert (to_tf32(x) == np.array([1, 1 + 2.0**-9, 1, -1 - 2.0**-10], np.float32)).all()


def test_names():
    assert model_named("flash")("float16") == flash("float16")
    assert model_named("flash")("float64").accumulator == "float64"
    assert model_named("tf32x3")("float32").passes == 3
    assert narrowed("bfloat16").scales == "tensor"
    with pytest.raises(
        InvalidInput, match="model: got 'fp8', expected one of flash, math, tf32, tf32x3, float8, float"
    ):
        model_named("fp8")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"passes": 2, "operands": "tf32"}, "got passes=2 and scales='', expected 1 or 3"),
        ({"scales": "row", "operands": "float16"}, "scales='row', expected 1 or 3, and '', 'tensor' or 'block'"),
        ({"passes": 3}, "passes and scales are of operands; name their type, e.g. operands='tf32'"),
        ({"scales": "tensor"}, "passes and scales are of operands"),
        ({"operands": "tf32", "passes": 3, "scales": "tensor"}, "operands in three passes are not scaled"),
        ({"operands": "tf33"}, "='tf33', expected one of float64"),
        ({"denominator": "tf33"}, "='tf33', expected one of float64"),
        ({"weights": ""}, "='', expected one of float64"),
        ({"weights": "int8"}, "P in int8 is 0 or 1 without a scale"),
        ({"weights_scale": "head"}, "got weights_scale='head', expected '', 'static', 'row', 'block' or 'micro'"),
        ({"weights": "float4_e2m1fn"}, "P in float4_e2m1fn and weights_scale='micro' go together"),
        ({"weights_scale": "micro"}, "P in float4_e2m1fn and weights_scale='micro' go together"),
        (
            {"weights": "float4_e2m1fn", "weights_scale": "micro", "tile": 24},
            "got tile=24 and stochastic=False with weights_scale='micro', expected a multiple of 16, and False",
        ),
        ({"smoothed_queries": True}, "smoothed_queries goes with smoothed keys"),
        ({"value_sums": "float16", "aligned_bits": 13}, "value_sums is of sums that are rounded one by one"),
        ({"weights": "bfloat16", "weights_scale": "row"}, "weights='bfloat16' is not scaled; float8_e4m3fn"),
        ({"operands": "int8"}, "operands that are integers need scales='tensor' or 'block'"),
        ({"values": "float16"}, "values and smoothed are of operands"),
        ({"smoothed": True, "operands": "int8", "scales": "tensor"}, "smoothed keys are scaled by blocks of rows"),
        ({"stochastic": True, "operands": "tf32", "passes": 3}, "operands in three passes are rounded to nearest"),
        ({"aligned_bits": 3}, "got aligned_bits=3 and fused=16, expected 0, or 8 to 30, and 1 to 1024"),
        ({"promoted": 128}, "got promoted=128, expected 0, or with aligned_bits a multiple of 16"),
        ({"promoted": 100, "aligned_bits": 13}, "got promoted=100, expected 0"),
        ({"aligned_bits": 13, "accumulator": "float16"}, "such units hold their sums in float32"),
        ({"block": 0}, "block=0 and split=0, expected more than 0, three times at least 1, and at least 0"),
    ],
)
def test_a_model_that_cannot_be(fields, text):
    with pytest.raises(InvalidInput, match=text.replace("(", r"\(")):
        Model(**fields)


def test_the_narrow_models():
    named = {n: MODELS[n]("bfloat16") for n in MODELS}
    assert [named[n].aligned_bits for n in ("volta", "ampere", "hopper", "hopper-float8", "sage2")] == [
        23,
        24,
        25,
        13,
        13,
    ]
    assert (named["hopper-float8"].promoted, named["hopper-float8-promoted"].promoted) == (0, 128)
    assert (MODELS["hopper"]("float32").operands, MODELS["hopper"]("float32").fused) == ("tf32", 8)
    assert all(MODELS[n]("float64").aligned_bits == 0 for n in MODELS)
    assert named["flash"].forward_only == ()
    assert named["sage2"].forward_only == ("values", "weights_scale", "smoothed", "aligned_bits", "operands")
    chance = replace(named["flash"], stochastic=True)
    assert (chance.loss("bfloat16"), chance.scatter("bfloat16")) == (2.0**-7, 2 * named["flash"].scatter("bfloat16"))
    assert (named["sage"].loss("int8"), inside_type("int8").round_array(np.array([1.5, -126.6]))[1]) == (0.0, -127)


def test_gradients_have_no_bounds_in_these_models():
    rng = np.random.default_rng(0)
    problem = Problem(*(tensor(rng, (1, 1, 3, 4), "bfloat16") for _ in range(3)))
    answer = evaluate(problem, gradients=problem.value)
    with pytest.raises(UnsupportedProblem, match="gradients: have no bounds for a model with aligned_bits"):
        gradient_bounds(answer, MODELS["hopper"]("bfloat16"), problem.value, {})


def test_the_command_line_names_a_model():
    wide = CliRunner().invoke(main, ["check", "refattn-tiled", "--model", "tf32", "--only", "gaussian/plain[float32]"])
    assert wide.exit_code == 0
    wrong = CliRunner().invoke(main, ["check", "refattn-tiled", "--model", "tf31"])
    assert wrong.exit_code == 2
    assert "model: got 'tf31', expected one of flash" in wrong.stderr


def test_the_plain_kernel_is_within_every_wider_model():
    for name in ("flash", "math", "tf32", "tf32x3"):
        assert all(c.verdict == "passed" for c in judged(plain, name, "float32", ["gaussian/plain[float32]"]))


def test_weights_that_come_from_a_stored_lse():
    """Their sum is 1 but for lse's rounding, which counts where scores are far from 0."""
    rng = np.random.default_rng(0)
    q, k, v = (tensor(rng, (1, 2, 20, 8), "float32") for _ in range(3))
    q, k = q * np.float32(0.01) + np.float32(100), k * np.float32(0.01) + np.float32(100)
    problem = Problem(q, k, 1 + 0 * v, scale=1.0)  # a mean of ones

    def kernel(p):
        s = p.query.astype(np.float64) @ p.key.astype(np.float64).swapaxes(2, 3)
        lse = np.log(np.exp(s - s.max(3, keepdims=True)).sum(3, keepdims=True)) + s.max(3, keepdims=True)
        lse = lse.astype(np.float32)
        out = np.exp(s.astype(np.float32) - lse) @ p.value
        return out.astype(np.float32), lse[..., 0]

    says = flash("float32")
    assert check_problem(kernel, problem, "far", model=says).count("failed") == 1
    assert check_problem(kernel, problem, "far", model=replace(says, from_lse=True)).right


def test_a_denominator_of_rounded_weights():
    rng = np.random.default_rng(0)
    problem = Problem(*(tensor(rng, (2, 4, 60, 32), "bfloat16") for _ in range(3)))
    bfloat16 = problem.query.dtype

    def kernel(p, more=0.0):
        q, k, v = (x.astype(np.float32) for x in (p.query, p.key, p.value))
        s = q @ k.swapaxes(2, 3) * np.float32(32**-0.5)
        top = s.max(3, keepdims=True)
        weights = np.exp(s - top).astype(bfloat16).astype(np.float32)
        z = weights.sum(3, keepdims=True)
        return (weights @ v / z).astype(bfloat16), (top + np.log(z))[..., 0] + np.float32(more)

    says = flash("bfloat16")
    narrow = replace(says, denominator="bfloat16")
    failed = check_problem(kernel, problem, "narrow", model=says)
    assert [w.array for c in failed.failures for w in c.arrays if not w.passed] == ["lse"]
    assert check_problem(kernel, problem, "narrow", model=narrow).right
    assert not check_problem(lambda p: kernel(p, 0.01), problem, "narrow", model=narrow).right


def test_what_a_model_does_not_say_is_not_run():
    """Neither gradients nor what smoothed keys do not go with count against a kernel."""
    kernel = declared(plain, Capabilities({"float32"}, features={"softcap", "scale", "lengths_differ"}, lse=True))
    for only in ("gaussian/softcap", "law/*"):
        found = check_kernel(kernel, model=MODELS["sage"], only=f"{only}*", dtypes=["float32"]).checks
        assert {c.verdict for c in found} <= {"unsupported", "passed"}
    assert any(
        "smoothed keys do not go with softcap" in c.message
        for c in check_kernel(kernel, model=MODELS["sage"], only="gaussian/softcap*", dtypes=["float32"]).checks
    )

    def kernel(p):
        return tiled(p)

    kernel.gradients = gradients
    able = Capabilities({"float32"}, gradients={"dq", "dk", "dv"}, lse=True)
    report = check_kernel(kernel, model=MODELS["hopper"], capabilities=able, only="gaussian/plain*")
    assert "gaussian/plain[float32]" in [c.name for c in report.checks]
    assert not any("gradients" in c.name for c in report.checks)
