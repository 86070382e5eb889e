"""A gradient that arrives at lse, and calls without a column."""

import numpy as np
import pytest
import torch

from refattn import InvalidProblem, Problem, UnsupportedProblem, evaluate


def test_the_gradient_of_lse_is_autograds():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, n, 4)) for n in (5, 7, 7))
    sink, dout, dlse = rng.standard_normal(2), rng.standard_normal((1, 2, 5, 4)), rng.standard_normal((1, 2, 5))
    p = Problem(q, k, v, sink=sink, causal="bottom_right", softcap=2.0)
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v, sink)]
    tq, tk, tv, ts = leaves
    mask = torch.tensor(np.tril(np.ones((5, 7), bool), 2))
    scores = (2 * torch.tanh(tq @ tk.mT / 4)).masked_fill(~mask, -torch.inf)
    scores = torch.cat([scores, ts[None, :, None, None].expand(1, 2, 5, 1)], -1)
    out, lse = torch.softmax(scores, -1)[..., :-1] @ tv, torch.logsumexp(scores, -1)
    ((out * torch.tensor(dout)).sum() + (lse * torch.tensor(dlse)).sum()).backward()
    answer = evaluate(p, gradients=dout, dlse=dlse, rounding="float64")
    for name, x in zip(("dq", "dk", "dv", "dsink"), leaves, strict=True):
        # autograd's sums are of at most 60 products below 10, each off by 2**-53 of itself
        assert np.abs(answer.values[name] - x.grad.numpy()).max() < 60 * 10 * 2.0**-53


def test_a_row_that_sees_its_sink_alone_hands_all_to_it(make):
    p = make(3, 4, h=1, sink=np.ones(1, np.float32), allowed=np.zeros((1, 1, 3, 4), bool))
    dlse = np.array([[[1.0, 2.0, -7.0]]], np.float32)
    answer = evaluate(p, dlse=dlse)
    assert answer.values["dsink"].tolist() == [-4.0]
    assert not answer.values["dk"].any()
    assert not evaluate(p.replace(sink=None), dlse=dlse).values["dq"].any()


def test_processes_and_files_know_it(make, tmp_path):
    p, dlse = make(5, 7, b=2), np.random.default_rng(0).standard_normal((2, 2, 5)).astype(np.float32)
    want = evaluate(p, dlse=dlse, rounding="float32").values["dk"]
    for other in (dlse, 2 * dlse):
        got = evaluate(p, dlse=other, rounding="float32", checkpoint=tmp_path, n_jobs=2).values["dk"]
        assert (got == want * (1 if other is dlse else 2)).all()


def test_bad_gradients_of_lse(make):
    p = make(5, 7)
    with pytest.raises(InvalidProblem, match=r"dlse: got \(5,\), expected an array of lse's shape \(1, 2, 5\)"):
        evaluate(p, dlse=np.ones(5))
    with pytest.raises(UnsupportedProblem, match="dlse: NaN or inf in the arriving gradient"):
        evaluate(p, dlse=np.full((1, 2, 5), np.nan))
    with pytest.raises(UnsupportedProblem, match="dlse: linear attention has no lse"):
        evaluate(p.replace(variant="linear"), dlse=np.ones((1, 2, 5)))


@pytest.mark.parametrize("scale", [None, 3.0])
def test_without_a_column_every_key_weighs_the_same(make, scale):
    p = make(3, 4, d=4, scale=scale)
    p = p.replace(query=p.query[..., :0], key=p.key[..., :0], causal="top_left")
    answer = evaluate(p, rounding="float64", gradients=np.ones(p.out_shape, np.float32))
    for i in range(3):
        # the mean of float32 numbers in float64: i + 1 sums and a division, off by 2**-53 of the largest each
        assert np.abs(answer.out[0, :, i] - p.value[0, :, : i + 1].astype(float).mean(1)).max() < 40 * 2.0**-53
        assert (answer.lse[0, :, i] == np.log(i + 1)).all()
    assert answer.values["dq"].shape == (1, 2, 3, 0)
    with pytest.raises(UnsupportedProblem, match="query: axis dim is 0, which linear attention has no meaning for"):
        evaluate(p.replace(variant="linear"))
