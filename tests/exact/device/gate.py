"""The gate of a GPU: correctly rounded answers against the CPU's bits, and enclosures of its levels against Arb."""

import time
from collections import Counter

import numpy as np

import refattn
from refattn.exact import run as runner
from refattn.exact.arithmetics import Balls
from refattn.exact.device import forward
from refattn.exact.device.card import ROWS, card_of
from refattn.exact.levels import Level
from tests.exact import gate as cpu
from tests.exact.device.drawn import compare, draw

__all__ = ["enclosures", "gate", "same_bits"]


def same_bits(device, problems, seed=0, most=(400, 400, 400, 6000)):
    """Compare random calls with the CPU; return how many differ, and how many each level has worked on."""
    rng, wrong, levels, card = np.random.default_rng(seed), 0, Counter(), card_of(0)
    before = card.keys, forward.ROWS, forward.FEWEST
    for i in range(problems):
        card.keys, forward.ROWS = int(rng.choice([48, 512, before[0]])), int(rng.choice([64, 4096, ROWS]))
        forward.FEWEST = min(forward.FEWEST, forward.ROWS // 4)
        problem, out, lse = draw(rng, most[i % len(most)])
        mine = refattn.evaluate(problem, rounding=out, lse_rounding=lse, device=device)
        off = compare(mine, refattn.evaluate(problem, rounding=out, lse_rounding=lse))
        levels.update(list(mine.stats))
        if off:
            wrong += 1
            print(f"call {i} of seed {seed} differs in {off} elements: {problem}")
    card.keys, forward.ROWS, forward.FEWEST = before
    return wrong, levels


def enclosures(elements, seed=0, levels=(0, 1, 2, 3), draw=cpu.draw):
    """Compare enclosures of a GPU's levels with Arb; return their number, violations and the worst ratio by level."""
    rng, card, count, violations, worst = np.random.default_rng(seed), card_of(0), 0, 0, {}
    before = card.keys
    while count < elements:
        problem, _ = draw(rng, "softmax")
        card.keys = int(rng.choice([48, before]))
        balls = Balls(cpu.BITS)
        with balls.working():
            exact = runner.run(problem, balls)
        for level in levels:
            with card.current():
                raw = runner.Work(problem, device=card).run(Level(level, card))
            raw = {name: x.get() for name, x in raw.items()}
            for name, _, ratio in cpu.against(exact, [raw], level):
                if ratio is cpu.LOST:
                    continue
                count += 1
                violations += ratio > 1
                worst[name, level] = max(worst.get((name, level), 0.0), ratio)
    card.keys = before
    return count, violations, worst


def gate(device, problems, elements, seed=0):
    """Run both parts and print what they find; return how much is wrong."""
    start = time.time()
    wrong, levels = same_bits(device, problems, seed)
    print(f"{problems} calls on {device}, {wrong} differ from the CPU, {time.time() - start:.0f} s")
    for name, calls in sorted(levels.items()):
        print(f"  {name}: worked on {calls} calls")
    start = time.time()
    count, violations, worst = enclosures(elements, seed)
    print(f"{count} comparisons with Arb at {cpu.BITS} bits, {violations} violations, {time.time() - start:.0f} s")
    for (array, level), ratio in sorted(worst.items()):
        print(f"  {array:6s} L = {level}: worst error / radius {ratio:.4f}")
    return wrong + violations
