"""A small transformer from a mixture prior and observations to the posterior, held to the exact update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..arrays import kind_of
from ..errors import InvalidInput
from .arguments import axes, function, instance, under, whole, within
from .dense import check_floats
from .mixtures import gmm_from_tokens, gmm_kl, gmm_nll, gmm_posterior, gmm_tokens

__all__ = ["Trained", "mean_posterior_kl", "mixture_decoder", "random_priors", "train"]

NOISE = 0.5
"""The standard deviation of an observation in training and test."""


def mixture_decoder(d: int, m: int, *, width: int = 32, heads: int = 4, layers: int = 2) -> Any:
    """Return a PyTorch module from tokens of a prior and observations to tokens of a posterior.

    ``token' = token + W decoder(E token, F observation)``: in the decoder components attend to each other and to
    observations. There are no positions, so another order of components gives the same tokens in that order, and
    another order of observations the same tokens. W is 0 at first: the posterior starts as the prior.

    Parameters
    ----------
    d, m : int
        Variables, and numbers an observation.
    width, heads, layers : int
        Of the decoder; heads divide the width.

    Returns
    -------
    module : torch.nn.Module
        Of ``(tokens, observations)``, shaped (b, k, t) as :func:`refattn.functions.mixtures.gmm_tokens` gives them, and
        (b, n, m); it returns (b, k, t).

    Raises
    ------
    InvalidInput
        Sizes below 1, or heads that do not divide the width.

    Notes
    -----
    A small variant of the model of Distribution Transformers (the released code was read): norms come before attention
    and not after, tokens are added to, and the network after attention is 4 times as wide as the tokens.
    """
    import torch
    from torch import nn

    for name, x in (("d", d), ("m", m), ("width", width), ("heads", heads), ("layers", layers)):
        whole(name, x, 1)
    if width % heads:
        raise InvalidInput(f"heads: got {heads}, expected a divisor of the width {width}")
    entries = 1 + 2 * d + d * (d - 1) // 2

    class MixtureDecoder(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerDecoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
            self.decoder = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))
            self.component = nn.Sequential(nn.Linear(entries, width), nn.GELU(), nn.Linear(width, width))
            self.observation = nn.Sequential(nn.Linear(m, width), nn.GELU(), nn.Linear(width, width))
            self.out = nn.Linear(width, entries)
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

        def forward(self, tokens: torch.Tensor, observations: torch.Tensor) -> torch.Tensor:
            axes("tokens", tokens, "b", "k", entries)
            axes("observations", observations, tokens.shape[0], "n", m)
            h = self.decoder(self.component(tokens), self.observation(observations))
            return tokens + self.out(h)

    return MixtureDecoder()


def random_priors(count: int, components: int, generator: Any) -> tuple[Any, Any, Any]:
    """Return random mixtures of one variable: weights uniform on the simplex, means N(0, 4), deviations 0.3 to 1.5.

    Parameters
    ----------
    count, components : int
        How many mixtures, and of how many components each.
    generator : torch.Generator
        Of the random numbers.

    Returns
    -------
    weights, means, covariances : (count, k), (count, k, 1), (count, k, 1, 1) float32 tensors
        Of the mixtures.

    Raises
    ------
    InvalidInput
        A count below 1, or fewer than 2 components.
    """
    import torch

    if generator is not None:
        instance("generator", generator, torch.Generator, "use torch.Generator().manual_seed(seed)")
    shape = (whole("count", count, 1), whole("components", components, 2))
    # exponential numbers over their sum; far from 0 so that logits stay moderate
    drawn = 0.05 - torch.log1p(-torch.rand(shape, generator=generator))
    means = 2 * torch.randn((*shape, 1), generator=generator)
    deviations = 0.3 + 1.2 * torch.rand((*shape, 1, 1), generator=generator)
    return drawn / drawn.sum(-1, keepdim=True), means, deviations**2


def _drawn(prior: tuple[Any, Any, Any], generator: Any) -> tuple[Any, Any]:
    """Return a point of each mixture, (count, 1, 1), and an observation of it, (count, 1)."""
    import torch

    weights, means, covariances = prior
    which = torch.multinomial(weights, 1, generator=generator)[..., None]
    mean, deviation = means.gather(1, which), covariances[..., 0].sqrt().gather(1, which)
    x = mean + deviation * torch.randn(mean.shape, generator=generator)
    return x, x[:, 0] + NOISE * torch.randn(mean[:, 0].shape, generator=generator)


@dataclass(frozen=True)
class Trained:
    """A trained decoder.

    Attributes
    ----------
    model : torch.nn.Module
        Of :func:`mixture_decoder`.
    steps : list of int
        After which the model was tested.
    kl : list of float
        The mean divergence of its posterior from the exact one then, in nats.
    prior_kl : float
        That of the prior, the baseline.
    """

    model: Any
    steps: list[int]
    kl: list[float]
    prior_kl: float


def mean_posterior_kl(model: Any, prior: tuple[Any, Any, Any], z: Any) -> tuple[float, float]:
    """Return the mean ``KL(exact posterior, model's)`` and the mean ``KL(exact posterior, prior)``, in nats.

    Parameters
    ----------
    model : torch.nn.Module
        Of :func:`mixture_decoder` with d = m = 1.
    prior : (weights, means, covariances)
        A batch of mixtures of one variable.
    z : (count, 1) tensor
        An observation for each, with a noise of deviation 0.5.

    Returns
    -------
    kl, prior_kl : float
        By quadrature in float64.

    Raises
    ------
    InvalidInput
        As in :func:`refattn.functions.mixtures.gmm_posterior`.
    """
    import torch

    function("model", model)
    under("prior", prior, "(weights, means, covariances)", gmm_tokens)
    check_floats(prior=prior[0], z=z)
    axes("z", z, prior[0].shape[0], 1)
    with torch.no_grad():
        out = model(gmm_tokens(*prior), z[:, None])
        if kind_of(out) != "torch":
            raise InvalidInput(f"model: gave {type(out).__name__}, expected a tensor of tokens")
        out = out.double()
        weights, means, covariances = (x.double() for x in prior)
        before = weights, means, covariances
        one = torch.ones(1, 1, dtype=torch.float64)
        exact = gmm_posterior(*before, z.double(), one, NOISE**2 * one)
        # a weight may underflow, and has no part in the divergence then
        exact = (exact[0].clamp_min(torch.finfo(torch.float64).tiny), *exact[1:])
        return float(gmm_kl(exact, gmm_from_tokens(out, 1)).mean()), float(gmm_kl(exact, before).mean())


def train(
    steps: int, *, components: int = 3, batch: int = 256, rate: float = 3e-3, tested: int = 200, seed: int = 0
) -> Trained:
    """Train a decoder (2 layers, width 32) on random priors of one variable with one observation each.

    The loss is the negative log density of the model's posterior at the point that was observed. Test priors are drawn
    once and never trained on; Adam's rate falls to 0 along a half cosine.

    Parameters
    ----------
    steps : int
        Of Adam, each on new priors.
    components, batch : int
        Of a prior, and priors a step.
    rate : float
        Adam's at first.
    tested : int
        How many priors are tested on, at five times in training.
    seed : int
        Of all random numbers, for test priors its own.

    Returns
    -------
    trained : Trained
        The model, and how near to exact updates it came.

    Raises
    ------
    InvalidInput
        A size below 1, or a rate that is not above 0.
    """
    import torch

    for name, x in (("steps", steps), ("batch", batch), ("tested", tested)):
        whole(name, x, 1)
    within("rate", rate, 0, math.inf, open_low=True)
    seed = whole("seed", seed, 0, 2**63 - 2)
    generator, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    test = random_priors(tested, components, other)
    _, seen = _drawn(test, other)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = mixture_decoder(1, 1)
    adam = torch.optim.Adam(model.parameters(), rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    kl, prior_kl = mean_posterior_kl(model, test, seen)
    at, curve = [0], [kl]
    for step in range(1, steps + 1):
        prior = random_priors(batch, components, generator)
        x, z = _drawn(prior, generator)
        loss = gmm_nll(*gmm_from_tokens(model(gmm_tokens(*prior), z[:, None]), 1), x)
        adam.zero_grad()
        loss.backward()
        adam.step()
        falling.step()
        if step * 5 // steps > (step - 1) * 5 // steps:
            at.append(step)
            curve.append(mean_posterior_kl(model, test, seen)[0])
    return Trained(model, at, curve, prior_kl)
