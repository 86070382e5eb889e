"""A schedule's steps as launches of kernels: lists of items, with the addresses of what they read and write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .build import ITEM, geometry
from .schedule import Schedule, Step
from .trace import Node, Operation, Plain

__all__ = [
    "MOST_REJECTED", "Addresses", "Launch", "copy_launches", "launches_of", "plain_launches", "seed_launches",
    "seed_room",
]  # fmt: skip

ROUND, INVERSE = 1, 2
NEGATE, TIMES, PLUS, TIMES_PLAIN, PLUS_PLAIN, COPY = range(6)
MOST_REJECTED = 255
"""Words of a seed's polynomial that may be left out; a chain's primes lie so that one in 2**28 is."""
MOST_DOTS = 4
"""Sums of products that a thread has in registers."""
FILLING = 528
"""Blocks that keep a GPU busy: four for each of 132 multiprocessors."""


@dataclass(frozen=True)
class Launch:
    """A launch: a kernel, its items, and the primes of a seed's polynomial."""

    kernel: str
    items: NDArray[Any]
    limbs: int = 1

    @property
    def results(self) -> int:
        """How many items there would be if each had one result."""
        return int(self.items["limbs"].sum()) if self.kernel == "dot" else len(self.items)


@dataclass(frozen=True)
class Addresses:
    """Where things are on the device.

    Attributes
    ----------
    memory : int
        The schedule's.
    keys, permutations : mapping of int to int
        By Galois element; the key for relinearisation at 0.
    plains : mapping
        By `Plain`.
    seeds, seed_room : int
        The seeds of the query's ciphertexts, 64 bytes each; where they are expanded. 0 where there are none.
    held : sequence of int
        The ciphertexts that stay on the device from one message to the next, in the order of the schedule's inputs.
    """

    memory: int
    keys: Mapping[int, int]
    permutations: Mapping[int, int]
    plains: Mapping[Plain, int]
    seeds: int = 0
    seed_room: int = 0
    held: Sequence[int] = ()


def seed_room(limbs: int, degree: int) -> int:
    """Return the words that expanding a seed takes: its roots, and the list of what is left out."""
    return limbs * degree // 64 + 1 + MOST_REJECTED


