"""The table of floating-point formats, and exact rounding into them.

A format has precision ``p`` (significant bits, the hidden one counted), exponents ``emin`` and ``emax`` of its normal
numbers (value = ±1.xxx · 2**e), and a largest finite number. Sources: IEEE 754-2019 for binary64/32/16; bfloat16 has
binary32's exponents; float8_e4m3fn and float8_e5m2 are those of arXiv 2209.05433 ("fn": finite, no infinities, so
what rounds past the largest number becomes NaN).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .errors import InvalidInput

__all__ = ["ELEMENTS", "FLOAT4", "FORMATS", "HELD", "Format", "format_of", "is_float", "no_format"]


@dataclass(frozen=True)
class Format:
    """One binary floating-point format.

    Attributes
    ----------
    name : str
        The format's usual name, e.g. ``"bfloat16"``.
    dtype : numpy.dtype
        How NumPy holds it (through ml_dtypes where NumPy has none).
    precision : int
        Significant bits, the hidden one counted.
    emin, emax : int
        Exponents of the smallest and largest normal numbers.
    largest : float
        The largest finite number.
    infinities : bool
        False for the "fn" formats, where overflow gives NaN.
    """

    name: str
    dtype: np.dtype[Any]
    precision: int
    emin: int
    emax: int
    largest: float
    infinities: bool = True

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding a normal number to nearest: 2**-precision."""
        return 2.0**-self.precision

    @property
    def smallest_normal(self) -> float:
        """The smallest positive normal number."""
        return 2.0**self.emin

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number, which is also the ulp of zero."""
        return 2.0 ** (self.emin - self.precision + 1)

    @property
    def overflow(self) -> float:
        """The real number from which rounding to nearest overflows (a tie overflows unless its even side is finite)."""
        top = Fraction(self.largest)
        return float(top + self._spacing(self.emax) / 2) if self.precision < 53 else float("inf")

    def _spacing(self, exponent: int) -> Fraction:
        return Fraction(2) ** (max(exponent, self.emin) - self.precision + 1)

    def ulp(self, x: Fraction | float | int) -> float:
        """Return the unit in the last place of the real number `x`.

        It is ``2**(max(floor(log2 |x|), emin) - precision + 1)``; beyond the largest number, the ulp of the top binade.

        Parameters
        ----------
        x : Fraction, float or int
            A finite real number, taken as it is.

        Returns
        -------
        float
            The spacing of the format's numbers at `x`.
        """
        x = abs(Fraction(x))
        if x == 0:
            return self.smallest_subnormal
        return float(self._spacing(min(_floor_log2(x), self.emax)))

    def ulp_array(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return :meth:`ulp` of every element of a float64 array (NaN stays NaN; an infinity has the top ulp)."""
        x = np.abs(np.asarray(x, np.float64))
        exponent = np.frexp(np.where(np.isfinite(x), x, 1.0))[1] - 1
        exponent = np.where(np.isinf(x), self.emax, np.where(x == 0, self.emin, exponent))
        ulp = np.ldexp(1.0, np.clip(exponent, self.emin, self.emax) - self.precision + 1)
        return np.where(np.isnan(x), np.nan, ulp)

    def round(self, x: Fraction | float | int) -> float:
        """Round an exact real number to the nearest number of the format, ties to even.

        Subnormals are kept; a number that rounds past the largest becomes an infinity (NaN in an "fn" format).

        Parameters
        ----------
        x : Fraction, float or int
            The number, taken as it is; zero gives +0.0 and a negative number that underflows gives -0.0.

        Returns
        -------
        float
            The rounded value (every format's numbers are float64 numbers).
        """
        if isinstance(x, float) and not np.isfinite(x):
            return x if self.infinities or np.isnan(x) else float("nan")
        x = Fraction(x)
        if x == 0:
            return 0.0
        spacing = self._spacing(_floor_log2(abs(x)))
        steps = abs(x) / spacing
        whole, rest = divmod(steps.numerator, steps.denominator)
        if 2 * rest > steps.denominator or (2 * rest == steps.denominator and whole % 2):
            whole += 1
        rounded = whole * spacing
        if rounded > Fraction(self.largest):
            value = float("inf") if self.infinities else float("nan")
        else:
            value = float(rounded)
        return -value if x < 0 else value

    def round_array(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Round every element of a float64 array as :meth:`round` does, once (no double rounding)."""
        x = x if hasattr(x, "__cuda_array_interface__") else np.asarray(x, np.float64)
        if self.precision == 53:
            return x.copy()
        if self.name in ("float32", "float16"):  # NumPy's own conversions round to nearest even, once
            with np.errstate(all="ignore"):
                return x.astype(self.name).astype(np.float64)
        with np.errstate(all="ignore"):
            exponent = np.frexp(np.where(np.isfinite(x), x, 0.0))[1] - 1
            spacing = np.ldexp(np.ones_like(x), np.maximum(exponent, self.emin) - self.precision + 1)
            # x / spacing is exact (a power of two); rint rounds half to even
            rounded = np.where(np.isfinite(x), np.rint(x / spacing) * spacing, x)
            past = np.abs(rounded) > self.largest
            over = np.copysign(np.inf, rounded) if self.infinities else np.full_like(rounded, np.nan)
            return np.where(past, over, rounded)

    def neighbours(self, x: float) -> tuple[Fraction, Fraction]:
        """Return the two rounding boundaries around a number of the format: reals between them round to it."""
        low, high = self._next(x, -1), self._next(x, 1)
        return (low + Fraction(x)) / 2, (high + Fraction(x)) / 2

    def _next(self, x: float, direction: int) -> Fraction:
        exact = Fraction(x)
        if exact == 0:
            return direction * Fraction(self.smallest_subnormal)
        exponent = _floor_log2(abs(exact))
        away = (exact > 0) == (direction > 0)
        step = self._spacing(exponent)
        if not away and abs(exact) == Fraction(2) ** exponent:
            step = self._spacing(exponent - 1)
        return exact + direction * step


def _floor_log2(x: Fraction) -> int:
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= x else exponent - 1


def _format(name: str, kind: Any, precision: int, emin: int, emax: int, **more: Any) -> Format:
    largest = more.pop("largest", float((2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** emax))
    return Format(name, np.dtype(kind), precision, emin, emax, largest, **more)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        _format("float64", np.float64, 53, -1022, 1023),
        _format("float32", np.float32, 24, -126, 127),
        _format("float16", np.float16, 11, -14, 15),
        _format("bfloat16", ml_dtypes.bfloat16, 8, -126, 127),
        _format("float8_e4m3fn", ml_dtypes.float8_e4m3fn, 4, -6, 8, largest=448.0, infinities=False),
        _format("float8_e5m2", ml_dtypes.float8_e5m2, 3, -14, 15),
    )
}
"""The formats that refattn knows, by name."""
SHORT = {
    "half": "float16", "single": "float32", "double": "float64", "float": "float32",
    "fp16": "float16", "fp32": "float32", "fp64": "float64", "f16": "float16", "f32": "float32", "f64": "float64",
    "bf16": "bfloat16", "brain": "bfloat16",
    "e4m3": "float8_e4m3fn", "e4m3fn": "float8_e4m3fn", "float8_e4m3": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2", "fp8_e5m2": "float8_e5m2",
}  # fmt: skip
"""What people write for a format's name."""
FLOAT4 = _format("float4_e2m1fn", ml_dtypes.float4_e2m1fn, 2, 0, 2, largest=6.0, infinities=False)
"""Elements of MXFP4 and NVFP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
ELEMENTS: dict[str, int] = {f.name: f.precision for f in FORMATS.values()} | {FLOAT4.name: 2, "int8": 7}
"""What query, key and value may be stored as: names, and significant bits."""
HELD: dict[str, np.dtype[Any]] = {f.name: f.dtype for f in FORMATS.values()} | {
    FLOAT4.name: FLOAT4.dtype,
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""How NumPy holds floats by name, those of elements and scales among them."""


def format_of(dtype: Any) -> Format:
    """Return the format named or held by `dtype`.

    Parameters
    ----------
    dtype : str, numpy.dtype, or a dtype of PyTorch, JAX or CuPy
        Anything whose name ends in a format's name, e.g. ``"bfloat16"`` or ``torch.bfloat16``.

    Raises
    ------
    InvalidInput
        The name is none of the table's.
    """
    name = getattr(dtype, "name", None)
    name = (name if isinstance(name, str) and name else str(dtype)).rsplit(".")[-1]
    if name not in FORMATS and dtype is not None:  # NumPy takes None for float64
        with contextlib.suppress(TypeError, ValueError, SyntaxError):
            name = np.dtype(dtype).name
    if name not in FORMATS:
        raise no_format("dtype", name, "cast the arrays first")
    return FORMATS[name]


def no_format(argument: str, got: Any, change: str = "") -> InvalidInput:
    """Return the error for an argument that names no format; a usual short name is answered with the whole one."""
    if (meant := SHORT.get(str(got).rsplit(".")[-1].lower())) is not None:
        return InvalidInput(f"{argument}: got {got!r}; write {meant!r}")
    more = f"; {change}" if change else ""
    return InvalidInput(f"{argument}: got {got!r}, expected one of {', '.join(FORMATS)}{more}")


def is_float(dtype: Any) -> bool:
    """Tell whether `dtype` is one of the table's formats."""
    try:
        format_of(dtype)
    except InvalidInput:
        return False
    return True
