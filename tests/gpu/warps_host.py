"""The text of a kernel by mma.sync as C++: threads take turns, from one exchange of their warp or block to the next.

g++ compiles the very text that a GPU gets; what PTX does stands in for the sections that its files call primitives.
Tensor cores add up 16 products and the sum before in float32, in order; copies to shared memory are there at once.
"""

import ctypes
import re
import subprocess

from refattn.gpu.build import text_of

__all__ = ["library"]

BEFORE = r"""
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>
using std::max; using std::min;
struct Three { unsigned x; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint4 { unsigned x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static Three threadIdx, blockIdx;
#define __global__
#define __launch_bounds__(...)
#define __device__
#define __forceinline__ inline
#define __int_as_float(x) 0.f
#undef DEVICE
#undef UNROLL
#define DEVICE inline
#define UNROLL
static constexpr int MOST = 1024;
static int threads;
static ucontext_t turns, own[MOST];
static bool done[MOST];
static std::function<void()> body;
alignas(1024) unsigned char shared[1 << 18];
struct Meeting { int waiting = 0, times = 0; };
static Meeting in_block, in_warp[MOST / 32];
static void meet(Meeting& m, int count) {
    int time = m.times;
    if (++m.waiting == count) m.waiting = 0, m.times++;
    while (m.times == time) swapcontext(&own[threadIdx.x], &turns);
}
static void __syncthreads() { meet(in_block, threads); }
static unsigned exchanged[2][MOST][6], turn[MOST];
// Gives the warp what a lane has, and returns what the lanes gave.
static const unsigned (*exchange(const unsigned* x, int count))[6] {
    unsigned (*to)[6] = exchanged[turn[threadIdx.x]++ % 2];
    for (int i = 0; i < count; i++) to[threadIdx.x][i] = x[i];
    meet(in_warp[threadIdx.x / 32], 32);
    return to + threadIdx.x / 32 * 32;
}
static unsigned __shfl_xor_sync(unsigned, unsigned x, int other) {
    return exchange(&x, 1)[threadIdx.x % 32 ^ other][0];
}
"""
PRIMITIVES = r"""
static u32 shared_address(const void* p) { return (u32)((const unsigned char*)p - shared); }
static void store_shared(u32 a, uint4 x) { memcpy(shared + a, &x, 16); }
static void store_shared(u32 a, u32 x) { memcpy(shared + a, &x, 4); }
static uint4 load_shared4(u32 a) { uint4 x; memcpy(&x, shared + a, 16); return x; }
static void copy_async(u32 to, const void* from, int bytes) {
    memset(shared + to, 0, 16);
    memcpy(shared + to, from, bytes);
}
static void copy_wait() {}
static u16 number_at(u32 a) { u16 x; memcpy(&x, shared + a, 2); return x; }
static void load_matrix(u32 (&x)[4], u32 a) {
    const unsigned (*all)[6] = exchange(&a, 1);
    int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++) memcpy(&x[i], shared + all[8 * i + lane / 4][0] + 4 * (lane % 4), 4);
}
static void load_matrix_transposed(u32 (&x)[4], u32 a) {
    const unsigned (*all)[6] = exchange(&a, 1);
    int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++) {
        int row = 8 * i + lane % 4 * 2;
        x[i] = number_at(all[row][0] + lane / 4 * 2) | (u32)number_at(all[row + 1][0] + lane / 4 * 2) << 16;
    }
}
static float lower_half(u32 x) { float y; x <<= 16; memcpy(&y, &x, 4); return y; }
static u32 narrow(float x) {
    u32 y;
    memcpy(&y, &x, 4);
    return (x != x ? y | 0x400000 : y + 0x7fff + (y >> 16 & 1)) >> 16;
}
static u32 pack(float lower, float upper) { return narrow(lower) | narrow(upper) << 16; }
static void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const unsigned given[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const unsigned (*all)[6] = exchange(given, 6);
    int lane = threadIdx.x % 32;
    for (int e = 0; e < 4; e++) {
        int row = lane / 4, high = e / 2, column = lane % 4 * 2 + e % 2;
        for (int k = 0; k < 16; k++) {
            u32 x = all[row * 4 + k % 8 / 2][high + k / 8 * 2], y = all[column * 4 + k % 8 / 2][4 + k / 8];
            d[e] += lower_half(x >> k % 2 * 16) * lower_half(y >> k % 2 * 16);
        }
    }
}
"""
OWN = r"""
static u32 turned(u32 x) {
    const unsigned (*all)[6] = exchange(&x, 1);
    int lane = threadIdx.x % 32, row = lane % 4 * 2, shift = lane / 4 % 2 * 16;
    auto number = [&](int r) { return all[r * 4 + lane / 8][0] >> shift & 0xffff; };
    return number(row) | number(row + 1) << 16;
}
"""
AFTER = r"""
static void one() { body(); done[threadIdx.x] = true; }
static void blocks(int grid, int count, std::function<void()> kernel) {
    static std::vector<char> stacks((size_t)MOST << 16);
    body = kernel, threads = count;
    for (blockIdx.x = 0; blockIdx.x < (unsigned)grid; blockIdx.x++) {
        memset(shared, 0xff, sizeof shared);
        for (int i = 0; i < threads; i++) {
            getcontext(&own[i]);
            own[i].uc_stack.ss_sp = &stacks[(size_t)i << 16];
            own[i].uc_stack.ss_size = 1 << 16;
            own[i].uc_link = &turns;
            done[i] = false;
            makecontext(&own[i], one, 0);
        }
        for (bool left = true; left;) {
            left = false;
            for (int i = 0; i < threads; i++) {
                if (done[i]) continue;
                left = true;
                threadIdx.x = i;
                swapcontext(&turns, &own[i]);
            }
        }
    }
}
"""
SECTION = re.compile(r"^// ---- primitives -+\n.*?^// ---- end of primitives -+\n", re.MULTILINE | re.DOTALL)


def library(folder, file, macros, after):
    """Compile a file's kernels; `after` has what calls them by ``blocks(grid, threads, kernel)``."""
    defines = "".join(f"#define {n} {x}\n" for n, x in macros.items())
    sections = iter((PRIMITIVES, OWN))
    text = SECTION.sub(lambda m: next(sections), text_of(file, {}))
    text = re.sub(r"^#define (DEVICE|UNROLL) .*\n|extern __shared__ .*;", "", text, flags=re.MULTILINE)
    path = folder / f"{file}-{'-'.join(map(str, macros.values()))}.cpp"
    path.write_text(defines + BEFORE + text + AFTER + after)
    made = path.with_suffix(".so")
    command = ("g++", "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", "-o", made, path)
    subprocess.run([*map(str, command)], check=True)
    return ctypes.CDLL(str(made))
