"""Right kernels on drawn calls: ``python -m tests.check.drawn [COUNT] [FEATURE ...]``, minutes.

For each feature, COUNT calls that have it and what else is drawn; the tiled kernel is judged on each, with gradients
where the call has them. Prints for each feature how many calls there were and what was said of a right kernel: nothing
may be.
"""

import sys
import time

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings

from refattn import UnsupportedProblem, check_problem, strategies
from refattn.check.inputs.values import VALUES
from refattn.check.kernels.tiled import tiled
from refattn.check.model import FEATURES, FURTHER
from refattn.gates import RECURRENT

NEW = ("philox_flash", "philox_efficient", "dropout_bits", "query_norm", "key_norm", "alibi_slopes")
ALL = list(HealthCheck)
OTHERS = sorted((FEATURES | FURTHER) - {*RECURRENT, "weight", "paged_nhd", "paged_hnd", "appending"})


def run(feature, count):
    """Return how many calls with a feature were judged, how many with gradients, and the failures."""
    found, failures, with_gradients = 0, [], 0
    able = [n for n in OTHERS if not n.startswith(("scales", "out_", "types", "d_k_zero"))]
    size = {"max_rows": 9, "max_keys": 40, "max_dim": 16}
    # products of the largest numbers with what arrives leave the type: they have no gradient
    some = [n for n in VALUES if n != "extreme"]
    drawn = strategies.problems(dtypes=["float32", "bfloat16"], features=able, families=some, **size)

    @given(drawn.filter(lambda p: feature in p.features()))
    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=ALL)
    def judge(p):
        nonlocal found, with_gradients
        found += 1
        dout = np.random.default_rng(found).standard_normal(p.out_shape).astype(p.query.dtype)
        try:
            report = check_problem(tiled, p, "drawn", model=tiled.model, gradients=dout)
            with_gradients += 1
        except UnsupportedProblem:
            report = check_problem(tiled, p, "drawn", model=tiled.model)
        failures.extend((p, c.message) for c in report.failures)

    judge()
    return found, with_gradients, failures


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    wrong = False
    for feature in sys.argv[2:] or NEW:
        start = time.perf_counter()
        found, back, failures = run(feature, count)
        wrong |= bool(failures)
        took = time.perf_counter() - start
        print(f"{feature}: {found} calls, {back} with gradients, {len(failures)} failures, {took:.0f} s", flush=True)
        for p, message in failures[:5]:
            print("   ", p, message, flush=True)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
