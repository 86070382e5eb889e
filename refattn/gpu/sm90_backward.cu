// Attention backward for NVIDIA Hopper (sm_90a): dq, dk and dv of 16-bit inputs, five products, float32 accumulation.
//
//   P = exp(S - lse), dP = dout V^T, dS = P (dP - delta), delta = dout . out - dlse
//   dv = P^T dout, dk = scale dS^T q, dq = scale dS k
//
// Steps
//  1. `statistics`: lse (base 2) and delta of a row side by side, rows filled up to whole tiles; sums of dq set to 0,
//     unless they are ORDERED.
//  2. `backward`: a block owns BLOCK_N keys of a key head: two consumer warpgroups of 64 keys each; both have the
//     same 64 where WIDTH is 256, below. The producer (one thread) copies K and V once, then walks the tiles of BLOCK_M
//     rows that see them, of all heads of the group: q, dout and statistics come into a ring of STAGES slots by the
//     bulk tensor copy engine.
//     Packed sequences: a block's keys may be of several sequences. Each key is seen by an interval of rows (key_rows
//     of backward.cu), by which tiles that some row sees in part are masked, whatever hides a key.
//  3. A consumer computes S^T = K q^T and dP^T = V dout^T, whose accumulators are P^T and dS^T: the A operands of
//     dv += P^T dout and dk += dS^T q, which stay in registers to the end.
//  4. dS^T goes to shared memory, too (two buffers, one barrier a tile): dq = dS K needs the keys of both. Each
//     consumer computes its half: of the columns where BLOCK_M is 64, of the rows where it is 128.
//     SOFTCAP: S is capped first, and dS is times the slope, 1 - tanh^2.
//  5. That half (16 KiB of float32) goes to shared memory (two buffers) and from there to the sums of dq in device
//     memory, by one bulk copy that adds. Threads of the producer's warpgroup do it. ORDERED: in the order of the
//     blocks of keys, the same bits each time: a block waits until the half tile's turn is that of the last block
//     before it that sees the tile, which the producer looks up; the first block of a tile copies and adds nothing.
//     Causal blocks come last first, as each row tile's last keys get there first. Blocks of as many heads as have
//     their rows in the L2 cache together take turns in the grid: of one head, few run at once and wait.
//  6. `convert`: dq from its sums, rounded once.
//  7. Hidden keys: P and dS are 0 there; K and V behind the last key are. 0 * NaN is NaN: results that are not finite
//     are marked in `redo`, by 16 rows or keys, and simt_backward.cu computes them anew.
//
// Macros: BF16, SOFTCAP 0 | 1; WIDTH 64 | 128 | 256 (d_k, d_v filled up; multiples of 8), BLOCK_M 128 | 64 | 64,
// BLOCK_N 128 | 128 | 64, STAGES (2), ORDERED 0 | 1, LAST_FIRST 0 | 1. The wgmma wrappers scores_first, scores_next
// (A, B from shared memory), add_rows (A from registers) or add_shared, and query_first, query_next (A and B with rows
// along the contraction) are generated text (sm90_backward.py).
//
// Launch: statistics: grid any, block 256; backward: grid ceil(n_k / BLOCK_N) * h_kv * b, block 384, shared memory
// sm90_backward.shared_bytes; convert: grid b * h * row tiles * 2, block 128.

#include "hopper.cuh"
#include "backward.cuh"

#define WIDE (WIDTH == 256)
// registers a thread: of S^T and of dP^T, of dk and of dv, of dq
constexpr int NS = WIDE ? 16 : BLOCK_M / 2, NO = WIDE ? 64 : WIDTH / 2, NQ = WIDE ? 64 : 32;
constexpr u32 KV_BYTES = BLOCK_N * WIDTH * 2, Q_BYTES = BLOCK_M * WIDTH * 2, S_BYTES = BLOCK_N * BLOCK_M * 2,
              HALF_BYTES = NQ * 512, STATS_BYTES = BLOCK_M * 8, ARRIVALS = 256;
