"""The gate of the simulator and of the models: what a simulated kernel gives stays within the bound of its model.

``python -m tests.check.simulate_gate [COUNT] [SEED]`` draws about COUNT calls for each model, every option that softmax
has, other operators, and real sizes last; it prints the largest error over the allowed one, the median of the rms error
over the predicted one by array, and what was refused.
"""

import sys
import time
from dataclasses import replace

import numpy as np

from refattn import VARIANTS, Problem, UnsupportedProblem, simulate
from refattn.arrays import from_float64, to_float64
from refattn.check.bounds.expected import expected
from refattn.check.model import MODELS, flash
from refattn.dtypes import FORMATS
from refattn.variants import Steps

from .bounds import gate

MORE = {
    "by-chance": lambda dtype: replace(flash(dtype), stochastic=True),
    "by-chance-float8": lambda dtype: replace(MODELS["float8"](dtype), stochastic=True),
    "int8-row": lambda dtype: replace(MODELS["sage-int8"](dtype), weights_scale="row"),
    "int8-block": lambda dtype: replace(MODELS["sage-int8"](dtype), weights_scale="block", smoothed=False, block=16),
    "flushing": lambda dtype: replace(flash(dtype), subnormals=False),
    "short-chains": lambda dtype: replace(flash(dtype), chain=24, tile=20),
    "half": lambda dtype: replace(flash(dtype), accumulator="float16" if dtype != "float64" else dtype),
}
ALL = {**MODELS, **MORE}
OTHERS = [n for n, v in VARIANTS.items() if n != "softmax" and not isinstance(v.shape, Steps)]
SIZES = ((1, 2, 64, 512, 64), (1, 1, 40, 1024, 128), (1, 1, 16, 4096, 64))
FEWEST = 64
"""Elements from which an rms says something."""


def real(rng, size, dtype):
    """Draw a call of a size in use: values to one side, scores that are spread."""
    b, h, n_q, n_k, d = size
    q, k, v = (rng.normal(size=(b, h, n, d)) for n in (n_q, n_k, n_k))
    shift, peak = rng.choice([0.0, 1.0]), rng.choice([0.5, 1.0, 2.0])
    parts = (FORMATS[dtype].round_array(x) for x in (peak * q, k, v + shift))
    return Problem(*(from_float64(x, dtype) for x in parts))


def judged(problem, model, seed):
    """Return by array the largest error over the allowed one, the rms over the predicted one, and how many counted."""
    got = simulate(problem, model, seed)
    known, found = expected(problem, model), {}
    parts = dict(zip(("out", "lse"), got if isinstance(got, tuple) else (got,), strict=False))
    if known.either is not None:
        known = known.for_result({n: to_float64(x) for n, x in parts.items()})
    for name, x in parts.items():
        form, e, limit = FORMATS[x.dtype.name], known.answer.enclosures[name], known.allowed[name]
        with np.errstate(all="ignore"):
            # past its type's range, or a sum's, a right kernel gives inf
            seen = np.isfinite(e.mid) & (np.abs(e.mid) + limit < form.largest) & np.isfinite(to_float64(x))
            error = np.where(seen, e.least_error(to_float64(x)), 0.0)
            ratio = np.where(error == 0, 0.0, error / limit)
            variance = known.variance[name]
            counted = seen & (variance > 0)
            rms = float(np.sqrt(np.mean((error**2 / variance)[counted]))) if counted.sum() >= FEWEST else np.nan
        found[name] = float(np.nan_to_num(ratio, nan=np.inf).max(initial=0.0)), rms, int(seen.sum())
    return found


def calls(rng, count, dtype):
    """Yield drawn calls: of softmax with every option, and of other operators."""
    for i in range(count):
        yield gate.problem("softmax" if i % 3 else str(rng.choice(OTHERS)), rng)
    for size in SIZES if count > 3 else ():
        yield real(rng, size, dtype)


def run(names, count, seed=0):
    """Judge simulated kernels; return by model the worst ratio, medians of rms, elements and refusals by message."""
    found = {}
    for name in names:
        rng = np.random.default_rng([seed, *name.encode()])
        worst, rms, elements, refused, start = 0.0, {"out": [], "lse": []}, 0, {}, time.perf_counter()
        for p in calls(rng, count, str(rng.choice(["bfloat16", "float16", "float32"]))):
            try:
                got = judged(p, ALL[name](str(p.to("numpy").out_type)), int(rng.integers(2**31)))
            except UnsupportedProblem as e:
                refused[str(e)] = refused.get(str(e), 0) + 1
                continue
            for array, (ratio, spread, n) in got.items():
                worst, elements = max(worst, ratio), elements + n
                rms[array].append(spread)
        medians = {n: float(np.nanmedian(x)) if np.isfinite(x).any() else np.nan for n, x in rms.items()}
        found[name] = worst, medians, elements, refused, time.perf_counter() - start
    return found


def main():
    count, seed = (int(x) for x in [*sys.argv[1:], *("60", "0")[len(sys.argv) - 1 :]])
    wrong = False
    for name in ALL:
        worst, medians, elements, refused, seconds = run([name], count, seed)[name]
        wrong |= worst > 1
        spread = ", ".join(f"{n} {x:.2f}" for n, x in medians.items())
        print(f"{name}: {elements} elements, at most {worst:.2f} of the bound, rms {spread}, {seconds:.0f} s")
        for text, n in refused.items():
            print(f"    {n} refused: {text}")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
