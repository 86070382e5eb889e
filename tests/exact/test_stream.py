"""The streaming path is the definition over the same level: enclosures overlap, roundings agree."""

from functools import lru_cache

import mpmath
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from refattn import Problem, evaluate
from refattn.exact import elementwise, right, stream
from refattn.exact import run as runner
from refattn.exact.arithmetics import Balls
from refattn.exact.levels import Level
from refattn.exact.run import run

rng = np.random.default_rng(0)
SHAPE = (1, 2, 70, 300)
CALLS = {
    "plain": {},
    "causal": {"causal": "bottom_right"},
    "top-left": {"causal": "top_left"},
    "window": {"window": (40, 3)},
    "allowed": {"allowed": rng.random(SHAPE) < 0.5},
    "one key a row": {"allowed": np.broadcast_to(np.arange(300) == 277, SHAPE).copy()},
    "bias": {"bias": rng.standard_normal(SHAPE) * 4},
    "bias that removes": {"bias": np.where(rng.random(SHAPE) < 0.3, -np.inf, 1.0)},
    "sink": {"sink": np.array([3.0, -200.0])},
    "large sink": {"sink": np.array([900.0, 90.0])},
    "negative scale": {"scale": -1.5},
    "zero scale": {"scale": 0.0},
    "huge scale": {"scale": 2.0**30},
    "softcap": {"softcap": 2.0},
    "small softcap": {"softcap": 2.0**-10},
    "large softcap": {"softcap": 1024.0, "scale": 30.0},
    "softcap and all": {
        "softcap": 30.0,
        "bias": rng.standard_normal(SHAPE) * 4,
        "sink": np.array([1.0, 2.0]),
        "causal": "bottom_right",
        "out_scale": 3.0,
    },
}


def problem(dtype=np.float64, **more):
    shapes, rng = ((1, 2, 70, 16), (1, 2, 300, 16), (1, 2, 300, 5)), np.random.default_rng(1)
    return Problem(*(rng.standard_normal(s).astype(dtype) for s in shapes), **more)


def both(p, level, monkeypatch):
    monkeypatch.setattr(runner, "STREAM_FROM", 10**9)
    whole = run(p, Level(level), None)
    monkeypatch.setattr(runner, "STREAM_FROM", 1)
    return whole, run(p, Level(level), None)


DOUT = np.random.default_rng(2).standard_normal((1, 2, 70, 5))


