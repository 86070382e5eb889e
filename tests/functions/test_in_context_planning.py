"""Counts against a loop, values against backward induction by hand, and regret that falls."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.functions.in_context_planning import ucb_vi, visit_sums

SIZES = (3, 4, 2)


def drawn(rng, count=60):
    return np.stack([rng.integers(n, size=count) for n in SIZES], 1)


@pytest.mark.parametrize("kind", [np.asarray, torch.asarray, jnp.asarray])
def test_sums_are_the_loop_s(kind):
    """In integers, so that no order of a sum rounds."""
    rng = np.random.default_rng(0)
    visits, values = drawn(rng), rng.integers(-9, 9, (60, 2)).astype(np.float32)
    due = np.zeros((*SIZES, 2), np.float32)
    for at, value in zip(visits, values, strict=True):
        due[tuple(at)] += value
    assert (np.asarray(visit_sums(kind(visits), kind(values), SIZES)) == due).all()


def by_hand(counts, sums, after, horizon, bonus):
    """Return values by loops, in floats that round as the function's do: the same divisions of exact sums."""
    q, later = np.empty(counts.shape, np.float32), np.zeros(counts.shape[1], np.float32)
    for h in reversed(range(horizon)):
        for s, a in np.ndindex(counts.shape[1:]):
            n = counts[h, s, a]
            value = horizon
            if n:
                value = min((sums[h, s, a] + after[h, s, a] @ later) / n + bonus / np.sqrt(n), horizon)
            q[h, s, a] = value
        later = q[h].max(1)
    return q


@pytest.mark.parametrize("kind", [np.asarray, torch.asarray, jnp.asarray])
@pytest.mark.parametrize("bonus", [0, 0.5, 8])
def test_values_are_backward_induction(kind, bonus):
    """Every triple is seen 0, 1, 4 or 16 times: means and roots are dyadic, so that nothing rounds."""
    rng = np.random.default_rng(1)
    cells = np.array(list(np.ndindex(SIZES)))
    visits = rng.permutation(np.repeat(cells, rng.choice((0, 1, 4, 16), len(cells)), axis=0))
    rewards, following = rng.integers(0, 2, len(visits)).astype(np.float32), rng.integers(0, 4, len(visits))
    counts, sums = np.zeros(SIZES, np.float32), np.zeros(SIZES, np.float32)
    after = np.zeros((*SIZES, 4), np.float32)
    for at, r, s in zip(map(tuple, visits), rewards, following, strict=True):
        counts[at] += 1
        sums[at] += r
        after[(*at, s)] += 1
    found = ucb_vi(*map(kind, (visits, rewards, following)), SIZES, bonus)
    due = by_hand(counts, sums, after, 3, np.float32(bonus))
    assert (np.asarray(found) == due).all()
    assert (counts == 0).any()
    assert (due[counts == 0] == 3).all()


def test_more_layers_act_as_ucb_vi():
    """So many steps from the end values are those of all layers, to the bit; one layer acts otherwise before."""
    rng, horizon = np.random.default_rng(3), 6
    visits = np.stack([rng.integers(n, size=900) for n in (horizon, 4, 2)], 1)
    told = visits, rng.integers(0, 2, 900) / 8.0, rng.integers(0, 4, 900), (horizon, 4, 2), 0.5
    whole = ucb_vi(*told)
    alike = []
    for layers in range(1, horizon + 1):
        found = ucb_vi(*told, layers=layers)
        assert (found[horizon - layers :] == whole[horizon - layers :]).all()
        alike.append(int((found.argmax(2) == whole.argmax(2)).sum()))
    assert (found == whole).all()
    assert (ucb_vi(*told, layers=99) == whole).all()
    assert alike[0] < alike[-1] == horizon * 4
    assert alike == sorted(alike)


def test_regret_falls():
    """A corridor where only going on, which pays at the end, is best: late episodes lose less than early ones."""
    horizon, states = 4, 4
    seen, lost = [(0, 0, 0, 0.0, 0)], []
    rng = np.random.default_rng(0)
    for _ in range(60):
        table = np.array(seen)
        q = ucb_vi(table[:, :3].astype(int), table[:, 3], table[:, 4].astype(int), (horizon, states, 2), bonus=0.5)
        s, total = 0, 0.0
        for h in range(horizon):
            a = int(q[h, s].argmax())
            on = a == 1 and rng.random() < 0.9
            after, reward = (min(s + 1, states - 1), float(s >= 2)) if on else (0, 0.125 * (a == 0))
            seen.append((h, s, a, reward, after))
            s, total = after, total + reward
        lost.append(total)
    assert np.sum(lost[-20:]) > np.sum(lost[:20])


def test_errors():
    visits = drawn(np.random.default_rng(2), 5)
    one, after = np.ones(5), np.zeros(5, int)
    for call, said in (
        (lambda: visit_sums(visits[:, :2], one[:, None], SIZES), "visits: shape is (5, 2), expected (T, 3)"),
        (lambda: visit_sums(visits, one[:3, None], SIZES), "values: shape is (3, 1), expected (5, m)"),
        (
            lambda: visit_sums(visits + 0.0, one[:, None], SIZES),
            "visits: is of float64, expected integers",
        ),
        (lambda: visit_sums(visits, one[:, None], (3, 4)), "sizes: got (3, 4), expected the numbers of steps"),
        (lambda: visit_sums(visits, one[:, None], (3, 0, 2)), "sizes: got 0, expected a whole number from 1 on"),
        (lambda: visit_sums(visits - 1, one[:, None], SIZES), "visits: a step is out of range, expected 0 to 2"),
        (lambda: visit_sums(visits + np.array([0, 4, 0]), one[:, None], SIZES), "visits: a state is out of range"),
        (lambda: ucb_vi(visits, one, after[:2], SIZES, 1), "following: shape is (2,), expected (5)"),
        (
            lambda: ucb_vi(visits, one, after + 4, SIZES, 1),
            "following: one is out of range, expected integers from 0",
        ),
        (
            lambda: ucb_vi(visits, one * 1.5, after, SIZES, 1),
            "rewards: one is out of range, expected numbers from 0 to 1",
        ),
        (lambda: ucb_vi(visits, -one, after, SIZES, 1), "rewards: one is out of range"),
        (lambda: ucb_vi(visits, one * np.nan, after, SIZES, 1), "rewards: one is out of range"),
        (lambda: ucb_vi(visits, one, after, SIZES, -1), "bonus: got -1, expected a number in [0, inf)"),
    ):
        with pytest.raises(InvalidInput, match=re.escape(said)):
            call()
