// What the kernels by mma.sync share: constants of the tiling, PTX, conversions, tiles in swizzled shared memory.

typedef unsigned int u32;
typedef unsigned short u16;

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define INF __int_as_float(0x7f800000)

[[maybe_unused]] constexpr int THREADS = 32 * WARPS;
#ifdef M_TILES
// ROWS: query rows a lane
[[maybe_unused]] constexpr int WARP_M = 16 * M_TILES, BLOCK_M = WARP_M * WARPS, ROWS = 2 * M_TILES;
#endif
// 8-column tiles of S
[[maybe_unused]] constexpr int NS = BLOCK_N / 8;
[[maybe_unused]] constexpr u32 K_BYTES = BLOCK_N * 2 * WIDTH_K, V_BYTES = BLOCK_N * 2 * WIDTH_V;
[[maybe_unused]] constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// ---- primitives --------------------------------------------------------------------------------------------------
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void store_shared(u32 a, uint4 x)
{
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
DEVICE void store_shared(u32 a, u32 x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(a), "r"(x) : "memory"); }
DEVICE u32 load_shared(u32 a)
{
    u32 x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(a) : "memory");
    return x;
}
DEVICE uint4 load_shared4(u32 a) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(a)
                 : "memory");
    return x;
}
DEVICE void copy_async(u32 dst, const void* src, int bytes) {  // 16 bytes, zeros past `bytes`
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(__cvta_generic_to_global(src)),
                 "r"(bytes)
                 : "memory");
}
DEVICE void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DEVICE void load_matrix(u32 (&x)[4], u32 a) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(a)
                 : "memory");
}
DEVICE void load_matrix_transposed(u32 (&x)[4], u32 a) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(a)
                 : "memory");
}
#if BF16
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#define PACK "cvt.rn.bf16x2.f32 "
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#define PACK "cvt.rn.f16x2.f32 "
#endif
DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm(MMA "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE u32 pack(float lower, float upper)
{
    u32 r;
    asm(PACK "%0, %1, %2;" : "=r"(r) : "f"(upper), "f"(lower));
    return r;
}
#if BF16
DEVICE float lower_half(u32 x) { return __int_as_float(x << 16); }
#else
DEVICE float lower_half(u32 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((u16)x)); return y; }
#endif
// ---- end of primitives --------------------------------------------------------------------------------------------
#if BIAS == 2
typedef float BiasType;
typedef float2 BiasPair;
DEVICE float value_of(float x) { return x; }
DEVICE void unpack(float2 x, float (&y)[2]) { y[0] = x.x, y[1] = x.y; }
#else
typedef u16 BiasType;
typedef u32 BiasPair;
DEVICE float value_of(u16 x) { return lower_half(x); }
DEVICE void unpack(u32 x, float (&y)[2]) { y[0] = lower_half(x), y[1] = lower_half(x >> 16); }
#endif
DEVICE float upper_half(u32 x) { return lower_half(x >> 16); }
DEVICE float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
DEVICE float quad_sum(float x) { x += __shfl_xor_sync(~0u, x, 1); return x + __shfl_xor_sync(~0u, x, 2); }
DEVICE u32 quad_or(u32 x) { x |= __shfl_xor_sync(~0u, x, 1); return x | __shfl_xor_sync(~0u, x, 2); }
DEVICE long long clamp(long long x, long long low, long long high) { return x < low ? low : x > high ? high : x; }

// Halves of x that are not finite, as their exponents' carries: bits 15 and 31.
constexpr u32 EXPONENT = BF16 ? 0x7f807f80u : 0x7c007c00u, EXPONENT_UNIT = BF16 ? 0x00800080u : 0x04000400u;
DEVICE u32 not_finite(u32 x) { return ((x & EXPONENT) + EXPONENT_UNIT) & 0x80008000u; }
DEVICE u32 zero_not_finite(u32 x) { u32 bad = not_finite(x) >> 15; return x & ~(bad * 0xffffu); }

// A shared-memory tile of rows of WIDTH 16-bit elements. Chunks of 16 bytes are swizzled so that 8 rows of one chunk
// column meet all 32 banks.
template <int WIDTH> struct Tile {
    // STEPS: 16-column steps the swizzle permutes
    static constexpr int CHUNKS = WIDTH / 8, STEPS = CHUNKS % 8 == 0 ? 4 : 2;
    // threads a row, rows a pass
    static constexpr int LANES = CHUNKS % 3 ? CHUNKS : CHUNKS / 3, STRIDE = THREADS / LANES;
    static DEVICE u32 chunk(int row, int c)
    { return row * WIDTH * 2 + ((STEPS == 4 ? c ^ (row & 7) : c ^ (row >> 1 & 3)) << 4); }
    // Address of the 16-column step k from that of step 0.
    static DEVICE u32 step(u32 start, int k) { return (start ^ (k % STEPS << 5)) + k / STEPS * (STEPS << 5); }

    // Loads rows [0, rows) of src, zeros after them and after column d.
    template <int COUNT> static DEVICE void load(u32 dst, const u16* src, long long stride, int rows, int d) {
        int first = threadIdx.x / LANES, lane = threadIdx.x % LANES;
        const u16* from = src + first * stride + lane * 8;
        UNROLL for (int i = 0; i < (COUNT + STRIDE - 1) / STRIDE; i++, from += STRIDE * stride) {
            int row = first + i * STRIDE;
            if (COUNT % STRIDE && row >= COUNT) break;
            UNROLL for (int c = lane, j = 0; j < CHUNKS / LANES; j++, c += LANES) {
                const int columns = max(0, min(8, d - c * 8)), count = row < rows ? columns : 0;
                const u16* at = from + j * LANES * 8;
#if ALIGNED
                copy_async(dst + chunk(row, c), count ? at : src, 2 * count);
#else
                u32 x[4];
                UNROLL for (int e = 0; e < 4; e++) x[e] =
                    (2 * e < count ? at[2 * e] : 0) | (2 * e + 1 < count ? (u32)at[2 * e + 1] << 16 : 0);
                store_shared(dst + chunk(row, c), make_uint4(x[0], x[1], x[2], x[3]));
#endif
            }
        }
    }
    // Searches the chunks this thread loaded for values that are not finite, or zeroes those.
    template <int COUNT, bool ZERO> static DEVICE u32 scan(u32 dst) {
        u32 bad = 0;
        UNROLL for (int i = 0; i < (COUNT + STRIDE - 1) / STRIDE; i++) {
            int row = threadIdx.x / LANES + i * STRIDE;
            if (COUNT % STRIDE && row >= COUNT) break;
            UNROLL for (int j = 0; j < CHUNKS / LANES; j++) {
                u32 a = dst + chunk(row, threadIdx.x % LANES + j * LANES);
                uint4 x = load_shared4(a);
                bad |= not_finite(x.x) | not_finite(x.y) | not_finite(x.z) | not_finite(x.w);
                if (ZERO)
                    store_shared(a, make_uint4(zero_not_finite(x.x), zero_not_finite(x.y), zero_not_finite(x.z),
                                               zero_not_finite(x.w)));
            }
        }
        return bad;
    }
};
typedef Tile<WIDTH_K> TileK;
typedef Tile<WIDTH_V> TileV;
