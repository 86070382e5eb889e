"""The arguments of a plan, checked: what has no meaning, and what would take too long to plan, is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput, InvalidProblem, UnsupportedProblem
from ..validation import shown

__all__ = [
    "MOST", "MOST_SIZE", "MOST_WORKERS", "POWERS", "UPLOADS", "check_arguments", "check_margin", "check_power",
    "is_count", "is_number", "numbers_of", "plans",
]  # fmt: skip

POWERS = (2, 4, 6, 8)
UPLOADS = ("full", "compact", "whole")
MOST_SIZE, MOST_WORKERS = 2**14, 2**10
LEAST, MOST = 1e-100, 1e100
"""Numbers that can be squared and divided by one another in float64."""
MOST_FEATURES = {"latency": 2**20, "throughput": 2**16}
MOST_ROWS, MOST_PRODUCTS = 2**17, 2**30
"""The most numbers of a head's keys or values, rows of all heads, and products: more would be planned for long."""
OWN = {"power": ("p", "denominator", "epsilon", "inverse"), "sigmoid": ("scores", "offset")}
"""What one operator's plans alone take."""
NAMES = {"power": "power-softmax", "sigmoid": "sigmoid"}
P = ParamSpec("P")
R = TypeVar("R")


def plans(operator: str, instead: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator of what plans one operator: another one's arguments are refused, with what to call instead."""

    def decorated(call: Callable[P, R]) -> Callable[P, R]:
        @wraps(call)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for other in OWN.keys() - {operator}:
                names = [n for n in OWN[other] if n in kwargs]
                if names:
                    raise UnsupportedProblem(
                        f"he: {NAMES[operator]} attention is planned here, and {', '.join(names)} "
                        f"{'is' if len(names) == 1 else 'are'} of {NAMES[other]} attention; {instead}"
                    )
            return call(*args, **kwargs)

        return checked

    return decorated


def is_number(x: Any) -> bool:
    """Tell whether something is a finite real number."""
    try:
        real = isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)
        return real and math.isfinite(x)
    except OverflowError:  # an integer beyond float64
        return False


def is_count(x: Any, least: int, most: int) -> bool:
    """Tell whether something is an integer from `least` to `most`."""
    return isinstance(x, int) and not isinstance(x, bool) and least <= x <= most


def check_device(device: Any) -> None:
    """Refuse a name of no device."""
    if device not in ("cpu", "cuda"):
        raise InvalidInput(f"device: got {shown(device)}, expected 'cpu' or 'cuda'")


def check_power(p: Any) -> None:
    """Refuse what is no even power that is computed here."""
    if not is_count(p, 2, max(POWERS)) or p not in POWERS:
        raise InvalidInput(f"p: got {shown(p)}, expected one of {', '.join(map(str, POWERS))}")


def check_margin(margin: Any) -> None:
    """Refuse what is no share of a range's ends."""
    if not is_number(margin) or not 0 <= margin < 1:
        raise InvalidInput(f"margin: got {shown(margin)}, expected from 0 to below 1")


def numbers_of(name: str, x: Any) -> NDArray[np.float64]:
    """Return an array of real numbers in float64."""
    try:
        if not np.iscomplexobj(x):
            return np.asarray(x, np.float64)
    except (TypeError, ValueError, RuntimeError):  # PyTorch's for a tensor with a gradient
        pass
    raise InvalidProblem(f"{name}: got {type(x).__name__}, expected an array of real numbers, as x.detach().numpy() is")


def check_arguments(
    n_q: Any, n_k: Any, d_k: Any, d_v: Any, heads: Any, p: Any, denominator: Any, epsilon: Any, norms: Any,
    value_most: Any, tolerance: Any, normalize: Any, mode: Any, upload: Any, workers: Any, scale: Any = None,
    inverse: Any = None,
) -> None:  # fmt: skip
    """Refuse sizes, ranges and names that have no meaning."""
    d_v = d_k if d_v is None else d_v
    for name, value, allowed in (
        ("normalize", normalize, ("server", "client")),
        ("mode", mode, ("latency", "throughput")),
        ("upload", upload, UPLOADS),
    ):
        if not isinstance(value, str) or value not in allowed:
            *most, last = (repr(x) if name != "upload" else x for x in allowed)
            between = "one of " + ", ".join([*most, last]) if name == "upload" else f"{most[0]} or {last}"
            raise InvalidInput(f"{name}: got {shown(value)}, expected {between}")
    _check_sizes({"n_q": n_q, "n_k": n_k, "d_k": d_k, "d_v": d_v, "heads": heads}, workers, mode)
    check_power(p)
    _check_ranges(denominator, epsilon, norms, value_most, tolerance, scale)
    if inverse is not None and (inverse.low, inverse.high) != tuple(map(float, denominator)):
        raise InvalidInput(
            f"inverse: got one for ({inverse.low}, {inverse.high}), expected one for the denominator {denominator}"
        )
    if upload == "compact" and mode == "throughput":
        raise UnsupportedProblem("he: upload='compact' is for mode='latency'")


def _check_sizes(sizes: dict[str, Any], workers: Any, mode: str) -> None:
    for name, n, most in (*((n, x, MOST_SIZE) for n, x in sizes.items()), ("workers", workers, MOST_WORKERS)):
        if not is_count(n, 1, most):
            raise InvalidInput(f"{name}: got {shown(n)}, expected an integer of at least 1 and at most {most}")
    n_q, n_k, heads, d = sizes["n_q"], sizes["n_k"], sizes["heads"], max(sizes["d_k"], sizes["d_v"])
    rows = n_q * (heads if mode == "latency" else 1)  # a slot for each head, else
    for what, n, most in (
        ("n_k·d", n_k * d, MOST_FEATURES[mode]),
        ("heads·n_q", rows, MOST_ROWS),
        ("heads·n_q·n_k·d", rows * n_k * d, MOST_PRODUCTS),
    ):
        if n > most:
            raise UnsupportedProblem(
                f"he: {what} is {n}, beyond the {most} that are planned; cut the call into several"
            )


def _check_ranges(denominator: Any, epsilon: Any, norms: Any, value_most: Any, tolerance: Any, scale: Any) -> None:
    pairs = {"denominator": denominator, "norms": norms}
    for name, pair in pairs.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(map(is_number, pair)):
            raise InvalidInput(f"{name}: got {shown(pair)}, expected two finite numbers above 0")
    if not is_number(epsilon) or epsilon < 0:
        raise InvalidInput(f"epsilon: got {shown(epsilon)}, expected a finite number of at least 0")
    numbers = {"norms": min(norms), "value_most": value_most, "tolerance": tolerance}
    for name, x in numbers.items():
        if not is_number(x) or x <= 0:
            raise InvalidInput(f"{name}: got {shown(x)}, expected a finite number above 0")
    if scale is not None and (not is_number(scale) or scale == 0):
        raise InvalidInput(f"scale: got {shown(scale)}, expected a finite number other than 0, or None for 1/sqrt(d_k)")
    low, high = denominator
    if not epsilon <= low < high or low <= 0:
        raise InvalidInput(
            f"denominator: got ({low}, {high}), expected 0 < low < high with low at least epsilon = {epsilon}"
        )
    every = {**numbers, "norms": max(norms), "denominator": low, "scale": abs(scale or 1.0)}
    for name, x in (*every.items(), ("norms", min(norms)), ("denominator", high)):
        if not LEAST <= float(x) <= MOST:
            raise InvalidInput(f"{name}: got {x:g}, expected from {LEAST:g} to {MOST:g}; choose another unit")
