"""Chains of attention: planted ones, loops over them, and a Markov model whose marginal is enumerated exactly."""

import itertools
import math
import re
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.arrays import kind_of
from refattn.functions.chain import RATIOS, attention_chain, chain_marginal, low_entropy_heads

KINDS = {"numpy": np.asarray, "torch": torch.asarray, "jax": jnp.asarray}
U = 2.0**-53


def heads_by_loop(attention, keep, reduce):
    """Return what low_entropy_heads returns, number by number; sums by fsum."""
    layers, heads, response, tokens = attention.shape
    first = tokens - response
    reduced = np.zeros((response, tokens))
    kept = np.zeros((layers, heads, response), bool)
    for r in range(response):
        rows = []
        for layer, head in itertools.product(range(layers), range(heads)):
            row = attention[layer, head, r].tolist()
            for distance in range(1, 11):
                row[first + r - distance] *= RATIOS[distance - 1]
            row[0] = row[first + r] = 0
            total = math.fsum(row) + 1e-12
            p = [x / total for x in row]
            rows.append((math.fsum(-x * math.log(x) for x in p if x), layer, head, p))
        best = sorted(rows)[:keep]
        for _, layer, head, _ in best:
            kept[layer, head, r] = True
        for j in range(tokens):
            column = [p[j] for *_, p in best]
            reduced[r, j] = max(column) if reduce == "max" else math.fsum(column) / keep
    return reduced, kept


def random_attention(seed, shape, dtype=np.float64):
    return np.random.default_rng(seed).dirichlet(np.full(shape[-1], 0.2), shape[:-1]).astype(dtype)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_heads_are_those_of_the_loop(reduce):
    for seed in range(6):
        attention = random_attention(seed, (2, 4, 7, 17 + seed))
        reduced, kept = low_entropy_heads(attention, keep=3, reduce=reduce)
        want, which = heads_by_loop(attention, 3, reduce)
        np.testing.assert_array_equal(kept, which)
        # a number's share of a sum of n positive ones: n + 1 roundings, and as many in the mean of 3
        assert (abs(reduced - want) <= (attention.shape[-1] + 8) * U * want).all()


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_every_kind_of_array(kind):
    attention = random_attention(0, (2, 4, 7, 19), np.float32)
    reduced, kept = low_entropy_heads(KINDS[kind](attention), keep=2)
    assert kind_of(reduced) == kind_of(kept) == kind
    want, which = heads_by_loop(attention.astype(np.float64), 2, "max")
    np.testing.assert_array_equal(np.asarray(kept), which)
    assert (abs(np.asarray(reduced, np.float64) - want) <= 32 * 2.0**-24 * want).all()


def test_the_nearest_column_is_damped_most_and_two_are_zero():
    """A row with equal attention everywhere, one head: what is left is RATIOS before the row's own column."""
    reduced, _ = low_entropy_heads(np.full((1, 1, 2, 16), 1 / 16), keep=1)
    for r in range(2):
        row = reduced[r] / reduced[r, 1]
        np.testing.assert_array_equal(row[[0, 14 + r]], 0)
        damped = row[13 + r : 3 + r : -1]
        assert (abs(damped - RATIOS) <= 8 * U * np.array(RATIOS)).all()
        np.testing.assert_array_equal(row[1 : 4 + r], 1)


def test_a_head_with_nothing_left_is_kept():
    """All attention on column 0: entropy 0, the lowest, and a row of zeros. The release keeps it as well."""
    attention = random_attention(1, (1, 2, 3, 15))
    attention[0, 1] = 0
    attention[0, 1, :, 0] = 1
    reduced, kept = low_entropy_heads(attention, keep=1)
    assert kept[0, 1].all()
    assert (reduced == 0).all()


def chain_by_rule(a, sources, skip, width, threshold, least, looked=5):
    """Return the chain by the rule in words, with sets and sorted lists."""
    response, tokens = a.shape
    first = tokens - response
    chain = dict.fromkeys(sources, 0.0)
    last, used = list(sources), set()
    while last:
        used |= set(last)
        found = {}
        for s in last:
            ranked = sorted(range(tokens), key=lambda t: (-a[s, t], t)) if s >= 0 else []
            for rank, t in enumerate(ranked):
                if rank >= looked and (any(found.values()) or len(chain) >= least + len(sources)):
                    break
                token = t - first
                if token < 0 or token == s or token - 1 in used or skip[token]:
                    continue
                found[token] = found.get(token, 0.0) + a[s, t]
        last = []
        for token in sorted((t for t in found if found[t] > 0), key=lambda t: (-found[t], t))[:width]:
            if found[token] < threshold and len(chain) >= least + len(sources):
                break
            chain[token - 1] = found[token]
            last.append(token - 1)
    return tuple(sorted(chain)), tuple(chain[p] for p in sorted(chain))


