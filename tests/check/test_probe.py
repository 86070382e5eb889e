"""What a kernel can do, found by trying."""

import numpy as np
import pytest

from refattn import Capabilities, Problem, check_kernel
from refattn.check.kernel import Kernel
from refattn.check.kernels.sparse import sparse
from refattn.check.kernels.tiled import tiled
from refattn.check.model import FEATURES, FURTHER
from refattn.check.probe import found, probed
from refattn.cli.init import pasted


def narrow(p):
    """Causal attention of width 64 in multiples of 16."""
    if p.d_k != 64 or p.n_q % 16 or p.n_k % 16 or p.query.dtype != np.float32:
        raise ValueError("no")
    s = p.query @ p.key.swapaxes(2, 3) / 8
    if p.causal is not None:
        s = np.where(np.tri(p.n_q, p.n_k, 0 if p.causal == "top_left" else p.n_k - p.n_q) > 0, s, -np.inf)
    w = np.exp(s - s.max(-1, keepdims=True))
    return w @ p.value / w.sum(-1, keepdims=True)


def test_what_is_found():
    able, said, _ = found(Kernel.of(narrow))
    assert able.dtypes == {"float32"}
    assert able.head_dims == {64}
    assert able.seq_multiple == 16
    assert {"causal_bottom_right", "causal_top_left", "lengths_differ"} <= able.features
    assert said["softcap"] == "unread"
    text = pasted(able, "narrow")
    assert "head_dims={64}," in text
    assert "seq_multiple=16," in text
    names = {"Capabilities": Capabilities, "narrow": type("f", (), {})}
    exec(text.replace("from refattn import Capabilities", ""), names)
    assert names["narrow"].capabilities == able


def test_a_corner_that_is_taken_for_the_other_is_left_out():
    def kernel(p):
        return tiled(p.replace(causal=p.causal and "top_left"))[0]

    able, said, _ = found(Kernel.of(kernel))
    assert "causal_top_left" in able.features
    assert "causal_bottom_right" not in able.features
    assert said["causal_bottom_right"] == "other"


def by_row(p):
    """Softmax attention that refuses keys by column, as FlashAttention does."""
    if p.key.strides[-1] != p.key.dtype.itemsize:
        raise ValueError("the last axis must be contiguous")
    return tiled(p)


def test_keys_by_column_are_not_drawn_for_a_kernel_that_refuses_them():
    able, said, _ = found(Kernel.of(by_row))
    assert said["keys by column"] == "raises"
    assert able.last_axis_contiguous
    assert "last_axis_contiguous=True," in pasted(able, "by_row")
    assert probed(Kernel.of(by_row)).last_axis_contiguous
    assert not probed(Kernel.of(tiled)).last_axis_contiguous


def test_the_tiled_kernel_can_do_all():
    able, _, _ = found(Kernel.of(tiled))
    assert able.features == FEATURES | (FURTHER - {"state", "alpha", "beta", "eta"})
    assert able.elements == {"int8", "float4_e2m1fn"}
    assert able.dlse
    assert able.lse
    assert able.gradients == {"dq", "dk", "dv"}


def test_what_is_not_read_is_not_drawn():
    able = probed(Kernel.of(lambda p: tiled(p.replace(softcap=None, sink=None))[0]))
    assert FEATURES - able.features == set()  # replace reads them all
    blind = probed(Kernel.of(lambda p: tiled(type(p).__mro__[1](p.query, p.key, p.value))[0]))
    assert not blind.features & {"softcap", "sink", "bias", "allowed", "causal_top_left", "scale"}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"seq_multiple": 0}, "got seq_multiple=0"),
        ({"head_dims": {0}}, "expected integers of at least 1"),
        ({"head_dims": [True]}, r"got head_dims=\[True\], expected a set of int"),
        ({"edges": {"nothing"}}, "edges has 'nothing'"),
        ({"always": {"nothing"}}, "always has 'nothing'"),
    ],
)
def test_capabilities_are_checked(more, says):
    from refattn import InvalidInput

    with pytest.raises(InvalidInput, match=says):
        Capabilities(**more)


def test_a_call_without_rows_has_no_gaps():
    x = np.zeros((2, 2, 0, 8), np.float32)
    q = np.zeros((2, 2, 3, 8), np.float32)
    able = Capabilities(last_axis_contiguous=True)
    for p in (Problem(q, x, x), Problem(x, x, x), Problem(q[:0], q[:0], q[:0])):
        assert able.missing(p) == []
        assert able.missing(p.to("torch")) == []


def test_a_kernel_that_never_answers_shows_nothing():
    def never(p):
        raise ValueError("no")

    able, said, _ = found(Kernel.of(never))
    assert set(said.values()) == {"raises"}
    assert not able.last_axis_contiguous


@pytest.mark.parametrize("variant", ["moba", "topk", "neighborhood"])
def test_a_kernel_that_declares_nothing_is_judged_on_any_operator(variant):
    assert check_kernel(lambda p: sparse(p), variant, dtypes=["float32"], only="gaussian/*").right


def test_what_is_missing_is_named(make):
    able = Capabilities(head_dims={64}, seq_multiple=8, always={"causal_top_left"})
    assert able.missing(make(5, 7, 8)) == [
        "dim 8",
        "lengths that are no multiples of 8",
        "calls without causal_top_left",
    ]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_last_axis_with_gaps_is_named(make, kind):
    p = make(8, 8, 8)
    turned = p.replace(value=np.ascontiguousarray(p.value.swapaxes(2, 3)).swapaxes(2, 3))
    able = Capabilities(last_axis_contiguous=True)
    assert able.missing(p.to(kind)) == []
    assert able.missing(turned.to(kind)) == ["a last axis whose elements do not lie side by side"]
    assert Capabilities().missing(turned.to(kind)) == []


def test_options_are_tried_in_a_format_that_is_right():
    """A kernel that computes float64 in float32 is wrong there, which says nothing of its options."""

    def narrow(problem):
        found = tiled(problem.replace(**{n: getattr(problem, n).astype(np.float32) for n in ("query", "key", "value")}))
        return found[0].astype(problem.query.dtype)

    _, said, dtype = found(Kernel.of(narrow))
    assert (dtype, said["float64"], said["float32"], said["width 64"]) == ("float32", "wrong", "right", "right")


def test_an_operator_of_ones_own_is_probed():
    _, said, _ = found(Kernel.of(sparse), "moba")
    assert said["causal_bottom_right"] == said["grouped_heads"] == said["lengths_differ"] == "right"
    assert "causal_top_left" not in said  # it has none
    assert found(Kernel.of(sparse), "softmax")[1]["width 64"] == "raises"
