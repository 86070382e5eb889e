// Trilinear (2-simplicial) attention forward for NVIDIA Hopper (sm_90a), bfloat16: row i attends to pairs (j, k) of
// the keys it sees, s = scale * sum_l q_il k1_jl k2_kl,   out_i = sum_jk softmax(s)_jk (v1_j * v2_k),   and lse.
//
// Steps
//  1. A tile has 64 rows: ROW_HEADS heads that share their keys (2^row_heads_log2), at 64 / ROW_HEADS places one
//     after another. With 64 heads a key head, all rows see the same keys, and no product is wasted on a window's
//     edge.
//  2. A block has a producer warpgroup and two consumers. Both work on the same rows: consumer c takes every second
//     j, from c. At the end of the tile their results become one, as online softmax joins two parts.
//  3. The producer (one thread) copies Q and the blocks of KEYS keys k2, v2 that the tile sees into shared memory, by
//     the bulk tensor copy engine, in rings of slots. A block stays there while all j pass over it.
//  4. k1_j and v1_j come by cp.async into four slots a warp, loaded by that warp two j ahead: no barrier.
//  5. For each j and each half (64 keys) of the block, S = (Q * k1_j) K2^T: the product with k1_j is in registers,
//     rounded to bfloat16, as operand A. T = P V2 over the block; O += v1_j * T in float32. Products of the next S
//     and of T overlap with the softmax, within a consumer and between the two (named barriers pass a token).
//  6. Only blocks or j that some row of the tile does not see are masked.
//
// Macros: HEAD_DIM 64 | 128, HALVES 1 | 2, STAGES, CONSUMER_REGISTERS, PRODUCER_REGISTERS, BF16 1. d at most
// HEAD_DIM, a multiple of 8. scale must be positive. Rows 16-byte aligned, last axis contiguous. Hidden keys of a
// tile's rows meet weights of 0: their values must be finite. The wgmma wrappers qk_first, qk_next, pv_first, pv_next
// are generated text (sm90.py), put in at the marker.
//
// Launch: grid any size from 1 to `tiles`, block 384, dynamic shared memory trilinear.shared_bytes.

#include "hopper.cuh"
#include "trilinear.cuh"

constexpr int KEYS = 64 * HALVES, NS = 32, NO = HEAD_DIM / 2, NP = 16, NA = HEAD_DIM / 4, SLOTS = HALVES == 2 ? 4 : 8;
constexpr u32 Q_BYTES = 64 * HEAD_DIM * 2, KV_BYTES = KEYS * HEAD_DIM * 2, ROW_BYTES = HEAD_DIM * 2, ARRIVALS = 8;
constexpr u32 WARP_BYTES = SLOTS * 2 * ROW_BYTES + 64 + 512;  // a consumer warp's own
// Shared memory, from a 1024-byte aligned base.
constexpr u32 OFFSET_K = 2 * Q_BYTES, OFFSET_V = OFFSET_K + STAGES * KV_BYTES,
              OFFSET_ROWS = OFFSET_V + STAGES * KV_BYTES, OFFSET_MERGE = OFFSET_ROWS + 8 * WARP_BYTES,
              OFFSET_BARRIERS = OFFSET_MERGE + 128 * 4 * (NO + 4);
constexpr u32 FULL_Q = 0, EMPTY_Q = 16, FULL_K = 32, EMPTY_K = FULL_K + 8 * STAGES, FULL_V = EMPTY_K + 8 * STAGES,
              EMPTY_V = FULL_V + 8 * STAGES;

struct Work { int place, head, head_kv, batch, first1, end1, first2, blocks, rounds; };  // rounds: j of each consumer

DEVICE Work decode(int tile, const Shape& z) {  // the last places, whose work is the longest, first
    int heads = head_tiles(z), a = tile % heads, rest = tile / heads, rows = (z.n_q + places(z) - 1) / places(z);
    Work w;
    w.head_kv = rest % z.heads_kv; rest /= z.heads_kv;
    w.batch = rest % z.batch; rest /= z.batch;
    w.place = (rows - 1 - rest) * places(z);
    w.head = a << z.row_heads_log2;  // in its group
    int last = min(w.place + places(z), z.n_q) - 1, end2 = end_seen(z, z.tiled, last);
    w.first1 = first_seen(z, z.single, w.place); w.end1 = end_seen(z, z.single, last);
    w.first2 = first_seen(z, z.tiled, w.place);
    w.blocks = w.end1 > w.first1 && end2 > w.first2 ? (end2 - w.first2 + KEYS - 1) / KEYS : 0;
    w.rounds = (w.end1 - w.first1 + 1) / 2;
    return w;
}
DEVICE void token_wait(int consumer) { asm volatile("bar.sync %0, 256;" ::"r"(consumer + 1) : "memory"); }
DEVICE void token_pass(int consumer) { asm volatile("bar.arrive %0, 256;" ::"r"(2 - consumer) : "memory"); }

