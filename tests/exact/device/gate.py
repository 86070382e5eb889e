"""The gate of a GPU: correctly rounded answers and gradients, by the CPU's bits, and its levels' enclosures, by Arb."""

import time
from collections import Counter

import numpy as np

import refattn
from refattn.exact import run as runner
from refattn.exact.arithmetics import Balls
from refattn.exact.device import backward as gradient_tiles
from refattn.exact.device import forward
from refattn.exact.device.card import ROWS, card_of
from refattn.exact.levels import Level
from tests.exact import gate as cpu
from tests.exact.device.drawn import FORMS, backward, compare, draw

__all__ = ["enclosures", "gate", "runs", "same_bits"]


def same_bits(device, problems, seed=0, most=(400, 400, 400, 6000), gradients=False):
    """Compare random calls with the CPU; return how many differ, and how many each level has worked on."""
    rng, wrong, levels, card = np.random.default_rng(seed), 0, Counter(), card_of(0)
    before = card.keys, forward.ROWS, forward.FEWEST
    for i in range(problems):
        card.keys, forward.ROWS = int(rng.choice([48, 512, before[0]])), int(rng.choice([64, 4096, ROWS]))
        forward.FEWEST = min(forward.FEWEST, forward.ROWS // 4)
        gradient_tiles.ROWS, gradient_tiles.FEWEST = forward.ROWS, forward.FEWEST
        if gradients:
            (problem, dout), out, lse = backward(rng, most[i % len(most)]), *rng.choice(FORMS, 2)
        else:
            (problem, out, lse), dout = draw(rng, most[i % len(most)]), None
        asked = {"rounding": out, "lse_rounding": lse, "gradients": dout}
        mine = refattn.evaluate(problem, device=device, **asked)
        off = compare(mine, refattn.evaluate(problem, **asked))
        levels.update(list(mine.stats))
        if off:
            wrong += 1
            print(f"call {i} of seed {seed} differs in {off} elements: {problem}")
    card.keys, forward.ROWS, forward.FEWEST = before
    gradient_tiles.ROWS, gradient_tiles.FEWEST = before[1:]
    return wrong, levels


def enclosures(elements, seed=0, levels=(0, 1, 2, 3), draw=cpu.draw):
    """Compare enclosures of a GPU's levels with Arb; return their number, violations and the worst ratio by level."""
    rng, card, count, violations, worst = np.random.default_rng(seed), card_of(0), 0, 0, {}
    before = card.keys
    while count < elements:
        problem, dout = draw(rng, "softmax")
        dout = None if problem.softcap is not None else dout
        card.keys = int(rng.choice([48, before]))
        balls = Balls(cpu.BITS)
        with balls.working():
            exact = runner.run(problem, balls, dout)
        for level in levels:
            for name, _, ratio in cpu.against(exact, runs(problem, dout, level, card), level):
                if ratio is cpu.LOST:
                    continue
                count += 1
                violations += ratio > 1
                worst[name, level] = max(worst.get((name, level), 0.0), ratio)
    card.keys = before
    return count, violations, worst


def runs(problem, dout, level, card):
    """Yield what a level gives on a GPU: whole, then single keys with what rows know from it."""
    known, work = {}, runner.Work(problem, dout, device=card)
    with card.current():
        raw = work.run(Level(level, card), known=known)
        yield {name: x.get() for name, x in raw.items()}
        if work.by_keys:
            none, keys = np.zeros(problem.out_shape[:3], bool), np.ones((1, problem.heads_kv, problem.n_k), bool)
            raw = work.run(Level(min(level + 1, 3), card), none, keys=keys, known=known)
            yield {name: raw[name].get() for name in ("dk", "dv")}


def gate(device, problems, elements, seed=0):
    """Run both parts and print what they find; return how much is wrong."""
    start = time.time()
    wrong = 0
    for what, gradients, most in (("calls", False, (400, 400, 400, 6000)), ("calls with gradients", True, (40, 600))):
        differ, levels = same_bits(device, problems, seed, most, gradients)
        wrong += differ
        print(f"{problems} {what} on {device}, {differ} differ from the CPU, {time.time() - start:.0f} s")
        for name, calls in sorted(levels.items()):
            print(f"  {name}: worked on {calls} calls")
        start = time.time()
    count, violations, worst = enclosures(elements, seed)
    print(f"{count} comparisons with Arb at {cpu.BITS} bits, {violations} violations, {time.time() - start:.0f} s")
    for (array, level), ratio in sorted(worst.items()):
        print(f"  {array:6s} L = {level}: worst error / radius {ratio:.4f}")
    return wrong + violations
