"""The bound holds for right kernels and is not a thousand times too wide."""

import importlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import VARIANTS, InvalidInput, Problem, evaluate
from refattn.arrays import from_float64, to_float64
from refattn.check import FEATURES, FURTHER, LAWS, Capabilities, Model, check_kernel, flash, materialised
from refattn.check.bounds.forward import bounds, forward, head_losses
from refattn.check.bounds.graph import Graph
from refattn.check.bounds.operands import Operands
from refattn.check.bugs.planted import plain
from refattn.check.compare import compare
from refattn.check.kernels.tiled import tiled
from refattn.check.model import GRADIENTS, C
from refattn.dtypes import ELEMENTS, FORMATS
from refattn.exact.heads import heads
from refattn.exact.tape import parents_first

from ...conftest import NIGHTLY, SMALL

module = importlib.import_module("refattn.check.bounds.forward")


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("softmax", d) for d in ("float16", "float64")]
    + [(v, d) for v in ("linear", "power", "sigmoid") for d in ("float32", "bfloat16")],
)
def test_a_right_kernel_is_within_its_bound_everywhere(variant, dtype):
    able = Capabilities({dtype}, FEATURES | FURTHER, lse=variant == "softmax", elements=ELEMENTS)
    model = replace(flash(dtype), split=64 if variant == "softmax" else 0)  # the tiled kernel merges parts of 64 keys
    # softmax in float32 and bfloat16, and longer calls: tests/check/kernels/test_kernels.py
    whole = variant == "softmax" or dtype == "float32" or NIGHTLY  # in bfloat16 laws and masks are the same
    only = SMALL if whole else "gaussian/*"
    report = check_kernel(plain, variant, model=model, capabilities=able, dtypes=[dtype], only=only)
    assert report.passed, [report.describe(c) for c in report.failures]
    lacking = [c.message.rpartition(" ")[2] for c in report.checks if c.verdict == "unsupported"]
    laws = [LAWS[n].needs for n in VARIANTS[variant].laws if LAWS[n].needs in {*GRADIENTS, "dlse", "row_invariant"}]
    assert lacking == (laws if whole else [])
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
    with pytest.raises(InvalidInput, match="model: P in int8 is 0 or 1 without a scale; give"):
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


COARSE = Model("float16", "float8_e5m2", "bfloat16", lse="bfloat16", tile=2, chain=2)
U, TINY, TINY_W, CU = 2.0**-11, 2.0**-25, 2.0**-17, C * 2.0**-22
MODELS = {
    "coarse": COARSE,
    "split": replace(COARSE, split=3),
    "flushed": replace(COARSE, subnormals=False),
    "rounded": replace(COARSE, denominator="bfloat16", operands="bfloat16"),
    "from lse": replace(COARSE, from_lse=True),
    "wild": replace(COARSE, scores="float8_e5m2"),  # the hull and the largest value are all that bounds it
}
CALLS = {
    "plain": ("softmax", {}),
    "everything": ("softmax", {"softcap": 2.0, "causal": "bottom_right", "sink": np.array([0.5, -1.0])}),
    "linear": ("linear", {"causal": "bottom_right"}),
    "identity": ("linear", {"options": {"feature": "identity", "normalize": False}}),
    "sigmoid": ("sigmoid", {}),
    "power": ("power", {"options": {"epsilon": 1.0}}),
}


def close(got, wanted):
    """Fewer than 2**10 operations on numbers that are not negative, each off by 2**-53; the hull's sides by more."""
    return bool(((np.abs(got - wanted) <= 2.0**-40 * np.abs(wanted)) | (np.isnan(got) & np.isnan(wanted))).all())


def joints_of(head, node, columns):
    """A row's and a column's sums over keys of what each joint loses, by whether the weights are made from it."""
    graph, moved, rest, var = Graph([x.node for x in (head.out, head.lse) if x is not None]), 0.0, 0.0, 0.0
    by = None
    for joint, g, parts in graph.joints(node, columns):
        err, spread = (np.broadcast_to(x, joint.a.shape) for x in joint.flow)
        lost = (np.abs(g) * err).sum(2).T
        var = var + (g**2 * spread).sum(2).T
        if joint is head.weights or joint.above(head.weights):
            moved = moved + lost
        else:
            rest = rest + lost
        for product, alone in parts if joint is head.weights else ():
            rest = rest + (np.maximum(np.abs(alone), np.abs(g)) * product.cast[0]).sum(2).T
            var = var + (alone**2 * product.cast[1]).sum(2).T + (alone * product.cast[2]).sum(2).T ** 2
            size = head.f.model.split or g.shape[2]
            by = np.array([(g * joint.a)[:, :, i : i + size].sum(2).T for i in range(0, g.shape[2], size)])
    flow = node.flow
    return moved, rest + flow[0], var + flow[1], by


