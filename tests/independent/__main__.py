"""Compare many calls: python -m tests.independent --problems 1000 --seed 0."""

import argparse
import sys

from .calls import differences, draw

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    elements = wrong = 0
    for seed in range(asked.seed, asked.seed + asked.problems):
        count, found = differences(seed)
        elements, wrong = elements + count, wrong + len(found)
        for name, at, got, expected in found[:3]:
            print(f"seed {seed}: {name}{list(at)} is {got!r}, expected {expected!r}: {draw(seed)[0]!r}", flush=True)
    print(f"{asked.problems} problems, {elements} elements, {wrong} differ")
    sys.exit(wrong > 0)