@lru_cache(maxsize=1)
def whole_of(name, level, backward):
    """Return a call over a level by its definition, once for the compiled steps and NumPy's: it needs one of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "STREAM_FROM", 10**9)
        return run(problem(**CALLS[name]), Level(level), DOUT if backward else None, dlse=at_lse(name, backward))


def at_lse(name, backward):
    """Return what arrives at lse in the gradients of two calls."""
    return DOUT[..., 0] * 3 if backward and name in ("large sink", "softcap and all") else None


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "numpy"])
@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("name", CALLS)
def test_enclosures_overlap(name, level, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(elementwise, "steps", lambda: elementwise)
    monkeypatch.setattr(runner, "STREAM_FROM", 1)
    whole, streamed = whole_of(name, level, False), run(problem(**CALLS[name]), Level(level), None)
    for array in ("out", "lse"):
        a, b = whole[array], streamed[array]
        with np.errstate(invalid="ignore"):
            gap = np.abs((a[..., 0] - b[..., 0]) + (a[..., 1] - b[..., 1]))
            same = (a[..., 0] == b[..., 0]) & (a[..., 1] == b[..., 1])
        assert (same | (gap <= (a[..., 2] + b[..., 2]) * (1 + 2.0**-20))).all()
        finite = np.isfinite(a).all(-1)
        assert (np.isfinite(b).all(-1) >= finite).all()


GRADIENTS = {n: c for n, c in CALLS.items() if n != "huge scale"}


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "numpy"])
@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_overlap_with_the_tapes(name, level, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(elementwise, "steps", lambda: elementwise)
    monkeypatch.setattr(runner, "STREAM_FROM", 1)
    p, dlse = problem(**CALLS[name]), at_lse(name, True)
    whole, streamed = whole_of(name, level, True), run(p, Level(level), DOUT, threads=2, dlse=dlse)
    assert set(whole) == set(streamed)
    for array in set(whole) - {"out", "lse"}:
        a, b = whole[array], streamed[array]
        gap = np.abs((a[..., 0] - b[..., 0]) + (a[..., 1] - b[..., 1]))
        assert (gap <= (a[..., 2] + b[..., 2]) * (1 + 2.0**-20)).all(), array
        assert np.isfinite(b).all()


@pytest.mark.parametrize("form", ["bfloat16", "float32", "float64"])
def test_streamed_gradients_round_alike(form, monkeypatch):
    p = problem(np.float32, causal="bottom_right", sink=np.array([0.5, -1.0], np.float32))
    dout = rng.standard_normal(p.out_shape).astype(np.float32)
    monkeypatch.setattr(runner, "STREAM_FROM", 10**9)
    want = evaluate(p, rounding=form, gradients=dout)
    monkeypatch.setattr(runner, "STREAM_FROM", 1)
    got = evaluate(p, rounding=form, gradients=dout)
    assert not any(got.undecided.values())
    for n, x in want.values.items():
        assert x.tobytes() == got.values[n].tobytes(), n


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"causal": "bottom_right"},
        {"window": (90, 20)},
        {"sink": np.array([0.5, -1.0, 0.0, 2.0], np.float32)},
        {"bias": rng.standard_normal((1, 4, 70, 300)).astype(np.float32)},
        {"bias": rng.standard_normal((1, 4, 1, 300)).astype(np.float32)},
        {"softcap": 1.5, "sink": np.array([0.5, -1.0, 0.0, 2.0], np.float32), "out_scale": 3.0},
    ],
    ids=["plain", "causal", "window", "sink", "bias", "bias by key", "softcap"],
)
def test_what_stays_open_goes_on_by_rows_and_keys(more, monkeypatch):
    """From the first level on, nearly nothing is decided in float64 at first: rows and keys go on alone."""
    from refattn.exact import driver

    p = problem(np.float32)
    p = p.replace(query=np.repeat(p.query, 2, axis=1), **more)  # two heads share each key
    dout = rng.standard_normal(p.out_shape).astype(np.float32)
    asked = {"gradients": dout, "dlse": dout[..., 1] if p.softcap else None}
    monkeypatch.setattr(runner, "STREAM_FROM", 10**9)
    want = evaluate(p, rounding="float32", **asked)
    monkeypatch.setattr(runner, "STREAM_FROM", 1)
    monkeypatch.setattr(stream, "KEYS", 64)
    monkeypatch.setitem(driver.START_BACK, 24, 0)
    monkeypatch.setattr(driver, "FEW_KEYS", 2.0)
    calls = []
    usual = runner.Work.run
    monkeypatch.setattr(runner.Work, "run", lambda w, f, *rest: calls.append((f.name, rest)) or usual(w, f, *rest))
    got = evaluate(p, rounding="float32", **asked)
    assert not any(got.undecided.values())
    assert [name[-5:] for name, _ in calls[:2]] == ["L = 0", "L = 1"]
    assert calls[1][1][1] is not None  # single keys
    for n, x in want.values.items():
        assert x.tobytes() == got.values[n].tobytes(), n


@pytest.mark.parametrize("name", ["plain", "causal", "bias", "sink", "bias that removes", "softcap"])
def test_a_few_keys_in_balls_are_those_of_the_whole(name, monkeypatch):
    monkeypatch.setattr(runner, "STREAM_FROM", 1)
    p = problem(**CALLS[name])
    dout, f = np.random.default_rng(2).standard_normal(p.out_shape), Balls(160)
    keys = np.zeros((1, 2, 300), bool)
    keys[0, 0, [3, 299]] = keys[0, 1, 150] = True
    need = np.zeros(p.out_shape[:3], bool)
    need[0, 1, 5] = True
    with f.working():
        whole, few = run(p, f, dout), run(p, f, dout, need=need, keys=keys)
        for n, seen in {"dk": keys, "dv": keys, "dq": need, "out": need}.items():
            assert all(
                a.overlaps(b) and b.rad() < 1e-35 for a, b in zip(whole[n][seen].flat, few[n][seen].flat, strict=True)
            )
            assert not few[n][~seen].any()


def test_keys_that_no_row_sees_have_no_gradient(monkeypatch):
    monkeypatch.setattr(runner, "STREAM_FROM", 1)
    p = problem(allowed=np.zeros(SHAPE, bool))
    keys = np.ones((1, 2, 300), bool)
    for f in (Level(1), Balls(128)):
        raw = run(p, f, np.ones(p.out_shape), need=np.zeros(p.out_shape[:3], bool), keys=keys)
        assert not raw["dk"].any()
        assert not raw["dv"].any()


@pytest.mark.parametrize("name", ["query", "key", "value", "arriving columns", "arriving rows"])
def test_what_is_padded_with_zeros_is_decided_in_float64(name, monkeypatch):
    monkeypatch.setattr(runner, "STREAM_FROM", 1)
    p = problem()
    dout = rng.standard_normal(p.out_shape)
    if name == "arriving rows":
        dout[:, :, ::3] = 0
    else:
        (dout if name == "arriving columns" else getattr(p, name))[..., -2:] = 0
    a = evaluate(p, rounding="float64", gradients=dout)
    assert not any(a.undecided.values())
    assert all(level.startswith("float64") for level in a.stats)
    zero = {"query": ("dk",), "key": ("dq",), "value": ("out",), "arriving columns": ("dv",), "arriving rows": ()}
    for n in zero[name]:
        assert not a.values[n][..., -2:].any()
        assert a.values[n][..., :-2].all()
    if name == "arriving rows":
        assert not a.dq[:, :, ::3].any()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("form", ["bfloat16", "float32", "float64"])
def test_threads_and_tiles_do_not_change_the_answer(threads, form, monkeypatch):
    p = problem(np.float32, causal="bottom_right")
    monkeypatch.setattr(runner, "STREAM_FROM", 10**9)
    want = evaluate(p, rounding=form)
    monkeypatch.setattr(runner, "STREAM_FROM", 1)
    monkeypatch.setattr(stream, "ROWS", 16)
    monkeypatch.setattr(stream, "KEYS", 48)
    got = evaluate(p, rounding=form, n_jobs=threads)
    assert (got.out == want.out).all()
    assert (got.lse == want.lse).all()


@pytest.mark.parametrize("form", ["bfloat16", "float32", "float64"])
def test_blas_threads_do_not_change_the_answer(form):
    p = problem(np.float32, causal="bottom_right")
    answers = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            answers.append(evaluate(p, rounding=form, n_jobs=1))
    assert answers[0].out.tobytes() == answers[1].out.tobytes()
    assert answers[0].lse.tobytes() == answers[1].lse.tobytes()


@pytest.mark.parametrize("steps", [elementwise, elementwise.steps()], ids=["numpy", "compiled"])
@pytest.mark.parametrize("cap", [2.0**-10, 0.3, 50.0, 1024.0])
def test_a_softcap_is_within_its_error(steps, cap):
    """Scores from 0 and the smallest numbers to those far beyond the cap, both signs."""
    with mpmath.workprec(300):
        c = cap / mpmath.log(2)
        parts = [(float(x), float(x - float(x))) for x in (2 / mpmath.mpf(cap), c)]
        rng = np.random.default_rng(0)
        h = np.concatenate([np.geomspace(1e-300, 1e300, 300), rng.uniform(0, 8 * cap, 700), [0.0, 5e-324]])
        h = (np.concatenate([h, -h]))[None].copy()
        low = h * rng.uniform(-(2.0**-54), 2.0**-54, h.shape)
        want = [c * mpmath.tanh((mpmath.mpf(x) + mpmath.mpf(y)) / c) for x, y in zip(h[0], low[0], strict=True)]
        steps.capped(h, low, *parts)
        got = [mpmath.mpf(x) + mpmath.mpf(y) for x, y in zip(h[0], low[0], strict=True)]
        worst = max(abs(a - b) for a, b in zip(got, want, strict=True)) / c
    assert worst <= elementwise.CAPPED_ERROR
    assert (np.abs(low) <= 2.0**-52 * np.abs(h)).all()


@pytest.mark.parametrize("steps", [elementwise, elementwise.steps()], ids=["numpy", "compiled"])
def test_a_softcaps_slopes_and_what_they_multiply_are_within_their_error(steps):
    """Capped scores from 0 to the cap, and products of all sizes, cut at every level; 128 u**2 in all."""
    rng, cap, exact = np.random.default_rng(0), 0.3, np.frompyfunc(mpmath.mpf, 1, 1)
    with mpmath.workprec(300):
        c = cap / mpmath.log(2)
        per = 1 / c
        parts = float(per), float(per - float(per))
        h = np.concatenate([np.geomspace(1e-300, 1, 60), 1 - np.geomspace(1e-17, 1, 60)]) * float(c)
        h = np.concatenate([h, -h])[None]
        low = h * rng.uniform(-(2.0**-54), 2.0**-54, h.shape)
        gain, gain_low = np.empty_like(h), np.empty_like(h)
        steps.gains(h, low, parts, gain, gain_low)
        want = 1 - ((exact(h) + exact(low)) * per) ** 2
        assert max(np.abs(exact(gain) + exact(gain_low) - want).ravel()) <= 2.0**-100
        for level in range(4):
            sigma = np.array([1.5 * 2.0 ** (52 - 20 - s * 21) for s in range(level)])
            products, x = np.empty((1, level + 1, h.size)), rng.uniform(-1, 1, h.shape)
            for s, place in enumerate(sigma):
                products[:, s] = (x + place) - place
                x = x - products[:, s]
            products[:, level] = x
            before = exact(products).sum(1)
            steps.damped(products, gain, gain_low, sigma)
            whole = (sigma / 1.5 * 2.0**-52)[:, None]  # what heads are multiples of
            assert not (products[0, :level] % whole).any()
            off = np.abs(exact(products).sum(1) - before * (exact(gain) + exact(gain_low)))
            last = 2.0 ** -(20 * level) if level else 1.0
            assert max(off.ravel()) <= 2.0**-99 + 2.0**-53 * last


def test_what_is_streamed(make):
    from refattn.exact.heads import heads

    assert stream.streams(next(heads(make(softcap=1.0))))
    assert not stream.streams(next(heads(make(softcap=2.0**20))))
    assert not stream.streams(next(heads(make(softcap=2.0**-20))))
    assert not stream.streams(next(heads(make(variant="power"))))
    assert stream.streams(next(heads(make())))


def test_stats_tell_what_each_tier_decided(make):
    p = make(8, 16, dtype="float32")
    a = evaluate(p, rounding="float32")
    assert sum(s["decided"] for s in a.stats.values()) == a.out.size + a.lse.size
    assert next(iter(a.stats)) == "float64 enclosures, L = 1"
    assert all(s["seconds"] >= 0 for s in a.stats.values())


@pytest.mark.parametrize("level", range(4))
def test_values_whose_squares_underflow_keep_their_tails(level, monkeypatch):
    """A column of values near 2**-600 beside one of whole numbers: its tails' squares are 0, the tails are not."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 1, n, 8)) for n in (4, 30))
    v = np.stack([rng.integers(-3, 4, 30) * 1.0, rng.standard_normal(30) * 2.0**-600], 1)[None, None]
    whole, tiled = (x["out"] for x in both(Problem(q, k, v), level, monkeypatch))
    off = np.abs((whole[..., 0] - tiled[..., 0]) + (whole[..., 1] - tiled[..., 1]))
    assert (off <= whole[..., 2] + tiled[..., 2]).all()


def test_norms_bound_numbers_whose_squares_underflow():
    assert (right.norms(np.full((1, 4), 2.0**-600)) >= 2.0**-599).all()
