"""Words that the models say, against those that loops move which compute in a memory of limited size."""

import math
import re
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.functions.costs import (
    block_sparse_io,
    crossover,
    flash_io,
    flash_tile,
    hbm_bytes,
    square_tiles_io,
    standard_io,
    triple_io,
    triple_tile,
)
from refattn.theory.counting import Memory, Slow
from refattn.theory.io_loops import flash, scores_in_slow_memory, triple

WHOLE = 2**62
"""Words of a memory in which everything fits."""
SIZES = [(24, 4), (37, 4), (25, 6), (50, 3), (7, 8), (1, 1)]
"""(n, d), with tiles that divide n and that do not."""


def spans(n, size):
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def call(n, d, count=3):
    return np.random.default_rng(n + d).standard_normal((count, n, d)) / 2


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def backward(q, k, v, dout, memory, tile, blocks=None):
    """Return (dq, dk, dv) by tiles, keys outside, and the memory that counted; scale 1."""
    n, d = q.shape
    mask = np.ones((n, n), bool)
    if blocks is not None:
        mask = np.kron(blocks, np.ones(tile, bool)).astype(bool)[:n, :n]
    s = np.where(mask, q @ k.T, -np.inf)
    lse = np.log(np.exp(s).sum(1, where=mask))
    fast = Memory(memory)
    q_, k_, v_, o_, do_, lse_ = map(Slow, (q, k, v, softmax(s) @ v, dout, lse))
    delta, dq, dk, dv = map(Slow, (np.zeros(n), 0 * q, 0 * k, 0 * v))
    for at in range(n):
        o, do = fast.load(o_, at), fast.load(do_, at)
        fast.store(delta, at, np.array(o @ do))
        fast.free(o, do)
    for b, js in enumerate(spans(n, tile[1])):
        if blocks is not None and not blocks[:, b].any():
            continue
        kj, vj = fast.load(k_, js), fast.load(v_, js)
        dkj, dvj = fast.new(len(kj), d), fast.new(len(kj), d)
        for a, at in enumerate(spans(n, tile[0])):
            if blocks is not None and not blocks[a, b]:
                continue
            qi, do, row, dl, dqi = (fast.load(x, at) for x in (q_, do_, lse_, delta, dq))
            p, ds = fast.new(len(qi), len(kj)), fast.new(len(qi), len(kj))
            p[:] = np.exp(qi @ kj.T - row[:, None])
            dvj += p.T @ do
            ds[:] = p * (do @ vj.T - dl[:, None])
            dqi += ds @ kj
            dkj += ds.T @ qi
            fast.store(dq, at, dqi)
            fast.free(qi, do, row, dl, dqi, p, ds)
        fast.store(dk, js, dkj)
        fast.store(dv, js, dvj)
        fast.free(kj, vj, dkj, dvj)
    return (dq.data, dk.data, dv.data), fast


def gradients(q, k, v, dout, mask=None):
    """Return the gradients of attention by PyTorch's differentiation."""
    q, k, v = (torch.tensor(x, requires_grad=True) for x in (q, k, v))
    s = q @ k.T
    if mask is not None:
        s = s.masked_fill(torch.tensor(~mask), -math.inf)
    torch.softmax(s, -1).matmul(v).backward(torch.tensor(dout))
    return [x.grad.numpy() for x in (q, k, v)]


def largest(found, right):
    """Return the largest difference, over what float64 may lose here.

    Sums have at most n + d < 64 terms of numbers below 64, a few of them one after another: 64 · 64 · 64 roundings of a
    number of 64 are more than there are, and a wrong term is of order 1.
    """
    return max(abs(a - b).max() for a, b in zip(found, right, strict=True)) / (64**4 * 2.0**-53)


@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("rule", ["paper", "fits"])
@pytest.mark.parametrize("times", [1, 2.3, 5.1, 12, 40])
def test_flash_moves_what_the_loops_move(n, d, rule, times):
    memory = int((7 * d + 4) * times)
    q, k, v, dout = call(n, d, 4)
    limit = memory if rule == "fits" else WHOLE
    words = flash_io(n, d, memory, rule=rule)
    out, fast, _ = flash(q, k, v, limit, tile=flash_tile(d, memory, rule=rule))
    assert fast.words == words.forward
    assert largest([out], [softmax(q @ k.T) @ v]) < 1
    grads, fast = backward(q, k, v, dout, limit, flash_tile(d, memory, rule=rule, backward=True))
    assert fast.words == words.backward
    assert largest(grads, gradients(q, k, v, dout)) < 1


@pytest.mark.parametrize("d", [1, 2, 5, 16, 33])
def test_a_tile_that_fits_is_the_largest(d):
    def needed(c, backward):
        r = min(c, d)
        if backward:
            return 3 * r * d + 4 * c * d + 2 * r * c + 2 * r
        return 2 * r * d + 2 * c * d + r * c + 4 * r

    for backward, least in ((False, 5 * d + 4), (True, 7 * d + 4)):
        assert needed(1, backward) <= least
        for memory in [*range(least, 12 * d * d + 40 * d), 2**20]:
            rows, columns = flash_tile(d, memory, rule="fits", backward=backward)
            assert rows == min(columns, d)
            assert needed(columns, backward) <= memory < needed(columns + 1, backward)


