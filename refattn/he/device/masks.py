"""A server's side of masked refreshes where a GPU computes: word for word as `refattn.he.refresh.Masks`, without SEAL.

All that is secret here is independent of what a client sends, so it is made ahead: while a block is computed, or the
client has its turn. A mask is drawn for one result, and used for it alone.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ...errors import InvalidInput
from ..embedding import Pair, coefficients, scaled, slots
from ..encoder_plan import REFRESHED, EncoderPlan
from ..integers import add, composed, drawn, small, wide
from ..refresh import Waiting
from .chain import chain_of
from .format import Data, ciphertext_bytes, read_ciphertext, whole
from .modular import Words
from .schedule import Schedule
from .words import Evaluator

__all__ = ["Masks", "zero_of"]

MOST_THREADS = 4
"""Threads that make masks: a block's take one about half a second at degree 32768."""


@dataclass(frozen=True)
class _Made:
    """What is added to a block's result, (2, primes, N) each, and what is subtracted from the answer, (2, N) each."""

    pads: list[Words]
    subtracted: list[Words]


class Masks(Waiting):
    """Masks that are made ahead, and those that are waited for.

    Parameters
    ----------
    plan : EncoderPlan
        What is computed.
    zero : (2, primes, N) array
        The client's encryption of zero (`zero_of`).
    schedules : sequence of Schedule
        Of the blocks: they tell the scales of results.
    """

    def __init__(self, plan: EncoderPlan, zero: Words, schedules: Sequence[Schedule]) -> None:
        super().__init__(plan)
        self.chain = chain_of(plan.ring)
        self._outs = [x.outs for x in schedules]
        self._zero, self._evaluator = zero, Evaluator(self.chain)
        self._pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
        self._ready: dict[int, Future[_Made]] = {}
        self._end = weakref.finalize(self, _wiped, self._pool, self._ready, self._waiting)
        for stage in range(1, plan.rounds):
            self._ready[stage] = self._pool.submit(self._made, stage)

    def close(self) -> None:
        """Write zeros over all masks."""
        self._end()

    def masked(self, query: bytes, stage: int, outs: Sequence[bytes]) -> tuple[bytes, ...]:
        """Return the parts of a message with a block's masked result: its name, and ciphertexts.

        Parameters
        ----------
        query : bytes
            Whose result it is.
        stage : int
            The next block.
        outs : sequence of bytes
            The ciphertexts of the result.
        """
        ready, self._ready[stage] = self._ready[stage], self._pool.submit(self._made, stage)
        made, parts = ready.result(), []
        for data, pad, node in zip(outs, made.pads, self._outs[stage - 1], strict=True):
            x = read_ciphertext(data, self.chain, node.limbs, node.scale, False).words[:, :REFRESHED]
            parts.append(ciphertext_bytes(add(x, pad, self._moduli), self.chain, node.scale))
        _zeroed(made.pads)
        return (self._kept(query, stage, made.subtracted), *parts)

    def taken(self, name: bytes) -> tuple[bytes, list[Any]]:
        """Return the query of a masked result, and what is to be subtracted from the answer; once."""
        query, _, mask = self._once(name)
        return query, mask

    def _forgotten(self, mask: Any) -> None:
        _zeroed(mask)

    @property
    def _moduli(self) -> list[int]:
        return self.chain.primes[:REFRESHED]

    def _made(self, stage: int) -> _Made:
        plan, m, moduli = self.plan, self._evaluator, self._moduli
        both, pads, found = range(REFRESHED), [], []
        for node in self._outs[stage - 1]:
            mask = drawn(moduli, plan.ring.degree)
            u, e = (m.forward(small(moduli, plan.ring.degree, ternary), both) for ternary in (True, False))
            pad = m.times(self._zero, u)
            pad[0], pad[1] = add(pad[0], mask, moduli), add(pad[1], e, moduli)
            pads.append(pad)
            found.append(scaled(slots(composed(m.inverse(mask, both), moduli)), 1 / node.scale))
            _zeroed([mask, u, e])
        placed = plan.placed(stage, *plan.taken(found))
        return _Made(pads, [wide(_coefficients(z, 2.0**plan.ring.middle)) for z, _ in placed])


def _coefficients(z: Pair, scale: float) -> Pair:
    return coefficients((z[0] * scale, z[1] * scale))


def zero_of(data: Data, plan: EncoderPlan) -> Words:
    """Return the words of an encryption of zero whose second polynomial is expanded from a seed: nobody chose it.

    Raises
    ------
    InvalidInput
        It is none, or not from a seed.
    """
    chain = chain_of(plan.ring)
    try:
        return whole(read_ciphertext(data, chain, REFRESHED, 1.0, True), chain)
    except InvalidInput as e:
        raise InvalidInput(
            f"he: got an encryption of zero that is not made from a seed; make it by the plan's client ({e})"
        ) from e


def _zeroed(arrays: Sequence[Words]) -> None:
    for x in arrays:
        x[:] = 0


def _wiped(pool: ThreadPoolExecutor, ready: dict[int, Future[_Made]], waiting: dict[bytes, Any]) -> None:
    """Write zeros over masks that are made, or waited for."""
    pool.shutdown(cancel_futures=True)
    for future in ready.values():
        if not future.cancelled() and future.exception() is None:
            _zeroed([*future.result().pads, *future.result().subtracted])
    for _, _, mask in waiting.values():
        _zeroed(mask)
    ready.clear()
    waiting.clear()
