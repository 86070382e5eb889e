"""The part of CuPy that refattn.exact uses, over NumPy: it mixes with no NumPy array, and the kernels run emulated.

What CuPy would refuse is refused: an implicit copy to or from the device, a function or an argument that it lacks.
Steps in float32 make subnormal numbers 0, as those of CuPy do, which compiles all with ``-ftz=true``.
"""

import ctypes
import re
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import numpy as np

from refattn.exact.device.card import OPTIONS
from tests.he.device.emulated import compiled

__all__ = ["Array", "cupys_part"]

PRELUDE = """
#include <math.h>
#define __shared__ static
static double lanes[512];
static long long __double_as_longlong(double x) { long long y; memcpy(&y, &x, 8); return y; }
static double __longlong_as_double(long long x) { double y; memcpy(&y, &x, 8); return y; }
static double __shfl_xor_sync(unsigned, double x, int step) {
    const unsigned t = threadIdx.x;
    lanes[t] = x;
    leave();
    const double y = lanes[t ^ step];
    leave();
    return y;
}
"""
SCALARS = (bool, int, float, np.generic)
UFUNCS = """absolute add subtract multiply divide negative sqrt log2 maximum minimum ceil rint frexp ldexp nextafter
copysign isfinite isnan isinf signbit equal not_equal less less_equal greater greater_equal invert bitwise_and
bitwise_or logical_not right_shift left_shift"""
FUNCTIONS = (
    "ascontiguousarray where stack concatenate outer broadcast_to moveaxis full_like ones_like zeros_like max min sum "
    "take_along_axis"
)


def taken(x):
    """Return what stands for an argument of CuPy: a NumPy array is refused, as CuPy does."""
    if isinstance(x, Array):
        return x.a
    if isinstance(x, list | tuple):
        return type(x)(taken(y) for y in x)
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}: implicit conversion to a device's array")
    return x


def flushed(x):
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x) if x.dtype == np.float32 else x


def filled(x):
    """Return a number, or an array without an axis, as CuPy fills memory with it: by bytes of 0, where it is 0."""
    return x if np.ndim(x) or x else type(x)(0) if isinstance(x, SCALARS) else np.zeros_like(x)


def given(x):
    return tuple(map(Array, x)) if isinstance(x, tuple) else Array(x)


class Array(np.lib.mixins.NDArrayOperatorsMixin):
    """An array on what stands for a device."""

    __cuda_array_interface__ = None

    def __init__(self, a):
        self.a = np.asarray(a)

    def __array__(self, *some, **more):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, dtype=None):
        assert method == "__call__"
        assert ufunc.__name__ in UFUNCS.split(), ufunc.__name__
        assert all(isinstance(x, (Array, np.ndarray, *SCALARS)) for x in inputs), inputs
        more = {} if dtype is None else {"dtype": dtype}
        if ufunc is np.ldexp:  # a plain number could be taken for one of half precision
            assert all(isinstance(x, Array) for x in inputs)
            assert inputs[1].dtype == np.int32
        inputs = [flushed(x.a) if isinstance(x, Array) else taken(x) for x in inputs]
        if out is not None:
            (to,) = out
            ufunc(*inputs, out=to.a, **more)
            to.a[...] = flushed(to.a)
            return to
        found = ufunc(*inputs, **more)
        return given(tuple(map(flushed, found)) if isinstance(found, tuple) else flushed(found))

    def __array_function__(self, function, types, args, kwargs):
        if function is np.asarray:
            return Array(filled(np.array(args[0], **kwargs)))
        assert function.__name__ in FUNCTIONS.split(), function.__name__
        return given(function(*map(taken, args), **{k: taken(x) for k, x in kwargs.items()}))

    shape, dtype, ndim, size, strides = (
        property(lambda self, name=n: getattr(self.a, name)) for n in ("shape", "dtype", "ndim", "size", "strides")
    )
    T = property(lambda self: Array(self.a.T))
    data = property(lambda self: SimpleNamespace(ptr=self.a.ctypes.data))
    device = property(lambda self: SimpleNamespace(id=0))

    def __len__(self):
        return len(self.a)

    def __iter__(self):
        return iter(Array(x) for x in self.a)

    def __float__(self):
        return float(self.a)

    def __bool__(self):
        return bool(self.a)

    def _index(self, index):
        return tuple(map(self._index, index)) if isinstance(index, tuple) else getattr(index, "a", index)

    def __getitem__(self, index):
        return Array(self.a[self._index(index)])

    def __setitem__(self, index, x):
        arrays = any(isinstance(i, (Array, list)) for i in (index if isinstance(index, tuple) else (index,)))
        if not arrays and not isinstance(x, Array):
            x = filled(x)
        elif isinstance(x, Array) and self.a[self._index(index)].ndim < x.ndim:
            x = x.reshape(-1)[0]  # leading axes of length 1 are left out
        self.a[self._index(index)] = taken(x)

    def sum(self, axis=None, dtype=None, out=None, keepdims=False):
        return Array(self.a.sum(axis, dtype=dtype, keepdims=keepdims))

    def max(self, axis=None, out=None, keepdims=False):
        return Array(self.a.max(axis=axis, keepdims=keepdims))

    def argmax(self, axis=None):
        return Array(self.a.argmax(axis))

    def min(self, axis=None, out=None, keepdims=False):
        return Array(self.a.min(axis=axis, keepdims=keepdims))

    def any(self, axis=None, out=None, keepdims=False):
        return Array(self.a.any(axis=axis, keepdims=keepdims))

    def all(self, axis=None, out=None, keepdims=False):
        return Array(self.a.all(axis=axis, keepdims=keepdims))

    def astype(self, dtype):
        return Array(flushed(flushed(self.a).astype(dtype)))

    def copy(self):
        return Array(self.a.copy())

    def view(self, dtype):
        return Array(self.a.view(dtype))

    def reshape(self, *shape):
        return Array(self.a.reshape(*shape))

    def get(self):
        return np.array(self.a)

    def set(self, x, stream=None):
        assert type(x) is np.ndarray
        assert (x.dtype, x.shape) == (self.a.dtype, self.a.shape)
        assert self.a.flags.c_contiguous
        stream.under_way.append((self.a, x))  # x is read when the stream comes to it