def test_chains_are_those_of_the_rule():
    lengths = set()
    for seed in range(150):
        rng = np.random.default_rng(seed)
        first, response = int(rng.integers(1, 6)), int(rng.integers(4, 20))
        a = np.tril(rng.dirichlet(np.full(first + response, 0.1), response), first - 1)
        a = np.where(a < 0.001, 0, a)
        skip = rng.random(response) < 0.3
        sources = list(range(response - 3, response - 1))
        width, least, threshold = int(rng.integers(1, 4)), int(rng.integers(0, 7)), float(rng.random())
        got = attention_chain(a, sources, skip=skip, width=width, threshold=threshold, least=least)
        assert (got.positions, got.scores) == chain_by_rule(a, sources, skip, width, threshold, least)
        lengths.add(len(got.positions))
    assert len(lengths) > 4


def planted():
    """Return attention of 32 heads, all uniform but one, whose rows point from the answer at 22 to 15, 7 and 2."""
    first, response = 12, 24
    tokens = first + response
    attention = np.tril(np.ones((response, tokens)), first)
    attention = np.repeat((attention / attention.sum(-1, keepdims=True))[None], 32, 0).reshape(4, 8, response, tokens)
    for source, token in [(22, 15), (14, 7), (6, 2)]:
        attention[2, 5, source] = 0
        attention[2, 5, source, first + token] = 1
    return attention


def test_a_chain_planted_in_one_head_is_recovered():
    """The tokens 15, 7 and 2 were predicted at 14, 6 and 1. Each planted row keeps its one key alone."""
    reduced, kept = low_entropy_heads(planted(), keep=1)
    assert kept[2, 5, [22, 14, 6]].all()
    chain = attention_chain(reduced, [22], least=0)
    assert chain.positions == (1, 6, 14, 22)
    assert chain.scores[3] == 0
    # the smallest planted weight is the one 4 tokens back: 1e-12 takes 2.2e-12 of it, beside a few roundings
    assert min(chain.scores[:3]) > 1 - 1e-12 / RATIOS[3] - 8 * U


def test_the_mean_of_all_heads_does_not_show_the_planted_chain():
    """The control: 31 of 32 heads are uniform, so that no score comes near the threshold."""
    mean = planted().mean((0, 1))
    assert attention_chain(mean, [22], least=0).positions == (22,)


def test_the_release_counts_the_tokens_of_a_step_twice():
    """Weak attention, more to nearer tokens; least = 5. After the first step 1 + 3 of 6 positions are there.

    Two more are missing, and exactly two are added in the second step. The release adds one, which is 5 and 1 that is
    counted again, and another one in the third, from another source.
    """
    a = np.tril(np.tile(np.arange(36) / 1000, (24, 1)), 12)
    assert attention_chain(a, [22]).positions == (15, 16, 18, 19, 20, 22)
    assert attention_chain(a, [22], mode="released").positions == (14, 16, 18, 19, 20, 22)


def test_a_source_of_the_instruction_ends_the_chain():
    assert attention_chain(np.full((3, 5), 0.2), [-1]).positions == (-1,)


def markov(seed):
    """Return start and transition probabilities of 6 symbols, multiples of 1/64, that are exact as floats."""
    rng = np.random.default_rng(seed)
    return [1 + rng.multinomial(58, rng.dirichlet(np.full(6, 0.4))) for _ in range(7)]


def conditional_of(rows):
    def conditional(tokens):
        return np.stack([rows[6], *(rows[t] for t in tokens[:-1])]) / 64

    return conditional


def probability(rows, sequence):
    p = Fraction(int(rows[6][sequence[0]]), 64)
    for a, b in itertools.pairwise(sequence):
        p *= Fraction(int(rows[a][b]), 64)
    return p


def exact_marginal(rows, answer, length):
    return sum(probability(rows, (*s, answer)) for s in itertools.product(range(6), repeat=length - 1))


def test_with_the_full_sequence_the_sum_is_a_part_of_the_marginal():
    """Six symbols, five tokens, the last one the answer: products of five multiples of 1/64 are exact in float64."""
    for seed in range(20):
        rows = markov(seed)
        tokens = np.random.default_rng(seed).integers(0, 6, 5)
        exact = exact_marginal(rows, tokens[-1], 5)
        before = Fraction(0)
        for candidates in range(1, 7):
            got = chain_marginal(
                conditional_of(rows), tokens, range(4), [4], candidates=candidates, least=0.0, most=100
            )
            assert len({tuple(s) for s in got.sequences}) == len(got.sequences)
            assert Fraction(got.confidence) == sum(probability(rows, tuple(s)) for s in got.sequences)
            assert before <= Fraction(got.confidence) <= exact
            before = Fraction(got.confidence)
        assert len(got.sequences) == 1 + 4 * 5
        assert before > probability(rows, tuple(tokens))