def test_the_paper_s_tile_and_what_it_needs():
    for d, memory in ((64, 8192), (64, 100_000), (5, 21), (3, 12)):
        columns = math.ceil(Fraction(memory, 4 * d))
        assert flash_tile(d, memory) == flash_tile(d, memory, backward=True) == (min(columns, d), columns)
    rows, columns = flash_tile(64, 8192)
    q, k, v = call(64, 64)
    with pytest.raises(MemoryError):  # q, k, v and out fill it, and the scores do not fit
        flash(q, k, v, 8192, tile=(rows, columns))


def test_figures_at_4096_tokens():
    """What was measured with a tile counter at n = 4096, d = 64: M from 8192 to 131072, and by density at 16384."""
    n, d = 4096, 64
    constants = [flash_io(n, d, m).forward * m / (n * d) ** 2 for m in (2**13, 2**14, 2**15, 2**16, 2**17)]
    assert constants == [12.3125, 12.375, 12.5, 12.75, 13.25]  # powers of two: exactly
    for density, millions in ((1, 51.9), (0.51, 26.9), (0.27, 14.4), (0.12, 6.6)):
        # the density is rounded to two digits, the words to three
        low, high = (flash_io(n, d, 2**14, density=density + x).forward for x in (-0.005, 0.005 * (density < 1)))
        assert low <= (millions + 0.05) * 1e6
        assert high >= (millions - 0.05) * 1e6


def test_with_little_memory_flash_moves_more_than_the_standard_at_its_best():
    n, d, memory = 4096, 64, 8192
    q, k, v = call(n, d)
    words = flash(q, k, v, WHOLE, tile=flash_tile(d, memory))[1].words
    assert words == flash_io(n, d, memory).forward == 103284736
    assert standard_io(n, d).forward == 68157440 < words
    # but those words need products with all of q, k and v at hand: by tiles in the same memory they are more
    assert square_tiles_io(n, d, memory) > words
    m = crossover(lambda m: flash_io(n, d, m).forward, lambda m: standard_io(n, d).forward, 2**15)
    assert m == next(m for m in range(2**8, 2**15) if flash_io(n, d, m).forward < standard_io(n, d).forward)
    assert memory < m < 2 * memory


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_the_standard_moves_what_its_steps_move(n, d):
    q, k, v, dout = call(n, d, 4)
    fast = Memory(WHOLE)
    q_, k_, v_, do_ = map(Slow, (q, k, v, dout))
    s, p, dp, ds = (Slow(np.zeros((n, n))) for _ in range(4))
    out, dq, dk, dv = (Slow(np.zeros((n, d))) for _ in range(4))

    def step(to, f, *of):
        fast.store(to, ..., f(*(fast.load(x, ...) for x in of)))

    step(s, lambda q, k: q @ k.T, q_, k_)
    step(p, softmax, s)
    step(out, lambda p, v: p @ v, p, v_)
    words = standard_io(n, d)
    assert fast.words == words.forward
    step(dv, lambda p, do: p.T @ do, p, do_)
    step(dp, lambda do, v: do @ v.T, do_, v_)
    step(ds, lambda p, dp: p * (dp - (p * dp).sum(1, keepdims=True)), p, dp)
    step(dq, lambda ds, k: ds @ k, ds, k_)
    step(dk, lambda ds, q: ds.T @ q, ds, q_)
    assert fast.words == words.forward + words.backward
    assert largest([x.data for x in (dq, dk, dv)], gradients(q, k, v, dout)) < 1


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_square_tiles_and_triples_move_what_their_loops_move(n, d):
    q, k, v, k2, v2 = call(n, d, 5)
    for memory in (5, 16, 40, 161, 500):
        assert scores_in_slow_memory(q, k, v, memory)[1].words == square_tiles_io(n, d, memory)
    for memory in (8 * d + 5, 8 * d + 6, 20 * d * d + 30, 900):
        _, fast, b = triple(q[:12], (k[:12], k2[:12]), (v[:12], v2[:12]), memory)
        assert (fast.words, b) == (triple_io(min(n, 12), d, memory), triple_tile(d, memory))


