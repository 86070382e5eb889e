"""An arithmetic that writes down what is to be done: a query's program as a list of operations, for all its blocks.

What SEAL decides by scales and levels (residues of constants, scales of results) is decided here, as SEAL does.
"""

# ruff: noqa: D102 (the methods are described in arithmetic.py)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UnsupportedProblem
from ..arithmetic import Arithmetic
from ..encoder import Encoder
from ..planned import Program
from .chain import Chain, chain_of

__all__ = ["Node", "Operation", "Trace", "trace_of"]


@dataclass(frozen=True, eq=False)
class Node:
    """A ciphertext of the program: its number, polynomials, primes left, and scale."""

    number: int
    size: int
    limbs: int
    scale: float


@dataclass(frozen=True)
class Plain:
    """Numbers in slots, to be encoded at a scale with some primes."""

    of: Any
    limbs: int
    scale: float


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes
    ----------
    name : str
        "dot" (of the first half of the operands with the second), "sum", "plus", "times", "negate", "relinearize",
        "rescale", "galois" or "unmask".
    out : Node
        The result.
    operands : tuple of Node
        Those with more primes or polynomials than the result needs are cut.
    what : tuple of int, Plain, int or None
        The residues of a constant; numbers in slots; a Galois element.
    """

    name: str
    out: Node
    operands: tuple[Node, ...]
    what: Any = None


class Trace(Arithmetic):
    """Writes down operations.

    Parameters
    ----------
    chain : Chain
        The ring's primes.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.inputs: list[Node] = []
        self.operations: list[Operation] = []
        self._count = 0

    def input(self, limbs: int, scale: float) -> Node:
        """Return a ciphertext that comes with the query."""
        self.inputs.append(self._node(2, limbs, scale))
        return self.inputs[-1]

    def unmask(self, a: Node) -> Node:
        """Return a ciphertext less a mask that comes with the query, too: two words for each coefficient."""
        self.inputs.append(self._node(1, 2, a.scale))
        return self._did("unmask", 2, a.limbs, a.scale, (a, self.inputs[-1]))

    def _node(self, size: int, limbs: int, scale: float) -> Node:
        self._count += 1
        return Node(self._count - 1, size, limbs, scale)

    def _did(self, name: str, size: int, limbs: int, scale: float, operands: Sequence[Node], what: Any = None) -> Node:
        out = self._node(size, limbs, scale)
        if int(math.log2(scale)) >= math.prod(self.chain.primes[:limbs]).bit_length():
            raise UnsupportedProblem(f"he: a scale of {scale:.6g} leaves no room for numbers in {limbs} primes")
        self.operations.append(Operation(name, out, tuple(operands), what))
        return out

    def mul(self, a: Node, b: Node) -> Node:
        return self._did("dot", 3, min(a.limbs, b.limbs), a.scale * b.scale, (a, b))

    def square(self, a: Node) -> Node:
        return self.mul(a, a)

    def dot(self, a: Sequence[Node], b: Sequence[Node]) -> Node:
        return self.rescale(self.relinearize(self.products(a, b)))

    def products(self, a: Sequence[Node], b: Sequence[Node]) -> Node:
        """Return the sum of products: by parts, where it could pass 128 bits before it is reduced."""
        limbs, most = min(x.limbs for x in (*a, *b)), 2**127 // max(self.chain.primes) ** 2
        parts = [
            self._did("dot", 3, limbs, a[0].scale * b[0].scale, (*a[i : i + most], *b[i : i + most]))
            for i in range(0, len(a), most)
        ]
        return parts[0] if len(parts) == 1 else self._did("sum", 3, limbs, parts[0].scale, parts)

    def add(self, a: Node, b: Node) -> Node:
        if abs(a.scale - b.scale) >= 2**-52 * max(a.scale, b.scale, 1.0):  # SEAL refuses it, too
            raise UnsupportedProblem(f"he: a sum of scales {a.scale:.6g} and {b.scale:.6g}")
        return self._did("sum", a.size, min(a.limbs, b.limbs), a.scale, (a, b))

    def add_constant(self, a: Node, c: float) -> Node:
        return self._did("plus", a.size, a.limbs, a.scale, (a,), self._residues(c, a.scale, a.limbs))

    def times_constant(self, a: Node, c: float) -> Node:
        return self._did("times", a.size, a.limbs, a.scale * a.scale, (a,), self._residues(c, a.scale, a.limbs))

    def plus(self, a: Node, plain: Any) -> Node:
        return self._did("plus", a.size, a.limbs, a.scale, (a,), Plain(plain, a.limbs, a.scale))

    def times(self, a: Node, plain: Any) -> Node:
        scale = plain.scale or a.scale
        return self._did("times", a.size, a.limbs, a.scale * scale, (a,), Plain(plain, a.limbs, scale))

    def like(self, a: Node, b: Node) -> Node:
        limbs = b.limbs + 1
        if a.limbs < limbs:
            raise UnsupportedProblem("he: no level is left to bring numbers to one scale")
        scale = b.scale * float(self.chain.primes[limbs - 1]) / a.scale
        one = self._did("times", a.size, limbs, a.scale * scale, (a,), self._residues(1.0, scale, limbs))
        return self._did("rescale", a.size, b.limbs, b.scale, (one,))  # but for rounding its scale is b's

    def _residues(self, c: float, scale: float, limbs: int) -> tuple[int, ...]:
        """Return a constant as SEAL encodes it: rounded, halves away from zero."""
        x = abs(float(c) * scale)
        n = math.floor(x)
        n += x - n >= 0.5
        return tuple((-n if c < 0 else n) % q for q in self.chain.primes[:limbs])

    def negate(self, a: Node) -> Node:
        return self._did("negate", a.size, a.limbs, a.scale, (a,))

    def relinearize(self, a: Node) -> Node:
        return self._did("relinearize", 2, a.limbs, a.scale, (a,))

    def rescale(self, a: Node) -> Node:
        return self._did("rescale", a.size, a.limbs - 1, a.scale / float(self.chain.primes[a.limbs - 1]), (a,))

    def rotate(self, a: Node, k: int) -> Node:
        k %= self.chain.degree // 2
        return self._did("galois", 2, a.limbs, a.scale, (a,), pow(3, k, 2 * self.chain.degree)) if k else a

    def conjugate(self, a: Node) -> Node:
        return self._did("galois", 2, a.limbs, a.scale, (a,), 2 * self.chain.degree - 1)


def trace_of(program: Program, stage: int = 0) -> tuple[Trace, list[Node]]:
    """Return a whole query's program, or a later block's of an encoder, and the ciphertexts of the result in order.

    A later block's ciphertexts come masked, and the masks after them.
    """
    plan = program.plan
    trace, several = Trace(chain_of(plan.ring)), isinstance(program, Encoder)
    limbs = plan.part_limbs(stage) if several else plan.part_limbs()
    parts = [trace.input(n, 2.0**plan.ring.middle) for n in limbs]
    if stage:
        parts = [trace.unmask(x) for x in parts]
    compute = program.stages[stage].compute if isinstance(program, Encoder) else program.compute
    return trace, [x for shared, own in program.tasks(parts) for x in compute(trace, shared, own)]
