"""Decoding with sigmoid attention: every step against the exact operator, bounds, counts, JSON and refusals."""

import dataclasses
import json

import numpy as np
import pytest

from refattn import InvalidInput, InvalidProblem, UnsupportedProblem, he
from refattn.he import sigmoid_decoding
from refattn.he.cache import context_of
from refattn.he.device.chain import chain_of
from refattn.he.device.decoding import step_of
from refattn.he.inputs import sequence_of
from refattn.he.layout import Layout, token_layouts
from refattn.he.saved import plan_from_json, plan_to_json

from .apart import apart
from .make_decoding import begun, decoded, taken
from .make_sigmoid import call

ROUNDING = 2.0**-38
"""float64's: some thousand operations of 2**-53, on numbers below 8."""


def sequence(n=4, context=0, d=6, d_v=None, heads=2, **more):
    return call(n, context + n, d, d_v, heads, causal="bottom_right", **more)


def planned(x, **more):
    given = he.ranges(x, margin=0.1) | {"context": x.n_k - x.n_q, "tolerance": 0.05} | more
    return he.plan_sigmoid_decoding(x.n_q, x.d_k, x.d_v, x.heads, **given)


def with_spans(monkeypatch, rows, groups):
    def layouts(slots, n_k, d, heads):
        keys, pairs = (1 << (n - 1).bit_length() for n in (n_k, -(-d // 2)))
        return [Layout(slots, keys, 4, groups, pairs // groups, 1, heads, spans=keys // rows)]

    monkeypatch.setattr(sigmoid_decoding, "token_layouts", layouts)


@pytest.mark.parametrize("context", [0, 5])
def test_every_step_is_exact_but_for_the_polynomial(context):
    """In a ring that is too small for anybody: heads in several blocks, and keys in several spans."""
    x = sequence(6, context, 6, 5, 3, options={"offset": -1.0})
    plan = planned(x)
    exact = he.reference(x)[0]
    first, *_, last = token_layouts(64, x.n_k, 6, 3)
    assert (first.spans, last.spans > 1) == (1, True)
    for layout in (first, last):
        out = dataclasses.replace(plan, layout=layout).simulate(*taken(x))
        assert np.abs(out - exact).max() <= plan.approximation + ROUNDING
    assert np.abs(out[:, 0] - out[:, -1]).max() > 0.1
    noisy = plan.simulate(*taken(x), seed=1)
    assert 0 < np.abs(noisy - plan.simulate(*taken(x))).max() <= plan.noise


@pytest.mark.parametrize(("context", "spans"), [(0, None), (5, (2, 2))])
@apart
def test_encrypted_steps_are_within_the_bound(context, spans, monkeypatch):
    if spans:
        with_spans(monkeypatch, *spans)
    x = sequence(3, context, 4)
    value = x.value.copy()
    value[:, :, : min(context, 2)] = 0.0  # a span's in the clear: SEAL takes no product with it
    x = x.replace(value=value)
    plan = planned(x)
    client, server = begun(x, plan)
    out = decoded(client, server, x)
    assert np.abs(out - he.reference(x)[0]).max() <= plan.error
    noise = np.abs(out - plan.simulate(*taken(x))).max()
    assert plan.noise / 20000 <= noise <= plan.noise  # the bound is for the worst inputs
    assert server.cache_bytes == plan.cache_bytes


def test_a_step_has_the_operations_that_the_plan_counts():
    plan = planned(sequence(4, 2))
    schedule = step_of(plan, None, plan.longest - 1)
    names = ("relinearize", "shrink", "galois")
    switches = sum(1 for s in schedule.steps for op in s.operations if op.name in names)
    assert switches == sum(c for (name, _), c in plan.counts.items() if name == "switch_key") > 0
    assert he.on_gpu(plan).computing_ms > 0
    assert len(chain_of(plan.ring).primes) == plan.ring.levels + 2


def test_plans_as_json():
    plan = planned(sequence(4, 2, d_v=3), upload="whole")
    text = plan_to_json(plan)
    again = plan_from_json(text)
    assert (type(again), again) == (he.SigmoidDecodingPlan, plan)
    assert (again.longest, again.context, again.operator) == (4, 2, "sigmoid")
    assert plan.report()["polynomial_degree"] == plan.polynomial.degree
    assert "a token: " in plan.words()
    told = json.loads(text)
    del told["plan"]["offset"]
    with pytest.raises(InvalidInput, match=r"he: the plan has context, norms, .*, expected context, norms, offset"):
        plan_from_json(json.dumps(told))
    told["plan"] |= {"offset": plan.offset + 0.01}
    with pytest.raises(InvalidInput, match="the plan is not what its digest says"):
        plan_from_json(json.dumps(told))


def test_what_is_refused(monkeypatch):
    with_spans(monkeypatch, 2, 2)
    x = sequence(2, 4)
    plan = planned(x)
    client = he.DecodingClient(plan, taken(x)[3][0])
    q, k, v, context = taken(x)
    longer = 2 * (plan.scores[1] - plan.offset) / plan.scale / np.sum(q[0, 0] * context[0][0, 0])
    far = he.plan_sigmoid_decoding(2, 6, heads=2, context=4, **he.ranges(x, margin=0.1) | {"norms": (999.0, 999.0)})
    with pytest.raises(InvalidProblem, match=r"scores: head 0, row 0, key 0 has .*, outside the plan's \(.*\), where"):
        he.DecodingClient(far, context[0]).encrypt_token(q[:, 0] * longer, k[:, 0], v[:, 0])
    assert client.tokens == 0
    zero = (0 * context[0], context[1])
    with pytest.raises(UnsupportedProblem, match=r"he: context: \d+ keys in a row are all zero, whose weights are"):
        context_of(plan, zero, lambda x: not x.slots.any())
    with pytest.raises(UnsupportedProblem, match="upload='compact' is not for decoding"):
        planned(x, upload="compact")
    with pytest.raises(InvalidInput, match="longest: got 0, expected an integer of at least 1"):
        he.plan_sigmoid_decoding(0, 4, scores=(-3, 3), norms=(1, 1), value_most=1)


def test_a_problem_is_read_as_a_sequence():
    x = sequence(3, 2)
    plan = planned(x)
    tokens, known = sequence_of(plan, x)
    assert (len(tokens), known.shape) == (3, (2, 2, 6))
    with pytest.raises(InvalidProblem, match=r"offset: got 0\.5, expected the plan's"):
        sequence_of(plan, x.replace(options={"offset": 0.5}))
    with pytest.raises(UnsupportedProblem, match="computes variant 'sigmoid', got 'power'"):
        sequence_of(plan, x.replace(variant="power", options={"p": 2, "epsilon": 1.0}))