@pytest.mark.parametrize("library", [np.asarray, torch.tensor, jnp.asarray])
@pytest.mark.parametrize(("n", "tile"), [(24, (4, 6)), (25, (4, 6)), (7, (16, 256)), (30, (1, 1)), (23, (7, 3))])
def test_blocks_move_what_the_loops_move(n, tile, library):
    d, rng = 3, np.random.default_rng(n)
    q, k, v, dout = call(n, d, 4)
    for density in (0.2, 0.5, 1):
        blocks = rng.random((-(-n // tile[0]), -(-n // tile[1]))) < density
        blocks[np.arange(len(blocks)), rng.integers(0, blocks.shape[1], len(blocks))] = True  # no empty row
        words = block_sparse_io(library(blocks), n, d, tile)
        assert flash(q, k, v, WHOLE, blocks, tile)[1].words == words.forward
        grads, fast = backward(q, k, v, dout, WHOLE, tile, blocks)
        assert fast.words == words.backward
        mask = np.kron(blocks, np.ones(tile, bool)).astype(bool)[:n, :n]
        assert largest(grads, gradients(q, k, v, dout, mask)) < 1
    nothing = block_sparse_io(np.zeros_like(blocks), n, d, tile)
    assert (nothing.forward, nothing.backward) == (0, 2 * n * d + n)


def test_a_density_is_a_mask_s_where_tiles_divide_and_all_keys_are_read():
    n, d, memory = 24, 3, 36
    rows, columns = flash_tile(d, memory)
    assert (n % rows, n % columns) == (0, 0)
    blocks = (np.arange(n // rows)[:, None] + np.arange(n // columns)) % 4 == 0
    density = Fraction(int(blocks.sum()), blocks.size)
    assert density == Fraction(1, 4)
    assert flash_io(n, d, memory, density=density) == block_sparse_io(blocks, n, d, (rows, columns))
    assert type(flash_io(n, d, memory).forward) is int


def test_where_only_the_forward_tile_fits_there_is_no_backward():
    d = 6
    for memory in range(5 * d + 4, 7 * d + 10):
        words = flash_io(9, d, memory, rule="fits")
        assert words.forward == flash(*call(9, d), memory)[1].words
        assert (words.backward is None) == (memory < 7 * d + 4)


def test_bytes_of_a_kernel_are_those_of_its_arrays():
    q, k = np.zeros((2, 6, 5, 8), np.float16), np.zeros((2, 3, 7, 8), np.float16)
    lse = np.zeros((2, 6, 5), np.float32)
    assert hbm_bytes(2, 6, 3, 5, 7, 8) == 2 * q.nbytes + 2 * k.nbytes + lse.nbytes
    assert hbm_bytes(2, 6, 3, 5, 7, 8, item=4) == 4 * q.nbytes + 4 * k.nbytes + lse.nbytes


TOO_LITTLE = "words, expected at least"


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda: flash_io(0, 4, 100), "n: got 0, expected a whole number from 1 on"),
        (lambda: flash_io(4, 0, 100), "d: got 0, expected a whole number from 1 on"),
        (lambda: flash_io(4, 4, 0), "memory: got 0, expected a whole number from 1 on"),
        (lambda: flash_io(4, 4, 15), f"memory: got 15 {TOO_LITTLE} 16: a row each of q, k, v and out; give more"),
        (lambda: flash_tile(4, 23, rule="fits"), f"memory: got 23 {TOO_LITTLE} 24: "),
        (lambda: flash_tile(4, 31, rule="fits", backward=True), f"memory: got 31 {TOO_LITTLE} 32: "),
        (lambda: flash_tile(4, 31, rule="best"), "rule: got 'best', expected 'paper' or 'fits'"),
        (lambda: flash_io(4, 4, 99, density=1.5), "density: got 1.5, expected a finite number from 0 to 1"),
        (lambda: standard_io(0, 1), "n: got 0, expected"),
        (lambda: standard_io(1, 0), "d: got 0, expected"),
        (lambda: square_tiles_io(3, 3, 4), f"memory: got 4 {TOO_LITTLE} 5: "),
        (lambda: square_tiles_io(0, 3, 9), "n: got 0, expected"),
        (lambda: square_tiles_io(3, 0, 9), "d: got 0, expected"),
        (lambda: triple_tile(2, 20), f"memory: got 20 {TOO_LITTLE} 21: "),
        (lambda: triple_io(0, 2, 30), "n: got 0, expected"),
        (lambda: triple_tile(0, 20), "d: got 0, expected"),
        (lambda: hbm_bytes(1, 1, 0, 1, 1, 1), "heads_kv: got 0, expected"),
        (lambda: hbm_bytes(1, 1, 1, 1, 1, 1, 0), "item: got 0, expected"),
        (lambda: block_sparse_io(np.ones((2, 2)), 4, 2, (2, 2)), "blocks: got float64, expected bool; compare with 0"),
        (lambda: block_sparse_io(np.ones((2, 1), bool), 4, 2, (2, 2)), "blocks: shape is (2, 1), expected (2, 2)"),
        (lambda: block_sparse_io([[True]], 1, 2, (2, 2)), "blocks: got list, expected an array"),
        (lambda: block_sparse_io(np.ones((2, 2), bool), 4, 2, (2, 0)), "tile[1]: got 0, expected"),
        (lambda: block_sparse_io(np.ones((2, 2), bool), 0, 2, (2, 2)), "n: got 0, expected"),
        (lambda: block_sparse_io(np.ones((2, 2), bool), 4, 0, (2, 2)), "d: got 0, expected"),
    ],
)
def test_bad_input_is_refused(wrong, text):
    with pytest.raises(InvalidInput, match=re.escape(text)):
        wrong()