[[maybe_unused]] constexpr u32 OFFSET_V = KV_BYTES, OFFSET_Q = 2 * KV_BYTES, OFFSET_DOUT = OFFSET_Q + STAGES * Q_BYTES,
              OFFSET_DS = OFFSET_DOUT + STAGES * Q_BYTES, OFFSET_DQ = OFFSET_DS + 2 * S_BYTES, OFFSET_P = OFFSET_DQ,
              OFFSET_STATS = OFFSET_DQ + (WIDE ? 2 * S_BYTES : 4 * HALF_BYTES),
              OFFSET_BARRIERS = OFFSET_STATS + STAGES * STATS_BYTES;
constexpr u32 FULL_KV = 0, FULL_Q = 8, FULL_DOUT = FULL_Q + 8 * STAGES, EMPTY = FULL_DOUT + 8 * STAGES,
              FULL_DQ = EMPTY + 8 * STAGES, EMPTY_DQ = FULL_DQ + 32, WORK = (EMPTY_DQ + 32 + 15) / 16 * 16,
              PLACE = WORK + 16 * STAGES, FACTORS = PLACE + 64;
static_assert(STAGES == 2);                                       // dS, dq: two buffers, too
// dP is computed after P, not beside it: with the tanh's, registers do not last
[[maybe_unused]] constexpr bool LATE = SOFTCAP && BLOCK_M == 128;
constexpr int STEP = LAST_FIRST ? 1 : -1;                         // to the block that adds before
constexpr int SHARED_DS = 1;                                      // a named barrier
constexpr float LOG2E = 1.4426950408889634f;

// stats: (lse base 2, delta) by row, `rows` of a head; sums: of dq, in tiles of BLOCK_M rows, halves, and the order of
// accumulators; turns: of a half tile, the block of keys that was added last, and 1; 0: none;
// together: key heads whose blocks take turns in the grid
struct Sums {
    float2* stats; float* sums; unsigned* turns;
    unsigned char* redo_rows; unsigned char* redo_keys; int rows, together;
};

// (wgmma wrappers)

#include "softcap.cuh"
DEVICE void sync(int barrier, int count) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory"); }
// threadIdx.x and the block's work, read anew where they are needed: registers are short
DEVICE int thread_here() { int x; asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x)); return x; }
struct Work { int batch, head_kv, n; };                   // of block n of the keys
DEVICE Work work_here(const Params& p, const Sums& z) {
    int x;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
    const int blocks = (p.n_k + BLOCK_N - 1) / BLOCK_N, first = x / (z.together * blocks) * z.together,
              heads = min(z.together, p.b * p.h_kv - first), rest = x - first * blocks, n = rest / heads,
              head = first + rest % heads;
    return {head / p.h_kv, head % p.h_kv, LAST_FIRST ? blocks - 1 - n : n};
}
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

extern "C" __global__ void statistics(const __grid_constant__ Params p, const __grid_constant__ Sums z) {
    constexpr int LANES = WIDTH / 8;                              // of a row, 8 columns each
    const long long lines = (long long)p.b * p.h * z.rows, step = (long long)gridDim.x * 256;
    const long long first = blockIdx.x * 256ll + threadIdx.x;
    const int lane = threadIdx.x % LANES;
    for (long long at = first / LANES; at < lines; at += step / LANES) {      // rows are multiples of 64: whole warps
        const int i = at % z.rows, head = at / z.rows % p.h, batch = at / z.rows / p.h;
        float delta = 0.f;
        if (i < p.n_q && 8 * lane < p.d_v) {
            const uint4 x = *(const uint4*)((const u16*)p.out.data + batch * p.out.b + head * p.out.h
                                            + i * p.out.n + 8 * lane),
                        y = *(const uint4*)((const u16*)p.dout.data + batch * p.dout.b + head * p.dout.h
                                            + i * p.dout.n + 8 * lane);
            const u32 out[4] = {x.x, x.y, x.z, x.w}, dout[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int e = 0; e < 4; e++)
                delta = fmaf(upper_half(out[e]), upper_half(dout[e]),
                             fmaf(lower_half(out[e]), lower_half(dout[e]), delta));
        }
#pragma unroll
        for (int hop = LANES / 2; hop; hop /= 2) delta += __shfl_xor_sync(~0u, delta, hop);
        if (lane) continue;
        float lse = -INFINITY_F;                                  // a row without keys, or none: P is 0
        if (i < p.n_q) {
            lse = ((const float*)p.lse.data)[batch * p.lse.b + head * p.lse.h + i * p.lse.n];
            if (p.dlse.data)
                delta -= ((const float*)p.dlse.data)[batch * p.dlse.b + head * p.dlse.h + i * p.dlse.n];
            ((float*)p.delta.data)[batch * p.delta.b + head * p.delta.h + i] = delta;
        }
        z.stats[at] = make_float2(lse == -INFINITY_F ? INFINITY_F : lse * LOG2E, delta);
    }
#if !ORDERED
    for (long long at = first; at < lines * (WIDTH / 4); at += step)
        ((float4*)z.sums)[at] = make_float4(0.f, 0.f, 0.f, 0.f);
#endif
}

