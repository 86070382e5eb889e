"""The decoder keeps no order, starts as the prior, and learns the exact update."""

import re

import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.functions.mixture_model import (
    NOISE,
    mean_posterior_kl,
    mixture_decoder,
    random_priors,
    train,
)
from refattn.functions.mixtures import gmm_kl, gmm_posterior, gmm_tokens


def model(seed=0, **options):
    """Return a decoder of two variables whose last matrix is no longer 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = mixture_decoder(2, 3, **options)
        torch.nn.init.normal_(found.out.weight)
    return found


def called(found, tokens, seen, kind=torch.float64):
    with torch.no_grad():
        return found.to(kind)(torch.tensor(tokens, dtype=kind), torch.tensor(seen, dtype=kind)).double().numpy()


def test_another_order_gives_the_same_tokens_in_that_order():
    """Up to roundings: in float64 these are 2^-29 of float32's, which the same call in float32 shows.

    Numbers added to the tokens by position, as transformers have them, are seen.
    """
    rng = np.random.default_rng(0)
    tokens, seen = np.float32(rng.standard_normal((2, 5, 6))), np.float32(rng.standard_normal((2, 4, 3)))
    found = model()
    rounding = np.abs(called(found, tokens, seen, torch.float32) - called(found, tokens, seen)).max()
    order, other = rng.permutation(5), rng.permutation(4)
    due = called(found, tokens, seen)[:, order]
    assert 0 < rounding < 1
    assert np.abs(called(found, tokens[:, order], seen) - due).max() < rounding
    assert np.abs(called(found, tokens[:, order], seen[:, other]) - due).max() < rounding
    places = rng.standard_normal((5, 6))
    due = called(found, tokens + places, seen)[:, order]
    assert np.abs(called(found, tokens[:, order] + places, seen) - due).max() > rounding


def test_components_see_each_other_and_every_observation():
    rng = np.random.default_rng(1)
    tokens, seen = rng.standard_normal((1, 3, 6)), rng.standard_normal((1, 2, 3))
    found = model()
    before = called(found, tokens, seen)
    moved = tokens.copy()
    moved[0, 2] += 1
    assert (called(found, moved, seen)[0, :2] != before[0, :2]).all()
    for i in range(2):
        moved = seen.copy()
        moved[0, i] += 1
        assert (called(found, tokens, moved) != before).all()


def test_it_starts_as_the_prior():
    generator = torch.Generator().manual_seed(0)
    tokens = gmm_tokens(*random_priors(4, 3, generator))
    assert (mixture_decoder(1, 1)(tokens, torch.ones(4, 2, 1)) == tokens).all()


def test_priors_are_mixtures_of_the_ranges_said():
    weights, means, covariances = random_priors(2000, 3, torch.Generator().manual_seed(0))
    assert (weights > 0).all()
    assert ((weights.sum(-1) - 1).abs() <= 3 * 2.0**-24).all()  # three quotients, each rounded, and two sums
    assert covariances.min() >= 0.09 * (1 - 2.0**-22)  # (0.3 + u)² with u from 0 to 1.2, rounded twice
    assert covariances.max() <= 2.25 * (1 + 2.0**-22)
    # 6000 numbers: the mean and the variance are within six of their own standard deviations
    assert abs(means.mean()) <= 6 * 2 / 6000**0.5
    assert abs(means.var() - 4) <= 6 * 4 * (2 / 6000) ** 0.5


class Exact(torch.nn.Module):
    """What decoders are trained to be: tokens of the exact posterior."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, tokens, observations):
        one = torch.ones(1, 1, dtype=tokens.dtype)
        return gmm_tokens(*gmm_posterior(*self.prior, observations[:, 0], one, NOISE**2 * one))


def test_the_divergence_is_none_for_exact_updates_and_the_prior_s_at_first():
    weights, means, covariances = (x.double() for x in random_priors(20, 3, torch.Generator().manual_seed(1)))
    prior = weights, means / 4, covariances
    z, one = prior[1][:, 0], torch.ones(1, 1, dtype=torch.float64)
    due = gmm_kl(gmm_posterior(*prior, z, one, NOISE**2 * one), prior).mean()
    # Tokens give weights and covariances back off by 8 units. That moves logarithms of densities by 8 units of a square
    # over a variance, of points and means of at most 6 each, and of logits below 10; their mean as much.
    limit = 8 * 2.0**-52 * (12**2 / 0.05 + 2 * 10)
    kl, prior_kl = mean_posterior_kl(Exact(prior), prior, z)
    assert abs(kl) <= limit
    assert prior_kl == due > 1000 * limit
    kl, prior_kl = mean_posterior_kl(mixture_decoder(1, 1).double(), prior, z)
    assert abs(kl - due) <= limit


def test_training_comes_near_the_exact_update():
    """A few steps leave less than half of the prior's divergence; the docs' page has the figures of more."""
    found = train(60, batch=64, tested=30)
    assert found.steps == [0, 12, 24, 36, 48, 60]
    assert len(found.kl) == 6
    assert found.kl[-1] < found.prior_kl / 2
    one, again = (train(3, batch=4, tested=2) for _ in range(2))
    assert one.steps == [0, 1, 2, 3]
    assert one.kl == again.kl


def test_errors():
    for call, said in (
        (lambda: mixture_decoder(0, 1), "d: got 0, expected a whole number from 1 on"),
        (lambda: mixture_decoder(1, 1, width=10), "heads: got 4, expected a divisor of the width 10"),
        (lambda: mixture_decoder(1, 1)(torch.ones(2, 3, 4), torch.ones(2, 1, 1)), "tokens: shape is (2, 3, 4)"),
        (lambda: mixture_decoder(1, 1)(torch.ones(2, 3, 3), torch.ones(3, 1, 1)), "observations: shape is (3, 1, 1)"),
        (lambda: random_priors(1, 1, None), "components: got 1, expected a whole number from 2 on"),
        (lambda: train(0), "steps: got 0, expected a whole number from 1 on"),
        (lambda: train(1, rate=0), "rate: got 0, expected a number in (0, inf)"),
    ):
        with pytest.raises(InvalidInput, match=re.escape(said)):
            call()
