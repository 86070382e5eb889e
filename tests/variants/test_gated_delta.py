"""The gated delta rule against fractions, closed forms and itself written another way."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from refattn import VARIANTS, InvalidInput, Problem, check_problem, evaluate
from refattn.check.bounds.forward import bounds
from refattn.check.bounds.stepped import stepped
from refattn.check.inputs.families import cases
from refattn.check.kernels.chunked import chunked
from refattn.check.model import flash
from refattn.exact import agree
from refattn.exact.agree import differing_form, under
from refattn.exact.arithmetics import Floats
from refattn.exact.heads import heads, matrix_of
from refattn.operators.vetting import vet
from refattn.variants import Steps
from refattn.variants.gated_delta import chunked as form
from refattn.variants.gated_delta import step


def call(n=5, d=3, d_v=2, channels=True, state=True, seed=0, **more):
    """Return a call of few bits: eighths, sums of which float64 holds, and with them every answer below."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.integers(-2, 3, (1, h, n, w)).astype(float) for h, w in ((2, d), (1, d), (1, d_v)))
    gates = {
        "alpha": rng.integers(0, 5, (1, 2, n, d if channels else 1)) / 4,
        "beta": rng.integers(0, 5, (1, 2, n, 1)) / 4,
        "state": rng.integers(-2, 3, (1, 2, d, d_v)).astype(float) if state else None,
    }
    return Problem(q, k, v, causal="bottom_right", variant="gated_delta", **(gates | more))


def fractions(x):
    return [[Fraction(y) for y in row] for row in np.asarray(x, float)]


