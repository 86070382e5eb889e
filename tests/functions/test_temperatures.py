"""Factors by position, and the order in which a norm, a turn and a factor apply."""

import math

import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch

from refattn import Capabilities, InvalidInput, Problem, check_problem, evaluate
from refattn.check.kernels.tiled import tiled
from refattn.check.model import FEATURES, FURTHER
from refattn.functions.temperatures import llama4_factors, log_n_factors, tempered

N, D = 6, 4


def test_factors_are_the_formulas():
    at = np.array([0, 8190, 8191, 16383, 100000])
    for p, x in zip(at.tolist(), llama4_factors(at), strict=True):
        with mpmath.workdps(30):
            exact = mpmath.log((p + 1) // 8192 + 1) * mpmath.mpf(0.1) + 1
        assert abs(x - exact) <= 4 * 2.0**-53 * exact  # a logarithm, a product and a sum
    assert (llama4_factors(at[:2]) == 1).all()
    assert llama4_factors([3], floor_scale=2, attn_scale=1).tolist() == [math.log(3) + 1]
    assert log_n_factors(np.array([0, 2046, 2047]), 2048).tolist() == [1, 1, 1]
    assert abs(log_n_factors([4194303], 2048)[0] - 2) <= 8 * 2.0**-53  # log(2^22) over log(2^11)


def call(rng, factors, **more):
    """A causal call with norms, turned, and tempered by factors."""
    q, k, v = (rng.normal(size=(1, 2, N, D)).astype(np.float32) for _ in range(3))
    angle = np.arange(N)[:, None] * np.array([1.0, 0.1])
    cos, sin = tempered(np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32), factors)
    norm = {n: rng.uniform(0.5, 2, D).astype(np.float32) for n in ("query_norm", "key_norm")}
    at = {"positions_q": np.arange(N) + N, "rotary": "half", "rotary_cos": cos, "rotary_sin": sin}
    return Problem(q, k, v, causal="bottom_right", norm_eps=1e-2, **norm | at | more)


