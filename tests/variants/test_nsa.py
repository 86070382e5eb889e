"""Native sparse attention's three branches: forms that share nothing, gates and their gradients, what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest

from refattn import VARIANTS, InvalidProblem, Problem, evaluate
from refattn.exact.agree import differing_form
from refattn.functions.native import native_sparse_attention
from refattn.variants import CORES, variant_of

OWN = {"block_size": 3, "topk": 2, "window_keys": 2}


def call(n_q=7, n_k=8, options=OWN, h=2, d=3, **more):
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((h, n_q, d + 3)), rng.standard_normal((1, n_k, d + 3)), rng.standard_normal((n_k, 2))
    q, k, v = (x.reshape(1, -1, *x.shape[-2:]) for x in (q, k, v))
    return Problem(q, k, v, causal="bottom_right", variant="nsa", options=options, **more)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 9])
def test_forms_agree_in_the_field_and_in_balls(size):
    for more in ({}, {"window_keys": 20, "topk": 9}, {"forced": "first_previous_own", "topk": 3}):
        assert differing_form(call(options=OWN | {"block_size": size} | more, h=1)) == ""


def test_the_function_gives_the_same():
    p = call(23, 23, OWN | {"block_size": 4, "window_keys": 6}, h=4, scale=0.4)
    got = native_sparse_attention(
        p.query[..., :3], p.key[..., :3], p.value, p.query[..., 3:], block_size=4, topk=2, window=6, scale=0.4
    )
    u = 2.0**-53 * 64 * np.abs(p.value).max() * np.abs(p.query[..., 3:]).sum(-1, keepdims=True)
    assert (np.abs(got - evaluate(p, rounding="float64").out) <= u).all()


def test_gradients_hold_the_choice_and_are_those_of_the_other_form():
    """A gate's is what its branch gives; a key's last numbers have none."""
    p, v = call(), VARIANTS["nsa"]
    dout = np.random.default_rng(1).standard_normal(p.out_shape)
    here = evaluate(p, rounding="float64", gradients=dout)
    other = v.forms["by_rows"].lower(p, SimpleNamespace(**v.settings(p)))
    there = evaluate(other, rounding="float64", gradients=dout)
    for name in ("out", "dq", "dk", "dv"):
        np.testing.assert_array_equal(here.values[name], there.values[name])
    assert (here.values["dk"][..., 3:] == 0).all()
    for i in range(3):
        query = p.query.copy()
        query[..., 3:] = np.eye(3)[i]
        part = evaluate(p.replace(query=query), rounding="float64").out
        error = np.abs((part * dout).sum(-1) - here.values["dq"][..., 3 + i])
        assert (error <= 2.0**-50 * (np.abs(part) * np.abs(dout)).sum(-1)).all()


def test_before_the_first_whole_block_its_branch_is_zero():
    p = call(8, 8)
    query = p.query.copy()
    query[..., 3:] = [1, 0, 0]
    out = evaluate(p.replace(query=query), rounding="float64").out
    assert (out[:, :, :2] == 0).all()
    mean = evaluate(Problem(np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 3, 1)), p.value[:, :, :3]), rounding="float64").out
    assert (out[:, :, 2] == mean[0, 0, 0]).all()  # correctly rounded both
    assert (evaluate(p.replace(query=query, options={"block_size": 9}), rounding="float64").out == 0).all()


def test_what_does_not_fit_is_refused():
    p = call()
    for change, text in (
        (
            {"options": {"topk": 2, "forced": "first_previous_own"}},
            r"^topk: got 2, expected at least 3, the blocks",
        ),
        ({"options": {"window_keys": 0}}, r"^window_keys: got 0, expected an integer of at least 1$"),
        ({"options": {"block_size": 0}}, r"^block_size: got 0, expected an integer of at least 1$"),
        ({"causal": None}, r"^causal: blocks are chosen among earlier ones; set causal='bottom_right'$"),
        ({"value": np.where(p.value == p.value[0, 0, 4], np.nan, p.value)}, r"^value: has NaN or inf, which the means"),
        (
            {"query": p.query[..., :3].copy(), "key": p.key[..., :3].copy()},
            r"^query: axis dim is 3, expected at least 4: the last 3 numbers are the gates$",
        ),
    ):
        with pytest.raises(InvalidProblem, match=text):
            evaluate(p.replace(**change))


def test_cores_are_found_by_name_and_are_no_operators():
    assert not set(CORES) & set(VARIANTS)
    assert all(variant_of(n) is v for n, v in CORES.items())
    assert evaluate(call()).core.variant == "nsa_branches"
