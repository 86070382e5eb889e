"""Regret after every round: random actions play the same games as LinUCB, and pass what LinUCB does not."""

import pytest

from refattn.theory.bandits import DIMS, ROUNDS, STARTS, WIDE, _beside, _by_layers, _linucb, _random, _shares


def test_random_actions_pass_the_bound_in_a_game_of_the_check():
    regret, bounds, _ = _beside(_random, min(DIMS), ROUNDS)
    assert regret[-1] > bounds[-1]
    regret, bounds, _ = _beside(_linucb, min(DIMS), ROUNDS)
    assert (regret <= bounds).all()


@pytest.mark.parametrize("d", WIDE)
def test_growth_tells_random_actions_from_linucb(d):
    assert max(_shares(_linucb, d, STARTS)[0]) < 1 < min(_shares(_random, d, STARTS)[0])


def test_layers_lose_what_linucb_loses():
    assert (_beside(_by_layers, 3, 30)[0] == _beside(_linucb, 3, 30)[0]).all()
