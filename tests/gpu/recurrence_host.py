"""The text of the recurrences' kernels as C++: a block's threads take turns, from one barrier to the next.

g++ compiles the very text that a GPU gets, with what CUDA has and C++ has not put before it.
"""

import ctypes
import subprocess

import numpy as np

from refattn.gpu.build import HERE

__all__ = ["library", "run"]

BEFORE = r"""
#include <algorithm>
#include <cmath>
#include <functional>
#include <ucontext.h>
#include <vector>
using std::min;
typedef float float32;
struct Three { int x; };
struct float4 { float x, y, z, w; };
static Three threadIdx, blockIdx;
#define __global__
#define __launch_bounds__(...)
#define __shared__
#define __align__(n)
#define DEVICE static inline
#define UNROLL
typedef T Type;
static constexpr int THREADS = 32 * WARPS;
static ucontext_t turns, own[THREADS];
static bool done[THREADS];
static std::function<void()> body;
static float exchanged[THREADS];
alignas(16) float memory[1 << 16];
static void __syncthreads() { swapcontext(&own[threadIdx.x], &turns); }
static float __shfl_xor_sync(unsigned, float x, int other) {
    exchanged[threadIdx.x] = x;
    __syncthreads();
    float y = exchanged[threadIdx.x ^ other];
    __syncthreads();
    return y;
}
static void put(float* p, float x) { *p = x; }
static void copy_commit() {}
template <int N> static void copy_wait() {}
static bool is_aligned(const void*, int, long long, long long, long long) { return true; }
template <int HEIGHT, int WIDTH, int STRIDE>
static void load_tile(float* tile, const T* source, long long stride, int rows, int width, bool) {
    for (int i = threadIdx.x; i < HEIGHT * WIDTH; i += THREADS) {
        int row = i / WIDTH, column = i % WIDTH;
        tile[row * STRIDE + column] = row < rows && column < width ? source[row * stride + column] : 0.f;
    }
}
"""
AFTER = r"""
static void one() { body(); done[threadIdx.x] = true; }
static void blocks(int grid, std::function<void()> kernel) {
    static std::vector<char> stacks(THREADS << 16);
    body = kernel;
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) {
        for (int i = 0; i < THREADS; i++) {
            getcontext(&own[i]);
            own[i].uc_stack.ss_sp = &stacks[i << 16];
            own[i].uc_stack.ss_size = 1 << 16;
            own[i].uc_link = &turns;
            done[i] = false;
            makecontext(&own[i], one, 0);
        }
        for (bool left = true; left;) {
            left = false;
            for (int i = 0; i < THREADS; i++) {
                if (done[i]) continue;
                left = true;
                threadIdx.x = i;
                swapcontext(&turns, &own[i]);
            }
        }
    }
}
extern "C" void run_lightning(int grid, const Tensor* x, const float* start, float* last, const double* rates,
                              const int* cu, const Sizes* z, float scale) {
    blocks(grid, [=] { lightning(x[0], x[1], x[2], x[3], start, last, rates, cu, *z, scale); });
}
extern "C" void run_gated_delta(int grid, const Tensor* x, const float* start, float* last, const Gate* gates,
                                const int* cu, const Sizes* z, float scale) {
    blocks(grid, [=] { gated_delta(x[0], x[1], x[2], x[3], start, last, gates[0], gates[1], cu, *z, scale); });
}
"""


def library(folder, width, gate):
    """Compile the kernels for float32."""
    defines = "".join(f"#define {n} {x}\n" for n, x in {"T": "float", "D": width, "WARPS": 4, "GATE": gate}.items())
    text = (HERE / "recurrence.cu").read_text()
    text = text.replace('#include "simt_tiles.cuh"\n', BEFORE).replace(
        "extern __shared__ __align__(16) float memory[];", ""
    )
    path = folder / f"recurrence-{width}-{gate}.cpp"
    path.write_text(defines + text + AFTER)
    made = path.with_suffix(".so")
    command = ("g++", "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-o", made, path)
    subprocess.run([*map(str, command)], check=True)
    return ctypes.CDLL(str(made))


class Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((n, ctypes.c_longlong) for n in ("batch", "head", "row")))


class Sizes(ctypes.Structure):
    _fields_ = tuple((n, ctypes.c_int) for n in ("heads", "group", "n", "d_k", "d_v"))


def tensor(x):
    if x is None:
        return Tensor(None, 0, 0, 0)
    return Tensor(x.ctypes.data, *(s // x.itemsize for s in x.strides[:3]))


def pointer(x):
    return None if x is None else x.ctypes.data_as(ctypes.c_void_p)


def run(made, p):
    """Return out and the last state of a call of float32."""
    out, last = np.full(p.out_shape, np.nan, np.float32), np.full(p.state_shape, np.nan, np.float32)
    given = (Tensor * 4)(*(tensor(x) for x in (p.query, p.key, p.value, out)))
    sizes = Sizes(p.heads, p.heads // p.heads_kv, p.n_q, p.d_k, p.d_v)
    cu = None if p.cu_seqlens_q is None else np.ascontiguousarray(p.cu_seqlens_q, np.int32)
    grid = p.state_shape[0] * p.heads * -(-p.d_v // 32)
    scale = ctypes.c_float(1.0 if p.scale is None else p.scale)
    if p.variant == "lightning":
        kernel, own = made.run_lightning, np.array(p.options["decay"], np.float64)
        own_pointer = pointer(own)
    else:
        kernel, own_pointer = made.run_gated_delta, (Tensor * 2)(tensor(p.alpha), tensor(p.beta))
    kernel(grid, given, pointer(p.state), pointer(last), own_pointer, pointer(cu), ctypes.byref(sizes), scale)
    return out, last
