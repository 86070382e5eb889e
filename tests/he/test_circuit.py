"""The program on plain numbers against the definition, and its counts."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from refattn import InvalidProblem, UnsupportedProblem, he, power_attention
from refattn.he.arithmetic import Counted, Levels, Numbers
from refattn.he.circuit import attend
from refattn.he.layout import Layout, layouts_for

from .make import planned, problem


def exact(x):
    """Return the definition's answer, correctly rounded."""
    options = {n: getattr(x, n) for n in ("scale", "causal", "window", "allowed")}
    return power_attention(x.query, x.key, x.value, **options, **x.options)


@given(data=st.data())
def test_the_program_is_the_definition(data):
    n_q, n_k = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    d, d_v = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    heads, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 2**31))
    causal = data.draw(st.sampled_from([None, "bottom_right", "top_left"]))
    window = data.draw(st.sampled_from([None, (3, 2)]))
    allowed = None
    if data.draw(st.booleans()):
        allowed = np.random.default_rng(seed).random((1, heads, n_q, n_k)) < 0.7
    x = problem(n_q, n_k, d, d_v, heads, data.draw(st.sampled_from([2, 4, 6, 8])), 1.0, seed,
                causal=causal, window=window, allowed=allowed)  # fmt: skip
    assume(sees(x))
    plan = planned(x, normalize="client", tolerance=10.0)
    assume(plan.noise * plan.denominator[0] <= plan.tolerance)  # else rows that see no key are refused
    assert np.abs(he.simulate(plan, x) - exact(x)).max() <= 1e-9 * plan.value_most


@pytest.mark.parametrize("upload", ["full", "compact"])
@pytest.mark.parametrize("spans", [2, 4, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_keys_in_spans_are_the_definition_too(spans, upload, masked):
    allowed = np.random.default_rng(1).random((1, 3, 16, 30)) < 0.7 if masked else None
    x = problem(16, 30, 6, 5, 3, 2, 1.0, causal="bottom_right" if masked else None, allowed=allowed)
    plan = planned(x, normalize="client", tolerance=10.0, upload=upload)
    assert plan.layout.spans == 1
    # fewer slots hold all of it: what does not fit beside the queries comes in spans
    layout = next(y for y in layouts_for(256, 16, 30, 6, 5, 3, "latency", upload) if y.spans == spans)
    plan = replace(plan, ring=replace(plan.ring, degree=512), layout=layout)
    assert np.abs(he.simulate(plan, x) - exact(x)).max() <= 1e-9 * plan.value_most


def sees(x):
    """Tell whether some row sees a key."""
    from refattn.masks import visible

    return any(visible(x, 0, h, slice(0, x.n_q), slice(0, x.n_k)).any() for h in range(x.heads))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.sampled_from([2, 4, 6, 8]), st.integers(0, 99))
def test_a_slot_an_input_is_the_definition_too(n_q, n_k, d, p, seed):
    lengths = np.random.default_rng(seed).integers(1, n_k + 1, (3, 2, 1, 1))
    allowed = np.broadcast_to(np.arange(n_k) < lengths, (3, 2, n_q, n_k)).copy()
    x = problem(n_q, n_k, d, d + 1, 2, p, 1.0, seed, batch=3, allowed=allowed)
    for more in ({"normalize": "client"}, {}):
        plan = planned(x, mode="throughput", tolerance=10.0, **more)
        error = np.abs(he.simulate(plan, x) - exact(x)).max()
        assert error <= plan.approximation + 1e-9 * plan.value_most


def test_a_slot_an_input_takes_no_masks_by_query():
    x = problem(3, 3, causal="bottom_right")
    with pytest.raises(
        UnsupportedProblem, match="he: mode='throughput' takes masks that hide a key from all queries of an input"
    ):
        he.simulate(planned(x, mode="throughput", normalize="client", tolerance=10.0), x)
    with pytest.raises(UnsupportedProblem, match="he: 9000 heads of inputs do not fit 8192 slots"):
        layouts_for(8192, 1, 1, 2, 2, 9000, "throughput")


@pytest.mark.parametrize("p", [2, 4, 6])
def test_with_the_inverse_it_is_within_the_approximation(p):
    x = problem(16, 16, 32, 32, 2, p, epsilon=3.0, causal="bottom_right")
    plan = planned(x, tolerance=0.1 if p == 6 else 1e-2)
    error = np.abs(he.simulate(plan, x) - exact(x)).max()
    assert 0.01 * plan.approximation <= error <= plan.approximation


def test_a_wrong_turn_shows(monkeypatch):
    """The test of the tests: values that are not turned ahead give another answer."""
    x = problem(8, 64, 64, 64, 4, epsilon=3.0)
    plan = planned(x, normalize="client", tolerance=10.0)
    assert plan.layout.baby > 1
    right = he.simulate(plan, x)
    straight = Layout.value_slots

    def wrong(self, v, block):
        slots = straight(self, v, block)
        return [slots[0], *(np.roll(s, self.columns) for s in slots[1:])]

    monkeypatch.setattr(Layout, "value_slots", wrong)
    assert np.abs(he.simulate(plan, x) - right).max() > 0.01


def test_counts_follow_from_the_text():
    layout, spans = layouts_for(8192, 128, 128, 64, 64, 1)
    assert (layout.columns, layout.groups, layout.parts, len(layout.blocks())) == (64, 1, 32, 2)
    m = Levels()
    tokens = [Counted(9)] * 32
    outs = attend(m, layout, 4, None, 0.0, tokens, tokens, tokens)
    assert m.levels == {"products": 1, "power": 2, "values": 1, "denominator": 0, "division": 0}
    assert [x.limbs for x in outs] == [5, 6]
    assert m.counts["multiply", 9] == 32
    # conjugate, 2 squares, baby 7, giant 3 and their 4 sums, keys past the baby steps 4, the last keys 2, the first sum
    assert sum(c for (n, _), c in m.counts.items() if n == "switch_key") == 1 + 2 + 7 + 3 + 4 + 4 + 2 + 1
    # in two spans, all queries at once: each has its products, powers and 3 baby steps, and they share the rest
    assert (spans.columns, spans.parts, spans.spans, spans.baby, len(spans.blocks())) == (128, 32, 2, 4, 1)
    m = Levels()
    attend(m, spans, 4, None, 0.0, tokens, tokens * 2, tokens * 2)
    assert m.counts["multiply", 9] == 64
    assert sum(c for (n, _), c in m.counts.items() if n == "switch_key") == 2 * (1 + 1 + 2 + 3) + 7 + 8 + 4 + 1
    with pytest.raises(UnsupportedProblem, match="he: no level is left at step 'power'"):
        attend(Levels(), layout, 4, None, 0.0, [Counted(2)] * 32, [Counted(2)] * 32, tokens)


def test_a_rotation_brings_later_slots():
    assert Numbers().rotate(np.arange(4), 1).tolist() == [1, 2, 3, 0]


def test_what_does_not_fit_the_slots():
    with pytest.raises(
        UnsupportedProblem, match="he: n_k = 2, d = 65536 and 1 heads of 1 queries do not fit 8192 slots"
    ):
        layouts_for(8192, 1, 2, 65536, 2, 1)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"query": 10.0}, InvalidProblem, "query: its largest row norm is .*, beyond the plan's"),
        ({"key": 10.0}, InvalidProblem, "key: its largest row norm is .*, beyond the plan's"),
        ({"value": np.nan}, InvalidProblem, "value: its largest element is nan, beyond the plan's"),
        (
            {"query": 0.1},
            InvalidProblem,
            r"denominator: head 0, row \d has .*, outside the plan's .* plan a wider range",
        ),
    ],
)
def test_numbers_outside_the_plan_are_refused(change, error, text):
    x = problem(epsilon=0.01)
    plan = planned(x, normalize="client", tolerance=10.0)
    changed = {n: getattr(x, n) * f for n, f in change.items()}
    with pytest.raises(error, match=text):
        he.simulate(plan, x.replace(**changed))


