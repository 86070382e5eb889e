"""Relations between calls: what a kernel answers must not depend on what it was asked before, nor by whom."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import to_numpy
from ..dtypes import FORMATS, Format
from ..errors import KernelError, UnsupportedProblem
from ..problem import Problem
from ..variants import variant_of
from .bounds.expected import expected
from .call import Function, guarded, result_of
from .compare import Worst
from .gradient_laws import right_gradients
from .inputs.draw import Draw
from .reading import plain, unread, watched
from .state import restored
from .trial import Trial, agree, other

__all__ = ["changed_in_place", "many_repeats", "options_between", "results_kept", "shapes_between", "two_threads"]

REPEATS = 200


def _raw(ask: Trial, p: Problem) -> Any:
    """Call a kernel on the very arrays of a call, and note what it reads."""
    seen_call, seen = watched(p)
    try:
        return guarded(lambda: ask.kernel(seen_call))
    finally:
        ask.seen.clear()
        ask.seen.update(seen, {"query"})


def _out(result: Any, p: Problem) -> NDArray[np.float64]:
    return result_of(result, p).out.astype(np.float64)


def _right(ask: Trial, result: Any, p: Problem, text: str) -> Worst:
    """Compare out with the exact answer; a call with an option that is not read says nothing."""
    if unread(p, ask.seen):
        return agree(np.zeros(1), np.zeros(1), 0.0, text)
    known = expected(p, ask.model)
    return agree(_out(result, p), known.answer.enclosures["out"].mid, known.allowed["out"], text)


def _worst(found: Iterator[Worst] | list[Worst]) -> Worst:
    all_of_them = list(found)
    if not all_of_them:
        raise UnsupportedProblem("the kernel refuses every call that this is tried on")
    return max(all_of_them, key=lambda w: (not w.passed, w.ratio))


def changed_in_place(ask: Trial, p: Problem) -> Worst:
    """Change keys and values where they lie and call again: the answer must be that of the new numbers."""
    d, wide = Draw(_form(p), np.random.default_rng(6), p.variant), np.float64 if p.dtype == "float64" else np.float32
    bias, later, found = 3 * d.normal(1, p.heads, p.n_q, p.n_k), other(p), []
    options: list[dict[str, Any]] = [
        {},
        {"bias": d.tensor(bias) if d.form.infinities else bias.astype(wide)},
        {"allowed": d.mask(1, 1, p.n_q, p.n_k)},
        {"sink": np.asarray(3 * d.normal(p.heads), wide)},
    ]
    for option in options:
        call = p.replace(**option)
        if not variant_of(p.variant).takes(call) or ask.able.missing(call):
            continue
        arrays = {n: np.array(x, copy=True) for n, x in call.arrays().items()}
        mine = call.replace(**arrays)
        _raw(ask, mine)
        new = later.replace(**{n: np.ascontiguousarray(x[..., ::-1]) for n, x in option.items()})
        for name, x in new.arrays().items():
            arrays[name][...] = x
        text = "numbers that were changed in place give the answer of those before"
        found.append(_right(ask, _raw(ask, mine), new, text))
    return _worst(found)


def results_kept(ask: Trial, p: Problem) -> Worst:
    """Keep a result, call again, and look at it once more."""
    first = _raw(ask, p)
    before = [np.array(to_numpy(x), copy=True) for x in _parts(first)]
    later = other(p)
    second = _raw(ask, later)
    found = [
        agree(
            to_numpy(x).astype(np.float64),
            y.astype(np.float64),
            0.0,
            "a result changed when the kernel was called again",
        )
        for x, y in zip(_parts(first), before, strict=True)
    ]
    return _worst([*found, _right(ask, second, later, "the second of two calls is wrong")])


def _parts(result: Any) -> list[Any]:
    return [x for x in (result if isinstance(result, tuple | list) else (result,)) if x is not None]


def shapes_between(ask: Trial, p: Problem) -> Worst:
    """Call with small, large and small shapes in turn, and with one head: each answer must be right."""
    d = Draw(_form(p), np.random.default_rng(3), p.variant)
    calls = [p, d.problem(67, 130, options=_fitted(p, 2)), p, d.problem(2, 2, h=1, options=_fitted(p, 1)), p]
    fit = [x for x in calls if variant_of(p.variant).takes(x) and not ask.able.missing(x)]
    return _worst([_right(ask, _raw(ask, x), x, "a call after one of another shape is wrong") for x in fit])


def options_between(ask: Trial, p: Problem) -> Worst:
    """Change one option between calls of the same shapes: each answer must be right."""
    d, wide = Draw(_form(p), np.random.default_rng(5), p.variant), np.float64 if p.dtype == "float64" else np.float32
    bias = 3 * d.normal(1, p.heads, p.n_q, p.n_k)
    changes: list[dict[str, Any]] = [
        {},
        {"causal": "bottom_right"},
        {"causal": "top_left"},
        {"scale": 0.7},
        {"scale": 0.1},
        {"softcap": 1.5},
        {"window": (4, 2)},
        {"window": (9, 2)},
        {"window": (9, None)},
        *(
            {f"cu_seqlens_{x}": np.array([0, n // i, n], np.int32) for x, n in (("q", p.n_q), ("k", p.n_k))}
            for i in (2, 4)
        ),
        {"allowed": d.mask(1, 1, p.n_q, p.n_k)},
        {"causal": "bottom_right"},
        {"bias": d.tensor(bias) if d.form.infinities else bias.astype(wide)},
        {"sink": np.asarray(3 * d.normal(p.heads), wide)},
        {},
    ]
    found: list[Worst] = []
    before = "nothing"
    for change in changes:
        call = p.replace(**change)
        if variant_of(p.variant).takes(call) and not ask.able.missing(call):
            try:
                result = _raw(ask, call)
            except UnsupportedProblem:
                if ask.able.refuses:
                    continue
                raise
            now = ", ".join(n if isinstance(x, np.ndarray) else f"{n}={x!r}" for n, x in change.items()) or "no option"
            found.append(_right(ask, result, call, f"a call with {now} is wrong, made after one with {before}"))
            before = now
    return _worst(found)


def many_repeats(ask: Trial, p: Problem) -> Worst:
    """Repeat a small call a thousand times, a longer one a few hundred, then change the scale: all must be right."""
    d = Draw(_form(p), np.random.default_rng(4), p.variant)
    long = d.problem(5, 300, h=1, d=16, options=_fitted(p, 1))
    found = []
    for call, times in ((p, 1000), (long, REPEATS)):
        if not variant_of(p.variant).takes(call) or ask.able.missing(call):
            continue
        known = expected(call, ask.model)
        exact, allowed = known.answer.enclosures["out"].mid, known.allowed["out"]
        outs = [(1, result_of(_raw(ask, call), call).out.copy())]
        outs += guarded(partial(_unlike, outs[0][1], ask.kernel, call, times))
        for i, out in outs:
            found.append(agree(out.astype(np.float64), exact, allowed, f"call {i} of {times} equal ones is wrong"))
        other = call.replace(scale=0.3)
        if not ask.able.missing(other):
            found.append(_right(ask, _raw(ask, other), other, f"with another scale after {times} calls it is wrong"))
    return _worst(found)


def _unlike(first: NDArray[Any], kernel: Function, p: Problem, times: int) -> list[tuple[int, NDArray[Any]]]:
    """Return (which call, out) of those that give other bits than all before them: nearly all are the first again."""
    seen, found = {first.tobytes()}, []
    for i in range(2, times + 1):
        out = result_of(kernel(p), p).out
        if (bits := out.tobytes()) not in seen:
            seen.add(bits)
            found.append((i, out.copy()))  # a kernel may write into the same array again
    return found


def two_threads(ask: Trial, p: Problem) -> Worst:
    """Call from two threads at once, straight from a pool: each answer must be right for its own call."""
    calls = [plain(p), plain(other(p))]
    known = [expected(c, ask.model) for c in calls]
    found, raised = [], []
    with restored(), _switching_often(), ThreadPoolExecutor(2) as pool:
        futures = [(i % 2, pool.submit(ask.kernel, calls[i % 2])) for i in range(40)]
        for i, future in futures:
            try:
                out = _out(guarded(future.result), calls[i])
            except KernelError as e:
                raised.append(str(e))
                continue
            exact, allowed = known[i].answer.enclosures["out"].mid, known[i].allowed["out"]
            found.append(agree(out, exact, allowed, "a call from another thread, beside another call, is wrong"))
        if ask.has_gradients:
            found += _gradients_in_threads(ask, calls, pool, raised)
    if raised:
        for call in calls:  # what it raises from one thread, too, is no matter of threads
            guarded(lambda call=call: ask.kernel(call))  # type: ignore[misc]
        found.append(replace(agree(np.zeros(1), np.ones(1), 0.0, raised[0]), edges={"threads": 1}))
    ask.seen.add("query")
    return max(found, key=lambda w: (w.wrong, not w.passed, w.ratio))


def _gradients_in_threads(ask: Trial, calls: list[Problem], pool: ThreadPoolExecutor, raised: list[str]) -> list[Worst]:
    """Ask for gradients from two threads at once; what is raised is added to a list."""
    backward: Any = ask.kernel.gradients  # type: ignore[attr-defined]
    d = Draw(_form(calls[0]), np.random.default_rng(7), calls[0].variant)
    dout = d.tensor(d.normal(*calls[0].out_shape))
    found: list[Worst] = []
    text = "gradients asked for from another thread, beside another call, are wrong: "
    for i, future in [(i % 2, pool.submit(backward, calls[i % 2], dout)) for i in range(8)]:
        try:
            found += right_gradients(ask, calls[i], dout, guarded(future.result), text)
        except KernelError as e:
            raised.append(str(e))
    return found


@contextmanager
def _switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _form(p: Problem) -> Format:
    return FORMATS[p.dtype]


def _fitted(p: Problem, heads: int) -> dict[str, Any]:
    return variant_of(p.variant).fitted(dict(p.options), heads)
