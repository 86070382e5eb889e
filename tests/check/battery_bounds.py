"""Small trials of the bounds of recurrences, of choices, and of gradients by the tape: a part of ``battery.py``."""

from dataclasses import replace
from functools import cache

import numpy as np

from refattn import VARIANTS, Problem, evaluate
from refattn.arrays import from_float64, to_float64
from refattn.dtypes import FORMATS
from refattn.exact.heads import heads, rows_of
from refattn.exact.tape import Tape, gradients

from ..conftest import tensor
from .battery import U, answer

TF32, BFLOAT16 = 2.0**-11, 2.0**-8  # unit roundoffs


def _problem(shapes, dtype="float32", **more):
    rng = np.random.default_rng(0)
    return Problem(*(tensor(rng, s, dtype) for s in shapes), **more)


def _ones(n, dtype="float32", **more):
    return Problem(*(from_float64(np.ones((1, 1, n, 1)), dtype) for _ in range(3)), **more)


def _lightning(decay, **more):
    return {"variant": "lightning", "causal": "bottom_right", "options": {"decay": decay}, **more}


def _recurrence():
    """Twelve tokens from a state larger than what they bring."""
    state = 8 * np.random.default_rng(1).standard_normal((1, 2, 8, 8))
    return _problem(((1, 2, 12, 8),) * 3, **_lightning((0.1, 0.0), state=state))


def _near_tie(gap):
    """Three blocks of one key: the last row takes the first or the second, whose scores are 1 and 1 + gap."""
    p = _ones(3, variant="moba", causal="bottom_right", options={"block_size": 1, "topk": 2})
    p.key[0, 0, 1] = 1 + gap
    return p


def _three_ways():
    """Six blocks of one key: the last row takes the first, one of three that are tied, never the fifth, and its own."""
    p = _ones(6, variant="moba", causal="bottom_right", options={"block_size": 1, "topk": 3})
    p.key[0, 0, :, 0], p.value[0, 0, :, 0] = (4, 1, 1, 1, -4, 1), (0, 0, 10, 12, 40, 0)
    return p


LINEAR = {"variant": "linear", "options": {"feature": "elu1"}}
PROBLEMS = {
    "recurrence": _recurrence,
    "ones": lambda: _ones(16, **_lightning((0.0,))),
    "fading": lambda: _problem(((1, 2, 64, 8),) * 3, **_lightning((0.1, 0.4))),
    "slow": lambda: _problem(((1, 2, 256, 8),) * 3, **_lightning((0.01, 0.02))),
    "three-ways": _three_ways,
    "one-weight": lambda: _ones(1, variant="linear", options={"feature": "identity", "normalize": False}),
    "one-share": lambda: _ones(1, "bfloat16", variant="linear", options={"feature": "identity"}),
    "mean": lambda: _problem(((1, 1, 5, 4), (1, 1, 6, 4), (1, 1, 6, 4)), **LINEAR),
    "mean-bfloat16": lambda: _problem(((1, 1, 5, 4), (1, 1, 6, 4), (1, 1, 6, 4)), "bfloat16", **LINEAR),
    "grouped-mean": lambda: _problem(((1, 4, 5, 4), (1, 1, 6, 4), (1, 1, 6, 4)), **LINEAR),
}


@cache
def problem(name):
    return PROBLEMS[name]()


@cache
def arriving(name):
    return tensor(np.random.default_rng(1), problem(name).out_shape, problem(name).dtype)


# recurrences, token by token ----------------------------------------------------------------------------------------


def trial_a_recurrence_that_rounds_as_its_model_says(c):
    p, rng, m = problem("recurrence"), np.random.default_rng(3), c.model
    shape, a = VARIANTS["lightning"].shape, answer(p)
    for model in (m.flash("float32"), m.narrowed("float32", "tf32", ""), m.materialised("bfloat16")):
        bound = c.bounds.bounds(a, model)
        for how in c.rounded.HOWS:
            for got in (c.rounded.simulate(p, model, how, rng), c.rounded.simulate_steps(p, shape, model, how, rng)):
                for array, x in got.items():
                    assert (a.enclosures[array].error(x) <= bound[array]).all(), (array, how)


