"""A GPU through CuPy: memory, copies on one stream, the kernels, and launches recorded as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import cupy_with_gpu
from ...errors import BuildError, UnsupportedProblem
from .build import KERNELS, geometry, text_of

__all__ = ["Card"]

TO_DEVICE, TO_HOST = 1, 2
"""CUDA's numbers of directions."""


@lru_cache(maxsize=8)
def _kernels(degree: int, device: int) -> dict[str, Any]:
    """Return the kernels for a degree on the current device; CuPy keeps the machine code on disk.

    Raises
    ------
    BuildError
        With the compiler's message.
    """
    module = cupy_with_gpu().RawModule(code=text_of(degree.bit_length() - 1), options=("-std=c++17",), backend="nvrtc")
    found = {}
    for name in KERNELS:
        try:
            kernel = found[name] = module.get_function(name)
        except Exception as e:
            raise BuildError(f"he: compiling {name} for degree {degree} failed with {type(e).__name__}: {e}") from e
        kernel.max_dynamic_shared_size_bytes = geometry(name, degree)[2]
    return found


class Card:
    """The current GPU, for one degree: see `refattn.he.device.tables.Device`.

    Parameters
    ----------
    degree : int
        The ring's.

    Raises
    ------
    UnsupportedProblem
        CuPy is not installed, or finds no GPU.
    BuildError
        The kernels do not compile.
    """

    def __init__(self, degree: int) -> None:
        self._cuda = cupy_with_gpu().cuda
        self._kernels = _kernels(degree, self._cuda.Device().id)
        self._stream = self._cuda.Stream(non_blocking=True)
        self._given: list[tuple[Any, int]] = []
        self._pinned: list[NDArray[np.uint8]] = []
        self._graphs: list[Any] = []

    def empty(self, size: int) -> int:
        """Return the address of so many bytes.

        Raises
        ------
        UnsupportedProblem
            There are not so many left.
        """
        try:
            self._given.append((self._cuda.alloc(size), size))
        except self._cuda.memory.OutOfMemoryError as e:
            raise UnsupportedProblem(f"he: the GPU's memory is full ({e}); end another session first") from e
        return int(self._given[-1][0].ptr)

    def put(self, address: int, host: NDArray[Any]) -> None:
        """Queue a copy to the device."""
        host = np.ascontiguousarray(host)
        self._cuda.runtime.memcpyAsync(address, host.ctypes.data, host.nbytes, TO_DEVICE, self._stream.ptr)

    def get(self, address: int, size: int) -> NDArray[np.uint8]:
        """Return bytes, when all that is queued is done."""
        found = np.empty(size, np.uint8)
        self._cuda.runtime.memcpyAsync(found.ctypes.data, address, size, TO_HOST, self._stream.ptr)
        self._stream.synchronize()
        return found

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Return host memory that the device reads by itself."""
        self._pinned.append(np.frombuffer(self._cuda.alloc_pinned_memory(size), np.uint8, size))
        return self._pinned[-1]

    def mark(self) -> Any:
        """Return where the queue is now."""
        event = self._cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, mark: Any) -> None:
        """Wait until the queue has come so far."""
        mark.synchronize()

    def recorded(self, launches: Sequence[tuple[Any, ...]]) -> Callable[[], None]:
        """Return what queues launches as one CUDA graph."""
        if not launches:
            return lambda: None
        with self._stream:
            self._stream.begin_capture()
            for name, grid, threads, shared, given in launches:
                self._kernels[name](grid, (threads,), given, shared_mem=shared)
            graph = self._stream.end_capture()
        self._graphs.append(graph)  # it may still run when nobody else has it
        return lambda: graph.launch(self._stream)

    def free(self) -> int:
        """Return how many bytes can be had: of the GPU, and of what CuPy keeps for itself."""
        return int(self._cuda.runtime.memGetInfo()[0]) + int(cupy_with_gpu().get_default_memory_pool().free_bytes())

    def end(self) -> None:
        """Write zeros over all memory that was given out, and give it back to the driver."""
        for memory, size in self._given:
            self._cuda.runtime.memsetAsync(memory.ptr, 0, size, self._stream.ptr)
        self._stream.synchronize()
        for host in self._pinned:
            host[:] = 0
        self._graphs.clear()
        self._given.clear()
        self._pinned.clear()
        cupy_with_gpu().get_default_memory_pool().free_all_blocks()
