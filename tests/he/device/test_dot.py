"""The kernel of sums of products at the largest words, and on both sides of where it adds in parts, by the emulator."""

import numpy as np
import pytest

from refattn.he.device.build import ITEM
from refattn.he.device.chain import Chain, is_prime
from refattn.he.device.launches import Launch
from refattn.he.device.tables import Tables

from .emulated import GXX, Emulated

DEGREE = 8192


def primes():
    """Return the largest prime that is cut, and a larger one, of whose words parts would not add up."""
    found = []
    for bits in (56, 57):
        q = 2**bits + 1 - 2 * DEGREE
        while not is_prime(q):
            q -= 2 * DEGREE
        found.append(q)
    return found


@GXX
@pytest.mark.parametrize("count", [1, 64, 65])
def test_sums_of_products_are_those_of_whole_numbers(folder, count):
    chain, rng = Chain(DEGREE, primes()), np.random.default_rng(count)
    device = Emulated(DEGREE, folder)
    tables, size = Tables(device, chain), 8 * DEGREE
    lists, items, results = [], [], []
    for prime, q in enumerate(chain.primes):
        for dots in (1, 3):
            x = rng.integers(0, q, (1 + dots, 2, count, DEGREE), dtype=np.uint64)
            x[..., :2] = q - 1
            at = tables.stored(x)
            to = [device.empty(3 * size) for _ in range(dots)]
            items.append({"x": 8 * len(lists), "count": count, "prime": prime, "limbs": dots, "key": DEGREE})
            lists += to
            for r in range(count):
                lists += [at + ((d * 2 + c) * count + r) * size for d in range(1 + dots) for c in (0, 1)]
            results.append((to, x[..., :9], q))
    rows = np.zeros(len(items), ITEM)
    for row, item in zip(rows, items, strict=True):
        for name, value in item.items():
            row[name] = value
    tables.recorded([Launch("dot", rows)], np.array(lists, np.uint64))()
    for to, x, q in results:
        (a0, a1), *second = x.astype(object)
        for at, (b0, b1) in zip(to, second, strict=True):
            found = device.get(at, 3 * size).view(np.uint64).reshape(3, DEGREE)[:, : x.shape[-1]]
            expected = [(y.sum(0) % q).tolist() for y in (a0 * b0, a0 * b1 + a1 * b0, a1 * b1)]
            assert found.tolist() == expected
    assert device.ends_are_whole()