def test_a_norm_comes_first_then_the_turn_then_the_factor():
    """Every bit of lse by mpmath: the factor, a power of two here so that tables stay exact, is behind the norm."""
    factors = 2.0 ** (np.arange(N) // 2)
    p = call(np.random.default_rng(0), factors)
    found = evaluate(p, rounding="float64").lse

    def row(x, w, at, factor):
        x = [mpmath.mpf(float(a)) for a in x]
        root = mpmath.sqrt(sum(a * a for a in x) / D + mpmath.mpf(p.norm_eps))
        x = [a / root * mpmath.mpf(float(b)) for a, b in zip(x, w, strict=True)]
        c, s = ([mpmath.mpf(float(t)) for t in table[at]] for table in (p.rotary_cos, p.rotary_sin))
        first = [x[i] * c[i] - x[i + 2] * s[i] for i in (0, 1)]
        return [factor * a for a in first + [x[i + 2] * c[i] + x[i] * s[i] for i in (0, 1)]]

    with mpmath.workdps(50):
        for h, i in ((0, 0), (1, 3), (0, 5)):
            q = row(p.query[0, h, i], p.query_norm, i, float(factors[i]))
            keys = [row(p.key[0, h, j], p.key_norm, j, 1) for j in range(i + 1)]
            w = [mpmath.exp(sum(a * b for a, b in zip(q, k, strict=True)) / 2) for k in keys]
            assert found[0, h, i] == float(mpmath.log(sum(w)))


def test_a_factor_before_the_norm_is_another_call():
    """It is lost there, but for the epsilon; before the turn, without a norm, it is the same."""
    rng, factors = np.random.default_rng(1), 2.0 ** np.arange(N)
    right, plain = call(rng, factors), {"query_norm": None, "key_norm": None, "norm_eps": None}
    untempered = right.replace(positions_q=np.arange(N))
    before = untempered.replace(query=right.query * factors[:, None].astype(np.float32))
    assert (evaluate(right).lse[0, :, 1:] != evaluate(before).lse[0, :, 1:]).all()
    moved = np.abs(evaluate(before).lse - evaluate(untempered).lse).max()
    assert moved < np.abs(evaluate(right).lse - evaluate(untempered).lse).max()
    assert (evaluate(right.replace(**plain)).lse == evaluate(before.replace(**plain)).lse).all()
    scale = {"query_scale": factors.astype(np.float32).reshape(1, 1, N, 1)}  # as elements' scales are: before the norm
    assert (evaluate(untempered.replace(**scale)).lse == evaluate(before).lse).all()


def test_a_kernel_is_judged_with_it():
    factors = llama4_factors(np.arange(N), floor_scale=2)
    p = call(np.random.default_rng(2), factors)
    able = Capabilities({"float32"}, FEATURES | FURTHER, lse=True)
    assert check_problem(tiled, p, "x", gradients=np.ones(p.out_shape, np.float32), model=tiled.model).passed
    assert able.missing(p) == []
    wrong = lambda p: tiled(p.replace(positions_q=np.arange(N)))  # noqa: E731
    assert not check_problem(wrong, p, "x", model=tiled.model).passed
    flat = np.ones((N, D // 2), np.float32), np.zeros((N, D // 2), np.float32)  # no rotary positions
    cos, sin = tempered(*flat, factors)
    bare = p.replace(rotary_cos=cos, rotary_sin=sin, query_norm=None, key_norm=None, norm_eps=None)
    scaled = bare.query.astype(np.float64) * cos[N:, :1]
    wide = Problem(scaled, *(x.astype(np.float64) for x in (bare.key, bare.value)), causal="bottom_right")
    assert (evaluate(bare, rounding="float64").out == evaluate(wide).out).all()


@pytest.mark.parametrize("of", [np.asarray, torch.tensor, jnp.asarray])
def test_kinds(of):
    table = of(np.full((2, 3), 0.1, np.float32))
    cos, sin = tempered(table, table, [1.0, 3.0])
    assert type(cos) is type(table)
    assert np.asarray(cos).tolist() == np.float32([[0.1] * 3] * 3 + [[np.float32(0.1) * 3.0] * 3]).tolist()
    assert np.asarray(sin).dtype == np.float32


def test_lengths_past_every_position_are_as_good_as_any():
    assert llama4_factors([0, 2**53 - 1], floor_scale=2**70).tolist() == [1, 1]
    assert llama4_factors([2**53 - 1], floor_scale=2**53, attn_scale=1).tolist() == [1 + np.log(2)]
    assert log_n_factors([0, 2**53 - 1], 2**80).tolist() == [1, 1]
    (factor,) = log_n_factors([2**53 - 1], 2**52)
    assert abs(factor - 53 / 52) <= 4 * 2**-52  # two logarithms within an ulp, two quotients


ONES = np.ones((2, 3))


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (lambda: llama4_factors([-1]), "positions: got shape \\(1,\\), expected whole numbers of 0"),
        (lambda: llama4_factors([[1]]), "positions: got shape \\(1, 1\\)"),
        (lambda: llama4_factors([1], floor_scale=0), "floor_scale: got 0"),
        (lambda: llama4_factors([1], attn_scale=-1), "attn_scale: got -1"),
        (lambda: log_n_factors([1], 1), "length: got 1"),
        (lambda: log_n_factors([0.5], 4), "positions: "),
        (lambda: tempered(np.ones((2, 3)), np.ones((2, 2)), [1, 1]), "sin: "),
        (lambda: tempered(np.ones((2, 3)), torch.ones(2, 3), [1, 1]), "sin"),
        (lambda: tempered(np.ones((2, 3)), np.ones((2, 3)), [1.0]), "factors: got shape \\(1,\\), expected \\(2,\\)"),
        (lambda: tempered(np.ones((2, 3)), np.ones((2, 3)), [1.0, np.inf]), "factors: got shape \\(2,\\)"),
        (lambda: llama4_factors([1], attn_scale=10**400), "attn_scale: got 1000.*, expected a finite number from 0"),
        (lambda: tempered(ONES, ONES, ["a", "b"]), "factors: got dtype str.*, expected real numbers"),
        (lambda: tempered(ONES, ONES, [1j, 1]), "factors: got dtype complex128, expected real numbers"),
        (lambda: tempered(ONES, ONES, torch.ones(2) * 1j), "factors: got dtype complex64, expected real numbers"),
        (lambda: tempered(ONES, ONES, [None, None]), "factors: got dtype object, expected real numbers"),
        (lambda: tempered(ONES, ONES, [10**400, 1]), "factors: got dtype object, expected real numbers"),
        (lambda: tempered(ONES, ONES, [True, False]), "factors: got dtype bool, expected real numbers"),
        (lambda: tempered(ONES, ONES, [[1], 1]), "factors: got list, expected an array of numbers"),
        (lambda: tempered(ONES, ONES, None), "factors: got NoneType, expected an array of numbers"),
        (lambda: tempered(ONES * 1j, ONES, [1.0, 1.0]), "cos: got dtype complex128"),
        (lambda: tempered(ONES, ONES * 1j, [1.0, 1.0]), "sin: got dtype complex128"),
        (lambda: tempered(np.ones((2, 3), int), np.ones((2, 3), int), [1.0, 1.0]), "cos: "),
    ],
)
def test_bad_arguments_are_refused(run, text):
    with pytest.raises(InvalidInput, match=text):
        run()
