"""What a recurrence's bounds allow by length, over the root mean square of the values themselves: no judge above 1.

``python -m tests.check.bounds.lengths [LENGTH ...]`` prints a table; of gates alpha is drawn from 0.9 to 1.
"""

import sys

import numpy as np

from refattn import Problem, evaluate
from refattn.arrays import from_float64
from refattn.check.bounds.forward import bounds
from refattn.check.bounds.gradients import gradient_bounds
from refattn.check.model import MODELS
from refattn.dtypes import FORMATS

CALLS = ("lightning", "delta", "gated", "channels")


def call(name, n, dtype="float32", d=16, seed=0):
    """Return a call of one head with keys of length 1 and a state, and a gradient that arrives at out."""
    rng = np.random.default_rng(seed)

    def typed(x):
        return from_float64(FORMATS[dtype].round_array(x), dtype)

    q, k, v, dout = rng.standard_normal((4, 1, 1, n, d))
    k /= np.sqrt((k * k).sum(-1, keepdims=True))
    alpha, beta = rng.uniform(0.9, 1, (1, 1, n, d)), rng.uniform(0, 1, (1, 1, n, 1))
    more = {"variant": "lightning", "options": {"decay": (0.05,)}}
    if name != "lightning":
        more = {"variant": "gated_delta", "beta": typed(beta)}
        more |= {} if name == "delta" else {"alpha": typed(alpha if name == "channels" else alpha[..., :1])}
    state = rng.standard_normal((1, 1, d, d)).astype(np.float32)
    return Problem(*map(typed, (q, k, v)), causal="bottom_right", state=state, **more), typed(dout)


def allowed(p, dout, model):
    """Return by result the median of what it may be off by, over the root mean square of its values."""
    answer = evaluate(p, gradients=dout)
    limit = bounds(answer, model)
    limit |= gradient_bounds(answer, model, dout, limit)
    sizes = {n: np.sqrt(np.mean(np.square(answer.enclosures[n].mid))) for n in limit}
    return {n: float(np.median(x) / sizes[n]) for n, x in limit.items()}


def main():
    for n in map(int, sys.argv[1:] or (16, 64, 256)):
        for dtype in ("float32", "bfloat16"):
            for model in ("flash", "flash-ratios"):
                for name in CALLS:
                    if model == "flash" or name in ("gated", "channels"):
                        found = allowed(*call(name, n, dtype), MODELS[model](dtype))
                        print(n, dtype, model, name, *(f"{x} {y:.1e}" for x, y in found.items()), flush=True)


if __name__ == "__main__":
    main()
