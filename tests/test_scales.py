"""Scales and types: the exact answer is of the values that the bytes mean."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from refattn import (
    VARIANTS,
    Capabilities,
    InvalidInput,
    InvalidProblem,
    Problem,
    UnsupportedProblem,
    check_kernel,
    check_problem,
    evaluate,
    load_problem,
    reference,
    save_problem,
)
from refattn.check.bounds.expected import expected
from refattn.check.bugs.planted import planted
from refattn.check.bugs.typed import TYPE_BUGS
from refattn.check.inputs.draw import Draw
from refattn.check.inputs.typed import TYPED
from refattn.check.kernels.tiled import tiled
from refattn.check.model import FEATURES, FURTHER, flash
from refattn.dtypes import ELEMENTS, FLOAT4, FORMATS
from refattn.scales import dequantised, quantised, spread, values

ABLE = Capabilities({"float32", "bfloat16"}, FEATURES | FURTHER, lse=True, elements=frozenset(ELEMENTS))
KINDS = [
    ("float4_e2m1fn", "float8_e8m0fnu", (2, 1, 4, 2)),
    ("float4_e2m1fn", "float8_e4m3fn", (1, 2, 4, 1)),
    ("int8", "float32", (2, 2, 2, 1)),
    ("float8_e4m3fn", "float32", (1, 1, 1, 1)),
    ("bfloat16", "bfloat16", (1, 2, 1, 8)),
]


def stored(elements, scales, blocks, seed=0):
    x = np.random.default_rng(seed).standard_normal((2, 2, 4, 8)) * 3
    return x, *quantised(x, elements, blocks, scales)


@pytest.mark.parametrize(("elements", "scales", "blocks"), KINDS)
def test_values_are_elements_times_their_scale(elements, scales, blocks):
    x, q, scale = stored(elements, scales, blocks)
    got = values(Problem(q, q, q, key_scale=scale, out_dtype="float32"), "key")
    for at in np.ndindex(*x.shape):
        of = tuple(i // (n // m) for i, n, m in zip(at, x.shape, blocks, strict=True))
        assert Fraction(float(got[at])) == Fraction(float(q[at])) * Fraction(float(scale[of]))
    # float8 rounds by 2**-4 of a number; a power of two leaves numbers below 8 of float4's, which has 6: 2 are lost
    assert (np.abs(got - x) <= np.maximum(spread(scale.astype(float), x.shape) * 2, 2.0**-4 * np.abs(x))).all()


def test_float4_is_what_ml_dtypes_says():
    every = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    assert sorted(set(np.abs(every))) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for x in np.linspace(-6, 6, 97):
        assert FLOAT4.round(float(x)) == float(np.float32(x).astype(ml_dtypes.float4_e2m1fn))


@pytest.mark.parametrize(("elements", "scales", "blocks"), KINDS)
def test_the_answer_is_that_of_the_values(elements, scales, blocks):
    _, q, s = stored(elements, scales, blocks)
    p = Problem(q, q, q, query_scale=s, key_scale=s, value_scale=s, out_dtype="bfloat16", causal="bottom_right")
    x = values(p, "key")
    dout = np.ones(x.shape)
    for how in ("float64", None):
        one = evaluate(p, rounding=how, gradients=dout)
        two = evaluate(Problem(x, x, x, causal="bottom_right"), rounding=how, gradients=dout)
        for name, a in one.values.items():
            assert a.tobytes() == two.values[name].tobytes(), name
    assert reference(p)["out"].shape == x.shape


def test_out_holds_the_output_divided_by_its_scale(make):
    p = make(5, 300, b=2, h=4, h_kv=2)  # so many keys are streamed
    by = np.array([0.5, 3.0, 0.25, 7.0], np.float32).reshape(1, 4, 1, 1)
    whole, part = evaluate(p), evaluate(p.replace(out_scale=by))
    for x, name in ((evaluate(p.replace(out_scale=by), rounding="float64"), "levels"), (part, "balls")):
        # the quotient of a rounded output is off by a rounding of each
        assert (np.abs(x.out * by - whole.out) <= 3 * 2.0**-53 * np.abs(whole.out)).all(), name
    assert (part.lse == whole.lse).all()
    dout = np.ones(p.out_shape, np.float32)
    by_two = p.replace(out_scale=2.0)
    grads = [evaluate(x, gradients=dout, rounding="float64").values["dv"] for x in (p, by_two)]
    assert (grads[0] == 2 * grads[1]).all()


def test_scales_that_float64_holds_no_product_of(make):
    p = make(5, 7, key_scale=0.1)
    with pytest.raises(InvalidProblem, match=r"key_scale: has 5\d bits, key's elements 24, and float64 holds no"):
        evaluate(p)
    assert evaluate(p.replace(key_scale=float(np.float32(0.1)))).out.shape == p.out_shape
    assert evaluate(p.replace(key_scale=2.0**-30)).out.shape == p.out_shape


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((np.ones((1, 1, 1, 1)), "float3", (1, 1, 1, 1)), "elements: got 'float3', expected one of"),
        ((np.ones((1, 1, 1, 1)), "int8", (1, 1, 1, 1), "float3"), "scales: got 'float3', expected one of"),
        ((np.full((1, 1, 1, 1), np.nan), "int8", (1, 1, 1, 1)), "x: has numbers that are not finite"),
    ],
)
def test_what_cannot_be_quantised_is_said(given, text):
    with pytest.raises(InvalidInput, match=text):
        quantised(*given)


@pytest.mark.parametrize(("number", "scale"), [(1e300, 2.0**900), (1e-300, 2.0**-900), (3e-308, 0.25)])
def test_products_that_leave_float64_are_refused(number, scale):
    q = np.ones((1, 1, 1, 1))
    p = Problem(q, q, q * number, value_scale=scale, out_scale=scale)
    with pytest.raises(InvalidProblem, match=r"value_scale: value at \(0, 0, 0, 0\) is .* it leaves float64's range"):
        evaluate(p, rounding="float64")
    assert evaluate(p.replace(value_scale=1.0, out_scale=1.0), rounding="float64").out == number


@pytest.mark.parametrize("x", ["torch", "jax"])
def test_other_libraries(x, make):
    if x == "jax":
        pytest.importorskip("jax")
    p = make(5, 7)
    key, scale = quantised(p.key.astype(float), "float8_e4m3fn", (1, 2, 1, 1))
    p = p.replace(key=key, key_scale=scale, out_dtype="float32")
    moved = p.to(x)
    assert evaluate(moved, rounding="float32").out.tobytes() == evaluate(p, rounding="float32").out.tobytes()
    if x == "torch":
        assert moved.key.dtype == torch.float8_e4m3fn
        four, one = quantised(np.ones((1, 2, 7, 8)), "float4_e2m1fn", (1, 1, 1, 1))
        with pytest.raises(InvalidInput, match="torch: has no float4_e2m1fn of one element a byte"):
            p.replace(key=four, key_scale=one).to("torch")


@pytest.mark.parametrize(("elements", "scales", "blocks"), KINDS)
def test_files_keep_them(elements, scales, blocks, tmp_path):
    _, q, s = stored(elements, scales, blocks)
    p = Problem(q, q, q, key_scale=s, query_scale=0.5, out_dtype="bfloat16", offset=2, lengths_k=np.array([3, 4]))
    save_problem(p, tmp_path / "p.npz")
    again = load_problem(tmp_path / "p.npz")
    assert again.settings() == p.settings()
    for name, x in p.arrays().items():
        assert again.arrays()[name].dtype == x.dtype
        assert again.arrays()[name].tobytes() == x.tobytes()


def test_a_call_without_types_is_left_alone(make):
    p = make(5, 7)
    assert dequantised(p) is p
    typed = p.replace(key_scale=2.0)
    assert dequantised(dequantised(typed)) is not typed
    twice = dequantised(typed)
    assert dequantised(twice) is twice
    assert twice.out_type == "float32"


@pytest.mark.parametrize("label", TYPED)
def test_a_right_kernel_passes(label):
    report = check_kernel(tiled, capabilities=ABLE, only=f"types/{label}")
    assert report.passed, report.failures
    assert report.count("passed") == (1 if label == "out-float8" else 2)


@pytest.mark.parametrize(
    "bug",
    ["key_scale_ignored", "value_scale_ignored", "out_scale_ignored", "scale_of_next_head", "scale_of_next_token",
     "scale_of_next_channel"],
)  # fmt: skip
def test_a_bug_is_caught_in_quick(bug):
    asked = {"capabilities": ABLE, "dtypes": ["float32"], "budget": "quick", "only": "types/*"}
    assert check_kernel(planted(bug), **asked).count("failed")


OF_BLOCKS = {
    "mxfp8": {"block_scale_of_next", "block_scale_of_first", "blocks_of_32_read_as_16", "scale_exponent_off_by_one"},
    "mxfp4": {"block_scale_of_next", "block_scale_of_first", "blocks_of_32_read_as_16", "scale_exponent_off_by_one"}
    | {"nibbles_of_keys_swapped", "nibbles_of_values_swapped"},
    "nvfp4": {"block_scale_of_next", "block_scale_of_first", "blocks_of_16_read_as_32", "tensor_scale_lost"}
    | {"tensor_scale_twice", "nibbles_of_keys_swapped", "nibbles_of_values_swapped"},
    "float8-by-head": set(),
}
OF_QUERIES = {n for n in TYPE_BUGS if n.startswith("query_scale")}
"""Each of these shows in every call of the table."""


@pytest.mark.parametrize("label", OF_BLOCKS)
def test_bugs_of_narrow_types_show_in_quick(label):
    """Out or lse is past its bound; the other edits leave the call as it is."""
    assert f"types/{label}" in VARIANTS["softmax"].quick
    p = TYPED[label][0](Draw(FORMATS["float32"], np.random.default_rng(0), "softmax"))
    known, right = expected(p, flash("float32")), tiled(p)
    wrong = OF_BLOCKS[label] | OF_QUERIES
    for bug in TYPE_BUGS:
        got = planted(bug)(p)
        if bug in wrong:
            e, limit = known.answer.enclosures, known.allowed
            pairs = zip(("out", "lse"), got, strict=True)
            assert any((e[n].least_error(x.astype(float)) > limit[n]).any() for n, x in pairs), bug
        else:
            assert all((x == y).all() for x, y in zip(got, right, strict=True)), bug


def test_every_bug_of_types_shows_somewhere():
    assert set.union(*OF_BLOCKS.values()) | OF_QUERIES | {"scale_clamped"} == set(TYPE_BUGS)


def test_a_kernel_that_knows_no_types_is_not_asked_for_them():
    def plain(p):
        return tiled(Problem(p.query, p.key, p.value, scale=p.scale))

    checks = check_kernel(plain, only="types/*").checks
    assert {c.verdict for c in checks} <= {"unsupported", "unread"}


def test_gradients_are_not_judged(make):
    p = make(5, 7, key_scale=2.0)

    def kernel(p):
        return tiled(p)

    kernel.gradients = lambda p, dout: {"dq": np.zeros_like(p.query)}
    report = check_problem(kernel, p, "x", gradients=np.ones(p.out_shape, np.float32))
    assert report.checks[1].verdict == "unsupported"
    assert "have no bounds where types or scales are given" in report.checks[1].message
    assert not issubclass(UnsupportedProblem, InvalidProblem)


def test_blocks_of_quantised():
    with pytest.raises(InvalidInput, match=r"blocks: got \(1, 1, 3, 1\), expected four integers that divide"):
        quantised(np.ones((1, 1, 4, 2)), "int8", (1, 1, 3, 1))
    q, s = quantised(np.zeros((1, 1, 4, 2)), "float4_e2m1fn", (1, 1, 4, 1), "float8_e4m3fn")
    assert (s.astype(float) > 0).all()
    assert not q.astype(float).any()
