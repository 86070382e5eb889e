"""What a definition must show before it is known: refattn's own operators show it, and so do other right ones."""

from dataclasses import replace

import numpy as np
import pytest

import refattn
from refattn import VARIANTS, Capabilities, InvalidInput, Problem, Variant, check_kernel, check_problem, evaluate
from refattn.exact.agree import under
from refattn.operators.vetting import calls_of, vet
from refattn.variants import Choices, Option, Selected, Steps
from refattn.variants.option import above_zero, whole

OWN = sorted(set(VARIANTS))


@pytest.fixture(autouse=True)
def forget():
    yield
    for name in set(VARIANTS) - set(OWN):
        del VARIANTS[name]


@pytest.mark.parametrize("name", OWN)
def test_every_operator_of_the_package_passes(name):
    with under(replace(VARIANTS[name], name=f"another_{name}", fused="")) as v:
        assert len(calls_of(v)) >= 5
        vet(v)


def delta_rule(state, q, k, v, o):
    state = state + k.T @ ((v - k @ state) * o.beta)
    return state, q * o.scale @ state


DELTA = Variant(
    name="delta",
    define=Steps(delta_rule),
    formula="S_t = S_(t-1) + beta k_t^T (v_t - k_t S_(t-1)),  out_t = scale·q_t S_t",
    unit="u · sum of the state's sizes",
    source="Yang et al., arXiv 2406.06484",
    uses=frozenset({"causal", "state"}),
    options={"beta": Option(0.5, "how far the state moves", above_zero, (0.25,))},
    default_scale="one",
    laws=("determinism", "state_carried", "grouped_heads", "batch_independence"),
    bugs=("zeroed_head",),
    families=("gaussian",),
    cases={"slow": {"n_q": 17, "n_k": 17, "d": 8, "causal": "bottom_right", "options": {"beta": 0.1}}},
    always=frozenset({"causal_bottom_right"}),
    never=frozenset({"lengths_differ", "no_rows_or_keys", "causal_top_left", "variable_lengths"}),
)


def delta_kernel(p, off=0.0):
    q, k, v = (np.asarray(x, np.float32) for x in (p.query, p.key, p.value))
    group, beta, scale = p.heads // p.heads_kv, np.float32(p.options.get("beta", 0.5)), np.float32(p.scale or 1)
    out, states = np.zeros(p.out_shape, np.float32), np.zeros((p.batch, p.heads, p.d_k, p.d_v), np.float32)
    for b, h in np.ndindex(p.batch, p.heads):
        state = states[b, h] if p.state is None else np.array(p.state[b, h], np.float32)
        for t in range(p.n_q):
            key, value = k[b, h // group, t : t + 1], v[b, h // group, t : t + 1]
            state = state + key.T @ ((value - key @ state) * (beta + np.float32(off)))
            out[b, h, t] = q[b, h, t : t + 1] * scale @ state
        states[b, h] = state
    return out.astype(p.query.dtype), states


ABLE = Capabilities({"float32"}, features={"causal_bottom_right", "state", "grouped_heads", "scale", "d_v_differs"})


def test_a_recurrence_needs_no_form_with_all_tokens_at_once():
    refattn.register(DELTA)
    report = check_kernel(delta_kernel, "delta", capabilities=ABLE)
    assert report.right, [report.describe(c) for c in report.failures]
    assert report.count("passed") >= 6
    assert not check_kernel(lambda p: delta_kernel(p, 1e-5), "delta", capabilities=ABLE).right
    with pytest.raises(InvalidInput, match="gradients: delta has no form with all tokens at once, from which their"):
        check_kernel(delta_kernel, "delta", capabilities=replace(ABLE, gradients={"dq"}))


def test_a_recurrence_keeps_its_law_and_has_no_lse():
    with pytest.raises(InvalidInput, match="delta: laws lacks 'state_carried', which every Steps must keep"):
        refattn.register(replace(DELTA, laws=("determinism",)))
    with pytest.raises(InvalidInput, match="delta: has_lse is True, and a recurrence has none"):
        refattn.register(replace(DELTA, has_lse=True))


def scores(q, k, o):
    return q @ k.T


def choices(n_q, n_k, o):
    none = np.zeros((n_q, n_k), bool)
    return Choices(np.eye(n_k, dtype=bool), ~none, none, o.top)


TOP = Variant(
    name="top_keys",
    define=Selected(scores, choices, {"top": 2**31}),
    formula="softmax over the keys of the largest scores",
    unit="as softmax",
    source="made up for a test",
    uses=frozenset({"allowed"}),
    options={"top": Option(2, "keys of a row", whole(1), (1, 3))},
    has_lse=True,
    laws=("determinism", "full_budget_is_dense"),
    bugs=("zeroed_head",),
    cases={"three": {"options": {"top": 3}}},
)


def test_a_selector_takes_packed_sequences():
    refattn.register(TOP)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, n, 8)).astype(np.float32) for n in (5, 9, 9))
    at = {"cu_seqlens_q": np.array([0, 2, 5]), "cu_seqlens_k": np.array([0, 4, 9])}
    packed = evaluate(Problem(q, k, v, variant="top_keys", **at)).out
    alone = [
        evaluate(Problem(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], variant="top_keys")).out
        for a, b, c, d in ((0, 2, 0, 4), (2, 5, 4, 9))
    ]
    assert (packed == np.concatenate(alone, axis=2)).all()


def test_the_report_counts_rows_whose_choice_may_turn():
    refattn.register(TOP)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, n, 8)).astype(np.float32) for n in (5, 9, 9))
    k[:, :, 1] = k[:, :, 0] * np.float32(1 + 2.0**-23)  # what tells these apart is less than a rounding
    p = Problem(q, k, v, variant="top_keys", options={"top": 1})
    right = evaluate(p, rounding="float32")
    first = (right.core.allowed[..., :2].any(3)).sum()
    assert first > 0
    report = check_problem(lambda p: right.values["out"], p, "near")
    assert report.passed
    assert report.either == first == report.to_dict()["either"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"laws": ("determinism",)}, "top_keys: laws lacks 'full_budget_is_dense', which every Selected must keep"),
        ({"define": Selected(scores, choices, {"top": 2})}, r"top_keys: full=.'top': 2. does not choose everything"),
        ({"define": Selected(scores, choices, {"all": True})}, "top_keys: full sets an option 'all' that it does not"),
        ({"define": Selected(scores, choices, {"top": -1})}, "top_keys: full sets 'top' to -1, expected an integer"),
        ({"has_lse": False}, "top_keys: has_lse is False, and what it is lowered to gives an lse"),
    ],
)
def test_selectors_that_are_not_complete(changes, text):
    with pytest.raises(InvalidInput, match=text):
        refattn.register(replace(TOP, **changes))
