"""Operations that the models say, against numbers that count what is done with them."""

import itertools
import math
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from refattn import InvalidInput
from refattn.functions.costs import (
    Operations,
    combiner_axial,
    combiner_fixed,
    combiner_logsparse,
    ecoformer_operations,
    moba_operations,
    routing_operations,
    softmax_operations,
    window_operations,
)
from refattn.theory.counting import counted, plain

SIZES = [(1, 1), (2, 3), (5, 2), (7, 4), (12, 3), (16, 1)]
"""(n, d)."""


class Head:
    """One head's tokens as numbers that count; weights are random, as the count does not depend on them."""

    def __init__(self, n, d):
        self.rng, self.tally = np.random.default_rng(n), Counter()
        self.q, self.k, self.v = (self.count(self.rng.standard_normal((n, d))) for _ in range(3))

    def count(self, x):
        return counted(np.asarray(x), self.tally)

    def attend(self, q, keys, values):
        """Return the sum of values, after the scores; weights themselves are given and not counted."""
        keys, values = np.array(keys), np.array(values)
        scores = keys @ q
        return self.count(np.abs([plain(s) for s in scores]) + 1) @ values

    @property
    def found(self):
        assert set(self.tally) <= {"multiply", "add", "sign"}
        return Operations(self.tally["multiply"], self.tally["add"])


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_softmax(n, d):
    head = Head(n, d)
    for i in range(n):
        head.attend(head.q[i], head.k, head.v)
    assert softmax_operations(n, d) == head.found


@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize(
    ("bits", "anchors", "shared"), [(3, None, False), (1, None, True), (4, 5, True), (2, 1, False)]
)
def test_ecoformer(n, d, bits, anchors, shared):
    head = Head(n, d)

    def code(x):
        features = x
        if anchors:
            places, mean = head.count(head.rng.random((anchors, d))), head.count(head.rng.random(anchors))
            away = [p - x for p in places]
            scaled = [(a @ a) * -0.5 for a in away]
            features = head.count([math.exp(plain(s)) for s in scaled]) - mean
        weights = head.count(head.rng.standard_normal((bits, len(features))))
        return counted(np.array([1 if plain(b) > 0 else -1 for b in weights @ features]), head.tally, sign=True)

    of_k = np.array([code(x) for x in head.k])
    of_q = of_k if shared else np.array([code(x) for x in head.q])
    moments, codes, bias = of_k.T @ head.v, np.sum(of_k, axis=0), (bits + 1) * np.sum(head.v, axis=0)
    for h in of_q:
        h @ moments + bias
        h @ codes + (bits + 1) * n
    assert ecoformer_operations(n, d, bits, anchors=anchors, shared=shared) == head.found


def test_ecoformer_s_energy_and_where_it_is_less():
    operations = ecoformer_operations(50, 8, 16)
    exact = operations.multiplies * Fraction("3.7") + operations.adds * Fraction("0.9")
    assert operations.energy() == exact
    assert operations.energy(1, 0) == operations.multiplies
    assert operations.energy(0, 1) == operations.adds

    def cheaper(n, **prices):
        return ecoformer_operations(n, 32, 16).energy(**prices) < softmax_operations(n, 32).energy(**prices)

    first = next(n for n in range(1, 999) if cheaper(n))
    assert first > 1
    assert all(cheaper(n) == (n >= first) for n in range(1, 400))
    # hashing is what it pays for: with free multiplications it is worth it later
    assert next(n for n in range(1, 999) if cheaper(n, multiply=0)) > first


@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize(("clusters", "window", "shared"), [(1, None, False), (3, None, True), (4, 1, False)])
def test_routing(n, d, clusters, window, shared):
    head = Head(n, d)
    means = head.count(head.rng.random((clusters, d)))
    places = [[plain(x @ m) for x in head.q] for m in means]
    if not shared:
        for m, k in itertools.product(means, head.k):
            m @ k
    w = window or math.ceil(n / clusters)
    for scores in places:
        taken = sorted(range(n), key=lambda i: -scores[i])[:w]
        for i in taken:
            head.attend(head.q[i], head.k[taken], head.v[taken])
    assert routing_operations(n, d, clusters, window, shared=shared) == head.found


