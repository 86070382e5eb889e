"""A kernel's answer against the exact one, element by element, by a written table.

=====================  ==========================================================================================
exact value            what passes
=====================  ==========================================================================================
finite                 finite and within the bound; an infinity of its sign where value plus bound overflows
empty row              out exactly 0, lse -inf
NaN                    NaN
infinite               the same infinity, or NaN (a weight that underflowed met an infinite value)
=====================  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import FORMATS, Format, format_of
from ..exact.answer import Answer
from ..masks import visible
from ..norms import has_norms
from .bounds.expected import Expected
from .diagnose.keytiles import weights_off
from .diagnose.repeats import common_errors, independent_share
from .diagnose.statistics import Figures, Narrow, figures, where
from .edges import edges_of

__all__ = ["Worst", "against", "compare", "empty_rows"]

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Worst:
    """The element that is furthest from its exact value, in units of its bound.

    Attributes
    ----------
    array : str
        "out", "lse" or a gradient's name.
    ratio : float
        ``|got - exact| / allowed``; inf where the table is broken.
    place : tuple of int
        (batch, head, row or key, column), or (batch, head, row) for lse, (head,) for dsink.
    got, exact, allowed : float
        The kernel's value, the exact value (nearest float64) and the bound.
    failures : int
        How many elements fail.
    elements : int
        How many were compared.
    symptoms : tuple of str
        What the failing elements have in common, in words.
    figures : Figures or None
        The errors as a whole.
    edges : dict
        By contract (``refattn.check.EDGES``), how many of the failing elements break it and nothing else.
    """

    array: str
    ratio: float
    place: tuple[int, ...]
    got: float
    exact: float
    allowed: float
    failures: int
    elements: int
    symptoms: tuple[str, ...] = ()
    figures: Figures | None = None
    edges: dict[str, int] = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        """Tell whether an element fails that no contract at the edge speaks of, or the errors as a whole are large."""
        return self.failures > sum(self.edges.values()) or self._off

    @property
    def passed(self) -> bool:
        """Tell whether no element fails, and the errors as a whole are no larger than the model's roundings give."""
        return self.failures == 0 and not self._off

    @property
    def _off(self) -> bool:
        return self.figures is not None and (self.figures.excess or self.figures.leans)


def empty_rows(answer: Answer) -> NDArray[np.bool_]:
    """Return which rows see no key, (b, h_q, n_q)."""
    p = answer.call.to("numpy")
    empty = np.ones(p.out_shape[:3], bool)
    for b in range(p.batch):
        for h in range(p.heads):
            for rows, keys in p.segments(b):
                empty[b, h, rows] = ~visible(p, b, h, rows, keys).any(1)
    return empty


def compare(
    name: str,
    got: NDArray[Any],
    answer: Answer,
    bound: Float,
    dtype: str,
    variance: Float | None = None,
    inner: Callable[[], Float] | None = None,
) -> Worst:
    """Compare one array of a kernel with the exact answer.

    Parameters
    ----------
    name : str
        "out", "lse" or a gradient's name.
    got : array
        What the kernel returned.
    answer : Answer
        The exact answer.
    bound : float64 array
        What is allowed, from :func:`refattn.check.bounds.forward.bounds`.
    dtype : str
        The format that the kernel returned it in (its overflow is no error of the kernel).
    variance : float64 array, optional
        What is predicted, from :func:`refattn.check.bounds.predict.predict`.
    inner : callable, optional
        Returns what may go one way, from :meth:`refattn.check.bounds.expected.Expected.inner`.

    Returns
    -------
    Worst
    """
    enclosure = answer.enclosures[name]
    x, exact = np.asarray(got).astype(np.float64), enclosure.mid
    form = format_of(dtype)
    with np.errstate(all="ignore"):
        error = enclosure.least_error(x)  # only what is proven counts against a kernel
        ratio = np.where(error == 0, 0.0, error / bound)
        same = (x == exact) | (np.isnan(x) & np.isnan(exact))
        overflows = np.isfinite(exact) & (np.abs(exact) + bound >= form.overflow)
        sign = np.signbit(x) == np.signbit(exact)
        ratio = np.where(np.isfinite(x) & np.isfinite(exact), ratio, np.inf)
        ratio = np.where(same & ~np.isfinite(exact), 0.0, ratio)
        ratio = np.where(overflows & np.isinf(x) & sign, 0.0, ratio)
        if not form.infinities:
            ratio = np.where(overflows & np.isnan(x), 0.0, ratio)
        ratio = np.where(np.isinf(exact) & np.isnan(x) & (name == "out"), 0.0, ratio)
        ratio = np.where(np.isnan(ratio), np.inf, ratio)  # a bound or a number that is none decides nothing: fail
    failing = ratio > 1
    if not ratio.size:
        return Worst(name, 0.0, (), 0.0, 0.0, 0.0, 0, 0)
    rows = int(np.prod(answer.call.out_shape[:3]))
    empty = empty_rows(answer) if failing.any() else np.zeros(answer.call.out_shape[:3], bool)
    whole_empty = np.broadcast_to(empty[..., None], x.shape) if name == "out" else empty
    edges = edges_of(name, x, exact, bound, failing, whole_empty, answer, dtype) if failing.any() else {}
    plain = failing & ~np.logical_or.reduce([*edges.values()]) if edges else failing
    if edges and not plain.any():  # what breaks a contract says nothing of roundings
        variance = None
    moved = answer.call.rotary is not None or has_norms(answer.call)
    narrow = None
    if inner is not None or moved:
        call = answer.call.to("numpy")
        common = partial(common_errors, call, FORMATS[call.dtype]) if name == "out" else list
        narrow = Narrow(inner, lambda: _apart(name, answer, form), common)
    whole = figures(name, got, enclosure, ratio, variance, dtype, rows, narrow)
    shown = np.where(plain, ratio, -1.0) if plain.any() else ratio  # what is plainly wrong comes first
    place = tuple(int(i) for i in np.unravel_index(int(np.argmax(shown)), ratio.shape))
    symptoms = _symptoms(
        name, x, exact, failing, whole_empty if name in ("out", "lse") else np.zeros(x.shape, bool), answer
    )
    keys = weights_off(answer, x) if name == "out" and failing.any() and answer.call.n_k else ()
    return Worst(
        name,
        float(ratio[place]),
        place,
        float(x[place]),
        float(exact[place]),
        float(bound[place]),
        int(failing.sum()),
        int(ratio.size),
        (*symptoms, *where(name, failing), *keys, *(() if failing.any() else _excess(whole))),
        whole,
        {n: int(m.sum()) for n, m in edges.items()},
    )


