"""A gradient that arrives at a recurrence's last state: exact values by other routes, bounds, and errors."""

import numpy as np
import pytest
import torch

from refattn import InvalidProblem, Problem, UnsupportedProblem, check_problem, evaluate
from refattn.check.bounds.expected import expected
from refattn.check.kernels.chunked import chunked
from refattn.check.kernels.gradients import with_gradients
from refattn.check.model import MODELS, flash

EPS = 2.0**-53
ENDS = np.int32([0, 0, 5, 9])


def call(variant, packed=False, seed=0, n=9):
    rng = np.random.default_rng(seed)
    count = 3 if packed else 1
    q, k, v = (rng.standard_normal((1, 2, n, d)).astype(np.float32) for d in (4, 4, 3))
    rows = 8 if variant == "titans" else 4
    more = {"state": rng.standard_normal((count, 2, rows, 3)).astype(np.float32), "causal": "bottom_right"}
    if packed:
        more |= {"cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS}
    if variant == "titans":
        more["eta"], more["options"] = rng.uniform(0, 1, (1, 2, n, 1)).astype(np.float32), {"chunk": 4}
    if variant != "lightning":
        k /= np.sqrt((k * k).sum(-1, keepdims=True))
        more["alpha"] = rng.uniform(0.5, 1, (1, 2, n, 1)).astype(np.float32)
        more["beta"] = rng.uniform(0, 1, (1, 2, n, 1)).astype(np.float32)
    else:
        more["options"] = {"decay": (0.1, 0.4)}
    p = Problem(q, k, v, variant=variant, **more)
    return p, rng.standard_normal(v.shape).astype(np.float32), rng.standard_normal(p.state_shape).astype(np.float32)


def by_autograd(p, dout, of_state):
    """Return gradients of a loop over tokens in float64 by PyTorch."""
    x = {n: torch.asarray(y).double().requires_grad_() for n, y in p.arrays().items() if not n.startswith("cu_")}
    total = torch.zeros((), dtype=torch.float64)
    for h in range(2):
        for i, (rows, _) in enumerate(p.segments()):
            s, *momentum = x["state"][i, h].split(4)
            at = s
            for t in range(rows.start, rows.stop):
                k, v = x["key"][0, h, t], x["value"][0, h, t]
                if momentum:
                    at = s if (t - rows.start) % 4 == 0 else at
                    down = torch.outer(k, (v - k @ at) * x["beta"][0, h, t])
                    momentum = [momentum[0] * x["eta"][0, h, t] + down]
                    s = s * x["alpha"][0, h, t] + momentum[0]
                elif "alpha" in x:
                    s = s * x["alpha"][0, h, t]
                    s = s + torch.outer(k, (v - k @ s) * x["beta"][0, h, t])
                else:
                    s = s * float(np.exp(-p.options["decay"][h])) + torch.outer(k, v)
                total = total + (x["query"][0, h, t] @ s) @ torch.asarray(dout[0, h, t]).double()
            s = torch.cat([s, *momentum])
            total = total + (s * torch.asarray(of_state[i, h]).double()).sum()
    short = {"query": "dq", "key": "dk", "value": "dv"}
    names = [n for n in x if x[n].requires_grad]
    return {
        short.get(n, f"d{n}"): g for n, g in zip(names, torch.autograd.grad(total, [x[n] for n in names]), strict=True)
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", ["lightning", "gated_delta", "titans"])
def test_gradients_are_those_of_a_loop(variant, packed):
    p, dout, of_state = call(variant, packed)
    found = evaluate(p, gradients=dout, dstate_out=of_state)
    due = by_autograd(p, dout, of_state)
    for n, x in due.items():
        # sums of at most 9 times 12 products of numbers below 2**3 in each of 9 steps, in float64
        assert np.abs(found.values[n] - x.numpy()).max() <= 9 * 9 * 12 * 8 * 2**3 * EPS, n
    alone = evaluate(p, dstate_out=of_state)
    assert (alone.dq == 0).all()
    rest = evaluate(p, gradients=dout)
    for n in due:
        assert np.abs(alone.values[n] + rest.values[n] - found.values[n]).max() <= 2**8 * EPS, n
    if packed:  # no token: what arrives is what leaves
        assert np.array_equal(found.dstate[0], of_state[0].astype(float))
    rounded = evaluate(p, rounding="float32", gradients=dout, dstate_out=of_state)
    assert np.array_equal(rounded.dstate, found.dstate.astype(np.float32))
    assert not np.array_equal(rounded.dstate, rest.dstate.astype(np.float32))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("model", [flash, MODELS["flash-ratios"]])
@pytest.mark.parametrize("variant", ["lightning", "gated_delta", "titans"])
def test_a_right_kernel_lies_within_bounds_and_a_dropped_gradient_does_not(variant, model, packed):
    p, dout, of_state = call(variant, packed)
    known = expected(p, model("float32"), dout, of_state)
    right, wrong = chunked.gradients(p, dout, of_state), chunked.gradients(p, dout)
    for n, x in right.items():
        exact, limit = known.answer.values[n], known.allowed[n]
        assert (np.abs(x - exact) <= limit).all(), n
        if n != "dq":
            assert not (np.abs(wrong[n] - exact) <= limit).all(), n


def test_errors_name_the_argument():
    p, dout, of_state = call("lightning")
    with pytest.raises(InvalidProblem, match=r"dstate_out: got \(1, 2, 4, 2\), expected an array of the state's shape"):
        evaluate(p, dstate_out=of_state[..., :2])
    with pytest.raises(InvalidProblem, match="dstate_out: got str"):
        evaluate(p, dstate_out="zeros")
    with pytest.raises(InvalidProblem, match="dstate_out: got dtype int64"):
        evaluate(p, dstate_out=of_state.astype(int))
    with pytest.raises(UnsupportedProblem, match="dstate_out: NaN or inf in the arriving gradient"):
        evaluate(p, dstate_out=of_state * np.float32(np.nan))
    plain = Problem(p.query, p.key, p.value)
    with pytest.raises(UnsupportedProblem, match="dstate_out: softmax attention has no state"):
        evaluate(plain, dstate_out=of_state)
    with pytest.raises(UnsupportedProblem, match="dlse: lightning attention has no lse"):
        evaluate(p, gradients=dout, dlse=dout[..., 0])


def test_the_wrong_kernel_passes_where_nothing_arrives():
    """What is asked for is the gradient at the last state: without it the kernel that drops it is right."""
    p, dout, _ = call("gated_delta")
    dropping = with_gradients(lambda p, dout, dstate_out=None: chunked.gradients(p, dout))(lambda p: chunked(p))
    assert check_problem(dropping, p, "call", gradients=dout).passed
