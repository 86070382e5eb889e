"""Terms of scores, their combinations, and what is made of them: arrays, pictures, gradients of their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput, expect
from .places import Places
from .rule import remade

__all__ = ["Lookup", "Plain", "Term", "named", "number"]

Float = NDArray[np.float64]
BINDS = {"+": 0, "*": 1, "": 2}
Factors = Callable[[Float], Float]
MAPS: dict[str, Factors] = {"summands": np.asarray, "sizes": np.abs, "count": np.ones_like}
DEEPEST = 100
"""Combinations in one another, each of which is a call of Python's in the next."""
CHUNK = 2**22
"""Pairs that are looked at together where gradients are gathered."""


class Term:
    """A number for each query and key that is added to their score, for calls of any size that it fits.

    Terms combine by ``+``, ``-`` and ``*``, with each other and with numbers. They are made by the functions of
    ``refattn.rules.terms``. Their numbers are float64's: each operation is rounded to it, in the order in which it is
    written.

    Attributes
    ----------
    batches, heads : int
        1 where it is the same for all, else for how many batches and query heads it is made.
    """

    batches: int = 1
    heads: int = 1
    deep: int = 0
    """How many combinations stand in one another."""

    def at(self, x: Places) -> Any:
        """Return the numbers at places."""
        raise NotImplementedError

    def text(self) -> tuple[str, str]:
        """Return how it is written, and what binds its parts."""
        raise NotImplementedError

    def misfit(self, n_q: int, n_k: int) -> str | None:
        """Return what a call of that many queries and keys lacks, or None."""
        raise NotImplementedError

    def lookups(self) -> Iterator[Lookup]:
        """Yield the terms in it that look up tables, in the order in which they are written."""
        raise NotImplementedError

    def pull(self, x: Places, up: Float, factors: Factors, into: dict[int, Float]) -> None:
        """Add to each table's gradient, by the id of its term, what arrives at some places times a map of factors."""
        raise NotImplementedError

    def __add__(self, o: Any) -> Term:
        return _Two("+", self, o if isinstance(o, Term) else number(o))

    def __radd__(self, o: Any) -> Term:
        return _Two("+", number(o), self)

    def __mul__(self, o: Any) -> Term:
        return _Two("*", self, o if isinstance(o, Term) else number(o))

    def __rmul__(self, o: Any) -> Term:
        return _Two("*", number(o), self)

    def __neg__(self) -> Term:
        return _Two("*", number(-1), self)

    def __sub__(self, o: Any) -> Term:
        return _Two("+", self, -(o if isinstance(o, Term) else number(o)))

    def __rsub__(self, o: Any) -> Term:
        return _Two("+", number(o), -self)

    def __bool__(self) -> bool:
        raise TypeError("a term is neither true nor false; combine terms by + - *")

    def __repr__(self) -> str:
        return self.text()[0]

    def check(self, batch: int, heads: int, n_q: int, n_k: int) -> None:
        """Refuse a call that the term does not fit.

        Raises
        ------
        InvalidInput
            It names other batches, heads or numbers of queries and keys than the call has.
        """
        for name, n in (("n_q", n_q), ("n_k", n_k)):
            good = isinstance(n, int | np.integer) and not isinstance(n, bool) and n >= 0
            expect(good, name, n, "a whole number, at least 0")
        for name, mine, there in (("batches", self.batches, batch), ("query heads", self.heads, heads)):
            if mine not in (1, there):
                raise InvalidInput(f"term: {self!r} is made for {mine} {name}, and the call has {there}")
        if (why := self.misfit(n_q, n_k)) is not None:
            raise InvalidInput(f"term: {why}")

    def dense(self, n_q: int, n_k: int, batch: int = 0, head: int = 0) -> Float:
        """Return the numbers of one head, (n_q, n_k) float64.

        Raises
        ------
        InvalidInput
            The term does not fit the call, or gives numbers that are not finite.
        """
        self.check(max(self.batches, batch + 1), max(self.heads, head + 1), n_q, n_k)
        with np.errstate(over="ignore", invalid="ignore"):
            found = np.asarray(self.at(_pairs(slice(0, n_q), n_k, batch, head, n_q)), np.float64)
        if not np.isfinite(found).all():
            raise InvalidInput(f"term: {self!r} gives numbers that are not finite; hide keys by `allowed`")
        return np.broadcast_to(found, (n_q, n_k)).copy()

    def written(self, batch: int, heads: int, n_q: int, n_k: int, dtype: str = "float32") -> NDArray[Any]:
        """Return the numbers of a call, (batch or 1, heads or 1, n_q, n_k), rounded once to float32, or as float64.

        Raises
        ------
        InvalidInput
            As :meth:`dense`, or a number leaves float32's range.
        """
        expect(dtype in ("float32", "float64"), "dtype", dtype, "'float32' or 'float64'")
        self.check(batch, heads, n_q, n_k)
        found = np.empty((self.batches, self.heads, n_q, n_k))
        for b, h in np.ndindex(found.shape[:2]):
            found[b, h] = self.dense(n_q, n_k, b, h)
        with np.errstate(over="ignore"):
            narrow = found.astype(dtype)
        if not np.isfinite(narrow).all():
            raise InvalidInput(f"term: {self!r} gives {np.abs(found).max():g}, which float32 does not hold")
        return narrow

    def draw(self, n_q: int, n_k: int, batch: int = 0, head: int = 0) -> str:
        """Return a picture, a digit a pair: 0 is the least number of the head and 9 its largest; queries go down."""
        found = self.dense(n_q, n_k, batch, head)
        if not found.size:
            return "\n".join([""] * n_q)
        low, high = found.min(), found.max()
        digits = np.rint((found - low) * (9 / (high - low))).astype(int) if high > low else np.zeros(found.shape, int)
        return "\n".join("".join(map(str, row)) for row in digits.tolist())

    def tables(self) -> dict[str, Float]:
        """Return the numbers that it looks up, by name, in float64: what a model learns."""
        return {name: found.table for name, found in named(self)}

    def gradients(self, dbias: Any, n_q: int, n_k: int, *, of: str = "summands") -> dict[str, Float]:
        r"""Return the gradient of each table from the one of the term, in float64.

        With B the term's numbers, dT_e = \sum dbias_bhij dB_bhij / dT_e over all pairs, whose sum is rounded as NumPy
        adds it.

        Parameters
        ----------
        dbias : (batches, heads, n_q, n_k) array
            The gradient that arrives at the term, of the shape of :meth:`written`.
        n_q, n_k : int
            How many queries and keys the call has.
        of : {"summands", "sizes", "count"}
            Whether to add the sizes of the summands instead, or to count them.

        Returns
        -------
        dict
            Arrays of the shapes of :meth:`tables`, by the same names.

        Raises
        ------
        InvalidInput
            An array of another shape, or a term that does not fit the call.
        """
        expect(of in MAPS, "of", of, f"one of {', '.join(MAPS)}")
        self.check(self.batches, self.heads, n_q, n_k)
        shape, given = (self.batches, self.heads, n_q, n_k), np.asarray(dbias, np.float64)
        if given.shape != shape:
            raise InvalidInput(f"dbias: got shape {given.shape}, expected {shape}")
        into = {id(found): np.zeros(found.table.shape) for found in self.lookups()}
        step = max(1, CHUNK // max(n_k, 1))
        for b, h in np.ndindex(shape[:2]):
            for first in range(0, n_q, step):
                rows = slice(first, min(first + step, n_q))
                self.pull(_pairs(rows, n_k, b, h, n_q), MAPS[of](given[b, h, rows]), MAPS[of], into)
        return {name: into[id(found)] for name, found in named(self)}


def named(term: Term) -> Iterator[tuple[str, Lookup]]:
    """Yield each lookup once, by a name that no other has."""
    seen: dict[int, str] = {}
    for found in term.lookups():
        if id(found) not in seen:
            many = sum(name.partition("_")[0] == found.name for name in seen.values())
            seen[id(found)] = found.name if not many else f"{found.name}_{many + 1}"
            yield seen[id(found)], found


def _pairs(rows: slice, n_k: int, batch: int, head: int, n_q: int) -> Places:
    return Places(np.arange(rows.start, rows.stop)[:, None], np.arange(n_k)[None, :], batch, head, n_q, n_k)


class _Atom(Term):
    """A term that is no combination."""

    made: Any = None
    """The function that makes it, and its arguments: another process makes it again."""

    def __init__(self, text: str, misfit: Callable[[int, int], str | None], batches: int = 1, heads: int = 1) -> None:
        self._text, self._misfit, self.batches, self.heads = text, misfit, batches, heads

    def __reduce__(self) -> Any:
        return super().__reduce__() if self.made is None else self.made

    def text(self) -> tuple[str, str]:
        """Return how it is written; nothing binds its parts."""
        return self._text, ""

    def misfit(self, n_q: int, n_k: int) -> str | None:
        """Return what a call lacks, or None."""
        return self._misfit(n_q, n_k)


class Plain(_Atom):
    """A term by a formula without tables of its own: ``formula(places)`` returns numbers."""

    def __init__(
        self,
        text: str,
        formula: Callable[[Any], Any],
        misfit: Callable[[int, int], str | None] = lambda n_q, n_k: None,
        batches: int = 1,
        heads: int = 1,
    ) -> None:
        super().__init__(text, misfit, batches, heads)
        self._formula = formula

    def at(self, x: Places) -> Any:
        """Return the numbers at places."""
        return self._formula(x)

    def lookups(self) -> Iterator[Lookup]:
        """Yield nothing."""
        return iter(())

    def pull(self, x: Places, up: Float, factors: Factors, into: dict[int, Float]) -> None:
        """Keep nothing: it has no table."""


class Lookup(_Atom):
    """A term that is a table's numbers: ``index(places)`` returns an index for each of its axes.

    An axis of length 1 stands for all.
    """

    def __init__(
        self,
        text: str,
        name: str,
        table: Float,
        index: Callable[[Any], tuple[Any, ...]],
        misfit: Callable[[int, int], str | None] = lambda n_q, n_k: None,
        batches: int = 1,
        heads: int = 1,
    ) -> None:
        super().__init__(text, misfit, batches, heads)
        self.name, self.table, self._index = name, table, index

    def at(self, x: Places) -> Any:
        """Return the table's numbers at places."""
        return x.look(self.name, self.table, *self._index(x))

    def lookups(self) -> Iterator[Lookup]:
        """Yield itself."""
        yield self

    def pull(self, x: Places, up: Float, factors: Factors, into: dict[int, Float]) -> None:
        """Add what arrives to the elements that are looked up."""
        shape = self.table.shape
        at = [0 if n == 1 else i for n, i in zip(shape, self._index(x), strict=True)]
        *where, _ = np.broadcast_arrays(*at, up)
        flat = np.ravel_multi_index([i.ravel() for i in where], shape)
        into[id(self)] += np.bincount(flat, up.ravel(), self.table.size).reshape(shape)


class _Two(Term):
    """The sum or the product of two terms."""

    def __init__(self, sign: str, one: Term, other: Term) -> None:
        self.sign, self.parts = sign, (one, other)
        self.deep = 1 + max(one.deep, other.deep)
        if self.deep > DEEPEST:
            raise InvalidInput(
                f"term: combines more than {DEEPEST} terms in a row; write their sum out by dense(values)"
            )
        for name in ("batches", "heads"):
            a, b = (getattr(x, name) for x in self.parts)
            if 1 not in (a, b) and a != b:
                raise InvalidInput(f"term: {one!r} is made for {a} {name} and {other!r} for {b}; make them alike")
            setattr(self, name, max(a, b))

    def at(self, x: Places) -> Any:
        """Return the sum or the product at places."""
        a, b = (part.at(x) for part in self.parts)
        return a + b if self.sign == "+" else a * b

    def text(self) -> tuple[str, str]:
        """Return how it is written, in brackets where a part binds less, or as much and stands behind."""
        (a, bind_a), (b, bind_b) = (x.text() for x in self.parts)
        a = f"({a})" if BINDS[bind_a] < BINDS[self.sign] else a
        b = f"({b})" if BINDS[bind_b] < BINDS[self.sign] or bind_b == self.sign else b
        if self.sign == "*" and a == "-1.0":
            return f"-{b}", "*"
        if self.sign == "+" and b.startswith("-"):
            return f"{a} - {b[1:]}", "+"
        return f"{a} {self.sign} {b}", self.sign

    def misfit(self, n_q: int, n_k: int) -> str | None:
        """Return what a call lacks for one of them."""
        return self.parts[0].misfit(n_q, n_k) or self.parts[1].misfit(n_q, n_k)

    def lookups(self) -> Iterator[Lookup]:
        """Yield those of both."""
        for part in self.parts:
            yield from part.lookups()

    def pull(self, x: Places, up: Float, factors: Factors, into: dict[int, Float]) -> None:
        """Hand on what arrives, of a product times the other factor."""
        for part, other in zip(self.parts, self.parts[::-1], strict=True):
            if next(part.lookups(), None) is None:
                continue
            factor = np.asarray(other.at(x) if self.sign == "*" else 1.0, np.float64)
            part.pull(x, np.asarray(up * factors(factor)), factors, into)


@remade
def number(x: Any) -> Term:
    """Return the term of one number for all pairs.

    Raises
    ------
    InvalidInput
        It is no finite number.
    """
    good = isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)
    try:
        value, got = float(x) if good else np.nan, repr(x)[:200]
    except (OverflowError, ValueError):  # an integer beyond float64, or one that is too long to print
        value, got = np.inf, f"a {type(x).__name__} beyond float64"
    if not np.isfinite(value):
        raise InvalidInput(f"term: got {got}, expected a term or a finite number")
    return Plain(repr(value), lambda places: value)
