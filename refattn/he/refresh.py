"""The masked refresh: a server's result gets new primes from a client that cannot read it.

The server adds a polynomial r that is uniform modulo Q, the product of the primes that are left. What the client
decrypts is m + e + r modulo Q: uniform, whatever the result m and its noise e are. It finds its slots, places them
where the next block wants them, and encrypts; the server does the same with r, and subtracts. All of it is linear and
exact but for what double-double numbers lose and one rounding each (EncoderPlan.refresh_error); m + e and r wrap round
Q with a chance that the plan bounds. The ciphertext's second polynomial is hidden, too (integers.flooded).
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import InvalidInput
from .device.chain import chain_of
from .device.words import Evaluator
from .embedding import Pair, coefficients, scaled, slots
from .encoder_plan import REFRESHED, EncoderPlan
from .fast import compiled
from .integers import composed, drawn, flooded, plaintext, seeded, words_of
from .seal import api, context, from_bytes, level, primes, to_bytes
from .structure import check_ciphertext

__all__ = ["Masks", "Waiting", "check_masked", "plaintext_of", "refreshed", "zero_of"]

WAITING = 4
"""Masked results of a client that wait for its answer: an older one is forgotten."""


def _slots(plan: EncoderPlan, words: Any, scale: float) -> Pair:
    """Return the slots of a polynomial, by its words ready for products."""
    ring = plan.ring
    p = composed(Evaluator(chain_of(ring)).inverse(words, range(REFRESHED)), primes(ring)[:REFRESHED])
    return scaled(slots(p), 1 / scale)


Job = tuple[Pair, int]
"""A polynomial's coefficients, times the scale, and the primes that are left."""
TOGETHER = 3
"""Polynomials whose slots a thread transforms at once by NumPy: of one the calls take as long as what they compute."""


def plaintext_of(plan: EncoderPlan, job: Job) -> bytes:
    """Return what SEAL saves of a plaintext."""
    return plaintext(plan.ring, *job, 2.0**plan.ring.middle)


def refreshed(
    plan: EncoderPlan, stage: int, plains: Sequence[Any], scales: Sequence[float], each: Callable[..., Any] = map
) -> list[Job]:
    """Return what a client encrypts, from what it decrypted of a masked result.

    Nothing here looks at the numbers: whatever they are, they are encoded, and nobody learns more than that.
    `each` maps a function over the results: threads'.
    """
    found = list(each(lambda x, scale: _slots(plan, words_of(plan.ring, x), scale), plains, scales))
    return _jobs(plan, stage, *plan.taken(found), each)


def _jobs(plan: EncoderPlan, stage: int, tokens: Pair, squares: Pair, each: Callable[..., Any] = map) -> list[Job]:
    placed, scale = plan.placed(stage, tokens, squares), 2.0**plan.ring.middle
    together = TOGETHER if compiled() is None else 1
    some = [placed[i : i + together] for i in range(0, len(placed), together)]

    def coefficients_of(few: Sequence[tuple[Pair, int]]) -> list[Job]:
        high, low = coefficients((np.stack([z[0] for z, _ in few]) * scale, np.stack([z[1] for z, _ in few]) * scale))
        return [((high[i], low[i]), limbs) for i, (_, limbs) in enumerate(few)]

    return [x for jobs in each(coefficients_of, some) for x in jobs]


class Waiting:
    """Masked results that wait for a client's answers, each by a random name, and used once.

    Parameters
    ----------
    plan : EncoderPlan
        What is computed.
    """

    def __init__(self, plan: EncoderPlan) -> None:
        self.plan = plan
        self._waiting: OrderedDict[bytes, tuple[bytes, int, Any]] = OrderedDict()

    def _kept(self, query: bytes, stage: int, mask: Any) -> bytes:
        """Keep what a mask is for the answer, whose block is `stage`, and return the result's name."""
        name = secrets.token_bytes(16)
        self._waiting[name] = (query, stage, mask)
        while len(self._waiting) > WAITING:
            self._forgotten(self._waiting.popitem(last=False)[1][2])
        return name

    def _forgotten(self, mask: Any) -> None:
        """Do with a mask what is to be done where no answer came."""

    def stage_of(self, name: bytes) -> int:
        """Return the block that an answer is for.

        Raises
        ------
        InvalidInput
            No such result waits: it was answered, or forgotten for newer ones, or is of another client.
        """
        return self._known(self._waiting.get(name))[1]

    def _once(self, name: bytes) -> tuple[bytes, int, Any]:
        """Return whose result an answer is for, its block and what was kept; errors as of `stage_of`."""
        return self._known(self._waiting.pop(name, None))

    @staticmethod
    def _known(found: tuple[bytes, int, Any] | None) -> tuple[bytes, int, Any]:
        if found is None:
            raise InvalidInput("he: got an answer to no masked result that waits for one; encrypt the input anew")
        return found


class Masks(Waiting):
    """A server's side: the masks that are waited for, each used once.

    Parameters
    ----------
    plan : EncoderPlan
        What is computed.
    zero : bytes
        The client's encryption of zero, from a seed.

    Raises
    ------
    InvalidInput
        It is none, or not from a seed.
    """

    def __init__(self, plan: EncoderPlan, zero: bytes | memoryview) -> None:
        super().__init__(plan)
        self._zero = seeded(plan.ring, zero, REFRESHED)

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
        ring = self.plan.ring
        moduli, evaluator = primes(ring)[:REFRESHED], api().Evaluator(context(ring))
        parts, found = [], []
        for data in outs:
            x = from_bytes("Ciphertext", ring, data)
            if x.coeff_modulus_size() > REFRESHED:
                evaluator.mod_switch_to_inplace(x, level(ring, REFRESHED))
            mask = drawn(moduli, ring.degree)
            parts.append(to_bytes(flooded(ring, x, self._zero, mask)))
            found.append(_slots(self.plan, mask, x.scale))
        return (self._kept(query, stage, self.plan.taken(found)), *parts)

    def taken(self, name: bytes) -> tuple[bytes, list[Any]]:
        """Return the query of a masked result, and what is to be subtracted from the answer; once."""
        query, stage, (tokens, squares) = self._once(name)
        return query, [plaintext_of(self.plan, x) for x in _jobs(self.plan, stage, tokens, squares)]


def check_masked(plan: EncoderPlan, found: Sequence[Any]) -> list[float]:
    """Return the scales of a masked result's ciphertexts, whose structure must be the plan's.

    Raises
    ------
    InvalidInput
        One is of another structure or level, or of a scale not within the plan's factor of the ring's.
    """
    for x in found:
        check_ciphertext("a ciphertext of the masked result", x, plan.ring, REFRESHED, None, plan.drift[0])
    return [float(x.scale) for x in found]


def zero_of(encryptor: Any, plan: EncoderPlan) -> bytes:
    """Return an encryption of zero from a seed, for the server's masks."""
    return to_bytes(encryptor.encrypt_zero_symmetric(level(plan.ring, REFRESHED)))
