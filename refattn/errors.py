"""The exceptions of refattn; an error names the argument or axis, what it got, what it expected, what to change."""

from __future__ import annotations

import re

__all__ = [
    "BuildError",
    "HypothesisViolated",
    "InvalidInput",
    "InvalidProblem",
    "KernelError",
    "MismatchError",
    "RefattnError",
    "ServiceError",
    "UnsupportedProblem",
    "UntrustedArithmetic",
    "WorkerDied",
    "expect",
    "install",
    "printable",
]


class RefattnError(Exception):
    """Base of every exception that refattn raises on purpose."""


class InvalidProblem(RefattnError, ValueError):
    """An attention call that has no meaning: wrong shapes, types or options."""


class InvalidInput(RefattnError, ValueError):
    """A name, file or setting outside a Problem that cannot be used."""


class UnsupportedProblem(RefattnError, NotImplementedError):
    """A call that has a meaning, but that this path does not compute."""


class HypothesisViolated(RefattnError, ValueError):
    """A claim was asked about something that it does not speak of."""


class KernelError(RefattnError):
    """A kernel broke its contract: it raised, or answered with the wrong shape, type or number of arrays."""


class BuildError(RefattnError):
    """A GPU kernel did not compile; the text is the compiler's."""


class UntrustedArithmetic(RefattnError):
    """This machine's floating point is not what a proof takes for granted."""


class MismatchError(RefattnError, AssertionError):
    """A kernel's answer is further from the exact value than its rounding model allows."""


class ServiceError(RefattnError):
    """A server elsewhere does not answer, or failed."""


class WorkerDied(RefattnError):
    """A process that computed a part of an answer ended before it was done."""


def printable(text: str) -> str:
    """Return a text without colours and control characters, which terminals, XML and HTML do not take."""
    return "".join(c for c in re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]", "", text) if c.isprintable())


def install(extra: str) -> str:
    """Return the command that adds an extra of ours. We are not on PyPI: it is run in a clone."""
    return f"in a clone of refattn: pip install '.[{extra}]'"


def expect(good: bool, what: str, got: object, expected: str) -> None:
    """Raise InvalidInput where an argument is not what was expected."""
    if not good:
        raise InvalidInput(f"{what}: got {repr(got)[:200]}, expected {expected}")
