"""A query's program as steps: operations of one kind and level that do not wait for each other, over all its blocks.

Each operation is done as early as its operands allow; a ciphertext of the query is taken in just before its first use,
so that those of the values may lie where those of the keys were. What is a ciphertext's place is free after its last
use.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..planned import Program
from .chain import Chain
from .trace import Node, Operation, Trace, trace_of

__all__ = ["Schedule", "Step", "schedule_of", "scheduled", "scratch_limbs"]

MOST_SCRATCH = 2**26
"""Words that a step may need beside its operands and results: 512 MiB; a larger batch is cut."""
MOST_LOADED = 2**26
"""Words of the query's ciphertexts that are taken in for a step: 512 MiB; they are gone before the next are."""


@dataclass(frozen=True)
class Step:
    """Operations that are done together.

    Attributes
    ----------
    name : str
        That of an operation; or "load": ciphertexts of the query are taken in.
    operations : tuple of Operation
        What is done; none of a load.
    loaded : tuple of int
        The places, among the inputs, of what is loaded.
    scratch : tuple of int
        For each operation, where words of its own begin.
    """

    name: str
    operations: tuple[Operation, ...] = ()
    loaded: tuple[int, ...] = ()
    scratch: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Schedule:
    """Steps, and where in memory everything lies.

    Attributes
    ----------
    chain : Chain
        The ring's.
    inputs, outs : sequence of Node
        The ciphertexts of the query, and masks after them; the ciphertexts of the reply.
    steps : sequence of Step
        In their order.
    places : dict of int to int
        By a node's number, its first word.
    words : int
        The memory's size: the peak of all that lives at once.
    held, kept : int
        How many of the inputs, the last ones, do not come with a message: they stay on the device from one to the next.
        How many of the outs, the last ones, are to stay there.
    """

    chain: Chain
    inputs: Sequence[Node]
    outs: Sequence[Node]
    steps: Sequence[Step]
    places: dict[int, int]
    words: int
    held: int = 0
    kept: int = 0

    @property
    def came(self) -> int:
        """How many of the inputs come with a message."""
        return len(self.inputs) - self.held

    def sent(self, step: Step) -> list[int]:
        """Return the places, in a message, of what a step takes in of it."""
        return [i for i in step.loaded if i < self.came]

    @property
    def replies(self) -> Sequence[Node]:
        """The outs that are sent."""
        return self.outs[: len(self.outs) - self.kept]

    def place(self, node: Node, polynomial: int = 0, limb: int = 0) -> int:
        """Return the first word of a polynomial's limb."""
        return self.places[node.number] + (polynomial * node.limbs + limb) * self.chain.degree

    @cached_property
    def elements(self) -> tuple[int, ...]:
        """The Galois elements that keys are needed for."""
        return tuple(sorted({op.what for s in self.steps if s.name == "galois" for op in s.operations}))

    @property
    def phases(self) -> list[list[Step]]:
        """The steps, cut before each load."""
        found: list[list[Step]] = []
        for step in self.steps:
            if step.name == "load":
                found.append([])
            found[-1].append(step)
        return found


def schedule_of(program: Program, stage: int = 0) -> Schedule:
    """Return the schedule of a plan, of a layer, or of a block of an encoder."""
    return scheduled(*trace_of(program, stage))


def scheduled(trace: Trace, outs: Sequence[Node], held: int = 0, kept: int = 0) -> Schedule:
    """Return the schedule of what was written down; `held` and `kept` as a `Schedule` has them."""
    operations = _joined(_summed(trace.operations, outs), outs)
    grouped = _steps(trace.inputs, operations, trace.chain.degree)
    steps, places, words = _placed(trace.chain.degree, trace.inputs, grouped, outs)
    return Schedule(trace.chain, trace.inputs, outs, steps, places, words, held, kept)


def _uses(operations: Iterable[Operation], outs: Iterable[Node]) -> Counter[int]:
    found = Counter(x.number for x in outs)
    for op in operations:
        found.update(x.number for x in op.operands)
    return found


def _summed(operations: Sequence[Operation], outs: Sequence[Node]) -> list[Operation]:
    """Return the operations with sums of sums as one sum, where nothing else uses them: words come out the same."""
    uses = _uses(operations, outs)
    sums: dict[int, Operation] = {}
    inner = set()
    for op in operations:
        if op.name != "sum":
            continue
        terms: list[Node] = []
        for x in op.operands:
            if x.number in sums and uses[x.number] == 1 and x.limbs == op.out.limbs:
                terms += sums[x.number].operands
                inner.add(x.number)
            else:
                terms.append(x)
        sums[op.out.number] = replace(op, operands=tuple(terms))
    every = (sums.get(op.out.number, op) for op in operations)
    return [op for op in every if op.out.number not in inner]


