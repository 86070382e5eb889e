"""Transformers as decision makers: gradient steps by ReLU attention, fast solvers as layers, bandits and counts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .claim import Claim, Evidence, needs

__all__ = ["CLAIMS"]

Float = NDArray[np.float64]


def _relu_step(a: Float, r: Float, w: Float, eta: float, weight: float) -> Float:
    """Return w after a step of ridge regression: heads of relu(t) - relu(-t) = t, and -eta·weight·w by the FFN."""
    t = a @ w - r
    heads = np.maximum(t, 0)[:, None] * a - np.maximum(-t, 0)[:, None] * a
    return np.asarray(w - eta * heads.sum(0) - eta * weight * w)


def _ridge(n: int = 40, d: int = 5) -> tuple[Float, Float, float]:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((n, d))
    return a, a @ rng.standard_normal(d) + 0.1 * rng.standard_normal(n), 1.0


def _step_error(found: Callable[[Float, Float, Float], Float], what: str) -> Evidence:
    """Compare a layer's step of 0.01 with the gradient's, over the sizes of the terms."""
    a, r, weight = _ridge()
    w = np.random.default_rng(1).standard_normal(5)
    exact = w - 0.01 * (a.T @ (a @ w - r) + weight * w)
    size = 0.01 * (np.abs(a).T @ (np.abs(a) @ np.abs(w) + np.abs(r))).max() + np.abs(w).max()
    return Evidence(float(np.abs(found(a, r, w) - exact).max() / size), 100 * 2.0**-53, what)


def gradient() -> Evidence:
    """A layer against the gradient step, in float64."""
    return _step_error(lambda a, r, w: _relu_step(a, r, w, 0.01, 1.0), "distance over the terms' sizes")


def one_head() -> Evidence:
    """One ReLU head: only residuals of one sign."""
    return _step_error(
        lambda a, r, w: w - 0.01 * ((np.maximum(a @ w - r, 0)[:, None] * a).sum(0) + w), "distance with one head"
    )


def _descent(step: Callable[[float, float], float], count: int) -> tuple[list[float], float, float]:
    """Return the error after each of some layers, kappa, and the size of the solution."""
    a, r, weight = _ridge()
    h = a.T @ a + weight * np.eye(5)
    low, high = np.linalg.eigvalsh(h)[[0, -1]]
    exact, w, errors = np.linalg.solve(h, a.T @ r), np.zeros(5), []
    for _ in range(count):
        w = _relu_step(a, r, w, step(low, high), weight)
        errors.append(float(np.linalg.norm(w - exact)))
    return errors, float(high / low), float(np.linalg.norm(exact))


def layers(counts: tuple[int, ...] = (1, 5, 10, 20, 40)) -> Evidence:
    """L layers of the step 2/(m + M): the error falls by (kappa - 1)/(kappa + 1) a layer, or more."""
    errors, kappa, size = _descent(lambda low, high: 2 / (low + high), max(counts))
    found = [errors[c - 1] for c in counts]
    worst = max(e / (((kappa - 1) / (kappa + 1)) ** c * size + 1e-13) for e, c in zip(found, counts, strict=True))
    return Evidence(worst, 1 + 1e-9, "error over the bound", {"layers": list(counts), "errors": found})


def long_step() -> Evidence:
    """A step of 3/M, beyond what converges."""
    errors, _, size = _descent(lambda _, high: 3 / high, 40)
    return Evidence(errors[-1] / size, 1.0, "error after 40 layers over the start's")


def _depth(kappa: float, accelerated: bool, error: float = 1e-6) -> int:
    """Return how many steps a quadratic of condition kappa takes to a relative error."""
    rng = np.random.default_rng(3)
    u = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    h, b = u @ np.diag(np.geomspace(1 / kappa, 1, 6)) @ u.T, rng.standard_normal(6)
    exact, z = np.linalg.solve(h, b), np.zeros(6)
    p, momentum = z, (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1) if accelerated else 0.0
    for step in range(1, 200_000):
        after = p - (h @ p - b)
        p, z = after + momentum * (after - z), after
        if np.linalg.norm(z - exact) <= error * np.linalg.norm(exact):
            return step
    return 200_000


def accelerated(kappas: tuple[float, ...] = (10, 100, 1000, 10000)) -> Evidence:
    """Layers of accelerated steps: at most 2·sqrt(kappa)·log(kappa/error)."""
    needs(min(kappas) > 1, "kappa > 1")
    found = [_depth(k, accelerated=True) for k in kappas]
    worst = max(f / (2 * math.sqrt(k) * math.log(k / 1e-6)) for f, k in zip(found, kappas, strict=True))
    return Evidence(worst, 1.0, "layers over the bound", {"kappa": list(kappas), "layers": found})


def plain() -> Evidence:
    """Plain steps held to the same depth."""
    return Evidence(
        _depth(1000, accelerated=False) / (2 * math.sqrt(1000) * math.log(1000 / 1e-6)),
        1.0,
        "layers of plain steps over the bound",
    )


def _newton_schulz(scaled: bool) -> float:
    rng = np.random.default_rng(4)
    a = rng.standard_normal((5, 5))
    a = a @ a.T + 0.1 * np.eye(5)
    size = np.linalg.norm(a, 2) if scaled else 0.1 * np.linalg.norm(a, 2)
    y, z = a / size, np.eye(5)
    with np.errstate(all="ignore"):
        for _ in range(25):
            t = (3 * np.eye(5) - z @ y) / 2
            y, z = y @ t, t @ z
        error = np.linalg.norm(y @ y * size - a) / np.linalg.norm(a)
    return float(error) if math.isfinite(error) else math.inf


def root() -> Evidence:
    """Newton-Schulz for a matrix square root, products only, 25 rounds: what Thompson sampling needs."""
    return Evidence(_newton_schulz(scaled=True), 1e-12, "|Y² - A| / |A|")


def root_unscaled() -> Evidence:
    """Without the scaling that brings the spectrum into (0, 1]."""
    return Evidence(_newton_schulz(scaled=False), 1e-12, "|Y² - A| / |A|, spectrum up to 10")


def _bandit(policy: str, depth: int = 0, rounds: int = 200, seeds: int = 12) -> tuple[list[float], float]:
    """Return the mean regret up to each round on linear bandits, and the share of actions that are LinUCB's."""
    regret, same = np.zeros(rounds), 0
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        theta = rng.standard_normal(5) / 5**0.5
        arms = rng.standard_normal((10, 5)) / 5**0.5
        h, b = np.eye(5), np.zeros(5)
        for t in range(rounds):
            bonus = np.sqrt(np.einsum("ad,de,ae->a", arms, np.linalg.inv(h), arms))
            ucb = int(np.argmax(arms @ np.linalg.solve(h, b) + bonus))
            if policy == "ucb":
                action = ucb
            elif policy == "thompson":
                sample = np.linalg.solve(h, b) + np.linalg.cholesky(np.linalg.inv(h)) @ rng.standard_normal(5)
                action = int(np.argmax(arms @ sample))
            elif policy == "layers":  # depth gradient layers for the mean and, for each arm, for the bonus
                low, high = np.linalg.eigvalsh(h)[[0, -1]]
                eta, w, x = 2 / (low + high), np.zeros(5), np.zeros_like(arms)
                for _ in range(depth):
                    w, x = w - eta * (h @ w - b), x - eta * (x @ h - arms)
                action = int(np.argmax(arms @ w + np.sqrt(np.maximum((arms * x).sum(1), 0))))
            else:
                action = int(rng.integers(10))
            same += action == ucb
            regret[t:] += (arms @ theta).max() - arms[action] @ theta
            h = h + np.outer(arms[action], arms[action])
            b = b + arms[action] * (arms[action] @ theta + 0.5 * rng.standard_normal())
    return (regret / seeds).tolist(), same / (seeds * rounds)


