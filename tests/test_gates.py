"""A recurrence's state and gates: what is refused, and how they travel."""

import numpy as np
import pytest

from refattn import InvalidInput, InvalidProblem, Problem, UnsupportedProblem, evaluate, load_problem, save_problem
from refattn.functions.memory import Memory, neural_memory
from refattn.functions.systems import linear_recurrence, run_recurrence, selective_recurrence
from refattn.functions.transnormer import transnormer_attention
from refattn.gates import GATES, finite_state, gate


def call(**changes):
    rng = np.random.default_rng(0)
    q, k, v = (rng.integers(-2, 3, (1, h, 3, 2)).astype(np.float32) for h in (2, 1, 1))
    alpha, beta = (np.full((1, 2, 3, 1), x, np.float32) for x in (0.5, 1.0))
    given = {"query": q, "key": k, "value": v, "alpha": alpha, "beta": beta, "causal": "bottom_right"} | changes
    return Problem(**{"variant": "gated_delta"} | given)


def ones(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"alpha": ones(1, 2, 3)},
            r"alpha: got shape \(1, 2, 3\), expected \(b, h_q, n_k, 1\) = \(1, 2, 3, 1\), or d_k",
        ),
        ({"alpha": ones(1, 2, 3, 3)}, "alpha: got shape .* expected .* or d_k numbers for each token"),
        ({"alpha": ones(1, 1, 3, 1)}, r"alpha: got shape \(1, 1, 3, 1\)"),
        ({"beta": ones(1, 2, 3, 2)}, r"beta: got shape .* expected \(b, h_q, n_k, 1\) = \(1, 2, 3, 1\), a number for"),
        ({"beta": ones(1, 2, 4, 1)}, "beta: got shape"),
        ({"beta": np.ones((1, 2, 3, 1), int)}, "beta: got dtype int64, expected one of"),
        ({"state": ones(1, 2, 2, 3)}, r"state: got shape .* expected \(b, h_q, d_k, d_v\) = \(1, 2, 2, 2\), a matrix"),
        ({"beta": None}, "beta: got None, expected how far each token moves the state"),
        ({"causal": None}, "causal: a recurrence sees no later token"),
        ({"alpha": 1.5 * ones(1, 2, 3, 1)}, "alpha: got 1.5 at .* from 0 to 1; a decay above 1 makes the state grow"),
        (
            {"alpha": -ones(1, 2, 3, 2)},
            r"alpha: got -1.0 at \(0, 0, 0, 0\), expected numbers from 0 to 1; is it the decay's logarithm",
        ),
        ({"alpha": np.nan * ones(1, 2, 3, 1)}, "alpha: got nan at .*; look where it comes from"),
        ({"beta": 2.5 * ones(1, 2, 3, 1)}, "beta: got 2.5 at .* from 0 to 2; clamp it"),
        ({"beta": np.nan * ones(1, 2, 3, 1)}, "beta: got nan at .*; look where it comes from"),
        ({"state": np.nan * ones(1, 2, 2, 2)}, "state: has NaN or inf; a recurrence starts from numbers"),
    ],
)
def test_what_is_no_gate_is_named(changes, text):
    for run in (evaluate, lambda p: evaluate(p, rounding="float32")):
        with pytest.raises(InvalidProblem, match=text):
            run(call(**changes))


def lightning(state=None, decay=(0.5, 0.1)):
    p = call(variant="lightning", alpha=None, beta=None, options={"decay": decay}, state=state)
    return evaluate(p)


def titans(state=None, **gates):
    gates = {
        n: np.full((1, 2, 3, 1), x, np.float32) for n, x in ({"alpha": 0.5, "beta": 1.0, "eta": 0.5} | gates).items()
    }
    return evaluate(call(variant="titans", state=state, **gates))


def memory(weights=None, momentum=None):
    x, half = np.ones((3, 2)), np.full(3, 0.5)
    start = Memory(*((np.zeros((2, 2)) if w is None else w,) for w in (weights, momentum)))
    return neural_memory(x, x, x, start, theta=half, eta=half, alpha=half)


def system(state):
    x = np.ones((3, 2))
    return run_recurrence(linear_recurrence(x, x), x, state)


def selective(rate):
    x = np.ones((3, 2))
    return selective_recurrence(np.ones((3, 1)), np.full((2, 1), rate), x, x)


def transnormer(decay):
    x, w = np.ones((3, 2)), np.ones((2, 2))
    return transnormer_attention(x, w, w, w, w, w, decay=np.array([decay]))


