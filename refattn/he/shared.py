"""A query's ciphertexts where several processes read them: in memory without a name, gone with the reply."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

__all__ = ["Slice", "copied", "held"]


@dataclass(frozen=True)
class Slice:
    """Bytes of a file that a process of this user holds open.

    Attributes
    ----------
    path : str
        Where another process opens it.
    start, size : int
        Which bytes.
    """

    path: str
    start: int
    size: int


@contextmanager
def held(parts: Sequence[bytes | memoryview], each: Callable[..., Iterable[Any]] = map) -> Iterator[tuple[Slice, ...]]:
    """Give some bytes as slices that other processes can read until the end of the block.

    The file has no name that outlives this process where the system can do that (Linux): whatever ends the process
    ends the file. Elsewhere it is a file of its owner's alone that is removed at the end of the block.

    Parameters
    ----------
    parts : sequence of bytes
        What is held.
    each : callable
        What maps a function over the parts: threads', to write several at once.
    """
    sizes = [len(x) for x in parts]
    starts = [0, *accumulate(sizes)]
    fd, path, name = _opened()
    try:
        os.ftruncate(fd, starts[-1])
        list(each(lambda x, start: _written(fd, x, start), parts, starts))
        yield tuple(Slice(path, start, size) for start, size in zip(starts, sizes, strict=False))
    finally:
        os.close(fd)
        if name is not None:
            os.unlink(name)


def _opened() -> tuple[int, str, str | None]:
    """Return a file, the path that opens it, and its name where it has one."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("refattn-query")
        path = f"/proc/{os.getpid()}/fd/{fd}"
        if os.path.exists(path):
            return fd, path, None
        os.close(fd)
    fd, name = tempfile.mkstemp()
    return fd, name, name


def _written(fd: int, data: bytes | memoryview, start: int) -> None:
    rest = memoryview(data)
    while len(rest):
        done = os.pwrite(fd, rest, start)
        rest, start = rest[done:], start + done


def copied(part: Slice, fd: int) -> None:
    """Make an open file hold the bytes of a slice and no others."""
    source = os.open(part.path, os.O_RDONLY)
    try:
        os.ftruncate(fd, part.size)
        os.lseek(fd, 0, os.SEEK_SET)
        start, end = part.start, part.start + part.size
        while start < end:
            start += _moved(fd, source, start, end - start)
    finally:
        os.close(source)


def _moved(fd: int, source: int, start: int, size: int) -> int:
    """Copy some bytes to where a file is, and return how many."""
    try:
        done = os.sendfile(fd, source, start, size)  # from page to page, by Linux
    except OSError:  # elsewhere to sockets only
        done = os.write(fd, os.pread(source, min(size, 2**20), start))
    if not done:
        raise OSError("a query's file is shorter than it was")
    return done
