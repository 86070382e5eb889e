// What the kernels for Hopper share: mbarriers, wgmma's descriptors and fences, numbers of 16 bits, rings of slots,
// stores of rows. Macro: BF16 0 | 1.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

struct alignas(64) TensorMap { char bytes[128]; };

#define DEVICE __device__ __forceinline__
#define INFINITY_F __int_as_float(0x7f800000)

// ---- mbarriers ---------------------------------------------------------------------------------------------------
DEVICE void barrier_init(u32 bar, u32 count)
{ asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory"); }
DEVICE void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
DEVICE void barrier_wait(u32 bar, u32 parity) {
    asm volatile("{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra "
                 "DONE;\nbra WAIT;\nDONE:\n}" ::"r"(bar),
                 "r"(parity)
                 : "memory");
}
// The barriers of `count` slots, 8 bytes apart: one arrival fills a slot, `arrivals` free it.
DEVICE void barriers_init(u32 full, u32 empty, int count, u32 arrivals) {
    for (int i = 0; i < count; i++) { barrier_init(full + 8 * i, 1); barrier_init(empty + 8 * i, arrivals); }
}
// ---- wgmma --------------------------------------------------------------------------------------------------------
// Matrix descriptor: address, leading and stride byte offsets (each / 16), 128-byte swizzle. K-major (Q, K): 8 rows
// of 128 bytes = 1024 (stride); leading unused. MN-major (V): 8 keys = 1024 (stride), next 64 columns (leading).
DEVICE u64 descriptor(u32 address, u32 leading) {
    return ((u64)1 << 62) | ((u64)(1024 >> 4) << 32) | ((u64)(leading >> 4) << 16) | ((address & 0x3ffff) >> 4);
}
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Keeps the compiler from moving uses of accumulators across a wait.
template <int N> DEVICE void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

DEVICE void store_four(u32 to, int a, int b, int c, int d) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
DEVICE uint4 load_four(u32 from) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from) : "memory");
    return x;
}

// ---- numbers -----------------------------------------------------------------------------------------------------
DEVICE float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
DEVICE float quad_sum(float x) { x += __shfl_xor_sync(~0u, x, 1); return x + __shfl_xor_sync(~0u, x, 2); }
DEVICE u32 pack(float lower, float upper) {
    u32 y;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(upper), "f"(lower));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(upper), "f"(lower));
#endif
    return y;
}
DEVICE float lower_half(u32 x) {
#if BF16
    return __uint_as_float(x << 16);
#else
    float y; asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(y) : "r"(x)); return y;
#endif
}
DEVICE float upper_half(u32 x) {
#if BF16
    return __uint_as_float(x & 0xffff0000u);
#else
    float y; asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(y) : "r"(x)); return y;
#endif
}