def against(known: Expected, name: str, got: NDArray[Any], dtype: str) -> Worst:
    """Compare one array of a kernel, which it returned in a format, with what is expected of its call."""
    inner = known.inner(name, dtype)
    return compare(name, got, known.answer, known.allowed[name], dtype, known.variance.get(name), inner)


def _apart(name: str, answer: Answer, form: Format) -> int:
    """Return how many lines of an array differ in what is rounded.

    Rows of one lse may have the same weights, results that round to the same number may lie beside each other, and
    weights that are alike are rounded alike.
    """
    lines, out = answer.enclosures[name].mid, answer.enclosures["out"].mid  # gradients take the rounded out
    counts = [len(np.unique(form.round_array(x))) for x in (lines, out)]
    counts.append(len(np.unique(np.float32(lines.reshape(-1, lines.shape[-1])), axis=0)))
    if "lse" in answer.enclosures:
        counts.append(len(np.unique(np.float32(answer.enclosures["lse"].mid))))
    return int(min(counts) * independent_share(answer.call.to("numpy"), form.precision))


def _excess(f: Figures) -> tuple[str, ...]:
    if f.leans:
        where = "larger" if f.bias > 0 else "smaller"
        return (f"errors lean to {where} values: their mean is {f.bias:+.3g} of what roundings scatter",)
    if not f.excess:
        return ()
    return (f"errors are {f.rms:.3g} times what the model's roundings give (rms), mean {f.bias:+.3g} of it",)


def _symptoms(
    name: str, x: Float, exact: Float, failing: NDArray[np.bool_], empty: NDArray[np.bool_], answer: Answer
) -> tuple[str, ...]:
    """Name what failing elements show."""
    found: list[str] = []

    def note(where: NDArray[np.bool_], text: str) -> None:
        hits = failing & where
        if hits.any():
            found.append(f"{text} ({int(hits.sum())} of {hits.size})")

    finite = np.isfinite(exact)
    if name == "lse":
        at = failing & empty
        must = f"must be {exact[at][0]:g}" if at.any() else ""
        note(empty & np.isnan(x), f"lse of a row without keys is NaN, {must}")
        if (number := at & ~np.isnan(x)).any():
            note(empty & ~np.isnan(x), f"lse of a row without keys is {x[number][0]:g}, {must}")
    elif name == "out":
        note(empty & np.isnan(x), "NaN in a row without keys, must be 0")
        filled = failing & empty & np.isfinite(x)
        if filled.any():
            note(filled, f"{_filling(x, filled, answer)} in a row without keys, must be 0")
        note(empty & np.isinf(x), "inf in a row without keys, must be 0")
    problem = answer.problem.to("numpy")
    clean = all(bool(np.isfinite(a.astype(np.float64)).all()) for a in (problem.query, problem.key, problem.value))
    where = "behind the mask" if problem.block_table is None else "that no item owns"
    cause = "overflow on finite data" if clean else f"NaN or inf {where} leaks"
    note(~empty & finite & np.isinf(x), f"{cause}: inf where the exact value is finite")
    note(~empty & finite & np.isnan(x), f"{cause}: NaN where the exact value is finite")
    note(~empty & ~finite & np.isfinite(x), "a finite number where NaN or inf must show")
    note(~empty & ~finite & ~np.isfinite(x), "another infinity or NaN than the exact one")
    note(~empty & finite & np.isfinite(x), "error above the bound")
    return tuple(found)


def _filling(x: Float, where: NDArray[np.bool_], answer: Answer) -> str:
    """Tell whether rows that must be 0 hold the mean of all values."""
    p = answer.call.to("numpy")
    if not p.n_k:
        return "a nonzero number"
    with np.errstate(all="ignore"):
        mean = np.repeat(np.asarray(p.value).astype(np.float64).mean(2, keepdims=True), p.heads // p.heads_kv, axis=1)
        close = np.abs(x - mean) <= 2.0**-6 * np.abs(mean)
    return "the mean of all values" if close[where].mean() > 0.9 else "a nonzero number"
