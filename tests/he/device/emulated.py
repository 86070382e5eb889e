"""What stands for a GPU: the kernels compiled by g++, run thread by thread; memory is guarded at its ends."""

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from refattn.he.device.build import KERNELS, text_of

GXX = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
GUARD = 0xA5


def compiled(name, text, kernels, folder, *options):
    """Compile kernels for the CPU, by g++: a library with `emulate`."""
    listed = " ".join(f"KERNEL_OF({k})" for k in kernels)
    whole = (Path(__file__).parent / "emulator.cpp").read_text().replace("KERNELS_LIST", listed)
    source, made = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(whole.replace("KERNELS_TEXT", text))
    options += ("-U_FORTIFY_SOURCE",)  # some g++ check that a longjmp goes up the stack; these go between stacks
    command = ["g++", "-std=c++17", "-O1", *options, "-shared", "-fPIC", "-o", str(made), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(made))


@cache
def library(log_degree, folder):
    return compiled(f"emulator{log_degree}", text_of(log_degree), KERNELS, folder)


class Emulated:
    """A device for one degree; see refattn.he.device.tables.Device."""

    def __init__(self, degree, folder, order=0, most=2**40):
        self.library, self.order, self.most = library(degree.bit_length() - 1, folder), order, most
        self.given, self.ends, self.host, self.launches, self.ended = [], [], [], [], False

    def empty(self, size):
        self.given.append(np.full(size + 512, GUARD, np.uint8))
        address = self.given[-1].ctypes.data
        start = 256 - address % 256
        self.ends.append((self.given[-1], start, size))
        return address + start

    def put(self, address, host):
        host = np.ascontiguousarray(host)
        ctypes.memmove(address, host.ctypes.data, host.nbytes)

    def get(self, address, size):
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).copy()

    def ends_are_whole(self):
        """Tell whether nobody wrote beside what was given out."""
        if self.ended:
            return self.whole
        return all(
            (x[a:b] == GUARD).all() for x, start, size in self.ends for a, b in ((0, start), (start + size, None))
        )

    def pinned(self, size):
        self.host.append(np.zeros(size, np.uint8))
        return self.host[-1]

    def mark(self):
        return None

    def wait(self, mark):
        pass

    def recorded(self, launches):
        self.launches += launches
        return lambda: [self._launch(*x) for x in launches] and None

    def _launch(self, kernel, grid, threads, shared, given):
        cells = [ctypes.c_uint64(int(x)) if isinstance(x, np.uint64) else ctypes.c_int(int(x)) for x in given]
        pointers = (ctypes.c_void_p * len(cells))(*[ctypes.addressof(c) for c in cells])
        found = self.library.emulate(
            kernel.encode(), ctypes.c_uint(grid[0]), ctypes.c_uint(grid[1]), ctypes.c_int(threads),
            ctypes.c_size_t(shared), pointers, ctypes.c_int(self.order),
        )  # fmt: skip
        assert found == 0, (kernel, found)

    def free(self):
        return self.most - sum(x.nbytes for x in self.given)

    def end(self):
        self.whole = self.ends_are_whole()
        for x in (*self.given, *self.host):
            x[:] = 0
        self.ended = True
