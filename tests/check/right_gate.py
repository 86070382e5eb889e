"""Right kernels in quick runs: ``python -m tests.check.right_gate [COUNT] [SECONDS] [OPERATOR ...]``.

refattn-sparse is judged on every operator that says which keys a row sees, in float32 and in bfloat16, COUNT times each
with seeds 0, 1, ..., by turns, until SECONDS are over. Prints for each operator and type how many runs there were and
how many said something of a right kernel: none may.
"""

import sys
import time

from refattn import check_kernel
from refattn.check.kernels import SPARSE, find

KERNEL = find("refattn-sparse")[0].kernel()
TYPES = ("float32", "bfloat16")


def failures(variant, dtype, seed):
    """Return what one quick run says against the kernel."""
    found = check_kernel(KERNEL, variant, dtypes=[dtype], budget="quick", seed=seed)
    return [(c.name, c.message) for c in found.failures]


def run(count, seconds, variants=SPARSE):
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
    runs, said = run(count, seconds, sys.argv[3:] or SPARSE)
    for (variant, dtype), many in runs.items():
        alarms = said[variant, dtype]
        print(f"{variant} {dtype}: {many} runs, {len({x[0] for x in alarms})} with a false alarm", flush=True)
        for x in alarms[:3]:
            print("   ", *x, flush=True)
    sys.exit(any(said.values()))


if __name__ == "__main__":
    main()