// ---- softmax, online, base 2; numerators are times 2^OFFSET ------------------------------------------------------
// UNSHIFT = 2^-OFFSET
[[maybe_unused]] constexpr float OFFSET = BF16 ? -16.f : 15.f, UNSHIFT = BF16 ? 65536.f : 1.f / 32768.f;
// What softmax takes of a score x: x slope(x) is the exponent of 2, value(x) times scale_log2 is it, too.
struct Line {
    float scale_log2;
    DEVICE float slope(float) const { return scale_log2; }
    DEVICE float value(float x) const { return x; }
};
// The largest score of each row that the lane has, of their absolute values where ABSOLUTE.
template <bool ABSOLUTE, int NS> DEVICE void largest(const float (&s)[NS], float (&most)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float a = s[2 * r], b = s[2 * r + 1];
        if (ABSOLUTE) a = fabsf(a), b = fabsf(b);
#pragma unroll
        for (int i = 4; i < NS; i += 4) {
            const float x = s[i + 2 * r], y = s[i + 2 * r + 1];
            a = fmaxf(a, ABSOLUTE ? fabsf(x) : x), b = fmaxf(b, ABSOLUTE ? fabsf(y) : y);
        }
        most[r] = fmaxf(a, b);
    }
}
// s: scores in, numerators out. most: what bounds the lane's scores of each row. top: the value of a row's bound, sum:
// running lane sums. Returns whether a bound of the warp moved: O must then be multiplied with factor.
template <bool MASKED, int NS, class Curve>
DEVICE bool softmax(float (&s)[NS], const float (&most)[2], float (&top)[2], float (&sum)[2], float (&factor)[2],
                    float scale_log2, Curve of)
{
    float now[2];
#pragma unroll
    for (int r = 0; r < 2; r++) now[r] = fmaxf(top[r], of.value(quad_max(most[r]))), factor[r] = 1.f;
    bool moved = __any_sync(~0u, now[0] > top[0] || now[1] > top[1]);
    if (moved) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            factor[r] = exp2_fast((top[r] - (MASKED && now[r] == -INFINITY_F ? 0.f : now[r])) * scale_log2);
            top[r] = now[r];
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float base = (MASKED && top[r] == -INFINITY_F ? 0.f : top[r]) * scale_log2 - OFFSET, a = 0.f, b = 0.f;
#pragma unroll
        for (int i = 0; i < NS; i += 4) {
            const float s0 = s[i + 2 * r], s1 = s[i + 2 * r + 1];
            float x = exp2_fast(fmaf(s0, of.slope(s0), -base)), y = exp2_fast(fmaf(s1, of.slope(s1), -base));
            s[i + 2 * r] = x; s[i + 2 * r + 1] = y;
            a += x; b += y;
        }
        sum[r] = fmaf(sum[r], factor[r], a + b);
    }
    return moved;
}
template <bool MASKED, int NS>
DEVICE bool softmax(float (&s)[NS], float (&top)[2], float (&sum)[2], float (&factor)[2], float scale_log2) {
    float most[2];
    largest<false>(s, most);
    return softmax<MASKED>(s, most, top, sum, factor, scale_log2, Line{scale_log2});
}
template <int N> DEVICE void rescale(float (&o)[N], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < N; i++) o[i] *= factor[i / 2 % 2];
}

// ---- slots, copies, stores ----------------------------------------------------------------------------------------
template <int N> struct Ring {
    u32 stage = 0, phase = 0;
    DEVICE void advance() { if (++stage == N) { stage = 0; phase ^= 1; } }
};
struct Yes { static constexpr bool value = true; };
struct No { static constexpr bool value = false; };
template <int N> struct Number { static constexpr int value = N; };
// A tile is boxes of 64 columns, one after another in shared memory; columns past the tensor's arrive as zeros.
template <int BOXES>
DEVICE void copy_tile(u32 dst, const TensorMap* map, u32 bar, int rows, int row, int head, int batch) {
#pragma unroll
    for (int i = 0; i < BOXES; i++)
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
                     "%4, %5, %6}], [%2];" ::"r"(dst + i * rows * 128),
                     "l"(map), "r"(bar), "r"(64 * i), "r"(row), "r"(head), "r"(batch)
                     : "memory");
}
struct Strides { long long batch, head, row; };

// The thread holds 2 columns of 8 in each group of 8 columns; the 4 lanes of a row exchange so that each holds 8
// columns = 16 bytes. to: the first element of the thread's two rows, or null.
template <int N>
DEVICE void store_rows(u16* const (&to)[2], const float (&o)[N], const float (&inverse)[2], int d, int lane4)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int c = 0; c < N / 16; c++) {  // 32 columns
            u32 x[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                x[i] = pack(o[16 * c + 4 * i + 2 * r] * inverse[r], o[16 * c + 4 * i + 2 * r + 1] * inverse[r]);
#pragma unroll
            for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (!(i & bit)) {
                        u32 got = __shfl_xor_sync(~0u, lane4 & bit ? x[i] : x[i | bit], bit);
                        if (lane4 & bit) x[i] = got;
                        else x[i | bit] = got;
                    }
            if (to[r] && 32 * c + 8 * lane4 < d)
                *(uint4*)(to[r] + 32 * c + 8 * lane4) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
}
