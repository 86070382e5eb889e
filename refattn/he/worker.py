"""What computes blocks of a query: with a client's keys, on ciphertexts that are checked before they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidInput
from .encoder import Encoder
from .planned import Program
from .seal import Sealed, from_bytes, from_slice, to_bytes
from .shared import Slice
from .structure import check_ciphertext, check_keys

__all__ = ["Sent", "Worker", "begin", "block"]


@dataclass(frozen=True)
class Sent:
    """A ciphertext of a query: its bytes or where they are, the primes that it must have left, what is subtracted."""

    data: bytes | memoryview | Slice
    limbs: int
    mask: bytes = b""


class Worker:
    """Keys, and the last heads' keys and values.

    Parameters
    ----------
    program : Plan, Layer or Encoder
        What is computed.
    parts : two of bytes
        Relinearisation keys and rotation keys.

    Raises
    ------
    InvalidInput
        They are none, or not the plan's.
    """

    def __init__(self, program: Program, parts: Sequence[bytes | memoryview]) -> None:
        self.program, self.ring = program, program.plan.ring
        names = ("RelinKeys", "GaloisKeys")
        relin, galois = (from_bytes(n, self.ring, x) for n, x in zip(names, parts, strict=True))
        check_keys(self.ring, program.plan.rotations, relin, galois)
        self._arithmetic = Sealed(self.ring, relin, galois)
        self._shared: tuple[Sequence[Sent], list[Any]] = ((), [])
        self._query = -1

    @property
    def arithmetic(self) -> Sealed:
        """What computes with the client's keys."""
        return self._arithmetic

    def block(self, shared: Sequence[Sent], queries: Sequence[Sent], query: int = 0, stage: int = 0) -> list[bytes]:
        """Return the ciphertexts of a block's result, of ciphertexts of the query of a number; or of a later stage."""
        # the files of another query may have the same names
        if query != self._query or not _same(self._shared[0], shared):
            self._shared, self._query = (shared, self.loaded(shared)), query
        own = self.loaded(queries)
        compute = self.program.stages[stage].compute if isinstance(self.program, Encoder) else self.program.compute
        try:
            return [to_bytes(x) for x in compute(self._arithmetic, self._shared[1], own)]
        except (RuntimeError, ValueError) as e:  # SEAL's: honest ciphertexts do not come so far
            raise InvalidInput(f"he: the query cannot be computed: {e}; encrypt the input anew") from e

    def forget(self) -> None:
        """Give up the ciphertexts of the last query."""
        self._shared = ((), [])

    def loaded(self, parts: Sequence[Sent]) -> list[Any]:
        """Return ciphertexts, each as the plan says."""
        found = []
        for x in parts:
            data, kind = x.data, "Ciphertext"
            made = from_slice(kind, self.ring, data) if isinstance(data, Slice) else from_bytes(kind, self.ring, data)
            check_ciphertext("a ciphertext of the query", made, self.ring, x.limbs, 2.0**self.ring.middle)
            if x.mask:
                plain = from_bytes("Plaintext", self.ring, x.mask)
                self._arithmetic.evaluator.sub_plain_inplace(made, plain)
            found.append(made)
        return found


def _same(a: Sequence[Sent], b: Sequence[Sent]) -> bool:
    """Return whether these are the same slices or the same objects; not what is in them, which takes long."""
    return len(a) == len(b) and all(x is y or (isinstance(x.data, Slice) and x == y) for x, y in zip(a, b, strict=True))


_HERE: dict[str, Worker] = {}
"""The worker of a process of a pool."""


def begin(program: Program, parts: tuple[bytes, ...]) -> None:
    """Make this process's worker."""
    _HERE["worker"] = Worker(program, parts)


def block(query: int, stage: int, shared: Sequence[Sent], queries: Sequence[Sent]) -> list[bytes]:
    """Return what this process's worker computes."""
    return _HERE["worker"].block(shared, queries, query, stage)