def test_with_a_part_of_the_sequence_the_sum_may_exceed_the_marginal():
    """The factors of tokens off the chain are left out: the control of the bound above."""
    over = 0
    for seed in range(20):
        rows = markov(seed)
        tokens = np.random.default_rng(seed).integers(0, 6, 5)
        got = chain_marginal(conditional_of(rows), tokens, [3], [4], candidates=6, least=0.0, most=100)
        over += Fraction(got.confidence) > exact_marginal(rows, tokens[-1], 5)
    assert over > 0


def test_which_tokens_are_replaced():
    """The most probable of those above 0.01 first, never the response's own; at most two of them here."""
    table = np.array([[0.5, 0.25, 0.125, 0.125], [0.004, 0.006, 0.5, 0.49], [0.25, 0.25, 0.25, 0.25]])
    got = chain_marginal(lambda x: table, [1, 2, 0], [0, 1], [2], most=2)
    assert got.sequences.tolist() == [[1, 2, 0], [0, 2, 0], [1, 3, 0]]
    assert got.chain.tolist() == [0.25 * 0.5, 0.5 * 0.5, 0.25 * 0.49]
    assert got.answer.tolist() == [0.25] * 3
    assert len(chain_marginal(lambda x: table, [1, 2, 0], [0, 1], [2]).sequences) == 5
    one = chain_marginal(lambda x: table, [1, 2, 0], [0, 1], [2], candidates=1)
    assert one.sequences.tolist() == [[1, 2, 0], [0, 2, 0]]
    assert len(chain_marginal(lambda x: torch.tensor(table), [1, 2, 0], [0], [2], most=0).sequences) == 1


def test_bad_arguments_are_refused():
    good = random_attention(0, (2, 4, 5, 15))
    a = good[0, 0]
    table = np.full((3, 4), 0.25)

    def marginal(tokens=(1, 2, 3), chain=(0,), answer=(2,), p=table, **more):
        return chain_marginal(lambda x: p, tokens, chain, answer, **more)

    for call, text in [
        (
            lambda: low_entropy_heads(good[0]),
            "attention: shape is (4, 5, 15), expected (layers, heads, response, tokens)",
        ),
        (
            lambda: low_entropy_heads(good[..., :14], keep=1),
            "the instruction has 9 tokens (tokens - response), expected at",
        ),
        (lambda: low_entropy_heads(good), "keep: got 16, expected a whole number from 1 to 8"),
        (lambda: low_entropy_heads(good, keep=1, reduce="sum"), "reduce: got 'sum', expected 'max' or 'mean'"),
        (lambda: low_entropy_heads(-good, keep=1), "attention: expected an array of finite weights from 0 on"),
        (lambda: low_entropy_heads(good.astype(np.float16), keep=1), "attention: type is float16, which does not hold"),
        (lambda: attention_chain(a[0], [1]), "attention: shape is (15,), expected (response, tokens)"),
        (lambda: attention_chain(a[:, :5], [1]), "attention: got '5 rows and 5 columns', expected at least one token"),
        (lambda: attention_chain(-a, [1]), "attention: expected an array of finite weights from 0 on"),
        (lambda: attention_chain(a, []), "sources: got [], expected one or more different positions from -1 to 4"),
        (lambda: attention_chain(a, [5]), "sources: got [5], expected one or more different positions from -1 to 4"),
        (lambda: attention_chain(a, [1, 1]), "sources: got [1, 1], expected one or more different positions"),
        (lambda: attention_chain(a, [0.5]), "sources: got [0.5], expected whole numbers"),
        (lambda: attention_chain(a, [1], skip=np.zeros(4, bool)), "skip: shape is (4,), expected (5)"),
        (lambda: attention_chain(a, [1], skip=np.zeros(5)), "skip: got 'float64', expected booleans"),
        (lambda: attention_chain(a, [1], mode="paper"), "mode: got 'paper', expected 'exact' or 'released'"),
        (lambda: attention_chain(a, [1], width=0), "width: got 0, expected a whole number from 1 on"),
        (lambda: attention_chain(a, [1], threshold=math.nan), "threshold: got nan, expected a number in [0, 1.79"),
        (lambda: marginal(tokens=[0.5]), "tokens: got [0.5], expected one axis of whole numbers"),
        (lambda: marginal(tokens=[1, 2, 4]), "tokens: hold 1 to 4, expected 0 to 3, conditional's columns"),
        (lambda: marginal(chain=[0, 2]), "chain: holds [2], which answer holds too; leave its positions out"),
        (lambda: marginal(answer=[3]), "answer: got [3], expected one or more different positions from 0 to 2"),
        (lambda: marginal(p=table[:2]), "conditional: returned an array of shape (2, 4), expected (3, vocabulary)"),
        (lambda: marginal(p=table * 5), "expected (3, vocabulary) of numbers from 0 to 1; apply the softmax"),
        (lambda: marginal(least=2), "least: got 2, expected a number in [0, 1]"),
        (lambda: marginal(candidates=0), "candidates: got 0, expected a whole number from 1 on"),
    ]:
        with pytest.raises(InvalidInput, match=re.escape(text)):
            call()
