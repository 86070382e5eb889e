"""What the functions ask of their arguments."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import array_api_compat as api
import numpy as np
from numpy.typing import NDArray

from ..arrays import kind_of, to_numpy
from ..errors import InvalidInput

__all__ = [
    "axes",
    "factor",
    "flag",
    "function",
    "instance",
    "integers",
    "namespace",
    "numbers",
    "ordered",
    "places",
    "real",
    "under",
    "whole",
    "within",
]  # fmt: skip


def namespace(**arrays: Any) -> Any:
    """Return the library of arrays, by the array API standard, after checking that all are of one.

    Raises
    ------
    InvalidInput
        An argument is no array, or of another library than the first.
    """
    kinds = {name: kind_of(x) for name, x in arrays.items()}
    first, kind = next(iter(kinds.items()))
    for name, other in kinds.items():
        if other is None:
            raise InvalidInput(f"{name}: got {type(arrays[name]).__name__}, expected an array; use numpy.asarray(x)")
        if other != kind:
            raise InvalidInput(f"{name}: is an array of {other}, expected {kind}'s, as {first} is")
    return api.array_namespace(arrays[first])


def axes(name: str, x: Any, *wanted: str | int) -> None:
    """Check an array's shape: a number for an axis of that length, a name for one of any length above 0.

    Raises
    ------
    InvalidInput
        The array has other axes.
    """
    said = ", ".join(map(str, wanted))
    if x.ndim != len(wanted) or any(
        n != w if isinstance(w, int) else n < 1 for n, w in zip(x.shape, wanted, strict=True)
    ):
        raise InvalidInput(f"{name}: shape is {tuple(x.shape)}, expected ({said}), each at least 1")


def integers(name: str, x: Any) -> NDArray[Any]:
    """Return integers, an array of any library or a list, as a NumPy array of their type.

    Raises
    ------
    InvalidInput
        They are none, or do not make an array.
    """
    try:
        found = np.asarray(x) if kind_of(x) is None else to_numpy(x, name)
    except (TypeError, ValueError, OverflowError) as e:
        raise InvalidInput(f"{name}: got {_shown(x)}, expected an array of integers ({e})") from e
    if found.dtype.kind not in "iu":
        raise InvalidInput(f"{name}: got {found.dtype}, expected integers")
    return found


def _shown(x: Any) -> str:
    try:
        return repr(x)[:200]
    except ValueError:  # an integer of thousands of digits
        return f"a huge {type(x).__name__}"


def numbers(name: str, x: Any, least: int | None = None) -> None:
    """Check that an array holds no NaN, and nothing below `least`.

    Under `jit` and `vmap` there are no numbers yet, and nothing is checked.

    Raises
    ------
    InvalidInput
        One is NaN, or too small.
    """
    expected = "expected numbers" if least is None else f"expected numbers of at least {least}"
    if _any(x != x):
        raise InvalidInput(f"{name}: holds NaN, {expected}; mend what made them")
    if least is not None and _any(x < least):
        raise InvalidInput(f"{name}: holds a number below {least}, {expected}")


def _any(x: Any) -> bool:
    try:
        return bool(api.array_namespace(x).any(x))
    except (TypeError, RuntimeError):  # what JAX and PyTorch raise while they trace
        return False


def under(name: str, parts: Any, expected: str, check: Any) -> Any:
    """Return what a check of an argument's parts returns; an error of it says which argument they are of.

    Raises
    ------
    InvalidInput
        The argument has not as many parts as `expected` names; what the check refuses.
    """
    if not isinstance(parts, tuple | list) or len(parts) != expected.count(",") + 1:
        raise InvalidInput(f"{name}: got {type(parts).__name__}, expected {expected}")
    try:
        return check(*parts)
    except InvalidInput as e:
        raise InvalidInput(f"{name}: {e}") from None


def whole(name: str, x: Any, least: int, most: int | None = None) -> int:
    """Return a whole number in a range.

    Raises
    ------
    InvalidInput
        It is none, or outside.
    """
    fits = isinstance(x, int | np.integer) and not isinstance(x, bool)
    if not fits or x < least or (most is not None and x > most):
        up = "" if most is None else f" to {most}"
        raise InvalidInput(f"{name}: got {_shown(x)}, expected a whole number from {least}{up or ' on'}")
    return int(x)


def real(name: str, x: Any, least: float, most: float = math.inf) -> Any:
    """Return a finite number in [least, most] as it is: a fraction stays exact.

    Raises
    ------
    InvalidInput
        It is none, not finite, or outside.
    """
    fits = isinstance(x, Real) and not isinstance(x, bool)
    if not fits or not least <= x <= most or _infinite(x):
        up = "on" if math.isinf(most) else f"to {most}"
        raise InvalidInput(f"{name}: got {_shown(x)}, expected a finite number from {least} {up}")
    return int(x) if isinstance(x, np.integer) else x  # NumPy's would wrap in what is made of it


def _infinite(x: Any) -> bool:
    """Tell whether a number is infinite, or larger than all of float64."""
    try:
        return math.isinf(x)
    except OverflowError:
        return True


def factor(name: str, x: Any) -> Any:
    """Return a number of any sign, NaN and inf too: a float, a fraction, one of python-flint's, or an array of no axes.

    Raises
    ------
    InvalidInput
        It is none.
    """
    fits = x.ndim == 0 if kind_of(x) is not None else hasattr(type(x), "__float__") and not isinstance(x, bool)
    if fits:
        return x
    raise InvalidInput(f"{name}: got {_shown(x)}, expected a number")


def flag(name: str, x: Any) -> bool:
    """Return True or False, refusing what Python would only take for one of them.

    Raises
    ------
    InvalidInput
        It is neither.
    """
    if not isinstance(x, bool | np.bool_):
        raise InvalidInput(f"{name}: got {_shown(x)}, expected True or False")
    return bool(x)


def function(name: str, x: Any) -> None:
    """Check that an argument can be called.

    Raises
    ------
    InvalidInput
        It cannot.
    """
    if not callable(x):
        raise InvalidInput(f"{name}: got {_shown(x)}, expected a function")


def instance(name: str, x: Any, kind: type, how: str) -> None:
    """Check that an argument is an object of a class; `how` says where such ones come from.

    Raises
    ------
    InvalidInput
        It is another.
    """
    if not isinstance(x, kind):
        raise InvalidInput(
            f"{name}: got {_shown(x)}, expected {kind.__module__.split('.')[0]}'s {kind.__name__}; {how}"
        )


def places(name: str, x: Any, count: int) -> None:
    """Check an array of any library for places among some things, from 0 on.

    Raises
    ------
    InvalidInput
        It is no array of integers, or one is out of range.
    """
    xp = api.array_namespace(x)
    if not xp.isdtype(x.dtype, "integral"):
        raise InvalidInput(f"{name}: holds {x.dtype}, expected integers from 0 to {count - 1}")
    if bool(xp.any((x < 0) | (x >= count))):
        raise InvalidInput(f"{name}: one is out of range, expected integers from 0 to {count - 1}")


def ordered(name: str, x: Any, seen: Any = None) -> None:
    """Check that scores have an order, where they are seen; infinite ones have: they come first and last.

    Raises
    ------
    InvalidInput
        One is NaN.
    """
    xp = api.array_namespace(x)
    if not xp.isdtype(x.dtype, "real floating"):
        return
    lost = xp.isnan(x) if seen is None else xp.isnan(x) & seen
    if bool(xp.any(lost)):
        raise InvalidInput(f"{name}: holds NaN, which has no place in an order; mend what made the scores")


def within(name: str, x: Any, low: float, high: float, *, open_low: bool = False) -> float:
    """Return a finite number in [low, high], or (low, high] with `open_low`.

    Raises
    ------
    InvalidInput
        It is none (NaN is not, either), or outside.
    """
    fits = isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)
    if not fits or not (low < x if open_low else low <= x) or not x <= high or _infinite(x):
        end = "inf)" if math.isinf(high) else f"{high}]"
        raise InvalidInput(f"{name}: got {_shown(x)}, expected a number in {'(' if open_low else '['}{low}, {end}")
    return float(x)
