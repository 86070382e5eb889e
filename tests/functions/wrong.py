"""Wrong inputs, made of a valid call's arguments, and what a function did with them."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch

from refattn.errors import RefattnError

NAN = float("nan")


def is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray | torch.Tensor)


def changed(x: Any, at: int, number: Any) -> Any:
    """Return a copy of an array, one of whose numbers is another."""
    copy = x.copy() if isinstance(x, np.ndarray) else x.clone()
    copy.reshape(-1)[at] = number
    return copy


def of_array(x: Any) -> Iterator[tuple[str, Any]]:
    """Give an array of another rank, size or kind, and one with a number that has no meaning."""
    yield "number", x.reshape(-1)[0]
    yield "list", x.tolist()
    yield "another axis", x[None]
    yield "an axis fewer", x[0]
    for axis in range(x.ndim):
        cut = [slice(None)] * x.ndim
        cut[axis] = slice(0, 0)
        yield f"axis {axis} empty", x[tuple(cut)]
        more = (np.concatenate if isinstance(x, np.ndarray) else torch.cat)([x, x], axis)
        yield f"axis {axis} longer", more
    kind = str(x.dtype)
    if "float" in kind:
        yield "NaN", changed(x, 0, NAN)
        yield "whole numbers", (10 * x).astype(int) if isinstance(x, np.ndarray) else (10 * x).long()
    elif "int" in kind:
        yield "negative", changed(x, 0, -7)
        yield "far", changed(x, 0, 10**6)
        yield "fractions", x + 0.5


def of_argument(x: Any) -> Iterator[tuple[str, Any]]:
    """Give what stands wrongly in the place of an argument."""
    yield "None", None
    if not isinstance(x, str):
        yield "text", "nothing"
    if is_array(x):
        yield from of_array(x)
    elif isinstance(x, bool):
        yield "number", 3
    elif isinstance(x, int):
        yield from ((str(n), n) for n in (-1, 0, 1.5, NAN, [1]))
    elif isinstance(x, float):
        yield from ((str(n), n) for n in (NAN, np.inf, -1.0, [1.0]))
    elif isinstance(x, str):
        yield "another word", "nothing"
        yield "number", 3
    elif callable(x) and not is_dataclass(x):
        yield "gives None", lambda *_: None
    elif isinstance(x, list) or type(x) is tuple:
        yield "empty", type(x)()
        yield "number", 3
    if isinstance(x, tuple):
        make = type(x)._make if hasattr(x, "_make") else tuple
        for i, part in enumerate(x):
            for label, wrong in of_argument(part):
                yield f"[{i}] {label}", make([*x[:i], wrong, *x[i + 1 :]])


def leaves(x: Any) -> Iterator[Any]:
    """Give the arrays and numbers of a result."""
    if isinstance(x, list | tuple):
        for part in x:
            yield from leaves(part)
    elif is_dataclass(x):
        yield from leaves(list(vars(x).values()))
    elif not callable(x) and not isinstance(x, str) and x is not None:
        yield np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)


def not_finite(x: Any) -> bool:
    """Tell whether NaN or infinity can be seen in a result."""
    return any(bool((~np.isfinite(leaf)).any()) for leaf in leaves(x) if leaf.dtype.kind == "f")


def named(arguments: dict[str, Any]) -> set[str]:
    """Return what an error may call the arguments: by their names, or by those of their fields."""
    found = set(arguments)
    for x in arguments.values():
        found |= set(getattr(x, "_fields", ()))
    return found


def floats(x: Any) -> Any:
    """Return integers as floats, and what is inside of a tuple likewise."""
    if isinstance(x, tuple):
        return (type(x)._make if hasattr(x, "_make") else tuple)(map(floats, x))
    return x if not is_array(x) else x.astype(float) if isinstance(x, np.ndarray) else x.double()


def answer(call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    spread = [p.name for p in inspect.signature(call).parameters.values() if p.kind is p.VAR_POSITIONAL]
    if not spread:
        return call(**arguments)
    given = arguments[spread[0]]
    return call(*given) if isinstance(given, tuple) else call(given)


def as_floats_give(call: Callable[..., Any], given: dict[str, Any], name: str, found: Any) -> bool:
    """Tell whether the same numbers as floats give the same."""
    other = answer(call, {**given, name: floats(given[name])})
    pairs = zip(leaves(found), leaves(other), strict=True)
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == b.dtype.kind == "f") for a, b in pairs)


def said_of(call: Callable[..., Any], arguments: dict[str, Any], name: str, label: str, wrong: Any) -> str:
    """Return what is wrong with a function's answer to a wrong argument; "" where it refuses it by name.

    An answer is right, too, that shows NaN or infinity where one went in, or that whole numbers give like floats.
    """
    given = {**arguments, name: wrong}
    try:
        found = answer(call, given)
        if label.lower().endswith(("nan", "inf")) and not_finite(found):
            return ""
        if label.endswith("whole numbers") and as_floats_give(call, given, name, found):
            return ""
        return "accepted"
    except RefattnError as e:
        shown = str(e)
        return "" if any(re.search(rf"\b{x}\b", shown) for x in named(arguments)) else f"names no argument: {shown}"
    except Exception as e:
        return f"{type(e).__name__}: {e}"
