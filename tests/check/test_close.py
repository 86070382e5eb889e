"""A caller's own results, in one call."""

import numpy as np
import pytest

import refattn
from refattn import InvalidInput, MismatchError, Problem
from refattn.check.kernels.tiled import gradients, tiled


def large(n=300):
    rng = np.random.default_rng(0)
    return Problem(*(rng.standard_normal((2, 4, n, 32)).astype(np.float32) for _ in range(3)), causal="bottom_right")


def test_a_right_result_is_close():
    p = large()
    out, lse = tiled(p)
    refattn.assert_close(out, p, lse=lse)


def test_a_wrong_row_of_a_large_call_is_found():
    p = large()
    out, _ = tiled(p)
    out[:, :, -1] *= 1.001
    with pytest.raises(
        MismatchError, match=r"out at batch \d, head \d, row 299, column \d+: got .* allowed error"
    ) as e:
        refattn.assert_close(out, p)
    assert "the call: Problem(softmax float32" in str(e.value)


def test_nobody_looks_behind_lengths(make):
    p = make(5, 7, b=2, lengths_q=np.array([2, 5]), lengths_k=np.array([7, 3]))
    out, lse = tiled(p)
    dout = np.ones(p.out_shape, np.float32)
    found = gradients(p, dout)
    out[0, :, 2:], lse[0, :, 2:], found["dk"][1, :, 3:] = 7, 7, np.nan
    refattn.assert_close(out, p, lse=lse, gradients=found, dout=dout)
    out[0, :, 1] = 7
    with pytest.raises(MismatchError, match=r"out at batch 0, head \d, row 1"):
        refattn.assert_close(out, p)


def test_the_result_has_the_type_that_the_call_asks_for(make):
    p = make(5, 7, out_dtype="bfloat16")
    out = tiled(p)[0]
    refattn.assert_close(out, p)
    with pytest.raises(InvalidInput, match="out: got dtype float32, expected bfloat16"):
        refattn.assert_close(out.astype(np.float32), p)


@pytest.mark.parametrize("place", [(0, 1, 77), (1, 3, 201), (1, 0, 130)])
def test_one_row_that_is_wrong_is_found_wherever_it_lies(place):
    p = large()
    out, lse = tiled(p)
    refattn.assert_close(out, p, lse=lse)
    out[place] *= np.float32(1.0001)
    with pytest.raises(MismatchError, match="out at batch {}, head {}, row {}, column".format(*place)):
        refattn.assert_close(out, p, lse=lse)
    out, lse = tiled(p)
    lse[place] += np.float32(1e-4)
    with pytest.raises(MismatchError, match="lse at batch {}, head {}, row {}:".format(*place)):
        refattn.assert_close(out, p, lse=lse)


def test_gradients_are_compared_whole(make):
    p = make(9, 11)
    dout = np.random.default_rng(1).standard_normal(p.out_shape).astype(np.float32)
    found = gradients(p, dout)
    refattn.assert_close(tiled(p)[0], p, gradients=found, dout=dout)
    found["dk"][0, 1, 3, 2] += 1
    with pytest.raises(MismatchError, match="dk at batch 0, head 1, key 3, column 2"):
        refattn.assert_close(tiled(p)[0], p, gradients=found, dout=dout)


def test_tensors(make):
    torch = pytest.importorskip("torch")
    p = make(9, 11).to("torch")
    out = torch.nn.functional.scaled_dot_product_attention(p.query, p.key, p.value)
    refattn.assert_close(out, p)


def test_bad_input(make):
    p = make()
    out, lse = tiled(p)
    for given, says in (
        ({"out": out[:, :, :2]}, r"out: got shape \(1, 2, 2, 8\), expected \(1, 2, 5, 8\)"),
        ({"out": out.astype(np.float64)}, "out: got dtype float64, expected float32"),
        ({"out": [1]}, "out: got list, expected an array"),
        ({"out": out, "lse": lse[:, :1]}, "lse: got shape"),
        ({"out": out, "gradients": {"dq": out}}, "need dout"),
        ({"out": out, "dout": out}, "dout: belongs to gradients; pass both"),
        ({"out": out, "gradients": {}, "dout": out}, "gradients: got {}, expected arrays by name"),
        ({"out": out, "seed": -1}, "seed: got -1, expected an integer of at least 0"),
        ({"out": out, "model": "flash"}, "model: got 'flash', expected a Model"),
        ({"out": out, "gradients": {"dbias": out}, "dout": out}, "'dbias', which the call does not have"),
    ):
        with pytest.raises(InvalidInput, match=says):
            refattn.assert_close(given.pop("out"), p, **given)


def test_allowed_errors_have_the_results_shapes(make):
    p = make()
    allowed = refattn.allowed_error(p)
    assert {n: x.shape for n, x in allowed.items()} == {"out": p.out_shape, "lse": p.out_shape[:3]}
    assert (allowed["out"] > 0).all()
    back = refattn.allowed_error(p, dout=np.ones(p.out_shape, np.float32))
    assert {n: x.shape for n, x in back.items()} == {"dq": p.query.shape, "dk": p.key.shape, "dv": p.value.shape}