def test_routing_is_least_near_the_root():
    """2d(nk + n²/k) where k divides n, whose least is at sqrt(n): there 4n^1.5·d."""
    for root in (4, 6, 12, 64):
        n, d = root**2, 3
        divisors = [k for k in range(1, n + 1) if n % k == 0]
        assert min(divisors, key=lambda k: routing_operations(n, d, k).multiplies) == root
        assert routing_operations(n, d, root).multiplies == 4 * d * root**3


def summed(head, places):
    """Return what a summary of some tokens is: attention by their largest query features."""
    largest = head.count(np.array([[plain(x) for x in head.q[i]] for i in places]).max(0))
    return head.attend(largest, head.k[places], head.v[places])


def pooled(head, places):
    return head.count(np.array([[plain(x) for x in head.k[i]] for i in places]).max(0))


@pytest.mark.parametrize(("n", "d", "block"), [(1, 1, 1), (6, 2, 2), (12, 3, 4), (12, 1, 12), (10, 2, 1), (9, 4, 3)])
def test_combiner_fixed(n, d, block):
    head = Head(n, d)
    blocks = [list(range(b, b + block)) for b in range(0, n, block)]
    summaries = [summed(head, b) for b in blocks[:-1]]
    for i in range(n):
        r = i // block
        own = list(range(r * block, i + 1))
        keys = [*head.k[own], *(pooled(head, b) for b in blocks[:r])]
        head.attend(head.q[i], keys, [*head.v[own], *summaries[:r]])
    assert combiner_fixed(n, d, block) == head.found


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 9, 16, 17, 21, 33])
def test_combiner_logsparse(n):
    head, d, summaries = Head(n, 2), 2, {}
    for i in range(n):
        start, keys, values = 0, [head.k[i]], [head.v[i]]
        for level in reversed(range(i.bit_length())):
            if not i >> level & 1:
                continue
            span = list(range(start, start + 2**level))
            start += 2**level
            if len(span) > 1 and span[0] not in summaries.setdefault(level, {}):
                summaries[level][span[0]] = summed(head, span)
            keys.append(pooled(head, span) if len(span) > 1 else head.k[span[0]])
            values.append(summaries[level][span[0]] if len(span) > 1 else head.v[span[0]])
        assert start == i  # all tokens before, each once
        head.attend(head.q[i], keys, values)
    assert combiner_logsparse(n, d) == head.found


def test_combiner_logsparse_has_half_n_log_n_spans():
    for level in range(1, 11):
        n, d = 2**level, 1
        # each of the level - 1 sizes from 2 has spans on every other place: n/2 weights of summaries at each
        weights, summaries = n + n * level // 2, (level - 1) * n // 2
        assert combiner_logsparse(n, d).multiplies == 2 * d * (weights + summaries)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (5, 1), (2, 2), (3, 4), (4, 3)])
def test_combiner_axial(rows, columns):
    d = 2
    head, summaries = Head(rows * columns, d), {}

    def at(r, c):
        return r * columns + c

    def summary(kind, *of):
        """Return a summary by its tokens, made once."""
        if (kind, *of) not in summaries:
            summaries[kind, *of] = summed(head, list(of))
        return pooled(head, list(of)), summaries[kind, *of]

    for r, c in itertools.product(range(rows), range(columns)):
        direct = [*(at(a, c) for a in range(r)), *(at(r, b) for b in range(c + 1))]
        seen = [(head.k[j], head.v[j]) for j in direct]
        if r > 0:
            seen += [summary("down", *(at(a, b) for a in range(r))) for b in range(columns) if b != c]
        for a in range(r):
            if c > 0:
                seen.append(summary("right", *(at(a, b) for b in range(c))))
            if c < columns - 1:
                seen.append(summary("left", *(at(a, b) for b in range(c + 1, columns))))
        head.attend(head.q[at(r, c)], *zip(*seen, strict=True))
    assert combiner_axial(rows, columns, d) == head.found


def test_combiner_axial_is_of_order_n_to_three_halves():
    """Each token has fewer than 4(R + C) weights, each of the 3n summaries at most R + C: for R = C, 2d·14·n^1.5."""
    for side in (2, 8, 32, 128):
        multiplies = combiner_axial(side, side, 1).multiplies
        assert side**3 < multiplies < 2 * (8 + 6) * side**3


