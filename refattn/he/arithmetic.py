"""The arithmetics that need no keys: what the encrypted program (circuit.py) and the polynomials (inverse.py) run on.

The same text runs on float64 numbers (`Numbers`), on counts of operations and levels (`Levels`), on bounds of noise
(noise.py) and on ciphertexts (seal.py). Each has these methods, which leave their operands as they are:

- ``mul``, ``square``: the product, not yet relinearised; ``product``: relinearised and rescaled, too; ``dot``: a sum of
  products, relinearised and rescaled once;
- ``add``, ``add_constant``, ``negate``; ``times_constant``: at the square of its operand's scale;
- ``relinearize``, ``rescale``, ``rotate`` (slot s gets what slot s + k holds), ``conjugate``;
- ``times``, ``plus``: with numbers in slots that the server knows (linear.Plain), times at the scale's square, or at
  the product with the numbers' own scale; ``like``: a number at another's level and scale (a layer needs it, attention
  does not: noise.Bounds has none, nor ``plus``);
- ``step``: where the program is; ``within``, ``quotient``, ``another``: promises about values (that p-th powers add up
  to a denominator; that a numerator is a mean of values times it; that this is of another key than the first).
"""

# ruff: noqa: D102 (the methods are described above, once for all arithmetics)

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UnsupportedProblem

__all__ = ["Arithmetic", "Counted", "Levels", "Numbers"]


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
class Counted:
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

    def _did(self, what: str, *operands: Counted) -> Counted:
        limbs = min(x.limbs for x in operands)
        self.counts["negate", limbs] += sum(x.limbs > limbs for x in operands)  # switching a modulus copies, too
        self.counts[what, limbs] += 1
        return Counted(limbs)

    def mul(self, a: Counted, b: Counted) -> Counted:
        return self._did("multiply", a, b)

    def square(self, a: Counted) -> Counted:
        return self._did("square", a)

    def add(self, a: Counted, b: Counted) -> Counted:
        return self._did("add", a, b)

    def add_constant(self, a: Counted, c: float) -> Counted:
        return self._did("add_plain", a)

    def negate(self, a: Counted) -> Counted:
        return self._did("negate", a)

    def times_constant(self, a: Counted, c: float) -> Counted:
        return self._did("multiply_plain", a)

    def times(self, a: Counted, plain: Any) -> Counted:
        return self._did("multiply_plain", a)

    def plus(self, a: Counted, plain: Any) -> Counted:
        return self._did("add_plain", a)

    def like(self, a: Counted, b: Counted) -> Counted:
        if a.limbs <= b.limbs:
            raise UnsupportedProblem(f"he: no level is left to bring numbers to one scale at step {self._name!r}")
        above = Counted(b.limbs + 1)
        self._did("multiply_plain", above)
        return self.rescale(above)

    def relinearize(self, a: Counted) -> Counted:
        return self._did("switch_key", a)

    def rescale(self, a: Counted) -> Counted:
        if a.limbs < 2:
            raise UnsupportedProblem(f"he: no level is left at step {self._name!r}")
        self._did("rescale", a)
        if a.limbs - 1 < self._lowest:
            self._lowest = a.limbs - 1
            self.levels[self._name] = self.levels.get(self._name, 0) + 1
        return Counted(a.limbs - 1)

    def rotate(self, a: Counted, k: int) -> Counted:
        self.rotations.add(k)
        return self._did("switch_key", a)

    def conjugate(self, a: Counted) -> Counted:
        return self._did("switch_key", a)
