"""Sparse attention: what leaving keys out costs, for every selector, and where gradients reach what was dropped."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from ..exact import evaluate
from ..exact.lowering import lower
from ..problem import MEANINGS, VARIANT, Problem
from ..variants import VARIANTS, Lowered, Variant
from .claim import Claim, Evidence, judged, needs, same, total
from .fields import Dual, Q, balls, disjoint, each, exp, precise, rational, rationals, unequal, zeros

__all__ = ["CLAIMS", "SELECTORS"]

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Selector = Callable[[Array, int], Mask]


def _top(x: Array, count: int) -> Mask:
    """Return the places of the largest numbers; of equal ones the first."""
    mask = np.zeros(len(x), bool)
    mask[sorted(range(len(x)), key=lambda j: -x[j])[:count]] = True
    return mask


def _blocks(x: Array, count: int, of: Callable[[Array], Any], size: int = 2) -> Mask:
    """Return the blocks of keys with the largest summary."""
    summary = np.array([of(x[b : b + size]) for b in range(0, len(x), size)])
    return np.repeat(_top(summary, max(1, count // size)), size)[: len(x)]


def _until(x: Array, share: Any) -> Mask:
    """Return the largest weights until they are a share of all."""
    return next(m for c in range(1, len(x) + 1) if x[m := _top(x, c)].sum() >= share * x.sum())


# from the weights exp(s) of a row's keys and a budget: which keys are kept
SELECTORS: dict[str, Selector] = {
    "all": lambda w, k: np.ones(len(w), bool),
    "window": lambda w, k: np.arange(len(w)) >= len(w) - k,
    "sinks and window": lambda w, k: (np.arange(len(w)) < 1) | (np.arange(len(w)) >= len(w) - k + 1),
    "strided": lambda w, k: np.arange(len(w))[::-1] % max(1, len(w) // k) == 0,
    "powers of two": lambda w, k: np.isin(np.arange(len(w))[::-1], [0, *(2**i for i in range(k))]),
    "top-k": _top,
    "top-p": lambda w, k: _until(w, Q(k, len(w))),
    "threshold": lambda w, k: w * k >= w.max(),
    "blocks by mean": lambda w, k: _blocks(w, k, lambda b: b.sum()),
    "blocks by largest": lambda w, k: _blocks(w, k, max),
    "at random": lambda w, k: np.random.default_rng(k).permutation(len(w)) < k,
}
"""Selectors of keys, by name."""


BUDGETS = (1, 2, 4)


def _mean(w: Array, v: Array) -> Array:
    return np.asarray((w @ v) / w.sum()) if len(w) else 0 * v.sum(0)


def _cases() -> list[tuple[Array, Array]]:
    """Return rows of positive weights with their values; in the last the kept and the dropped values are opposite."""
    drawn = [(rationals(s, 9, least=1, most=99), rationals(s + 50, 9, 2)) for s in range(4)]
    return [*drawn, (np.array([Q(3), Q(2), Q(1), Q(1)]), np.array([[Q(3)], [Q(3)], [Q(-3)], [Q(-3)]]))]


def _identity(share_of: Callable[[Array, Mask], Any], selectors: Mapping[str, Selector], what: str) -> Evidence:
    """Compare out - kept with share · (dropped mean - kept mean) and with bounds by the values, exactly."""
    found: list[Any] = []
    shares: dict[str, float] = {}
    for (w, v), name, k in itertools.product(_cases(), selectors, BUDGETS):
        kept = selectors[name](w, k)
        needs(bool(kept.any()), "a selector that keeps a key of every row")
        share = share_of(w, kept)
        away = _mean(w, v) - _mean(w[kept], v[kept])
        found.append(same(unequal(away, share * (_mean(w[~kept], v[~kept]) - _mean(w[kept], v[kept]))), 0))
        if share:
            found.append((abs(away).max(), share * max(v.max(0) - v.min(0))))
            found.append((abs(away).max(), _at_most(share, v)))
        shares[name] = max(shares.get(name, 0.0), float(share))
    return judged(found, what, {"largest dropped share": shares})


def _at_most(share: Any, v: Array) -> Any:
    return 2 * share * abs(v).max()


def _dropped(w: Array, kept: Mask) -> Any:
    return w[~kept].sum() / w.sum()


def dropping(selectors: Mapping[str, Selector] = SELECTORS) -> Evidence:
    """The identity for every selector, and 2·delta·max|v|, attained where kept and dropped values are opposite."""
    w, v = _cases()[-1]
    kept = SELECTORS["top-k"](w, len(w) // 2)
    away = abs(_mean(w, v) - _mean(w[kept], v[kept])).max()
    share = _dropped(w, kept)
    attained = same((away, share > 0), (_at_most(share, v), True))
    found = _identity(_dropped, selectors, "error over delta times the values' range, and over 2·delta·max|v|")
    return replace(found, unequal=total(found.unequal, attained))


def dropping_by_count() -> Evidence:
    """The share of keys in place of the share of weight."""
    what = "error over the share of dropped keys times the values' range"
    return _identity(lambda w, kept: Q(int((~kept).sum()), len(kept)), SELECTORS, what)


ROWS, KEYS = 8, 12


def _tried(variant: Variant) -> list[Mapping[str, Any]]:
    """Return options of an operator to try: its own tries, or of what tests draw the last and the smallest values."""
    if variant.tries:
        return list(variant.tries(ROWS, KEYS))
    drawn = {name: option.draws(1) for name, option in variant.options.items()}
    return [{n: x[-1] for n, x in drawn.items()}, {n: min(x, key=_size) for n, x in drawn.items()}]


def _size(x: Any) -> float:
    return float(x) if isinstance(x, int | float) else math.inf


def _call(seed: int, variant: Variant, options: Mapping[str, Any]) -> Problem:
    q, k, v = np.random.default_rng(seed).standard_normal((3, 1, 1, KEYS, 2))
    causal = "bottom_right" if "causal" in variant.uses else None
    return Problem(2 * q[:, :, :ROWS], k, v, scale=1.0, causal=causal, variant=variant.name, options=dict(options))


def _calls() -> Iterator[tuple[str, Problem, Mask]]:
    """Yield calls of every operator that is softmax over a mask, and the mask: written out, or of what is chosen."""
    for name, variant in VARIANTS.items():
        over = VARIANT if isinstance(variant.shape, Lowered) else getattr(variant.shape, "core", "")
        for seed, options in enumerate(_tried(variant) if over == VARIANT else ()):
            call = _call(seed, variant, options)
            if not variant.takes(call):  # it asks for as many rows as keys
                continue
            core = lower(call).problem
            only = all(getattr(core, x) is None for x in MEANINGS if x not in ("causal", "allowed"))
            if core.variant == VARIANT and core.allowed is not None and only:
                yield name, call, np.asarray(core.allowed[0, 0])


def _near(x: Array) -> Array:
    """Return balls around numbers that are rounded correctly."""
    return each(lambda a: flint.arb(float(a), float(np.spacing(abs(a)))), x)


def _rows(sparse: Problem, mask: Mask, more: bool) -> tuple[list[Any], Any]:
    """Return for each row that loses a key how far the operator is from all keys, beside its bound; the largest share.

    Whether that is delta·(mean of the dropped - mean of the kept), too, is said by equalities.
    """
    dense = sparse.replace(variant=VARIANT, options={})
    seen = np.tri(ROWS, KEYS, KEYS - ROWS if sparse.causal else KEYS, dtype=bool)
    q, k, v = (balls(rational(x[0, 0])) for x in (sparse.query, sparse.key, sparse.value))
    found: list[Any] = []
    largest: Any = Q(0)
    away = _near(evaluate(dense).out[0, 0]) - _near(evaluate(sparse).out[0, 0])
    for t, off in enumerate(away):
        w, of, kept = exp(k[seen[t]] @ q[t]), v[seen[t]], mask[t, seen[t]]
        if not kept.any():  # a mean of none
            continue
        if more:
            kept[kept.argmin()] = True  # the first that is dropped
        if kept.all():
            found.append(same(disjoint(off, zeros(len(off))), 0))
            continue
        share = _dropped(w, kept)
        found.append(same(disjoint(off, share * (_mean(w[~kept], of[~kept]) - _mean(w[kept], of[kept]))), 0))
        ranges = [max(x, key=float) - min(x, key=float) for x in of.T]
        found += [(abs(one), share * apart) for one, apart in zip(off, ranges, strict=True)]
        largest = max(largest, share, key=float)
    return found, largest


@precise()
def _operators(more: bool, what: str) -> Evidence:
    """Judge operators by the mask of their own options, or by one with a key more in each row."""
    found: list[Any] = []
    shares: dict[str, float] = {}
    for name, call, mask in _calls():
        rows, share = _rows(call, mask, more)
        found += rows
        shares[name] = max(shares.get(name, 0.0), float(share))
    return judged(found, what, {"largest dropped share": shares})


def operators() -> Evidence:
    """Answers of operators against those of all keys, delta by the mask that their lowering gives."""
    return _operators(False, "error over delta times the values' range")


def operators_of_more() -> Evidence:
    """Delta of a mask that keeps more keys than the operator reads."""
    return _operators(True, "error over delta times the values' range, delta of a mask of more keys")


def _odds(w: Array, kept: Mask) -> Any:
    return w[~kept].sum() / w[kept].sum()


def _misjudged(power: int, what: str) -> Evidence:
    """Compare the odds of what top-k by wrong weights drops with the least odds, times a power of exp(eps)."""
    eps, pairs = Q(3, 2), []  # exp of the scores' largest error
    off = (eps, 1 / eps)
    limit = eps**power
    for (w, _), k in itertools.product(_cases(), BUDGETS[:2]):
        for signs in itertools.product(off, repeat=len(w)) if len(w) < 5 else (off * len(w),):
            chosen = _top(w * np.array(signs[: len(w)]), k)
            pairs.append((_odds(w, chosen), limit * _odds(w, _top(w, k))))
    near = np.array([Q(1), eps**2])  # as far apart as the errors can turn round
    turned = same(*(near * np.array(off)))
    wrong, right = _odds(near, near < eps), _odds(near, near > eps)
    return judged([*pairs, (wrong, limit * right), turned, same(wrong, limit * right)], what)


def misjudged() -> Evidence:
    """Scores known up to eps: the odds of the dropped weight are at most exp(4·eps) times those of true top-k."""
    return _misjudged(4, "odds of what is dropped over exp(4·eps) times the least")


def misjudged_twice() -> Evidence:
    """exp(2·eps), as if only what is dropped were misjudged, and not also what is kept."""
    return _misjudged(2, "odds of what is dropped over exp(2·eps) times the least")


def _slopes(w: Array, loss: Callable[[Array], Any]) -> Array:
    """Return the derivatives of a loss by each score: those of weights w_j = exp(s_j) are w_j."""
    found = []
    for j in range(len(w)):
        moved = np.array([Dual(a, a if i == j else Q(0)) for i, a in enumerate(w)])
        found.append(loss(moved).slope)
    return np.array(found)


def _half_square(w: Array, v: Array, mask: Mask, target: Array) -> Any:
    """Return |out - target|²/2 of dual weights, out being the mean over a mask."""
    fixed = each(lambda a: Dual(a, Q(0)), v[mask])
    away = (w[mask] @ fixed) / w[mask].sum() - each(lambda a: Dual(a, Q(0)), target)
    return (away * away).sum() * Dual(Q(1, 2), Q(0))


def _gradients(dense: bool, align: bool, what: str) -> Evidence:
    """Compare derivatives by scores with p_j (v_j - out)·(out - target), and count what they reach.

    Sparse training reads only kept keys. Aligning dense with sparse outputs, |dense - sparse|²/2 with the sparse one
    held, reads all keys. Of dropped keys sparse training must reach none, and alignment some in every row.
    """
    one, other = Dual(Q(1), Q(2)), Dual(Q(3), Q(5))
    wrong = [int((one - other).slope != one.slope - other.slope)]
    for w, v in _cases():
        kept = SELECTORS["top-k"](w, 3)
        mask, target = kept | dense, _mean(w[kept], v[kept]) if align else 0 * v[0]
        slopes = _slopes(w, lambda a, v=v, mask=mask, target=target: _half_square(a, v, mask, target))  # type: ignore[misc]
        out, p = _mean(w[mask], v[mask]), np.where(mask, w, 0 * w) / w[mask].sum()
        reached = int((slopes[~kept] != 0).sum())
        wrong += [unequal(slopes, p * ((v - out) @ (out - target))), (reached == 0) if align else reached]
    return Evidence(total(*wrong), 0, what)


def no_gradient() -> Evidence:
    """Sparse training: derivatives in closed form, 0 for every dropped key."""
    return _gradients(False, False, "derivatives that differ from the closed form, or reach dropped keys")


def dense_gradient() -> Evidence:
    """Dense training: dropped keys are reached."""
    return _gradients(
        True, False, "derivatives that differ from the closed form, or reach dropped keys, dense training"
    )


def aligned() -> Evidence:
    """Alignment: p_j (v_j - dense)·(dense - sparse), not 0 for all dropped keys."""
    return _gradients(True, True, "derivatives that differ from the closed form, and rows that reach no dropped key")


def unaligned() -> Evidence:
    """The same loss of sparse outputs alone."""
    return _gradients(
        False, True, "derivatives that differ, and rows that reach no dropped key, without the dense output"
    )


SSA = "Shen et al., SSA: sparse sparse attention (arXiv 2511.20102; its abstract was read, derivatives are ours)"
CLAIMS = [
    Claim(
        "sparse-dropping",
        "Leaving keys out moves a row by delta·(mean of the dropped - mean of the kept), at most 2·delta·max|v|",
        "derived here; delta is the weight of what a selector drops",
        dropping,
        dropping_by_count,
        ("a selector that keeps a key of every row",),
    ),
    Claim(
        "sparse-operators",
        "Every operator of the catalogue that is softmax over a mask, written out or chosen by scores, is off from all"
        " keys by delta·(mean of the dropped - mean of the kept), at most delta times the values' range, delta by its"
        " lowering's mask",
        "derived here; the operators are refattn.variants'",
        operators,
        operators_of_more,
    ),
    Claim(
        "sparse-misjudged",
        "Top-k by scores that are off by eps drops at most exp(4·eps) times the odds that true top-k drops",
        "derived here",
        misjudged,
        misjudged_twice,
    ),
    Claim(
        "sparse-no-gradient",
        "Under sparse training no gradient reaches the score of a dropped key",
        SSA,
        no_gradient,
        dense_gradient,
    ),
    Claim(
        "sparse-alignment",
        "Aligning dense with sparse outputs gives a dropped score the gradient p_j (v_j - dense)·(dense - sparse)",
        SSA,
        aligned,
        unaligned,
    ),
]
