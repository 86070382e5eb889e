"""What the levels take for granted of a GPU, checked at first use. A failed check refuses the GPU by name."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import to_float64
from ...dtypes import FORMATS
from ...errors import UnsupportedProblem
from ..doubledouble import exp2, two_prod, two_sum
from ..enclosure import Enclosure
from ..levels import gamma
from .taken import KERNELS_KNOW, returned, taken

__all__ = ["CHECKS", "check"]

Float = NDArray[np.float64]
SHAPES = ((256, 512, 384), (512, 128, 4096))
"""Rows, columns and terms: as the products of scores and of values."""
NATIVE = (0, 1, 2, 3)
"""cuBLAS's math modes that leave float64 as it is; others emulate it."""


def check(card: Any) -> None:
    """Check a GPU's arithmetic.

    Raises
    ------
    UnsupportedProblem
        What failed, and what to change.
    """
    for name, holds in CHECKS.items():
        if not holds(card):
            raise UnsupportedProblem(
                f"device: 'cuda:{card.number}' is not trusted, the check {name!r} failed ({holds.__doc__}); "
                "use device='cpu'"
            )


def _product(card: Any, a: Float, b: Float) -> Float:
    out = card.xp.empty((len(a), b.shape[1]))
    card.matmul(card.xp.asarray(a), card.xp.asarray(b), out)
    found: Float = out.get()
    return found


def native(card: Any) -> bool:
    """float64 emulation of cuBLAS is off: CUBLAS_EMULATE_DOUBLE_PRECISION is not set, the math mode is a native one."""
    mode = card.xp.cuda.cublas.getMathMode(card.xp.cuda.device.get_cublas_handle())
    return os.environ.get("CUBLAS_EMULATE_DOUBLE_PRECISION", "0") in ("", "0") and mode in NATIVE


def exact_products(card: Any) -> bool:
    """Products whose sums stay below 2**53 are exact."""
    rng = np.random.default_rng(0)
    for m, n, k in SHAPES:
        a, b = (rng.integers(-(2**20), 2**20, s).astype(np.float64) for s in ((m, k), (k, n)))
        if (_product(card, a, b) != a @ b).any():
            return False
    return True


def small_terms(card: Any) -> bool:
    """A term of a product counts however large its row's and its column's other numbers are: it is no fixed point."""
    rng = np.random.default_rng(1)
    for m, n, k in SHAPES:
        a, b = (rng.standard_normal(s) for s in ((m, k), (k, n)))
        a[:, 1::2] *= 2.0**200
        b[1::2] = 0.0
        rest = a.copy()
        rest[:, 1::2] = 0.0
        if (_product(card, a, b) != _product(card, rest, b)).any() or not _product(card, rest, b).all():
            return False
        if (_product(card, b.T, a.T) != _product(card, b.T, rest.T)).any():
            return False
    return True


def sums_to_nearest(card: Any) -> bool:
    """A product's sums are rounded to nearest, ties to even, subnormal numbers kept, wherever the terms stand."""
    rng = np.random.default_rng(2)
    for m, n, k in SHAPES:
        a, b = np.zeros((m, k)), np.ones((k, n))
        x, y = rng.uniform(1, 2, m), rng.standard_normal(m) * 2.0 ** -rng.integers(0, 60, m)
        x[::4], y[::4] = 1 + 2.0**-52 * rng.integers(0, 2, len(x[::4])), 2.0**-53  # ties
        x[1::4], y[1::4] = 2.0**-1074 * rng.integers(1, 9, len(x[1::4])), 2.0**-1074
        places = np.array([rng.permutation(k)[:2] for _ in range(m)])
        a[np.arange(m), places[:, 0]], a[np.arange(m), places[:, 1]] = x, y
        if (_product(card, a, b) != (x + y)[:, None]).any():
            return False
    return True


def sums_in_any_order(card: Any) -> bool:
    """A product is within the bound that holds for sums in any order."""
    rng = np.random.default_rng(3)
    for m, n, k in SHAPES:
        a, b = rng.standard_normal((m, k)), rng.standard_normal((k, n))
        found = _product(card, a, b)
        for i, j in zip(rng.integers(0, m, 32).tolist(), rng.integers(0, n, 32).tolist(), strict=True):
            terms, low = two_prod(a[i], b[:, j])
            exact = math.fsum([*terms, *low])  # rounded once
            if abs(found[i, j] - exact) > gamma(k + 2) * math.fsum(np.abs(terms)):
                return False
    return True


