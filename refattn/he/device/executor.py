"""A schedule on NumPy words, in the memory that it plans: what a GPU must give, word for word."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .modular import Words
from .schedule import Schedule, Step, scratch_limbs
from .trace import Node, Operation
from .words import Evaluator

__all__ = ["execute"]

UNUSED = 2**64 - 1
"""What memory holds before it is written: no residue."""


def execute(
    schedule: Schedule,
    keys: Mapping[int, Words],
    parts: Sequence[Words],
    encoded: Callable[[Any], Words] | None = None,
) -> list[Words]:
    """Return the ciphertexts of the reply.

    Parameters
    ----------
    schedule : Schedule
        What is done.
    keys : mapping
        By Galois element its key, (digits, 2, primes, N); that for relinearisation at 0.
    parts : sequence of (2, primes, N) arrays
        The ciphertexts of the query; after them masks, (2, N), where there are any.
    encoded : callable, optional
        Takes a `Plain`, returns its words, (primes, N).
    """
    memory = np.full(schedule.words, UNUSED, np.uint64)
    evaluator = Evaluator(schedule.chain)

    def view(node: Node) -> Words:
        start = schedule.place(node)
        return memory[start : start + node.size * node.limbs * schedule.chain.degree].reshape(
            node.size, node.limbs, schedule.chain.degree
        )

    for step in schedule.steps:
        for i in step.loaded:
            view(schedule.inputs[i])[:] = parts[i]
        _poison(memory, schedule, step)
        for op in step.operations:
            view(op.out)[:] = _result(evaluator, op, [view(x) for x in op.operands], keys, encoded)
    return [view(x).copy() for x in schedule.outs]


def _poison(memory: Words, schedule: Schedule, step: Step) -> None:
    """Write over the step's scratch: what lies there must be nobody's."""
    for op, start in zip(step.operations, step.scratch, strict=True):
        memory[start : start + scratch_limbs(op) * schedule.chain.degree] = UNUSED


def _result(
    evaluator: Evaluator, op: Operation, xs: list[Words], keys: Mapping[int, Words], encoded: Any
) -> Words:  # fmt: skip
    if op.name == "unmask":
        return evaluator.unmask(xs[0], xs[1][0])
    limbs = op.out.limbs + (op.name in ("rescale", "shrink"))
    xs = [x[:, :limbs] for x in xs]
    if op.name == "dot":
        return evaluator.dot(xs[: len(xs) // 2], xs[len(xs) // 2 :])
    if op.name == "sum":
        total = xs[0]
        for x in xs[1:]:
            total = evaluator.add(total, x)
        return total
    if op.name in ("plus", "times"):
        plain = np.array(op.what, np.uint64)[:, None] if isinstance(op.what, tuple) else encoded(op.what)
        return evaluator.plus(xs[0], plain) if op.name == "plus" else evaluator.times(xs[0], plain)
    if op.name == "negate":
        return evaluator.negate(xs[0])
    if op.name == "relinearize":
        return evaluator.relinearize(xs[0], keys[0])
    if op.name == "shrink":
        return evaluator.rescale(evaluator.relinearize(xs[0], keys[0]))
    if op.name == "rescale":
        return evaluator.rescale(xs[0])
    turned = evaluator.galois(xs[0], op.what, keys[op.what])
    return evaluator.add(turned, xs[1]) if len(xs) == 2 else turned
