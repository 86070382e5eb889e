"""Calls drawn by a seed: every two options meet, sizes are real, and bugs that need them show."""

import gc
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from refattn import Capabilities, check_kernel
from refattn.check.inputs.calls import drawn
from refattn.check.inputs.families import calls
from refattn.check.inputs.models import LONGER, MODELS, known
from refattn.check.kernels.tiled import gradients, tiled
from refattn.check.model import FEATURES, FURTHER, GRADIENTS, flash
from refattn.variants import variant_of

ABLE = Capabilities(frozenset({"float32"}), FEATURES, lse=True, gradients=GRADIENTS)
AXES = ("kind", "numbers", "causal", "softcap", "sink", "bias", "allowed")


def test_the_same_seed_draws_the_same():
    assert drawn("softmax", ABLE, "ci", 3) == drawn("softmax", ABLE, "ci", 3)
    assert drawn("softmax", ABLE, "ci", 3) != drawn("softmax", ABLE, "ci", 4)


def test_nothing_is_left_of_a_draw():
    drawn("softmax", ABLE, "ci", 3)
    gc.collect()
    assert not any(str(type(x).__module__).startswith("allpairspy") for x in gc.get_objects())


def test_every_two_values_meet():
    found = drawn("softmax", ABLE, "ci", 0)
    for a, b in itertools.combinations(AXES, 2):
        values = {n: {getattr(c, n) for c in found} for n in (a, b)}
        met = {(getattr(c, a), getattr(c, b)) for c in found}
        assert met == set(itertools.product(values[a], values[b])), (a, b)
    widths, groups = {c.d for c in found}, {c.h // c.h_kv for c in found}
    assert {64, 128, 256, 576} <= widths
    assert {1, 4, 8, 64} <= groups
    assert max(k for c in found for _, k in c.lengths) > 2000
    assert any(c.d >= 128 and c.lengths[0][1] > 512 for c in found)


def test_a_quick_run_has_the_first_of_them_and_who_asks_for_models_draws_none():
    """A run with a time limit begins with the checks of these names."""
    quick, ci, models = ([c.name for c in calls("softmax", ABLE, *x)] for x in (("quick", 3), ("ci", 3), ("ci", None)))
    assert [n for n in ci if n.startswith("models/")] == models
    assert [n for n in quick if n.startswith("calls/")] == [n for n in ci if n.startswith("calls/")][:4]


def test_only_what_a_kernel_has_is_drawn():
    able = Capabilities(features={"causal_top_left"}, head_dims={64, 128}, seq_multiple=64, always={"causal_top_left"})
    found = calls("softmax", able, "quick", 0)
    assert found
    for case in found:
        assert not able.missing(case.problem("float32")), case


def test_operators_whose_rows_hang_together_have_none():
    assert calls("moba", ABLE) == []
    assert calls("lightning", ABLE) == []
    assert calls("linear", replace(ABLE, lse=False))


def test_the_tiled_kernel_is_right_in_all_of_quick():
    for family, fewest in (("models", 40), ("calls", 4)):
        report = check_kernel(tiled, capabilities=ABLE, budget="quick", only=f"{family}/*", seed=5)
        assert report.passed, [report.describe(c) for c in report.failures]
        assert len(report.checks) > fewest


def zeros_past(limit):
    def kernel(p):
        out, lse = tiled(p)
        return (out * 0 if limit(p) else out), lse

    return kernel


@pytest.mark.parametrize(
    "limit",
    [
        lambda p: p.d_k >= 128 and p.n_k > 67,
        lambda p: p.n_k > 512,
        lambda p: p.n_q == 1 and p.n_k > 129,
        lambda p: p.heads // p.heads_kv > 4,
        lambda p: p.window is not None and p.window[1] is None,
    ],
    ids=["wide", "long", "decoding", "large groups", "one-sided windows"],
)
def test_a_kernel_that_is_wrong_where_it_is_used_is_caught(limit):
    able = replace(ABLE, gradients=frozenset())
    for seed in (0, 1, 2):
        assert any(limit(c.problem("float32")) for c in calls("softmax", able, "ci", seed) if c.family == "calls")
    found = (c for c in calls("softmax", able, "ci", 0) if c.family == "calls" and limit(c.problem("float32")))
    asked = [c.name for c in itertools.islice(found, 3)]
    kernel = zeros_past(limit)
    reports = (check_kernel(kernel, capabilities=able, only=n, seed=0) for n in asked)
    report = next(r for r in reports if r.count("failed"))
    assert "the call: Problem(softmax float32" in report.describe(report.failures[0])
    assert report.command(report.failures[0]).endswith("--seed 0")


def test_numbers_lie_behind_masks_and_in_gaps():
    found = {c.hidden: c for c in drawn("softmax", ABLE, "ci", 0) if c.allowed == "padding"}
    assert set(found) == {"", "nan", "large"}
    cases = [c for c in calls("softmax", ABLE) if c.build.layout == "fused"]
    p = cases[0].problem("float32")
    assert not p.key.flags.c_contiguous
    hidden = next(c for c in calls("softmax", ABLE) if c.build.hidden == "nan" and c.build.allowed)
    assert np.isnan(hidden.problem("float32").value).any()


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_arrays_begin_between_lines_where_a_kernel_reads_them(kind):
    starts = []

    def kernel(p):
        arrays = (p.query, p.key, p.value)
        starts.extend(x.data_ptr() if kind == "torch" else x.__array_interface__["data"][0] for x in arrays)
        return tiled(p.to("numpy"))[0] if kind == "numpy" else torch.from_numpy(tiled(p.to("numpy"))[0])

    able = Capabilities(arrays=kind)
    assert check_kernel(kernel, capabilities=able, dtypes=["float32"], only="models/odd-start[float32]").passed
    assert {x % 16 for x in starts} == {4}


def test_gradients_of_rows_that_are_not_compared_must_be_zero():
    def kernel(p):
        return tiled(p)

    def leaks(p, dout):
        found = gradients(p, dout)
        found["dq"][0, 0, p.n_q // 2] += 1e-6
        return found

    kernel.gradients = leaks
    report = check_kernel(kernel, capabilities=ABLE, budget="quick", only="calls/*/gradients*", seed=0)
    assert any("are not 0 that no row with a gradient reaches" in c.message for c in report.failures)


def test_calls_of_models_are_those_that_a_kernel_can_do():
    uses = variant_of("softmax").uses
    whole = replace(ABLE, features=FEATURES | FURTHER)
    assert [n for n, _, _ in known(whole, uses, "quick")] == list(MODELS)
    assert [n for n, _, _ in known(whole, uses)] == [*MODELS, *LONGER]
    unweighted = replace(whole, features=whole.features - {"weight"})
    assert [n for n, _, _ in known(unweighted, uses)] == [n for n in (*MODELS, *LONGER) if not n.startswith("weight-")]
    few = known(Capabilities(features={"lengths_differ", "causal_bottom_right"}, head_dims={64}), uses, "quick")
    assert {n for n, _, _ in few} == {"faint", "matched", "second-wave"}
    for n, (call, _) in MODELS.items():
        problem = next(c for c in calls("softmax", whole, "quick") if c.label == n).problem("float32")
        assert problem.d_k == call.d, n
        assert whole.missing(problem) == [], n


def test_values_that_show_rounded_scores_are_not_asked_of_weights_that_are_scores():
    for variant, said in (("softmax", True), ("sigmoid", True), ("relu", False)):
        case = next(c for c in calls(variant, ABLE, "quick") if c.label == "matched")
        assert case.says(flash("float32"))
        assert case.says(flash("bfloat16")) == said
