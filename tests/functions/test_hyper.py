"""HyperAttention: its hash, its estimate against weights that are written out, and its mean over all draws."""

import itertools
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import refattn
from refattn import InvalidInput
from refattn.functions.hyper import angular_hash, hyper_attention, hyper_weight
from tests.functions.rounding import softmax_error, unit


def call(seed, n_q, n_k, d=4, d_v=3, lead=(1, 2), dtype="float64"):
    rng = np.random.default_rng(seed)
    shapes = ((n_q, d), (n_k, d), (n_k, d_v))
    return [rng.standard_normal((*lead, *shape)).astype(dtype) for shape in shapes] + [
        rng.standard_normal((d, 5)).astype(dtype)
    ]


def drawer(seed, m, *lead):
    rng = np.random.default_rng(seed)
    return lambda n: rng.integers(n, size=(*lead, m))


def signs_in_order(bits, mode):
    """Return codes' sides, sorted by bucket."""
    signs = np.array([[1.0 if code >> bit & 1 else -1.0 for bit in range(bits)] for code in range(1 << bits)])
    places = angular_hash(signs, np.eye(bits), mode=mode)
    assert sorted(places.tolist()) == list(range(1 << bits))
    return signs[np.argsort(places)]


@pytest.mark.parametrize("bits", [1, 2, 3, 7])
def test_neighbouring_buckets_differ_by_one_plane(bits):
    order = signs_in_order(bits, "paper")
    assert ((order[1:] != order[:-1]).sum(1) == 1).all()


def test_released_buckets_differ_by_more():
    """The released table [a, reversed a + 2^(r-1)], read as a code's bucket, is the inverse of what is needed."""
    table = np.array([0, 1])
    for r in (2, 3, 4):
        table = np.concatenate([table, table[::-1] + (1 << (r - 1))])
        signs = np.array([[1.0 if code >> bit & 1 else -1.0 for bit in range(r)] for code in range(1 << r)])
        assert (angular_hash(signs, np.eye(r), mode="released") == table).all()
    order = signs_in_order(3, "released")
    assert (order[1:] != order[:-1]).sum(1).max() == 2
    assert (signs_in_order(2, "released") == signs_in_order(2, "paper")).all()