@cache
def library(code, folder):
    names = re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(", code)
    return compiled(f"exact{abs(hash(code))}", PRELUDE + code, names, folder, "-ffp-contract=off", "-mfma")


def cupys_part(folder, free=2**36, capability="90", mode=0, gpus=1, broken=None):
    """Return a module's stand-in; `seen` of it tells what was launched. `broken` takes a product and spoils it."""
    seen = SimpleNamespace(launched=[], freed=[], free=free, pinned=0)

    class CUDARuntimeError(RuntimeError):
        pass

    class Kernel:
        def __init__(self, code, name):
            self.code, self.name = code, name

        def __call__(self, grid, block, arguments):
            assert all(type(x) is int for x in (*grid, *block))
            seen.launched.append((self.name, grid[0]))
            cells = []
            for x in arguments:
                if isinstance(x, Array):
                    cells.append(ctypes.c_void_p(x.a.ctypes.data))
                else:
                    assert type(x) in (np.int32, np.int64, np.uint64, np.float64), type(x)
                    cells.append(np.ctypeslib.as_ctypes_type(x.dtype)(x.item()))
            pointers = (ctypes.c_void_p * len(cells))(*[ctypes.addressof(c) for c in cells])
            found = library(self.code, folder).emulate(
                self.name.encode(), ctypes.c_uint(grid[0]), ctypes.c_uint(1), ctypes.c_int(block[0]),
                ctypes.c_size_t(0), pointers, ctypes.c_int(0),
            )  # fmt: skip
            assert found == 0, (self.name, found)

    class RawModule:
        def __init__(self, code, options, backend):
            assert (options, backend) == (OPTIONS, "nvrtc")
            self.code = code

        def get_function(self, name):
            return Kernel(self.code, name)

    def at(address, rows, columns, step):
        """Return the matrix (columns, rows) that cuBLAS takes for one (rows, columns) by columns."""
        size = (columns - 1) * step + rows
        flat = np.ctypeslib.as_array((ctypes.c_double * size).from_address(address))
        return np.lib.stride_tricks.as_strided(flat, (columns, rows), (8 * step, 8))

    def dgemm(handle, turn_a, turn_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
        assert handle == 7
        assert all(type(x) is int for x in (turn_a, turn_b, m, n, k, a, lda, b, ldb, c, ldc))
        assert lda >= (k if turn_a else m)
        assert ldb >= (n if turn_b else k)
        assert ldc >= m
        assert (ctypes.c_double.from_address(alpha).value, ctypes.c_double.from_address(beta).value) == (1.0, 0.0)
        # by rows: c.T (n, m) is b.T times a.T
        left = at(b, n, k, ldb).T if turn_b else at(b, k, n, ldb)
        right = at(a, k, m, lda).T if turn_a else at(a, m, k, lda)
        found = left @ right
        at(c, m, n, ldc)[...] = found if broken is None else broken(left, right, found)

    runtime = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError, getDeviceCount=lambda: gpus, memGetInfo=lambda: (seen.free, 2 * seen.free)
    )

    class Device(nullcontext):
        def __init__(self, number=0):
            super().__init__()
            self.id, self.compute_capability = number, capability

    cuda = SimpleNamespace(
        runtime=runtime, Device=Device, cublas=SimpleNamespace(dgemm=dgemm, getMathMode=lambda handle: mode),
        device=SimpleNamespace(get_cublas_handle=lambda: 7),
    )  # fmt: skip

    class Stream:
        def __init__(self):
            self.under_way = []

        def synchronize(self):
            while self.under_way:
                to, x = self.under_way.pop(0)
                to[...] = x

        def record(self):
            return self

    def alloc_pinned_memory(size):
        seen.pinned += size
        return bytearray(size)

    cuda.get_current_stream, cuda.alloc_pinned_memory = Stream, alloc_pinned_memory
    pool = SimpleNamespace(free_bytes=lambda: 0, free_all_blocks=lambda: seen.freed.append(1))

    def made(function):
        def call(*some, **more):
            return Array(function(*map(taken, some), **more))

        return call

    def asarray(x, dtype=None):
        return (
            x
            if isinstance(x, Array) and dtype in (None, x.dtype)
            else Array(filled(np.array(getattr(x, "a", x), dtype)))
        )

    return SimpleNamespace(
        cuda=cuda, RawModule=RawModule, seen=seen, asarray=asarray, array=asarray, empty=made(_filled),
        zeros=made(np.zeros), ones=made(np.ones), full=made(np.full), get_default_memory_pool=lambda: pool,
    )  # fmt: skip


def _filled(shape, dtype=np.float64):
    return np.full(shape, np.nan if dtype == np.float64 else 165, dtype)  # what is read before it is written shows