def seed_launches(degree: int, jobs: Sequence[tuple[int, int, int]], room: int) -> list[Launch]:
    """Return what expands seeds: jobs of (the seed's address, the polynomial's, its primes), and where room is."""
    by_limbs: dict[int, list[dict[str, int]]] = {}
    for src, dst, limbs in jobs:
        item = {"src": src, "dst": dst, "x": room, "add": room + limbs * degree // 8, "count": MOST_REJECTED}
        by_limbs.setdefault(limbs, []).append(item | {"limbs": limbs})
        room += 8 * seed_room(limbs, degree)
    kernels = ("seed_roots", "seed_words", "seed_again")
    return [x for limbs, items in by_limbs.items() for kernel in kernels for x in _launches(kernel, items, limbs)]


def plain_launches(degree: int, jobs: Sequence[tuple[int, int, int, int]]) -> list[Launch]:
    """Return what transforms whole numbers: jobs of (their address, room's, the result's, primes)."""
    first, last = [], []
    for src, room, dst, limbs in jobs:
        for k in range(limbs):
            at = 8 * degree * k
            first.append({"src": src, "dst": room + at, "prime": k})
            last.append({"src": room + at, "dst": dst + at, "prime": k})
    return [*_launches("residues", first), *_launches("subtract", last)]


def copy_launches(degree: int, jobs: Sequence[tuple[int, int, int]]) -> list[Launch]:
    """Return what copies limbs: jobs of (their address, the copies' address, how many)."""
    limb = 8 * degree
    return _launches(
        "each",
        [{"src": src + k * limb, "dst": dst + k * limb, "flags": COPY} for src, dst, n in jobs for k in range(n)],
    )


def _launches(kernel: str, items: Sequence[Mapping[str, int]], limbs: int = 1) -> list[Launch]:
    rows = np.zeros(len(items), ITEM)
    for name in ITEM.names or ():
        rows[name] = [i.get(name, 0) for i in items]
    most = 65535  # blocks of a grid's second dimension
    return [Launch(kernel, rows[i : i + most], limbs) for i in range(0, len(rows), most)]


def launches_of(schedule: Schedule, steps: Sequence[Step], at: Addresses) -> tuple[list[Launch], NDArray[np.uint64]]:
    """Return the launches of some steps, and lists of addresses that items of "sum" and "dot" have the places of in x.

    To those items' x the address of the lists must be added.
    """
    made = _Maker(schedule, at)
    for step in steps:
        if step.name == "load":
            made.load(step.loaded)
        elif step.name in ("relinearize", "galois", "shrink"):
            made.switch(step)
        else:
            known = ("rescale", "sum", "dot", "unmask")
            getattr(made, step.name if step.name in known else "each")(step)
    return made.found, np.array(made.lists, np.uint64)


@dataclass(frozen=True)
class _Division:
    """A polynomial's limbs x, `kept` of them, to be divided by a prime; `rest` is x modulo it, as spread takes it.

    room: for as many limbs. out: the result's first limb. add (permuted by perm) and plus are added to it.
    """

    x: int
    rest: int
    prime: int
    kept: int
    room: int
    out: int
    add: int = 0
    perm: int = 0
    plus: int = 0


class _Maker:
    """The launches so far."""

    def __init__(self, schedule: Schedule, at: Addresses) -> None:
        self.schedule, self.at, self.chain = schedule, at, schedule.chain
        self.limb = 8 * schedule.chain.degree
        self.found: list[Launch] = []
        self.lists: list[int] = []

    def _add(self, kernel: str, items: Sequence[Mapping[str, int]]) -> None:
        self.found += _launches(kernel, items)

    def _place(self, node: Node, polynomial: int = 0, limb: int = 0) -> int:
        return self.at.memory + 8 * self.schedule.place(node, polynomial, limb)

    def load(self, loaded: Sequence[int]) -> None:
        """Expand the seeds of what was loaded; bring what stays on the device to its place."""
        inputs, came = self.schedule.inputs, self.schedule.came
        copies = [(self.at.held[i - came], self._place(x := inputs[i]), x.size * x.limbs) for i in loaded if i >= came]
        self.found += copy_launches(self.chain.degree, copies)
        if self.at.seeds:
            found = [(i, inputs[i]) for i in loaded if i < came]
            jobs = [(self.at.seeds + 64 * i, self._place(x, 1), x.limbs) for i, x in found if x.size == 2]
            self.found += seed_launches(self.chain.degree, jobs, self.at.seed_room)

    def each(self, step: Step) -> None:
        """Negate, or multiply with or add what is public."""
        items = []
        for op in step.operations:
            (a,), o = op.operands, op.out
            for c in range(o.size):
                for k in range(o.limbs):
                    item = {"src": self._place(a, c, k), "dst": self._place(o, c, k), "prime": k, "flags": NEGATE}
                    if op.name == "plus" and c:
                        item["flags"] = COPY
                    elif isinstance(op.what, Plain):
                        item["x"] = self.at.plains[op.what] + k * self.limb
                        item["flags"] = TIMES_PLAIN if op.name == "times" else PLUS_PLAIN
                    elif op.name != "negate":
                        w = op.what[k]
                        item |= {"key": w, "add": (w << 64) // self.chain.primes[k]}
                        item["flags"] = TIMES if op.name == "times" else PLUS
                    items.append(item)
        self._add("each", items)

    def sum(self, step: Step) -> None:
        """Add ciphertexts."""
        items = []
        for op in step.operations:
            for c in range(op.out.size):
                for k in range(op.out.limbs):
                    item = {
                        "x": 8 * len(self.lists),
                        "count": len(op.operands),
                        "prime": k,
                        "dst": self._place(op.out, c, k),
                    }
                    self.lists += [self._place(x, c, k) for x in op.operands]
                    items.append(item)
        self._add("sum", items)

    def dot(self, step: Step) -> None:
        """Add products of ciphertexts; sums whose first operands are the same read them once."""
        together: dict[tuple[Node, ...], list[Operation]] = {}
        for op in step.operations:
            together.setdefault(op.operands[: len(op.operands) // 2], []).append(op)
        items = []
        for first, ops in together.items():
            for some in (ops[i : i + MOST_DOTS] for i in range(0, len(ops), MOST_DOTS)):
                for k in range(some[0].out.limbs):
                    item = {"x": 8 * len(self.lists), "count": len(first), "prime": k, "limbs": len(some)}
                    items.append(item | {"key": some[0].out.limbs * self.chain.degree})
                    self.lists += [self._place(op.out, 0, k) for op in some]
                    for r, a in enumerate(first):
                        them = (a, *(op.operands[len(first) + r] for op in some))
                        self.lists += [self._place(x, c, k) for x in them for c in (0, 1)]
        self._add("dot", items)

    def unmask(self, step: Step) -> None:
        """Subtract masks from ciphertexts' first polynomials."""
        first, last, copies = [], [], []
        for op, scratch in zip(step.operations, step.scratch, strict=True):
            a, mask = op.operands
            for k in range(op.out.limbs):
                room = self.at.memory + 8 * scratch + k * self.limb
                first.append({"src": self._place(mask), "dst": room, "prime": k})
                last.append({"src": room, "x": self._place(a, 0, k), "dst": self._place(op.out, 0, k), "prime": k})
                copies.append({"src": self._place(a, 1, k), "dst": self._place(op.out, 1, k), "flags": COPY})
        self._add("residues", first)
        self._add("subtract", last)
        self._add("each", copies)

    def rescale(self, step: Step) -> None:
        """Divide by the last prime."""
        first: list[dict[str, int]] = []
        divisions: list[_Division] = []
        for op, scratch in zip(step.operations, step.scratch, strict=True):
            (a,), o = op.operands, op.out
            room = self.at.memory + 8 * scratch
            for c in range(o.size):
                first.append({"src": self._place(a, c, o.limbs), "dst": room, "prime": o.limbs})
                divisions.append(
                    _Division(self._place(a, c), room, o.limbs, o.limbs, room + self.limb, self._place(o, c))
                )
                room += (1 + o.limbs) * self.limb
        self._add("inverse_rows", first)
        self._divide(divisions)

    def _divide(self, divisions: Sequence[_Division], last: bool = False) -> None:
        """Divide by primes; last: the last limb of a result is wanted after the inverse's pass over rows."""
        rests = [
            {"src": d.rest, "dst": d.room, "from": d.prime, "flags": ROUND, "limbs": d.kept} for d in divisions
        ]  # fmt: skip
        self._spread(rests, divisions[0].kept)
        items = []
        for d in divisions:
            for k in range(d.kept):
                at = k * self.limb
                item = {
                    "src": d.room + at,
                    "x": d.x + at,
                    "dst": d.out + at,
                    "prime": k,
                    "from": d.prime,
                    "perm": d.perm,
                }
                item |= {"flags": INVERSE if last and k == d.kept - 1 else 0}
                items.append(item | {"add": d.add and d.add + at, "plus": d.plus and d.plus + at})
        self._add("drop", items)

    def _spread(self, items: Sequence[dict[str, int]], targets: int) -> None:
        """Bring limbs to other primes: few of them by blocks of their own for each prime, many of them together."""
        tiles = len(items) * geometry("spread", self.chain.degree)[0]
        each = -(-targets // min(targets, -(-FILLING // tiles)))
        split = []
        for item in items:
            given = {"key": self.chain.degree} | item
            split += [given | {"first": k, "count": min(each, targets - k)} for k in range(0, targets, each)]
        self._add("spread", split)

    def switch(self, step: Step) -> None:
        """Switch keys: relinearise, or turn, and what comes with it."""
        limbs, shrink = step.operations[0].operands[0].limbs, step.name == "shrink"
        jobs = [(op, self.at.memory + 8 * scratch) for op, scratch in zip(step.operations, step.scratch, strict=True)]
        self._digits(jobs, limbs)
        by_special: list[_Division] = []
        by_last: list[_Division] = []
        for op, room in jobs:
            sums = room + limbs * (limbs + 2) * self.limb
            spread = sums + 2 * (limbs + 1) * self.limb
            after = spread + 2 * limbs * self.limb
            for c in (0, 1):
                x = sums + c * (limbs + 1) * self.limb
                out = after + c * limbs * self.limb if shrink else self._place(op.out, c)
                rest, own = x + limbs * self.limb, spread + c * limbs * self.limb
                by_special.append(_Division(x, rest, self.chain.special, limbs, own, out, *self._added(op, c)))
                rest, own = out + (limbs - 1) * self.limb, after + (2 * limbs + c * (limbs - 1)) * self.limb
                by_last.append(_Division(out, rest, limbs - 1, limbs - 1, own, self._place(op.out, c)))
        self._divide(by_special, last=shrink)
        if shrink:
            self._divide(by_last)

    def _added(self, op: Operation, c: int) -> tuple[int, int, int]:
        """Return what is added to a polynomial: an address, its permutation's, and an address without one."""
        a, *other = op.operands
        if op.name != "galois":
            return self._place(a, c), 0, 0
        plus = self._place(other[0], c) if other else 0
        return (0, 0, plus) if c else (self._place(a), self.at.permutations[op.what], plus)

    def _digits(self, jobs: Sequence[tuple[Operation, int]], limbs: int) -> None:
        """Take a polynomial apart into digits, and multiply them with a key's."""
        first: list[dict[str, int]] = []
        spread: list[dict[str, int]] = []
        keys: list[dict[str, int]] = []
        for op, room in jobs:
            (a, *_), turned = op.operands, op.name == "galois"
            target = self._place(a, 1 if turned else 2)
            perm = self.at.permutations[op.what] if turned else 0
            moved, sums = room + limbs * self.limb, room + limbs * (limbs + 2) * self.limb
            for j in range(limbs):
                digit = room + j * self.limb
                first.append({"src": target + j * self.limb, "dst": digit, "prime": j, "perm": perm})
                spread.append({
                    "src": digit, "dst": moved + j * self.limb, "from": j, "limbs": limbs,
                    "key": limbs * self.chain.degree,
                })  # fmt: skip
            for k in range(limbs + 1):
                prime = k if k < limbs else self.chain.special
                keys.append({
                    "src": moved + k * limbs * self.limb, "x": target + k * self.limb if k < limbs else 0, "perm": perm,
                    "key": self.at.keys[op.what if turned else 0] + prime * self.limb, "prime": prime, "from": k,
                    "count": limbs, "dst": sums + k * self.limb, "add": sums + (limbs + 1 + k) * self.limb,
                    "flags": INVERSE if k == limbs else 0,
                })  # fmt: skip
        self._add("inverse_rows", first)
        self._spread(spread, limbs + 1)
        self._add("times_key", keys)
