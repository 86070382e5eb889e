"""Whether two ways of writing an operator agree: equal images in a prime field, balls that meet; no tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from dataclasses import replace as replaced
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedProblem
from ..problem import Problem
from ..variants import VARIANTS, Variant, variant_of
from ..variants.variant import shape_of
from .arithmetics import Balls
from .field import Field
from .heads import heads
from .lowering import lower
from .run import Work

__all__ = ["differing_form", "under"]

BITS = 192
FEW = 64
"""Scores of a call whose images are computed: one costs as much as a hundred balls."""


def differing_form(problem: Problem) -> str:
    """Return which form of a call's operator gives something else than its definition, and where; "" where none does.

    Images in a field of about 2**127 elements are equal by chance once in so many; where a definition has none (a
    maximum, say), or a call more than 64 scores, its balls at 192 bits must meet. Two forms that are one call of
    another operator agree, whatever that computes: the same tensors and options, and every row sees the same keys.

    Parameters
    ----------
    problem : Problem
        The call; it should be small.
    """
    variant = variant_of(problem.variant)
    for name, form in variant.forms.items():
        other = replaced(variant, name=f"{variant.name}/{name}", define=shape_of(form), forms={})
        with under(other):
            moved = problem.replace(variant=other.name)
            for array, same in _compared(problem, moved):
                if not same.all():
                    at = tuple(int(i) for i in np.argwhere(~same)[0])
                    return f"form {name!r} differs in {array} at {at} ({int((~same).sum())} of {same.size} elements)"
    return ""


class under:
    """A context in which one more operator is known."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant

    def __enter__(self) -> Variant:
        self.before = VARIANTS.get(self.variant.name)
        VARIANTS[self.variant.name] = self.variant
        return self.variant

    def __exit__(self, *error: object) -> None:
        del VARIANTS[self.variant.name]
        if self.before is not None:
            VARIANTS[self.variant.name] = self.before


def _compared(a: Problem, b: Problem) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield by array where two calls agree."""
    cores = [lower(p).problem for p in (a, b)]
    if _same_call(*cores):
        return
    works = [Work(core) for core in cores]
    f = Field(a.d_k)
    x, y = (_over_field(w, f) if a.n_q * a.n_k <= FEW else None for w in works)
    if x is not None and y is not None:
        for n in sorted(set(x) & set(y) - {"lse"}):
            yield n, np.asarray(_images(x[n], f) == _images(y[n], f)).astype(bool)
    balls = Balls(BITS)
    with balls.working():
        x, y = (w.run(balls) for w in works)
        for n in sorted(set(x) & set(y)):
            pairs = zip(x[n].ravel(), y[n].ravel(), strict=True)
            yield n, np.array([_meet(p, q) for p, q in pairs], bool).reshape(x[n].shape)


def _same_call(a: Problem, b: Problem) -> bool:
    """Tell whether two calls are one, masks written another way."""
    pairs = {f.name: (getattr(a, f.name), getattr(b, f.name)) for f in fields(Problem) if f.name != "allowed"}
    if any(
        x is not y and (isinstance(x, np.ndarray) or isinstance(y, np.ndarray) or x != y) for x, y in pairs.values()
    ):
        return False
    masks = ((x.allowed, y.allowed) for x, y in zip(heads(a), heads(b), strict=True))
    return all(np.array_equal(x, y) for x, y in masks)


def _over_field(work: Work, f: Field) -> dict[str, NDArray[Any]] | None:
    """Return images, or None where there are none: a maximum, or a division by 0, which balls decide."""
    try:
        return work.run(f)
    except (UnsupportedProblem, ZeroDivisionError):
        return None


def _images(x: NDArray[Any], f: Field) -> NDArray[Any]:
    return np.array([z if isinstance(z, float) else int(z) % f.p for z in x.ravel()], object).reshape(x.shape)


def _meet(x: Any, y: Any) -> bool:
    if isinstance(x, float | int) or isinstance(y, float | int):
        return bool(x == y) or (x != x and y != y)
    if not x.is_finite() or not y.is_finite():  # no number meets none: a ball that is none overlaps every other
        return bool(x.is_finite() == y.is_finite())
    return bool(x.overlaps(y))