// (wgmma wrappers)

DEVICE void copy_keys(u32 dst, const TensorMap* map, u32 bar, int row, int head, int batch) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 64; i++)
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
                     "%4, %5, %6}], [%2];" ::"r"(dst + i * KEYS * 128),
                     "l"(map), "r"(bar), "r"(64 * i), "r"(row), "r"(head), "r"(batch)
                     : "memory");
}
DEVICE void copy_query(u32 dst, const TensorMap* map, u32 bar, const Work& w) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 64; i++)
        asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
                     "%4, %5, %6, %7}], [%2];" ::"r"(dst + i * 64 * 128),
                     "l"(map), "r"(bar), "r"(64 * i), "r"(w.head), "r"(w.place), "r"(w.head_kv), "r"(w.batch)
                     : "memory");
}
DEVICE void produce(const TensorMap* map_q, const TensorMap* map_k2, const TensorMap* map_v2, u32 shared,
                    const Shape& z)
{
    u32 bars = shared + OFFSET_BARRIERS;
    Ring<2> q;
    Ring<STAGES> kv;
    for (int tile = blockIdx.x; tile < z.tiles; tile += gridDim.x) {
        Work w = decode(tile, z);
        if (!w.blocks) continue;
        barrier_wait(bars + EMPTY_Q + 8 * q.stage, q.phase ^ 1);
        barrier_expect(bars + FULL_Q + 8 * q.stage, Q_BYTES);
        copy_query(shared + q.stage * Q_BYTES, map_q, bars + FULL_Q + 8 * q.stage, w);
        q.advance();
        for (int b = 0; b < w.blocks; b++) {
            barrier_wait(bars + EMPTY_K + 8 * kv.stage, kv.phase ^ 1);
            barrier_expect(bars + FULL_K + 8 * kv.stage, KV_BYTES);
            copy_keys(shared + OFFSET_K + kv.stage * KV_BYTES, map_k2, bars + FULL_K + 8 * kv.stage,
                      w.first2 + b * KEYS, w.head_kv, w.batch);
            barrier_wait(bars + EMPTY_V + 8 * kv.stage, kv.phase ^ 1);
            barrier_expect(bars + FULL_V + 8 * kv.stage, KV_BYTES);
            copy_keys(shared + OFFSET_V + kv.stage * KV_BYTES, map_v2, bars + FULL_V + 8 * kv.stage,
                      w.first2 + b * KEYS, w.head_kv, w.batch);
            kv.advance();
        }
    }
}

DEVICE void store_shared(u32 a, u32 x, u32 y)
{ asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(a), "r"(x), "r"(y) : "memory"); }

