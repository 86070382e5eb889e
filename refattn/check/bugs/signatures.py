"""Make the table of which checks each planted bug fails: ``python -m refattn.check.bugs.signatures``."""

from __future__ import annotations

import json

from ...files import write_text
from ..diagnose.explain import SIGNATURES, pattern
from ..model import GRADIENTS, Capabilities
from ..runner import check_kernel
from .edits import BUGS, broken

__all__ = ["main", "signature"]


def signature(name: str, dtype: str = "float32") -> list[str]:
    """Return the names of the checks that a planted bug fails."""
    able = Capabilities(frozenset({dtype}), lse=True, gradients=GRADIENTS)
    return sorted(pattern(check_kernel(broken(name), capabilities=able, dtypes=[dtype]), dtype))


def main() -> None:
    """Write the table."""
    found, narrow = {}, []
    for name in BUGS:
        found[name] = signature(name)
        if not found[name]:  # what only a narrow type shows
            narrow.append(name)
            found[name] = signature(name, "bfloat16")
    checks = sorted({c for names in found.values() for c in names})
    index = {c: i for i, c in enumerate(checks)}
    bugs = {bug: [index[c] for c in names] for bug, names in found.items()}
    table = {"checks": checks, "bfloat16": narrow, "bugs": bugs}
    write_text(SIGNATURES, json.dumps(table, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
