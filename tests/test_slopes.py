"""Gradients of what is added to scores and learned: ALiBi's slopes, and T5's table by its bias."""

import math
import re

import numpy as np
import pytest
import torch

from refattn import Capabilities, InvalidInput, Problem, check_kernel, check_problem, evaluate
from refattn.check.kernels import tiled as module
from refattn.check.kernels.tiled import tiled
from refattn.check.model import FEATURES, FURTHER
from refattn.functions.positions import t5_bias, t5_bias_gradient, t5_buckets


def small(shape=(4,), **more):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, h, n, 8)).astype(np.float32) for h, n in ((4, 5), (2, 7), (2, 7)))
    return Problem(q, k, v, alibi_slopes=rng.random(shape).astype(np.float32), **more)


@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_gradients_of_slopes_are_autograds(shape):
    p = small(shape, softcap=2.0, causal="bottom_right")
    dout = np.random.default_rng(1).standard_normal(p.out_shape)
    answer = evaluate(p, gradients=dout, rounding="float64")
    names = ("query", "key", "value", "alibi_slopes")
    q, k, v, slopes = leaves = [torch.tensor(getattr(p, n), dtype=torch.float64, requires_grad=True) for n in names]
    apart = (torch.arange(5)[:, None] + 2 - torch.arange(7)).abs()
    s = 2 * torch.tanh(q @ k.repeat_interleave(2, 1).mT / 8**0.5 / 2) - apart * slopes[..., None, None]
    hidden = ~torch.ones(5, 7).tril(2).bool()
    out = s.masked_fill(hidden, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    grads = torch.autograd.grad(out, leaves, torch.tensor(dout))
    for name, x in zip(("dq", "dk", "dv", "dalibi_slopes"), grads, strict=True):
        # some hundred roundings of sums of 70 terms that stay below 64
        assert np.abs(x.numpy() - answer.values[name]).max() <= 400 * 2.0**-53 * 64, name
    parts = evaluate(p, gradients=dout, rounding="float64", progress=lambda *_: None)
    assert (parts.values["dalibi_slopes"] == answer.values["dalibi_slopes"]).all()


def test_a_right_kernel_passes_and_is_predicted():
    able = Capabilities({"float32"}, FEATURES | FURTHER, lse=True, gradients={"dq", "dk", "dv", "dalibi_slopes"})
    report = check_kernel(tiled, capabilities=able, only="positions/*", model=tiled.model)
    assert report.passed, report.failures
    found = [w.figures.rms for c in report.checks for w in c.arrays if w.array == "dalibi_slopes"]
    # 8 numbers, of which a mean square scatters much; with rotary positions gradients are not predicted
    assert len(found) == 3
    assert sum(0.2 < x < 2 for x in found) == 1


WRONG = {
    "of the next head": lambda g: np.roll(g, 1),
    "the other way": np.negative,
    "a mean over batch items": lambda g: g / 2,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_gradient_of_slopes_fails(name):
    class Wrong:
        __call__ = staticmethod(tiled)

        def gradients(self, p, dout):
            found = module.gradients(p, dout)
            return found | {"dalibi_slopes": WRONG[name](found["dalibi_slopes"])}

    p = small()
    dout = np.random.default_rng(3).standard_normal(p.out_shape).astype(np.float32)
    report = check_problem(Wrong(), p, "x", gradients=dout, model=tiled.model)
    assert [c.verdict for c in report.checks] == ["passed", "failed"]
    assert {w.array for w in report.checks[1].arrays if w.failures} == {"dalibi_slopes"}
    assert "dalibi_slopes: error above the bound" in report.checks[1].message


def test_the_gradient_of_t5s_table():
    """By finite sums: the loss is linear in dbias, and each pair's number goes to its bucket; then by autograd."""
    rng = np.random.default_rng(2)
    table = rng.standard_normal((8, 4))
    p = small().replace(alibi_slopes=None)
    dout = rng.standard_normal(p.out_shape)
    more = {"bidirectional": False, "max_distance": 5}
    bias = t5_bias(table, 5, 7, offset=2, **more)
    dbias = evaluate(p.replace(bias=np.asarray(bias)), gradients=dout, rounding="float64").dbias
    found = t5_bias_gradient(dbias, 8, offset=2, **more)
    at = t5_buckets(np.arange(7) - (np.arange(5) + 2)[:, None], buckets=8, **more)
    for b in range(8):
        for h in range(4):
            pairs = [dbias[0, h, i, j] for i in range(5) for j in range(7) if at[i, j] == b]
            assert found[b, h] == math.fsum(pairs)
    t = torch.tensor(table, requires_grad=True)
    q, k, v = (torch.tensor(getattr(p, n), dtype=torch.float64) for n in ("query", "key", "value"))
    s = q @ k.repeat_interleave(2, 1).mT / 8**0.5 + t[torch.tensor(np.asarray(at))].permute(2, 0, 1)
    (s.softmax(-1) @ v.repeat_interleave(2, 1)).backward(torch.tensor(dout))
    assert np.abs(t.grad.numpy() - found).max() <= 400 * 2.0**-53 * 64


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((np.zeros((4, 5, 7)), 8), "dbias: got shape (4, 5, 7), expected (1, heads, queries, keys)"),
        ((np.zeros((1, 4, 5, 7), int), 8), "dbias: got dtype int64, expected a float format; cast it"),
        ((np.zeros((2, 4, 5, 7)), 8), "dbias: got shape (2, 4, 5, 7), expected (1, heads, queries, keys)"),
    ],
)
def test_bad_gradients_are_refused(args, text):
    with pytest.raises(InvalidInput, match=f"^{re.escape(text)}"):
        t5_bias_gradient(*args)


def test_sums_past_the_largest_number_and_infinities():
    one = np.full((1, 1, 1, 4), 1.7e308)
    one[..., 2] = -1.7e308

    def summed():
        return t5_bias_gradient(one, 4, offset=1000, bidirectional=False)[-1, 0]  # all of them are far

    assert summed() == np.inf
    one[..., 3] = -1.7e308
    assert summed() == 0.0
    one[..., 0] = np.inf
    assert summed() == np.inf
    one[..., 1] = -np.inf
    assert np.isnan(summed())
