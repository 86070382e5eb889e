"""Decoding on a device: the cache stays there, and a step is one of a few programs, by how full it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import InvalidInput
from ..cache import Cache, Context
from ..linear import Plain as Known
from .chain import chain_of
from .encode import whole_numbers
from .format import Data, Received
from .launches import copy_launches
from .schedule import Schedule, scheduled
from .session import Each, Session
from .tables import Device
from .trace import Plain, Trace

__all__ = ["DecodingSession", "is_zero", "kinds_of", "step_of"]

Kind = tuple[int, bool]
"""Of a step: spans that are in the cache after it, and whether its token begins the last one."""


def kind_of(plan: Any, count: int) -> Kind:
    """Return the kind of the step of a token, of which `count` came before."""
    rows = plan.layout.rows
    fresh = count == 0 or (plan.context + count) % rows == 0
    return (plan.context + count) // rows - plan.context // rows + 1, fresh


def kinds_of(plan: Any) -> dict[Kind, int]:
    """Return the kinds of a sequence's steps, each with the number of its first token."""
    found: dict[Kind, int] = {}
    for count in range(plan.longest):
        found.setdefault(kind_of(plan, count), count)
    return found


def step_of(plan: Any, context: Context | None, count: int) -> Schedule:
    """Return the schedule of a token's step: of its ciphertexts and those that the cache has for it.

    Outs are the reply, and what the last span of the cache is then: by blocks its keys and its values.
    """
    trace, layout = Trace(chain_of(plan.ring)), plan.layout
    scale, top = 2.0**plan.ring.middle, plan.ring.levels + 1
    parts = [trace.input(n, scale) for n in plan.part_limbs()]
    spans, fresh = kind_of(plan, count)
    each = (spans - fresh) * layout.parts
    keys, values = [], []
    for _ in layout.blocks():
        keys.append(tuple(trace.input(top, scale) for _ in range(each)))
        values.append(tuple(trace.input(plan.value_limbs, scale) for _ in range(each)))
    after = Cache(plan, context, count, tuple(keys), tuple(values)).appended(trace, parts)
    last = [x for pair in zip(after.keys, after.values, strict=True) for of in pair for x in of[-layout.parts :]]
    return scheduled(trace, [*after.attend(trace, parts), *last], len(trace.inputs) - len(parts), len(last))


def is_zero(plan: Any, plain: Known) -> bool:
    """Tell whether numbers are all zero once they are encoded, at the scale and the level of a key."""
    ring = plan.ring
    return not whole_numbers(Plain(plain, ring.levels + 1, 2.0**ring.middle), ring).any()


class DecodingSession(Session):
    """A client's keys and the cache of one sequence, on a device.

    Parameters
    ----------
    plan : DecodingPlan
        What is computed.
    context : Context or None
        What is in the clear.
    parts, device, each
        As a `Session` takes them.
    """

    def __init__(
        self, plan: Any, context: Context | None, parts: Sequence[Data], device: Device, each: Each = map
    ) -> None:
        self.count, self._context, self._kinds = 0, context, kinds_of(plan)
        self._number = {kind: i for i, kind in enumerate(self._kinds)}
        super().__init__(plan, parts, device, each)

    def _planned(self) -> list[Schedule]:
        return [step_of(self.program, self._context, count) for count in self._kinds.values()]

    def _kept_bytes(self) -> int:
        return int(self.program.plan.cache_bytes)

    def _begin(self, keys: dict[int, list[Received]]) -> None:
        self._cache = self.device.empty(self._kept_bytes())
        super()._begin(keys)
        self._keep = []
        for (spans, _), stage in zip(self._kinds, self._stages, strict=True):
            schedule, copies = stage.schedule, []
            last = [x for pair in self._places(spans - 1, spans) for x in pair]
            for node, at in zip(schedule.outs[-schedule.kept :], last, strict=True):
                copies.append((self._memory + 8 * schedule.place(node), at, node.size * node.limbs))
            self._keep.append(self._tables.recorded(copy_launches(self.chain.degree, copies)))

    def _held(self, stage: int) -> Sequence[int]:
        spans, fresh = list(self._kinds)[stage]
        return [x for pair in self._places(0, spans - fresh) for x in pair]

    def _places(self, first: int, end: int) -> list[list[int]]:
        """Return where some spans' ciphertexts are: of each block those of keys, then those of values."""
        plan = self.program.plan
        most, found, at = plan.shared_of(plan.layout, plan.n_k, plan.context)[0], [], self._cache
        for _ in plan.layout.blocks():
            for limbs in (plan.ring.levels + 1, plan.value_limbs):
                size, parts = 16 * limbs * self.chain.degree, plan.layout.parts
                found.append([at + i * size for i in range(first * parts, end * parts)])
                at += most * size
        return found

    def step(self, parts: Sequence[Data]) -> list[bytes]:
        """Return the ciphertexts of a reply; the token is then in the cache, and not before all was checked.

        Raises
        ------
        InvalidInput
            A ciphertext is none of the plan's; or a result, or what the cache would hold, would be no secret; or the
            session is closed.
        """
        with self._lock:
            number = self._number[kind_of(self.program.plan, self.count)]
            of = self._stages[number]
            replies = self._computed(of, parts)
            schedule, limb = of.schedule, 8 * self.chain.degree
            for node in schedule.outs[-schedule.kept :]:
                second = self._memory + 8 * schedule.place(node, 1)
                if not self.device.get(second, limb).any():  # of the first prime: nothing that is drawn is zero there
                    raise InvalidInput("he: the token cannot be computed: the cache would lie open; encrypt it anew")
            found = self._bytes(of, replies)
            self._keep[number]()
            self.count += 1
        return found

    def drop(self) -> None:
        """Write zeros over the cache, and begin another."""
        with self._lock:
            self.check_open()
            self.device.put(self._cache, np.zeros(self._kept_bytes(), np.uint8))
            self.count = 0
