"""Linear bandits by a stack of ReLU attention layers: LinUCB's actions, and its regret against the theorem."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from ..functions.in_context import arm_scores, thompson_scores
from .claim import Claim, Evidence, judged, needs, same, total
from .decisions import SOURCE
from .fields import Q, meet, precise, rational, solve

__all__ = ["CLAIMS"]

Float = NDArray[np.float64]
NOISE, DELTA, ARMS = 0.1, 0.01, 10
"""The reward's noise is NOISE or -NOISE; bounds hold with probability 1 - DELTA."""


def _beta(log_det: Any) -> Any:
    """Return how far theta is from the ridge's solution in the norm of V, |theta| <= 1, as a ball."""
    return NOISE * ((1 / flint.arb(DELTA)).log() * 2 + log_det).sqrt() + 1


@dataclass
class History:
    """What a policy has seen: V = I + sum of a aᵀ, its inverse and log det, and all of each round in order."""

    arms: Float
    inverse: Float
    weighted: Float
    log_det: float
    actions: list[Float]
    rewards: list[float]
    log_dets: list[float] = field(default_factory=list)

    @property
    def beta(self) -> float:
        """How far theta is from the ridge's solution in the norm of V, |theta| <= 1."""
        return float(_beta(self.log_det))

    def scores(self) -> tuple[Float, Float]:
        """Return means of the arms and bonuses, by an exact solve."""
        return self.arms @ self.inverse @ self.weighted, np.sqrt(((self.arms @ self.inverse) * self.arms).sum(1))


Policy = Callable[[History, np.random.Generator], int]


def _play(policy: Policy, d: int, rounds: int, seed: int = 0) -> tuple[Float, History]:
    """Return the regret up to each round, and what was seen; new arms of norm 1/2 to 1 every round."""
    rng = np.random.default_rng(seed)
    theta = np.ones(d) / math.sqrt(d)
    h = History(np.empty(0), np.eye(d), np.zeros(d), 0.0, [], [])
    lost = []
    for _ in range(rounds):
        arms = rng.standard_normal((ARMS, d))
        h.arms = arms / np.linalg.norm(arms, axis=1, keepdims=True) * rng.uniform(0.5, 1, (ARMS, 1))
        a = h.arms[policy(h, rng)]
        lost.append(float((h.arms @ theta).max() - a @ theta))
        reward = float(a @ theta + NOISE * rng.choice((-1, 1)))
        turned = h.inverse @ a
        h.log_det += math.log1p(a @ turned)
        h.inverse = h.inverse - np.outer(turned, turned) / (1 + a @ turned)
        h.weighted = h.weighted + a * reward
        h.actions.append(a)
        h.rewards.append(reward)
        h.log_dets.append(h.log_det)
    return np.cumsum(lost), h


def _linucb(h: History, _: Any) -> int:
    mean, bonus = h.scores()
    return int(np.argmax(mean + h.beta * bonus))


def _random(_: History, rng: np.random.Generator) -> int:
    return int(rng.integers(ARMS))


def _regret_bound(log_det: float, rounds: int) -> float:
    """Return 2·beta·sqrt(2·T·log det V): regrets of 2·beta·|a| in the inverse's norm, and the elliptical potential."""
    return 2 * float(_beta(log_det)) * math.sqrt(2 * rounds * log_det)


def _beside(policy: Policy, d: int, rounds: int) -> tuple[Float, Float, History]:
    """Return the regret up to each round, its bound there, and what was seen."""
    regret, h = _play(policy, d, rounds)
    return regret, np.array([_regret_bound(x, t) for t, x in enumerate(h.log_dets, 1)]), h


def _most_log_det(d: int, rounds: int) -> Any:
    """Return what log det V is at most, a ball: the mean of the eigenvalues is at most 1 + T/d."""
    return d * (1 + flint.arb(rounds) / d).log()


def _attained() -> list[int]:
    """Return whether the bounds' parts are what they are where all of their steps are equalities."""
    h = History(np.empty(0), np.eye(1), np.zeros(1), 4.0, [], [])
    # 8 rounds of uncertainty 1 each, of which twice log det V is the sum, lose 2·beta at most each
    found = [same(_regret_bound(h.log_det, 8), math.fsum(2 * h.beta for _ in range(8)))]
    # three actions along each of two axes: V is 4 times the identity
    det = flint.arb((1 + 3) ** 2)
    found.append(same(meet(_most_log_det(2, 6).exp(), det), True))
    # exp(radius²/2) over sqrt(det V) has a mean of at most 1, hence is 1/DELTA with a probability of at most DELTA
    radius = (_beta(det.log()) - 1) / NOISE
    return [*found, same(meet((radius**2 / 2).exp(), det.sqrt() / DELTA), True)]


