// What the kernels for the CUDA cores share: types and their sums, tiles copied from global to shared memory.
// Macros: T float16 | bfloat16 | float32 | float64; WARPS of a block.

typedef unsigned int u32;
typedef float float32;
typedef double float64;
struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

// ---- types -------------------------------------------------------------------------------------------------------
template <typename X> struct Sum { typedef float type; };
template <> struct Sum<double> { typedef double type; };
typedef Sum<T>::type Acc;                               // the type of all sums
[[maybe_unused]] constexpr bool CONVERTED = sizeof(T) == 2;

DEVICE float to_sum(float x) { return x; }
DEVICE double to_sum(double x) { return x; }
DEVICE float to_sum(bfloat16 x) { return __uint_as_float((u32)x.bits << 16); }
DEVICE float to_sum(float16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
DEVICE void put(float* p, float x) { *p = x; }
DEVICE void put(double* p, double x) { *p = x; }
DEVICE void put(bfloat16* p, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(p->bits) : "f"(x)); }
DEVICE void put(float16* p, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(x)); }

DEVICE float infinity(float) { return __int_as_float(0x7f800000); }
DEVICE double infinity(double) { return __longlong_as_double(0x7ff0000000000000LL); }
DEVICE bool is_unseen(float p) { return __float_as_int(p) == (int)0x80000000; }                  // the weight -0
DEVICE bool is_unseen(double p) { return __double_as_longlong(p) == (long long)0x8000000000000000LL; }
[[maybe_unused]] constexpr double LOG2E = 1.4426950408889634074, LN2 = 0.69314718055994530942;
DEVICE float exp2_float(float x) { float y; asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
[[maybe_unused]] constexpr int THREADS = 32 * WARPS;
[[maybe_unused]] constexpr int VEC = 16 / sizeof(Acc);                   // elements of a 16-byte read
template <int N> struct alignas(N * sizeof(Acc)) Vector { Acc x[N]; };

// ---- global to shared --------------------------------------------------------------------------------------------
template <int BYTES> DEVICE void copy_async(void* shared, const void* global, bool valid) {   // zeros where not valid
    u32 address = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(BYTES),
                 "r"(valid ? BYTES : 0)
                 : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Copies `rows` rows of `width` elements; the rest of the (HEIGHT, WIDTH) tile becomes 0.
// aligned: every row of the source starts at a multiple of 16 bytes, and so does its end.
template <int HEIGHT, int WIDTH, int STRIDE>
DEVICE void load_tile(Acc* tile, const T* source, long long stride, int rows, int width, bool aligned) {
    constexpr int PER = 16 / sizeof(T), CHUNKS = WIDTH / PER, STEP = THREADS / CHUNKS;
    if (aligned) {
        int column = threadIdx.x % CHUNKS * PER, row = threadIdx.x / CHUNKS;
        if (row >= STEP) return;
        const T* from = source + row * stride + column;
#pragma unroll 4
        for (; row < HEIGHT; row += STEP, from += STEP * stride) {
            bool valid = row < rows && column < width;
            Acc* to = tile + row * STRIDE + column;
            if (CONVERTED) {
                struct alignas(16) { T x[PER]; } chunk = {};
                if (valid) chunk = *(const decltype(chunk)*)from;
                UNROLL for (int i = 0; i < PER; i++) to[i] = to_sum(chunk.x[i]);
            } else {
                copy_async<16>(to, valid ? from : source, valid);
            }
        }
    } else {
#pragma unroll 4
        for (int i = threadIdx.x; i < HEIGHT * WIDTH; i += THREADS) {
            int row = i / WIDTH, column = i % WIDTH;
            bool valid = row < rows && column < width;
            const T* from = valid ? source + row * stride + column : source;
            Acc* to = tile + row * STRIDE + column;
            if (CONVERTED) *to = valid ? to_sum(*from) : (Acc)0;
            else copy_async<CONVERTED ? 4 : sizeof(T)>(to, from, valid);
        }
    }
}
DEVICE bool is_aligned(const void* p, int width, long long a, long long b, long long c) {
    constexpr int PER = 16 / sizeof(T);
    return ((unsigned long long)p & 15) == 0 && width % PER == 0 && a % PER == 0 && b % PER == 0 && c % PER == 0;
}

// A repair: is any of the marks set? Most often none is, which one look tells. Behind them are zeros, up to a power of
// two.
DEVICE bool any_marked(const unsigned char* redo, long long marks) {
    unsigned any = 0;
    for (long long i = 16ll * threadIdx.x; i < marks; i += 16ll * blockDim.x) {
        const uint4 x = *(const uint4*)(redo + i);
        any |= x.x | x.y | x.z | x.w;
    }
    return __syncthreads_or(any != 0);
}
