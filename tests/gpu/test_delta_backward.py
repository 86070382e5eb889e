"""Gradients of the delta rule by chunks in PyTorch, on the CPU: held to the bounds, refusals, PyTorch's graph."""

import numpy as np
import pytest

from refattn import InvalidProblem, UnsupportedProblem, evaluate
from refattn.check.bounds.forward import bounds
from refattn.check.bounds.gradients import gradient_bounds
from refattn.check.inputs.draw import Draw
from refattn.check.model import flash
from refattn.dtypes import FORMATS
from refattn.exact.arithmetics import Floats
from refattn.exact.heads import heads
from refattn.exact.steps import by_steps
from refattn.gpu import delta_backward, gated_delta_backward, recurrence
from refattn.variants import VARIANTS

torch = pytest.importorskip("torch")
PACK = {f"cu_seqlens_{x}": np.array([0, 1, 1, 9, 20], np.int32) for x in "qk"}
CALLS = (
    {"n": 20, "h": 2, "h_kv": 1, "alpha": "strong", "beta": True, "state": True, "scale": 0.3, "dtype": "bfloat16"},
    {"n": 20, "alpha": "strong channels", "beta": "large", "state": True, **PACK},
    {"n": 9, "beta": True, "dtype": "float16"},
)


def call(n, dtype="float32", **more):
    d = Draw(FORMATS[dtype], np.random.default_rng(0), "gated_delta")
    return d.problem(n, n, **{"h": 1, "d": 5, "d_v": 3, "causal": "bottom_right", "options": {}} | more)


def given(p):
    """Return a call's arguments as tensors."""
    t = {n: None if getattr(p, n) is None else torch.from_numpy(np.float32(getattr(p, n))) for n in NAMES}
    t |= {n: x.to(getattr(torch, p.dtype)) for n, x in t.items() if n in NAMES[:3]}
    cu = None if p.cu_seqlens_q is None else torch.from_numpy(p.cu_seqlens_q)
    return t, {"scale": p.scale, "cu_seqlens": cu}


NAMES = ("query", "key", "value", "alpha", "beta", "state")


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("i", range(len(CALLS)))
def test_gradients_are_within_their_bounds(monkeypatch, i, chunk):
    monkeypatch.setattr(delta_backward, "CHUNK", chunk)
    monkeypatch.setattr(delta_backward, "ALIVE", 100)  # so that chunks are taken one after another, and all
    p, rng = call(**CALLS[i]), np.random.default_rng(1)
    dout = rng.standard_normal(p.out_shape).astype(p.query.dtype)
    end = rng.standard_normal(p.state_shape).astype(np.float32)
    answer = evaluate(p, gradients=dout, dstate_out=end)
    limit = gradient_bounds(answer, flash(p.dtype), dout, bounds(answer, flash(p.dtype)), end)
    t, more = given(p)
    arriving = torch.from_numpy(np.float32(dout)).to(t["query"].dtype)
    found = gated_delta_backward(dout=arriving, dstate_out=torch.from_numpy(end), **t, **more)
    assert found.keys() == limit.keys()
    for n, x in found.items():
        error = answer.enclosures[n].error(x.double().numpy())
        assert (error <= limit[n]).all(), (n, (error / limit[n]).max())


def test_many_chunks_are_the_recurrence_token_by_token():
    p = call(150, alpha=True, beta=True, state=True)
    dout = np.random.default_rng(1).standard_normal(p.out_shape).astype(np.float32)
    want = by_steps(next(heads(p)), Floats(), VARIANTS["gated_delta"].shape, dout.astype(float))
    t, more = given(p)
    for n, x in gated_delta_backward(dout=torch.from_numpy(dout), **t, **more).items():
        error = np.linalg.norm(x[0, 0].numpy() - want[n]) / np.linalg.norm(want[n])
        assert error <= 2.0**-24 * 150, n  # a walk of a rounding a token would be 2**-24 times its root


def test_no_token_leaves_what_arrives():
    p = call(0, beta=True, state=True)
    t, _ = given(p)
    end = torch.ones(p.state_shape)
    found = gated_delta_backward(dout=t["value"], dstate_out=end, **t)
    assert found["dk"].shape == p.key.shape
    assert (found["dstate"] == end).all()


def test_what_it_does_not_take_is_named():
    p = call(4, beta=True)
    t, _ = given(p)
    with pytest.raises(
        UnsupportedProblem, match="gradients of gated_delta take PyTorch tensors, got an array of numpy"
    ):
        gated_delta_backward(p.query, p.key, p.value, p.value, beta=p.beta)
    with pytest.raises(InvalidProblem, match=r"dout: got shape \(1, 1, 4, 5\), expected that of out, \(1, 1, 4, 3\)"):
        gated_delta_backward(dout=t["query"], **t)
    with pytest.raises(InvalidProblem, match=r"dstate_out: got shape \(1, 1, 5, 5\), expected \(1, 1, 5, 3\)"):
        gated_delta_backward(dout=t["value"], dstate_out=torch.zeros(1, 1, 5, 5), **t)


def test_pytorchs_graph_gets_gradients_of_out_and_of_the_last_state(monkeypatch):
    """Without a GPU: the kernel's stand-in gives nothing but shapes, and what flows is the backward pass's own."""

    def run_on(entry, x, scale, state, cu, options):
        return torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 5, 3)

    monkeypatch.setattr(recurrence, "run", run_on)
    t, _ = given(call(4, beta=True, alpha=True, state=True))
    leaves = [x.requires_grad_() for x in t.values()]
    ends = recurrence.gated_delta(scale=2.0, **t)
    seeds = [torch.full(x.shape, y) for x, y in zip(ends, (1.0, -3.0), strict=True)]
    found = torch.autograd.grad(ends, leaves, seeds)
    want = gated_delta_backward(dout=seeds[0], dstate_out=seeds[1], scale=2.0, **t)
    for n, x in zip(("dq", "dk", "dv", "dalpha", "dbeta", "dstate"), found, strict=True):
        assert (x == want[n]).all()
        assert x.any()


def test_products_are_not_in_tf32():
    seen, matmul = [], torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        with delta_backward._in_float32(torch):
            seen.append(matmul.allow_tf32)
        assert seen == [False]
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before
