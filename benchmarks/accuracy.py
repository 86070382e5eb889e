"""How exact the attention kernels found here are, forward and backward, on every case of the check.

Floor: 0 failed checks, error/bound below 1, and an rms of 1 over what the kernel's roundings should give (less where
its types are better than its model says). The bias is the mean error toward larger values over the predicted error: 0
for a kernel that rounds to nearest.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator

from joblib import Parallel, delayed

from refattn.bench import Row
from refattn.check.kernels import find, found
from refattn.check.report.report import Check
from refattn.check.runner import plan

ARRAYS = ("out", "lse", "dq", "dk", "dv", "dbias")


def part(name: str, first: int, step: int) -> list[Check]:
    """Return every `step`-th check of a kernel, run."""
    (e,) = find(name)
    return [i.run() for i in plan(e.kernel(), model=e.model, capabilities=e.capabilities)[first::step]]


def rows() -> Iterator[Row]:
    """The kernels named in REFATTN_KERNELS (separated by commas), or all that are found; REFATTN_JOBS processes."""
    jobs = int(os.environ.get("REFATTN_JOBS", "1"))
    wanted = [n for n in os.environ.get("REFATTN_KERNELS", "").split(",") if n]
    for entry in [e for n in wanted for e in find(n)] or found():
        parts = Parallel(n_jobs=jobs)(delayed(part)(entry.name, i, jobs) for i in range(jobs))
        done = [c for p in parts for c in p]
        for dtype in sorted(entry.capabilities.dtypes):
            checks = [c for c in done if c.dtype == dtype]
            at = f"{entry.name} ({entry.version}) {dtype}"
            for verdict in ("passed", "failed", "unsupported"):
                yield Row(f"{at}, {verdict}", sum(c.verdict == verdict for c in checks), "checks")
            for array in ARRAYS:
                right = [a for c in checks for a in c.arrays if a.array == array and a.failures == 0]
                figures = [a.figures for a in right if a.figures is not None and not math.isnan(a.figures.rms)]
                if right:
                    yield Row(f"{at} {array}, worst error/bound where none fails", max(a.ratio for a in right), "ratio")
                if figures:
                    yield Row(
                        f"{at} {array}, rms over predicted, median", statistics.median(f.rms for f in figures), "ratio"
                    )
                    yield Row(
                        f"{at} {array}, bias over predicted, median",
                        statistics.median(f.bias for f in figures),
                        "ratio",
                    )
