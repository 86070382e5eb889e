"""Rules of masks, their combinations, and what is made of them: blocks, arrays, bits, kinds of tiles, pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput, expect
from .places import Places
from .view import View, edges

__all__ = ["Atom", "Rule", "remade"]

Mask = NDArray[np.bool_]
Codes = NDArray[np.int8]
Made = TypeVar("Made")
BINDS = {"|": 0, "&": 1, "~": 2, "": 3}


class Rule:
    """Which keys a query sees: a formula of integers, for calls of any size that it fits.

    Rules combine by ``&``, ``|`` and ``~``. They are made by the functions of this module.

    Attributes
    ----------
    batches, heads : int
        1 where it is the same for all, else for how many batches and query heads it is made.
    """

    batches: int = 1
    heads: int = 1

    def at(self, x: Places) -> Any:
        """Return the formula's truth at places."""
        raise NotImplementedError

    def text(self) -> tuple[str, str]:
        """Return how it is written, and what binds its parts."""
        raise NotImplementedError

    def misfit(self, n_q: int, n_k: int) -> str | None:
        """Return what a call of that many queries and keys lacks, or None."""
        raise NotImplementedError

    def cuts(self, n_k: int) -> NDArray[np.int64] | None:
        """Return where its blocks of keys begin, if it has any: tiles that end there are whole ones more often."""
        return None

    def ranges(self, rows: NDArray[np.int64], call: tuple[int, int, int, int]) -> NDArray[np.int64] | None:
        """Return ranges of keys outside which some rows see none, (rows, ranges, 2), if the rule lists them.

        Parameters
        ----------
        rows : integer array
            Places from 0.
        call : (batch, head, n_q, n_k)
            Whose they are, and how many queries and keys there are.
        """
        return None

    def __and__(self, o: Rule) -> Rule:
        return _Both("&", self, o) if isinstance(o, Rule) else NotImplemented

    def __or__(self, o: Rule) -> Rule:
        return _Both("|", self, o) if isinstance(o, Rule) else NotImplemented

    def __invert__(self) -> Rule:
        return _Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a rule is neither true nor false; combine rules by & | ~")

    def __repr__(self) -> str:
        return self.text()[0]

    def check(self, batch: int, heads: int, n_q: int, n_k: int) -> None:
        """Refuse a call that the rule does not fit.

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
                raise InvalidInput(f"rule: {self!r} is made for {mine} {name}, and the call has {there}")
        if (why := self.misfit(n_q, n_k)) is not None:
            raise InvalidInput(f"rule: {why}")

    def block(self, rows: Any, keys: Any, n_q: int, n_k: int, batch: int = 0, head: int = 0) -> Mask:
        """Return which of some keys some queries see, (rows, keys) bool.

        Parameters
        ----------
        rows, keys : integer arrays
            Places from 0.
        n_q, n_k : int
            How many queries and keys the call has.
        batch, head : int
            Whose.

        Raises
        ------
        InvalidInput
            A place is outside the call.
        """
        q, k = (np.asarray(x, np.int64) for x in (rows, keys))
        for name, at, n in (("rows", q, n_q), ("keys", k, n_k)):
            if at.size and not 0 <= at.min() <= at.max() < n:
                raise InvalidInput(f"{name}: got places from {at.min()} to {at.max()}, expected 0 to {n - 1}")
        seen = self.at(Places(q[:, None], k[None, :], batch, head, n_q, n_k))
        return np.asarray(np.broadcast_to(seen, (len(q), len(k))), bool)

    def dense(self, n_q: int, n_k: int, batch: int = 0, head: int = 0) -> Mask:
        """Return the mask of one head, (n_q, n_k) bool."""
        self.check(max(self.batches, batch + 1), max(self.heads, head + 1), n_q, n_k)
        return np.asarray(View.of(self, n_q, n_k, batch, head))

    def written(self, batch: int, heads: int, n_q: int, n_k: int) -> Mask:
        """Return the mask of a call, (batch or 1, heads or 1, n_q, n_k) bool."""
        self.check(batch, heads, n_q, n_k)
        found = np.empty((self.batches, self.heads, n_q, n_k), bool)
        for b, h in np.ndindex(found.shape[:2]):
            found[b, h] = View.of(self, n_q, n_k, b, h)
        return found

    def bits(self, n_q: int, n_k: int, batch: int = 0, head: int = 0) -> NDArray[np.uint32]:
        """Return the mask of one head as words, (n_q, ceil(n_k / 32)): key j is bit j % 32 of word j // 32."""
        self.check(max(self.batches, batch + 1), max(self.heads, head + 1), n_q, n_k)
        seen, words = View.of(self, n_q, n_k, batch, head), -(-n_k // 32)
        found = np.zeros((n_q, 4 * words), np.uint8)
        for rows in seen.chunks():
            packed = np.packbits(seen[rows], axis=1, bitorder="little")
            found[rows, : packed.shape[1]] = packed
        return found.view("<u4").astype(np.uint32)

    def tiles(self, n_q: int, n_k: int, tile_q: int = 128, tile_k: int = 128, batch: int = 0, head: int = 0) -> Codes:
        """Tell of each tile whether none of its pairs is seen (0, EMPTY), some (1, PARTIAL) or all (2, FULL).

        Ranges of integers tell it of most tiles, without their pairs; only tiles of which they do not, such as those
        where two partial rules meet, are looked at.

        Parameters
        ----------
        n_q, n_k : int
            How many queries and keys the call has.
        tile_q, tile_k : int
            Queries and keys of a tile; the last may have fewer.
        batch, head : int
            Whose.

        Returns
        -------
        (ceil(n_q / tile_q), ceil(n_k / tile_k)) int8 array
        """
        for name, size in (("tile_q", tile_q), ("tile_k", tile_k)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InvalidInput(f"{name}: got {size!r}, expected a whole number of at least 1")
        self.check(max(self.batches, batch + 1), max(self.heads, head + 1), n_q, n_k)
        return View.of(self, n_q, n_k, batch, head).states(edges(n_q, tile_q), edges(n_k, tile_k))

    def draw(self, n_q: int, n_k: int, tile: int = 1, batch: int = 0, head: int = 0) -> str:
        """Return a picture, a character a tile: ``#`` is full, ``+`` partial, ``.`` empty; queries go down."""
        kinds = np.array([".", "+", "#"])[self.tiles(n_q, n_k, tile, tile, batch, head)]
        return "\n".join(map("".join, kinds))


class Atom(Rule):
    """A rule by its formula.

    Parameters
    ----------
    text : str
        How it is written.
    formula : callable
        Takes :class:`Places` and returns truth; made of ``+ - // %`` by numbers, comparisons, ``& | ~``, and of
        ``look`` and ``clip``. A comparison's two sides must not depend on the same place.
    misfit : callable
        ``misfit(n_q, n_k)`` returns what a call lacks, or None.
    batches, heads : int
        As of a :class:`Rule`.
    cuts : callable, optional
        ``cuts(n_k)`` returns where its blocks of keys begin.
    ranges : callable, optional
        As :meth:`Rule.ranges`.
    """

    made: Any = None
    """The function that makes it, and its arguments: another process makes it again."""

    def __init__(
        self,
        text: str,
        formula: Callable[[Any], Any],
        misfit: Callable[[int, int], str | None] = lambda n_q, n_k: None,
        batches: int = 1,
        heads: int = 1,
        cuts: Callable[[int], NDArray[np.int64] | None] | None = None,
        ranges: Callable[..., NDArray[np.int64]] | None = None,
    ) -> None:
        self._text, self._formula, self._misfit, self.batches, self.heads = text, formula, misfit, batches, heads
        self._cuts, self._ranges = cuts, ranges

    def __reduce__(self) -> Any:
        return super().__reduce__() if self.made is None else self.made

    def at(self, x: Places) -> Any:
        """Return the formula's truth at places."""
        return self._formula(x)

    def text(self) -> tuple[str, str]:
        """Return how it is written; nothing binds its parts."""
        return self._text, ""

    def misfit(self, n_q: int, n_k: int) -> str | None:
        """Return what a call lacks, or None."""
        return self._misfit(n_q, n_k)

    def cuts(self, n_k: int) -> NDArray[np.int64] | None:
        """Return where its blocks of keys begin, if it has any."""
        return None if self._cuts is None else self._cuts(n_k)

    def ranges(self, rows: NDArray[np.int64], call: tuple[int, int, int, int]) -> NDArray[np.int64] | None:
        """Return ranges of keys outside which some rows see none, if there are such."""
        return None if self._ranges is None else self._ranges(rows, call)


class _Both(Rule):
    def __init__(self, sign: str, one: Rule, other: Rule) -> None:
        self.sign, self.parts = sign, (one, other)
        for name in ("batches", "heads"):
            a, b = (getattr(x, name) for x in self.parts)
            if 1 not in (a, b) and a != b:
                raise InvalidInput(f"rule: {one!r} is made for {a} {name} and {other!r} for {b}; make them alike")
            setattr(self, name, max(a, b))

    def at(self, x: Places) -> Any:
        """Return the truth of both, or of either."""
        a, b = (part.at(x) for part in self.parts)
        return a & b if self.sign == "&" else a | b

    def text(self) -> tuple[str, str]:
        """Return how it is written, in brackets where a part binds less."""
        parts = ((t, s) for t, s in (x.text() for x in self.parts))
        inside = (f"({t})" if BINDS[s] < BINDS[self.sign] else t for t, s in parts)
        return f" {self.sign} ".join(inside), self.sign

    def misfit(self, n_q: int, n_k: int) -> str | None:
        """Return what a call lacks for one of them."""
        return self.parts[0].misfit(n_q, n_k) or self.parts[1].misfit(n_q, n_k)

    def cuts(self, n_k: int) -> NDArray[np.int64] | None:
        """Return where the blocks of keys of one of them begin."""
        found = self.parts[0].cuts(n_k)
        return self.parts[1].cuts(n_k) if found is None else found

    def ranges(self, rows: NDArray[np.int64], call: tuple[int, int, int, int]) -> NDArray[np.int64] | None:
        """Return those of one of them, or of both."""
        found = [x for part in self.parts if (x := part.ranges(rows, call)) is not None]
        if self.sign == "&":
            return found[0] if found else None
        return np.concatenate(found, 1) if len(found) == 2 else None


class _Not(Rule):
    def __init__(self, of: Rule) -> None:
        self.of, self.batches, self.heads = of, of.batches, of.heads

    def at(self, x: Places) -> Any:
        """Return the opposite."""
        return ~self.of.at(x)

    def text(self) -> tuple[str, str]:
        """Return how it is written."""
        text, sign = self.of.text()
        return f"~({text})" if BINDS[sign] < BINDS["~"] else f"~{text}", "~"

    def misfit(self, n_q: int, n_k: int) -> str | None:
        """Return what a call lacks."""
        return self.of.misfit(n_q, n_k)

    def cuts(self, n_k: int) -> NDArray[np.int64] | None:
        """Return where its blocks of keys begin."""
        return self.of.cuts(n_k)


def remade(make: Callable[..., Made]) -> Callable[..., Made]:
    """Have rules, or terms, of a function know how they were made."""

    @wraps(make)
    def made(*args: Any, **named: Any) -> Made:
        found = make(*args, **named)
        found.made = (_made, (make.__module__, make.__name__, args, named))  # type: ignore[attr-defined]
        return found

    return made


def _made(module: str, name: str, args: Any, named: Any) -> Any:
    return getattr(import_module(module), name)(*args, **named)
