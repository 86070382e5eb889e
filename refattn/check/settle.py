"""What a comparison means in the light of what a kernel declares, and of what it read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..problem import Problem
from ..validation import SCALES
from .kernel import Kernel
from .probe import has
from .reading import SOURCE, unread
from .report.agreed import BLIND
from .report.report import Check

__all__ = ["RAISED", "Notes", "settled", "unasked"]

RAISED = "the kernel raised"
ENDS = (f"{RAISED} SystemExit", f"{RAISED} GeneratorExit")
"""What says of no call that the kernel cannot do it."""


@dataclass
class Notes:
    """What a check notes beside its comparisons.

    Attributes
    ----------
    rules : dict
        What other projects' rules say of out.
    read : frozenset of str, optional
        The options that the kernel read.
    either : int
        Rows in which its rounding may choose other keys than the exact scores do.
    """

    rules: dict[str, bool | None] = field(default_factory=dict)
    read: frozenset[str] | None = None
    either: int = 0


def settled(check: Check, kernel: Kernel, problem: Problem, lacks: list[str], notes: Notes) -> Check:
    """Return what a check says in the light of what the kernel declares, and of what it read.

    Outside its capabilities a kernel may raise or be right. What an undeclared kernel raises where an option is asked
    for, and what it gives where it does not read one, says that it has no such option.
    """
    check = replace(check, call="" if check.verdict == "passed" else repr(problem))
    missed = [] if notes.read is None else unread(problem, notes.read)
    raised = check.worst is None and check.message.startswith(RAISED)
    if lacks:
        text = f"not in its capabilities: {', '.join(lacks)}"
        narrow = problem.typed and check.message.startswith("out: got dtype")
        # who takes pages for a batch, and knows of none, gives arrays of other shapes
        strange = problem.block_table is not None and check.worst is None
        if check.verdict in ("passed", "unsupported") or raised or narrow or strange:
            return Check(check.name, "unsupported", message=text, seconds=check.seconds)
        types = {*SCALES, "out_dtype"} if problem.typed else set()
        if set(missed) & ({SOURCE.get(n, n) for n in lacks} | types):
            return replace(check, verdict="unread", message=f"{text}; it does not read {', '.join(missed)}", edges=())
        text += f"; it must raise there, and gave a wrong answer: {check.message}"
        return replace(check, verdict="edge", edges=("outside",), message=text)
    if check.verdict == "unsupported" and kernel.declared and problem.scale is not None and problem.scale <= 0:
        return replace(check, verdict="edge", edges=("scale",))
    if check.verdict == "unsupported" and kernel.declared and not kernel.capabilities.refuses:
        text = f"it raised UnsupportedProblem inside its capabilities: {check.message}; declare what it does not take"
        return replace(check, verdict="failed", message=text)
    if check.verdict == "passed" and not kernel.declared and "options" in missed:
        return replace(check, message=BLIND)
    if check.verdict in ("failed", "edge") and not kernel.declared:
        if missed:
            return replace(check, verdict="unread", message=f"it does not read {', '.join(missed)}", edges=())
        if raised and not check.message.startswith(ENDS) and problem.features() - {"lengths_differ"}:
            return replace(check, verdict="unsupported")
    return check


def unasked(kernel: Kernel, variant: str, done: Sequence[Check]) -> tuple[str, ...]:
    """Return the features that a kernel declares, its operator has, and no comparison with the exact answer asked for.

    Parameters
    ----------
    kernel : Kernel
        Of one that declares nothing there are none.
    variant : str
        The operator.
    done : sequence of Check
        The checks, those that did not run among them.
    """
    asked_for = {n for c in done if c.verdict not in ("unread", "unsupported") for n in c.features}
    left = kernel.capabilities.features - asked_for if kernel.declared else frozenset()
    return tuple(n for n in sorted(left) if has(variant, n))
