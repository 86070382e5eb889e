"""Attention to codes beside attention to repeated codes; moving averages beside fractions, a norm beside PyTorch's."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.functions.codebook import (
    Codebook,
    batch_norm,
    codebook_attention,
    codebook_step,
    denormalised,
    nearest_code,
)
from refattn.functions.parts import attend

from .test_parts import KINDS

U = 2.0**-53


def draw(seed, b=1, h=2, n=9, m=5, d=4, d_v=3):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((b, h, *s)) for s in ((n, d), (m, d), (m, d_v)))


def test_it_is_attention_to_repeated_codes():
    q, k, v = draw(0)
    counts = np.array([3, 0, 1, 7, 2])
    repeated = [np.repeat(x, counts, axis=2) for x in (k, v)]
    assert (codebook_attention(q, k, v, counts) == attend(q, *repeated)[0]).all()  # both are correctly rounded
    assert (codebook_attention(q, k, v, counts, scale=0.3) == attend(q, *repeated, scale=0.3)[0]).all()
    # without weights it is another: the control
    assert np.abs(codebook_attention(q, k, v, np.ones(5)) - attend(q, *repeated)[0]).max() > 0.1


def test_each_token_its_own_code_is_exact_and_fewer_are_not():
    q, k, v = draw(1, n=12, m=12)
    dense = attend(q, k, v)[0]
    assert (codebook_attention(q, k, v, np.ones(12, int)) == dense).all()
    assert (codebook_attention(q, k, v, np.full(12, 1000.0)) == dense).all()  # only quotients count
    labels = np.arange(12) // 3
    codes, values = (np.stack([x[:, :, labels == c].mean(2) for c in range(4)], 2) for x in (k, v))
    assert np.abs(codebook_attention(q, codes, values, np.bincount(labels)) - dense).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_every_library_gives_the_same(kind):
    arrays = [x.astype(np.float32) for x in (*draw(2), np.arange(5.0))]
    given = [KINDS[kind](x) for x in arrays]
    out = codebook_attention(*given)
    assert type(out) is type(given[0])
    assert (np.asarray(out) == codebook_attention(*arrays)).all()
    x, book = np.array([[1.0, 0], [3, 1], [0, 0]], np.float32), (np.float32([[0, 0], [2, 0]]), np.float32([1, 1]))
    start = [*book, np.float32([[1, 0], [0, 4]])]
    (codes, sizes, sums), labels = codebook_step(KINDS[kind](x), Codebook(*map(KINDS[kind], start)), decay=0.5)
    assert np.asarray(labels).tolist() == [0, 1, 0]
    assert np.asarray(sums).tolist() == [[1, 0], [1.5, 2.5]]
    # (1.5 + 1e-5)/(2.5 + 2e-5)·2.5 in float32, four roundings, and a division
    want = [(1.5 + 1e-5) / (2.5 + 2e-5) * 2.5, (1 + 1e-5) / (2.5 + 2e-5) * 2.5]
    assert np.abs(np.asarray(sizes) - want).max() <= 5 * 2.0**-24 * 1.5
    assert np.abs(np.asarray(codes) - np.asarray(sums) / np.array(want)[:, None]).max() <= 6 * 2.0**-24 * 2.5
    moved = batch_norm(*map(KINDS[kind], (x, np.float32([0, 0]), np.float32([1, 1]))))
    assert all(type(y) is type(given[0]) for y in moved)


def test_steps_by_fractions():
    rng = np.random.default_rng(0)
    m, d, decay, epsilon = 3, 2, Fraction(3, 4), Fraction(1, 2**17)
    codes = rng.integers(-3, 4, (m, d)).astype(float)
    book = Codebook(codes, np.ones(m), codes.copy())
    size, sums = [Fraction(1)] * m, [[Fraction(x) for x in row] for row in codes]
    code = [row[:] for row in sums]
    for step in range(3):
        x = rng.integers(-4, 5, (7, d)).astype(float)
        rows = [[Fraction(y) for y in row] for row in x]
        far = [[sum((a - b) ** 2 for a, b in zip(r, c, strict=True)) for c in code] for r in rows]
        want = [row.index(min(row)) for row in far]
        book, labels = codebook_step(x, book, decay=float(decay), epsilon=float(epsilon))
        assert labels.tolist() == want
        size = [decay * s + (1 - decay) * want.count(c) for c, s in enumerate(size)]
        total = sum(size)
        size = [(s + epsilon) / (total + m * epsilon) * total for s in size]
        for c in range(m):
            mine = [r for r, w in zip(rows, want, strict=True) if w == c]
            sums[c] = [decay * s + (1 - decay) * sum(r[e] for r in mine) for e, s in enumerate(sums[c])]
            code[c] = [s / size[c] for s in sums[c]]
        # twelve roundings a step, of positive numbers for sizes, and of sums below 64 for sums
        steps = (step + 1) * 12
        assert all(abs(Fraction(a) - b) <= steps * U * b for a, b in zip(book.sizes, size, strict=True))
        assert all(abs(Fraction(a) - b) <= steps * U * 64 for p, q in zip(book.sums, sums, strict=True)
                   for a, b in zip(p, q, strict=True))  # fmt: skip
        assert all(abs(Fraction(a) - b) <= 3 * steps * U * 64 / min(1, *size) for p, q in
                   zip(book.codes, code, strict=True) for a, b in zip(p, q, strict=True))  # fmt: skip
        assert abs(Fraction(book.sizes.sum()) - total) <= steps * U * total  # smoothing keeps the sum


def test_ties_go_to_the_lower_code():
    assert nearest_code(np.array([[0.0], [2.0]]), np.array([[1.0], [-1.0], [1.0], [3.0]])).tolist() == [0, 0]
    near = np.array([[1e8 + 1.0], [1e8 + 2.0]])  # |x|² + |c|² - 2x·c would be 0 for both in float64
    assert nearest_code(near, near).tolist() == [0, 1]


def test_the_norm_is_pytorchs():
    rng = np.random.default_rng(0)
    peer = torch.nn.BatchNorm1d(3, affine=False).double()
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for _ in range(2):
        x = torch.tensor(rng.standard_normal((20, 3)) * 4 + 2)
        theirs = peer(x)
        ours, mean, variance = batch_norm(x, mean, variance)
        # means and variances of 20 numbers below 32 (their squares below 256), each sum off by 20 roundings
        assert (ours - theirs).abs().max() <= 4 * 20 * U * 256
        assert (mean - peer.running_mean).abs().max() <= 20 * U * 32
        assert (variance - peer.running_var).abs().max() <= 20 * U * 256
    codes = batch_norm(x, mean, variance)[0]
    own, spread = x.mean(0), x.var(0, correction=0)
    assert (denormalised(codes, own, spread) - x).abs().max() <= 4 * 20 * U * 256


def test_errors():
    q, k, v = draw(0)
    for change, text in (
        ({"counts": np.ones(4)}, "counts: shape is (4,), expected (5), each at least 1"),
        ({"counts": -np.ones(5)}, "counts: expected finite numbers of at least 0, and one above it"),
        ({"counts": np.zeros(5)}, "counts: expected finite numbers of at least 0, and one above it"),
        ({"codes": torch.tensor(k)}, "codes: is an array of torch, expected numpy's, as query is"),
    ):
        with pytest.raises(InvalidInput, match=re.escape(text)):
            codebook_attention(**{"query": q, "codes": k, "values": v, "counts": np.ones(5)} | change)
    x, book = np.ones((4, 2)), Codebook(np.ones((3, 2)), np.ones(3), np.ones((3, 2)))
    with pytest.raises(InvalidInput, match=re.escape("sizes: shape is (2,), expected (3)")):
        codebook_step(x, book._replace(sizes=np.ones(2)))
    with pytest.raises(InvalidInput, match=re.escape("epsilon: got 0, expected a number in (0, 1]")):
        codebook_step(x, book, epsilon=0)
    with pytest.raises(InvalidInput, match="x's rows: got 1, expected a whole number from 2 on"):
        batch_norm(x[:1], x[0], x[0])
