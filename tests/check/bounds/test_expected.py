import importlib

import numpy as np
import pytest

from refattn.check.inputs.families import cases
from refattn.check.model import flash

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
