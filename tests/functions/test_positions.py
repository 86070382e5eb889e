"""Tables, slopes and buckets against mpmath and loops."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch

from refattn import InvalidInput, Problem, evaluate
from refattn.functions import positions
from refattn.functions.positions import alibi_slopes, lightning_slopes, rotary_tables, t5_bias, t5_buckets


def angles(dim, base, scaling=None):
    """Each pair's angle by position, in mpmath, by the configurations' formulas."""
    s, mp = scaling or {}, mpmath.mpf
    kind, factor, old = s.get("rope_type"), mp(s.get("factor", 1)), s.get("original_max_position_embeddings")
    if kind == "ntk":
        base = base * factor ** (mp(dim) / (dim - 2))
    plain = [1 / mp(base) ** (mp(2 * i) / dim) for i in range(dim // 2)]
    if kind == "linear":
        return [f / factor for f in plain]
    if kind == "llama3":
        found = []
        for f in plain:
            wave = 2 * mpmath.pi / f
            smooth = (old / wave - 1) / (4 - 1)
            found.append(
                f / factor if wave > old else f if wave < old / mp(4) else (1 - smooth) * f / factor + smooth * f
            )
        return found
    if kind == "yarn":
        low, high = (dim * mpmath.log(old / (b * 2 * mpmath.pi)) / (2 * mpmath.log(base)) for b in (32, 1))
        low, high = max(int(mpmath.floor(low)), 0), min(int(mpmath.ceil(high)), dim - 1)
        keep = [1 - min(max(mp(i - low) / (high - low), 0), 1) for i in range(dim // 2)]
        return [f / factor * (1 - k) + f * k for f, k in zip(plain, keep, strict=True)]
    return plain


SCALED = [
    None,
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "ntk", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
]


@pytest.mark.parametrize("scaling", SCALED)
def test_tables_are_correctly_rounded(scaling):
    where = np.array([0, 1, 2, 1000, 131071, 2**40])
    tables = {n: rotary_tables(where, 32, base=500000.0, scaling=scaling, dtype=n) for n in ("float64", "float32")}
    by = 1
    with mpmath.workdps(60):
        if scaling and scaling["rope_type"] == "yarn":
            by = mpmath.log(4) / 10 + 1
        found = angles(32, mpmath.mpf(500000), scaling)
        for row, p in enumerate(where.tolist()):
            for i, f in enumerate(found):
                exact = mpmath.cos(p * f) * by, mpmath.sin(p * f) * by
                for n, t in tables.items():
                    for x, y in zip(t, exact, strict=True):
                        got, kind = x[row, i], x.dtype.type
                        gap = abs(mpmath.mpf(float(got)) - y)
                        for other in (np.nextafter(got, kind(9)), np.nextafter(got, kind(-9))):
                            assert gap <= abs(mpmath.mpf(float(other)) - y), (n, p, i)


def test_rounding_twice_is_not_done():
    from refattn.functions.positions import _nearest

    class Ball:
        """1 + 2**-24 + 2**-80: float64 rounds it to a number that lies between two of float32."""

        def mid(self):
            return self

        def __float__(self):
            return 1 + 2.0**-24

        def __sub__(self, other):
            return type("Rest", (), {"mid": lambda self: 2.0**-80})()

    assert np.float32(1 + 2.0**-24) == 1
    assert np.float32(_nearest(Ball(), 24)) == np.float32(1 + 2.0**-23)


def test_sections_follow_their_axis():
    where = np.array([[0, 1, 2, 3], [5, 6, 7, 8], [9, 9, 9, 9]])
    cos, sin = rotary_tables(where, 16, sections=(3, 3, 2))
    for axis, pairs in ((0, [0, 1, 2]), (1, [3, 4, 5]), (2, [6, 7])):
        one = rotary_tables(where[axis], 16)
        for i in pairs:
            assert (cos[:, i] == one[0][:, i]).all()
            assert (sin[:, i] == one[1][:, i]).all()


def test_scores_depend_on_the_distance_alone():
    cos, sin = rotary_tables(40, 8, dtype="float64")
    x = np.random.default_rng(0).standard_normal((1, 1, 3, 8))
    p = Problem(x, x, x, rotary="half", rotary_cos=cos, rotary_sin=sin)
    one = evaluate(p)
    two = evaluate(p.replace(positions_q=np.arange(3) + 30, positions_k=np.arange(3) + 30))
    # cosines and sines are off by 2**-54 each: a score of 8 products of two tables' numbers by some 2**-50 |x|^2
    assert np.abs(one.out - two.out).max() <= 2.0**-48 * (x**2).sum()
    assert (one.out != two.out).any()


def test_slopes():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    twelve = alibi_slopes(12).tolist()
    assert twelve[:8] == alibi_slopes(8).tolist()
    assert twelve[8:] == [2.0**-x for x in (0.5, 1.5, 2.5, 3.5)]


@pytest.mark.parametrize("layer", range(4))
def test_slopes_of_layers(layer):
    """Slopes that are powers of two by fractions; those between by 60 digits: ALiBi's own rounding and one more."""
    got = lightning_slopes(12, layer, 4).tolist()
    factor = [1, Fraction(2, 3), Fraction(1, 3), 0][layer] + Fraction(1, 100_000)
    assert got[:8] == [float(factor / 2**i) for i in range(1, 9)]
    assert lightning_slopes(8, layer, 4).tolist() == got[:8]
    with mpmath.workdps(60):
        for x, power in zip(got[8:], (0.5, 1.5, 2.5, 3.5), strict=True):
            exact = mpmath.mpf(factor.numerator) / factor.denominator * mpmath.mpf(2) ** -power
            # the power is off by at most an ulp, 2**-52 of it, and the product by half of one
            assert abs(x - exact) <= 2 * mpmath.mpf(2) ** -52 * exact


