"""Norms of queries and keys: the answers of a definition with them, its gradients, and what kernels get wrong."""

import re

import mpmath
import numpy as np
import pytest
import torch

from refattn import (
    Capabilities,
    InvalidProblem,
    Problem,
    UnsupportedProblem,
    check_kernel,
    check_problem,
    evaluate,
    load_problem,
    save_problem,
    simulate,
)
from refattn.check.bugs.edits import NORM_BUGS, broken
from refattn.check.bugs.planted import planted
from refattn.check.diagnose.shrink import shrink
from refattn.check.kernels import tiled as module
from refattn.check.kernels.tiled import tiled
from refattn.check.model import FEATURES, FURTHER, MODELS
from refattn.scores import score_mod

from .check import norms_gate

ABLE = Capabilities({"float32"}, FEATURES | FURTHER, lse=True)
BUGS = "norm_ignored", "norm_unweighted", "norm_after_rotary"


def small(seed=1, turned=False, **more):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.integers(-4, 5, s).astype(np.float32) / 4 for s in ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)))
    weights = {n: rng.normal(1, 0.5, 8).astype(np.float32) for n in ("query_norm", "key_norm")}
    if turned:
        angle = np.arange(9)[:, None] * 100.0 ** -(np.arange(4) / 4)
        more |= {"rotary": "half", "rotary_cos": np.cos(angle).astype(np.float32)}
        more |= {"rotary_sin": np.sin(angle).astype(np.float32)}
    return Problem(q, k, v, **{"norm_eps": 1e-3, **weights} | more)