DIMS, ROUNDS = (2, 5), 2000


def _by_layers(h: History, _: Any) -> int:
    return _layered(h, *_needed(h))


def regrets(dims: tuple[int, ...] = DIMS, rounds: int = ROUNDS) -> Evidence:
    """LinUCB's regret after every round against the bound of its own confidence sets, and 30 rounds by layers."""
    curves: dict[str, Any] = {"rounds": list(range(10, rounds + 1, 10))}
    pairs: list[Any] = [*_attained()]
    for d, policy, most in (*((d, _linucb, rounds) for d in dims), (3, _by_layers, 30)):
        regret, bounds, h = _beside(policy, d, most)
        pairs += zip(regret, bounds, strict=True)
        pairs += [same(x <= _most_log_det(d, t), True) for t, x in enumerate(h.log_dets, 1)]
        pairs.append(same(bounds[-1], _regret_bound(h.log_det, most)))
        curves[f"{'layers' if policy is _by_layers else 'LinUCB'}, d = {d}"] = regret[9::10].tolist()
        curves[f"share of the bound, d = {d}"] = (regret / bounds)[9::10].tolist()
    curves["at random, d = 5"] = _play(_random, 5, rounds)[0][9::10].tolist()
    return judged(pairs, "regret over 2·beta·sqrt(2T·log det V), after any round", curves)


def random_actions() -> Evidence:
    """Actions at random, in the same games: after the last round their regret is beyond the bound for d = 2."""
    regret, bounds, _ = _beside(_random, min(DIMS), ROUNDS)
    return Evidence(regret[-1] / bounds[-1], 1, "regret of random actions over their bound")


WIDE, STARTS = (2, 4, 8, 16), (62, 250, 1000)


def _shares(policy: Policy, d: int, starts: tuple[int, ...]) -> tuple[list[float], float]:
    """Return by how much more the regret grows than its bound, from T rounds to 4·T, and its share of it at last."""
    regret, bounds, _ = _beside(policy, d, 4 * max(starts))
    shares = regret / bounds
    return [float(shares[4 * t - 1] / shares[t - 1]) for t in starts], float(shares[-1])


def growth(dims: tuple[int, ...] = WIDE, starts: tuple[int, ...] = STARTS) -> Evidence:
    """LinUCB's regret from T to 4·T rounds, over the growth of its bound; its share of the bound rises with d."""
    needs(min(starts) >= 1, "at least one round")
    found = [_shares(_linucb, d, starts) for d in dims]
    shares = [share for _, share in found]
    rising = [same(a < b, True) for a, b in itertools.pairwise(shares)]
    detail: dict[str, Any] = {"T": list(starts), **{f"d = {d}": x for d, (x, _) in zip(dims, found, strict=True)}}
    detail |= {"d": list(dims), "share of the bound after the last round": shares}
    what = "growth of the regret from T to 4T rounds, over that of its bound"
    return judged([*(x for ratios, _ in found for x in ratios), *rising], what, detail)


def random_growth() -> Evidence:
    """Actions at random: in each of the same games their regret grows by more, as it is linear in T."""
    found = min(x for d in WIDE for x in _shares(_random, d, STARTS)[0])
    return Evidence(found, 1, "least growth of the regret of random actions, over that of its bound")


def _doubled(det: Any) -> Any:
    """Return 2·log det V: x <= 2·log(1 + x) for x up to 1, and det V grows by 1 + x with an uncertainty x."""
    return 2 * flint.arb(det).log()


def _potential(actions: list[Any], what: str) -> Evidence:
    """Compare the sum of |a|² in the inverse's norm with 2·log det V, in rationals and balls."""
    v, uncertain = rational(np.eye(2)), Q(0)
    for a in actions:
        uncertain += a @ solve(v, a)
        v = v + np.multiply.outer(a, a)
    det = flint.fmpq_mat(v.tolist()).det()
    return Evidence(uncertain, _doubled(det), what)


