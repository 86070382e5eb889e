"""Small trials of the checker itself: right answers pass, wrong ones fail by name, bounds are as wide as they say.

test_mutations.py runs them on the checker and on edited ones. The checker is imported anew each time; exact answers
come from outside of it and are kept. A trial fails by an assertion: an edit that makes the checker crash proves
nothing.
"""

import importlib
from functools import cache
from types import SimpleNamespace

import numpy as np

import refattn
from refattn import KernelError, Problem, UnsupportedProblem, evaluate
from refattn.arrays import from_float64, to_float64
from refattn.dtypes import FORMATS

from ..conftest import tensor

MODULES = {
    "bounds": "bounds.forward",
    "call": "call",
    "choices": "bounds.choices",
    "compare": "compare",
    "families": "inputs.families",
    "gradient_bounds": "bounds.gradients",
    "laws": "laws",
    "model": "model",
    "operands": "bounds.operands",
    "predict": "bounds.predict",
    "rounded": "bounds.rounded",
    "runner": "runner",
    "expected": "bounds.expected",
    "units": "bounds.units",
    "stores": "bounds.stores",
    "sums": "sums",
}
U = 2.0**-24  # float32's unit roundoff


def _problem(n_q, n_k, d=8, *, h=2, h_kv=2, dtype="float32", size=1.0, **more):
    rng = np.random.default_rng(0)
    q, k, v = (tensor(rng, s, dtype) for s in ((1, h, n_q, d), (1, h_kv, n_k, d), (1, h_kv, n_k, d)))
    return Problem(q, k, (v * v.dtype.type(size)).astype(v.dtype), **more)


def _without(n_q, n_k, row):
    allowed = np.ones((1, 1, n_q, n_k), bool)
    allowed[..., row, :] = False
    return allowed


def _poisoned():
    p = _problem(5, 7, allowed=_without(5, 7, 1))
    value = p.value.copy()
    value[0, 0, 2, 3], value[0, 0, 4, 5] = np.nan, np.inf  # seen by every row but 1
    return p.replace(value=value)


def _cancelling():
    """Two keys, scores in the hundreds from few large products, values of one sign: no rounding cancels."""
    p = _problem(4, 2, scale=1.0)
    q, k = p.query * np.float32(8), p.key * np.float32(8)
    return p.replace(query=q, key=k, value=np.abs(p.value))


def _opposite():
    """Two keys with equal scores and opposite values: what the exponentials are off by is all that out shows."""
    p = _problem(60, 2)
    value = p.value.copy()
    value[:, :, 1] = -value[:, :, 0]
    return p.replace(query=np.zeros_like(p.query), value=value)


def _exponentials():
    """Exponentials of queries and keys in the tens: an error of 2**-11 of these is no small one of theirs."""
    p = _problem(8, 8, variant="linear", options={"feature": "exp", "normalize": False})
    q, k = (np.abs(x) * np.float32(12) + np.float32(8) for x in (p.query, p.key))
    return p.replace(query=q, key=k, value=np.abs(p.value), scale=2.0**-60)


def _tied():
    p = _problem(5, 2, scale=1.0)
    q, k, value = np.zeros_like(p.query), np.zeros_like(p.key), p.value.copy()
    q[..., :2], k[..., 0], k[..., 1] = 32, 32, -32
    value[:, :, 1] = -value[:, :, 0]
    return p.replace(query=q, key=k, value=value)


def _sizes():
    p = _problem(32, 32, 16, dtype="bfloat16")
    value = p.value.astype(np.float64)
    value[:, 1], value[:, 0, :, -1] = value[:, 1] / 4096, value[:, 0, :, -1] / 4096
    return p.replace(value=from_float64(value, "bfloat16"))


def _offset():
    """Scores far from 0 by their first product, the same for all keys; the sums' mantissas are spread."""
    p = _problem(64, 64, 64)
    query, key = p.query.copy(), p.key.copy()
    query[..., 0], key[..., 0] = 2.0 ** np.random.default_rng(4).uniform(4, 5, query.shape[:3]), 24
    return p.replace(query=query, key=key)