def trial_the_bound_of_a_state_is_known(c):
    """Every token: 4 of exp and one of the product fall on the state before, 4 on k v, one on their sum.

    The first rows' bounds are those of all tokens at once.
    """
    p, tokens = problem("ones"), np.arange(1, 17)
    bound = c.bounds.bounds(answer(p), c.model.flash("float32"))
    steps = np.cumsum(5 * (tokens - 1) + 4 + tokens)
    assert abs(bound["state"].item() / (U * (steps[-1] + 16)) - 1) < 0.01
    assert (np.abs(bound["out"][0, 0, :, 0] / (U * (steps + 5 * tokens)) - 1) < 0.01)[4:].all()


def _by_tokens(p):
    """Return what NumPy gives in float32 token by token, products added in the features' order: out and the state."""
    fade = np.exp(-np.asarray(p.options["decay"], np.float32))[:, None, None]
    state, out = np.zeros((p.heads, p.d_k, p.d_v), np.float32), np.zeros(p.out_shape, np.float32)
    for t in range(p.n_q):
        state = state * fade + p.key[0, :, t, :, None] * p.value[0, :, t, None, :]
        for i in range(p.d_k):
            out[0, :, t] += p.query[0, :, t, i, None] * state[:, i]
    return {"out": out, "state": state[None]}


def trial_the_errors_of_a_recurrence_are_foreseen(c):
    # np.exp is within half an ulp; of a slow decay one error is in every step, and adds up
    for name, exp_ulps in (("fading", 0.5), ("slow", 2.0)):
        p, a = problem(name), answer(problem(name))
        bound, variance = c.bounds.forward(a, replace(c.model.flash("float32"), exp_ulps=exp_ulps))
        for array, x in _by_tokens(p).items():
            w = c.compare.compare(array, x, a, bound[array], "float32", variance[array])
            assert w.passed, array
            assert 0.5 < w.figures.rms < 1.1, (array, w.figures.rms)


# choices ------------------------------------------------------------------------------------------------------------


def trial_a_choice_turns_by_what_its_scores_lose(c):
    """The scores of both blocks lose 10 u, 6 of them for the sum over keys; operands and storing add their types' u."""
    m = c.model
    for model, most in (
        (m.flash("float32"), 20 * U),
        (m.Model(operands="tf32"), 4 * TF32),
        (m.Model(scores="bfloat16"), 4 * BFLOAT16),
    ):
        for share, turns in ((0.8, True), (1.2, False)):
            found = c.choices.either(answer(near_tie(share * most)), model)
            assert (found is not None) == turns, (model, share)


near_tie = cache(_near_tie)


def trial_a_row_may_take_every_choice_that_is_open(c):
    p = problem("three-ways")
    known = c.expected.of_answer(answer(p), c.model.flash("float32"))
    assert known.either is not None
    assert known.either.rows.tolist() == [[[0, 0, 0, 1, 2, 2]]]
    for taken, right in (((0, 1), True), ((0, 2), True), ((0, 3), True), ((1, 2), False), ((0, 4), False)):
        allowed = answer(p).core.allowed.copy()
        allowed[0, 0, 5] = np.isin(np.arange(6), (*taken, 5))
        other = evaluate(answer(p).core.replace(allowed=allowed), rounding="float32")
        got = {"out": other.out, "lse": other.lse}
        found = known.for_result(got)
        passed = [
            c.compare.compare(n, x, found.answer, found.allowed[n], "float32", found.variance[n]).passed
            for n, x in got.items()
        ]
        assert all(passed) == right, taken


# gradients by the tape ----------------------------------------------------------------------------------------------


