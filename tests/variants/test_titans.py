"""Titans' memory of one matrix against the function over fractions, and itself written another way."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from refattn import VARIANTS, InvalidProblem, Problem, UnsupportedProblem, evaluate
from refattn.check.bounds.stepped import stepped
from refattn.check.model import flash
from refattn.exact import agree
from refattn.exact.agree import differing_form, under
from refattn.exact.arithmetics import Floats
from refattn.exact.heads import heads, matrix_of
from refattn.functions.memory import Memory, neural_memory
from refattn.variants.titans import dense

TITANS = VARIANTS["titans"]
fractions = np.frompyfunc(Fraction, 1, 1)


def call(n=7, chunk=1, channels=False, state=True, seed=0, **more):
    """Return a call of few bits, whose answers float64 holds."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.integers(-2, 3, (1, h, n, w)).astype(float) for h, w in ((2, 3), (1, 3), (1, 2)))
    gates = {name: rng.integers(0, 5, (1, 2, n, 1)) / 4 for name in ("alpha", "beta", "eta")}
    gates["alpha"] = rng.integers(0, 5, (1, 2, n, 3)) / 4 if channels else gates["alpha"]
    gates["alpha"][:, :, 2::4], gates["eta"][:, :, 1::4] = 0, 0
    gates["state"] = rng.integers(-2, 3, (1, 2, 6, 2)).astype(float) if state else None
    return Problem(q, k, v, causal="bottom_right", variant="titans", options={"chunk": chunk}, **(gates | more))


def taught(p, h, **more):
    """Return what the function over fractions gives of a head, and the state after it."""
    start = np.zeros((6, 2)) if p.state is None else p.state[0, h]
    memory = Memory((fractions(start[:3]),), (fractions(start[3:]),))
    theta, eta, alpha = (fractions(x[0, h, :, 0]) for x in (p.beta, p.eta, p.alpha))
    arrays = (fractions(x) for x in (p.query[0, h], p.key[0, 0], p.value[0, 0]))
    out, last = neural_memory(*arrays, memory, theta=theta / 2, eta=eta, alpha=1 - alpha, **more)
    return out, np.concatenate([last.weights[0], last.momentum[0]])


@pytest.mark.parametrize(
    ("chunk", "more"), [(1, {}), (3, {"chunk": 3}), (None, {"chunk": 7}), (None, {"chunk": 2, "grad_at": "initial"})]
)
def test_it_is_the_memory_of_the_function(chunk, more):
    """All slopes at the first memory: one chunk of all tokens, or chunks whose slopes are taken at the start."""
    p = call(chunk=chunk)
    a, other = evaluate(p, rounding="float64"), evaluate(p.replace(options={"chunk": 2}))
    for h in range(2):
        out, last = taught(p, h, **more)
        assert (a.out[0, h] == out.astype(float)).all()
        assert (a.state[0, h] == last.astype(float)).all()
        assert (other.out[0, h] != out.astype(float)).any()


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_forms_agree_in_the_field(monkeypatch, chunk, channels):
    """Decays of exactly 0 are no exception; what the form leaves is the state after the last token."""
    monkeypatch.setattr(agree, "FEW", 10**6)
    p = call(chunk=chunk, channels=channels)
    assert differing_form(p) == ""
    assert differing_form(p.replace(state=None, alpha=None)) == ""
    one, f, answer = next(heads(p)), Floats(), evaluate(p)
    o = one.options(f)
    dense(*(matrix_of(f, x) for x in (one.q, one.k, one.v)), o)
    assert (np.concatenate([x.a for x in o.last]) == answer.state[0, 0]).all()  # numbers of few bits


def test_a_form_that_takes_changes_as_they_come_is_found():
    """What a token adds is solved for: to first order it is another operator."""
    with under(replace(TITANS, name="other", forms={"wrong": lambda q, k, v, o: dense(q, k, v, o, solved=False)})):
        assert differing_form(call().replace(variant="other")).startswith("form 'wrong' differs in out at")


