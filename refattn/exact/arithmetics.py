"""The arithmetics that run a definition: floating point, mpmath, mpmath intervals, Arb balls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from fractions import Fraction
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from .precision import precision

__all__ = ["Balls", "Floats", "Intervals", "Multiprecision"]

Array = NDArray[Any]
Mask = NDArray[np.bool_]


class Floats:
    """NumPy floating point: float64 is the plain reference, float32 an honest kernel."""

    def __init__(self, dtype: Any = np.float64) -> None:
        self.dtype = np.dtype(dtype)
        self.name = self.dtype.name

    def array(self, x: Array) -> Array:
        """Take in an array."""
        taken: Array = np.empty(np.shape(x), self.dtype)
        taken[...] = x
        return taken

    def number(self, x: Any) -> Any:
        """Take in a number, rounded to nearest."""
        return self.dtype.type(float(x))

    def rsqrt(self, n: int) -> Any:
        """Return 1/sqrt(n)."""
        return self.dtype.type(1 / np.sqrt(float(n)))

    def matmul(self, a: Array, b: Array) -> Array:
        """Return the matrix product."""
        return np.asarray(a @ b)

    def apply(self, function: str, a: Array) -> Array:
        """Apply a function to every element; overflow gives inf, as IEEE arithmetic does."""
        with np.errstate(all="ignore"):
            if function == "relu":
                return np.asarray(np.maximum(a, self.dtype.type(0)))
            if function == "rsqrt":
                return np.asarray(self.dtype.type(1) / np.sqrt(a))
            if function == "sigmoid":
                e = np.exp(-np.abs(a))
                return np.asarray(np.where(a >= 0, self.dtype.type(1), e) / (1 + e))
            return np.asarray(getattr(np, function)(a))

    def shift(self, a: Array, where: Mask) -> Array:
        """Return each row's largest visible element, (n, 1)."""
        top = np.where(where, a, -np.inf).max(1, initial=-np.inf, keepdims=True)
        return np.asarray(np.where(np.isneginf(top), 0, top).astype(self.dtype))

    def absmax(self, a: Array, where: Mask) -> Array:
        """Return each row's largest visible absolute value, (n, 1)."""
        return np.asarray(np.where(where, np.abs(a), self.dtype.type(0)).max(1, initial=0, keepdims=True))


class _Objects:
    """Arithmetics whose numbers are Python objects in NumPy arrays."""

    name: str
    functions: dict[str, Callable[[Any], Any]]

    def number(self, x: Any) -> Any:
        raise NotImplementedError

    def array(self, x: Array) -> Array:
        """Take in a float64 array, exactly."""
        return _objects(x.shape, (self.number(y) for y in np.asarray(x, np.float64).ravel().tolist()))

    def rsqrt(self, n: int) -> Any:
        """Return 1/sqrt(n)."""
        return 1 / self.functions["sqrt"](self.number(n))

    def matmul(self, a: Array, b: Array) -> Array:
        """Return the matrix product."""
        if 0 in (*a.shape, *b.shape):
            return _objects((a.shape[0], b.shape[1]), (self.number(0) for _ in range(a.shape[0] * b.shape[1])))
        return np.asarray(a @ b)

    def apply(self, function: str, a: Array) -> Array:
        """Apply a function to every element."""
        f = self.functions[function]
        return _objects(a.shape, (f(x) for x in a.ravel()))

    def middle(self, x: Any) -> Any:
        """Return an exact number inside `x`."""
        return x

    def shift(self, a: Array, where: Mask) -> Array:
        """Return for each row an exact number near its largest visible element, (n, 1)."""
        rows = (
            max((self.middle(x) for x in row[seen]), default=self.number(0)) for row, seen in zip(a, where, strict=True)
        )
        return _objects((a.shape[0], 1), rows)

    def larger(self, x: Any, y: Any) -> Any:
        """Return the maximum of two numbers."""
        return max(x, y)

    def absmax(self, a: Array, where: Mask) -> Array:
        """Return each row's largest visible absolute value, (n, 1)."""

        def rows() -> Iterator[Any]:
            for row, seen in zip(a, where, strict=True):
                top = self.number(0)
                for x in row[seen]:
                    top = self.larger(top, abs(x))
                yield top

        return _objects((a.shape[0], 1), rows())

    def sigmoid(self, x: Any) -> Any:
        """1 / (1 + exp(-x)), without a large exponential."""
        exp = self.functions["exp"]
        if self.middle(x) >= 0:
            return 1 / (1 + exp(-x))
        e = exp(x)
        return e / (1 + e)


