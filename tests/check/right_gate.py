"""Right kernels in quick runs: ``python -m tests.check.right_gate [COUNT] [SECONDS] [OPERATOR ...]``.

Our kernels refattn-sparse, -weighed, -pooled, -branches and -chunked, which needs PyTorch, are judged on every operator
that they compute, in float32 and in bfloat16, COUNT times each with seeds 0, 1, ..., by turns, until SECONDS are over.
The first run is a whole one. A seed draws calls and nothing else, so each further run asks for those, where an operator
has them, and draws the numbers anew of the cases that came nearest to an alarm in the first run: an element next to its
bound, or an rms error next to its limit. Prints for each operator and type how many runs there were, how many said
something of a right kernel, which may be none, and how near to an alarm the nearest case came.
"""

import sys
import time
from dataclasses import replace

from refattn import check_kernel, check_problem
from refattn.check.diagnose.statistics import WIDEST
from refattn.check.inputs.families import cases
from refattn.check.inputs.sample import separate
from refattn.check.kernels import KERNELS

RIGHT = {
    v: e.kernel()
    for e in (KERNELS[f"refattn-{n}"] for n in ("sparse", "weighed", "pooled", "branches", "chunked"))
    if e.here
    for v in sorted(e.variants)
}
"""By operator, our kernel."""
TYPES = ("float32", "bfloat16")


NEAREST = 3
"""Cases of each operator and type that further runs draw anew."""


def nearness(check):
    """Return how near a check came to an alarm: 1 is the bound of an element, or the limit of the rms."""
    rms = [w.figures.rms / WIDEST**0.5 for w in check.arrays if w.figures is not None and w.figures.rms > 0]
    return max([w.ratio for w in check.arrays] + rms, default=0.0)


def nearest(variant, report):
    """Return the cases of a report that came nearest to an alarm, and whether it was their gradients that did."""
    near = {c.name.partition("[")[0]: nearness(c) for c in report.checks if c.verdict == "passed"}
    names = [(near.get(c.name + "/gradients" * back, 0), c, back) for c in cases(variant, "quick") for back in (0, 1)]
    return [x[1:] for x in sorted(names, key=lambda x: -x[0])[:NEAREST]]


def again(variant, dtype, seed, near):
    """Return reports of what is new with a seed: calls, and the nearest cases with other numbers."""
    kernel, found = RIGHT[variant], []
    for case, back in near:
        other = replace(case, draw=seed)
        dout = other.arriving(dtype) if back else None
        found.append(check_problem(kernel, other.problem(dtype), other.name, gradients=dout))
    if separate(variant):
        found.append(check_kernel(kernel, variant, dtypes=[dtype], budget="quick", seed=seed, only="calls/*"))
    return found


def run(count, seconds, variants=tuple(RIGHT)):
    """Return by operator and type how many runs there were, what was said, by seed, and how near an alarm was."""
    end, runs = time.monotonic() + seconds, {(v, d): 0 for v in variants for d in TYPES}
    said, near, most = {at: [] for at in runs}, {}, dict.fromkeys(runs, 0.0)
    for seed in range(count):
        for at in runs:
            if time.monotonic() > end:
                return runs, said, most
            variant, dtype = at
            if seed:
                reports = again(*at, seed, near[at])
            else:
                reports = [check_kernel(RIGHT[variant], variant, dtypes=[dtype], budget="quick", seed=0)]
                near[at] = nearest(variant, reports[0])
            runs[at] += 1
            most[at] = max([most[at], *(nearness(c) for r in reports for c in r.checks if c.verdict == "passed")])
            said[at] += [(seed, c.name, c.message) for r in reports for c in r.failures]
    return runs, said, most


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else float("inf")
    runs, said, most = run(count, seconds, sys.argv[3:] or tuple(RIGHT))
    for (variant, dtype), many in runs.items():
        alarms = said[variant, dtype]
        print(
            f"{variant} {dtype}: {many} runs, {len({x[0] for x in alarms})} with a false alarm, "
            f"nearest {most[variant, dtype]:.2f}",
            flush=True,
        )
        for x in alarms[:3]:
            print("   ", *x, flush=True)
    sys.exit(any(said.values()) or not all(runs.values()))  # none judged is none right


if __name__ == "__main__":
    main()
