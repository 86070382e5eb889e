"""What `refattn check` says of each kernel that is here, on the fixed problems: the figures of docs/kernels.md.

Floor: 0 wrong. Every kernel runs in a process of its own, so that one which crashes ends its own figures only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed

from refattn.bench import Row
from refattn.check.kernels import find, found


def judged(name: str) -> dict[str, Any] | str:
    """Return a kernel's report as JSON has it, or the last line that its process wrote where it ended without one."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        run = [sys.executable, "-m", "refattn", "check", name, "--only", "!calls/*", "--json", str(file)]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        if file.is_file():
            return dict(json.loads(file.read_text())["kernels"][0])
        return (done.stderr.strip().splitlines() or ["nothing was written"])[-1]


def figures(name: str, report: dict[str, Any] | str) -> Iterator[Row]:
    """Yield by format how many checks passed, were wrong, differed at an edge by its name, and did not run."""
    if isinstance(report, str):
        yield Row(f"{name}, ended without a report: {report}", 1, "runs", at_most=0)
        return
    checks = [c | {"dtype": c["name"].rpartition("[")[2][:-1]} for c in report["checks"]]
    for dtype in dict.fromkeys(c["dtype"] for c in checks):
        here = [c for c in checks if c["dtype"] == dtype]
        at = f"{name} ({report['version']}) {dtype}"
        yield Row(f"{at}, passed", sum(c["verdict"] == "passed" for c in here), "checks")
        yield Row(f"{at}, wrong", sum(c["verdict"] == "failed" for c in here), "checks", at_most=0)
        for edge in sorted({e for c in here for e in c["edges"]}):
            yield Row(f"{at}, differs at {edge}", sum(edge in c["edges"] for c in here), "checks")
        yield Row(f"{at}, not run", sum(c["verdict"] in ("unread", "unsupported") for c in here), "checks")


def rows() -> Iterator[Row]:
    """The kernels named in REFATTN_KERNELS (separated by commas), or all that are found; REFATTN_JOBS at a time."""
    wanted = [n for n in os.environ.get("REFATTN_KERNELS", "").split(",") if n]
    names = [e.name for n in wanted for e in find(n)] or [e.name for e in found()]
    jobs = int(os.environ.get("REFATTN_JOBS", "1"))
    for name, report in zip(names, Parallel(n_jobs=jobs)(delayed(judged)(n) for n in names), strict=True):
        yield from figures(name, report)
