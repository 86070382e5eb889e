"""FLINT's working precision: there is one for the whole process, so one thread at a time may set it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import flint

__all__ = ["precision"]

_LOCK = threading.RLock()


@contextmanager
def precision(bits: int) -> Iterator[None]:
    """Work at `bits` of FLINT's precision; other threads of refattn wait until it is given back.

    Parameters
    ----------
    bits : int
        Of the results' midpoints.
    """
    with _LOCK, flint.ctx.workprec(bits):
        yield
