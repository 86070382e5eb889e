"""Problems that are drawn: calls that the planner takes, of both operators, any sizes, masks and ways to send them."""

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np

from refattn import UnsupportedProblem, he
from refattn.he import wire
from refattn.he.device.encode import encoded
from refattn.he.device.executor import execute
from refattn.he.device.schedule import schedule_of

from .. import make_sigmoid
from ..make import planned, problem
from .exchange import Exchange

__all__ = ["drawn_problem", "problems", "same_words"]


def drawn_problem(seed):
    """Return a name, a call and its plan; what the planner refuses is drawn again."""
    rng = np.random.default_rng(seed)
    while True:
        sizes, call, more = _drawn(rng)
        try:
            x, plan = _made(sizes, seed, call, more)
        except UnsupportedProblem:
            continue
        return f"{sizes[0]} x {sizes[1]} x {sizes[2]}, {sizes[3]} outputs, {call | more}, seed {seed}", x, plan


def _drawn(rng):
    """Return sizes (n_q, n_k, d, d_v), and what the call and its plan are given."""
    if rng.random() < 0.1:  # a slot is an input, every number of it a ciphertext: few of them
        n, d = (int(rng.integers(1, most)) for most in (4, 5))
        call = {"heads": int(rng.integers(1, 41)), "p": int(rng.choice([2, 4]))}
        return (n, n, d, d), call, {"mode": "throughput", "normalize": str(rng.choice(["server", "client"]))}
    n_q, n_k, d, d_v, heads = (
        int(rng.integers(least, most)) for least, most in ((1, 25), (1, 33), *2 * [(2, 33)], (1, 5))
    )
    call, more = {"heads": heads}, {"upload": str(rng.choice(["full", "whole", "compact"]))}
    if rng.random() < 0.6:
        call["causal"] = str(rng.choice(["top_left", "bottom_right"]))
        n_q = min(n_q, n_k)
    if rng.random() < 0.75:
        call |= {"p": int(rng.choice([2, 4, 6])), "epsilon": float(rng.uniform(0.5, 4))}
        more["normalize"] = str(rng.choice(["server", "client"]))
    return (n_q, n_k, d, d_v), call, more


def _made(sizes, seed, call, more):
    if "p" in call:
        x = problem(*sizes, seed=seed, **call)
        return x, planned(x, **more)
    x = make_sigmoid.call(*sizes, seed=seed, **call)
    return x, make_sigmoid.planned(x, tolerance=0.1, **more)


def same_words(seed, device="cpu"):
    """Return a drawn problem's name, and whether a GPU, or on a CPU the executor, gives SEAL's words; keys are new."""
    name, x, plan = drawn_problem(seed)
    e, schedule = Exchange(plan, x), schedule_of(plan)
    if device == "cpu":
        keys, parts = e.given_words()
        found = execute(schedule, keys, parts, lambda a: encoded(a, plan.ring))
    else:
        with he.Server(plan, e.keys, device=device) as server:
            found = e.replied_words(schedule.outs, e.parts(server.attend(e.query), wire.REPLY))
    theirs = e.replied_words(schedule.outs)
    return name, all(np.array_equal(a, b) for a, b in zip(found, theirs, strict=True))


def problems(count, device):
    """Yield names, and whether a device gives SEAL's words, of drawn problems that the machine's cores share."""
    with ProcessPoolExecutor(min(count, os.cpu_count() or 1), get_context("spawn")) as pool:
        yield from pool.map(partial(same_words, device=device), range(count))
