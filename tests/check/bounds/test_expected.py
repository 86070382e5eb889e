import importlib
from dataclasses import replace

import numpy as np
import pytest

from refattn import VARIANTS
from refattn.check.inputs.families import cases
from refattn.check.model import flash
from refattn.rules import causal

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