def bucket(n, bidirectional, buckets, most):
    """T5's rule, its logarithm by 60 digits."""
    found = 0
    if bidirectional:
        buckets //= 2
        found, n = (buckets if n > 0 else 0), abs(n)
    else:
        n = max(-n, 0)
    near = buckets // 2
    if n < near:
        return found + n
    with mpmath.workdps(60):
        # an exact power lies on the edge, where 60 digits may fall short of it
        share = mpmath.log(mpmath.mpf(n) / near) / mpmath.log(mpmath.mpf(most) / near) * (buckets - near)
        return found + min(near + int(mpmath.floor(share + mpmath.mpf(10) ** -40)), buckets - 1)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (16, 20), (8, 1000)])
def test_buckets(both, buckets, most):
    x = np.arange(-most - 9, most + 10)
    got = t5_buckets(x, bidirectional=both, buckets=buckets, max_distance=most)
    assert got.tolist() == [bucket(n, both, buckets, most) for n in x.tolist()]


def by_powers(n, near, most, steps):
    """How many k below `steps` have (n / near)^steps >= (most / near)^k, by one comparison of integers each."""
    return sum(n**steps * near**k >= most**k * near**steps for k in range(1, steps))


@pytest.mark.parametrize(("buckets", "most"), [(64, 4096), (64, 2**31), (200, 300), (64, 2**62)])
def test_buckets_on_edges(buckets, most):
    """Near each edge, where a logarithm does not tell: powers of 2 lie on edges."""
    near = steps = buckets // 2
    edges = [round(near * (most / near) ** (k / steps)) for k in range(1, steps)]
    x = np.unique([min(max(e + i, near), most) for e in edges for i in (-1, 0, 1)])
    got = t5_buckets(-x, bidirectional=False, buckets=buckets, max_distance=most)
    assert got.tolist() == [near + by_powers(n, near, most, steps) for n in x.tolist()]


def test_the_largest_and_smallest_distances():
    """They share the last bucket of their side, in every type; one of -2**63 is not wrapped."""
    for dtype in (np.int8, np.uint8, np.int16, np.int64, np.uint64):
        info = np.iinfo(dtype)
        got = t5_buckets(np.array([info.min, 0, info.max], dtype), max_distance=100)
        assert got.tolist() == [0 if info.min == 0 else 15, 0, 31]
    assert t5_buckets(np.array([2**63 - 1, -(2**63)]), max_distance=2**63 - 1).tolist() == [31, 15]
    assert t5_buckets(np.zeros((2, 0), int)).shape == (2, 0)


def test_large_tables_do_not_take_longer(monkeypatch):
    """What is decided in integers is counted: at most the distances that are asked for, not each bucket."""
    asked, decide = [], positions._reaches
    monkeypatch.setattr(positions, "_reaches", lambda *a: asked.append(a) or decide(*a))
    x = np.array([3 * 2**27, 2**30, 2**30 + 1, 2**31])
    got = t5_buckets(-x, bidirectional=False, buckets=2**31, max_distance=2**31)
    assert got.tolist() == [3 * 2**27, 2**30, 2**30 + 1, 2**31 - 1]
    assert len(asked) <= len(x)


def test_a_bias_is_of_its_table():
    table = torch.arange(64, dtype=torch.bfloat16).reshape(32, 2).requires_grad_()
    got = t5_bias(table, 2, 3)
    assert (got.dtype, tuple(got.shape)) == (torch.bfloat16, (1, 2, 2, 3))
    assert got[0, 1, 0].tolist() == [1, 2 * 17 + 1, 2 * 18 + 1]


