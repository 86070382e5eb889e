"""What a law is: a relation, the call that it is tried on, and what a kernel must have for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..problem import Problem
from ..variants.shapes import Shape
from .compare import Worst
from .inputs.draw import Draw
from .model import Capabilities
from .trial import Trial

__all__ = ["Law"]


@dataclass(frozen=True)
class Law:
    """One relation.

    Attributes
    ----------
    name, statement : str
        What it is called, and what it says.
    problem : callable
        Makes the call that it is tried on.
    test : callable
        ``test(asked, problem) -> Worst``.
    needs : str
        "", "lse", "dlse", "dstate_out", "state", "threads", "row_invariant", or the gradient without which it cannot be
        tried.
    named_only : str
        Why it runs only where it is named, "" where it always runs.
    uses : frozenset of str
        The options of Problem that its call sets.
    shape : type, optional
        The shape of definition that it is about; every operator of that shape must keep it.
    """

    name: str
    statement: str
    problem: Callable[[Draw], Problem]
    test: Callable[[Trial, Problem], Worst]
    needs: str = ""
    named_only: str = ""
    uses: frozenset[str] = frozenset()
    shape: type[Shape] | None = None

    def missing(self, able: Capabilities, serial: bool = False) -> list[str]:
        """Return what it needs and the kernel does not have, which may take one call at a time."""
        if self.needs == "threads":
            return ["two calls at a time in a process of its own"] if serial else []
        said = {n for n in ("lse", "row_invariant", "dlse", "dstate_out") if getattr(able, n)}
        there = not self.needs or self.needs in able.gradients | able.features | said
        return [] if there else [self.needs]
