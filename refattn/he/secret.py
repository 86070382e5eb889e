"""What holds a secret key, and what is done with it: evaluation keys, encryption, decryption."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from ..validation import shown
from .ahead import Zeros
from .arguments import is_count
from .seal import api, context, decode, encode, galois_elements, to_bytes, unpacked, whole_bytes

__all__ = ["Holder", "Sharing"]

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Sharing:
    """How a decrypted result is made fit to be shown (noise flooding): see the page on security.

    Attributes
    ----------
    bits : int
        s: an attacker's advantage is at most about 2**-s (statistical security).
    results : int
        How many results of one key will be shown in all.
    """

    bits: int = 30
    results: int = 1

    def __post_init__(self) -> None:
        if not is_count(self.bits, 1, 1000) or not is_count(self.results, 1, 2**60):
            raise InvalidInput(
                f"he: got {shown(self.bits)} bits and {shown(self.results)} results, expected integers of at least 1"
            )

    def deviation(self, noise: float) -> float:
        """Return the standard deviation to add where the encryption's noise is at most so large.

        sqrt(12·results)·2**(bits/2) times it: Li, Micciancio, Schultz and Sorrell, 2022 (ePrint 2022/816), as OpenFHE
        uses it; recalled from OpenFHE's documentation, not from the paper.
        """
        return float(math.sqrt(12 * self.results) * 2.0 ** (self.bits / 2) * noise)

    def drowned(self, out: Float, noise: float) -> Float:
        """Return a result with noise added that drowns the encryption's."""
        draw, deviation = secrets.SystemRandom().gauss, self.deviation(noise)
        return np.asarray(out + np.array([draw(0.0, deviation) for _ in range(out.size)]).reshape(out.shape))


class Holder:
    """Holds a secret key, which has no way out of it.

    Parameters
    ----------
    plan : Planned
        What the server will compute.
    compressed : bool
        Whether what is encrypted from a seed is sent compressed.
    """

    def __init__(self, plan: Any, compressed: bool = True) -> None:
        self.plan, self._compressed = plan, compressed
        s, made = api(), context(plan.ring)
        self._generator = s.KeyGenerator(made)
        secret = self._generator.secret_key()
        self._public = s.PublicKey()
        self._generator.create_public_key(self._public)
        self._encryptor = s.Encryptor(made, self._public, secret)
        self._decryptor = s.Decryptor(made, secret)
        self._encoder = s.CKKSEncoder(made)
        self._zeros = Zeros(self._encryptor, plan.ring, plan.upload == "whole", compressed)
        self._name = secrets.token_bytes(16)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a client holds a secret key and is not pickled or copied")

    def _keys(self) -> tuple[bytes, ...]:
        """Return keys for relinearisation, and for the plan's rotations and the conjugation."""
        relin = self._generator.create_relin_keys()
        galois = self._generator.create_galois_keys(galois_elements(self.plan.ring, self.plan.rotations))
        return to_bytes(relin), to_bytes(galois)

    def _encrypted(self, slots: Any, limbs: int) -> bytes:
        return self._sent(encode(self._encoder, slots, self.plan.ring, limbs))

    def _sent(self, plain: Any) -> bytes:
        if self.plan.upload == "whole":
            return whole_bytes(self._encryptor, plain)
        saved = to_bytes(self._encryptor.encrypt_symmetric(plain))
        return saved if self._compressed else unpacked(saved)

    def _opened(self, ciphertext: Any) -> Any:
        plain = api().Plaintext()
        self._decryptor.decrypt(ciphertext, plain)
        return plain

    def _decrypted(self, ciphertext: Any) -> Any:
        return decode(self._encoder, self._opened(ciphertext))