// Whether some row of the tile sees a key of block n, both of which are between the tile's first key and its last.
DEVICE bool meets(const Params& p, int n, int row) {
    const int2 range = rows_of(p.granule_rows, n * BLOCK_N, BLOCK_N, p.n_k);
    return range.x < row + BLOCK_M && range.y >= row;
}
DEVICE void produce(const TensorMap* map_q, const TensorMap* map_k, const TensorMap* map_v, const TensorMap* map_dout,
                    u32 shared, const Params& p, const Sums& z, const Work& own)
{
    const u32 bars = shared + OFFSET_BARRIERS;
    const int batch = own.batch, head_kv = own.head_kv, n = own.n, x0 = n * BLOCK_N, group = p.h / p.h_kv;
    barrier_expect(bars + FULL_KV, 2 * KV_BYTES);
    copy_tile<WIDTH / 64>(shared, map_k, bars + FULL_KV, BLOCK_N, x0, head_kv, batch);
    copy_tile<WIDTH / 64>(shared + OFFSET_V, map_v, bars + FULL_KV, BLOCK_N, x0, head_kv, batch);
    const int2 range = rows_of(p.granule_rows, x0, BLOCK_N, p.n_k);
    Ring<STAGES> slot;
    auto put_work = [&](int row, int tile, int masked, int turn) {        // tile: of all row tiles of all heads
        barrier_wait(bars + EMPTY + 8 * slot.stage, slot.phase ^ 1);
        store_four(bars + WORK + 16 * slot.stage, row, tile, masked, turn);
    };
    if (range.y >= range.x)
        for (int head = head_kv * group; head < (head_kv + 1) * group; head++)
            for (int row = range.x / BLOCK_M * BLOCK_M; row <= range.y; row += BLOCK_M) {
                const int4 keys = keys_of(p.granule_keys, row, BLOCK_M, p.n_q);
                if (keys.x > x0 + BLOCK_N - 1 || keys.w < x0) continue;
                int turn = 0;                             // of the block whose sums come before, and 1; 0: none
                if (ORDERED)
                    for (int i = n + STEP; !turn && i >= keys.x / BLOCK_N && i <= keys.w / BLOCK_N; i += STEP)
                        if (meets(p, i, row)) turn = i + 1;
                put_work(row, (batch * p.h + head) * (z.rows / BLOCK_M) + row / BLOCK_M,
                         !(keys.y <= x0 && keys.z >= x0 + BLOCK_N - 1), turn);
                const u32 full = bars + FULL_Q + 8 * slot.stage, full_dout = bars + FULL_DOUT + 8 * slot.stage,
                          stats = shared + OFFSET_STATS + slot.stage * STATS_BYTES;
                barrier_expect(full, Q_BYTES + STATS_BYTES);
                copy_tile<WIDTH / 64>(shared + OFFSET_Q + slot.stage * Q_BYTES, map_q, full, BLOCK_M, row, head, batch);
                const float2* from = z.stats + ((long long)batch * p.h + head) * z.rows + row;
                asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                             ::"r"(stats), "l"(from), "r"(STATS_BYTES), "r"(full) : "memory");
                barrier_expect(full_dout, Q_BYTES);
                copy_tile<WIDTH / 64>(shared + OFFSET_DOUT + slot.stage * Q_BYTES, map_dout, full_dout, BLOCK_M, row,
                                      head, batch);
                slot.advance();
            }
    put_work(-1, 0, 0, 0);
    barrier_arrive(bars + FULL_Q + 8 * slot.stage);
}

