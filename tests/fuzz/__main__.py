"""Read changed input for some minutes: python -m tests.fuzz --minutes 10."""

import argparse
import resource
import sys
import tempfile
import time
from collections import Counter

from .readers import Readers, attack

MEMORY = 6 * 2**30
"""Bytes of address space: what a reader may take of it, libraries included."""

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        readers, count, wrong, seed = Readers(folder), Counter(), 0, asked.seed
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        end = time.monotonic() + 60 * asked.minutes
        while time.monotonic() < end:
            for name in readers.all:
                said = attack(readers, name, seed)
                count[name] += 1
                if said:
                    wrong += 1
                    print(said, flush=True)
            seed += 1
        readers.close()
    print(f"{sum(count.values())} inputs of {len(count)} readers, seeds {asked.seed} to {seed - 1}: {wrong} wrong")
    sys.exit(wrong > 0)
