"""The soundness gate: enclosures of every level against Arb at 320 bits, over families that hide nothing.

Run ``python tests/exact/gate.py 100000000`` for 10^8 comparisons; the tests run a part of it.
``python -m tests.exact.gate --device cuda --problems 2000 --jobs 8 --folder kept 1e8`` compares random calls on a GPU
with the CPU, bit for bit, and enclosures of a level there with Arb; with the same folder it goes on where it ended.
"""

import argparse
import sys
import time

import flint
import numpy as np

from refattn import Problem
from refattn.exact import run as runner
from refattn.exact import stream
from refattn.exact.arithmetics import Balls
from refattn.exact.levels import Level

BITS = 320
LOST = object()
FAMILIES = {
    "gaussian": lambda r, s: r.standard_normal(s),
    "same sign": lambda r, s: 1 + 2.0**-20 * r.standard_normal(s),
    "wide exponents": lambda r, s: r.standard_normal(s) * 2.0 ** r.integers(-30, 4, s),
    "absolute": lambda r, s: np.abs(r.standard_normal(s)),
    "integers": lambda r, s: r.integers(-3, 4, s) * 1.0,
    "peaked": lambda r, s: r.standard_normal(s) * 8.0,
}


def draw(rng, variant=None):
    """Draw a problem of any operator and options, and a gradient that arrives."""
    n, m, d = int(rng.integers(1, 24)), int(rng.integers(1, 200)), int(rng.choice([1, 3, 16, 64]))
    pick = lambda s: FAMILIES[list(FAMILIES)[rng.integers(len(FAMILIES))]](rng, s)  # noqa: E731
    q, k = (pick((1, 1, x, d)) * 2.0 ** rng.integers(-3, 4) for x in (n, m))
    v, dout = pick((1, 1, m, d)), pick((1, 1, n, d))
    variant = variant or ["softmax", "softmax", "linear", "power", "sigmoid"][rng.integers(5)]
    if variant in ("softmax", "sigmoid") and rng.random() < 0.2:
        x = (q, k, v, dout)[rng.integers(4)]  # what is padded with zeros
        x[..., rng.random(x.shape[-1]) < 0.3] = 0.0
        x[..., rng.random(x.shape[-2]) < 0.3, :] = 0.0
    more = {}
    if rng.random() < 0.4:
        more["causal"] = ["bottom_right", "top_left"][rng.integers(2)]
    if rng.random() < 0.2:
        more["allowed"] = rng.random((1, 1, n, m)) < 0.8
    if variant == "softmax":
        if rng.random() < 0.3:
            more["softcap"] = float(2.0 ** rng.integers(-2, 5))
        if rng.random() < 0.3:
            more["sink"] = rng.standard_normal(1) * 3
    if variant in ("softmax", "sigmoid") and rng.random() < 0.3:
        more["bias"] = rng.standard_normal((1, 1, n, m)) * 3
    if variant == "linear":
        feature = ["identity", "elu1", "exp", "relu"][rng.integers(4)]
        more["options"] = {"feature": feature, "normalize": bool(rng.integers(2))}
    if variant == "power":
        more["options"] = {"form": ["plain", "mean"][rng.integers(2)], "p": int(rng.choice([2, 4]))}
    return Problem(q, k, v, variant=variant, **more), dout if n * m < 2500 else None


def at_lse(problem, dout):
    """Return the gradient that arrives at lse: of softmax attention in every second call that has one at out."""
    return dout[..., -1] * 2 if dout is not None and problem.variant == "softmax" and problem.n_q % 2 else None


def compare(problem, dout, levels=(0, 1, 2, 3)):
    """Yield (array, level, error / radius) for every element."""
    balls = Balls(BITS)
    with balls.working():
        exact = runner.run(problem, balls, dout, dlse=at_lse(problem, dout))
    for level in levels:
        yield from against(exact, runs(problem, dout, level), level)


def runs(problem, dout, level):
    """Yield what the level gives: whole, then single keys with what rows know from it and from a forward pass."""
    known, work = {}, runner.Work(problem, dout, dlse=at_lse(problem, dout))
    yield work.run(Level(level), known=known)
    if work.by_keys:
        none, keys = np.zeros(problem.out_shape[:3], bool), np.ones((1, problem.heads_kv, problem.n_k), bool)
        for f, rows in ((Level(min(level + 1, 3)), known), (Level(level), {})):
            raw = work.run(f, none, keys=keys, known=rows)
            yield {name: raw[name] for name in ("dk", "dv")}


def against(exact, answers, level):
    """Compare answers with balls."""
    for got in answers:
        with flint.ctx.workprec(BITS + 100):
            for name in got:
                values = exact[name]
                for (h, low, r), ball in zip(got[name].reshape(-1, 3).tolist(), values.ravel(), strict=True):
                    if isinstance(ball, float | int) and not np.isfinite(ball):  # what the contract fixes
                        yield name, level, 0.0 if (h == ball or h != h) and r == 0 else np.inf
                    elif not np.isfinite([h, low, r]).all():
                        yield name, level, LOST
                    elif isinstance(ball, float | int) or ball.is_finite():
                        middle = flint.arb(ball) if isinstance(ball, float | int) else ball.mid()
                        error = float(abs(flint.arb(h) + flint.arb(low) - middle).lower())
                        yield name, level, error / r if r else (0.0 if error == 0 else np.inf)


def gate(elements, seed=0, levels=(0, 1, 2, 3), variant=None, stop=None):
    """Compare at least so many elements.

    Return their number, the violations, the worst ratio by array and level, and how many enclosures proved nothing.
    """
    rng = np.random.default_rng(seed)
    count, violations, worst, lost = 0, 0, {}, 0
    sizes = stream.ROWS, stream.KEYS
    while count < elements and (stop is None or violations < stop):
        problem, dout = draw(rng, variant)
        stream.ROWS, stream.KEYS = sizes if rng.random() < 0.5 else (16, 48)  # one tile, and several
        for name, level, ratio in compare(problem, dout, levels):
            if ratio is LOST:
                lost += 1
                continue
            count += 1
            violations += ratio > 1
            worst[name, level] = max(worst.get((name, level), 0.0), ratio)
    stream.ROWS, stream.KEYS = sizes
    return count, violations, worst, lost


def main(total):
    start = time.time()
    runner.STREAM_FROM = 64  # both paths
    done, wrong, worst_of, nothing = gate(total)
    print(
        f"{done} comparisons, {wrong} violations, {nothing} enclosures that prove nothing, {time.time() - start:.0f} s"
    )
    for (array, level), ratio in sorted(worst_of.items()):
        print(f"{array:6s} L = {level}: worst error / radius {ratio:.4f}")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("elements", nargs="?", default="1e6", help="comparisons with Arb")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--problems", type=int, default=400, help="calls to compare on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes, on a GPU")
    parser.add_argument("--folder", help="where what parts have found is kept, on a GPU")
    asked = parser.parse_args()
    if asked.device == "cpu":
        sys.exit(1 if main(int(float(asked.elements))) else 0)
    from tests.exact.device.gate import gate as on_device

    found = on_device(asked.device, asked.problems, int(float(asked.elements)), asked.seed, asked.jobs, asked.folder)
    sys.exit(1 if found else 0)