def agreement(depths: tuple[int, ...] = (1, 4, 16, 64, 256)) -> Evidence:
    """The share of actions of an L-layer policy that are LinUCB's grows with L to all but one in a hundred."""
    shares = [_bandit("layers", depth, rounds=60, seeds=4)[1] for depth in depths]
    return Evidence(
        1 - shares[-1], 0.01, "share of other actions at the most layers", {"layers": list(depths), "share": shares}
    )


def one_layer() -> Evidence:
    """One layer."""
    return Evidence(1 - _bandit("layers", 1, rounds=60, seeds=4)[1], 0.01, "share of other actions with one layer")


def regrets() -> Evidence:
    """LinUCB and Thompson sampling: regret below 2·d·sqrt(T)·log T over bandits of unit scale, 12 seeds."""
    ucb, thompson, others = (_bandit(p)[0] for p in ("ucb", "thompson", "random"))
    bound = 2 * 5 * math.sqrt(200) * math.log(200) / 10  # unit scale: rewards of about 1/sqrt(d), noise 1/2
    curves = {"rounds": list(range(1, 201)), "LinUCB": ucb, "Thompson": thompson, "random": others}
    return Evidence(max(ucb[-1], thompson[-1]), bound, "mean regret after 200 rounds", curves)


def random_actions() -> Evidence:
    """Actions at random."""
    return Evidence(
        _bandit("random")[0][-1], 2 * 5 * math.sqrt(200) * math.log(200) / 10, "mean regret of random actions"
    )


