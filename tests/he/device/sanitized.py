"""Small calls of every kernel on ciphertexts, for compute-sanitizer: python -m tests.he.device.sanitized [NUMBER ...].

``compute-sanitizer --tool memcheck python -m tests.he.device.sanitized`` runs them under a tool, with numbers only some
of them. Words are held to the executor's, of drawn keys: SEAL is not needed.
"""

import sys
from unittest.mock import patch

import numpy as np

from refattn.he.device import launches
from refattn.he.device.card import Card
from refattn.he.device.chain import Chain
from refattn.he.device.seeds import expanded, first_rejected, stream
from refattn.he.device.tables import Tables

from ..relay import Relay
from .every import RINGS, Every
from .gate import same
from .test_seeds import rejecting

__all__ = ["CALLS", "run_all", "run_call", "seeds_with_words_left_out"]

CALLS = [
    # transforms, key switches, rescaling, products, sums, permutations; of seeded ciphertexts and keys, of whole ones
    ("every operation", 8192, "full"),
    ("every operation", 8192, "whole"),
    ("every operation", 16384, "full"),
    ("every operation", 16384, "whole"),
    ("every operation", 32768, "full"),
    ("masks", 8192, "full"),
    ("masks", 8192, "whole"),
    ("words of a seed that are left out", 8192, "full"),
]


def run_call(what, degree, upload):
    """Run a call on a GPU.

    Raises
    ------
    AssertionError
        A word is not the executor's.
    """
    import cupy

    cupy.cuda.set_allocator(None)  # no pool: the sanitizer sees the end of all that was allocated
    if what == "masks":
        assert same(Relay(2, upload, 2 if upload == "whole" else 4), Card(degree))  # of queries in parts, too
    elif what == "every operation":
        assert same(Every(RINGS[degree], upload), Card(degree))
    else:
        (found, left_out), (words, count) = seeds_with_words_left_out(Card(degree), degree)
        assert np.array_equal(found, words)
        assert left_out == count > 255


def seeds_with_words_left_out(device, degree):
    """Return what a device makes of a seed modulo primes that leave out many words, what it is, and how many words."""
    chain, seed = Chain(degree, rejecting()[:2]), bytes(range(100, 164))
    tables = Tables(device, chain)
    with patch.object(launches, "MOST_REJECTED", 2**14):
        at, room = tables.stored(np.frombuffer(seed, np.uint8)), device.empty(8 * launches.seed_room(2, degree))
        to = device.empty(16 * degree)
        tables.recorded(launches.seed_launches(degree, [(at, to, 2)], room))()
    found = device.get(to, 16 * degree).view(np.uint64).reshape(2, degree)
    left_out = device.get(room + 2 * degree * 8 // 64, 8).view(np.uint64)[0]
    words = stream(seed, 0, 2 * degree // 512).reshape(2, degree)
    most = [first_rejected(q) for q in chain.primes]
    expected = sum(int((w >= m).sum()) for w, m in zip(words, most, strict=False))
    return (found, left_out), (expanded(seed, chain, 2), expected)


def run_all(say, numbers=()):
    """Run all calls, or those of some numbers, and say which."""
    for i in numbers or range(len(CALLS)):
        run_call(*CALLS[i])
        say("ok", *CALLS[i])


if __name__ == "__main__":
    run_all(lambda *words: print(*words, flush=True), [int(x) for x in sys.argv[1:]])