def _alike():
    p = _problem(40, 9, 16, dtype="bfloat16")
    return p.replace(query=np.broadcast_to(p.query[:, :, :1], p.query.shape).copy())


def _nearly_whole():
    """Own keys hold nearly all of the weight: results lie just inside the values, and are rounded outward to them."""
    p = _problem(128, 128, 16, h=4, dtype="bfloat16", causal="bottom_right")
    return p.replace(query=from_float64(np.float64(4 * np.sign(to_float64(p.key))), "bfloat16"), key=np.sign(p.key))


def _saturated():
    """Scores far past their cap: the weights of a row are one number over their sum, and rows differ by their sinks."""
    p = _problem(17, 17, 64, h=16, h_kv=2, dtype="bfloat16", softcap=2.0, causal="bottom_right")
    key = np.abs(p.key.astype(np.float64)) * 64 + 64
    sink = np.random.default_rng(1).standard_normal(16).astype(np.float32)
    return p.replace(query=np.abs(p.query), key=from_float64(key, "bfloat16"), sink=sink)


PROBLEMS = {
    "plain": lambda: _problem(32, 32, 16),
    "bfloat16": lambda: _problem(32, 32, 16, dtype="bfloat16"),
    "alike": lambda: _alike(),
    "nearly-whole": lambda: _nearly_whole(),
    "saturated": lambda: _saturated(),
    "idle": lambda: _problem(40, 4096, allowed=np.broadcast_to(np.arange(4096) < 5, (1, 1, 40, 4096)).copy()),
    "one-key": lambda: _problem(5, 1),
    "one-key-bfloat16": lambda: _problem(5, 1, dtype="bfloat16"),
    "tied": _tied,
    "capped": lambda: _problem(6, 9, softcap=1.5, sink=np.array([0.5, -1.0], np.float32)),
    "cancelling": _cancelling,
    "opposite": _opposite,
    "exponentials": _exponentials,
    "poisoned": _poisoned,
    "grouped": lambda: _problem(30, 30, h=4, allowed=_without(30, 30, 3)),
    "sizes": _sizes,  # head 1, and the last column of head 0, hold numbers 4096 times smaller
    "offset": _offset,
    "overflow": lambda: _problem(
        5, 7, dtype="float16", variant="linear", options={"feature": "identity", "normalize": False}, scale=1e5
    ),
    "law": lambda: _problem(6, 8, h=4, allowed=np.broadcast_to(np.arange(8) != 2, (1, 1, 6, 8)).copy()),
}


@cache
def problem(name):
    return PROBLEMS[name]()


@cache
def arriving(name):
    """Return a gradient at out that is 0 in the last head: what its group loses, the head before it loses."""
    x = tensor(np.random.default_rng(1), problem(name).out_shape, problem(name).dtype)
    x[:, -1] = 0
    return x


KEPT = {}


def answer(p, gradients=None, **_):
    """Return the exact answer, evaluated once (the problem is kept, so that its id stays its own)."""
    key = id(p), None if gradients is None else gradients.tobytes()
    if key not in KEPT:
        KEPT[key] = p, evaluate(p, gradients=gradients)
    return KEPT[key][1]


def checker():
    """Return the checker's modules as they are imported now."""
    c = SimpleNamespace(**{n: importlib.import_module(f"refattn.check.{m}") for n, m in MODULES.items()})
    tiled = importlib.import_module("refattn.check.kernels.tiled")
    c.tiled, c.back = tiled.tiled, tiled.gradients
    return c


def judge(c, name, got, array="out", bound=None):
    """Compare an array with the exact one: its bound, and for softmax's out its predicted errors."""
    p, a = problem(name), answer(problem(name))
    model = c.model.flash(p.dtype)
    bound = c.bounds.bounds(a, model)[array] if bound is None else bound
    variance = c.bounds.forward(a, model)[1].get("out") if array == "out" else None
    return c.compare.compare(array, got, a, bound, p.dtype if array == "out" else "float32", variance)


