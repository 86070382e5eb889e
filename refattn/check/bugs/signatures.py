"""Make the table of which checks each planted bug fails: ``python -m refattn.check.bugs.signatures``."""

from __future__ import annotations

import json

from joblib import Parallel, delayed

from ...files import write_text
from ..diagnose.explain import SIGNATURES, pattern
from ..model import GRADIENTS, Capabilities
from ..runner import check_kernel
from .edits import BUGS, broken

__all__ = ["main", "signature"]


def signature(name: str, dtype: str = "float32") -> list[str]:
    """Return the names of the checks that a planted bug fails, of those that are the same in every run."""
    able = Capabilities(frozenset({dtype}), lse=True, gradients=GRADIENTS)
    report = check_kernel(broken(name), capabilities=able, dtypes=[dtype], only="!calls/*")
    return sorted(pattern(report, dtype))


def main() -> None:
    """Write the table, with two processes."""
    found = dict(zip(BUGS, Parallel(n_jobs=2)(delayed(signature)(name) for name in BUGS), strict=True))
    narrow = [name for name, checks in found.items() if not checks]  # what only a narrow type shows
    found |= {name: signature(name, "bfloat16") for name in narrow}
    checks = sorted({c for names in found.values() for c in names})
    index = {c: i for i, c in enumerate(checks)}
    bugs = {bug: [index[c] for c in names] for bug, names in found.items()}
    origins = {n: b.origin for n, b in BUGS.items() if b.origin}
    table = {"checks": checks, "bfloat16": narrow, "bugs": bugs, "origins": origins}
    write_text(SIGNATURES, json.dumps(table, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