def test_without_momentum_and_forgetting_it_is_the_delta_rule():
    p = call(eta=np.zeros((1, 2, 7, 1)), alpha=None, state=False)
    delta = p.replace(variant="gated_delta", eta=None, options={})
    a, b = (evaluate(x, gradients=np.ones(p.out_shape)) for x in (p, delta))
    for n, x in b.values.items():
        assert (a.values[n][:, :, : x.shape[2]] == x).all(), n
    fading = p.replace(alpha=call().alpha)
    other = fading.replace(variant="gated_delta", eta=None, options={})
    assert (evaluate(fading).out != evaluate(other).out).any()  # its slope is taken before it fades


def test_what_a_token_loses_dies_out():
    """Keys of length 1 and no decay: errors followed by their sizes alone would grow at every token."""
    rng, n, d = np.random.default_rng(0), 100, 3
    k = rng.standard_normal((1, 1, n, d))
    k /= np.sqrt((k * k).sum(-1, keepdims=True))
    gates = {name: np.full((1, 1, n, 1), x, np.float32) for name, x in (("beta", 0.5), ("eta", 0.25))}
    p = Problem(*map(np.float32, (k, k, k)), causal="bottom_right", variant="titans", **gates)
    one, u = next(heads(p)), 2.0**-24
    (out, _), (state, _) = stepped(one, TITANS.shape, flash("float32"))
    (_, _), (sizes, _) = stepped(one, replace(TITANS.shape, linear=False), flash("float32"))
    assert state.shape == (2 * d, d)
    assert 0 < state.max() < u * 100 * d
    assert 0 < out[:3].max() <= out.max() < u * 1000
    assert sizes.max() > u * 2.0**20


def test_a_packed_sequence_begins_a_chunk():
    """Each is what it is alone, gradients too; an empty one keeps its state."""
    ends = np.array([0, 4, 4, 7], np.int32)
    state = np.random.default_rng(2).integers(-2, 3, (3, 2, 6, 2)).astype(float)
    p = call(chunk=3, state=False, cu_seqlens_q=ends, cu_seqlens_k=ends).replace(state=state)
    dout = np.random.default_rng(1).integers(-2, 3, p.out_shape).astype(float)
    a = evaluate(p, rounding="float64", gradients=dout)
    assert (a.state[1] == state[1]).all()
    assert not a.dstate[1].any()
    for i, (rows, _) in enumerate(p.segments()):
        alone = {n: x[:, :, rows] for n, x in p.arrays().items() if n not in ("state", "cu_seqlens_q", "cu_seqlens_k")}
        alone |= {"cu_seqlens_q": None, "cu_seqlens_k": None, "state": state[i : i + 1]}
        b = evaluate(p.replace(**alone), rounding="float64", gradients=dout[:, :, rows])
        for n, x in b.values.items():
            own = a.values[n][i : i + 1] if n in ("state", "dstate") else a.values[n][:, :, rows]
            assert (own == x).all(), (i, n)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"beta": None}, InvalidProblem, "beta: got None, expected how far each token moves the momentum"),
        ({"eta": None, "state": None}, InvalidProblem, "eta: got None, expected what it keeps of the momentum"),
        ({"eta": np.full((1, 2, 7, 1), 1.5)}, InvalidProblem, "eta: got 1.5 at .* from 0 to 1; clamp it"),
        (
            {"state": np.ones((1, 2, 3, 2))},
            InvalidProblem,
            r"state: got shape .* \(b, h_q, 2 d_k, d_v\) = \(1, 2, 6, 2\)",
        ),
        ({"options": {"chunk": 0}}, InvalidProblem, "chunk: got 0, expected None or an integer of at least 1"),
        ({"variant": "gated_delta", "options": {}}, UnsupportedProblem, "eta: gated_delta attention does not have it"),
    ],
)
def test_what_it_does_not_take_is_named(changes, error, text):
    with pytest.raises(error, match=text):
        evaluate(call().replace(**changes))
