"""Relations of gradients: to the output along a step, and to themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import to_numpy
from ..dtypes import FORMATS
from ..problem import Problem
from .bounds.expected import expected
from .call import SOURCES, guarded
from .compare import Worst
from .inputs.draw import Draw
from .trial import Trial, agree, other

__all__ = [
    "calls_between",
    "gradient_steps",
    "last_state_gradient",
    "lse_gradient",
    "right_gradients",
    "row_sums",
    "spread_gradient",
]

Float = NDArray[np.float64]


def gradient_steps(ask: Trial, p: Problem) -> Worst:
    """Move one input a step: dout·out changes by the step times the mean of the gradients at both ends.

    That is the trapezoid rule; what it leaves out is known from the exact answer, and allowed. The step is twice the
    cube root of a rounding, where roundings and what is left out meet.
    """
    d = Draw(FORMATS[p.dtype], np.random.default_rng(2), p.variant)
    dout, size = d.tensor(d.normal(*p.out_shape)), 2 * d.form.unit_roundoff ** (1 / 3)
    start, found = _Loss.of(ask, p, dout), []
    for name in sorted(ask.able.gradients & {"dq", "dk", "dv"}):
        x = getattr(p, SOURCES[name])
        slope = start.by[name]  # the change is largest along it
        uphill = size * np.sign(np.where(np.isfinite(slope) & (slope != 0), slope, d.normal(*x.shape)))
        moved = d.tensor(x.astype(np.float64) + uphill)
        step = moved.astype(np.float64) - x.astype(np.float64)
        end = _Loss.of(ask, p.replace(**{SOURCES[name]: moved}), dout)
        change, expected = end.value - start.value, ((start.by[name] + end.by[name]) / 2 * step).sum((2, 3))
        rule = ((start.true[name] + end.true[name]) / 2 * step).sum((2, 3))
        group = p.heads // p.heads_kv if name != "dq" else 1
        change, lost, true = (
            a.reshape(p.batch, -1, group).sum(2)
            for a in (change, start.lost + end.lost, end.exact_value - start.exact_value)
        )
        allowed = ((start.allowed[name] + end.allowed[name]) / 2 * np.abs(step)).sum((2, 3))
        text = f"{name} is not the derivative of out along a step"
        found.append(agree(expected, change, lost + allowed + np.abs(true - rule), text, name))
    return max(found, key=lambda w: w.ratio)


@dataclass(frozen=True)
class _Loss:
    """dout·out by head, its gradients, what each may lose, and the exact ones."""

    value: Float
    exact_value: Float
    lost: Float
    by: dict[str, Float]
    allowed: dict[str, Float]
    true: dict[str, Float]

    @classmethod
    def of(cls, ask: Trial, p: Problem, dout: NDArray[Any]) -> _Loss:
        wide, known = dout.astype(np.float64), expected(p, ask.model, dout)
        true = {n: x.mid for n, x in known.answer.enclosures.items()}
        value, exact_value = ((wide * x).sum((2, 3)) for x in (ask.out(p), true["out"]))
        lost = (np.abs(wide) * ask.allowed(p)["out"]).sum((2, 3))
        return cls(value, exact_value, lost, ask.gradients(p, dout), known.allowed, true)


def row_sums(name: str, axis: int, text: str) -> Callable[[Trial, Problem], Worst]:
    """Return the law that a gradient sums to 0: a constant added to all scores of a row changes nothing."""

    def test(ask: Trial, p: Problem) -> Worst:
        d = Draw(FORMATS[p.dtype], np.random.default_rng(2), p.variant)
        dout = d.tensor(d.normal(*p.out_shape))
        total, limit = ask.gradients(p, dout)[name].sum(axis), ask.allowed(p, dout)[name].sum(axis)
        return agree(total, np.zeros_like(total), limit, text, name)

    return test


def spread_gradient(ask: Trial, p: Problem) -> Worst:
    """Let one number arrive at every element, spread as ``out.sum().backward()`` does, then a view in another order."""
    d = Draw(FORMATS[p.dtype], np.random.default_rng(2), p.variant)
    one = np.broadcast_to(d.tensor(np.full((1, 1, 1, 1), 0.75)), p.out_shape)
    rows = np.ascontiguousarray(d.tensor(d.normal(*p.out_shape)).swapaxes(1, 2)).swapaxes(1, 2)
    found = []
    for dout, text in (
        (one, "a gradient that is one number for all gives another than an array of it in"),
        (rows, "a gradient that lies in memory by rows, then heads, gives another than one by heads in"),
    ):
        view, limit = ask.gradients(p, dout), ask.allowed(p, dout)
        whole = ask.gradients(p, np.ascontiguousarray(dout))
        found += [agree(view[n], whole[n], 2 * limit[n], f"{text} {n}", n) for n in whole if n in limit]
    return max(found, key=lambda w: w.ratio)


def lse_gradient(ask: Trial, p: Problem) -> Worst:
    """Let a gradient arrive at lse alone, then one at out beside it."""
    return _arriving(ask, p, p.out_shape[:3], ask.model.lse, "lse")


def last_state_gradient(ask: Trial, p: Problem) -> Worst:
    """Let a gradient arrive at the last state alone, then one at out beside it."""
    return _arriving(ask, p, p.state_shape, ask.model.accumulator, "the last state")


def _arriving(ask: Trial, p: Problem, shape: tuple[int, ...], dtype: str, what: str) -> Worst:
    d = Draw(FORMATS[p.dtype], np.random.default_rng(2), p.variant)
    dout = d.tensor(d.normal(*p.out_shape))
    further = d.normal(*shape).astype(np.float64 if dtype == "float64" else np.float32)
    found = []
    for at_out, text in ((np.zeros_like(dout), f"of {what} alone"), (dout, f"of out and {what}")):
        known = expected(p, ask.model, at_out, further)
        for n, x in ask.gradients(p, at_out, further).items():
            exact, limit = known.answer.enclosures[n].mid, known.allowed[n]
            found.append(agree(x, exact, limit, f"the gradient {text} is wrong in {n}", n))
    return max(found, key=lambda w: w.ratio)


def calls_between(ask: Trial, p: Problem) -> Worst:
    """Call forward on one problem, forward on another, and backward on the first; then keep and change gradients."""
    d = Draw(FORMATS[p.dtype], np.random.default_rng(2), p.variant)
    dout = d.tensor(d.normal(*p.out_shape))
    ask.result(p)
    ask.result(other(p))
    text = "gradients of a call are wrong after the forward pass of another: "
    found = right_gradients(ask, p, dout, ask.gradients(p, dout), text)
    return max([*found, *_kept(ask, p, dout), *_changed(ask, p, dout)], key=lambda w: w.ratio)


def right_gradients(ask: Trial, p: Problem, dout: Any, got: Mapping[str, Any], text: str) -> list[Worst]:
    """Compare gradients with the exact ones."""
    known = expected(p, ask.model, dout)
    exact = {n: x.mid for n, x in known.answer.enclosures.items()}
    wide = {n: to_numpy(x).astype(np.float64) for n, x in got.items()}
    return [agree(x, exact[n], known.allowed[n], text + n, n) for n, x in wide.items() if n in known.allowed]


def _kept(ask: Trial, p: Problem, dout: Any) -> list[Worst]:
    """Keep gradients, ask for those of another call, and look at them once more."""
    backward: Any = ask.kernel.gradients  # type: ignore[attr-defined]
    first = guarded(lambda: backward(p, dout))
    before = {n: np.array(to_numpy(x), copy=True) for n, x in first.items()}
    second = guarded(lambda: backward(other(p), dout))
    text = "gradients changed when those of another call were asked for: "
    found = [agree(to_numpy(x).astype(float), before[n].astype(float), 0.0, text + n, n) for n, x in first.items()]
    return found + right_gradients(ask, other(p), dout, second, "the gradients of the second of two calls are wrong: ")


def _changed(ask: Trial, p: Problem, dout: Any) -> list[Worst]:
    """Change numbers where they lie and ask again, forward and backward."""
    backward: Any = ask.kernel.gradients  # type: ignore[attr-defined]
    arrays, later = {n: np.array(x, copy=True) for n, x in p.arrays().items()}, other(p)
    mine = p.replace(**arrays)
    for _ in range(2):
        guarded(lambda: ask.kernel(mine))
        got = guarded(lambda: backward(mine, dout))
        for n, x in later.arrays().items():
            arrays[n][...] = x
    return right_gradients(ask, later, dout, got, "numbers that were changed in place give gradients of those before: ")
