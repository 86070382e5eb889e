"""Equal scores: the lower candidate is chosen, as by fractions, and no precision is raised where keys are the same."""

from fractions import Fraction

import numpy as np
import pytest

from refattn import Problem
from refattn.exact import ranking
from refattn.exact.lowering import lower

N, D = 24, 3
RNG = np.random.default_rng(0)


def drawn(n=N, d=D):
    return RNG.standard_normal((1, 1, n, d)).astype(np.float32)


def turned(k):
    """Every other key is the one before with its elements turned: a query of equal elements scores both the same."""
    k[:, :, 1::2] = k[:, :, ::2, ::-1]
    return k


def far():
    """Scores that differ by multiples of 2**-81: float64 cannot tell them apart, its pairs can."""
    k = np.zeros((1, 1, N, D), np.float32)
    k[..., 0], k[..., 1] = 1, RNG.integers(-4, 5, N) * 2.0**-36
    return np.float32([[[[1, 2.0**-45, 0]] * N]]), k


def thirds(n):
    """Blocks of sums (1, 1, 1), (3, 0, 0) and (2, 1, 0), in turn: queries of ones score them the same."""
    k = np.zeros((1, 1, N, D), np.float32)
    k[0, 0, ::n] = np.resize([[1, 1, 1], [3, 0, 0], [2, 1, 0]], (N // n, D))
    return np.ones_like(k), k


WHOLE = RNG.integers(-2, 3, (2, 1, 1, N, D)).astype(np.float32)
LED = np.where(np.arange(N)[:, None] % 2, WHOLE[1], 1)
CASES = {
    "one key": (drawn(), np.repeat(drawn(1), N, 2), True),
    "two keys": (drawn(), np.tile(drawn(2), (1, 1, N // 2, 1)), True),
    "two keys, one a -0": (drawn(), np.tile(np.float32([[0, 1, 2], [-0.0, 1, 2]]), (1, 1, N // 2, 1)), True),
    "queries of zeros": (0 * drawn(), drawn(), True),
    "whole numbers": (*WHOLE, True),
    "tenths": (*np.float32(0.1) * WHOLE, True),
    "turned keys": (np.repeat(drawn(d=1), D, 3), turned(drawn()), True),
    "far below": (*far(), True),
    "blocks of one first key": (0.5 + drawn(), LED, True),
    "thirds": (*thirds(3), False),
    "blocks of three, whole numbers": (*WHOLE, False),
}
OPTIONS = {
    "topk": {"topk": 3, "sink_keys": 0, "local": 1, "block_size": 1},
    "moba": {"block_size": 2, "topk": 3},
}


def by_fractions(q, k, size, count):
    """Return which keys each row sees: its block's up to its own, and those of `count` earlier blocks."""
    numbers = [[Fraction(float(x)) for x in row] for row in k]
    seen = np.zeros((N, N), bool)
    for i in range(N):
        query, own = [Fraction(float(x)) for x in q[i]], i // size
        blocks = [numbers[b * size : (b + 1) * size] for b in range(own)]
        scores = [sum(x * y for key in block for x, y in zip(query, key, strict=True)) / len(block) for block in blocks]
        for b in [*sorted(range(own), key=lambda b: (-scores[b], b))[:count], own]:
            seen[i, b * size : (b + 1) * size] = True
    return seen & np.tril(np.ones((N, N), bool))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", OPTIONS)
def test_the_choice_is_that_of_fractions(monkeypatch, name, variant):
    q, k, quick = CASES[name]
    options = dict(OPTIONS[variant])
    if quick:  # no ball and no field is asked
        monkeypatch.setattr(ranking, "Field", None)
        monkeypatch.setattr(ranking, "LADDER", ())
    elif variant == "moba":
        options["block_size"] = 3
    p = Problem(q, k, k, causal="bottom_right", variant=variant, options=options)
    got = np.asarray(lower(p).problem.written_out().allowed)[0, 0] & np.tril(np.ones((N, N), bool))
    size = options["block_size"]
    np.testing.assert_array_equal(got, by_fractions(q[0, 0], k[0, 0], size, options["topk"] - (variant == "moba")))