def limit(c, name):
    p = problem(name)
    return c.bounds.bounds(answer(p), c.model.flash(p.dtype))["out"]


def rounded(name, array="out"):
    """Return the exact array, rounded to the type that a kernel returns it in."""
    form = problem(name).dtype if array == "out" else "float32"
    return from_float64(FORMATS[form].round_array(answer(problem(name)).values[array]), form)


# one array against the exact one ------------------------------------------------------------------------------------


def trial_right_kernels_use_a_fair_share_of_their_bounds(c):
    for name, low in (("plain", 0.015), ("bfloat16", 0.15)):
        out, lse = c.tiled(problem(name))
        w, second = judge(c, name, out), judge(c, name, lse, "lse")
        assert w.passed
        assert second.passed
        assert low < w.ratio < 10 * low
        assert 0.02 < second.ratio < 0.2
        assert 0.55 < w.figures.rms < 1.1
        assert max(w.figures.by_head) == max(w.figures.by_row) == w.ratio


def trial_right_gradients_use_a_fair_share_of_their_bounds(c):
    p, g, model = problem("grouped"), arriving("grouped"), c.model.flash("float32")
    a = answer(p, g)
    bound = c.gradient_bounds.gradient_bounds(a, model, g, c.bounds.bounds(a, model))
    predicted = c.predict.predict(a, model, g, c.bounds.forward(a, model)[1])
    for name, x in c.back(p, g).items():
        w = c.compare.compare(name, x, a, bound[name], "float32", predicted[name])
        assert w.passed, name
        assert 0.004 < w.ratio < 0.04, name
        assert 0.5 < w.figures.rms < 1.1, name


def trial_the_bound_of_one_key_is_known(c):
    """Out is v: 5 roundings in numerator and denominator, the quotient, its own; P's and out's where narrower."""
    for name, own, weights in (("one-key", U, 0.0), ("one-key-bfloat16", 2.0**-8, 2.0**-8)):
        size = np.abs(to_float64(problem(name).value))
        share = limit(c, name) / (size * (11 * U + own + weights))
        assert (np.abs(share - 1) < 0.01).all(), name


def trial_the_bound_of_two_tied_keys_is_known(c):
    """The scores are 0 by cancellation, their errors (d_k + 2) u 2048: these move out by |v|, and lse, in full."""
    p, a = problem("tied"), answer(problem("tied"))
    bound = c.bounds.bounds(a, c.model.flash("float32"))
    e = 10 * U * 2048
    assert (np.abs(bound["out"] / (e * np.abs(p.value[:, :, :1])) - 1) < 0.01).all()
    assert (np.abs(bound["lse"] / e - 1) < 0.01).all()


def trial_what_rounds_as_its_model_says_is_within_the_bound(c):
    """Every operation off by as much as the Model allows, one way or by turns: nothing passes its bound."""
    rng = np.random.default_rng(3)
    m = c.model
    for name in ("plain", "grouped", "one-key", "bfloat16", "capped", "cancelling", "opposite", "exponentials"):
        p, a = problem(name), answer(problem(name))
        usual = m.flash(p.dtype), m.materialised(p.dtype), m.narrowed(p.dtype, "tf32", "")
        for model in (*usual, m.materialised("bfloat16"), m.Model(tile=1, exp_ulps=20.0)):
            bound = c.bounds.bounds(a, model)
            for how in c.rounded.HOWS:
                got = c.rounded.simulate(p, model, how, rng)
                for array, x in got.items():
                    error, seen = a.enclosures[array].error(x), np.isfinite(a.enclosures[array].mid)
                    assert (error <= bound[array])[seen].all(), (name, array, how)


