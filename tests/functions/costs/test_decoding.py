"""Kinetics' cost model against a decoder that counts what it multiplies and reads."""

import itertools
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from refattn import InvalidInput
from refattn.functions.costs import (
    Decoder,
    Decoding,
    block_topk_decoding,
    context_of_equal_cost,
    crossover,
    dense_decoding,
    flash_io,
    keys_read,
    pass_at_k,
    topk_decoding,
)
from refattn.theory.counting import Memory, Slow, counted

QWEN = {
    "0.6B": Decoder(752_000_000, 28, 16, 8, 128),
    "8B": Decoder(8_190_000_000, 36, 32, 8, 128),
    "32B": Decoder(32_760_000_000, 64, 64, 8, 128),
}
SMALL = Decoder(6, 2, 4, 2, 2)


class Counting:
    """Decodes on numbers that count: FLOPs are twice the multiplications, bytes twice the words of keys and values."""

    def __init__(self, model, own):
        self.model, self.own, self.tally, self.words = model, own, Counter(), 0

    def read(self, keys):
        """Read keys and their values of one layer and key head."""
        fast, slow = Memory(2**62), Slow(np.ones((2, keys, self.model.d)))
        held = fast.load(slow, ...)
        self.words += fast.words
        return held

    def attend(self, held):
        """Attend with one query head to keys and values that are held."""
        q = counted(np.ones(self.model.d, int), self.tally)
        keys, values = held.astype(int)
        if len(keys):
            (keys @ q) @ values

    def multiply_weights(self):
        counted(np.ones((1, self.model.parameters), int), self.tally) @ np.ones(self.model.parameters, int)

    def seen(self, context, token):
        """Return the keys before a token of the answer, with its own or not."""
        return context + token + self.own

    @property
    def found(self):
        return Decoding(2 * self.tally["multiply"], 2 * self.words)