def written_out(one, o, model):
    """The bound of out and its variance, their own ulps apart."""
    head = head_losses(one, slice(None), model)
    node, lost = head.out.node, head.lost_values
    moved, rest, var, by = joints_of(head, node, o.shape[1])
    parts = model.merges(one.k.shape[0], one.sink is not None) if head.lse is not None else 0
    if parts > 1:
        squares = (by**2).sum(0) + (by.sum(0) ** 2 if one.sink is not None else 0.0)
        var = var + CU * (2 * head.lse.a**2 + 2) * squares
    total = moved + rest
    if node.amplify is not None:
        floors = [TINY, TINY_W] if model.subnormals else [2.0**-14] * 2
        seen, v, most, hull = one.allowed, np.abs(one.v) + lost, np.zeros_like(o), np.zeros_like(o)
        for i, c in np.ndindex(*o.shape):
            at = seen[i]
            hull[i, c] = max(*np.abs(one.v[at, c] - o[i, c]), abs(o[i, c]) if "more" in node.marks else 0.0)
            relative = np.broadcast_to(node.relative, (len(o), 1))[i, 0] + 2 * U + 2.0**-3
            under = sum(floors) * v[at, c].sum() + floors[0] * at.sum()
            under = under if "shifted" in head.weights.marks else under * (node.amplify / np.abs(head.divided))[i, 0]
            most[i, c] = relative * v[at, c].max() + under + lost[at, c].max()
        total = np.minimum(moved * node.amplify, hull) + np.minimum(rest * node.amplify, most + node.err)
        total = total * (1 + U)
    tiny, normal = (TINY, 0.0) if model.subnormals else (2.0**-14, 2.0**-14)
    return total * (1 + U) + U * np.abs(o) + tiny + normal, var, head


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("asked", CALLS)
def test_every_outputs_bound_is_the_proofs(make, asked, name):
    variant, more = CALLS[asked]
    p, model = make(5, 7, 4, d_v=3, dtype="float16", variant=variant, **more), MODELS[name]
    p = p.replace(value=p.value + np.float16(4)) if name == "wild" else p  # outputs larger than the values' hull
    answer = evaluate(p)
    limit, variance = forward(answer, model)
    for one in heads(p):
        o = answer.enclosures["out"].mid[0, one.head]
        total, var, head = written_out(one, o, model)
        assert close(limit["out"][0, one.head], total)
        ulp = np.exp2(np.maximum(np.floor(np.log2(np.abs(o))), -14) - 10)
        assert close(variance["out"][0, one.head], var + ulp**2 / 12)
        if head.lse is None:
            continue
        node, size = head.lse.node, np.abs(head.lse.a)
        graph = list(Graph([head.out.node, node]).joints(node, 1))
        lost, var = ((x + sum((np.abs(g[0]) ** n * j.flow[n - 1]).sum(1) for j, g, _ in graph)[:, None]) for n, x in (
            (1, node.flow[0]), (2, node.flow[1])
        ))  # fmt: skip
        lost = lost + 2.0**-8 * size + (2.0**-134 if model.subnormals else 2.0**-126)
        assert close(limit["lse"][0, one.head], lost[:, 0])
        ulp = np.exp2(np.floor(np.log2(size)) - 7)
        assert close(variance["lse"][0, one.head], (var + ulp**2 / 12)[:, 0])


def test_what_merging_adds(make):
    """Three parts of three keys at most and the sink's."""
    sink = np.array([0.5, -1.0])
    (one, _) = heads(make(5, 7, 4, dtype="float16", sink=sink))
    without = head_losses(one, slice(None), COARSE)
    w, o, lse, v = without.weights.a, np.abs(without.out.a), np.abs(without.lse.a), np.abs(one.v)
    each, mean = U * (2 * lse + 3 + 4), without.shares @ v
    for changed, parts, weights, out, var, of_lse, var_lse in (
        ({"split": 3}, 4, 3 * each * w, 3 * U * (lse + 2) * o, CU * (3 * lse**2 + 16) * o**2, 0.0, 0.0),
        ({"from_lse": True}, 0, 0.0, each * mean, CU * (2 * lse**2 + 4) * o**2, 0.0, 0.0),
        ({"denominator": "bfloat16"}, 0, 0.0, mean / 256, C / 2**16 * o**2, 1 / 255, C / 2**16),
    ):
        found = head_losses(one, slice(None), replace(COARSE, **changed))
        assert close(found.weights.err, without.weights.err + weights)
        assert close(found.weights.span, without.weights.span + weights)
        assert close(found.out.node.err, without.out.node.err + out)
        assert close(found.out.node.var, without.out.node.var + var)
        assert close(found.lse.node.err, without.lse.node.err + of_lse + parts * each)
        assert close(found.lse.node.var, without.lse.node.var + var_lse + CU * (parts + parts**2) * lse**2)