def written_out(p, h, alpha=None, beta=None):
    """Return out and the last state of a head by sums of fractions; gates may be other ones."""
    q, k, v = (fractions(x) for x in (p.query[0, h], p.key[0, 0], p.value[0, 0]))
    alpha, beta = (
        fractions(p.alpha[0, h]) if alpha is None else alpha,
        fractions(p.beta[0, h]) if beta is None else beta,
    )
    s = fractions(np.zeros((p.d_k, p.d_v)) if p.state is None else p.state[0, h])
    out = []
    for t in range(p.n_q):
        a = alpha[t] * (p.d_k // len(alpha[t]))
        s = [[a[i] * x for x in row] for i, row in enumerate(s)]
        says = [sum(k[t][i] * s[i][c] for i in range(p.d_k)) for c in range(p.d_v)]
        s = [[s[i][c] + beta[t][0] * k[t][i] * (v[t][c] - says[c]) for c in range(p.d_v)] for i in range(p.d_k)]
        out.append([sum(q[t][i] * s[i][c] for i in range(p.d_k)) for c in range(p.d_v)])
    return out, s


def test_it_is_what_sums_of_fractions_are():
    for channels, state in ((True, True), (False, False)):
        p = call(channels=channels, state=state)
        a = evaluate(p, rounding="float64")
        for h in range(2):
            out, s = written_out(p, h)
            assert a.out[0, h].tolist() == [[float(x) for x in row] for row in out]
            assert a.state[0, h].tolist() == [[float(x) for x in row] for row in s]


def test_gradients_by_the_gates_are_differences():
    """Out is affine in each number of a gate alone: its slope is what it gains between 0 and 1."""
    p = call()
    dout = np.random.default_rng(1).integers(-2, 3, p.out_shape).astype(float)
    a = evaluate(p, rounding="float64", gradients=dout)
    for name, got in (("alpha", a.dalpha), ("beta", a.dbeta)):
        assert got.shape == getattr(p, name).shape
        for h, t, c in np.ndindex(got.shape[1:]):
            ends = []
            for end in (0, 1):
                moved = fractions(getattr(p, name)[0, h])
                moved[t][c] = Fraction(end)
                out, _ = written_out(p, h, **{name: moved})
                ends.append(
                    sum(
                        Fraction(g) * x
                        for g, x in zip(dout[0, h].ravel(), [y for row in out for y in row], strict=True)
                    )
                )
            assert got[0, h, t, c] == float(ends[1] - ends[0])


def test_gradients_by_queries_keys_and_values_are_central_differences():
    """Out is a polynomial in one number of a key of degree 2 (4 where both heads' tokens read it: none here)."""
    p = call(n=3, d=2, channels=False)
    dout = np.random.default_rng(1).integers(-2, 3, p.out_shape).astype(float)
    a = evaluate(p, rounding="float64", gradients=dout)

    def loss(moved):
        flat = [x for h in range(2) for row in written_out(moved, h)[0] for x in row]
        return sum(Fraction(g) * x for g, x in zip(dout.ravel(), flat, strict=True))

    for name, got in (("query", a.dq), ("key", a.dk), ("value", a.dv)):
        for at in np.ndindex(got.shape):
            x = []
            for by in (1, -1):
                tensor = getattr(p, name).copy()
                tensor[at] += by
                x.append(loss(p.replace(**{name: tensor})))
            assert got[at] == float((x[0] - x[1]) / 2)


def test_without_alpha_nothing_fades():
    p = call()
    assert (evaluate(p.replace(alpha=None)).out == evaluate(p.replace(alpha=np.ones_like(p.alpha))).out).all()


def test_one_decay_for_all_channels_is_that_of_each():
    p = call(channels=False)
    wide = p.replace(alpha=np.repeat(p.alpha, p.d_k, axis=3))
    a, b = (evaluate(x, gradients=np.ones(p.out_shape)) for x in (p, wide))
    assert (a.out == b.out).all()
    assert (a.dalpha == b.dalpha.sum(3, keepdims=True)).all()


def test_orthonormal_keys_are_learnt_in_one_pass():
    """With steps of 1 the state holds each key's value, whatever it was; a key seen again takes its last value."""
    eye, rng = np.eye(4), np.random.default_rng(0)
    k, v = np.concatenate([eye, eye[:1]])[None, None], rng.integers(-9, 9, (1, 1, 5, 3)).astype(float)
    state = rng.standard_normal((1, 1, 4, 3))
    p = Problem(k, k, v, causal="bottom_right", variant="gated_delta", beta=np.ones((1, 1, 5, 1)), state=state)
    a = evaluate(p, rounding="float64")
    assert (a.out == v).all()
    assert (a.state[0, 0] == v[0, 0, [4, 1, 2, 3]]).all()


def test_steps_above_one_are_what_sums_of_fractions_are():
    p = call()
    p = p.replace(beta=2 * p.beta)
    assert (p.beta > 1).any()
    a = evaluate(p, rounding="float64")
    for h in range(2):
        out, s = written_out(p, h)
        assert a.out[0, h].tolist() == [[float(x) for x in row] for row in out]
        assert a.state[0, h].tolist() == [[float(x) for x in row] for row in s]


def test_two_steps_of_two_give_the_state_back():
    """A step of 2 mirrors what the state says of a key of length 1 in the value; the same again undoes it."""
    rng = np.random.default_rng(0)
    k = np.full((1, 1, 2, 4), 0.5)
    v = np.tile(rng.integers(-9, 9, 3).astype(float), (1, 1, 2, 1))
    state = rng.integers(-9, 9, (1, 1, 4, 3)).astype(float)
    more = {"causal": "bottom_right", "variant": "gated_delta", "beta": np.full((1, 1, 2, 1), 2.0), "state": state}
    a = evaluate(Problem(k, k, v, **more), rounding="float64")
    assert (a.state == state).all()
    assert (a.out[0, 0, 0] == 2 * v[0, 0, 0] - k[0, 0, 0] @ state[0, 0]).all()


def test_a_case_has_steps_above_one_and_keys_of_length_one():
    (case,) = (c for c in cases("gated_delta") if c.label == "large-steps")
    p = case.problem("float64")
    assert 1 < p.beta.max() <= 2
    assert (np.abs((p.key * p.key).sum(-1) - 1) < 2.0**-48).all()  # 8 squares, a root and a division


@pytest.mark.parametrize(("label", "channels"), [("long", False), ("wide", True)])
def test_a_kernel_of_logarithms_fails_where_a_decay_is_zero(label, channels):
    """It takes -inf off -inf and gives NaN; zeros by head, and by channel, are asked for."""
    (case,) = (c for c in cases("gated_delta") if c.label == label)
    p = case.problem("float32")
    assert (p.alpha.shape[3] > 1) == channels

    def wrong(p):
        out, state = chunked(p)
        out = np.where((p.alpha == 0).any((2, 3), keepdims=True), out.dtype.type(np.nan), out)
        return out, state

    assert check_problem(chunked, p, label).passed
    assert not check_problem(wrong, p, label).right


@pytest.mark.parametrize("channels", [True, False])
@pytest.mark.parametrize("n", [1, 7, 8, 17])
def test_forms_agree_in_the_field_however_many_tokens(monkeypatch, n, channels):
    """Chunks whose ends fall on, before and after the last token; decays of exactly 0 are no exception."""
    monkeypatch.setattr(agree, "FEW", 10**6)
    p = call(n, channels=channels, seed=n)
    assert n < 7 or (p.alpha == 0).any()
    assert differing_form(p) == ""
    assert differing_form(p.replace(state=None, alpha=None)) == ""


def test_forms_that_forget_a_decay_are_found():
    p = call(9, state=False)
    v = VARIANTS["gated_delta"]
    with under(replace(v, name="other", forms={"wrong": v.wrong["inverse_to_first_order"][1]})):
        assert differing_form(p.replace(variant="other")).startswith("form 'wrong' differs in out at")


def test_what_a_token_loses_dies_out():
    """Keys of length 1 and steps of 1: errors followed by their sizes alone would double at every token."""
    rng = np.random.default_rng(0)
    n, d = 200, 4
    k = rng.standard_normal((1, 1, n, d))
    k /= np.sqrt((k * k).sum(-1, keepdims=True))
    more = {"causal": "bottom_right", "variant": "gated_delta", "beta": np.ones((1, 1, n, 1), np.float32)}
    p = Problem(*(np.float32(x) for x in (k, k, rng.standard_normal((1, 1, n, d)))), **more)
    ((out, _), (state, _)) = stepped(next(heads(p)), VARIANTS["gated_delta"].shape, flash("float32"))
    ((_, _), (plain, _)) = stepped(next(heads(p)), Steps(step), flash("float32"))
    assert state.max() < 2.0**-24 * 100 * d
    assert plain.max() > 2.0**-24 * 2.0**60
    assert 0 < out[:3].max() <= out.max() < 2.0**-24 * 1000


def test_followed_losses_are_sums_over_tokens():
    """One channel: s's loss comes to the state after t times the product of (1 - beta k^2) alpha."""
    p = call(6, 1, 1, channels=False, state=False)
    one = next(heads(p))
    f = flash("float32")
    moves = (1 - one.gates["beta"] * one.k**2) * one.gates["alpha"]
    own = []  # what each token's step loses by itself: the bound of the state with the errors before it taken off
    for t in range(6):
        cut = p.replace(**{n: x[:, :, : t + 1] for n, x in p.arrays().items()})
        _, (state, _) = stepped(next(heads(cut)), VARIANTS["gated_delta"].shape, f)
        brought = sum(abs(np.prod(moves[s + 1 : t + 1])) * x for s, x in enumerate(own))
        own.append(state.item() - brought)
        assert own[-1] >= 0
        # a step rounds the decay, k s, its difference from v, times beta, times k and the sum: of sizes below this
        sizes = 12 * (abs(one.v[t, 0]) + 5) * max(1, abs(one.k[t, 0])) ** 2
        assert own[-1] <= 2.0**-24 * 4 * sizes


def test_a_step_that_is_not_linear_is_refused():
    def squares(state, q, k, v, o):
        return step(state * state, q, k, v, o)

    v = replace(VARIANTS["gated_delta"], name="squares", define=Steps(squares, linear=True), forms={})
    with under(v), pytest.raises(InvalidInput, match="squares: linear is True, and a step is not linear in the state"):
        vet(v)


def test_bounds_are_finite_where_a_decay_is_zero():
    p = call(17)
    assert all(np.isfinite(x).all() for x in bounds(evaluate(p), flash("float32")).values())


def test_the_gradient_by_the_start_is_what_out_gains_by_each_of_its_numbers():
    """Out is affine in the state that a call starts from: an element's slope is what it gains from 0 to 1."""
    p = call(n=4)
    dout = np.random.default_rng(1).integers(-2, 3, p.out_shape).astype(float)
    a = evaluate(p, rounding="float64", gradients=dout)

    def loss(moved):
        flat = [x for h in range(2) for row in written_out(moved, h)[0] for x in row]
        return sum(Fraction(g) * x for g, x in zip(dout.ravel(), flat, strict=True))

    assert a.dstate.shape == p.state.shape
    for at in np.ndindex(p.state.shape):
        ends = []
        for end in (0.0, 1.0):
            state = p.state.copy()
            state[at] = end
            ends.append(loss(p.replace(state=state)))
        assert a.dstate[at] == float(ends[1] - ends[0])
    assert evaluate(p.replace(state=None), gradients=dout).dstate is None


def test_a_start_counts_as_one_more_token():
    """A token with the key e_i, the value s_i and a step of 1 writes row i: dstate is then the dv of such tokens."""
    p = call(n=4)
    dout = np.random.default_rng(1).integers(-2, 3, p.out_shape).astype(float)
    d, group = p.d_k, p.heads
    wide = {n: np.repeat(getattr(p, n), group, 1) for n in ("key", "value")}
    before = {
        "query": np.zeros((1, group, d, d)),
        "key": np.broadcast_to(np.eye(d), (1, group, d, d)),
        "value": p.state,
        "alpha": np.ones((1, group, d, d)),
        "beta": np.ones((1, group, d, 1)),
    }
    given = {n: getattr(p, n) for n in before} | wide
    longer = p.replace(state=None, **{n: np.concatenate([x, given[n]], 2) for n, x in before.items()})
    late = np.concatenate([np.zeros((1, group, d, p.d_v)), dout], 2)
    a, b = (evaluate(x, rounding="float64", gradients=g) for x, g in ((p, dout), (longer, late)))
    assert (a.dstate == b.dv[:, :, :d]).all()
    assert (a.out == b.out[:, :, d:]).all()


@pytest.mark.parametrize("variant", ["gated_delta", "lightning"])
def test_a_packed_sequence_is_what_it_is_alone(variant):
    """Gradients too; each starts from its own state, an empty one keeps it."""
    p = call(n=7)
    if variant == "lightning":
        p = p.replace(variant=variant, alpha=None, beta=None, options={"decay": (0.5, 0.125)})
    rng, ends = np.random.default_rng(2), np.array([0, 3, 3, 7], np.int32)
    state = rng.integers(-2, 3, (3, 2, p.d_k, p.d_v)).astype(float)
    packed = p.replace(state=state, cu_seqlens_q=ends, cu_seqlens_k=ends)
    dout = rng.integers(-2, 3, p.out_shape).astype(float)
    a = evaluate(packed, rounding="float64", gradients=dout)
    assert a.state.shape == a.dstate.shape == state.shape
    assert (a.state[1] == state[1]).all()
    assert not a.dstate[1].any()
    for i, (rows, _) in enumerate(packed.segments()):
        alone = {n: x[:, :, rows] for n, x in p.arrays().items() if n != "state"} | {"state": state[i : i + 1]}
        b = evaluate(p.replace(**alone), rounding="float64", gradients=dout[:, :, rows])
        for n, x in b.values.items():
            own = a.values[n][i : i + 1] if n in ("state", "dstate") else a.values[n][:, :, rows]
            assert (own == x).all(), (i, n)


def test_forms_agree_where_sequences_are_packed(monkeypatch):
    monkeypatch.setattr(agree, "FEW", 10**6)
    ends = np.array([0, 0, 1, 10, 17], np.int32)
    p = call(17, state=False, seed=3, cu_seqlens_q=ends, cu_seqlens_k=ends)
    assert differing_form(p) == ""
    rates = {"variant": "lightning", "options": {"decay": (0.5, 0.125)}}
    assert differing_form(p.replace(alpha=None, beta=None, state=np.ones((4, 2, 3, 2)), **rates)) == ""


def test_unit_rows_that_stand_at_the_end_read_the_state_whatever_their_number():
    """As many rows as tokens are not the tokens' own queries; the form leaves the state besides."""
    p = call(n=4)
    one, f = next(heads(p)), Floats()
    d = p.d_k
    for n in (d, 4):
        part = replace(one, q=one.q[:n], k=one.k[:n], v=one.v[:n], gates={x: y[:n] for x, y in one.gates.items()})
        part = replace(part, allowed=np.tril(np.ones((n, n), bool)))
        o = part.options(f, np.full(d, n - 1))
        o.scale = 1.0
        out, _ = form(*(matrix_of(f, x) for x in (np.eye(d), part.k, part.v)), o)
        assert out.a.tolist() == o.last.a.tolist()  # numbers of few bits
        assert out.a.any()