class Multiprecision(_Objects):
    """mpmath at any precision: the second opinion, with no bound on its error."""

    def __init__(self, bits: int) -> None:
        self.name = f"mpmath at {bits} bits"
        import mpmath  # only here: the import costs a tenth of a second

        self.context = mpmath.ctx_mp.MPContext()
        self.context.prec = bits
        c = self.context
        self.functions = {
            "exp": c.exp,
            "log": c.log,
            "tanh": c.tanh,
            "sqrt": c.sqrt,
            "rsqrt": lambda x: 1 / c.sqrt(x),
            "sigmoid": self.sigmoid,
            "relu": lambda x: x if x > 0 else c.mpf(0),
        }

    def number(self, x: Any) -> Any:
        """Take in a number (a float exactly, a fraction rounded)."""
        if isinstance(x, Fraction):
            return self.context.mpf(x.numerator) / x.denominator
        return self.context.mpf(x)


class Intervals(_Objects):
    """mpmath's intervals: an enclosure that owes nothing to Arb."""

    def __init__(self, bits: int) -> None:
        self.name = f"mpmath intervals at {bits} bits"
        import mpmath

        self.context = mpmath.ctx_iv.MPIntervalContext()
        self.context.prec = bits
        c = self.context
        self.functions = {
            "exp": c.exp,
            "log": c.log,
            "sqrt": c.sqrt,
            "rsqrt": lambda x: 1 / c.sqrt(x),
            "sigmoid": self.sigmoid,
            "tanh": self._tanh,
            "relu": lambda x: self.larger(x, c.mpf(0)),
        }

    def number(self, x: Any) -> Any:
        """Take in a number (a fraction as the interval around it)."""
        if isinstance(x, Fraction):
            return self.context.mpf(x.numerator) / x.denominator
        return self.context.mpf(x)

    def _tanh(self, x: Any) -> Any:
        e = self.context.exp(-2 * abs(x))
        t = (1 - e) / (1 + e)
        return t if x.mid >= 0 else -t

    def middle(self, x: Any) -> Any:
        """Return the middle as a point."""
        return x.mid

    def larger(self, x: Any, y: Any) -> Any:
        """Return the interval of the maximum."""
        return self.context.mpf([max(x.a, y.a), max(x.b, y.b)])


class Balls(_Objects):
    """Arb balls (python-flint) at any precision: midpoint and proven radius for every number.

    Use :meth:`working` around every computation: FLINT's precision belongs to the process, not to the number.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.signs: list[Mask] = []  # what a prime field says of signs, in the order in which they are asked for
        self.doubts = False  # whether one was not certain, so that a gradient is wider than its precision makes it
        self.name = f"Arb at {bits} bits"
        arb = flint.arb
        self.functions = {
            "exp": arb.exp,
            "log": arb.log,
            "tanh": _tanh,
            "sqrt": arb.sqrt,
            "rsqrt": arb.rsqrt,
            "sigmoid": self.sigmoid,
            "relu": arb.nonnegative_part,
        }

    def working(self) -> AbstractContextManager[Any]:
        """Return a context in which FLINT works at this precision."""
        return precision(self.bits)

    def number(self, x: Any) -> Any:
        """Take in a number: ints and floats exactly, a fraction as the ball around it."""
        if isinstance(x, Fraction):
            return flint.arb(flint.fmpq(x.numerator, x.denominator))
        return flint.arb(x)

    def array(self, x: Array) -> Array:
        """Take in a float64 array, exactly."""
        # not by `number`, which asks of each of very many what it is
        return _objects(x.shape, map(flint.arb, np.asarray(x, np.float64).ravel().tolist()))

    def operand(self, x: Array) -> Any:
        """Take in a float64 matrix, exactly: a large one is made into balls when they are asked for."""
        from .sliced import taken  # its products are a level's, which imports much

        return taken(self, x)

    def matmul(self, a: Array, b: Array) -> Array:
        """Return the matrix product by FLINT's ball matrices."""
        n, k, m = a.shape[0], a.shape[1], b.shape[1]
        if 0 in (n, k, m):
            return super().matmul(a, b)
        product = flint.arb_mat(n, k, a.ravel().tolist()) * flint.arb_mat(k, m, b.ravel().tolist())
        return _objects((n, m), iter(product.entries()))

    def middle(self, x: Any) -> Any:
        """Return the midpoint, an exact number."""
        return x.mid()

    def larger(self, x: Any, y: Any) -> Any:
        """Return a ball around the maximum."""
        return x.max(y)

    def between(self, x: Any) -> Any:
        """Return a ball around all numbers between 0 and x."""
        return x * flint.arb(0.5, 0.5)


def _tanh(x: Any) -> Any:
    return x.tanh()


def _objects(shape: tuple[int, ...], values: Iterable[Any]) -> Array:
    out = np.empty(int(np.prod(shape)), object)
    out[:] = list(values)
    return out.reshape(shape)
