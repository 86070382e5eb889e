"""Tables, slopes and buckets against mpmath and loops."""

import math

import mpmath
import numpy as np
import pytest

from refattn import InvalidInput, Problem, evaluate
from refattn.functions.positions import alibi_slopes, rotary_tables, t5_bias, t5_buckets


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
            r"positions: got float64 of shape \(3,\), expected integers on one axis",
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
        (lambda: t5_buckets(np.ones(2)), "relative: got float64, expected integers"),
        (lambda: t5_buckets(np.arange(2), buckets=2), "buckets: got 2, expected a whole number from 4 on"),
        (lambda: t5_buckets(np.arange(2), max_distance=8), "max_distance: got 8, expected a whole number from 9 on"),
        (lambda: t5_bias(np.ones(3), 2, 2), r"table: got shape \(3,\), expected \(buckets, heads\)"),
    ],
)
def test_errors(call, text):
    with pytest.raises(InvalidInput, match=text):
        call()
