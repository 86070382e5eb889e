"""BLAS on one thread: its other threads, which wait by spinning, take what threads and processes of ours could use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController

__all__ = ["as_before", "one_thread"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Give NumPy's BLAS one thread, and afterwards as many as it had."""
    libraries = _libraries()
    _BEFORE.append({x.prefix: x.num_threads for x in libraries.lib_controllers if x.user_api == "blas"})
    try:
        with libraries.limit(limits=1, user_api="blas"):
            yield
    finally:
        _BEFORE.pop()


@contextmanager
def as_before() -> Iterator[None]:
    """Give BLAS the threads that it had outside of ``one_thread``: for what is not ours, as a kernel that is judged."""
    if not _BEFORE:
        yield
        return
    with _libraries().limit(limits=_BEFORE[0]):
        yield


_BEFORE: list[dict[str, int]] = []
"""By library, how many threads it had at each entry of ``one_thread``, the outermost first."""


@cache
def _libraries() -> ThreadpoolController:
    """Find the libraries once, which takes a millisecond: NumPy's is loaded by now."""
    return ThreadpoolController()