// Three threads add the consumers' halves of dq to their sums in turns; one of them alone, which waits until its copy
// has arrived, would be slower than the products.
DEVICE void add_halves(u32 shared, const Sums& z, const Work& own, int first) {
    const u32 bars = shared + OFFSET_BARRIERS;
    for (u32 job = first;; job += 3) {
        const u32 half = job % 2, i = 2 * half + job / 2 % 2, from = shared + OFFSET_DQ + i * HALF_BYTES;
        barrier_wait(bars + FULL_DQ + 8 * i, job / 4 % 2);
        const uint4 w = load_four(bars + PLACE + 16 * i);
        if ((int)w.x < 0) return;
        const long long at = 2ll * w.y + half;
        float* to = z.sums + at * (HALF_BYTES / 4);
#if ORDERED
        unsigned turn;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(turn) : "l"(z.turns + at) : "memory");
        while (turn != w.w);
        asm volatile("fence.proxy.async;" ::: "memory");
        if (turn == 0)
            asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                         ::"l"(to), "r"(from), "r"(HALF_BYTES) : "memory");
        else
#endif
            asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
                         ::"l"(to), "r"(from), "r"(HALF_BYTES) : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#if ORDERED
        asm volatile("cp.async.bulk.wait_group 0;\nfence.proxy.async;" ::: "memory");
        asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(z.turns + at), "r"(own.n + 1) : "memory");
#else
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
        barrier_arrive(bars + EMPTY_DQ + 8 * i);
    }
}

// 64 rows of S^T or dP^T: of a, by the columns of b
DEVICE void product(float (&s)[NS], u64 a, u64 b) {
#pragma unroll
    for (int i = 0; i < WIDTH / 16; i++) {
        const u64 da = a + (((i / 4) * BLOCK_N * 128 + (i % 4) * 32) >> 4),
                  db = b + (((i / 4) * BLOCK_M * 128 + (i % 4) * 32) >> 4);
        if (i == 0) scores_first(s, da, db);
        else scores_next(s, da, db);
    }
    wgmma_commit();
}
// The 16 keys of a thread's warp, of those of the block: WIDE, both consumers have the same.
DEVICE int warp_of(int thread) { return thread / 32 % (WIDE ? 4 : 8); }
// s: scores in, P out, times the slope of SOFTCAP; weights: P. stats: of the thread's first row.
DEVICE void weigh(float (&s)[NS], u32 (&weights)[NS / 2], u32 bars, u32 stats, u32 stage, bool masked, const Params& p)
{
    const uint4 factors = load_four(bars + FACTORS);
    const float scale2 = __uint_as_float(factors.x);
#if SOFTCAP
    cap(s, __uint_as_float(factors.y));
#endif
#pragma unroll
    for (int i = 0; i < NS; i += 4) {
        const uint4 x = load_four(stats + 16 * i);
        const float lse[2] = {__uint_as_float(x.x), __uint_as_float(x.z)};
#pragma unroll
        for (int e = i; e < i + 4; e += 2) {
            const float first = exp2_fast(fmaf(s[e], scale2, -lse[0])),
                        second = exp2_fast(fmaf(s[e + 1], scale2, -lse[1]));
            if (SOFTCAP) weights[e / 2] = pack(first, second);
            s[e] = SOFTCAP ? first * fmaf(-s[e], s[e], 1.f) : first;
            s[e + 1] = SOFTCAP ? second * fmaf(-s[e + 1], s[e + 1], 1.f) : second;
        }
    }
    if (masked) {                                     // some key is hidden from some row
        const int thread = thread_here() - 128,
                  key = load_four(bars + FACTORS).z + warp_of(thread) * 16 + thread / 4 % 8,
                  row = load_four(bars + WORK + 16 * stage).x + (WIDE ? thread / 128 * 32 : 0) + 2 * (thread % 4);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int from = NEVER, to = -1;                // the rows that see the thread's key
            if (key + 8 * r < p.n_k)
                asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(from), "=r"(to)
                             : "l"(p.key_rows + key + 8 * r) : "memory");
            from -= row, to -= row;
#pragma unroll
            for (int i = 2 * r; i < NS; i += i % 2 ? 3 : 1) {
                const int c = 8 * (i / 4) + i % 2;
                if (c >= from && c <= to) continue;
                s[i] = 0.f;
                if (SOFTCAP) weights[i / 2] &= i % 2 ? 0xffffu : 0xffff0000u;
            }
        }
    }
    if (!SOFTCAP)
