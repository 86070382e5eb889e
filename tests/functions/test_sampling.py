"""The random selector: over all draws each key counts once; as released, less; as a call it has an exact answer."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from refattn import InvalidInput, Problem, evaluate
from refattn.functions.sampling import sampled_weight


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_the_mean_over_all_draws_is_1_but_as_released(mode):
    """Five keys between, three draws: a key is among them with 1 - (4/5)^3, and counts 5/3 then."""
    drawn = [np.array(x) for x in product(range(5), repeat=3)]
    every = [sampled_weight(1, 8, lambda n, x=x: x, sink=1, local=2, mode=mode)[0] for x in drawn]
    mean = [
        sum(Fraction(x * 3).limit_denominator(9) for x in column) / 3 / len(every) for column in np.transpose(every)
    ]
    between = Fraction(1) if mode == "paper" else (1 - Fraction(4, 5) ** 3) * Fraction(5, 3)
    assert mean == [1, *[between] * 5, 1, 1]


def test_rows_see_first_nearest_and_drawn_keys():
    asked = []
    got = sampled_weight(4, 9, lambda n: asked.append(n) or np.array([0, 0]), sink=2, local=3)
    assert asked == [1, 2, 3, 4]
    assert got.tolist() == [
        [1, 1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 3, 0, 0, 1, 1, 1, 0],
        [1, 1, 4, 0, 0, 0, 1, 1, 1],
    ]


def test_a_drawn_call_has_an_exact_answer():
    """Weights of whole numbers are keys that stand so often."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, n, 4)) for n in (1, 8, 8))
    weight = sampled_weight(1, 8, lambda n: np.array([3, 3]), sink=1, local=1)
    assert weight.tolist() == [[1, 0, 0, 0, 6, 0, 0, 1]]
    often = np.repeat(np.arange(8), weight[0].astype(int))
    twice = Problem(q, k[:, :, often], v[:, :, often])
    once = Problem(q, k, v, weight=weight[None, None])
    assert (evaluate(once, rounding="float64").out == evaluate(twice, rounding="float64").out).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"n_k": 3}, "n_k: got 3, expected a whole number from 4 on"),
        ({"n_q": 2**62, "n_k": 2**62}, f"n_q, n_k: got {2**62} and {2**62}, expected at most .* weights in all"),
        ({"local": 0}, "local: got 0, expected a whole number from 1 on"),
        ({"mode": "fast"}, "mode: got 'fast', expected 'paper' or 'released'"),
        ({"draw": lambda n: np.array([n])}, r"draw: draw\(1\) gave 1 to 1, expected places from 0 to 0"),
        ({"draw": lambda n: np.ones(2)}, r"draw: draw\(1\) gave float64 of shape \(2,\), expected whole numbers of .*"),
    ],
)
def test_what_cannot_be_is_named(change, text):
    given = {"n_q": 4, "n_k": 9, "draw": lambda n: np.array([0]), "sink": 2, "local": 3} | change
    with pytest.raises(InvalidInput, match=f"^{text}$"):
        sampled_weight(given.pop("n_q"), given.pop("n_k"), given.pop("draw"), **given)