def _unit(count: int) -> list[Any]:
    t = [Q(i, 7) for i in range(count)]
    return [np.array([(1 - x * x) / (1 + x * x), 2 * x / (1 + x * x)]) for x in t]


@precise()
def potential(size: Any = 1) -> Evidence:
    """The elliptical potential: actions of at most unit norm, the sum of their uncertainties below 2·log det V."""
    actions = [size * a for a in _unit(12)]
    needs(all((a * a).sum() <= 1 for a in actions), "actions of at most unit norm")
    return _potential(actions, "sum of uncertainties over log det V")


@precise()
def potential_large() -> Evidence:
    """One action of norm 2: its uncertainty is 4, and log det V is log 5."""
    return _potential([2 * a for a in _unit(1)], "sum of uncertainties over log det V, an action of norm 2")


def _layered(h: History, depth: int, eta: float) -> int:
    """Return the arm that layers choose: depth ReLU steps for the mean, and as many for each arm's uncertainty."""
    d = h.arms.shape[1]
    seen, rewards = np.array(h.actions).reshape(-1, d), np.array(h.rewards)
    mean, bonus = arm_scores(seen, rewards, h.arms, depth=depth, step=eta)
    return int(np.argmax(mean + h.beta * bonus))


def _needed(h: History) -> tuple[int, float]:
    """Return the layers after which scores are off by less than half the best two's distance, and their step.

    Layers leave a share rho of a solution: of the mean rho·|w|, of a squared bonus b² at most rho·|x|, hence of the
    bonus rho·|x|/b.
    """
    values = 1 / np.linalg.eigvalsh(h.inverse)
    low, high = values.min(), values.max()
    mean, bonus = h.scores()
    first, second = np.sort(mean + h.beta * bonus)[[-1, -2]]
    off = np.linalg.norm(h.inverse @ h.weighted) + h.beta * (np.linalg.norm(h.arms @ h.inverse, axis=1) / bonus).max()
    pace = math.log((high + low) / (high - low)) if high > low else math.inf
    return max(1, math.ceil(math.log(2 * off / (first - second)) / pace)), float(2 / (low + high))


def _known() -> int:
    """Return how often `_needed` is wrong for two arms 1 and s along the smallest eigenvalue, nothing being earned.

    A score is then beta·|a|/sqrt(low). Layers leave a share rho of the best one, from which the other is 1 - s away.
    """
    wrong, low = 0, 4  # eigenvalues whose inverses are not rounded
    for high, s in ((16, 0.8), (8, 0.25)):
        h = History(np.array([[1.0, 0.0], [s, 0.0]]), np.diag([1 / low, 1 / high]), np.zeros(2), 0.0, [], [])
        rho = (high - low) / (high + low)
        layers = next(c for c in itertools.count(1) if 2 * rho**c <= 1 - s)
        wrong += _needed(h) != (layers, 2 / (low + high))
    return wrong


def _compared(deep: bool, what: str, rounds: int = 30) -> Evidence:
    wrong, depths = [], []

    def policy(h: History, rng: np.random.Generator) -> int:
        depth, eta = _needed(h)
        depths.append(depth)
        chosen = _layered(h, depth if deep else 1, eta)
        wrong.append(chosen != _linucb(h, rng))
        return chosen

    for seed in range(2):
        _play(policy, 3, rounds, seed)
    return Evidence(total(*wrong, _known()), 0, what, {"round": list(range(1, rounds + 1)), "layers": depths[:rounds]})


def agreement(rounds: int = 30) -> Evidence:
    """A stack of ReLU layers that acts by itself: as many as the distance of the best two scores asks for."""
    needs(rounds >= 1, "at least one round")
    return _compared(True, "actions that are not LinUCB's", rounds)


def one_layer() -> Evidence:
    """One layer."""
    return _compared(False, "actions that are not LinUCB's, one layer")


def _drawn(h: History, noise: Float) -> Float:
    """Return Thompson sampling's scores of the arms under one draw, by eigenvectors."""
    values, vectors = np.linalg.eigh(h.inverse)
    mean, _ = h.scores()
    return np.asarray(mean + NOISE * (h.arms @ ((vectors * np.sqrt(values)) @ (vectors.T @ noise))))