#pragma unroll
        for (int i = 0; i < NS / 2; i++) weights[i] = pack(s[2 * i], s[2 * i + 1]);
}
// dS^T, from P^T and dP^T
DEVICE void differentiate(u32 (&slopes)[NS / 2], const float (&s)[NS], const float (&g)[NS], u32 stats) {
#pragma unroll
    for (int i = 0; i < NS; i += 4) {
        const uint4 x = load_four(stats + 16 * i);
        const float first = __uint_as_float(x.y), second = __uint_as_float(x.w);
        slopes[i / 2] = pack(s[i] * (g[i] - first), s[i + 1] * (g[i + 1] - second));
        slopes[i / 2 + 1] = pack(s[i + 2] * (g[i + 2] - first), s[i + 3] * (g[i + 3] - second));
    }
}
// The warp's keys of P^T or dS^T, to shared memory.
DEVICE void put(u32 tile, const u32 (&x)[NS / 2]) {
    const u32 thread = thread_here() - 128, at_key = tile + (warp_of(thread) * 16 + thread % 16) * 128;
#pragma unroll
    for (int i = 0; i < NS / 8; i++) {
        const int chunk = 2 * i + thread / 16 % 2 + (WIDE ? thread / 128 * 4 : 0);       // of the key's row
        const u32 to = at_key + chunk / 8 * (BLOCK_N * 128) + ((chunk % 8) ^ (thread % 8)) * 16;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                     ::"r"(to), "r"(x[4 * i]), "r"(x[4 * i + 1]), "r"(x[4 * i + 2]), "r"(x[4 * i + 3]) : "memory");
    }
}

// dk and dv of the thread's two keys, from a column on
DEVICE void finish(const float (&dk)[NO], const float (&dv)[NO], const Params& p, const Sums& z, int my_key, int column)
{
    const Work own = work_here(p, z);
    const int key = own.n * BLOCK_N + my_key, lane4 = threadIdx.x % 4;
    auto rows_in = [&](const Array& x, u16* (&to)[2]) {
#pragma unroll
        for (int r = 0; r < 2; r++)
            to[r] = x.data && key + 8 * r < p.n_k
                ? (u16*)x.data + own.batch * x.b + own.head_kv * x.h + (key + 8ll * r) * x.n + column : nullptr;
    };
    u16* to[2];
    const float by[2] = {(float)p.scale, (float)p.scale}, one[2] = {1.f, 1.f};
    rows_in(p.dk, to);
    store_rows(to, dk, by, p.d_k - column, lane4);
    rows_in(p.dv, to);
    store_rows(to, dv, one, p.d_v - column, lane4);
    float zero = 0.f;                                     // 0 * x is 0, or NaN
#pragma unroll
    for (int i = 0; i < NO; i++) zero = fmaf(dk[i], 0.f, fmaf(dv[i], 0.f, zero));
    if (z.redo_keys && zero != 0.f && key < p.n_k)        // key + 8 is of the same granule
        z.redo_keys[((long long)own.batch * p.h_kv + own.head_kv) * ((p.n_k + GRANULE - 1) / GRANULE)
                    + key / GRANULE] = 1;
}

#if WIDE
#include "sm90_backward_wide.cuh"
#else
// dv or dk += w b, b: BLOCK_M rows
DEVICE void gather(float (&total)[NO], const u32 (&w)[NS / 2], u64 b) {
#pragma unroll
    for (int i = 0; i < BLOCK_M / 16; i++)
        add_rows(total, w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3], b + ((i * 2048) >> 4));
    wgmma_commit();
}