def test_bias():
    tables = np.random.default_rng(0).standard_normal((32, 3)).astype(np.float32)
    got = t5_bias(tables, 4, 9, offset=5)
    assert got.shape == (1, 3, 4, 9)
    for h, i, j in np.ndindex(3, 4, 9):
        assert got[0, h, i, j] == tables[bucket(j - i - 5, True, 32, 128), h]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: rotary_tables(4, 7), "dim: got 7, expected an even number; columns turn in pairs"),
        (lambda: rotary_tables(4, 0), "dim: got 0, expected a whole number from 2 on"),
        (lambda: rotary_tables(4, 8, base=1), "base: got 1, expected a number above 1"),
        (lambda: rotary_tables(4, 8, base=math.nan), "base: got nan, expected a finite number"),
        (
            lambda: rotary_tables(np.ones(3), 8),
            "positions: got float64, expected integers",
        ),
        (lambda: rotary_tables(4, 8, sections=(4,)), "expected integers, a row for each axis, with sections"),
        (
            lambda: rotary_tables(np.ones((2, 3), int), 8, sections=(1, 2)),
            r"sections: got \(1, 2\), expected 2 numbers, one for each axis of positions, that add up to 4, half",
        ),
        (
            lambda: rotary_tables(4, 8, scaling={"rope_type": "dynamic"}),
            "scaling: got rope_type 'dynamic', expected one",
        ),
        (lambda: rotary_tables(4, 8, scaling={"rope_type": "linear"}), "scaling: linear needs 'factor'"),
        (lambda: rotary_tables(4, 8, scaling={"factor": 2}), "scaling: default has no 'factor'; it has no numbers"),
        (
            lambda: rotary_tables(4, 2, scaling={"rope_type": "ntk", "factor": 2}),
            "scaling: ntk has no meaning for dim 2",
        ),
        (lambda: alibi_slopes(0), "heads: got 0, expected a whole number from 1 on"),
        (lambda: lightning_slopes(4, 2, 2), "layer: got 2, expected a whole number from 0 to 1"),
        (lambda: lightning_slopes(4, 0, 1), "layers: got 1, expected a whole number from 2 on"),
        (lambda: lightning_slopes(0, 0, 2), "heads: got 0, expected a whole number from 1 on"),
        (lambda: t5_buckets(np.ones(2)), "relative: got float64, expected integers"),
        (lambda: t5_buckets(np.arange(2), buckets=2), "buckets: got 2, expected a whole number from 4 to 2147483648"),
        (lambda: t5_buckets(np.arange(2), max_distance=8), "max_distance: got 8, expected a whole number from 9 to 9"),
        (lambda: rotary_tables([[1], [1, 2]], 8), r"positions: got \[\[1\], \[1, 2\]\], expected an array of integers"),
        (
            lambda: rotary_tables(np.array([2**64 - 1], np.uint64), 8),
            r"positions: got 18446744073709551615, expected numbers below 2\*\*63",
        ),
        (
            lambda: rotary_tables(3, 8, scaling="yarn"),
            "scaling: got 'yarn', expected a mapping with 'rope_type', or None",
        ),
        (lambda: rotary_tables(3, 8, scaling=[1]), r"scaling: got \[1\], expected a mapping"),
        (lambda: rotary_tables(3, 8, scaling=5), "scaling: got 5, expected a mapping"),
        (lambda: rotary_tables(3, 8, scaling={1: 2, "a": 3}), "scaling: default has no 1; it has no numbers"),
        (
            lambda: rotary_tables(3, 8, scaling=SCALED[4] | {"high_freq_factor": 1.0}),
            r"scaling\['high_freq_factor'\]: got 1, expected more than 'low_freq_factor', 1; between",
        ),
        (
            lambda: rotary_tables(3, 8, scaling=SCALED[4] | {"low_freq_factor": 5.0}),
            r"scaling\['high_freq_factor'\]: got 4, expected more than 'low_freq_factor', 5; between",
        ),
        (
            lambda: rotary_tables(3, 8, scaling=SCALED[3] | {"beta_fast": 1.0, "beta_slow": 32.0}),
            r"scaling\['beta_fast'\]: got 1, expected more than 'beta_slow', 32; between",
        ),
        (
            lambda: rotary_tables(np.zeros((1, 3), int), 8, sections=4),
            "sections: got 4, expected a sequence of int",
        ),
        (lambda: alibi_slopes(-(10**5000)), "heads: got a huge int, expected a whole number from 1 on"),
        (lambda: t5_buckets(np.arange(2), bidirectional=3), "bidirectional: got 3, expected True or False"),
        (
            lambda: t5_buckets(np.arange(2), buckets=2**40),
            "buckets: got 1099511627776, expected a whole number from 4 to",
        ),
        (lambda: t5_bias(np.ones((32, 2)), 2, 2, offset="a"), "offset: got 'a', expected a whole number from -46"),
        (lambda: t5_bias(np.ones((32, 2)), 2, 2, offset=0.5), "offset: got 0.5, expected a whole number"),
        (lambda: t5_bias(np.ones((32, 2)), 2, 2, offset=2**70), "offset: got 1180591620717411303424, expected a whole"),
        (
            lambda: t5_bias(np.ones((32, 2)), 2, 2, offset=np.arange(2)),
            r"offset: got array\(\[0, 1\]\), expected a",
        ),
        (lambda: t5_bias([[1.0]], 2, 2), "table: got list, expected an array"),
        (lambda: t5_bias(np.ones(3), 2, 2), r"table: got shape \(3,\), expected \(buckets, heads\)"),
    ],
)
def test_errors(call, text):
    with pytest.raises(InvalidInput, match=text):
        call()
