"""Processes that hold a client's keys: they end with the process that started them, however it ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection, get_context, parent_process
from typing import Any

__all__ = ["limit_memory", "pool_of", "stop"]


def pool_of(workers: int, begin: Callable[..., None] | None = None, *given: Any) -> ProcessPoolExecutor:
    """Return a pool of fresh processes that end when this one does, even by a signal that it cannot catch.

    Parameters
    ----------
    workers : int
        How many.
    begin : callable, optional
        What each does first, with `given`.
    """
    return ProcessPoolExecutor(workers, get_context("spawn"), _begin, (begin, given))


def stop(pool: ProcessPoolExecutor) -> None:
    """End a pool's processes now: what they compute is of nobody any more, and they keep no files."""
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


def limit_memory(more: int) -> None:
    """Let this process take so many bytes of memory beyond what it has, and no more, where the system can."""
    try:
        import resource

        with open("/proc/self/statm") as f:
            now = int(f.read().split()[0]) * resource.getpagesize()
    except (ModuleNotFoundError, OSError):
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = now + more if hard == resource.RLIM_INFINITY else min(now + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _begin(begin: Callable[..., None] | None, given: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, meant for the parent, which ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin is not None:
        begin(*given)


def _end_with_parent() -> None:
    # a pool's process would wait for work forever: it holds both ends of the queue
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
    os._exit(1)