def test_the_answer_is_the_loops():
    """Every bit of out and lse, by mpmath from the formula's words, in which a norm comes before the turn."""
    p = small(turned=True, causal="bottom_right")
    answer = evaluate(p, rounding="float64")
    with mpmath.workdps(60):

        def row(x, w, at):
            x = [mpmath.mpf(float(a)) for a in x]
            root = mpmath.sqrt(sum(a * a for a in x) / 8 + mpmath.mpf(p.norm_eps))
            x = [a / root * mpmath.mpf(float(b)) for a, b in zip(x, w, strict=True)]
            cos, sin = ([mpmath.mpf(float(t)) for t in table[at]] for table in (p.rotary_cos, p.rotary_sin))
            pairs = [(x[c], x[c + 4], cos[c], sin[c]) for c in range(4)]
            return [a * c - b * s for a, b, c, s in pairs] + [b * c + a * s for a, b, c, s in pairs]

        for b, h, i in ((0, 0, 0), (1, 3, 4), (0, 2, 1)):
            q = row(p.query[b, h, i], p.query_norm, i + 2)
            keys = [row(p.key[b, h // 2, j], p.key_norm, j) for j in range(i + 3)]
            w = [mpmath.exp(sum(x * y for x, y in zip(q, k, strict=True)) / mpmath.sqrt(8)) for k in keys]
            assert answer.lse[b, h, i] == float(mpmath.log(sum(w)))
            for c in range(6):
                v = [mpmath.mpf(float(p.value[b, h // 2, j, c])) for j in range(i + 3)]
                assert answer.out[b, h, i, c] == float(sum(x * y for x, y in zip(w, v, strict=True)) / sum(w))


def test_gradients_are_autograds():
    p = small()
    dout = np.random.default_rng(0).standard_normal(p.out_shape)
    answer = evaluate(p, gradients=dout, rounding="float64")
    names = ("query", "key", "value", "query_norm", "key_norm")
    q, k, v, a, b = leaves = [torch.tensor(getattr(p, n), dtype=torch.float64, requires_grad=True) for n in names]
    q, k = (x * (x.square().mean(-1, keepdim=True) + p.norm_eps).rsqrt() * w for x, w in ((q, a), (k, b)))
    out = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).softmax(-1) @ v.repeat_interleave(2, 1)
    grads = torch.autograd.grad(out, leaves, torch.tensor(dout))
    for name, x in zip(("dq", "dk", "dv", "dquery_norm", "dkey_norm"), grads, strict=True):
        # some hundred roundings of sums whose terms stay below 64: 1 / root(eps) is 32
        assert np.abs(x.numpy() - answer.values[name]).max() <= 400 * 2.0**-53 * 64, name


def test_ties_are_recognised():
    """Of a row that sees one key lse is the score: 0 where the product is, 1 where the root is a whole number."""
    q, k = np.zeros((2, 1, 1, 1, 4), np.float32)
    q[..., 0], k[..., 0] = 1, 3
    w = np.full(4, 2, np.float32)
    p = Problem(q, k, k, query_norm=w, norm_eps=0.75, scale=0.5)  # mean 1/4 and eps 3/4: a root of 1
    assert evaluate(p, rounding="float32").lse.item() == 3.0
    assert evaluate(p.replace(key=k[..., ::-1].copy()), rounding="float32").lse.item() == 0.0
    value = np.array([1, 2.0**-23], np.float32).reshape(1, 1, 2, 1)
    same = Problem(q, np.repeat(k, 2, 2), value, key_norm=w, norm_eps=1e-5)
    assert evaluate(same, rounding="float32").out.item() == 0.5 + 2.0**-24  # two keys that are alike weigh alike
    odd = same.replace(value=np.array([1, 1 + 2.0**-23], np.float32).reshape(1, 1, 2, 1))
    assert evaluate(odd, rounding="float32").out.item() == 1.0  # a tie: to even


def test_one_norm_alone_and_kinds():
    p = small(key_norm=None)
    assert p.features() >= {"query_norm"}
    assert "key_norm" not in p.features()
    wanted = evaluate(p, rounding="float32").out
    for kind in ("torch", "jax"):
        assert (np.asarray(evaluate(p.to(kind), rounding="float32").out) == wanted).all()
    twice = p.replace(query=2 * p.query, norm_eps=4 * p.norm_eps)
    assert (evaluate(twice, rounding="float32").out == wanted).all()


def test_calls_carry_norms(tmp_path):
    p = small()
    save_problem(p, tmp_path / "p.npz")
    again = load_problem(tmp_path / "p.npz")
    assert again.norm_eps == p.norm_eps
    assert (again.key_norm == p.key_norm).all()
    found = shrink(p, None, lambda x, dout: x.query_norm is not None)[0]
    assert found.query_norm.shape == (1,)
    parts = evaluate(p, rounding="float64", gradients=p.value[:, :, :1].repeat(2, 1).repeat(5, 2), progress=print)
    assert parts.values["dquery_norm"].shape == (8,)


@pytest.mark.parametrize("name", BUGS)
def test_what_kernels_get_wrong_is_caught_in_quick(name):
    more = {"only": "positions/norm-rotary", "budget": "quick", "model": tiled.model}
    assert not check_kernel(planted(name), capabilities=ABLE, **more).right


def test_a_right_kernel_passes_and_is_predicted():
    gradients = {"dq", "dk", "dv", "dquery_norm", "dkey_norm"}
    able = Capabilities({"bfloat16"}, ABLE.features, lse=True, gradients=gradients)
    report = check_kernel(tiled, capabilities=able, dtypes=["bfloat16"], only="positions/norm*", model=tiled.model)
    assert report.passed, report.failures
    assert report.count("passed") == 6
    assert {w.array for c in report.checks for w in c.arrays} == {"out", "lse", *gradients}
    out = [w.figures.rms for c in report.checks for w in c.arrays if w.array == "out"]
    assert 0.8 < min(out) < max(out) < 1.2
    # of a norm's weights there are 32 elements: their mean square is spread by a quarter
    # (where all rows add up one way columns have what a row loses in common, and are few errors)
    apart = [c for c in report.checks if "aligned" not in c.name]
    back = [w.figures.rms for c in apart for w in c.arrays if w.array in gradients]
    assert 0.65 < min(back) < max(back) < 1.1
    law = check_kernel(tiled, capabilities=ABLE, only="law/norm_scaled", model=tiled.model)
    assert law.count("passed") == 1
    wrong = check_kernel(planted("norm_ignored"), capabilities=ABLE, only="law/norm_scaled", model=tiled.model)
    assert not wrong.passed


@pytest.mark.parametrize("name", NORM_BUGS)
def test_a_gradient_of_norms_that_kernels_get_wrong_is_caught_in_quick(name):
    """In each type; in bfloat16 the bound of a sum over all rows lets it pass, and what is predicted does not."""
    gradients = {"dq", "dk", "dv", "dquery_norm", "dkey_norm"}
    able = Capabilities({"float32", "float16", "bfloat16"}, ABLE.features, lse=True, gradients=gradients)
    more = {"only": "positions/norm-aligned/gradients*", "budget": "quick", "model": tiled.model}
    assert check_kernel(broken(name), capabilities=able, **more).count("failed") == 3


def test_pytorchs_own_gradients_pass_and_are_predicted():
    assert norms_gate.main(3, 5, 20) == 0


@pytest.mark.parametrize(("edit", "wrong"), [
    ("mean", {"dq", "dk"}),
    ("weights", {"dquery_norm", "dkey_norm"}),
])  # fmt: skip
def test_a_gradient_that_is_wrong_fails(edit, wrong, monkeypatch):
    """Without the part by the mean, and with weights' gradients of rows that are not normed."""
    right = module.unnormed

    def unnormed(p, x, g, which):
        back, weights = right(p, x, g, which)
        if edit == "mean":
            w = np.asarray((p.query_norm, p.key_norm)[which], x.dtype)
            return w * g / np.sqrt((x * x).mean(-1, keepdims=True) + x.dtype.type(p.norm_eps)), weights
        return back, (g * x).sum((0, 1, 2))

    monkeypatch.setattr(module, "unnormed", unnormed)
    p = small()
    report = check_problem(tiled, p, "x", gradients=np.ones(p.out_shape, np.float32), model=tiled.model)
    assert {w.array for w in report.checks[1].arrays if w.failures} == wrong


def test_simulated_kernels_pass():
    p = small(turned=True)
    for name in ("flash", "math", "float8"):
        model = MODELS[name]("float32")
        assert check_problem(lambda p, model=model: simulate(p, model), p, name, model=model).passed, name
    with pytest.raises(UnsupportedProblem, match="query_norm"):
        simulate(p, MODELS["sage"]("float32"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"norm_eps": None}, "norm_eps: is missing beside query_norm"),
        ({"norm_eps": 0}, "norm_eps: got 0, expected a finite number above 0"),
        ({"norm_eps": np.inf}, "norm_eps: got inf"),
        ({"norm_eps": True}, "norm_eps: got True"),
        ({"norm_eps": 10**400}, "norm_eps: got 1000"),
        ({"query_norm": None, "key_norm": None}, "norm_eps: nothing in the call takes a norm"),
        ({"query_norm": np.ones(4, np.float32)}, "query_norm: got shape (4,), expected (8,), a weight for each column "
            "of a head; a norm over all heads"),
        ({"query_norm": np.ones(8, int)}, "query_norm: got dtype int64, expected one of"),
        ({"key_norm": np.full(8, np.nan)}, "key_norm: has NaN or inf"),
        ({"key_norm": torch.ones(8)}, "key_norm: is of torch and query of numpy"),
        ({"key_norm": "ones"}, "key_norm: got str, expected an array"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(change, text):
    with pytest.raises(InvalidProblem, match=f"^{re.escape(text)}"):
        small(**change)


def test_an_epsilon_that_float32_has_not_bounds_nothing():
    """A kernel adds 0 in its place, and divides by 0 where a row is; float64's own has a bound."""
    p = small(norm_eps=1e-40, scale=0.5)
    check = check_problem(tiled, p, "x").checks[0]
    assert check.verdict == "unsupported"
    assert check.message == "norm_eps: 1e-40 has no bounds in float32, whose smallest normal number is 1.18e-38"
    wide = p.replace(**{n: x.astype(np.float64) for n, x in p.arrays().items()})
    assert check_problem(tiled, wide, "x").passed


def test_what_has_no_norms_says_so():
    p = small()
    with pytest.raises((InvalidProblem, UnsupportedProblem), match="query_norm"):
        evaluate(p.replace(variant="sigmoid"))
    with pytest.raises(UnsupportedProblem, match="key_norm, query_norm"):
        Capabilities({"float32"}).require(p)
    with pytest.raises(UnsupportedProblem, match="query_norm"):
        score_mod(p)
    with pytest.raises(InvalidProblem, match="rows without columns have no mean"):
        Problem(*(np.zeros((1, 1, 2, 0), np.float32),) * 2, np.zeros((1, 1, 2, 3), np.float32),
            query_norm=np.zeros(0, np.float32), norm_eps=1.0)  # fmt: skip
