"""Shards of a call, their parts and what is made of parts: beside loops over positions, and the whole call."""

import re
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from refattn import InvalidInput, Problem, UnsupportedProblem, allowed_error, evaluate
from refattn.check.model import flash
from refattn.devices.shards import LAYOUTS, ORDERS, arriving, exact_shards, merged, parts_of, places

KINDS = {"numpy": np.asarray, "torch": torch.tensor, "jax": jnp.asarray}


def owner(layout, i, n, size):
    """The rank of row i, and where it is there, by the layouts' words."""
    if layout == "striped":
        return i % size, i // size
    chunk = n // size if layout == "contiguous" else n // (2 * size)
    c, at = divmod(i, chunk)
    if layout == "contiguous":
        return c, at
    return (c, at) if c < size else (2 * size - 1 - c, chunk + at)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_row_has_one_place(layout, size):
    n = 12 * size
    found = places(layout, n, size)
    for i in range(n):
        rank, at = owner(layout, i, n, size)
        assert found[rank][at] == i
    assert sorted(np.concatenate(found)) == list(range(n))


def test_the_layout_of_pytorch():
    balancer = pytest.importorskip("torch.distributed.tensor.experimental._attention")._HeadTailLoadBalancer
    for n, size in ((8, 2), (24, 3), (32, 4)):
        theirs = balancer(n, size, "cpu")._generate_indices()[0].tolist()
        assert np.concatenate(places("zigzag", n, size)).tolist() == theirs


def call(make, **more):
    """A call in float64: parts of it are exact calls, too."""
    return make(12, 12, 4, b=2, h=2, h_kv=1, dtype="float64", seed=1, **more)