@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize(("left", "right"), [(0, 0), (2, 0), (3, 1), (1, 30), (30, 30), (0, 2)])
def test_windows(n, d, left, right):
    head = Head(n, d)
    for i in range(n):
        seen = slice(max(0, i - left), i + right + 1)
        head.attend(head.q[i], head.k[seen], head.v[seen])
    assert window_operations(n, d, left, right) == head.found
    assert window_operations(n, d, n, n) == softmax_operations(n, d)


@pytest.mark.parametrize(("n", "d"), [*SIZES, (11, 2), (17, 3)])
@pytest.mark.parametrize(("block", "chosen"), [(1, 1), (1, 3), (3, 2), (4, 1), (4, 99), (40, 2)])
def test_moba(n, d, block, chosen):
    head = Head(n, d)
    means = [np.sum(head.k[b : b + block], axis=0) for b in range(0, n - block, block)]
    for i in range(n):
        r = i // block
        gates = [plain(head.q[i] @ m) for m in means[:r]]
        best = sorted(range(r), key=lambda b: -gates[b])[: chosen - 1]
        seen = [j for b in best for j in range(b * block, b * block + block)] + list(range(r * block, i + 1))
        head.attend(head.q[i], head.k[seen], head.v[seen])
    assert moba_operations(n, d, block, chosen) == head.found


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda: softmax_operations(0, 1), "n: got 0, expected a whole number from 1 on"),
        (lambda: softmax_operations(1, 0), "d: got 0, expected"),
        (lambda: softmax_operations(1, 1).energy(multiply=-1), "multiply: got -1, expected a finite number from 0 on"),
        (lambda: softmax_operations(1, 1).energy(add=math.nan), "add: got nan, expected"),
        (lambda: ecoformer_operations(0, 1, 1), "n: got 0, expected"),
        (lambda: ecoformer_operations(1, 0, 1), "d: got 0, expected"),
        (lambda: ecoformer_operations(1, 1, 0), "bits: got 0, expected"),
        (lambda: ecoformer_operations(1, 1, 1, anchors=0), "anchors: got 0, expected"),
        (lambda: routing_operations(0, 1, 1), "n: got 0, expected"),
        (lambda: routing_operations(1, 0, 1), "d: got 0, expected"),
        (lambda: routing_operations(1, 1, 0), "clusters: got 0, expected"),
        (lambda: routing_operations(4, 1, 2, 5), "window: got 5, expected a whole number from 1 to 4"),
        (lambda: combiner_fixed(0, 1, 1), "n: got 0, expected"),
        (lambda: combiner_fixed(1, 0, 1), "d: got 0, expected"),
        (lambda: combiner_fixed(1, 1, 0), "block: got 0, expected"),
        (lambda: combiner_fixed(6, 1, 4), "block: got 4, which must divide n, 6; pad n or take another block"),
        (lambda: combiner_logsparse(0, 1), "n: got 0, expected"),
        (lambda: combiner_logsparse(1, 0), "d: got 0, expected"),
        (lambda: combiner_axial(0, 1, 1), "rows: got 0, expected"),
        (lambda: combiner_axial(1, 0, 1), "columns: got 0, expected"),
        (lambda: combiner_axial(1, 1, 0), "d: got 0, expected"),
        (lambda: window_operations(0, 1, 1), "n: got 0, expected"),
        (lambda: window_operations(1, 0, 1), "d: got 0, expected"),
        (lambda: window_operations(1, 1, -1), "left: got -1, expected a whole number from 0 on"),
        (lambda: window_operations(1, 1, 1, -1), "right: got -1, expected"),
        (lambda: moba_operations(0, 1, 1, 1), "n: got 0, expected"),
        (lambda: moba_operations(1, 0, 1, 1), "d: got 0, expected"),
        (lambda: moba_operations(1, 1, 0, 1), "block: got 0, expected"),
        (lambda: moba_operations(1, 1, 1, 0), "chosen: got 0, expected"),
    ],
)
def test_bad_input_is_refused(wrong, text):
    with pytest.raises(InvalidInput, match=re.escape(text)):
        wrong()
