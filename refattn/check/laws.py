"""Relations that need no reference: a right kernel agrees with itself when the call is rewritten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import Problem
from .call import Result
from .compare import Worst
from .draw import Draw

__all__ = ["LAWS", "Law"]

Float = NDArray[np.float64]
Call = Callable[[Problem], Result]
Bound = Callable[[Problem], dict[str, Float]]


@dataclass(frozen=True)
class Law:
    """One relation: what it says, the problem to try it on, and the test.

    ``test(call, bound, problem) -> Worst``: `call` runs the kernel, `bound` gives what its arithmetic may lose.
    """

    name: str
    statement: str
    problem: Callable[[Draw], Problem]
    test: Callable[[Call, Bound, Problem], Worst]
    needs_lse: bool = False


def _agree(x: Float, y: Float, allowed: Float | float, text: str) -> Worst:
    """Compare two answers; NaN agrees with NaN."""
    with np.errstate(all="ignore"):
        gap = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
        ratio = np.where(gap == 0, 0.0, gap / allowed)
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    place = tuple(int(i) for i in np.unravel_index(int(np.argmax(ratio)), ratio.shape))
    failures = int((ratio > 1).sum())
    at = np.broadcast_to(np.asarray(allowed, np.float64), x.shape)[place]
    return Worst(
        "out",
        float(ratio[place]),
        place,
        float(x[place]),
        float(y[place]),
        float(at),
        failures,
        int(ratio.size),
        (f"{text} ({failures} of {ratio.size})",) if failures else (),
    )


def _out(result: Result) -> Float:
    return result.out.astype(np.float64)


def _determinism(call: Call, bound: Bound, p: Problem) -> Worst:
    return _agree(_out(call(p)), _out(call(p)), 0.0, "two runs on the same input differ")


def _key_permutation(call: Call, bound: Bound, p: Problem) -> Worst:
    order = np.random.default_rng(0).permutation(p.n_k)
    moved = p.replace(key=p.key[:, :, order], value=p.value[:, :, order])
    return _agree(
        _out(call(moved)), _out(call(p)), bound(p)["out"] + bound(moved)["out"], "the order of the keys matters"
    )


def _masked_keys_unread(call: Call, bound: Bound, p: Problem) -> Worst:
    hidden = ~p.allowed.any((0, 1, 2))
    key, value = p.key.copy(), p.value.copy()
    key[:, :, hidden], value[:, :, hidden] = 3, -7
    return _agree(
        _out(call(p.replace(key=key, value=value))), _out(call(p)), 0.0, "a key that no row may see changes the output"
    )


def _grouped_heads(call: Call, bound: Bound, p: Problem) -> Worst:
    group = p.heads // p.heads_kv
    wide = p.replace(key=np.repeat(p.key, group, axis=1), value=np.repeat(p.value, group, axis=1))
    return _agree(_out(call(p)), _out(call(wide)), 2 * bound(p)["out"], "grouped heads differ from repeated ones")


def _split_and_merge(call: Call, bound: Bound, p: Problem) -> Worst:
    """Halve the keys (one half masked for half of the rows) and merge the two answers through their lse."""
    half = p.n_k // 2
    parts = [
        p.replace(key=p.key[:, :, s], value=p.value[:, :, s], allowed=p.allowed[..., s])
        for s in (slice(half), slice(half, None))
    ]
    results = [call(x) for x in parts]
    limits = [bound(x) for x in parts]
    if any(r.lse is None for r in results):
        return Worst("out", np.inf, (), np.nan, np.nan, 0.0, 1, 1, ("no lse was returned",))
    lse = [np.asarray(r.lse).astype(np.float64) for r in results]
    with np.errstate(all="ignore"):
        total = np.logaddexp(*lse)[..., None]
        shares = [np.exp(x[..., None] - total) for x in lse]
        merged = np.sum([s * np.where(s > 0, _out(r), 0) for s, r in zip(shares, results, strict=True)], axis=0)
        apart = np.abs(_out(results[0]) - _out(results[1]))
        slack = np.nan_to_num(limits[0]["lse"] + limits[1]["lse"])[..., None] * np.minimum(*shares) * apart
        allowed = sum(s * b["out"] for s, b in zip(shares, limits, strict=True)) + 2 * slack + bound(p)["out"]
    return _agree(merged, _out(call(p)), allowed, "two halves merged through lse differ from the whole")


def _batch_independence(call: Call, bound: Bound, p: Problem) -> Worst:
    other = p.replace(**{n: np.concatenate([x[:1], x[1:][::-1] * x.dtype.type(2)]) for n, x in p.arrays().items()})
    x, y = (_out(call(a))[:1] for a in (p, other))
    return _agree(x, y, 0.0, "what another batch holds changes the output")


def _values_doubled(call: Call, bound: Bound, p: Problem) -> Worst:
    twice = p.replace(value=(p.value * p.value.dtype.type(2)).astype(p.value.dtype))
    return _agree(_out(call(twice)), 2 * _out(call(p)), 0.0, "values twice as large do not double the output")


def _layout(call: Call, bound: Bound, p: Problem) -> Worst:
    turned = {n: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for n, x in p.arrays().items()}
    return _agree(_out(call(p.replace(**turned))), _out(call(p)), 2 * bound(p)["out"], "strides change the output")


def _bias_shifted(call: Call, bound: Bound, p: Problem) -> Worst:
    moved = p.replace(bias=(p.bias + p.bias.dtype.type(4)).astype(p.bias.dtype))
    allowed = bound(p)["out"] + bound(moved)["out"]
    return _agree(_out(call(moved)), _out(call(p)), allowed, "a constant added to all scores changes the output")


def _whole_bias(d: Draw) -> Problem:
    return d.problem(bias=np.rint(2 * d.normal(1, 2, 37, 67)))  # so that the shift is exact in every format


def _half_masked(d: Draw) -> Problem:
    allowed = np.ones((1, 1, 37, 66), bool)
    allowed[..., ::2, 33:] = False  # every second row sees nothing of the second half
    return d.problem(37, 66, allowed=allowed)


def _hidden_keys(d: Draw) -> Problem:
    return d.problem(allowed=np.broadcast_to(np.arange(67) % 5 != 3, (1, 1, 37, 67)).copy())


LAWS = {
    law.name: law
    for law in (
        Law("determinism", "the same call twice gives the same bits", lambda d: d.problem(65, 130), _determinism),
        Law("key_permutation", "the order of the keys does not matter", lambda d: d.problem(), _key_permutation),
        Law("batch_independence", "a batch does not matter to another", lambda d: d.problem(b=3), _batch_independence),
        Law("values_doubled", "the output is linear in the values", lambda d: d.problem(), _values_doubled),
        Law("layout", "strides do not matter", lambda d: d.problem(b=2, h=3), _layout),
        Law("bias_shifted", "a constant added to a row's scores does not matter", _whole_bias, _bias_shifted),
        Law("masked_keys_unread", "what stands behind the mask does not matter", _hidden_keys, _masked_keys_unread),
        Law(
            "grouped_heads", "grouped heads equal repeated key heads", lambda d: d.problem(h=6, h_kv=2), _grouped_heads
        ),
        Law(
            "split_and_merge",
            "two halves of the keys, merged through lse, equal the whole",
            _half_masked,
            _split_and_merge,
            True,
        ),
    )
}
"""The laws, by name."""


def law_problem(law: Law, dtype: str, variant: str) -> Any:
    """Return the problem that a law is tried on."""
    from ..dtypes import FORMATS

    return law.problem(Draw(FORMATS[dtype], np.random.default_rng(1), variant))
