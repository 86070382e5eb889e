import importlib
from dataclasses import replace

import numpy as np
import pytest

from refattn import VARIANTS, MismatchError, Problem, allowed_error, assert_close, evaluate
from refattn.check.inputs.families import cases
from refattn.check.model import flash
from refattn.rules import causal

from ...conftest import tensor

module = importlib.import_module("refattn.check.bounds.expected")


@pytest.fixture
def small():
    module.forget()
    yield [c for c in cases("softmax") if c.family == "gaussian"][:8]
    module.forget()


def test_what_is_kept_is_made_once(small):
    model = flash("float32")
    first = [module.of_case(c, "float32", model, False) for c in small]
    assert all(module.kept((c, "float32", model, False)) for c in small)
    assert all(module.of_case(c, "float32", model, False) is x for c, x in zip(small, first, strict=True))
    other = module.of_case(small[0], "float32", flash("float64"), False)
    assert other.answer is first[0].answer  # another model, the same answer


def test_what_was_not_used_for_the_longest_time_goes(small, monkeypatch):
    model = flash("float32")
    sizes = [module._bytes(module.of_case(c, "float32", model, False)) for c in small]
    module.forget()
    monkeypatch.setattr(module, "KEPT", sum(sizes[:4]))
    for c in small[:4]:
        module.of_case(c, "float32", model, False)
    module.of_case(small[0], "float32", model, False)
    module.keep((small[4], "float32", model, False), module.made(small[4], "float32", model, False))
    there = [module.kept((c, "float32", model, False)) for c in small]
    assert there[0]
    assert there[4]
    assert not there[1]
    monkeypatch.setattr(module, "KEPT", 0)
    module.of_case(small[5], "float32", model, False)
    assert [module.kept((c, "float32", model, False)) for c in small] == [i == 5 for i in range(8)]


def test_sizes_count_all_arrays(small):
    found = module.of_case(small[0], "float32", flash("float32"), False)
    assert module._bytes(found) > module._held(found.answer) > 3 * np.prod(found.answer.call.out_shape) * 8


def test_a_call_is_one_by_all_that_it_says(make):
    p, model = make(), flash("float32")
    first = module.expected(p, model)
    assert module.expected(p.replace(query=p.query.copy()), model) is first
    moved = p.query.copy()
    moved[0, 0, 0, 0] = -moved[0, 0, 0, 0]
    dout = np.ones(p.out_shape, np.float32)
    others = [(p.replace(query=moved), model), (p.replace(scale=0.5), model), (p.replace(causal="top_left"), model)]
    others += [(p.replace(variant="linear"), model), (p, flash("float64")), (p, model, dout), (p, model, -dout)]
    found = [module.expected(*x) for x in others]
    assert len({id(x) for x in (first, *found)}) == 1 + len(others)
    ruled = p.replace(allowed=causal())
    assert (module.expected(ruled, model).answer.out == module.expected(ruled.written_out(), model).answer.out).all()


def test_another_definition_of_that_name_is_another_call(make, monkeypatch):
    p, model = make(variant="linear"), flash("float32")
    before = module.expected(p, model)
    monkeypatch.setitem(VARIANTS, "linear", replace(VARIANTS["linear"]))
    assert module.expected(p, model) is not before


HIDING = {"n_q": 4, "n_k": 9, "h": 4, "h_kv": 2, "causal": "top_left"}
"""Rows that see four keys; five that no row sees."""


@pytest.mark.parametrize(
    ("variant", "dtype", "more"),
    [
        ("softmax", "float32", {}),
        ("softmax", "float64", {}),
        ("softmax", "bfloat16", HIDING),
        ("linear", "float32", {}),
        ("linear", "float32", HIDING),
        ("gated_delta", "float32", {}),
    ],
)
def test_gradients_are_those_of_balls(call_of, variant, dtype, more):
    p = call_of(variant, dtype=dtype, **more)
    dout, model = tensor(np.random.default_rng(3), p.out_shape, dtype), flash(dtype)
    known, balls = module.expected(p, model, dout), evaluate(p, gradients=dout).enclosures
    for name, allowed in known.allowed.items():
        a, b = known.answer.enclosures[name], balls[name]
        assert (np.abs((a.mid - b.mid) + (a.tail - b.tail)) <= a.radius + b.radius).all(), name
        assert (a.radius <= allowed * 2.0**-20).all(), name


@pytest.mark.parametrize("variant", ["softmax", "linear", "sigmoid"])
def test_a_gradient_of_a_key_that_no_row_sees_is_exactly_0(call_of, variant):
    p = call_of(variant, **HIDING)
    known = module.expected(p, flash("float32"), tensor(np.random.default_rng(3), p.out_shape))
    for name in ("dk", "dv"):
        e = known.answer.enclosures[name]
        assert (e.mid[:, :, 4:] == 0).all()
        assert (e.radius[:, :, 4:] == 0).all(), name
        assert (e.mid[:, :, :4] != 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_softmax_needs_no_balls(call_of, monkeypatch, dtype):
    monkeypatch.setattr(module, "evaluate", None)
    p = call_of("softmax", dtype=dtype, **HIDING)
    known = module.expected(p, flash(dtype), tensor(np.random.default_rng(4), p.out_shape, dtype))
    assert known.answer.rounding is None


def test_what_floating_point_leaves_wide_is_made_in_balls(call_of, monkeypatch):
    wide = module.enclose
    monkeypatch.setattr(module, "enclose", lambda problem, level, **more: wide(problem, 0, **more))
    p = call_of("softmax", seed=5, dtype="float64")
    dout = tensor(np.random.default_rng(4), p.out_shape, "float64")
    known, balls = module.expected(p, flash("float64"), dout), evaluate(p, gradients=dout).enclosures
    for name in known.allowed:
        np.testing.assert_array_equal(known.answer.enclosures[name].radius, balls[name].radius)


@pytest.mark.parametrize("times", [1e40, 1e100])
def test_an_overflow_of_floating_point_is_no_nan(times):
    r = np.random.default_rng(0)
    q, k, v, dout = (r.standard_normal((1, 1, n, 2)) for n in (2, 3, 3, 2))
    p = Problem(q * times, k, v)
    g = evaluate(p, rounding="float64", gradients=dout)
    assert np.isfinite(g.dv).all()
    assert_close(g.out, p, gradients={"dv": g.dv}, dout=dout)
    with pytest.raises(MismatchError):
        assert_close(g.out, p, gradients={"dv": np.full_like(g.dv, np.nan)}, dout=dout)


def test_a_scale_whose_square_overflows():
    q = np.random.default_rng(0).standard_normal((1, 1, 3, 2)).astype(np.float32)
    assert allowed_error(Problem(q, q, q, scale=1e155), dout=q)["dv"].shape == q.shape