def _backward(c, p, dout, model, how, rng):
    """Return dq, dk and dv of a kernel that runs the tape in a Model without narrower weights or scores."""
    found = {n: np.zeros(x.shape) for n, x in (("dq", p.query), ("dk", p.key), ("dv", p.value))}
    for one in heads(p):
        f = c.rounded.Rounding(model, how, rng, len(one.k))
        leaves = [Tape(c.rounded.Rounded(f, x.a, None)) for x in f.operands(one)]
        g = to_float64(dout)[one.batch, one.head]
        out, _ = rows_of(one).define(*leaves, one.options(f, wrap=Tape))
        out.value.a = f.rounded(out.value.a, FORMATS[p.dtype])  # the stored one
        seed = c.rounded.Rounded(f, g + f.spread(g.shape) * c.operands.lost(g, dout, model), None)
        places = ((one.batch, one.head), (one.batch, one.head_kv), (one.batch, one.head_kv))
        for (n, x), grad, at in zip(found.items(), gradients([out], [seed], leaves), places, strict=True):
            part = FORMATS[model.group_sum].round_array(grad.a) if model.group_sum and n != "dq" else grad.a
            x[at] += f.rounded(part, FORMATS[p.dtype])
    return found


def trial_gradients_by_the_tape_that_round_as_their_model_says(c):
    rng, m = np.random.default_rng(3), c.model
    for name, model in (
        ("mean", m.Model()),
        ("mean", m.Model(operands="tf32")),
        ("mean-bfloat16", m.Model()),
        ("grouped-mean", m.Model(group_sum="bfloat16")),
    ):
        p, g = problem(name), arriving(name)
        a = answer(p, g)
        bound = c.gradient_bounds.gradient_bounds(a, model, g, c.bounds.bounds(a, model))
        for how in c.rounded.HOWS:
            for n, x in _backward(c, p, g, model, how, rng).items():
                assert (a.enclosures[n].error(x) <= bound[n]).all(), (name, n, how)


def trial_the_bound_of_a_gradient_by_the_tape_is_known(c):
    """One weight of 1: 3 of its product, 1 of its scale, 4 of the sum over rows, and the result's own; 3 operands.

    Where the weight is divided by itself, dq is 0 by what the output says, which is rounded to its type.
    """
    m = c.model
    for name, array, model, size in (
        ("one-weight", "dv", m.flash("float32"), 9 * U),
        ("one-weight", "dv", m.Model(operands="tf32"), 3 * TF32),
        ("one-share", "dq", m.Model(), BFLOAT16),
    ):
        p = problem(name)
        g = np.ones_like(p.query)
        a = answer(p, g)
        bound = c.gradient_bounds.gradient_bounds(a, model, g, c.bounds.bounds(a, model))
        assert abs(bound[array].item() / size - 1) < 0.01, (name, model)


def trial_what_a_matrix_unit_cuts_off(c):
    """100 terms of 1 and of 2**-14 by turns, in steps of 32, in parts of 64."""
    model = c.model.Model(aligned_bits=13, fused=32, promoted=64)
    unit, round_ = c.units.Unit.of(model), FORMATS["float32"].round_array
    assert unit.cut(100, 100) == (64 + 2 + 2) * 2.0**-13
    x = np.where(np.arange(100) % 2, 2.0**-14, 1.0)[None]
    lost = x[:, :64] @ np.ones((64, 1)) - c.sums.Adder(model, round_).run(np.zeros((1, 1)), x[:, :64], np.ones((64, 1)))
    assert lost.item() == 32 * 2.0**-14
    squares = unit.squares(x, np.ones((100, 1)), (4, 4)).item()
    assert (50 * 2.0**-14) ** 2 <= squares < (100 * 2.0**-14) ** 2


def trial_weights_under_a_scale(c):
    """Half a step of int8 is 1/254; a weight below it is lost, 1 is a step's end, others scatter over a step."""
    stored = c.stores.Stored.of(c.model.Model(weights="int8", weights_scale="static"), 0.5)
    assert stored.floor == 0.5 / 127
    variance, mean = stored.expected(np.array([[1.0, 0.5, 0.001]]), np.ones((1, 3)))
    assert mean.tolist() == [[0, 0, -0.001]]
    assert (np.abs(variance[0] * 12 * 127**2 - [0, 1, 0]) < 2.0**-20).all()  # the scale's own roundings are 2**-24


TRIALS = tuple(f for n, f in tuple(globals().items()) if n.startswith("trial_"))
