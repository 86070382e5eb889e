"""What plans of attention and of a layer say alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from .noise import Ring

__all__ = ["Planned", "Program", "bytes_text"]

MOST_SECONDS, MOST_BYTES = 30.0, 10**9
"""Above these a plan warns."""


class Planned(ABC):
    """Sizes of messages from the ring, the rotations and the ciphertexts of a query; the report as a table."""

    operator = "power"
    """The variant that is computed."""
    ring: Ring
    rotations: tuple[int, ...]
    upload: str

    @abstractmethod
    def loads(self) -> Counter[tuple[str, int]]:
        """Return the ciphertexts of a query by (`load`, primes left)."""

    @abstractmethod
    def part_limbs(self) -> list[int]:
        """Return the primes left of each ciphertext of a query, in its order."""

    @property
    def load(self) -> str:
        """What reading a ciphertext of a query is called among the costs."""
        return "load_whole" if self.upload == "whole" else "load"

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """Return all that the plan says, as what JSON holds."""

    @property
    def upload_bytes(self) -> int:
        """Of a query, near: a ciphertext is one polynomial and a seed, or whole: two, and a word for each number."""
        loads, ring = self.loads(), self.ring
        if self.upload == "whole":
            return sum(16 * limbs * ring.degree * c for (_, limbs), c in loads.items())
        bits = sum(c * (ring.first + ring.middle * (limbs - 1)) for (_, limbs), c in loads.items())
        return bits * ring.degree // 7  # SEAL's compression leaves an eighth more than the primes' bits

    @property
    @abstractmethod
    def outs(self) -> int:
        """Ciphertexts of a reply."""

    @property
    def reply_most(self) -> int:
        """The most bytes of a reply: both polynomials of each ciphertext, not compressed, and what is around them."""
        return self.outs * (16 * (self.ring.levels + 1) * self.ring.degree + 2**10) + 2**10

    @property
    def key_bytes(self) -> int:
        """Of the evaluation keys, near."""
        digits = self.ring.levels + 1
        return (len(self.rotations) + 2) * digits * self.ring.degree * sum(self.ring.bits) // 7

    def words(self) -> str:
        """Return what the plan says in a sentence: time, bytes, security, error."""
        found = self.report()
        text = f"{found['predicted_ms'] / 1e3:.2g} s on one core, {bytes_text(self.upload_bytes)} up"
        if found.get("rounds", 1) > 1:
            text += f" in {found['rounds']} rounds"
        text += f", {bytes_text(self.key_bytes)} of keys once, 128-bit security"
        if "error_noise" in found:
            noise = found["error_noise"]
            text += f", error at most {noise + found['error_approximation']:.2g}, of which noise {noise:.1g}"
        return text

    def warnings(self, seconds: float | None = None) -> list[str]:
        """Return what a user may not want: a long time (by default that of one core), or many bytes."""
        seconds = self.report()["predicted_ms"] / 1e3 if seconds is None else seconds
        found = [f"the server will take about {seconds:.0f} s a query"] if seconds > MOST_SECONDS else []
        for what, n in (("a query sends", self.upload_bytes), ("the evaluation keys have", self.key_bytes)):
            if n > MOST_BYTES:
                found.append(f"{what} {bytes_text(n)}")
        return found

    def table(self) -> Table:
        """Return the report as a table: it shows in a notebook and in a terminal, and ``print`` writes its text."""
        table = _Printed("what", "planned")
        for name, value in self.report().items():
            if name != "operations_of_a_block":
                table.add_row(name.replace("_", " "), f"{value:.3g}" if isinstance(value, float) else str(value))
        return table


class _Printed(Table):
    """A table whose text is itself."""

    def __str__(self) -> str:
        console = Console(width=120, highlight=False, force_terminal=False)
        with console.capture() as found:
            console.print(self)
        return found.get()


class Program(Protocol):
    """What a server computes: a plan of attention, or a layer."""

    @property
    def plan(self) -> Any:
        """What client and server agree on."""

    def tasks(self, parts: Sequence[Any]) -> list[tuple[Sequence[Any], Sequence[Any]]]:
        """Return the ciphertexts of each block that can be computed apart: shared ones, and its own."""

    def compute(self, m: Any, shared: Sequence[Any], queries: Sequence[Any]) -> list[Any]:
        """Return a block's result by an arithmetic."""


def bytes_text(n: int) -> str:
    """Return a number of bytes in words."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} bytes"
