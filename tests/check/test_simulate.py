"""What a kernel of a model would give: within its bound, about as far off as predicted, past a finer model's."""

from dataclasses import replace

import numpy as np
import pytest

from refattn import InvalidInput, Model, Problem, UnsupportedProblem, check_problem, evaluate, simulate
from refattn.arrays import from_float64, to_float64
from refattn.check.model import MODELS, flash, sage
from refattn.dtypes import FORMATS

from . import simulate_gate as gate

B, H = "bfloat16", "float16"


def call(dtype, n_q=32, n_k=256, d=32, h=4, shift=0.0, side=0.0, middle=0.0, peak=1.0, **more):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, h, n, d)) for n in (n_q, n_k, n_k))
    parts = (FORMATS[dtype].round_array(x) for x in (peak * q + middle, k + side, v + shift))
    return Problem(*(from_float64(x, dtype) for x in parts), **more)


def first_key_leads():
    """All later keys weigh e^-4 or so beside the first."""
    bias = np.zeros((1, 1, 1, 256), np.float32)
    bias[..., 0] = 4.0
    return call(B, bias=bias, peak=0.25)


SCALED = {n: replace(flash(B), weights="int8", weights_scale=n, block=8) for n in ("static", "row", "block")}
TWO = {"aligned_bits": 13, "fused": 32, "promoted": 128, "tile": 64}
PAIRS = {
    "one level, two": (
        MODELS["hopper-float8"](B),
        MODELS["hopper-float8-promoted"](B),
        call(B, h=2, n_q=16, n_k=1536, shift=4.0, peak=0.5),
    ),
    "two levels, each rounded": (replace(flash(B), **TWO), flash(B), call(B, h=2, n_q=16, shift=4.0)),
    "23 bits, each rounded": (
        replace(MODELS["volta"](H), weights="float32"),
        Model(),
        call(H, h=2, n_q=16, n_k=1024, d=16, shift=8.0, peak=0.5, out_dtype="float32"),
    ),
    "P in int8 for 1, for a row": (SCALED["static"], SCALED["row"], first_key_leads()),
    "P in int8 for a row, in bfloat16": (SCALED["row"], flash(B), call(B, out_dtype="float32")),
    "int8, P too": (MODELS["sage-int8"](B), MODELS["sage"](B), call(B, h=16, n_k=128, d=64, peak=0.25)),
    "P in float8, float16": (MODELS["sage2"](B), MODELS["sage"](B), call(B, h=8, peak=0.5)),
    "P V in float16, float32": (
        replace(flash(H), value_sums=H),
        flash(H),
        call(H, h=1, n_q=16, n_k=2048, d=16, shift=4.0, peak=0.5),
    ),
    "keys smoothed, queries too": (
        sage(B),
        replace(sage(B), smoothed_queries=True),
        call(B, middle=32.0, n_q=16, h=2, d=64, scale=0.02, out_dtype="float32"),
    ),
    "P in float4, bfloat16": (MODELS["float4-weights"](B), flash(B), call(B, n_q=16, h=2)),
    "P in float4, int8": (MODELS["float4-weights"](B), SCALED["static"], call(B, n_q=16, h=2, peak=0.25)),
    "int8, bfloat16": (MODELS["sage"](B), flash(B), call(B)),
    "keys as they are, smoothed": (replace(sage(B), smoothed=False), sage(B), call(B, side=3.0)),
    "by chance, to nearest": (
        replace(flash(B), stochastic=True),
        flash(B),
        call(B, h=8, n_q=128, n_k=2, d=8, out_dtype="float32"),
    ),
    "tf32, three passes": (MODELS["tf32"]("float32"), MODELS["tf32x3"]("float32"), call("float32")),
    "scores stored, not": (MODELS["math"](B), flash(B), call(B)),
    "float8, bfloat16": (MODELS["float8"](B), flash(B), call(B)),
    "P in bfloat16, float16": (flash(B), Model(weights=H), call(B, out_dtype="float32")),
    "sums in float16, float32": (replace(flash(H), accumulator=H), flash(H), call(H)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_kernel_passes_its_own_model_and_fails_the_next_finer(name):
    own, finer, problem = PAIRS[name]

    def kernel(p):
        return simulate(p, own, seed=1)

    right, wrong = (check_problem(kernel, problem, "simulated", model=m) for m in (own, finer))
    assert [c.message for c in right.failures] == []
    assert wrong.count("failed") == 1


def test_sums_of_two_levels_are_promoted():
    """On the call that tells one level from two."""
    _, model, problem = PAIRS["one level, two"]
    assert check_problem(lambda p: simulate(p, model), problem, "promoted", model=model).passed


def test_a_finer_kernel_passes_a_coarser_model():
    """A unit of 25 bits is as good as float32, whatever the first rounds."""
    for own, judge in (("hopper", "flash"), ("tf32x3", "tf32"), ("flash", "math")):
        dtype = "float32" if "tf32" in own else B
        p = call(dtype, n_k=100)
        kernel = simulate(p, MODELS[own](dtype))
        assert check_problem(lambda _, k=kernel: k, p, "simulated", model=MODELS[judge](dtype)).count("failed") == 0


@pytest.mark.parametrize("name", gate.ALL)
def test_a_drawn_call_is_within_its_bound(name):
    worst, _, elements, _, _ = gate.run([name], 3, seed=1)[name]
    assert worst <= 1
    assert elements > 0


@pytest.mark.parametrize(
    "name", ["flash", "tf32", "hopper-float8", "sage", "sage2", "by-chance", "float4-weights", "sage-half"]
)
def test_errors_are_as_large_as_predicted(name):
    dtype = "float32" if name == "tf32" else B
    found = gate.judged(call(dtype, h=2, n_q=16, n_k=128), gate.ALL[name](dtype), 0)
    assert 0.75 < found["out"][1] < 1.25


def test_rows_that_one_key_leads_in_float8():
    """Its weight is 1, which P's scale makes a number of the type; of its rounding nothing is to be expected."""
    model = replace(flash(B), weights="float8_e4m3fn", weights_scale="static", tile=64)
    found = gate.judged(call(B, h=2, n_k=64, d=16, peak=4.0), model, 0)
    assert 0.8 < found["out"][1] < 1.2


def test_what_it_returns_is_like_the_problem():
    import torch

    p = call(B, n_q=3, n_k=5, d=4, h=2)
    out, lse = simulate(p, flash(B))
    assert (out.dtype, out.shape, lse.dtype, lse.shape) == (p.query.dtype, (1, 2, 3, 4), np.float32, (1, 2, 3))
    q, k, v = (torch.from_numpy(to_float64(x)).bfloat16() for x in (p.query, p.key, p.value))
    same, _ = simulate(Problem(q, k, v), flash(B))
    assert same.dtype == torch.bfloat16
    assert (same.double().numpy() == to_float64(out)).all()
    again, other = (simulate(p, flash(B), seed=s)[0] for s in (0, 1))
    assert (to_float64(again) == to_float64(out)).all()
    chance = replace(flash(B), stochastic=True)
    assert (to_float64(simulate(p, chance, seed=1)[0]) != to_float64(simulate(p, chance, seed=2)[0])).any()
    assert other.shape == out.shape
    assert isinstance(simulate(p.replace(variant="sigmoid"), Model()), np.ndarray)


def test_one_key_is_known():
    """Its weight is 1, so out is its value, and lse its score to float32."""
    p = call("float32", n_q=2, n_k=1, d=4, h=1)
    out, lse = simulate(p, Model(exp_ulps=1e-9))
    assert (out == p.value).all()
    products = (p.query[0, 0] * p.key[0, 0]).astype(np.float32)
    total = np.float32(0)
    for j in range(4):
        total = total + products[:, j]
    assert (lse[0, 0] == total * np.float32(0.5)).all()


def test_rows_without_keys_and_what_is_not_finite():
    p = call("float32", n_q=3, n_k=4, d=4, h=1)
    allowed = np.array([[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)[None, None]
    value, key = p.value.copy(), p.key.copy()
    value[..., 2, 0], value[..., 3, 1] = np.nan, np.inf
    p = p.replace(value=value, key=key, allowed=allowed)
    out, lse = simulate(p, Model())
    exact = evaluate(p)
    assert (out[0, 0, 0] == 0).all()
    assert np.isneginf(lse[0, 0, 0])
    assert np.isfinite(out[0, 0, 1]).all()
    assert np.array_equal(np.isnan(out), np.isnan(exact.out))
    assert np.array_equal(np.isinf(out), np.isinf(exact.out))
    none = simulate(p.replace(key=key[:, :, :0], value=value[:, :, :0], allowed=None), Model())
    assert not none[0].any()


@pytest.mark.parametrize(
    ("model", "more", "text"),
    [
        (Model(split=7), {}, "simulate: a model with split merges"),
        (Model(from_lse=True), {}, "simulate: a model with from_lse"),
        (Model(), {"variant": "lightning", "causal": "bottom_right"}, "lightning attention goes token by token"),
        (SCALED["static"], {"weight": np.full((1, 1, 5, 5), 2.0)}, "weights_scale is of weights that are at most 1"),
        (SCALED["static"], {"variant": "sigmoid"}, "weights_scale is of weights that are at most 1"),
        (sage(B), {"softcap": 2.0}, "smoothed keys do not go with softcap"),
    ],
)
def test_what_is_not_simulated_is_refused_by_name(model, more, text):
    p = call(B, n_q=5, n_k=5, d=4, h=1)
    more = {n: {"decay": (0.5,)} if n == "options" else x for n, x in more.items()}
    with pytest.raises(UnsupportedProblem, match=text):
        simulate(p.replace(**more), model)


def test_bad_arguments():
    p = call(B, n_q=5, n_k=5, d=4, h=1)
    for args, text in (
        ((1, Model()), "problem: got 'int', expected a Problem"),
        ((p, "flash"), "model: got 'str', expected a Model"),
        ((p, Model(), -1), "seed: got -1, expected an integer of at least 0"),
    ):
        with pytest.raises(InvalidInput, match=text):
            simulate(*args)
