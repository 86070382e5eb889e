"""Whether any answer of a kernel agreed with the exact one: laws alone, and calls that ask nothing, make none right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...variants import Lowered, Selected, variant_of

if TYPE_CHECKING:
    from .report import Check

__all__ = ["BLIND", "agreed"]

BLIND = "it does not read options, and need not here"
"""What a passed check says that has options of its operator which an undeclared kernel does not read."""


def agreed(checks: Sequence[Check], variant: str) -> bool:
    """Tell whether an answer agreed with the exact one, where any differed for an option that was not read.

    Of an operator that hides or chooses keys by its own options, one must have agreed that had options and read them:
    short calls without them are often plain attention.
    """
    compared = [c for c in checks if not c.name.startswith("law/")]
    same = [c for c in compared if c.verdict in ("passed", "known") or set(c.edges) - {"outside"}]
    if not any(c.verdict == "unread" for c in compared):
        return True
    v = variant_of(variant)
    if not isinstance(v.shape, Lowered | Selected) or not any(_options_unread(c) for c in compared):
        return bool(same)
    own = {label for label, case in v.cases.items() if "options" in case}
    return any(c.message != BLIND and own & set(c.name.partition("[")[0].split("/")) for c in same)


def _options_unread(check: Check) -> bool:
    read = check.message.partition("it does not read ")[2]
    return check.verdict == "unread" and "options" in read.split(", ")
