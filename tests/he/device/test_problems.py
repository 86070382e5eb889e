"""Drawn problems over what stands for a GPU; `python -m tests.he.device.gate problems 200` runs many on a GPU."""

import numpy as np
import pytest

from refattn.he import sessions

from .emulated import GXX, Emulated
from .problems import _drawn, drawn_problem, same_words

SMALL = 25  # in a ring of degree 8192, with three keys


def test_all_kinds_are_drawn():
    drawn = [_drawn(np.random.default_rng(seed)) for seed in range(200)]
    calls, plans = [call for _, call, _ in drawn], [more for _, _, more in drawn]
    assert {x.get("p") for x in calls} == {None, 2, 4, 6}
    assert {x.get("causal") for x in calls} == {None, "top_left", "bottom_right"}
    assert {x.get("upload") for x in plans} == {None, "full", "whole", "compact"}
    assert {x.get("normalize") for x in plans} == {None, "server", "client"}
    assert {x.get("mode") for x in plans} == {None, "throughput"}
    assert all(n_q <= n_k for (n_q, n_k, _, _), call, _ in drawn if "causal" in call)


def test_a_seed_draws_a_problem_again():
    (name, x, plan), (again, y, same) = drawn_problem(SMALL), drawn_problem(SMALL)
    assert (name, plan.digest) == (again, same.digest)
    assert (x.query == y.query).all()
    assert plan.ring.degree == 8192


@GXX
def test_a_drawn_problems_words_are_seals(folder, monkeypatch):
    pytest.importorskip("tenseal")
    monkeypatch.setattr(sessions, "Card", lambda degree: Emulated(degree, folder))
    assert same_words(SMALL, "cuda")[1]