def _visits(threshold: float) -> int:
    rng = np.random.default_rng(5)
    length, states, actions, steps = 60, 4, 3, 5
    seen = np.stack([rng.integers(m, size=length) for m in (steps, states, actions)], 1)
    one = [np.eye(m)[seen[:, i]] for i, m in enumerate((steps, states, actions))]
    wrong = 0
    for query in np.ndindex(steps, states, actions):
        match = sum(o[:, q] for o, q in zip(one, query, strict=True))
        count = np.maximum(match - threshold, 0).sum()
        wrong += int(count != (seen == query).all(1).sum())
    return wrong


def visits() -> Evidence:
    """Counts of (step, state, action) by relu(one-hot match - 2): exact, as UCB-VI needs them."""
    return Evidence(float(_visits(2.0)), 0.0, "wrong counts")


def visits_without() -> Evidence:
    """relu(match - 1)."""
    return Evidence(float(_visits(1.0)), 0.0, "wrong counts with the threshold 1")


SOURCE = "Lin, Bai and Mei, Transformers as Decision Makers (arXiv 2310.08566; abstract read, constructions are ours)"
CLAIMS = [
    Claim(
        "decisions-gradient",
        "Two ReLU attention heads do an exact gradient step of ridge regression",
        SOURCE,
        gradient,
        one_head,
    ),
    Claim("decisions-layers", "L layers leave an error of ((kappa - 1)/(kappa + 1))^L", SOURCE, layers, long_step),
    Claim(
        "decisions-accelerated",
        "Accelerated steps take O(sqrt(kappa) log(kappa/e)) layers",
        SOURCE,
        accelerated,
        plain,
        ("kappa > 1",),
    ),
    Claim(
        "decisions-root",
        "Newton-Schulz iterations, products only, give the matrix root of Thompson sampling",
        SOURCE,
        root,
        root_unscaled,
        ("spectrum in (0, 1] after scaling",),
    ),
    Claim(
        "decisions-linucb",
        "A policy of gradient layers takes LinUCB's actions as its layers grow",
        SOURCE,
        agreement,
        one_layer,
    ),
    Claim(
        "decisions-regret",
        "LinUCB and Thompson sampling have a regret of order d sqrt(T) log T",
        SOURCE,
        regrets,
        random_actions,
    ),
    Claim("decisions-counts", "One ReLU layer counts visits exactly, as UCB-VI needs", SOURCE, visits, visits_without),
]
