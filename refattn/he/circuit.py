"""The encrypted program, once: power-softmax attention in terms of an arithmetic; arithmetics that need no keys.

The same text runs on float64 numbers (`Numbers`), on counts of operations and levels (`Levels`), on bounds of noise
(noise.py) and on ciphertexts (seal.py). Each has these methods, which leave their operands as they are:

- ``mul``, ``square``: the product, not yet relinearised; ``product``: relinearised and rescaled, too; ``dot``: a sum of
  products, relinearised and rescaled once;
- ``add``, ``add_constant``, ``negate``; ``times_constant``: at the square of its operand's scale;
- ``relinearize``, ``rescale``, ``rotate`` (slot s gets what slot s + k holds), ``conjugate``;
- ``times``, ``plus``: with numbers in slots that the server knows (linear.Plain), times at the scale's square;
  ``like``: a number at another's level and scale (a layer needs these, attention does not: noise.Bounds has none);
- ``step``: where the program is; ``within``, ``quotient``, ``another``: promises about values (that p-th powers add up
  to a denominator; that a numerator is a mean of values times it; that this is of another key than the first).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UnsupportedProblem
from .inverse import Inverse
from .layout import BatchLayout, Layout

__all__ = ["Arithmetic", "Levels", "Numbers", "Token", "attend"]


def attend(
    m: Any,
    layout: Layout | BatchLayout,
    p: int,
    inverse: Inverse | None,
    added: float,
    q: Sequence[Any],
    k: Sequence[Any],
    v: Sequence[Any],
) -> list[Any]:
    """Return a block of queries' attention: quotients, or numerators and the denominator where the client divides.

    Parameters
    ----------
    m : arithmetic
        What the program runs on.
    layout : Layout or BatchLayout
        Where features, keys and queries lie in the slots.
    p : int
        The even power.
    inverse : Inverse or None
        The polynomial for 1/D; None where the client divides.
    added : float
        epsilon, added to the denominator.
    q, k, v : sequences of ciphertexts
        As ``layout.query_slots``, ``key_slots`` and ``value_slots`` make them.
    """
    if isinstance(layout, BatchLayout):
        return _attend_batch(m, layout, p, inverse, added, q, k, v)
    m.step("products")
    turned_q = [_turns(m, layout, q[0], 1)] if layout.compact else []
    weights: list[Any] = []
    for of_span in _split(k, layout.spans):
        m.step("products")
        x = _turned(m, layout, turned_q, [of_span], 1) if layout.compact else m.dot(q, of_span)
        x = m.add(x, m.conjugate(x))  # 2·Re: two features a slot
        for step in layout.group_steps():
            x = m.add(x, m.rotate(x, step))
        x = m.within(x, p)
        m.step("power")
        w = _power(m, x, p)
        weights.append(m.another(w) if weights else w)
    m.step("values")
    turned = [_turns(m, layout, w, -1) for w in weights]
    n = _turned(m, layout, turned, _split(v, layout.spans), -1)  # over `parts` neighbouring keys of all spans
    m.step("denominator")
    d, *rest = itertools.chain(*turned)
    for more in rest:
        d = m.add(d, more)
    for step in layout.key_steps():
        d = m.add(d, m.rotate(d, step))
    m.step("division")
    if inverse is None:
        return [_sum_keys(m, layout, n), d]
    n, d = m.quotient(n, d)
    return [_sum_keys(m, layout, inverse.apply(m, n, d, added))]


def _attend_batch(
    m: Any, layout: BatchLayout, p: int, inverse: Inverse | None, added: float,
    q: Sequence[Any], k: Sequence[Any], v: Sequence[Any],
) -> list[Any]:  # fmt: skip
    """Return a query's attention where a slot is an input: no rotations."""
    weights: list[Any] = []
    for j in range(layout.keys):
        m.step("products")
        x = m.dot(q, k[j * layout.pairs : (j + 1) * layout.pairs])
        x = m.within(m.add(x, m.conjugate(x)), p)
        m.step("power")
        w = _power(m, x, p)
        weights.append(m.another(w) if weights else w)
    d = weights[0]
    for w in weights[1:]:
        d = m.add(d, w)
    m.step("values")
    ns = [m.dot(weights, v[c :: layout.pairs]) for c in range(layout.pairs)]
    m.step("division")
    if inverse is None:
        return [*ns, d]
    bounded = [m.quotient(n, d) for n in ns]
    factors = inverse.factors(m, bounded[0][1], added)
    outs = []
    for n, _ in bounded:
        for f in factors:
            n = m.product(n, f)
        outs.append(n)
    return outs


def _power(m: Any, x: Any, p: int) -> Any:
    square = m.rescale(m.relinearize(m.square(x)))
    if p == 2:
        return square
    fourth = m.rescale(m.relinearize(m.square(square)))
    if p == 4:
        return fourth
    if p == 6:
        return m.product(fourth, square)
    return m.rescale(m.relinearize(m.square(fourth)))  # 8


def _turns(m: Any, layout: Layout, a: Any, sign: int) -> list[Any]:
    """Return a, turned by as many rows as a giant step leaves over."""
    return [a] + [m.rotate(a, r * sign * layout.columns) for r in range(1, layout.baby)]


def _split(xs: Sequence[Any], count: int) -> list[Sequence[Any]]:
    each = len(xs) // count
    return [xs[i * each : (i + 1) * each] for i in range(count)]


