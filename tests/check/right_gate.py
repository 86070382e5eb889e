"""Right kernels in quick runs: ``python -m tests.check.right_gate [COUNT] [SECONDS] [OPERATOR ...]``.

Our kernels refattn-sparse, refattn-weighed and refattn-chunked, which needs PyTorch, are judged on every operator that
they compute, in float32 and in bfloat16, COUNT times each with seeds 0, 1, ..., by turns, until SECONDS are over.
Prints for each operator and type how many runs there were and how many said something of a right kernel: none may.
"""

import sys
import time

from refattn import check_kernel
from refattn.check.kernels import KERNELS

RIGHT = {
    v: e.kernel()
    for e in (KERNELS[f"refattn-{n}"] for n in ("sparse", "weighed", "chunked"))
    if e.here
    for v in sorted(e.variants)
}
"""By operator, our kernel."""
TYPES = ("float32", "bfloat16")


def failures(variant, dtype, seed):
    """Return what one quick run says against an operator's kernel."""
    found = check_kernel(RIGHT[variant], variant, dtypes=[dtype], budget="quick", seed=seed)
    return [(c.name, c.message) for c in found.failures]


def run(count, seconds, variants=tuple(RIGHT)):
    """Return by operator and type how many runs there were, and what was said, by seed."""
    end, runs = time.monotonic() + seconds, {(v, d): 0 for v in variants for d in TYPES}
    said = {at: [] for at in runs}
    for seed in range(count):
        for at in runs:
            if time.monotonic() > end:
                return runs, said
            runs[at] += 1
            said[at] += [(seed, *x) for x in failures(*at, seed)]
    return runs, said


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else float("inf")
    runs, said = run(count, seconds, sys.argv[3:] or tuple(RIGHT))
    for (variant, dtype), many in runs.items():
        alarms = said[variant, dtype]
        print(f"{variant} {dtype}: {many} runs, {len({x[0] for x in alarms})} with a false alarm", flush=True)
        for x in alarms[:3]:
            print("   ", *x, flush=True)
    sys.exit(any(said.values()) or not all(runs.values()))  # none judged is none right


if __name__ == "__main__":
    main()