@pytest.mark.parametrize(
    ("other", "error", "text"),
    [
        (problem(n_q=6), InvalidProblem, "n_q: got 6, expected the plan's 5"),
        (problem(p=4), InvalidProblem, "p: got 4, expected the plan's 2"),
        (problem(scale=1.0), InvalidProblem, "scale: got 1.0, expected the plan's 0.408"),
        (problem(epsilon=0.1), InvalidProblem, "epsilon: got 0.1, expected the plan's 0.5"),
        (problem().replace(variant="softmax", options={}), UnsupportedProblem, "computes variant 'power'"),
    ],
)
def test_problems_of_another_plan_are_refused(other, error, text):
    with pytest.raises(error, match=text):
        he.simulate(planned(problem()), other)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"softcap": 0.1}, UnsupportedProblem, "softcap: power attention does not have it"),
        ({"sink": np.array([5.0])}, UnsupportedProblem, "sink: power attention does not have it"),
        ({"bias": np.full((1, 1, 5, 7), 3.0)}, UnsupportedProblem, "bias: power attention does not have it"),
        ({"options": {"p": 2, "epsilon": 0.5, "colour": 1}}, InvalidProblem, "power attention has no 'colour'"),
        ({"options": {"p": 2, "epsilon": 0.5, "delta": -1.0}}, InvalidProblem, "delta: got -1.0, expected a finite"),
        ({"options": {"p": 2, "epsilon": -0.5}}, InvalidProblem, "epsilon: got -0.5, expected a finite number"),
        ({"options": {"p": 2.0, "epsilon": 0.5}}, InvalidProblem, "p: got 2.0, expected a positive even integer"),
        ({"options": {"p": 2, "epsilon": 0.5, "form": "round"}}, InvalidProblem, "form: got 'round', expected one of"),
    ],
)
def test_what_the_reference_refuses_is_not_encrypted(change, error, text):
    x = problem()
    for call in (he.reference, lambda y: planned(x).encoded(y), lambda y: he.simulate(planned(x), y)):
        with pytest.raises(error, match=text):
            call(x.replace(**change))


def test_forms_that_are_not_encrypted_are_named():
    x = problem().replace(options={"p": 2, "epsilon": 0.5, "form": "stable"})
    assert he.reference(x).shape == x.out_shape
    with pytest.raises(UnsupportedProblem, match="he: got form 'stable', expected 'plain' or 'mean'"):
        he.simulate(planned(problem()), x)
    with pytest.raises(InvalidProblem, match="he: got ndarray, expected a Problem"):
        he.reference(np.ones(3))


def test_the_mean_form_is_the_plain_one_with_more_epsilon():
    from dataclasses import replace

    x = problem(4, 8, 6, epsilon=0.8)
    plan = planned(x)
    mean = replace(x, options={"p": 2, "epsilon": 0.1, "form": "mean"})
    np.testing.assert_allclose(he.simulate(plan, mean), he.simulate(plan, x))
    assert np.abs(he.simulate(plan, mean) - he.reference(mean)).max() <= plan.error
    with pytest.raises(UnsupportedProblem, match="the mean form needs rows that all see as many keys"):
        he.simulate(plan, replace(mean, causal="bottom_right"))