def trial_the_table_of_what_passes(c):
    for array in ("out", "lse"):
        w = judge(c, "poisoned", rounded("poisoned", array), array)
        assert w.passed
        assert max(w.figures.by_head) == w.ratio < 1
        assert w.figures.correctly_rounded == 1
        assert w.figures.ulps[0] < w.figures.ulps[1] < 0.51
    nan = rounded("poisoned")
    nan[np.isinf(nan)] = np.nan
    assert judge(c, "poisoned", nan).passed  # NaN for an infinity
    for array, place, value, symptom in (
        ("out", (0, 0, 0, 0), np.nan, "NaN where the exact value is finite"),
        ("out", (0, 1, 4, 7), np.nan, "NaN where the exact value is finite"),
        ("out", (0, 1, 0, 0), np.inf, "inf where the exact value is finite"),
        ("out", (0, 0, 4, 0), -np.inf, "inf where the exact value is finite"),
        ("out", (0, 1, 4, 7), 1e3, "error above the bound"),
        ("out", (0, 0, 4, 7), -1e3, "error above the bound"),
        ("out", (0, 0, 1, 0), 1e-30, "a nonzero number in a row without keys"),
        ("out", (0, 1, 1, 0), np.nan, "NaN in a row without keys"),
        ("out", (0, 0, 0, 3), 1.0, "a finite number where NaN or inf must show"),
        ("out", (0, 0, 0, 5), 1.0, "a finite number where NaN or inf must show"),
        ("out", (0, 0, 0, 5), -np.inf, ""),
        ("out", (0, 0, 0, 3), np.inf, ""),
        ("lse", (0, 0, 1), np.nan, "lse of a row without keys is NaN"),
        ("lse", (0, 1, 1), 0.0, "lse of a row without keys is 0, must be -inf"),
        ("lse", (0, 1, 1), np.inf, "lse of a row without keys is inf"),
        ("lse", (0, 1, 4), 100.0, "error above the bound"),
        ("lse", (0, 0, 0), np.nan, "NaN where the exact value is finite"),
    ):
        x = rounded("poisoned", array)
        x[place] = value
        w = judge(c, "poisoned", x, array)
        assert not w.passed, (place, value)
        assert (w.array, w.place, w.failures, w.elements) == (array, place, 1, x.size)
        assert any(symptom in s for s in w.symptoms) or not symptom, w.symptoms