DEVICE void consume(u32 shared, const Shape& z, float scale, const u16* k1, const Strides& k1_at, const u16* v1,
                    const Strides& v1_at, u16* out, const Strides& out_at, float* lse)
{
    u32 bars = shared + OFFSET_BARRIERS;
    int consumer = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1, lane = threadIdx.x % 32, lane4 = lane % 4,
        warp = threadIdx.x / 32 % 4;
    float scale_log2 = scale * LOG2E;
    u32 keys = 0;                                                                                 // blocks so far
    float o[NO], t[NO], top[2], sum[2], factor[2];
    u32 p[NP], a[NA];
    // what need not be in registers: the lane's source of k1_j or v1_j; the warp's tile
    const u32 rows = shared + OFFSET_ROWS + (consumer * 4 + warp) * WARP_BYTES, work = rows + SLOTS * 2 * ROW_BYTES,
              mine = work + 64 + 16 * lane;
    auto release = [&](u32 bar) { if (lane == 0) barrier_arrive(bar); };
    if (consumer == 1) token_pass(consumer);
    store_shared(work + 32, blockIdx.x, 0);
    for (;;) {
        int tile = load_shared(work + 32);
        if (tile >= z.tiles) break;
        Work w = decode(tile, z);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < NO; i++) o[i] = t[i] = 0.f;
        top[0] = top[1] = -INFINITY_F; sum[0] = sum[1] = 0.f;
        if (w.blocks) {
            // k1_j and v1_j of the consumer's j: a 16-byte piece a lane, two j ahead
            constexpr int PIECES = HEAD_DIM / 8;
            const bool second = lane / PIECES;
            const long long stride = second ? v1_at.row : k1_at.row;
            const u16* from = (second ? v1 : k1) + w.batch * (second ? v1_at.batch : k1_at.batch) +
                              w.head_kv * (second ? v1_at.head : k1_at.head) + w.first1 * stride + lane % PIECES * 8;
            const int bytes = min(max(z.d - lane % PIECES * 8, 0), 8) * 2;
            const int rounds = w.rounds, last = min(w.place + places(z), z.n_q) - 1;
            // rounds whose j, and halves of blocks whose keys, all rows see
            const int all1 = (first_seen(z, z.single, last) - w.first1 - consumer + 1) / 2,
                      all1_end = (end_seen(z, z.single, w.place) - w.first1 - consumer + 1) / 2;
            const int all2 = (first_seen(z, z.tiled, last) - w.first2 + 63) / 64,
                      all2_end = max(end_seen(z, z.tiled, w.place) - w.first2, 0) / 64;
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(work), "r"(w.place), "r"(w.first1),
                         "r"(w.first2), "r"(w.end1 - w.first1)
                         : "memory");
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(work + 16), "r"(all1), "r"(all1_end),
                         "r"(all2), "r"(all2_end)
                         : "memory");
            store_shared(work + 40, rounds, w.blocks);
            asm volatile("st.shared.v2.b64 [%0], {%1, %2};" ::"r"(mine), "l"(from), "l"((stride * 2) << 8 | bytes)
                         : "memory");
            __syncwarp();
            // j so far; of this block; blocks
            int at = 0, round = 0, block = 0;
            // bits: halves to be masked
            u32 edges = 0;
            auto slot = [&](int i) { return rows + (i & (SLOTS - 1)) * 2 * ROW_BYTES; };
            auto load_row = [&](int i, int round) {
                const u16* from;
                long long packed;
                asm volatile("ld.shared.v2.b64 {%0, %1}, [%2];" : "=l"(from), "=l"(packed) : "r"(mine) : "memory");
                for (int rounds = load_shared(work + 40); round >= rounds;) round -= rounds;
                int j = 2 * round + consumer;
                const bool there = j < (int)load_shared(work + 12);
                if (lane < 2 * PIECES)
                    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(slot(i) + lane * 16),
                                 "l"(__cvta_generic_to_global((const char*)from + (there ? j : 0) * (packed >> 8))),
                                 "r"(there ? (int)(packed & 255) : 0)
                                 : "memory");
                asm volatile("cp.async.commit_group;" ::: "memory");
            };
            auto find_edges = [&]() {
                int all[4];
                asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                             : "=r"(all[0]), "=r"(all[1]), "=r"(all[2]), "=r"(all[3])
                             : "r"(work + 16)
                             : "memory");
                edges = 0;
#pragma unroll
                for (int h = 0; h < HALVES; h++)
                    if (round < all[0] || round >= all[1] || block * HALVES + h < all[2] ||
                        block * HALVES + h >= all[3])
                        edges |= 1 << h;
            };
            auto mask = [&](float (&s)[NS], int half) {
                if (!(edges >> half & 1)) return;
                Work w;
                asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(w.place), "=r"(w.first1) : "r"(work) : "memory");
                asm volatile("ld.shared.b32 %0, [%1];" : "=r"(w.first2) : "r"(work + 8) : "memory");
                int j = w.first1 + 2 * round + consumer, base = w.first2 + block * KEYS + half * 64;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    int i = w.place + place_in(z, warp * 16 + lane / 4 + 8 * r), column = base + 2 * lane4;
                    int low = first_seen(z, z.tiled, i) - column, high = end_seen(z, z.tiled, i) - column;
                    if (j < first_seen(z, z.single, i) || j >= end_seen(z, z.single, i)) high = -1;
#pragma unroll
                    for (int c = 0; c < NS / 4; c++)