def looped_weight(q, k, planes, drawn, block, mode):
    """Return one head's weights by a loop over queries and keys."""
    n_q, n_k, count = len(q), len(k), -(-len(k) // block)
    order_q, order_k = (
        sorted(range(len(x)), key=angular_hash(x, planes, mode=mode).tolist().__getitem__) for x in (q, k)
    )
    weight = np.zeros((n_q, n_k))
    for at_q, i in enumerate(order_q):
        for at_k, j in enumerate(order_k):
            own = at_q * count // n_q == at_k * count // n_k
            weight[i, j] += own
            if count > 1 and not (own and mode == "paper"):
                weight[i, j] += sum(at == at_k for at in drawn) * (n_k / len(drawn))
    return weight


@pytest.mark.parametrize(("n_q", "n_k", "block"), [(12, 12, 4), (13, 11, 4), (3, 17, 2), (9, 5, 5), (8, 8, 1)])
def test_weights_are_those_of_a_loop(n_q, n_k, block):
    q, k, _, planes = call(1, n_q, n_k)
    drawn = drawer(2, 6, 1, 2)(n_k)
    modes = ("paper", "released") if n_k % block == 0 and n_q % (n_k // block) == 0 else ("paper",)
    for mode in modes:
        found = hyper_weight(q, k, planes, lambda n: drawn, block_size=block, min_length=1, mode=mode)
        for head in range(2):
            due = looped_weight(q[0, head], k[0, head], planes, drawn[0, head], block, mode)
            assert (found[0, head] == due).all()


CASES = [(12, 12, 4, None), (13, 11, 4, None), (3, 17, 2, None), (21, 21, 3, "bottom_right"), (16, 16, 4, "top_left")]


@pytest.mark.parametrize(
    ("n_q", "n_k", "block", "causal", "kind"),
    [(*c, kind) for c in CASES for kind in ("numpy", "torch")]
    + [(*c, "jax") for c in (CASES[1], (6, 6, 2, "top_left"))],
)
def test_estimate_is_softmax_with_its_weights(n_q, n_k, block, causal, kind):
    dtype = "float32" if kind == "jax" else "float64"
    make = {"numpy": np.asarray, "torch": torch.asarray, "jax": jnp.asarray}[kind]
    q, k, v, planes = call(3, n_q, n_k, dtype=dtype)
    options = {"block_size": block, "min_length": 3, "causal": causal}
    weight = np.asarray(hyper_weight(make(q), make(k), make(planes), drawer(5, 4), **options))
    out, lse = hyper_attention(make(q), make(k), make(v), make(planes), drawer(5, 4), **options)
    assert type(out) is type(make(q))
    exact = refattn.evaluate(refattn.Problem(q, k, v, weight=weight), rounding="float64")
    bound, bound_lse = softmax_error(q, k, v, q.shape[-1] ** -0.5, unit(dtype), n_k)
    assert abs(np.asarray(out) - exact.out).max() <= bound
    assert abs(np.asarray(lse) - exact.lse).max() <= bound_lse
    if causal:
        assert (np.triu(weight, 1) == 0).all()
        assert (weight.diagonal(axis1=-2, axis2=-1) == 1).all()


@pytest.mark.parametrize("options", [{"block_size": 20, "min_length": 1}, {"block_size": 2, "min_length": 18}])
@pytest.mark.parametrize("causal", [None, "bottom_right"])
def test_one_block_or_a_short_call_is_exact(options, causal):
    q, k, v, planes = call(4, 17, 17)

    def never(n):
        raise AssertionError("nothing is drawn")

    out, lse = hyper_attention(q, k, v, planes, never, causal=causal, **({"min_length": 3} | options))
    exact = refattn.evaluate(refattn.Problem(q, k, v, causal=causal), rounding="float64")
    bound, bound_lse = softmax_error(q, k, v, 0.5, unit("float64"))
    assert abs(out - exact.out).max() <= bound
    assert abs(lse - exact.lse).max() <= bound_lse


@pytest.mark.parametrize("weights", [False, True])
def test_halves_recurse_the_longer_one_first(weights):
    """13 = 7 + 6, 7 = 4 + 3, 6 = 3 + 3: what is below the diagonals has 4, 3 and 7 keys, in the order of calls."""
    q, k, v, planes = call(4, 13, 13)
    asked = []

    def draw(n):
        asked.append(n)
        return np.zeros(1, int)

    options = {"block_size": 2, "min_length": 3, "causal": "top_left"}
    if weights:
        hyper_weight(q, k, planes, draw, **options)
    else:
        hyper_attention(q, k, v, planes, draw, **options)
    assert asked == [4, 3, 7]


def all_draws(n, m):
    return [lambda _, drawn=drawn: np.array(drawn) for drawn in itertools.product(range(n), repeat=m)]


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_mean_over_all_draws_counts_each_key_once(mode):
    """Of four keys and two draws: multiples of 2, sixteen times; their mean is exact."""
    q, k, _, planes = call(6, 4, 4, lead=())
    weights = [hyper_weight(q, k, planes, d, block_size=2, min_length=1, mode=mode) for d in all_draws(4, 2)]
    mean = np.mean(weights, axis=0)
    if mode == "paper":
        assert (mean == 1).all()
    else:  # the own block, two keys of each query, counts twice
        assert sorted(mean.ravel()) == [1.0] * 8 + [2.0] * 8
        assert ((mean == 2).sum(1) == 2).all()


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_mean_of_normaliser_and_of_numerator_over_all_draws(mode):
    q, k, v, planes = call(7, 4, 4, lead=())
    found = [hyper_attention(q, k, v, planes, d, block_size=2, min_length=1, mode=mode) for d in all_draws(4, 2)]
    z = np.mean([np.exp(lse) for _, lse in found], axis=0)
    numerator = np.mean([np.exp(lse)[:, None] * out for out, lse in found], axis=0)
    exact = refattn.evaluate(refattn.Problem(q[None, None], k[None, None], v[None, None]), rounding="float64")
    due = np.exp(exact.lse[0, 0])
    # the bound of an lse is that of a share of its exponential; exp and the mean of 16 add less than as much again
    bound, share = softmax_error(q, k, v, 0.5, unit("float64"), 4)
    if mode == "paper":
        assert (abs(z - due) <= 2 * share * due).all()
        assert (abs(numerator - due[:, None] * exact.out[0, 0]) <= 4 * bound * due[:, None]).all()
    else:
        mean = np.mean(
            [hyper_weight(q, k, planes, d, block_size=2, min_length=1, mode=mode) for d in all_draws(4, 2)], axis=0
        )
        p = np.exp(q @ k.T / 2) / due[:, None]
        own = (p * (mean == 2)).sum(1)
        assert (z / due > 1 + own / 2).all()
        assert (abs(z / due - 1 - own) <= 8 * share).all()


def test_error_falls_with_the_root_of_the_sample():
    """The variance of Z over draws is that of one draw over m: from all draws, not from luck."""
    q, k, v, planes = call(8, 4, 4, lead=())
    spread = []
    for m in (1, 2):
        z = [np.exp(hyper_attention(q, k, v, planes, d, block_size=2, min_length=1)[1]) for d in all_draws(4, m)]
        spread.append(np.var(z, axis=0))
    _, share = softmax_error(q, k, v, 0.5, unit("float64"), 4)
    largest = float(np.exp(abs(q @ k.T / 2).max()) * 4 * 4) ** 2  # of Z, squared
    assert (abs(spread[0] - 2 * spread[1]) <= 8 * share * largest).all()


def test_ragged_lengths_see_no_padding():
    """A row of large keys: with keys of zeros among them Z would be larger by e^0 for each, and out smaller."""
    q, k, v = np.ones((5, 2)), np.full((7, 2), -20.0), np.ones((7, 1))
    out, lse = hyper_attention(q, k, v, np.eye(2), drawer(0, 3), block_size=3, min_length=1, scale=1.0)
    bound, _ = softmax_error(q, k, v, 1, unit("float64"), 7)
    assert abs(out - 1).max() <= bound  # a mean of ones
    assert (lse < -40 + math.log(3 + 7) + bound).all()


def test_gradient_passes():
    q, k, v, planes = (torch.asarray(x) for x in call(9, 6, 6, lead=()))
    drawn = np.array([0, 3, 5])
    weight = hyper_weight(q, k, planes, lambda n: drawn, block_size=2, min_length=1)
    q.requires_grad_()
    out, _ = hyper_attention(q, k, v, planes, lambda n: drawn, block_size=2, min_length=1)
    (found,) = torch.autograd.grad(out.sum(), q)
    s = q @ k.T / 2 + torch.log(weight)
    (due,) = torch.autograd.grad((torch.softmax(s, -1) @ v).sum(), q)
    bound, _ = softmax_error(*(x.detach().numpy() for x in (q, k, v)), 0.5, unit("float64"), 6)
    # a row's gradient is sum_j p_j (g_j - sum p g) k_j / 2: at most 2 max|v| d_v max|k| weights' errors
    assert abs(found - due).max() <= 2 * 4 * 3 * float(abs(k).max()) * bound


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"planes": np.zeros((3, 5))}, "planes: shape is (3, 5), expected (4, bits), 1 to 31 bits"),
        ({"draw": np.array([1, 2])}, "draw: got ndarray, expected a function; for given places use lambda"),
        ({"planes": np.zeros((4, 32))}, "planes: shape is (4, 32), expected (4, bits), 1 to 31 bits"),
        ({"block_size": 0}, "block_size: got 0, expected a whole number from 1 on"),
        ({"min_length": 1.5}, "min_length: got 1.5, expected a whole number from 1 on"),
        ({"mode": "fast"}, "mode: got 'fast', expected one of paper, released"),
        ({"causal": True}, "causal: got True, expected None, 'bottom_right' or 'top_left'"),
        ({"causal": "top_left"}, "key: has 7 tokens, expected query's 6 for a causal call; halves recurse"),
        (
            {"mode": "released"},
            "mode: 'released' pads 6 queries and 7 keys with zeros that are seen; pass lengths that",
        ),
        ({"draw": lambda n: np.array([7])}, "draw: draw(7) gave 7 to 7, expected places from 0 to 6"),
        ({"draw": lambda n: np.array([0.5])}, "draw: draw(7) gave float64 of shape (1,), expected whole numbers of"),
        (
            {"draw": lambda n: np.zeros((2, 2), int)},
            "of shape (2, 2), expected whole numbers of shape (m,) or (1, 2, m)",
        ),
    ],
)
def test_errors_name_the_argument(change, text):
    q, k, v, planes = call(0, 6, 7)
    options = {"planes": planes, "draw": drawer(0, 2), "block_size": 2, "min_length": 1} | change
    with pytest.raises(InvalidInput, match=re.escape(text)):
        hyper_attention(q, k, v, **options)
    with pytest.raises(InvalidInput, match=re.escape(text)):
        hyper_weight(q, k, **options)
