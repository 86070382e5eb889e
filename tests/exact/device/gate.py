"""The gate of a GPU: correctly rounded answers and gradients, by the CPU's bits, and its levels' enclosures, by Arb.

Both go by parts, each with its own seed: `jobs` processes take them, and a folder keeps what they found, so that the
same command goes on where another ended.
"""

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed

import refattn
from refattn import Problem, UnsupportedProblem
from refattn.exact import run as runner
from refattn.exact.arithmetics import Balls
from refattn.exact.device import backward as gradient_tiles
from refattn.exact.device import forward
from refattn.exact.device.card import ROWS, card_of
from refattn.exact.enclosure import Enclosure
from refattn.exact.levels import Level
from tests.exact import gate as cpu
from tests.exact.device.drawn import FORMS, backward, compare, draw, operator

__all__ = ["against", "enclosures", "gate", "runs", "same_bits"]

MOST = (200, 200, 200, 3000)
"""The most keys of calls that are drawn, in turn; with gradients the first and the last fifth of them."""
CALLS, ELEMENTS = 25, 200_000
"""Calls, and comparisons with Arb, of one part."""
OPERATORS = 0.3
"""The share of calls of all operators, by their cases."""
SCORES = 2000
"""The most scores of these with gradients."""
OTHERS = 4
"""Of so many parts of comparisons with Arb, one is of other operators, too."""
OFF = 2.0**-40
"""More than the relative error of a difference of two enclosures' middles that is computed in float64."""