#pragma unroll
                        for (int e = 0; e < 2; e++)
                            if (8 * c + e < low || 8 * c + e >= high) s[4 * c + 2 * r + e] = -INFINITY_F;
                }
            };
            auto make_a = [&](u32 row) {                                                          // A = Q * k1_j
                int r = warp * 16 + lane % 16;
                u32 address = shared + (load_shared(work + 36) & 1) * Q_BYTES + r * 128, chunk = (lane / 16 ^ (r & 7))
                                                                                                 << 4;
#pragma unroll
                for (int i = 0; i < HEAD_DIM / 16; i++) {
                    u32 x[4];
                    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                                 : "r"(address + i / 4 * 8192 + (chunk ^ (i % 4) << 5))
                                 : "memory");
                    u32 low = load_shared(row + 32 * i + 4 * lane4), high = load_shared(row + 32 * i + 4 * lane4 + 16);
                    a[4 * i] = product(x[0], low); a[4 * i + 1] = product(x[1], low);
                    a[4 * i + 2] = product(x[2], high); a[4 * i + 3] = product(x[3], high);
                }
            };
            auto product_s = [&](float (&s)[NS], int half) {
                u64 k2 = descriptor(shared + OFFSET_K + keys % STAGES * KV_BYTES + half * 8192, 16);
#pragma unroll
                for (int i = 0; i < HEAD_DIM / 16; i++) {
                    u64 b = k2 + (((i / 4) * KEYS * 128 + (i % 4) * 32) >> 4);
                    if (i == 0) qk_first(s, a[0], a[1], a[2], a[3], b);
                    else qk_next(s, a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3], b);
                }
                wgmma_commit();
            };
            auto product_t = [&](int half, u32 keys) {
                u64 v2 = descriptor(shared + OFFSET_V + keys % STAGES * KV_BYTES + half * 8192, KEYS * 128);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    u64 b = v2 + ((i * 2048) >> 4);
                    if (i == 0 && half == 0) pv_first(t, p[0], p[1], p[2], p[3], b);
                    else pv_next(t, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], b);
                }
                wgmma_commit();
            };
            // O += v1_j * T, complete
            auto add = [&](u32 row) {
#pragma unroll
                for (int c = 0; c < NO / 4; c++) {
                    u32 x = load_shared(row + ROW_BYTES + 16 * c + 4 * lane4);
                    float low = lower_half(x), high = upper_half(x);
                    o[4 * c] = fmaf(low, t[4 * c], o[4 * c]); o[4 * c + 1] = fmaf(high, t[4 * c + 1], o[4 * c + 1]);
                    o[4 * c + 2] = fmaf(low, t[4 * c + 2], o[4 * c + 2]);
                    o[4 * c + 3] = fmaf(high, t[4 * c + 3], o[4 * c + 3]);
                }
            };
            auto round_p = [&](const float (&s)[NS]) {
#pragma unroll
                for (int i = 0; i < NP; i++) p[i] = pack(s[2 * i], s[2 * i + 1]);
            };
            // S of this half of round `at`, T of the half before, which is of block `v` of keys
            auto step = [&](auto half, auto start, u32 v) {
                constexpr int H = decltype(half)::value, BEFORE = HALVES == 2 ? 1 - H : 0;
                float s[NS];
                if constexpr (decltype(start)::value) {
                    wgmma_fence();
                    product_s(s, H);
                    wgmma_wait<0>();
                    pin(s);
                    mask(s, H);
                    softmax<true>(s, top, sum, factor, scale_log2);
                    round_p(s);
                    return;
                }
                token_wait(consumer);
                wgmma_fence();
                product_s(s, H);
                token_pass(consumer);
                barrier_wait(bars + FULL_V + v % STAGES * 8, v / STAGES & 1);
                // while S is computed; T is 0 at first
                if (BEFORE == 0) add(slot(max(at - (HALVES == 2 ? 1 : 2), 0)));
                wgmma_fence();
                product_t(BEFORE, v);
                wgmma_wait<1>();
                pin(s);
                mask(s, H);
                bool moved = softmax<true>(s, top, sum, factor, scale_log2);
                wgmma_wait<0>();
                pin(t);
                if (moved) { rescale(o, factor); rescale(t, factor); }
                round_p(s);
            };
            auto next_row = [&]() {
                asm volatile("cp.async.wait_group 1;" ::: "memory");
                __syncwarp();
                load_row(at + 2, round + 2);
                find_edges();
                make_a(slot(at));
            };
            load_row(0, 0);
            load_row(1, 1);
            {
                u32 queries = load_shared(work + 36);
                barrier_wait(bars + FULL_Q + queries % 2 * 8, queries / 2 & 1);
            }
            barrier_wait(bars + FULL_K + keys % STAGES * 8, keys / STAGES & 1);
            next_row();
            step(Number<0>(), Yes(), keys);
            if constexpr (HALVES == 2) step(Number<1>(), No(), keys);