def bound(p, size, **more):
    """What a kernel in float64 may lose that merges parts, as small as the layouts' chunks.

    Here parts are exact up to one rounding, which is less than such a kernel's.
    """
    return allowed_error(p, replace(flash("float64"), split=p.n_k // (2 * size), tile=1), **more)


SINK, BIAS = np.linspace(-1.0, 1.0, 2), np.random.default_rng(3).standard_normal((1, 2, 12, 12))
CALLS = {
    "plain": {},
    "causal, window": {"causal": "bottom_right", "window": (5, None)},
    "sink, scale, softcap": {"causal": "top_left", "offset": 2, "sink": SINK, "scale": 0.3, "softcap": 4.0},
    "bias, weight, mask": {
        "bias": BIAS,
        "weight": np.arange(12.0).reshape(1, 1, 1, 12),
        "allowed": np.tri(12, dtype=bool)[None, None],
    },
    "lengths": {"lengths_k": np.array([5, 12]), "lengths_q": np.array([12, 7]), "causal": "bottom_right"},
}


def test_keys_have_places_of_their_own(make):
    p = make(6, 12, 4, h=2, dtype="float64")
    dout = np.ones(p.out_shape)
    found = evaluate(p, rounding="float64", gradients=dout).values
    for r, shard in enumerate(exact_shards(p, 3, "striped", dout=dout)):
        assert {n: x.shape[2] for n, x in shard.items()} == {"out": 2, "lse": 2, "dq": 2, "dk": 4, "dv": 4}
        assert all((x == np.asarray(found[n])[:, :, r::3]).all() for n, x in shard.items())
    assert [x.key[0, 0, 0, 0] for x in parts_of(p, 3)[0]] == [p.key[0, 0, i, 0] for i in (0, 4, 8)]


def part_answers(p, size, layout):
    return [
        [(np.asarray(a.out), np.asarray(a.lse)) for a in (evaluate(x, rounding="float64") for x in row)]
        for row in parts_of(p, size, layout)
    ]


@pytest.mark.parametrize(("layout", "size"), [("contiguous", 3), ("zigzag", 2), ("striped", 3)])
@pytest.mark.parametrize("name", CALLS)
def test_parts_merge_to_the_whole_in_every_order(make, name, layout, size):
    p = call(make, **CALLS[name])
    limit, rows = bound(p, size), places(layout, p.n_q, size)
    shards = exact_shards(p, size, layout)
    for r, parts in enumerate(part_answers(p, size, layout)):
        for order in ORDERS:
            out, lse = merged(parts, order, first=r)
            for got, n in ((out, "out"), (lse, "lse")):
                same = got == shards[r][n]  # -inf as well
                with np.errstate(invalid="ignore"):
                    near = np.abs(got - shards[r][n]) <= limit[n][:, :, rows[r]]
                assert (same | near).all(), (order, n)


def test_packed_sequences_are_cut_as_one(make):
    p = make(12, 12, 4, h=2, dtype="float64", cu_seqlens_q=np.array([0, 5, 12]), cu_seqlens_k=np.array([0, 5, 12]))
    p = p.replace(causal="bottom_right")
    seen = np.array([[j <= i and (i < 5) == (j < 5) for j in range(12)] for i in range(12)])
    for row, at in zip(parts_of(p, 2, "zigzag"), places("zigzag", 12, 2), strict=True):
        for x, keys in zip(row, places("zigzag", 12, 2), strict=True):
            assert (x.allowed == seen[at][:, keys]).all()


@pytest.mark.parametrize(("name", "layout"), [("causal, window", "zigzag"), ("sink, scale, softcap", "contiguous")])
def test_gradients_of_parts_add_up(make, name, layout):
    """By each part's own backward pass, with what arrives at its out and lse."""
    p, size = call(make, **CALLS[name]), 2
    dout = np.random.default_rng(5).standard_normal(p.out_shape)
    limit, keys = bound(p, size, dout=dout), places(layout, 12, size)
    shards = exact_shards(p, size, layout, dout=dout)
    dq, dk, dv = ([0.0] * size for _ in range(3))
    for r, (calls, parts) in enumerate(zip(parts_of(p, size, layout), part_answers(p, size, layout), strict=True)):
        whole = merged(parts, first=r)
        for s, (x, part) in enumerate(zip(calls, parts, strict=True)):
            given, at_lse = arriving(part, whole, dout[:, :, keys[r]])
            found = evaluate(x, rounding="float64", gradients=given, dlse=at_lse).values
            dq[r], dk[s], dv[s] = dq[r] + found["dq"], dk[s] + found["dk"], dv[s] + found["dv"]
    for r in range(size):
        for n, x in (("dq", dq[r]), ("dk", dk[r]), ("dv", dv[r])):
            assert (np.abs(x - shards[r][n]) <= limit[n][:, :, keys[r]]).all(), n


@pytest.mark.parametrize("kind", KINDS)
def test_arriving_by_hand(kind):
    """Weights 1/4 and 3/4, and a part that is not seen."""
    like = KINDS[kind]
    whole = like([[[[2.5]]]]), like([[[0.0]]])
    dout = like([[[[2.0]]]])
    seen, unseen = like([[[float(np.log(0.25))]]]), like([[[-np.inf]]])
    given, at_lse = arriving((like([[[[1.0]]]]), seen), whole, dout)
    # exp(log(1/4)) is within 2 roundings of 1/4, each of what log and exp lose
    u = 2.0**-24 if kind == "jax" else 2.0**-53
    assert abs(float(given[0, 0, 0, 0]) - 0.5) <= 4 * u
    assert abs(float(at_lse[0, 0, 0]) + 0.75) <= 8 * u
    given, at_lse = arriving((like([[[[0.0]]]]), unseen), whole, dout)
    assert float(given[0, 0, 0, 0]) == 0
    assert float(at_lse[0, 0, 0]) == 0
    nobody = like([[[[0.0]]]]), unseen
    assert float(arriving(nobody, nobody, dout)[0][0, 0, 0, 0]) == 0


def test_a_ring_begins_with_its_own_keys():
    seen = []

    parts = [(np.full((1, 2), i), np.zeros(1)) for i in (0.0, 1.0, 2.0, 3.0)]
    ORDERS["noted"] = lambda given: seen.extend(out[0, 0] for out, _ in given)
    try:
        merged(parts, "noted", first=1)
    finally:
        del ORDERS["noted"]
    assert seen == [1, 0, 3, 2]


def one(**more):
    x = np.zeros((1, 1, 8, 2))
    return Problem(x, x, x, **more)


ZEROS = np.zeros((2, 1)), np.zeros(2)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda: places("zigzag", 12, 4), "n: got 12 rows, which 'zigzag' does not cut into 8 equal chunks; pad them"),
        (lambda: places("random", 12, 4), "layout: got 'random', expected one of contiguous, zigzag, striped"),
        (lambda: places("striped", 12, 0), "world_size: got 0, expected a whole number from 1 on"),
        (lambda: merged([], "ring"), "parts: got [], expected at least one pair of out and lse"),
        (lambda: merged([(1, 2)], "star"), "order: got 'star', expected one of ring, tree, split"),
        (lambda: merged([(1, 2)], first=1), "first: got 1, expected a whole number from 0 to 0"),
        (lambda: parts_of(None, 2), "problem: got None, expected a Problem"),
        (lambda: parts_of(one(), 3), "n: got 8 rows, which 'contiguous' does not cut into 3 equal chunks; pad them"),
        (lambda: arriving(ZEROS, (np.zeros((2, 1)), np.zeros(3)), np.zeros((2, 1))),
            "found: shapes are (2, 1) and (3,), expected the first part's out and its shape without the last axis for "
            "lse"),
        (lambda: arriving(ZEROS, ZEROS, np.zeros((2, 2))),
            "dout: got float64 of shape (2, 2), expected floats of out's shape (2, 1)"),
        (lambda: arriving(None, None, None), "part: got None, expected a pair of out and lse"),
        (lambda: arriving(ZEROS, np.zeros((2, 1)), None), "found: got 'ndarray', expected a pair of out and lse"),
        (lambda: arriving((np.zeros((2, 1), int), np.zeros(2)), ZEROS, np.zeros((2, 1))),
            "part out: got dtype int64, expected a float format; cast it"),
        (lambda: merged(None), "parts: got None, expected at least one pair of out and lse"),
        (lambda: merged({"a": ZEROS}), "parts: got {'a': (array([[0.],\n       [0.]]), array([0., 0.]))}, expected at "
            "least one pair of out and lse"),
        (lambda: merged([ZEROS[0]] * 2), "parts[0]: got 'ndarray', expected a pair of out and lse"),
        (lambda: merged([(*ZEROS, ZEROS[1])]), "parts[0]: got " + repr((*ZEROS, ZEROS[1])) + ", expected a pair of out "
            "and lse"),
        (lambda: merged([(ZEROS[0], np.zeros(3))]),
            "parts[0]: shapes are (2, 1) and (3,), expected the first part's out and its shape without the last axis "
            "for lse"),
        (lambda: merged([ZEROS, tuple(map(torch.from_numpy, ZEROS))]),
            "parts[1] out: is an array of torch, expected numpy's, as parts[0] out is"),
        (lambda: merged([(ZEROS[0], np.array([0, np.nan]))]),
            "parts[0] lse: holds NaN or infinity, expected finite numbers, or -inf where no key is seen"),
        (lambda: merged([ZEROS, (ZEROS[0], np.array([0, np.inf]))]),
            "parts[1] lse: holds NaN or infinity, expected finite numbers, or -inf where no key is seen"),
    ],
)  # fmt: skip
def test_bad_input(wrong, text):
    with pytest.raises(InvalidInput, match=f"^{re.escape(text)}$"):
        wrong()


def test_what_is_not_cut_is_refused():
    for name, more in (("out_dtype", {"out_dtype": "float32"}), ("variant", {"variant": "sigmoid"})):
        with pytest.raises(UnsupportedProblem, match=f"^{name}: calls that have it are not cut into shards$"):
            parts_of(one(**more), 2)