DEVICE void consume(u32 shared, const Params& p, const Sums& z) {
    const u32 bars = shared + OFFSET_BARRIERS;
    const int half = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1, lane = threadIdx.x % 32, lane4 = lane % 4,
              warp = threadIdx.x / 32 % 4, my_key = half * 64 + warp * 16 + lane / 4;           // and my_key + 8
    const u64 desc_k = descriptor(shared + half * 8192, 16), desc_v = descriptor(shared + OFFSET_V + half * 8192, 16),
              desc_columns = descriptor(shared + (BLOCK_M == 64 ? half * BLOCK_N * 128 : 0), 16);   // K for dq
    float dk[NO], dv[NO];
#pragma unroll
    for (int i = 0; i < NO; i++) dk[i] = dv[i] = 0.f;
    Ring<STAGES> slot;
    barrier_wait(bars + FULL_KV, 0);
    for (;;) {
        barrier_wait(bars + FULL_Q + 8 * slot.stage, slot.phase);
        const uint4 w = load_four(bars + WORK + 16 * slot.stage);    // read again below: registers are short
        if ((int)w.x < 0) break;
        float s[NS], g[NS];
        u32 weights[NS / 2], slopes[NS / 2];
        const u32 q = shared + OFFSET_Q + slot.stage * Q_BYTES, dout = shared + OFFSET_DOUT + slot.stage * Q_BYTES,
                  stats = shared + OFFSET_STATS + slot.stage * STATS_BYTES + 16 * lane4;
        wgmma_fence();
        product(s, desc_k, descriptor(q, 16));
        auto slope_product = [&]() {
            barrier_wait(bars + FULL_DOUT + 8 * slot.stage, slot.phase);
            wgmma_fence();
            product(g, desc_v, descriptor(dout, 16));
        };
        if (!LATE) slope_product();
        wgmma_wait<LATE ? 0 : 1>();
        pin(s);
        weigh(s, weights, bars, stats, slot.stage, w.z, p);
        if (LATE) slope_product();
        else wgmma_wait<0>(), pin(g), wgmma_fence();
        gather(dv, weights, descriptor(dout, BLOCK_M * 128));
        if (LATE) wgmma_wait<1>(), pin(g);
        differentiate(slopes, s, g, stats);
        const u32 ds = shared + OFFSET_DS + slot.stage * S_BYTES;
        put(ds, slopes);
        fence_async();
        sync(SHARED_DS, 256);
        float dq[NQ];
        const u64 a = descriptor(ds + (BLOCK_M == 128 ? half * BLOCK_N * 128 : 0), 16);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < BLOCK_N / 16; i++) {
            const u64 da = a + ((i * 2048) >> 4), db = desc_columns + ((i * 2048) >> 4);
            if (i == 0) query_first(dq, da, db);
            else query_next(dq, da, db);
        }
        wgmma_commit();
        wgmma_fence();
        gather(dk, slopes, descriptor(q, BLOCK_M * 128));
        wgmma_wait<1>();
        pin(dq);
        pin(dv);
        const u32 place = 2 * half + slot.stage,
                  to = shared + OFFSET_DQ + place * HALF_BYTES + 16 * (threadIdx.x % 128);
        barrier_wait(bars + EMPTY_DQ + 8 * place, slot.phase ^ 1);
#pragma unroll
        for (int i = 0; i < NQ; i += 4)
            store_four(to + 512 * i, __float_as_int(dq[i]), __float_as_int(dq[i + 1]), __float_as_int(dq[i + 2]),
                       __float_as_int(dq[i + 3]));
        if (threadIdx.x % 128 == 0) {
            const uint4 work = load_four(bars + WORK + 16 * slot.stage);
            store_four(bars + PLACE + 16 * place, work.x, work.y, work.z, work.w);
        }
        fence_async();
        __syncwarp();
        if (lane == 0) barrier_arrive(bars + FULL_DQ + 8 * place);
        wgmma_wait<0>();
        pin(dk);
        barrier_arrive(bars + EMPTY + 8 * slot.stage);         // every thread: all have read the statistics
        slot.advance();
    }
    for (int i = 0; i < 2; i++, slot.advance()) {         // the end, for all that add
        const u32 place = 2 * half + slot.stage;
        barrier_wait(bars + EMPTY_DQ + 8 * place, slot.phase ^ 1);
        if (threadIdx.x % 128 == 0) store_four(bars + PLACE + 16 * place, -1, 0, 0, 0);
        if (lane == 0) barrier_arrive(bars + FULL_DQ + 8 * place);
    }

    finish(dk, dv, p, z, my_key, 0);
}
#endif