def heads(model):
    for _ in range(model.layers):
        for _ in range(model.heads_kv):
            yield range(model.heads // model.heads_kv)


def dense_loop(model, context, generated, samples, own):
    """Decode some answers to one prompt, whose keys are read once a step for all of them."""
    at = Counting(model, own)
    for token in range(generated):
        for _ in range(samples):
            at.multiply_weights()
        for group in heads(model):
            prompt = at.read(context)
            for _ in range(samples):
                answer = at.read(at.seen(0, token))
                for _ in group:
                    at.attend(np.concatenate([prompt, answer], axis=1))
    return at.found


def topk_loop(model, context, generated, budget, samples, own):
    at = Counting(model, own)
    for token, _ in itertools.product(range(generated), range(samples)):
        at.multiply_weights()
        for group in heads(model):
            held = at.read(min(budget, at.seen(context, token)))
            for _ in group:
                at.attend(held)
    return at.found


def mean(loop, *arguments):
    """Return the mean of what is counted with a token's own key and without."""
    both = [loop(*arguments, own) for own in (0, 1)]
    return Decoding(*(Fraction(sum(x), 2) for x in zip(*((b.compute, b.memory) for b in both), strict=True)))


CALLS = [(0, 1, 1), (0, 5, 1), (3, 4, 2), (5, 1, 3), (4, 7, 2)]
"""(context, generated, samples)."""


@pytest.mark.parametrize("model", [SMALL, Decoder(1, 1, 1, 1, 1), Decoder(7, 1, 6, 2, 3)])
@pytest.mark.parametrize("call", CALLS)
def test_dense_is_what_a_decoder_does(model, call):
    assert dense_decoding(model, *call) == mean(dense_loop, model, *call)


@pytest.mark.parametrize("budget", [1, 2, 4, 6, 9, 30])
@pytest.mark.parametrize(("context", "generated", "samples"), CALLS)
def test_topk_is_what_a_decoder_does(context, generated, samples, budget):
    found = topk_decoding(SMALL, context, generated, budget, samples)
    assert found == mean(topk_loop, SMALL, context, generated, budget, samples)
    alone = topk_decoding(SMALL, context, generated, budget)
    assert found == Decoding(samples * alone.compute, samples * alone.memory)


SEARCHES = [(0, 1, 1), (5, 9, 1), (20, 3, 1), (5, 9, 2), (7, 20, 3), (64, 40, 16), (3, 5, 99)]
"""(context, generated, block)."""


@pytest.mark.parametrize(("context", "generated", "block"), SEARCHES)
@pytest.mark.parametrize("samples", [1, 3])
def test_the_search_for_blocks_is_near_what_a_decoder_does(context, generated, block, samples):
    """In the loop each token's blocks are rounded down, in the formula their mean.

    Per query head and feature the loop does the sum of 2·floor((c + t)/b) FLOPs over t, in (s - 2T, s] with
    s = T(2c + T + 1)/b; the formula is T·floor((2c + T)/b), in (s - T/b - T, s - T/b]. As b >= 1, they differ by less
    than 2T. With n samples that share the prompt the loop's bytes are the sum of 2·floor(c/b) + 2n·floor(t/b), in
    (s - (2 + 2n)T, s] with s = T(2c + nT + n)/b, the formula's in (s - nT/b - T, s - nT/b]: by less than (2 + 2n)T.
    """
    chosen, local = 2, 1
    found = block_topk_decoding(SMALL, context, generated, block, chosen, local, samples)
    without = topk_decoding(SMALL, context, generated, local + block * chosen, samples)
    flops = words = 0
    for t in range(1, generated + 1):
        flops += samples * 2 * ((context + t) // block)
        words += context // block + samples * (t // block)
    queries, keys = (SMALL.d * SMALL.layers * h for h in (SMALL.heads, SMALL.heads_kv))
    search = found.compute - without.compute, found.memory - without.memory
    assert abs(search[0] - queries * flops) < queries * samples * 2 * generated
    assert abs(search[1] - 2 * keys * words) < keys * (2 + 2 * samples) * generated
    if block == 1:  # nothing is rounded, and a token's own block counts as half a one
        assert search[0] == queries * samples * (2 * context + generated) * generated
        assert search[1] == keys * (2 * context + generated * samples) * generated


def test_keys_read_in_three_ways():
    """A prompt of 300, 4096 tokens, a budget of 1024: 724 tokens see less than the budget."""
    c, t, b = 300, 4096, 1024
    without = sum(min(b, c + i) for i in range(t))
    assert without == 3_931_854
    assert keys_read(b, c, t) == sum(min(b, c + i + 1) for i in range(t)) == without + 724
    one = Decoder(1, 1, 1, 1, 1)
    assert (keys_read(1, 0, 1), keys_read(9, 0, 2)) == (1, 3)  # the least sizes; a budget that is never reached
    paper, released = (topk_decoding(one, c, t, b, mode=m).memory for m in ("paper", "released"))
    assert Fraction(paper, 4) == 3_932_216 == without + Fraction(724, 2)
    assert Fraction(released, 4) == 4_456_392
    assert topk_decoding(one, c, t, b, mode="released").compute == 2 * t + released


def test_the_released_sign_reads_more_keys_than_dense_attention():
    """The budget is never reached: the default is dense attention; the released formula, more than that."""
    call = SMALL, 10, 100
    assert topk_decoding(*call, 200) == dense_decoding(*call)
    assert topk_decoding(*call, 200, mode="released").memory > dense_decoding(*call).memory
    assert topk_decoding(*call, 10, mode="released") == topk_decoding(*call, 10)  # the prompt fills the budget


def test_qwen3_8b_at_32768_tokens():
    """The ratio 13.7 is that of the released formula with a prompt of 300; the other sign's is 13.9."""

    def ratio(mode):
        model, c, t = QWEN["8B"], 300, 32768
        return dense_decoding(model, c, t).eflops() / topk_decoding(model, c, t, 1024, mode=mode).eflops()

    assert f"{ratio('released'):.1f}" == "13.7"
    assert f"{ratio('paper'):.1f}" == "13.9"


@pytest.mark.parametrize(
    ("name", "context", "flops_only"), [("0.6B", 23, 6557), ("8B", 196, 27771), ("32B", 438, 31242)]
)
def test_contexts_from_which_attention_costs_more(name, context, flops_only):
    model = QWEN[name]
    assert round(context_of_equal_cost(*model)) == context
    assert round(context_of_equal_cost(*model, intensity=0)) == flops_only
    # exactly there, head by head: two products with each feature, and two bytes of each key's and value's
    for intensity in (Fraction(0), Fraction(1), Fraction(1125, 2)):
        at = context_of_equal_cost(*model, intensity=intensity)
        costs = [4 * model.d * model.layers * (model.heads + intensity * model.heads_kv) * c for c in (at, at + 1)]
        assert costs[0] == 2 * model.parameters < costs[1]
    assert dense_decoding(model, context, 1).eflops() > 3 * model.parameters  # the token's own key, too


def brute(model, context, most, budget, samples, intensity):
    """Return the last crossing of eFLOPs that are counted a token at a time, with its own key and without."""
    d = model.d * model.layers
    sums, cheaper = [Fraction(0), Fraction(0)], []
    for token in range(most):
        for own in (0, 1):
            seen, kept = context + token + own, min(budget, context + token + own)
            flops = [4 * model.heads * d * samples * x for x in (seen, kept)]
            bytes_ = [4 * model.heads_kv * d * x for x in (context + samples * (token + own), samples * kept)]
            for i in (0, 1):
                sums[i] += flops[i] + intensity * bytes_[i]
        cheaper.append(sums[1] < sums[0])
    last = max((t for t, x in enumerate(cheaper, 1) if not x), default=0)
    return None if last == most else last + 1


@pytest.mark.parametrize(
    ("samples", "context", "budget"), [(1, 5, 9), (1, 20, 7), (3, 40, 8), (8, 64, 32), (8, 64, 300)]
)
@pytest.mark.parametrize("intensity", [Fraction(1), Fraction(1125, 2)])
def test_where_sparse_attention_becomes_cheaper(samples, context, budget, intensity):
    """Samples that share a long prompt make dense attention the cheaper one at first."""
    found = crossover(
        lambda t: topk_decoding(SMALL, context, t, budget, samples).eflops(intensity),
        lambda t: dense_decoding(SMALL, context, t, samples).eflops(intensity),
        400,
    )
    assert found == brute(SMALL, context, 400, budget, samples, intensity)
    assert found is None or samples > 1 or found == max(1, budget - context + 1)


def test_a_search_for_blocks_costs_more_and_crosses_later():
    def found(block, **search):
        cheap = (
            (lambda t: block_topk_decoding(SMALL, 64, t, block, 2).eflops())
            if search
            else lambda t: topk_decoding(SMALL, 64, t, 2 * block).eflops()
        )
        return crossover(cheap, lambda t: dense_decoding(SMALL, 64, t).eflops(), 2000)

    assert found(60, search=True) > found(60) == 2 * 60 - 64 + 1
    assert found(1, search=True) == 1


def test_crossings_are_last_ones():
    values = [0, 3, 1, 3, 1, 1]
    for most in range(1, 7):
        below = [x < 2 for x in values[:most]]
        want = next((x for x in range(1, most + 1) if all(below[x - 1 :])), None)
        assert crossover(lambda x: values[x - 1], lambda x: 2, most) == want
    assert crossover(lambda m: flash_io(9, 1, m + 3).forward, lambda m: 0, 5) is None


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_draws(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = [min(chosen) < c for chosen in itertools.combinations(range(n), k)]
        assert pass_at_k(n, c, k) == float(Fraction(sum(draws), len(draws)))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda: dense_decoding(SMALL, -1, 1), "context: got -1, expected a whole number from 0 on"),
        (lambda: dense_decoding(SMALL, 0, 0), "generated: got 0, expected a whole number from 1 on"),
        (lambda: dense_decoding(SMALL, 0, 1, 0), "samples: got 0, expected"),
        (lambda: dense_decoding(SMALL._replace(parameters=0), 0, 1), "parameters: got 0, expected a finite number"),
        (lambda: dense_decoding(SMALL._replace(layers=0), 0, 1), "layers: got 0, expected"),
        (lambda: dense_decoding(SMALL._replace(heads=0), 0, 1), "heads: got 0, expected"),
        (lambda: dense_decoding(SMALL._replace(heads_kv=0), 0, 1), "heads_kv: got 0, expected"),
        (lambda: dense_decoding(SMALL._replace(heads_kv=3), 0, 1), "heads_kv: got 3, which must divide heads, 4"),
        (lambda: dense_decoding(SMALL._replace(d=0.5), 0, 1), "d: got 0.5, expected"),
        (lambda: topk_decoding(SMALL, 0, 1, 0), "budget: got 0, expected a whole number from 1 on"),
        (lambda: topk_decoding(SMALL, 0, 1, 1, mode="code"), "mode: got 'code', expected 'paper' or 'released'"),
        (lambda: block_topk_decoding(SMALL, 0, 1, 0, 1), "block: got 0, expected"),
        (lambda: block_topk_decoding(SMALL, 0, 1, 1, 0), "chosen: got 0, expected"),
        (lambda: block_topk_decoding(SMALL, 0, 1, 1, 1, -1), "local: got -1, expected a whole number from 0 on"),
        (lambda: dense_decoding(SMALL, 0, 1).eflops(-1), "intensity: got -1, expected a finite number from 0 on"),
        (lambda: context_of_equal_cost(*SMALL, intensity=-1), "intensity: got -1, expected"),
        (lambda: context_of_equal_cost(1, 1, 1, 2, 1), "heads_kv: got 2, which must divide heads, 1"),
        (lambda: keys_read(0, 0, 1), "budget: got 0, expected a whole number from 1 on"),
        (lambda: keys_read(1, -1, 1), "context: got -1, expected"),
        (lambda: keys_read(1, 0, 0), "generated: got 0, expected"),
        (lambda: crossover(abs, abs, 0), "most: got 0, expected"),
        (lambda: pass_at_k(0, 0, 1), "samples: got 0, expected"),
        (lambda: pass_at_k(3, 4, 1), "correct: got 4, expected a whole number from 0 to 3"),
        (lambda: pass_at_k(3, 1, 4), "k: got 4, expected a whole number from 1 to 3"),
        (lambda: pass_at_k(3, 1, 0), "k: got 0, expected"),
    ],
)
def test_bad_input_is_refused(wrong, text):
    with pytest.raises(InvalidInput, match=re.escape(text)):
        wrong()


def test_numpys_whole_numbers_do_not_wrap():
    million = np.int32(10**6)
    assert keys_read(million, million, million) == 10**12
    small = Decoder(*(np.int8(x) for x in (100, 4, 32, 8, 64)))
    assert dense_decoding(small, np.int8(100), np.int8(100)) == dense_decoding(Decoder(100, 4, 32, 8, 64), 100, 100)
