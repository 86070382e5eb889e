"""How long ``import refattn`` takes, and the first exact answer after it, each in a fresh process.

Floor: an empty Python, which starts in the row below it. NumPy is loaded with the first call, not with the import.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from refattn.bench import Row

RUNS = 9
FIRST = "import numpy as np, refattn; x = np.ones((1, 1, 2, 2)); refattn.softmax_attention(x, x, x)"
NAMES = "from refattn import Capabilities, Problem, check_kernel, evaluate"


def seconds(code: str) -> float:
    """Return the median time of a process that runs some code."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rows() -> Iterator[Row]:
    empty = seconds("pass")
    yield Row("an empty Python", empty, "s")
    yield Row("import refattn, beyond that", seconds("import refattn") - empty, "s", at_most=0.3)
    yield Row("the names of a check, beyond that", seconds(NAMES) - empty, "s")
    yield Row("import and the first exact answer, beyond that", seconds(FIRST) - empty, "s")