def test_what_a_definitions_losses_say_of_it(make):
    p = make(5, 7, 4, dtype="float16", causal="bottom_right")
    one, model = next(heads(p)), COARSE
    head = head_losses(one, slice(None), model)
    s = np.where(one.allowed, one.q @ one.k.T / 2, -np.inf)
    assert head.divides
    assert close(head.shares, np.exp(s) / np.exp(s).sum(1, keepdims=True))
    assert (head.divided == head.weights.a.sum(1, keepdims=True)).all()
    assert (head.score_errors == head.weights.links[0].parent.span).all()
    Graph([head.out.node, head.lse.node])
    seen = one.allowed
    assert close(head.score_variances[seen], head.weights.flow[1][seen] / head.weights.a[seen] ** 2)
    assert (head.score_variances[~seen] == 0).all()
    rows = np.array([1, 3])
    assert (head_losses(one, rows, model).out.a == head.out.a[rows]).all()
    assert (head_losses(one, rows, model, 0.5).out.a == head.out.a[rows] / 2).all()
    one = next(heads(p.replace(variant="linear", options={"normalize": False})))
    head = head_losses(one, slice(None), model)
    assert (head.divides, head.divided, head.lse) == (False, 1.0, None)
    assert (head.shares == head.weights.a).all()


def test_operands_go_in_with_what_they_lose(make):
    model, unit = MODELS["rounded"], 0.5
    (one, _) = heads(make(5, 7, 4, dtype="float16"))
    head, lost, rows = head_losses(one, np.array([1, 3]), model, unit), Operands.of(one, model), [1, 3]
    leaves = {n.axes: n for n in parents_first([head.out.node], lambda n: [x.parent for x in n.links]) if not n.links}
    for axes, a, err, var in (
        (("q", "d"), one.q[rows], lost.q[rows], lost.var_q[rows]),
        (("k", "d"), one.k, lost.k, lost.var_k),
        (("k", "v"), one.v * unit, lost.v * unit, lost.var_v * unit**2),
    ):
        n = leaves[axes]
        assert (err > 0).any()
        assert ((n.a == a) & (n.err == err) & (n.var == var)).all()
    assert (head.lost_values == lost.v * unit).all()


def test_the_largest_float64_values_are_bounded_in_smaller_units(make):
    p = make(3, 5, 4, dtype="float64")
    limit, moved = (bounds(evaluate(p.replace(value=p.value * 2.0**n)), flash("float64"))["out"] for n in (0, 1000))
    assert (moved == limit * 2.0**1000).all()


def test_an_infinite_value_is_set_aside(make):
    p = make(5, 7, 4)
    value = p.value.copy()
    value[0, 0, 2, 1] = 0
    without = bounds(evaluate(p.replace(value=value)), flash("float32"))["out"]
    value = value.copy()
    value[0, 0, 2, 1] = np.inf
    limit = bounds(evaluate(p.replace(value=value)), flash("float32"))["out"]
    assert np.isfinite(limit).all()
    assert (limit[..., [0, 2, 3]] == without[..., [0, 2, 3]]).all()


def test_rows_at_a_time_change_nothing(make, monkeypatch):
    p = make(5, 7, 4, sink=np.array([0.5, -1.0]))
    answer = evaluate(p)
    whole = forward(answer, flash("float32"))
    monkeypatch.setattr(module, "CHUNK", 7 * 4 * 2)
    for x, y in zip(whole, forward(answer, flash("float32")), strict=True):
        assert all(close(y[n], x[n]) for n in ("out", "lse"))


def test_a_row_that_sees_its_sink_alone_loses_two_roundings_each_way(make):
    p = make(sink=np.array([0.5, -3.0]), allowed=np.zeros((1, 1, 5, 7), bool))
    p.query[0, 0, 2] = np.nan
    limit = bounds(evaluate(p), Model(lse="float16"))
    lost = (4 * 2.0**-24 + 2.0**-11) * np.array([0.5, 3.0])
    assert (limit["lse"] == lost[:, None]).all()
    assert (limit["out"] == 0).all()


def test_where_all_keys_are_seen_the_least_and_the_largest_value_say_how_far_they_are():
    """To the bit what all of them say: x - o rounded grows with x."""
    rng = np.random.default_rng(0)
    v, o = rng.standard_normal((11, 3)), rng.standard_normal((4, 3)) * [[0.1], [1], [10], [1]]
    v[0, 0], v[1, 1], v[2, 2], o[3] = np.inf, 1e300, np.nan, -1e-300
    for seen in (np.ones((4, 11), bool), rng.random((4, 11)) < 0.5):
        each = np.where(seen[:, :, None], np.abs(v[None] - o[:, None]), 0.0).max(1)
        np.testing.assert_array_equal(module._farthest(v, o, seen), each)
        sizes = np.where(seen[:, :, None], np.abs(v)[None], 0.0).max(1)
        np.testing.assert_array_equal(np.broadcast_to(module._largest(np.abs(v)[None], seen), (4, 3)), sizes)
    assert module._farthest(v[:0], o, np.ones((4, 0), bool)).tolist() == np.zeros((4, 3)).tolist()
