"""Launches that were made before for a call of the same kind: only addresses are put in, and they are queued again."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .arguments import Arguments
from .views import View, library

__all__ = ["Launch", "note", "recording", "replay"]

MOST = 1024
"""Kinds of calls that a thread keeps."""
Maps = Mapping[str, tuple[str, Callable[[View], bytes]]]


class Launch:
    """One launch: its arguments' bytes, and where in them the addresses of arrays stand.

    Parameters
    ----------
    kernel, grid, threads, shared, stream
        As the driver takes them; kernel with what keeps it loaded.
    takes : Arguments
        The kernel's arguments.
    packed : bytes
        What they are in the call that is recorded.
    places : mapping of str to str
        By argument (members as ``argument.member``), the array whose address it is.
    maps : mapping of str to (str, function)
        By argument, the array whose tensor map it is, and what makes one.
    """

    def __init__(
        self, kernel: tuple[int, Any], grid: int, threads: int, shared: int, stream: int, takes: Arguments,
        packed: bytes, places: Mapping[str, str], maps: Maps,
    ) -> None:  # fmt: skip
        self.kernel = kernel
        self.buffer = ctypes.create_string_buffer(packed, len(packed))
        start = ctypes.addressof(self.buffer)
        self.pointers = (ctypes.c_void_p * len(takes.offsets))(*(start + o for o in takes.offsets))
        self.asked = (grid, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(self.pointers), 0)
        self.slots = [
            (ctypes.c_uint64.from_buffer(self.buffer, takes.places[to]), array) for to, array in places.items()
        ]
        self.maps = [(start + takes.places[to], array, make) for to, (array, make) in maps.items()]
        self.made: dict[tuple[str, int], bytes] = {}

    def queue(self, arrays: Mapping[str, View]) -> None:
        """Queue it for other arrays of the same kind; what is not named stays as it was."""
        for slot, name in self.slots:
            if name in arrays:
                slot.value = arrays[name].pointer
        for at, name, make in self.maps:
            x = arrays.get(name)
            if x is None:
                continue
            found = self.made.get((name, x.pointer))
            if found is None:
                if len(self.made) > MOST:
                    self.made.clear()
                found = self.made[name, x.pointer] = make(x)
            ctypes.memmove(at, found, len(found))
        library("cupy").cuda.driver.launchKernel(self.kernel[0], *self.asked)


class _Thread(threading.local):
    """A thread's own launches: another one may not write addresses into them meanwhile."""

    def __init__(self) -> None:
        self.known: dict[Hashable, list[Launch]] = {}
        self.now: list[Launch] | None = None


_THREAD = _Thread()


def replay(kind: Hashable, arrays: Mapping[str, View]) -> bool:
    """Queue the launches of a kind of call for its arrays; False where there are none."""
    known = _THREAD.known.get(kind)
    if known is None:
        return False
    for x in known:
        x.queue(arrays)
    return True


@contextmanager
def recording(kind: Hashable) -> Iterator[None]:
    """Keep the launches that are made meanwhile, for `replay`."""
    if len(_THREAD.known) >= MOST:
        _THREAD.known.clear()
    _THREAD.now = []
    try:
        yield
        _THREAD.known[kind] = _THREAD.now
    finally:
        _THREAD.now = None


def note(launch: Launch) -> None:
    """Keep a launch where launches are recorded."""
    if _THREAD.now is not None:
        _THREAD.now.append(launch)