def steps(card: Any) -> bool:
    """The kernels keep subnormal numbers, round to nearest, and fuse no product with a sum but where it is written."""
    given = np.array([2.0**-1022, 1 + 2.0**-30, 1 - 2.0**-30, -1.0, 1.0, 2.0**-53 * 1.0000001])
    out = card.xp.empty(6)
    card.launch(0, "trusted", 1, (card.xp.asarray(given), out))
    expected = [2.0**-1023, 0.0, -(2.0**-60), *two_sum(given[4], given[5]), 1 + 2.0**-52]
    return bool((out.get() == np.array(expected)).all())


def elementwise(card: Any) -> bool:
    """The functions of arrays give the CPU's bits: sums, products, quotients, roots, rounding, powers of two."""
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal(4096), rng.standard_normal(4096) * 2.0 ** rng.integers(-60, 60, 4096)
    x[::64] *= 2.0**-1040  # products and quotients below the normal numbers

    def all_of(x: Any, y: Any) -> list[Any]:
        m, e = np.frexp(x)
        whole = np.rint(y)
        found = [*two_sum(x, y), *two_prod(y, y[::-1]), x * y, x / y, np.sqrt(np.abs(x)), m, e.astype(np.float64)]
        found += [whole, np.nextafter(x, np.inf), np.nextafter(x, -np.inf), np.ldexp(m, e)]
        return [*found, *exp2(np.minimum(y, 100.0), y * 2.0**-60), np.ceil(y), np.copysign(x, y)]

    with np.errstate(all="ignore"):
        mine, theirs = all_of(x, y), all_of(card.xp.asarray(x), card.xp.asarray(y))
    return all((a.view(np.int64) == b.get().view(np.int64)).all() for a, b in zip(mine, theirs, strict=True))


def rounding(card: Any) -> bool:
    """Enclosures are rounded to each format as on the CPU: quotients, neighbours, ties, and what is decided."""
    rng = np.random.default_rng(5)
    for form in FORMATS.values():
        h = rng.standard_normal(1024) * 2.0 ** rng.integers(form.emin - 9, form.emax + 9, 1024).clip(-1022, 1022)
        h[::4] = form.round_array(h[::4])
        h[1::4] = h[::4] * (1 + 2.0**-form.precision)  # many are ties
        h[~np.isfinite(h)] = 1.0
        x = np.stack([h, h * 2.0**-54, np.abs(h) * 2.0 ** -rng.integers(form.precision - 2, 90, 1024)], -1)
        x[::3, 2], x[::5, 1] = 0.0, 0.0
        x[:4] = [[np.nan, 0, 0], [np.inf, 0, 0], [0, 0, 0], [np.inf, 1, 1]]
        mine, sure = card.enclosed(card.xp.asarray(x)).settle(form)
        x[3] = np.nan, 0, np.inf
        value, decided = Enclosure(*x.T).settle(form)
        found = mine.get()
        if (sure != decided).any() or not np.array_equal(found, value, equal_nan=True):
            return False
        if (np.signbit(found) != np.signbit(value))[~np.isnan(value)].any():
            return False
    return True


def narrow_types(card: Any) -> bool:
    """Numbers of narrow formats stay the same as float64 and back, those below the least normal one among them."""
    rng = np.random.default_rng(6)
    for form in (FORMATS[name] for name in KERNELS_KNOW):
        size, place = 8 * form.dtype.itemsize, form.precision - 1
        bits = rng.integers(0, 2**size, 4096).astype(f"u{form.dtype.itemsize}")
        bits[::2] &= 2 ** (size - 1) | (2**place - 1)  # the exponent of 0 and of subnormal numbers
        x = bits.view(form.dtype)
        wide, there = to_float64(x), taken(card, x)
        back, found, known = returned(card, there, form), there.get(), ~np.isnan(wide)
        if not np.array_equal(found, wide, equal_nan=True) or (np.isnan(to_float64(back)) == known).any():
            return False
        if (np.signbit(found) != np.signbit(wide))[known].any() or (back.view(bits.dtype) != bits)[known].any():
            return False
    return True


CHECKS: dict[str, Callable[[Any], bool]] = {
    "native float64": native,
    "exact products": exact_products,
    "small terms": small_terms,
    "sums to nearest": sums_to_nearest,
    "sums in any order": sums_in_any_order,
    "steps": steps,
    "elementwise": elementwise,
    "rounding": rounding,
    "narrow types": narrow_types,
}
"""The checks by name."""