#pragma unroll 1
            for (at = 1;; at++) {
                const bool turn = ++round == load_shared(work + 40);
                // the next block of keys
                if (turn) {
                    round = 0;
                    if (++block == load_shared(work + 44)) break;
                    release(bars + EMPTY_K + keys % STAGES * 8);
                    keys++;
                    barrier_wait(bars + FULL_K + keys % STAGES * 8, keys / STAGES & 1);
                }
                next_row();
                step(Number<0>(), No(), keys - turn);
                if (turn) release(bars + EMPTY_V + (keys - 1) % STAGES * 8);
                if constexpr (HALVES == 2) step(Number<1>(), No(), keys);
            }
            barrier_wait(bars + FULL_V + keys % STAGES * 8, keys / STAGES & 1);
            if (HALVES == 1) add(slot(max(at - 2, 0)));
            wgmma_fence();
            product_t(HALVES - 1, keys);
            wgmma_wait<0>();
            pin(t);
            add(slot(at - 1));
            asm volatile("cp.async.wait_all;" ::: "memory");
            release(bars + EMPTY_K + keys % STAGES * 8);
            release(bars + EMPTY_V + keys % STAGES * 8);
            u32 queries = load_shared(work + 36);
            release(bars + EMPTY_Q + queries % 2 * 8);
            keys++;
            tile = load_shared(work + 32);
            __syncwarp();
            store_shared(work + 32, tile, queries + 1);
            w = decode(tile, z);                                                                  // anew, not kept
        }
        // one result of two
        u32 merge = shared + OFFSET_MERGE + threadIdx.x % 128 * 4;
        if (consumer == 1) {
#pragma unroll
            for (int i = 0; i < NO; i++) store_float(merge + 512 * i, o[i]);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                store_float(merge + 512 * (NO + r), top[r]);
                store_float(merge + 512 * (NO + 2 + r), sum[r]);
            }
        }
        asm volatile("bar.sync 3, 256;" ::: "memory");
        if (consumer == 0) {
            float other[2], inverse[2];
            u16* to[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float top1 = load_float(merge + 512 * (NO + r)), most = fmaxf(top[r], top1),
                      base = most == -INFINITY_F ? 0.f : most;
                factor[r] = exp2_fast((top[r] - base) * scale_log2); other[r] = exp2_fast((top1 - base) * scale_log2);
                float total =
                    quad_sum(sum[r] * factor[r] + load_float(merge + 512 * (NO + 2 + r)) * other[r]) * UNSHIFT;
                inverse[r] = total == 0.f ? 0.f : UNSHIFT / total;
                int row = warp * 16 + lane / 4 + 8 * r, i = w.place + place_in(z, row);
                long long head = w.head_kv * z.group + w.head + head_in(z, row);
                to[r] = i < z.n_q ? out + w.batch * out_at.batch + head * out_at.head + i * out_at.row : nullptr;
                if (lane4 == 0 && i < z.n_q)
                    lse[((long long)w.batch * z.heads_kv * z.group + head) * z.n_q + i] =
                        total == 0.f ? -INFINITY_F : most * scale + 0.6931471805599453f * __log2f(total);
            }
#pragma unroll
            for (int i = 0; i < NO; i++)
                o[i] = o[i] * factor[i / 2 % 2] + load_float(merge + 512 * i) * other[i / 2 % 2];
            store_rows(to, o, inverse, z.d, lane4);
        }
        // read, may be written anew
        asm volatile("bar.sync 3, 256;" ::: "memory");
        u32 next = load_shared(work + 32) + gridDim.x;
        __syncwarp();
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(work + 32), "r"(next) : "memory");
        __syncwarp();
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    trilinear_forward(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k2,
                      const __grid_constant__ TensorMap map_v2, const u16* k1, const u16* v1, u16* out, float* lse,
                      const Strides k1_at, const Strides v1_at, const Strides out_at, const Shape shape, float scale)
{
    extern __shared__ char memory[];
    u32 shared = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
    if (threadIdx.x == 0) {
        u32 bars = shared + OFFSET_BARRIERS;
        barriers_init(bars + FULL_Q, bars + EMPTY_Q, 2, ARRIVALS);
        barriers_init(bars + FULL_K, bars + EMPTY_K, STAGES, ARRIVALS);
        barriers_init(bars + FULL_V, bars + EMPTY_V, STAGES, ARRIVALS);
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        if (threadIdx.x == 0) produce(&map_q, &map_k2, &map_v2, shared, shape);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        consume(shared, shape, scale, k1, k1_at, v1, v1_at, out, out_at, lse);
    }
}