def _needed_of_draw(h: History, noise: Float) -> int:
    """Return the layers after which scores of a draw are off by less than half the best two's distance.

    Layers leave a share of the mean's weights; of the root of 1/V what its iteration's residual e is, relative to it:
    from 1 - low / trace on a round takes e to (3 e² + e³)/4 at most. Arms have norm 1 at most.
    """
    values = 1 / np.linalg.eigvalsh(h.inverse)
    low, high = values.min(), values.max()
    second, first = np.sort(_drawn(h, noise))[-2:]
    of_mean, of_draw = np.linalg.norm(h.inverse @ h.weighted), NOISE * np.linalg.norm(noise) / math.sqrt(low)
    share, e, pace = 1.0, 1 - low / values.sum(), (high - 1) / (high + 1)
    for depth in itertools.count(1):
        share, e = share * pace, (3 * e**2 + e**3) / 4
        if 2 * (share * of_mean + e * of_draw) < first - second:
            return depth
    raise AssertionError


def _known_of_draw() -> int:
    """Return how often `_needed_of_draw` is wrong for arms 1 and s along the smallest of two eigenvalues, no mean.

    Their scores are NOISE/2 and s of it, and off by e of it at most.
    """
    wrong = 0
    for s, layers in ((0.0, 2), (0.75, 3), (0.98, 4)):  # e goes 0.8, 0.608, 0.333..., 0.093..., 0.0067...
        h = History(np.array([[1.0, 0.0], [s, 0.0]]), np.diag([1 / 4, 1 / 16]), np.zeros(2), 0.0, [], [])
        needed = _needed_of_draw(h, np.array([1.0, 0.0]))
        wrong += needed != layers
    return wrong


def _draws(deep: bool, what: str, rounds: int = 30) -> Evidence:
    wrong, depths = [], []

    def policy(h: History, rng: np.random.Generator) -> int:
        noise = np.asarray(rng.standard_normal(h.arms.shape[1]))
        depths.append(_needed_of_draw(h, noise))
        seen = np.array(h.actions).reshape(-1, h.arms.shape[1]), np.array(h.rewards)
        scores = thompson_scores(*seen, h.arms, noise, variance=NOISE**2, depth=depths[-1] if deep else 1)
        wrong.append(int(np.argmax(scores)) != int(np.argmax(_drawn(h, noise))))
        return int(np.argmax(scores))

    for seed in range(2):
        _play(policy, 3, rounds, seed)
    return Evidence(
        total(*wrong, _known_of_draw()), 0, what, {"round": list(range(1, rounds + 1)), "layers": depths[:rounds]}
    )


def draws(rounds: int = 30) -> Evidence:
    """A stack of ReLU layers and rounds of products that acts by itself, of the same draws."""
    needs(rounds >= 1, "at least one round")
    return _draws(True, "actions that are not Thompson sampling's", rounds)


def draws_of_one_layer() -> Evidence:
    """One layer, and one round for the root."""
    return _draws(False, "actions that are not Thompson sampling's, one layer")


CLAIMS = [
    Claim(
        "decisions-linucb",
        "A policy of ReLU attention layers takes all of LinUCB's actions, with log(1/gap)·kappa layers a round",
        SOURCE,
        agreement,
        one_layer,
        ("at least one round",),
    ),
    Claim(
        "decisions-thompson",
        "A policy of ReLU attention layers takes all of Thompson sampling's actions of the same draws",
        SOURCE,
        draws,
        draws_of_one_layer,
        ("at least one round",),
    ),
    Claim(
        "decisions-potential",
        "Uncertainties of actions of at most unit norm add up to 2·log det V at most",
        "Abbasi-Yadkori, Pal and Szepesvari 2011 (recalled)",
        potential,
        potential_large,
        ("actions of at most unit norm",),
    ),
    Claim(
        "decisions-regret",
        "LinUCB has a regret of at most 2·beta·sqrt(2T·log det V), log det V <= d·log(1 + T/d)",
        "Abbasi-Yadkori, Pal and Szepesvari 2011 (recalled), for the policy of arXiv 2310.08566",
        regrets,
        random_actions,
    ),
    Claim(
        "decisions-regret-growth",
        "From T to 4T rounds LinUCB's regret grows by less than its bound, that of random actions by more; with d it"
        " grows by more than the bound",
        "measured here, at arms drawn anew each round",
        growth,
        random_growth,
        ("at least one round",),
    ),
]
