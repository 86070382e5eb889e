"""An encoder's messages from two servers that draw the same masks: SEAL's on the CPU, and one with a GPU."""

import itertools
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np

from refattn import he
from refattn.he import integers, refresh, wire
from refattn.he.device import masks
from refattn.he.device.format import FIELDS, FRONT

from ..forge import body

__all__ = ["contents", "fixed_masks", "renamed", "rounds", "same_rounds"]


@contextmanager
def fixed_masks():
    """Have masks and small polynomials drawn by a seed, in the order in which they are asked for."""
    seeds = itertools.count()

    def drawn(moduli, degree):
        rng = np.random.default_rng(next(seeds))
        return np.array([rng.integers(0, q, degree, dtype=np.uint64) for q in moduli])

    def small(moduli, degree, ternary):
        p = np.random.default_rng(next(seeds)).integers(-1 if ternary else -20, 2 if ternary else 21, degree)
        return np.array([p % q for q in moduli]).astype(np.uint64)

    with ExitStack() as stack:
        for module, name, value in (
            (refresh, "drawn", drawn), (integers, "small", small), (masks, "drawn", drawn), (masks, "small", small),
            (masks, "MOST_THREADS", 1),
        ):  # fmt: skip
            stack.enter_context(patch.object(module, name, value))
        yield


def contents(plan, message):
    """Return what a message says of its ciphertexts, and their words; the names of masked results are drawn."""
    kind = wire.kind_of(message)
    parts = wire.unpack(message, kind, plan.digest, 2**40).parts
    saved = [body(bytes(x)) for x in parts[kind == wire.MASKED :]]
    return kind, [(x[: FIELDS.size], x[FRONT:]) for x in saved]


def renamed(plan, answer, masked):
    """Return an answer as one to another masked result."""
    m = wire.unpack(answer, wire.FRESH, plan.digest, 2**40)
    name = bytes(wire.unpack(masked, wire.MASKED, plan.digest, 2**40).parts[0])
    return wire.pack(wire.Message(m.kind, m.plan, m.client, name, m.parts))


def rounds(server, query, answer):
    """Return a server's messages; `answer` is called with a block's number and its masked result."""
    found = [server.attend(query)]
    while wire.kind_of(found[-1]) == wire.MASKED:
        found.append(server.attend(answer(len(found) - 1, found[-1])))
    return found


def same_rounds(program, x):
    """Return, for each message, whether a GPU gives SEAL's ciphertexts; and the result."""
    client, answers = he.Client(program.plan), []
    keys, query = client.evaluation_keys(), client.encrypt(x)

    def asked(stage, masked):
        answers.append(client.refresh(masked))
        return answers[-1]

    with fixed_masks(), he.Server(program, keys) as cpu:
        theirs = rounds(cpu, query, asked)
    with fixed_masks(), he.Server(program, keys, device="cuda") as gpu:
        ours = rounds(gpu, query, lambda stage, masked: renamed(program.plan, answers[stage], masked))
    found = [contents(program.plan, a) == contents(program.plan, b) for a, b in zip(ours, theirs, strict=True)]
    return found, client.decrypt(ours[-1])