def trial_three_times_the_bound_fails_on_either_side(c):
    bound = limit(c, "plain")
    for place in ((0, 0, 0, 0), (0, 1, 31, 15)):
        for side in (-3, 3):
            x = answer(problem("plain")).out.copy()
            x[place] += side * bound[place]
            w = judge(c, "plain", x)
            assert (w.place, w.failures) == (place, 1)
            assert 2.9 < w.ratio < 3.1
            head, row = np.zeros(2), np.zeros(16)
            head[place[1]], row[place[2] // 2] = w.ratio, w.ratio
            assert np.allclose(w.figures.by_head, head, rtol=1e-6)
            assert np.allclose(w.figures.by_row, row, rtol=1e-6)


def trial_small_numbers_are_not_hidden_by_large_ones(c):
    for place in (np.s_[:, 1], np.s_[:, 0, :, -1]):
        x = rounded("sizes")
        x[place] = 0
        w = judge(c, "sizes", x)
        assert w.failures > 0.9 * x[place].size
    bound, x = limit(c, "sizes"), answer(problem("sizes")).out.copy()
    x[0, 0, 0, 0] += 2 * bound[0, 0, 0, 0]
    x[0, 1, 2, 3] += 9 * bound[0, 1, 2, 3]  # a smaller error, further outside
    assert judge(c, "sizes", x).place == (0, 1, 2, 3)


def trial_overflow_of_the_format(c):
    got, a = rounded("overflow"), answer(problem("overflow"))
    assert np.isinf(got).any()
    assert judge(c, "overflow", got).passed
    assert not judge(c, "overflow", np.where(np.isinf(got), -got, got)).passed
    assert not judge(c, "overflow", np.where(np.abs(a.out) < 6e4, np.float16(np.inf), got)).passed


def trial_a_bound_that_is_no_number_fails(c):
    x = rounded("plain")
    assert not judge(c, "plain", x, bound=np.full(x.shape, np.nan)).passed


def trial_a_head_that_is_wrong_alike_in_all_rows(c):
    """Errors of one head that are no independent draws: too large together, each within its bound."""
    a = answer(problem("plain"))
    size = np.sqrt(c.bounds.forward(a, c.model.flash("float32"))[1]["out"])
    right, wrong = (judge(c, "plain", a.out + by * size * np.array([0, 1])[:, None, None]) for by in (6, 8))
    assert right.passed
    assert wrong.failures == 0
    assert not wrong.passed


def trial_the_errors_as_a_whole(c):
    """Errors of the predicted size have an rms of 1; of 1.5 times that, they are too many, each within its bound."""
    a = answer(problem("plain"))
    size = np.sqrt(c.bounds.forward(a, c.model.flash("float32"))[1]["out"])
    sign = np.where(np.random.default_rng(2).random(size.shape) < 0.5, -1, 1)
    right, wrong = (judge(c, "plain", a.out + by * size * sign) for by in (1, 1.5))
    assert right.passed
    assert abs(right.figures.rms - 1) < 1e-3
    assert abs(right.figures.bias) < 0.1
    assert wrong.failures == 0
    assert not wrong.passed
    assert any("times what the model's roundings give" in s for s in wrong.symptoms)
    once = a.out + size * sign * np.where(np.arange(32) == 5, 11, 1)[:, None]
    assert judge(c, "plain", once).passed  # one row of many, by chance
    assert abs(judge(c, "plain", a.out - size * np.sign(a.out)).figures.bias + 1) < 1e-3
    assert judge(c, "plain", rounded("plain")).figures.correctly_rounded == 1


def trial_errors_that_lean(c):
    """Errors of half the predicted size that all go outward, each within its bound: roundings to nearest do not."""
    a, alike = answer(problem("bfloat16")), answer(problem("alike"))
    sizes = [np.sqrt(c.bounds.forward(x, c.model.flash("bfloat16"))[1]["out"]) for x in (a, alike)]
    sign = np.where(np.random.default_rng(2).random(sizes[0].shape) < 0.5, -1, 1)

    def judged(x, got, inner):
        bound, variance = c.bounds.forward(x, c.model.flash("bfloat16"))
        return c.compare.compare("out", got, x, bound["out"], "bfloat16", variance["out"], lambda: inner)

    outward = a.out + 0.5 * sizes[0] * np.sign(a.out)
    wrong = judged(a, outward, 0.0 * sizes[0])
    assert wrong.failures == 0
    assert not wrong.passed
    assert any("errors lean to larger values: their mean is +0.5 " in s for s in wrong.symptoms)
    assert judged(a, a.out + 0.5 * sizes[0] * sign, 0.0 * sizes[0]).passed
    assert judged(a, outward, 0.5 * sizes[0]).passed  # what the accumulator may add
    whole = judged(answer(problem("nearly-whole")), rounded("nearly-whole"), 0.0)
    assert whole.figures.bias > 0.09  # the exact answer's own rounding leans
    assert whole.passed
    assert judged(alike, alike.out + 0.5 * sizes[1] * np.sign(alike.out), 0.0 * sizes[1]).passed  # one row, again


def trial_weights_that_are_rounded_alike(c):
    p = problem("saturated")
    known = c.expected.of_answer(answer(p), c.model.flash("bfloat16"))
    assert c.compare.against(known, "out", c.tiled(p)[0], "bfloat16").passed


def trial_a_kernel_that_divides_in_every_tile(c):
    """Tiles that add nothing multiply by z (1/z) again and again."""
    p = problem("idle")
    s = p.query.astype(np.float64) @ p.key.astype(np.float64).swapaxes(2, 3) / np.sqrt(p.d_k)
    w = np.where(p.allowed, np.exp(s - np.where(p.allowed, s, -np.inf).max(3, keepdims=True)), 0)
    z = w.sum(3, keepdims=True).astype(np.float32)
    out = ((w @ p.value.astype(np.float64)) / z).astype(np.float32)
    for _ in range(p.n_k // 16 - 1):
        out = out * (z * (np.float32(1) / z))
    seen = judge(c, "idle", out)
    assert seen.passed
    assert seen.figures.rms > 0.3


def trial_products_whose_first_term_is_large(c):
    """Scores added up in the features' order: all partial sums are as large as the whole, and their errors foreseen."""
    p = problem("offset")
    s = np.zeros((*p.out_shape[:3], p.n_k), np.float32)
    for i in range(p.d_k):
        s = s + p.query[..., i, None] * p.key[..., None, :, i]
    s = s.astype(np.float64) / np.sqrt(p.d_k)
    w = np.exp(s - s.max(3, keepdims=True))
    seen = judge(c, "offset", w @ p.value.astype(np.float64) / w.sum(3, keepdims=True))
    assert seen.passed
    assert 0.8 < seen.figures.rms < 1.1


# the contract of a call ---------------------------------------------------------------------------------------------


def refusal(call, *args):
    try:
        call(*args)
    except KernelError as e:
        return str(e)
    return "nothing was said"


def raises(p, *_):
    raise RuntimeError("no such tile")


def refuses(p, *_):
    raise UnsupportedProblem("not here")


def editing(f, change):
    """Return a kernel, or a backward pass, that changes its inputs when it is done."""

    def kernel(*args):
        result = f(*args)
        change(*args)
        return result

    return kernel


def trial_a_call_keeps_its_contract(c):
    p, t = problem("plain"), c.tiled
    before = {n: x.tobytes() for n, x in p.arrays().items()}
    assert refusal(c.call.call_kernel, t, p) == "nothing was said"
    for kernel, text in (
        (raises, "the kernel raised RuntimeError: no such tile"),
        (editing(t, lambda p: p.value.fill(0)), "the kernel changed its input value"),
        (lambda p: None, "the kernel returned NoneType"),
        (lambda p: (*t(p), 1), "the kernel returned 3 parts"),
        (lambda p: t(p)[0][:, :, :1], "out: got shape"),
        (lambda p: t(p)[0].swapaxes(2, 3), "out: got shape"),
        (lambda p: t(p)[0].astype(np.float64), "out: got dtype float64, expected query's float32"),
        (lambda p: (t(p)[0], t(p)[1][0]), "lse: got shape"),
        (lambda p: (t(p)[0], t(p)[1].astype(int)), "lse: got dtype int64"),
        (lambda p: p.query, "out: shares memory with the input query"),
        (lambda p: (t(p)[0], p.value[..., 0]), "lse: shares memory with the input value"),
    ):
        assert text in refusal(c.call.call_kernel, kernel, p), text
        assert before == {n: x.tobytes() for n, x in p.arrays().items()}, text


def trial_a_backward_call_keeps_its_contract(c):
    p, g = problem("grouped"), arriving("grouped")
    before = g.tobytes()

    def said(gradients):
        return refusal(c.call.call_gradients, SimpleNamespace(gradients=gradients), p, g)

    assert said(c.back) == "nothing was said"
    for gradients, text in (
        (None, "the kernel has no attribute gradients"),
        (raises, "the kernel raised RuntimeError"),
        (editing(c.back, lambda p, g: p.key.fill(0)), "the kernel changed its input key"),
        (editing(c.back, lambda p, g: g.fill(0)), "the kernel changed its input dout"),
        (lambda p, g: {}, "gradients: got"),
        (lambda p, g: c.back(p, g) | {"dsink": g}, "dsink: the call has no sink"),
        (lambda p, g: {"dk": c.back(p, g)["dq"]}, "dk: got shape"),
        (lambda p, g: {"dk": c.back(p, g)["dk"].astype(np.float16)}, "dk: got dtype float16"),
        (lambda p, g: {"dv": p.value}, "dv: shares memory with the input value"),
        (lambda p, g: {"dq": g}, "dq: shares memory with the input dout"),
    ):
        assert text in said(gradients), text
        assert before == g.tobytes()


# the runner's verdicts ----------------------------------------------------------------------------------------------


def run(c, kernel, backward=None, name="plain", **able):
    """Run the checks of one problem; return the report, and of each check verdict and message."""
    case = c.families.Case("mine", name, "softmax", lambda draw: problem(name))
    c.runner.cases, c.expected.evaluate = lambda variant, budget: [case], answer

    def own(p):
        return kernel(p)

    own.gradients = backward
    return c.runner.check_kernel(own, capabilities=c.model.Capabilities(**able), only="mine/*")


def trial_verdicts(c):
    t = c.tiled
    for kernel, able, verdict, text in (
        (t, {"lse": True}, "passed", ""),
        (lambda p: t(p)[0], {}, "passed", ""),
        (raises, {}, "failed", "raised RuntimeError"),
        (refuses, {"refuses": True}, "unsupported", "not here"),
        (refuses, {}, "failed", "it raised UnsupportedProblem inside its capabilities: not here"),
        (lambda p: t(p)[0].astype(np.float64), {}, "failed", "out: got dtype float64"),
        (lambda p: t(p.replace(scale=1.0)), {}, "failed", "error above the bound"),
        (lambda p: t(p)[0], {"lse": True}, "failed", "returned no lse"),
        (lambda p: (t(p)[0], t(p)[1].astype(np.float16)), {}, "failed", "lse: got dtype float16"),
        (lambda p: (t(p)[0], t(p)[1] / np.float32(np.log(2))), {}, "failed", "error above the bound"),
        (lambda p: (t(p)[0], t(p)[1] + np.float32(1e-3)), {}, "failed", "error above the bound"),
    ):
        report = run(c, kernel, **able)
        (check,) = report.checks
        assert check.verdict == verdict, (check, verdict)
        assert text in check.message
        assert report.passed == (verdict == "passed")
        if kernel is t:
            assert [w.array for w in check.arrays] == ["out", "lse"]
        if check.arrays:
            assert check.worst.ratio == max(w.ratio for w in check.arrays)


def trial_the_runner_predicts(c):
    """Errors within their bound, and more of them than the model's roundings give, fail."""
    a, bound = answer(problem("bfloat16")), limit(c, "bfloat16")
    sign = np.where(np.random.default_rng(2).random(bound.shape) < 0.5, -1, 1)
    got = from_float64(FORMATS["bfloat16"].round_array(a.out + bound * sign / 2), "bfloat16")
    (check,) = run(c, lambda p: got, name="bfloat16", dtypes={"bfloat16"}).checks
    assert check.verdict == "failed"
    assert check.ratio < 1


def trial_outside_the_capabilities(c):
    for kernel, verdict in (
        (c.tiled, "unsupported"),
        (raises, "unsupported"),
        (refuses, "unsupported"),
        (lambda p: c.tiled(p.replace(allowed=None)), "edge"),
    ):
        report = run(c, kernel, name="grouped", features={"grouped_heads"})
        assert [k.verdict for k in report.checks] == [verdict]
        assert report.checks[0].message.startswith("not in its capabilities: allowed")
        assert not report.passed


def trial_verdicts_of_gradients(c):
    able = {"lse": True, "gradients": {"dq", "dk", "dv"}}

    def edited(name, by):
        return lambda p, g: (r := c.back(p, g)) | {name: (r[name] * np.float32(by)).astype(np.float32)}

    for gradients, text in (
        (c.back, ""),
        (edited("dq", 1.01), "error above the bound"),
        (edited("dk", 0), "error above the bound"),
        (edited("dv", -1), "error above the bound"),
        (edited("dk", np.nan), "NaN where the exact value is finite"),
        (lambda p, g: {n: x for n, x in c.back(p, g).items() if n != "dv"}, "the kernel returned no dv"),
        (raises, "raised RuntimeError"),
    ):
        report = run(c, c.tiled, gradients, "grouped", **able)
        assert [k.name for k in report.checks] == ["mine/grouped[float32]", "mine/grouped/gradients[float32]"]
        # NaN in a gradient may come from the row without keys: a contract of its own
        wrong = "edge" if text.startswith("NaN") else "failed"
        assert [k.verdict for k in report.checks] == ["passed", wrong if text else "passed"], text
        assert text in report.checks[1].message
        assert report.passed == (not text)
    report = run(c, c.tiled, c.back, "grouped", **able | {"features": {"grouped_heads"}})
    assert [k.verdict for k in report.checks] == ["unsupported"] * 2


def trial_laws(c):
    t, calls = c.tiled, []
    able = c.model.Capabilities(lse=True, gradients=c.model.GRADIENTS, batch_invariant=True)

    def law(name, kernel):
        p = problem("law")
        if name == "key_permutation":  # a mask would have to move along
            p = problem("plain")
        elif name not in ("determinism", "masked_keys_unread", "grouped_heads", "split_and_merge"):
            p = c.laws.law_problem(c.laws.LAWS[name], "float32", "softmax")
        return c.laws.LAWS[name].test(c.laws.Trial(kernel, c.model.flash("float32"), able), p)

    def backward(name, value):
        def kernel(p):
            return t(p)

        def gradients(p, dout):
            found = c.back(p, dout)
            return found | {name: value(found[name])}

        kernel.gradients = gradients
        return kernel

    def every_other(value):
        def kernel(p):
            calls.append(p)
            out, lse = t(p)
            out[0, 1, 2, 3] *= value if len(calls) % 2 else 1
            return out, lse

        return kernel

    def reads_hidden(p):
        out, lse = t(p)
        return out + np.float32(1e-3) * p.value[:, :1, 2:3], lse

    def mapped(p):
        at = np.arange(p.heads) % p.heads_kv
        return t(p.replace(key=p.key[:, at], value=p.value[:, at]))

    def first_dropped(p):
        return t(p.replace(allowed=np.broadcast_to(np.arange(p.n_k) > 0, (1, 1, p.n_q, p.n_k)).copy()))

    for name in refattn.VARIANTS["softmax"].laws:
        one = c.laws.LAWS[name]
        assert one.named_only or one.needs in ("row_invariant", "dlse") or law(name, t).passed, name
    for name, kernel in (
        ("determinism", every_other(np.float32(1 + 2**-20))),
        ("determinism", every_other(np.float32(np.nan))),
        ("key_permutation", first_dropped),
        ("masked_keys_unread", reads_hidden),
        ("grouped_heads", mapped),
        ("batch_independence", lambda p: (t(p)[0] + p.query[-1:, :, :, :1], t(p)[1])),
        ("values_doubled", lambda p: (np.clip(t(p)[0], -0.5, 0.5), t(p)[1])),
        ("bias_shifted", lambda p: t(p.replace(bias=np.minimum(p.bias, np.float32(3))))),
        ("split_and_merge", lambda p: (t(p)[0], t(p)[1] * np.float32(1.4))),
        ("split_and_merge", lambda p: t(p)[0]),
        ("batch_invariance", lambda p: (t(p)[0] * np.float32(1 + p.batch * 2**-20), t(p)[1])),
        ("gradient_steps", backward("dq", lambda x: x * np.float32(1.02))),
        ("gradient_steps", backward("dk", lambda x: x * np.float32(1.02))),
        ("gradient_steps", backward("dv", lambda x: x * np.float32(1.02))),
        ("dk_sums", backward("dk", np.abs)),
        ("dbias_sums", backward("dbias", lambda x: x + np.float32(1e-4))),
    ):
        w = law(name, kernel)
        assert not w.passed, name
        assert w.symptoms, name


TRIALS = tuple(f for n, f in tuple(globals().items()) if n.startswith("trial_"))