def _joined(operations: Sequence[Operation], outs: Sequence[Node]) -> list[Operation]:
    """Return the operations with two as one where the first is for the second alone: a key switch then goes on.

    Relinearising and rescaling ("shrink"), and turning and adding (a "galois" of two operands).
    """
    uses = _uses(operations, outs)
    made = {op.out.number: op for op in operations}
    inner, found = set(), {}
    for op in operations:
        firsts = [made.get(x.number) for x in op.operands]
        if op.name == "rescale" and firsts[0] and firsts[0].name == "relinearize" and uses[firsts[0].out.number] == 1:
            inner.add(firsts[0].out.number)
            found[op.out.number] = replace(op, name="shrink", operands=firsts[0].operands)
        if op.name != "sum" or len(firsts) != 2:
            continue
        for first, other in zip(firsts, reversed(op.operands), strict=True):
            if first and first.name == "galois" and uses[first.out.number] == 1 and first.out.limbs == op.out.limbs:
                inner.add(first.out.number)
                found[op.out.number] = replace(first, out=op.out, operands=(first.operands[0], other))
                break
    every = (found.get(op.out.number, op) for op in operations)
    return [op for op in every if op.out.number not in inner]


def _steps(inputs: Sequence[Node], operations: Sequence[Operation], degree: int) -> list[Step]:
    """Return the steps, their scratch not yet placed; a ciphertext of the query is loaded before its first use."""
    depth = {x.number: 0 for x in inputs}
    groups: dict[tuple[int, str, int], list[Operation]] = defaultdict(list)
    for op in operations:
        at = depth[op.out.number] = 1 + max(depth[x.number] for x in op.operands)
        groups[at, op.name, op.out.limbs].append(op)
    waiting = {x.number: i for i, x in enumerate(inputs)}
    steps = []
    for key in sorted(groups):
        for batch in _cut(groups[key], waiting, degree):
            used = dict.fromkeys(x.number for op in batch for x in op.operands if x.number in waiting)
            if used:
                steps.append(Step("load", loaded=tuple(waiting.pop(n) for n in used)))
            steps.append(Step(key[1], tuple(batch)))
    if waiting:
        steps.append(Step("load", loaded=tuple(waiting.values())))  # they are checked, though nobody uses them
    return steps


def _cut(operations: Sequence[Operation], waiting: Iterable[int], degree: int) -> list[list[Operation]]:
    """Return a batch as one, or as several where it needs too much scratch, or too much is loaded for it."""
    most = max(1, MOST_SCRATCH // max(1, scratch_limbs(operations[0]) * degree))
    found: list[list[Operation]] = [[]]
    rest, words = set(waiting), 0
    for op in operations:
        fresh = {x for x in op.operands if x.number in rest}
        more = sum(x.size * x.limbs * degree for x in fresh)
        if found[-1] and (len(found[-1]) == most or words + more > MOST_LOADED):
            found.append([])
            words = 0
        found[-1].append(op)
        words += more
        rest -= {x.number for x in fresh}
    return found


def scratch_limbs(op: Operation) -> int:
    """Return the limbs that an operation needs for itself."""
    if op.name == "rescale":
        return op.out.size * (op.out.limbs + 1)
    if op.name == "unmask":
        return op.out.limbs
    if op.name not in ("relinearize", "galois", "shrink"):
        return 0
    limbs = op.operands[0].limbs
    # digits, digits modulo each prime, two sums with the special prime, what rounding takes from each
    found = limbs + limbs * (limbs + 1) + 2 * (limbs + 1) + 2 * limbs
    return found + (2 * limbs + 2 * (limbs - 1) if op.name == "shrink" else 0)


def _placed(
    degree: int, inputs: Sequence[Node], steps: Sequence[Step], outs: Sequence[Node]
) -> tuple[list[Step], dict[int, int], int]:
    """Return the steps with their scratch, places of all nodes, and the words in all."""
    last: dict[int, int] = {}
    nodes = {x.number: x for x in inputs}
    for at, step in enumerate(steps):
        for op in step.operations:
            nodes[op.out.number] = op.out
            last.update((x.number, at) for x in (op.out, *op.operands))
        last.update((inputs[i].number, at) for i in step.loaded)
    last.update((x.number, len(steps)) for x in outs)
    ends: dict[int, list[int]] = defaultdict(list)
    for number, at in last.items():
        ends[at].append(number)
    memory, placed = _Memory(), []
    places: dict[int, int] = {}
    sizes = {n: x.size * x.limbs * degree for n, x in nodes.items()}
    for at, step in enumerate(steps):
        made = [inputs[i].number for i in step.loaded] + [op.out.number for op in step.operations]
        places.update((n, memory.take(sizes[n])) for n in made)
        own = [scratch_limbs(op) * degree for op in step.operations]
        scratch = tuple(memory.take(words) for words in own)
        placed.append(replace(step, scratch=scratch))
        for first, words in zip(scratch, own, strict=True):
            memory.give(first, words)
        for n in ends[at]:
            memory.give(places[n], sizes[n])
    return placed, places, memory.end


class _Memory:
    """Places that are taken and given back: the lowest that is large enough is taken."""

    def __init__(self) -> None:
        self.end = 0
        self._free: list[tuple[int, int]] = []  # (first word, one past the last), in order

    def take(self, words: int) -> int:
        for i, (start, stop) in enumerate(self._free):
            if stop - start >= words:
                self._free[i : i + 1] = [(start + words, stop)] if stop - start > words else []
                return start
        start = self.end
        if self._free and self._free[-1][1] == self.end:
            start = self._free.pop()[0]
        self.end = start + words
        return start

    def give(self, start: int, words: int) -> None:
        if not words:
            return
        insort(self._free, (start, start + words))
        merged: list[tuple[int, int]] = []
        for a, b in self._free:
            if merged and merged[-1][1] == a:
                merged[-1] = (merged[-1][0], b)
            else:
                merged.append((a, b))
        self._free = merged