extern "C" __global__ void __launch_bounds__(384, 1)
    backward(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k,
             const __grid_constant__ TensorMap map_v, const __grid_constant__ TensorMap map_dout,
             const __grid_constant__ Params p, const __grid_constant__ Sums z)
{
    extern __shared__ __align__(1024) char memory[];
    const u32 shared = (u32)__cvta_generic_to_shared(memory);
    const Work own = work_here(p, z);
    if (threadIdx.x == 0) {
        const u32 bars = shared + OFFSET_BARRIERS;
        barrier_init(bars + FULL_KV, 1);
        barriers_init(bars + FULL_Q, bars + EMPTY, STAGES, ARRIVALS);
        for (int i = 0; i < STAGES; i++) barrier_init(bars + FULL_DOUT + 8 * i, 1);
        barriers_init(bars + EMPTY_DQ, bars + FULL_DQ, 4, 4);      // emptied by a thread, filled by four warps
        // a score's exponent of 2 is the first times it, or its tanh; the second times it is the tanh's argument
        store_four(bars + FACTORS, __float_as_int((float)(SOFTCAP ? p.softcap : p.scale) * LOG2E),
                   __float_as_int((float)(p.scale / p.softcap)), own.n * BLOCK_N, 0);
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) produce(&map_q, &map_k, &map_v, &map_dout, shared, p, z, own);
        else if (threadIdx.x % 32 == 0) {
#if !WIDE
            add_halves(shared, z, own, threadIdx.x / 32 - 1);
#elif ORDERED
            if (threadIdx.x < 96) take_turns(shared, z, own, threadIdx.x / 32 - 1);
#endif
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume(shared, p, z);
    }
}

extern "C" __global__ void convert(const __grid_constant__ Params p, const __grid_constant__ Sums z) {
    const int half = blockIdx.x % 2, tiles = z.rows / BLOCK_M, tile = blockIdx.x / 2 % tiles,
              head = blockIdx.x / 2 / tiles % p.h, batch = blockIdx.x / 2 / tiles / p.h, lane = threadIdx.x % 32,
              lane4 = lane % 4;
    const int row = tile * BLOCK_M + (BLOCK_M == 128 ? half * 64 : 0) + threadIdx.x / 32 * 16 + lane / 4,
              column = BLOCK_M == 64 ? half * (WIDTH / 2) : 0;
    const float4* from = (const float4*)z.sums + blockIdx.x * (HALF_BYTES / 16ll) + threadIdx.x;
    float dq[NQ], zero = 0.f;
    const bool none = ORDERED && z.turns[blockIdx.x] == 0;           // no block came: the sums were never written
#pragma unroll
    for (int i = 0; i < NQ; i += 4) {
        const float4 x = none ? make_float4(0.f, 0.f, 0.f, 0.f) : from[32 * i];
        dq[i] = x.x, dq[i + 1] = x.y, dq[i + 2] = x.z, dq[i + 3] = x.w;
        zero = fmaf(x.x, 0.f, fmaf(x.y, 0.f, fmaf(x.z, 0.f, fmaf(x.w, 0.f, zero))));
    }
    u16* to[2];
#pragma unroll
    for (int r = 0; r < 2; r++)
        to[r] = row + 8 * r < p.n_q
            ? (u16*)p.dq.data + batch * p.dq.b + head * p.dq.h + (row + 8ll * r) * p.dq.n + column : nullptr;
    const float by[2] = {(float)p.scale, (float)p.scale};
    store_rows(to, dq, by, p.d_k - column, lane4);
    if (z.redo_rows && zero != 0.f && row < p.n_q)
        z.redo_rows[((long long)batch * p.h + head) * ((p.n_q + GRANULE - 1) / GRANULE) + row / GRANULE] = 1;
    __syncthreads();
    if (ORDERED && threadIdx.x == 0) z.turns[blockIdx.x] = 0;        // ready for the next call
}
