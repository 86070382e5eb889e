"""Diagnostics, not attention: grades of approximate answers, intervals of counts, spectra of hidden states.

StreetMath (how language models approximate everyday arithmetic): the released code, ctseng777/StreetMath at 3e2c7ae,
was read; of the paper nothing was.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from ..errors import InvalidInput, expect
from .arguments import axes, namespace, whole, within

__all__ = [
    "effective_rank",
    "grade_approximation",
    "parse_answer",
    "spectral_entropy",
    "trace_covariance",
    "two_proportion_z",
    "wilson_interval",
]

EXACT, GOOD, MILD = Fraction(1, 10**6), Fraction(1, 5), Fraction(3, 5)
FINAL = re.compile(r"final\s*answer\s*:", re.IGNORECASE)
NUMBER = re.compile(r"([-+]?)[$€£¥]?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
RELEASED = r"([-+]?)(\d*\.?\d+)"
RELEASED_FINAL = re.compile(rf"final\s*answer\s*:\s*{RELEASED}", re.IGNORECASE)


def parse_answer(text: str, *, mode: str = "exact") -> Fraction | None:
    """Return the number after "final answer:" in a text, or else the first number, or None.

    Parameters
    ----------
    text : str
    mode : {"exact", "released"}
        "exact" reads thousands separators and passes over what is between "final answer:" and the number; "released"
        passes over blanks only and stops at a comma.

    Returns
    -------
    Fraction or None
        The decimal number as it is written.

    Raises
    ------
    InvalidInput
        No text, or another mode.

    Notes
    -----
    The release reads "Final answer: 1,200" as 1, and of "A $5 fare. Final answer: $20" takes the first number, 5.
    """
    expect(isinstance(text, str), "text", text, "a string")
    _mode(mode)
    if mode == "released":
        found = RELEASED_FINAL.search(text) or re.search(RELEASED, text.replace(",", ""))
    else:
        final = FINAL.search(text)
        found = (NUMBER.search(text, final.end()) if final else None) or NUMBER.search(text)
    return Fraction("".join(found.groups()).replace(",", "")) if found else None


def grade_approximation(answer: Any, exact: Any, *, mode: str = "exact") -> str:
    """Return how good an approximate answer is: "exact", "good", "mildly off", "way off", or "uncategorized".

    With e the exact value and g the answer: exact where ``|g - e| <= 1e-6``; good where ``|g - e| <= |e|/5``;
    mildly off where it is at most ``3|e|/5``; way off otherwise. No answer (None) is uncategorized.

    Parameters
    ----------
    answer : int, float, Decimal, Fraction or None
        A float is read as the decimal number that it prints as.
    exact : int, float, Decimal or Fraction
    mode : {"exact", "released"}
        "exact" compares rational numbers; "released" computes ``|g - e|/|e|`` in float64, so that an answer on a
        boundary may fall to either side: 3.6 for 3 is off by more than a fifth then.

    Returns
    -------
    str

    Raises
    ------
    InvalidInput
        A number that is none, NaN or infinite.
    """
    _mode(mode)
    e = _rational("exact", exact)
    if answer is None:
        return "uncategorized"
    g = _rational("answer", answer)
    if mode == "released":
        close = abs(float(g) - float(e)) <= 1e-6
        error = abs(float(g) - float(e)) / abs(float(e)) if e else math.inf
        return "exact" if close else "good" if error <= 0.2 else "mildly off" if error <= 0.6 else "way off"
    off = abs(g - e)
    if off <= EXACT:
        return "exact"
    return "good" if off <= GOOD * abs(e) else "mildly off" if off <= MILD * abs(e) else "way off"


def wilson_interval(successes: int, trials: int, *, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's interval of a proportion: the p for which (k/n - p)**2 <= z**2 p(1 - p)/n.

    (k/n + z**2/2n -+ z sqrt((k/n)(1 - k/n)/n + z**2/4n**2)) / (1 + z**2/n)

    Parameters
    ----------
    successes, trials : int
        k from 0 to n, and n, at least 1.
    z : float
        Quantile of the normal distribution; 1.96 covers 95 % in the long run.

    Returns
    -------
    low, high : float
        From 0 to 1.

    Raises
    ------
    InvalidInput
        Counts that do not fit together, or a z that is not above 0.
    """
    n = whole("trials", trials, 1)
    k = whole("successes", successes, 0, n)
    z = within("z", z, 0, 1e6, open_low=True)
    p = k / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    middle, total = p + z * z / (2 * n), 1 + z * z / n
    # where all or none succeeded the bound is 1 or 0, which rounding would miss
    return 0.0 if k == 0 else (middle - half) / total, 1.0 if k == n else (middle + half) / total


