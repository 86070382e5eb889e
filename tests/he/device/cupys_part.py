"""The part of CuPy that refattn.he.device.card uses, over the emulator: what it is called with is checked, and runs."""

import ctypes
from functools import cached_property
from types import SimpleNamespace

import numpy as np

from .emulated import Emulated

__all__ = ["cupys_part"]


class Memory:
    def __init__(self, size):
        self.held = np.full(size, 0xA5, np.uint8)
        self.ptr = self.held.ctypes.data


def cupys_part(folder, free=2**34):
    """Return a module's stand-in; `given` and `graphs` of it tell what was asked for."""
    seen = SimpleNamespace(given=[], graphs=0, pool=0, recording=None)

    class CUDARuntimeError(RuntimeError):
        pass

    class OutOfMemoryError(MemoryError):
        pass

    class Stream:
        def __init__(self, non_blocking):
            assert non_blocking
            self.ptr = 5

        def __enter__(self):
            seen.stream = self

        def __exit__(self, *error):
            seen.stream = None

        def synchronize(self):
            pass

        def begin_capture(self):
            seen.recording = []

        def end_capture(self):
            calls, seen.recording = seen.recording, None
            seen.graphs += 1
            return SimpleNamespace(launch=lambda stream: [x() for x in calls] and None)

    class Event:
        def record(self, stream):
            assert stream.ptr == 5

        def synchronize(self):
            pass

    class Kernel:
        def __init__(self, module, name):
            self.module, self.name, self.max_dynamic_shared_size_bytes = module, name, 49152

        def __call__(self, grid, block, given, *, shared_mem):
            assert shared_mem <= self.max_dynamic_shared_size_bytes
            assert all(type(x) in (np.uint64, np.int32) for x in given)
            assert all(type(x) is int for x in (*grid, *block))
            seen.recording.append(lambda: self.module.device._launch(self.name, grid, block[0], shared_mem, given))

    class RawModule:
        def __init__(self, code, options, backend):
            assert (options, backend) == (("-std=c++17",), "nvrtc")
            self.degree = 1 << int(code.split()[2])

        @cached_property
        def device(self):
            return Emulated(self.degree, folder)

        def get_function(self, name):
            return Kernel(self, name)

    def alloc(size):
        if size > free:
            raise OutOfMemoryError(f"{size} bytes")
        seen.given.append(Memory(size))
        return seen.given[-1]

    def copied(to, source, size, kind, stream):
        assert kind in (1, 2)
        assert stream == 5
        ctypes.memmove(to, source, size)

    runtime = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError, getDeviceCount=lambda: 1, memGetInfo=lambda: (free, 2 * free),
        memcpyAsync=copied, memsetAsync=lambda at, value, size, stream: ctypes.memset(at, value, size),
    )  # fmt: skip
    cuda = SimpleNamespace(
        runtime=runtime, Stream=Stream, Event=Event, alloc=alloc, alloc_pinned_memory=bytearray,
        memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError), Device=lambda: SimpleNamespace(id=0),
    )  # fmt: skip
    pool = SimpleNamespace(free_bytes=lambda: 0, free_all_blocks=lambda: setattr(seen, "pool", seen.pool + 1))
    return SimpleNamespace(cuda=cuda, RawModule=RawModule, get_default_memory_pool=lambda: pool, seen=seen)