def _turned(m: Any, layout: Layout, turned: Sequence[Sequence[Any]], bs: Sequence[Sequence[Any]], sign: int) -> Any:
    """Return the sum over spans and r of a, turned by r rows, times b_r: a by baby steps, sums by giant steps."""
    baby, unit = layout.baby, sign * layout.columns
    every = [x for of_span in turned for x in of_span]
    total = None
    for giant in range(layout.parts // baby):
        part = m.dot(every, [x for of_span in bs for x in of_span[giant * baby : (giant + 1) * baby]])
        if giant:
            part = m.rotate(part, giant * baby * unit)
        total = part if total is None else m.add(total, part)
    return total


def _sum_keys(m: Any, layout: Layout, n: Any) -> Any:
    """Return the sum over the rest of the keys: last, where rotations are cheapest."""
    for step in layout.value_steps():
        n = m.add(n, m.rotate(n, step))
    return n


class Arithmetic(ABC):
    """What most arithmetics do alike: promises change nothing, and a product is relinearised and rescaled."""

    def step(self, name: str) -> None:  # noqa: B027 (most do not care)
        """Note where the program is."""

    def within(self, a: Any, p: int) -> Any:
        return a

    def quotient(self, n: Any, d: Any) -> tuple[Any, Any]:
        return n, d

    def another(self, a: Any) -> Any:
        return a

    def product(self, a: Any, b: Any) -> Any:
        return self.rescale(self.relinearize(self.mul(a, b)))

    def dot(self, a: Sequence[Any], b: Sequence[Any]) -> Any:
        total = self.mul(a[0], b[0])
        for x, y in zip(a[1:], b[1:], strict=True):
            total = self.add(total, self.mul(x, y))
        return self.rescale(self.relinearize(total))

    @abstractmethod
    def add(self, a: Any, b: Any) -> Any: ...

    @abstractmethod
    def mul(self, a: Any, b: Any) -> Any: ...

    @abstractmethod
    def relinearize(self, a: Any) -> Any: ...

    @abstractmethod
    def rescale(self, a: Any) -> Any: ...


class Numbers(Arithmetic):
    """float64 (complex) slots: what the circuit computes without keys and noise."""

    def mul(self, a: Any, b: Any) -> Any:
        return a * b

    def square(self, a: Any) -> Any:
        return a * a

    def add(self, a: Any, b: Any) -> Any:
        return a + b

    def add_constant(self, a: Any, c: float) -> Any:
        return a + c

    def negate(self, a: Any) -> Any:
        return -a

    def times_constant(self, a: Any, c: float) -> Any:
        return a * c

    def times(self, a: Any, plain: Any) -> Any:
        return a * plain.slots

    def plus(self, a: Any, plain: Any) -> Any:
        return a + plain.slots

    def like(self, a: Any, b: Any) -> Any:
        return a

    def relinearize(self, a: Any) -> Any:
        return a

    def rescale(self, a: Any) -> Any:
        return a

    def rotate(self, a: Any, k: int) -> Any:
        return np.roll(a, -k)

    def conjugate(self, a: Any) -> Any:
        return np.conj(a)


@dataclass(frozen=True)
class Token:
    """A ciphertext that is none: the primes that are left of its modulus."""

    limbs: int


class Levels(Arithmetic):
    """Counts of operations by the primes that their operands have left, and of the levels that each step takes.

    Attributes
    ----------
    counts : Counter
        Of (operation, primes).
    levels : dict of str to int
        By step, in order.
    rotations : set of int
        The steps of all rotations.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()
        self.levels: dict[str, int] = {}
        self.rotations: set[int] = set()
        self._name, self._lowest = "", 10**9

    def step(self, name: str) -> None:
        self._name = name
        self.levels.setdefault(name, 0)

    def _did(self, what: str, *operands: Token) -> Token:
        limbs = min(x.limbs for x in operands)
        self.counts["negate", limbs] += sum(x.limbs > limbs for x in operands)  # switching a modulus copies, too
        self.counts[what, limbs] += 1
        return Token(limbs)

    def mul(self, a: Token, b: Token) -> Token:
        return self._did("multiply", a, b)

    def square(self, a: Token) -> Token:
        return self._did("square", a)

    def add(self, a: Token, b: Token) -> Token:
        return self._did("add", a, b)

    def add_constant(self, a: Token, c: float) -> Token:
        return self._did("add_plain", a)

    def negate(self, a: Token) -> Token:
        return self._did("negate", a)

    def times_constant(self, a: Token, c: float) -> Token:
        return self._did("multiply_plain", a)

    def times(self, a: Token, plain: Any) -> Token:
        return self._did("multiply_plain", a)

    def plus(self, a: Token, plain: Any) -> Token:
        return self._did("add_plain", a)

    def like(self, a: Token, b: Token) -> Token:
        if a.limbs <= b.limbs:
            raise UnsupportedProblem(f"he: no level is left to bring numbers to one scale at step {self._name!r}")
        above = Token(b.limbs + 1)
        self._did("multiply_plain", above)
        return self.rescale(above)

    def relinearize(self, a: Token) -> Token:
        return self._did("switch_key", a)

    def rescale(self, a: Token) -> Token:
        if a.limbs < 2:
            raise UnsupportedProblem(f"he: no level is left at step {self._name!r}")
        self._did("rescale", a)
        if a.limbs - 1 < self._lowest:
            self._lowest = a.limbs - 1
            self.levels[self._name] = self.levels.get(self._name, 0) + 1
        return Token(a.limbs - 1)

    def rotate(self, a: Token, k: int) -> Token:
        self.rotations.add(k)
        return self._did("switch_key", a)

    def conjugate(self, a: Token) -> Token:
        return self._did("switch_key", a)