NAN = np.full((1, 2, 2, 2), np.nan, np.float32)


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (lambda: lightning(ones(1, 2, 3, 2)), "state: got shape .* a matrix for each query head"),
        (lambda: lightning(NAN), "state: has NaN or inf"),
        (lambda: lightning(decay=(-0.1, 0.0)), "decay: got .* finite numbers of at least 0"),  # it would grow
        (lambda: lightning(decay=(np.nan, 0.0)), "decay: got .* finite numbers of at least 0"),
        (lambda: titans(ones(1, 2, 2, 2)), "state: got shape .* 2 d_k, d_v.*, the memory, and below it its momentum"),
        (lambda: titans(np.concatenate([ones(1, 2, 2, 2), NAN], 2)), "state: has NaN or inf"),
        (lambda: titans(alpha=1.5), "alpha: got 1.5 .* a decay above 1"),
        (lambda: titans(eta=1.5), "eta: got 1.5 .* from 0 to 1"),
        (lambda: titans(eta=np.nan), "eta: got nan .* look where it comes from"),
        (lambda: memory(np.zeros((3, 2))), "memory: its momentum is .* expected"),
        (lambda: memory(NAN[0, 0]), r"memory's weights\[0\]: .*(nan|NaN)"),
        (lambda: memory(momentum=NAN[0, 0]), r"memory's momentum\[0\]: .*(nan|NaN)"),
        (lambda: system(np.zeros((3, 2))), r"state: shape is \(3, 2\), expected \(2, 2\)"),
        (lambda: system(NAN[0, 0]), "state: .*(nan|NaN)"),
        (lambda: selective(-0.5), "rate: holds a number below 0"),
        (lambda: selective(np.nan), "rate: .*(nan|NaN)"),
        (lambda: transnormer(-0.5), "decay: one is no finite number from 0 on"),
        (lambda: transnormer(np.nan), "decay: one is no finite number from 0 on"),
    ],
)
def test_every_recurrence_names_a_wrong_state_or_decay(run, text):
    """A state of another shape, NaN in one, a decay above 1."""
    with pytest.raises((InvalidInput, InvalidProblem), match=text):
        run()


def test_packed_sequences_have_a_state_each_and_as_many_keys_as_queries():
    ends = {f"cu_seqlens_{x}": np.array([0, 1, 3], np.int32) for x in "qk"}
    p = call(state=ones(2, 2, 2, 2), **ends)
    assert evaluate(p).state.shape == p.state_shape == (2, 2, 2, 2)
    assert call().state_shape == (1, 2, 2, 2)
    with pytest.raises(
        InvalidProblem, match=r"state: got shape .*, expected \(packed sequences, h_q, d_k, d_v\) = \(2,"
    ):
        call(state=ones(1, 2, 2, 2), **ends)
    other = p.replace(cu_seqlens_k=np.array([0, 2, 3], np.int32))
    with pytest.raises(InvalidProblem, match="cu_seqlens_k: expected cu_seqlens_q's offsets: each token brings"):
        evaluate(other)


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_other_operators_have_no_gates(name):
    p = call().replace(variant="softmax", alpha=None, beta=None)
    with pytest.raises(UnsupportedProblem, match=f"{name}: softmax attention does not have it"):
        evaluate(p.replace(**{name: getattr(call(), name)}))


def test_both_ends_of_a_gate_are_its_own():
    for name, most in GATES.items():
        assert gate(name, np.array([0.0, most])).tolist() == [0.0, most]
        with pytest.raises(InvalidProblem):
            gate(name, np.nextafter([most], np.inf))


@pytest.mark.parametrize("x", [None, "a", [0.5], 0.5, np.ones(3, complex), np.ones(3, int), np.array(["a"])])
def test_what_is_no_array_of_floats_is_named(x):
    got = f"dtype {x.dtype.name}" if isinstance(x, np.ndarray) else type(x).__name__
    for name, check in (("alpha", lambda: gate("alpha", x)), ("state", lambda: finite_state(x))):
        with pytest.raises(InvalidProblem, match=f"^{name}: got {got}, expected a NumPy array of floats"):
            check()
    with pytest.raises(InvalidProblem, match="gate: got 'gamma', expected one of alpha, beta, eta"):
        gate("gamma", np.ones(3))


def test_gates_travel_with_a_call(tmp_path):
    p = call()
    assert {"alpha", "beta"} <= p.features()
    assert {"alpha", "beta"} <= set(p.arrays())
    assert (p.to("torch").to("numpy").beta == p.beta).all()
    save_problem(p, tmp_path / "p.npz")
    again = load_problem(tmp_path / "p.npz")
    assert (evaluate(again).out == evaluate(p).out).all()
