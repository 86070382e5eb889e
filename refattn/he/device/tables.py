"""A ring's tables on a device, and launches that take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .build import ITEM, KERNELS, PRIME, geometry
from .chain import Chain
from .launches import Launch
from .modular import Words
from .seeds import first_rejected

__all__ = ["Device", "Tables"]

MOST_REAL = np.uint64(2**48)
"""Primes below it are computed with in float64: see fields.cuh."""


class Device(Protocol):
    """What has memory and runs kernels: a GPU, or what stands for one in a test. Addresses are numbers."""

    def empty(self, size: int) -> int:
        """Return the address of so many bytes that are kept until `end`."""

    def put(self, address: int, host: NDArray[Any]) -> None:
        """Write an array to an address, after what is queued."""

    def get(self, address: int, size: int) -> NDArray[np.uint8]:
        """Return bytes, after all that is queued."""

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Return host memory that `put` reads without a copy."""

    def mark(self) -> Any:
        """Return where the queue is now."""

    def wait(self, mark: Any) -> None:
        """Wait until the queue has come so far."""

    def recorded(self, launches: Sequence[tuple[Any, ...]]) -> Callable[[], None]:
        """Return what queues launches of (kernel, grid, threads, shared bytes, addresses and numbers)."""

    def free(self) -> int:
        """Return how many bytes can be had."""

    def end(self) -> None:
        """Write zeros over all memory that was given out, and give it back."""


class Tables:
    """A ring's primes, roots of unity and factors on a device.

    Parameters
    ----------
    device : Device
        Where.
    chain : Chain
        The ring's.
    """

    def __init__(self, device: Device, chain: Chain) -> None:
        self.device, self.chain = device, chain
        primes = np.zeros(len(chain.primes), PRIME)
        primes["q"], primes["ratio1"], primes["ratio0"] = chain.q, *chain.ratio
        primes["inverse"], primes["inverse_shifted"] = chain.scale_back.T
        primes["most"] = [first_rejected(q) for q in chain.primes]
        real = chain.q < MOST_REAL
        primes["size"] = np.where(real, chain.q, 0).astype(np.float64).view(np.uint64)
        primes["over"] = np.where(real, 1 / chain.q.astype(np.float64), 0).view(np.uint64)
        self._at: Mapping[str, int] = {
            "primes": self.stored(primes), "roots": self.stored(_factors(chain, chain.roots)),
            "inverse_roots": self.stored(_factors(chain, chain.inverse_roots)), "drops": self.stored(chain.dropping),
        }  # fmt: skip

    @staticmethod
    def bytes_of(chain: Chain) -> int:
        """Return what the tables take."""
        count = len(chain.primes)
        return count * PRIME.itemsize + 32 * count * chain.degree + 24 * count * count

    def stored(self, x: NDArray[Any]) -> int:
        """Return the address of an array's copy on the device."""
        at = self.device.empty(x.nbytes)
        self.device.put(at, x)
        return at

    def recorded(self, launches: Sequence[Launch], lists: NDArray[np.uint64] | None = None) -> Callable[[], None]:
        """Return what queues some launches; `lists` is what items of "sum" and "dot" have places in."""
        lists = np.zeros(0, np.uint64) if lists is None else lists
        start = self.stored(lists) if len(lists) else 0
        items = np.concatenate([x.items for x in launches]) if launches else np.zeros(0, ITEM)
        of_lists = np.repeat([x.kernel in ("sum", "dot") for x in launches], [len(x.items) for x in launches])
        items["x"] += np.where(of_lists, start, 0).astype(np.uint64)
        at, queued = self.stored(items) if len(items) else 0, []
        for x in launches:
            blocks, threads, shared = geometry(x.kernel, self.chain.degree, x.limbs)
            given = [np.uint64(at)]
            for name in KERNELS[x.kernel]:
                given.append(np.int32(len(self.chain.primes)) if name == "count" else np.uint64(self._at[name]))  # type: ignore[arg-type]
            queued.append((x.kernel, (blocks, len(x.items)), threads, shared, tuple(given)))
            at += x.items.nbytes
        return self.device.recorded(queued)


def _factors(chain: Chain, roots: Words) -> Words:
    """Return roots as butterflies take them: those of a prime for float64 from -q/2 to q/2, each with its part of q."""
    found = roots.copy()
    for k in np.flatnonzero(chain.q < MOST_REAL):
        q, w = int(chain.q[k]), roots[k, :, 0].astype(np.int64)
        centered = np.where(2 * w > q, w - q, w).astype(np.float64)
        found[k] = np.stack([centered, centered / q], 1).view(np.uint64)
    return found