def two_proportion_z(successes_1: int, trials_1: int, successes_2: int, trials_2: int) -> tuple[float, float]:
    """Return z of the difference of two proportions with pooled variance, and the two-sided p-value.

    ``z = (p1 - p2) / sqrt(p(1 - p)(1/n1 + 1/n2))``, ``p = (k1 + k2)/(n1 + n2)``; the p-value is ``erfc(|z|/sqrt(2))``.

    Parameters
    ----------
    successes_1, trials_1, successes_2, trials_2 : int
        k1, n1, k2, n2.

    Returns
    -------
    z, p_value : float

    Raises
    ------
    InvalidInput
        Counts that do not fit together, or samples with successes or failures only, for which z is 0/0.

    Notes
    -----
    z**2 is the chi-squared statistic of the two by two table. The release computes the p-value as 1 - erf, which is 0
    from z = 8.3 on.
    """
    n1, n2 = whole("trials_1", trials_1, 1), whole("trials_2", trials_2, 1)
    k1, k2 = whole("successes_1", successes_1, 0, n1), whole("successes_2", successes_2, 0, n2)
    k, n = k1 + k2, n1 + n2
    if k in (0, n):
        raise InvalidInput(f"successes: {k} of {n}, expected successes and failures; these proportions do not differ")
    # over whole numbers, rounded once each: z**2 = (k1 n2 - k2 n1)**2 n / (k (n - k) n1 n2)
    z = (k1 * n2 - k2 * n1) / math.sqrt(Fraction(k * (n - k) * n1 * n2, n))
    return z, math.erfc(abs(z) / math.sqrt(2))


def spectral_entropy(states: Any) -> Any:
    """Return the entropy of a matrix's singular values as shares of their sum: -sum p log p, p = s / sum(s), in nats.

    Parameters
    ----------
    states : (rows, features) array
        E.g. the hidden states of a layer. Not all 0.

    Returns
    -------
    () array
        From 0 (rank 1) to log min(rows, features).

    Raises
    ------
    InvalidInput
        Other axes, numbers that are not finite, or only zeros.

    Notes
    -----
    The shares are of s, as in the release, not of s**2. The release adds 1e-12 to the sum and inside the logarithm.
    """
    xp, s = _singular_values(states)
    p = s / xp.sum(s)
    return -xp.sum(p * xp.log(xp.where(p > 0, p, 1.0)))


def effective_rank(states: Any, *, threshold: float = 0.01) -> int:
    """Return how many singular values are above a share of the largest: #{s > threshold·max(s)}.

    Parameters
    ----------
    states : (rows, features) array
        Not all 0.
    threshold : float
        From 0 to 1.

    Returns
    -------
    int

    Raises
    ------
    InvalidInput
        Other axes, numbers that are not finite, only zeros, or a threshold outside.

    Notes
    -----
    The exponential of an entropy of singular values has the same name elsewhere; this is the release's.
    """
    threshold = within("threshold", threshold, 0, 1)
    xp, s = _singular_values(states)
    return int(xp.sum(xp.astype(s > threshold * xp.max(s), xp.int32)))


def trace_covariance(states: Any) -> Any:
    """Return the trace of the covariance of rows: sum over features of mean_i (x_i - mean)**2.

    Parameters
    ----------
    states : (rows, features) array

    Returns
    -------
    () array

    Raises
    ------
    InvalidInput
        Other axes, or numbers that are not finite.

    Notes
    -----
    Divided by the number of rows, as in the release, not by one less.
    """
    xp = _states(states)
    return xp.sum(xp.mean((states - xp.mean(states, axis=0, keepdims=True)) ** 2, axis=0))


def _states(states: Any) -> Any:
    xp = namespace(states=states)
    axes("states", states, "rows", "features")
    if not xp.isdtype(states.dtype, "real floating") or not bool(xp.all(xp.isfinite(states))):
        raise InvalidInput(f"states: type is {states.dtype}, expected finite numbers of a floating type")
    return xp


def _singular_values(states: Any) -> tuple[Any, Any]:
    xp = _states(states)
    if not bool(xp.any(states != 0)):
        raise InvalidInput("states: holds only zeros, which have no shares; leave such layers out")
    return xp, xp.linalg.svdvals(states)


def _rational(name: str, x: Any) -> Fraction:
    fits = isinstance(x, int | float | Decimal | Fraction | np.integer | np.floating) and not isinstance(x, bool)
    if not fits or not math.isfinite(x):
        raise InvalidInput(f"{name}: got {x!r}, expected a finite int, float, Decimal or Fraction")
    return x if isinstance(x, Fraction) else Fraction(str(x))


def _mode(mode: str) -> None:
    expect(mode in ("exact", "released"), "mode", mode, "'exact' or 'released'")
