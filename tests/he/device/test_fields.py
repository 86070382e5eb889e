"""The float64 numbers of transforms, at the ends of their ranges: exact, against Python's integers."""

import ctypes
import re

import numpy as np
import pytest

from refattn.he.device.build import HERE, PRIME
from refattn.he.device.chain import is_prime
from refattn.he.device.tables import MOST_REAL

from .emulated import GXX, compiled

TEXT = """
KERNEL(1) numbers(const Prime* p, const u64* x, const u64* w, const u64* words, u64* out, int count) {
    const Real f(*p);
    for (int i = 0; i < count; i++) {
        u64 a = 0, b = x[i];
        const ulonglong2 root = {w[2 * i], w[2 * i + 1]};
        f.forward(a, b, root);
        out[4 * i] = a;
        out[4 * i + 1] = f.word(x[i]);
        out[4 * i + 2] = f.times(x[i], words[i], 0);
        a = x[i], b = x[i];
        f.inverse(a, b, root, true);
        out[4 * i + 3] = a;
    }
}
"""


def primes():
    """The largest below 2**48 that a ring may have, and small ones."""
    for bits in (48, 47, 30):
        q = (1 << bits) - (1 << 15) + 1
        while not is_prime(q):
            q -= 1 << 15
        yield q


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    text = "#define LOG_DEGREE 13\n" + "".join((HERE / f).read_text() for f in ("modular.cuh", "fields.cuh")) + TEXT
    return compiled("fields", text, ["numbers"], tmp_path_factory.mktemp("fields"))


@GXX
@pytest.mark.parametrize("q", list(primes()))
def test_products_are_exact(q, library):
    prime, rng = np.zeros(1, PRIME), np.random.default_rng(0)
    prime["q"], prime["size"], prime["over"] = q, *np.array([q, 1 / q]).view(np.uint64)
    ends = [s * (f * q - d) for s in (1, -1) for f in (0, 1, 7, 14) for d in (0, 1, q // 2, q // 2 + 1)]
    x = np.array([*ends, *rng.integers(-14 * q, 14 * q, 400)])
    w = np.resize([0, 1, q // 2, q // 2 + 1, q - 1, *rng.integers(0, q, 64)], len(x))
    centered = np.where(2 * w > q, w - q, w).astype(np.float64)
    roots = np.stack([centered, centered / q], 1)
    out = np.zeros((len(x), 4), np.uint64)
    given = [prime, x.astype(np.float64), roots, w.astype(np.uint64), out]
    cells = [*(ctypes.c_uint64(a.ctypes.data) for a in given), ctypes.c_int(len(x))]
    pointers = (ctypes.c_void_p * len(cells))(*[ctypes.addressof(c) for c in cells])
    launch = (ctypes.c_uint(1), ctypes.c_uint(1), ctypes.c_int(1), ctypes.c_size_t(0), pointers, ctypes.c_int(0))
    assert library.emulate(b"numbers", *launch) == 0
    products, twice = out[:, 0].view(np.float64), out[:, 3].view(np.float64)
    for a, b, product, word, times, small in zip(x, w, products, *out[:, 1:3].T, twice, strict=True):
        assert (int(product) - int(a) * int(b)) % q == 0
        assert abs(product) < 0.7 * q
        assert int(word) == int(a) % q
        assert int(times) == int(a) * int(b) % q
        assert (int(small) - 2 * int(a)) % q == 0
        assert abs(small) < 0.51 * q


def test_the_least_prime_that_is_not_real_is_that_of_the_text():
    text = (HERE / "fields.cuh").read_text()
    assert int(MOST_REAL) == 2 ** int(re.search(r"a prime below 2\*\*(\d+)\.", text)[1])