def same_bits(device, problems, seed=0, most=MOST, gradients=False, operators=0.0):
    """Compare random calls with the CPU; return how many differ, and how many each level has worked on."""
    rng, wrong, levels, card = np.random.default_rng(seed), 0, Counter(), card_of(0)
    before = card.keys, forward.ROWS, forward.FEWEST
    for i in range(problems):
        card.keys, forward.ROWS = int(rng.choice([48, 512, before[0]])), int(rng.choice([64, 4096, ROWS]))
        forward.FEWEST = min(forward.FEWEST, forward.ROWS // 4)
        gradient_tiles.ROWS, gradient_tiles.FEWEST = forward.ROWS, forward.FEWEST
        dout, dlse, (out, lse) = None, None, rng.choice(FORMS, 2)
        if operators and rng.random() < operators:
            problem = operator(rng, SCORES if gradients else None)
            dout = rng.standard_normal(problem.out_shape) if gradients else None
        elif gradients:
            problem, dout, dlse = backward(rng, most[i % len(most)])
        else:
            problem, out, lse = draw(rng, most[i % len(most)])
        asked = {"rounding": str(out), "lse_rounding": str(lse), "gradients": dout, "dlse": dlse}
        mine, theirs = (answered(problem, **x, **asked) for x in ({"device": device}, {"n_jobs": 1}))
        if isinstance(mine, str) or isinstance(theirs, str):
            off = mine != theirs
            levels["refused"] += 1
        else:
            off = compare(mine, theirs)
            levels.update([*mine.stats, problem.variant])
        if off:
            wrong += 1
            print(f"call {i} of seed {seed} differs in {off} elements: {problem}", flush=True)
    card.keys, forward.ROWS, forward.FEWEST = before
    gradient_tiles.ROWS, gradient_tiles.FEWEST = before[1:]
    return wrong, levels


def answered(problem, **asked):
    """Return an answer, or why there is none: NaN has no gradients, for example. Processes share the cores."""
    try:
        return refattn.evaluate(problem, **asked)
    except UnsupportedProblem as e:
        return str(e)


def enclosures(elements, seed=0, levels=(0, 1, 2, 3), draw=cpu.draw, variant="softmax"):
    """Compare enclosures of a GPU's levels with Arb; return their number, violations and the worst ratio by level.

    Calls are those of an operator; of several, softmax among them, where it is None.
    """
    rng, card, count, violations, worst = np.random.default_rng(seed), card_of(0), 0, 0, {}
    before = card.keys
    while count < elements:
        problem, dout = draw(rng, variant)
        card.keys = int(rng.choice([48, before]))
        balls = Balls(cpu.BITS)
        with balls.working():
            raw = runner.run(problem, balls, dout, dlse=cpu.at_lse(problem, dout))
            exact = {n: Enclosure.of(x) for n, x in raw.items()}
        for level in levels:
            for got in runs(problem, dout, level, card):
                for name, x in got.items():
                    ratios = against(exact[name], x)
                    count += ratios.size
                    violations += int((ratios > 1).sum())
                    worst[name, level] = max(worst.get((name, level), 0.0), float(ratios.max(initial=0.0)))
    card.keys = before
    return count, violations, worst


def mixed(rng, variant):
    """Draw as the CPU's gate does, or few rows with many keys: these have many numbers for what balls cost."""
    if rng.random() < 0.5:
        return cpu.draw(rng, variant)
    n, m, d = int(rng.integers(1, 6)), int(rng.integers(200, 2200)), int(rng.choice([64, 128]))
    pick = lambda s: cpu.FAMILIES[list(cpu.FAMILIES)[rng.integers(len(cpu.FAMILIES))]](rng, s)  # noqa: E731
    more = {"causal": "bottom_right"} if rng.random() < 0.3 else {}
    more |= {"sink": rng.standard_normal(1) * 3} if rng.random() < 0.3 else {}
    more |= {"bias": rng.standard_normal((1, 1, n, m)) * 3} if rng.random() < 0.3 else {}
    q, k = (pick((1, 1, x, d)) * 2.0 ** rng.integers(-3, 3) for x in (n, m))
    return Problem(q, k, pick((1, 1, m, d)), **more), pick((1, 1, n, d))


def against(exact, got):
    """Return errors over radii of a level's numbers (..., 3) that prove something; above 1 it is certain.

    `exact` are the middles of Arb's balls as two numbers, within far less than a radius.
    """
    h, low, r = np.moveaxis(got, -1, 0)
    with np.errstate(all="ignore"):
        fixed = ~np.isfinite(exact.mid) & (exact.radius == 0)  # what the contract fixes: an infinity, NaN
        error = np.abs((h - exact.mid) + (low - exact.tail))
        error = np.maximum(error * (1 - OFF) - exact.radius, 0.0)
        ratio = np.where(r > 0, error / r, np.where(error == 0, 0.0, np.inf))
        ratio = np.where(fixed, np.where(((h == exact.mid) | np.isnan(h)) & (r == 0), 0.0, np.inf), ratio)
        used = fixed | (np.isfinite(got).all(-1) & np.isfinite(exact.radius))
    return ratio[used]


def runs(problem, dout, level, card):
    """Yield what a level gives on a GPU: whole, then single keys with what rows know from it."""
    known, work = {}, runner.Work(problem, dout, dlse=cpu.at_lse(problem, dout), device=card)
    with card.current():
        raw = work.run(Level(level, card), known=known)
        yield {name: x.get() for name, x in raw.items()}
        if work.by_keys:
            none, keys = np.zeros(problem.out_shape[:3], bool), np.ones((1, problem.heads_kv, problem.n_k), bool)
            raw = work.run(Level(min(level + 1, 3), card), none, keys=keys, known=known)
            yield {name: raw[name].get() for name in ("dk", "dv")}


def part(device, what, size, seed, folder):
    """Return what a part found, (count, wrong, by name), from the folder where it is there."""
    kept = None if folder is None else Path(folder) / f"{what}-{seed}-{size}.json"
    if kept is not None and kept.exists():
        return what, *json.loads(kept.read_text())
    if what == "enclosures":
        count, wrong, worst = enclosures(size, seed, draw=mixed, variant="softmax" if seed % OTHERS else None)
        found = count, wrong, {f"{name:6s} L = {level}": x for (name, level), x in worst.items()}
    else:
        gradients = what == "gradients"
        most = tuple(x // 5 for x in MOST[::3]) if gradients else MOST
        wrong, levels = same_bits(device, size, seed, most, gradients, OPERATORS)
        found = size, wrong, dict(levels)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    return what, *found


def gate(device, problems, elements, seed=0, jobs=1, folder=None):
    """Run all parts and print what they find as they end; return how much is wrong."""
    start, counts, wrong = time.time(), Counter(), Counter()
    by_name = {"calls": Counter(), "gradients": Counter(), "enclosures": {}}
    sizes = {"calls": (problems, CALLS), "gradients": (problems, CALLS), "enclosures": (elements, ELEMENTS)}

    def asked():
        """Yield parts as processes become free, of each kind until what has ended is enough: a part may find more."""
        for what, (total, each) in sizes.items():
            for i in range(0, total, each):
                if counts[what] >= total:
                    break
                yield delayed(part)(device, what, min(each, total - i), (seed << 20) + i // each, folder)

    parallel = Parallel(n_jobs=jobs, pre_dispatch=jobs, batch_size=1, return_as="generator_unordered")
    for what, count, off, names in parallel(asked()):
        counts[what] += count
        wrong[what] += off
        if what == "enclosures":
            for name, x in names.items():
                by_name[what][name] = max(by_name[what].get(name, 0.0), x)
        else:
            by_name[what].update(names)
        said = ", ".join(f"{counts[w]} of {sizes[w][0]} {w} ({wrong[w]} wrong)" for w in sizes if counts[w])
        print(f"{time.time() - start:.0f} s: {said}", flush=True)
    print(f"{counts['calls']} calls on {device}, {wrong['calls']} differ from the CPU")
    print(f"{counts['gradients']} calls with gradients, {wrong['gradients']} differ from the CPU")
    for what in ("calls", "gradients"):
        for name, calls in sorted(by_name[what].items()):
            print(f"  {what}, {name}: {calls}")
    print(f"{counts['enclosures']} comparisons with Arb at {cpu.BITS} bits, {wrong['enclosures']} violations")
    for name, ratio in sorted(by_name["enclosures"].items()):
        print(f"  {name}: worst error / radius {ratio:.4f}")
    return sum(wrong.values())
