// Attention forward for NVIDIA Hopper (sm_90a): O = softmax(scale * Q K^T) V and lse, 16-bit inputs, float32
// accumulation.
//
// Steps
//  1. A block has one producer warpgroup and CONSUMERS consumer warpgroups; each consumer owns 64 query rows.
//  2. The producer (one thread) takes tiles of BLOCK_M query rows from a queue, and copies Q, K and V tiles to shared
//     memory by the bulk tensor copy engine (128-byte swizzle, boxes of 64 columns; d below HEAD_DIM is filled up
//     with zeros). K and V each have a ring of STAGES slots with a "full" and an "empty" mbarrier a slot.
//     Out-of-range rows arrive as zeros.
//     BLOCKS: it skips the key blocks that a block mask hides, and tells with each K tile which one comes next.
//  3. A consumer walks the key blocks from the last to the first, so that the blocks to be masked (tail, causal
//     diagonal) come first. In each step it issues S' = Q K'^T for the next block, then O += P V for the current one,
//     and computes the softmax of S' while O += P V runs. P stays in registers: the accumulator layout of S is the A
//     operand layout of P V.
//  4. PINGPONG: named barriers pass a token from consumer to consumer, so that one issues its products while the
//     others are in their softmax.
//  5. Softmax is online, base 2: p = 2^(s * scale * log2 e - max * scale * log2 e + OFFSET); the row sum is reduced
//     over the four lanes of a row at the end only. Rows without keys give 0 and lse = -inf. OFFSET moves P in the
//     range of its type: up in float16, whose smallest numbers are not small; down in bfloat16, so that sums of its
//     largest values stay finite.
//  6. HIGH: P = hi + lo, two 16-bit parts, O += hi V + lo V: the rounding of P leaves the result.
//  7. Epilogue: divide by the row sum, transpose within each quad of lanes, 16-byte stores. The producer already
//     loads the next tile meanwhile.
//  8. CAUSAL: a hidden key's p is 0, and 0 * NaN is NaN. Tiles with an output that is not finite are marked in
//     `redo`, a byte for 64 rows; simt.cu computes them anew.
//
// Macros: HEAD_DIM 64 | 128 | 256, BF16 0 | 1, CAUSAL 0 | 1 (aligned to the bottom right), HIGH 0 | 1, CONSUMERS 2 |
// 3, BLOCK_N (multiple of 16), STAGES (K, V), Q_STAGES, PINGPONG 0 | 1, BLOCKS 0 | 1 (of multiples of BLOCK_M rows
// and BLOCK_N keys), CONSUMER_REGISTERS and PRODUCER_REGISTERS (multiples of 8). d at most HEAD_DIM, a multiple of 8.
// scale must be positive. Rows of all tensors 16-byte aligned, last axis contiguous. The wgmma wrappers qk_first,
// qk_next (S (+)= Q K^T, both from shared memory) and pv (O += P V, P from registers) are generated text (sm90.py)
// put in at the marker below, since their asm statements have one operand an accumulator register.
//
// Launch: grid any size from 1 to `tiles` (tiles: plain grid; number of multiprocessors: persistent), block
// BLOCK_THREADS, dynamic shared memory sm90.shared_bytes, `counter` one zeroed int (zero again at the end; not to be
// shared by concurrent launches).

#include "hopper.cuh"

constexpr int BLOCK_M = 64 * CONSUMERS;
constexpr int BLOCK_THREADS = 128 * (CONSUMERS + 1);
constexpr int NS = BLOCK_N / 2;                       // registers of S a thread
constexpr int NO = HEAD_DIM / 2;                      // registers of O a thread
constexpr int NP = BLOCK_N / 4;                       // registers of P a thread
constexpr u32 Q_BYTES = BLOCK_M * HEAD_DIM * 2;
constexpr u32 KV_BYTES = BLOCK_N * HEAD_DIM * 2;
constexpr u32 ARRIVALS = 4 * CONSUMERS;               // one arrival a consumer warp frees a slot

// Shared memory, from a 1024-byte aligned base.
constexpr u32 OFFSET_K = Q_STAGES * Q_BYTES;
constexpr u32 OFFSET_V = OFFSET_K + STAGES * KV_BYTES;
constexpr u32 OFFSET_BARRIERS = OFFSET_V + STAGES * KV_BYTES;
constexpr u32 FULL_Q = 0, EMPTY_Q = FULL_Q + 8 * Q_STAGES, FULL_K = EMPTY_Q + 8 * Q_STAGES,
              EMPTY_K = FULL_K + 8 * STAGES, FULL_V = EMPTY_K + 8 * STAGES, EMPTY_V = FULL_V + 8 * STAGES,
              WORK = EMPTY_V + 8 * STAGES, NEXT = WORK + 16 * Q_STAGES;

// A tile is HEAD_DIM / 64 boxes of 64 columns, one after another in shared memory; columns past the tensor's arrive
// as zeros.
DEVICE void copy_tile(u32 dst, const TensorMap* map, u32 bar, int rows, int row, int head, int batch) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 64; i++)
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
                     "%4, %5, %6}], [%2];" ::"r"(dst + i * rows * 128),
                     "l"(map), "r"(bar), "r"(64 * i), "r"(row), "r"(head), "r"(batch)
                     : "memory");
}
DEVICE void token_wait(int consumer) { asm volatile("bar.sync %0, 256;" ::"r"(consumer + 1) : "memory"); }
DEVICE void token_pass(int consumer) {
    int next = consumer + 1 == CONSUMERS ? 0 : consumer + 1;
    asm volatile("bar.arrive %0, 256;" ::"r"(next + 1) : "memory");
}

// (wgmma wrappers)

DEVICE void product_qk(float (&s)[NS], u64 q, u64 k) {  // q, k: descriptors of the tiles
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 16; i++) {
        u64 dq = q + (((i / 4) * BLOCK_M * 128 + (i % 4) * 32) >> 4),
            dk = k + (((i / 4) * BLOCK_N * 128 + (i % 4) * 32) >> 4);
        if (i == 0) qk_first(s, dq, dk);
        else qk_next(s, dq, dk);
    }
    wgmma_commit();
}
DEVICE void product_pv(float (&o)[NO], const u32 (&p)[(1 + HIGH) * NP], u64 v) {
#pragma unroll
    for (int i = 0; i < BLOCK_N / 16; i++) {
        u64 dv = v + ((i * 2048) >> 4);
        pv(o, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], dv);
#if HIGH
        pv(o, p[NP + 4 * i], p[NP + 4 * i + 1], p[NP + 4 * i + 2], p[NP + 4 * i + 3], dv);
#endif
    }
    wgmma_commit();
}

// ---- softmax -----------------------------------------------------------------------------------------------------
// Register i of S holds row 8 * (i / 2 % 2) of the thread's two rows, column 8 * (i / 4) + i % 2 after the thread's
// first column.
DEVICE void apply_mask(float (&s)[NS], const int (&limit)[2]) {  // keeps columns under limit[row]
#pragma unroll
    for (int i = 0; i < NS; i++)
        if (8 * (i / 4) + i % 2 >= limit[i / 2 % 2]) s[i] = -INFINITY_F;
}
DEVICE void round_p(u32 (&p)[(1 + HIGH) * NP], const float (&s)[NS]) {
#pragma unroll
    for (int i = 0; i < NP; i++) {
        p[i] = pack(s[2 * i], s[2 * i + 1]);
#if HIGH
        p[NP + i] = pack(s[2 * i] - lower_half(p[i]), s[2 * i + 1] - upper_half(p[i]));
#endif
    }
}

// ---- work --------------------------------------------------------------------------------------------------------
// group: query heads a key head; head_group: see decode
struct Shape { int batch, heads, group, n_q, n_k, d, head_group, tiles; };
// packed by pack.cu; strides in words
struct BlockMask { const u32* bits; long long batch, head, row; int block_q, block_k; };
struct Work { int row, head, batch, blocks; };
// Tiles in the order of the queue: groups of head_group heads (whose K and V fit in the L2 cache together), inside a
// group the query blocks (the longest first when causal), innermost the heads.
DEVICE Work decode(int tile, const Shape& z) {
    int rows = (z.n_q + BLOCK_M - 1) / BLOCK_M, g = tile / (z.head_group * rows), rest = tile - g * z.head_group * rows;
    int first = g * z.head_group, width = min(z.head_group, z.batch * z.heads - first), m = rest / width,
        h = first + rest - m * width;
    if (CAUSAL) m = rows - 1 - m;
    Work w;
    w.row = m * BLOCK_M; w.batch = h / z.heads; w.head = h - w.batch * z.heads;
    int keys = CAUSAL ? min(z.n_k, w.row + BLOCK_M + z.n_k - z.n_q) : z.n_k;
    w.blocks = keys > 0 ? (keys + BLOCK_N - 1) / BLOCK_N : 0;
    return w;
}
DEVICE void produce(const TensorMap* map_q, const TensorMap* map_k, const TensorMap* map_v, u32 shared, const Shape& z,
                    const BlockMask& mask, int* counter)
{
    u32 bars = shared + OFFSET_BARRIERS;
    Ring<Q_STAGES> q;
    Ring<STAGES> k, v;
    for (int tile = blockIdx.x;;) {
        Work w = {0, 0, 0, -1};                                  // blocks < 0: the end
        if (tile < z.tiles) w = decode(tile, z);
        int head_kv = w.head / z.group;
        const u32* bits =
            mask.bits + w.batch * mask.batch + w.head * mask.head + (BLOCKS ? w.row / mask.block_q : 0) * mask.row;
        const int a_block = BLOCKS ? mask.block_k / BLOCK_N : 1;
        int known = -1;                                          // the word of the mask that is in `word`
        u32 word = 0;
        // j, or the first block of keys before it that is computed
        auto shown = [&](int j) {
            while (BLOCKS && j >= 0) {
                int block = j / a_block;
                if (block / 32 != known) known = block / 32, word = bits[known];
                u32 rest = word << (31 - block % 32);            // bit 31: block
                if (rest >> 31) break;
                j = (rest ? block - __clz(rest) + 1 : block / 32 * 32) * a_block - 1;
            }
            return j;
        };
        auto load_k = [&](int j, int next) {
            barrier_wait(bars + EMPTY_K + 8 * k.stage, k.phase ^ 1);
            if (BLOCKS) asm volatile("st.shared.b32 [%0], %1;" ::"r"(bars + NEXT + 4 * k.stage), "r"(next) : "memory");
            barrier_expect(bars + FULL_K + 8 * k.stage, KV_BYTES);
            copy_tile(shared + OFFSET_K + k.stage * KV_BYTES, map_k, bars + FULL_K + 8 * k.stage, BLOCK_N, j * BLOCK_N,
                      head_kv, w.batch);
            k.advance();
        };
        int j = BLOCKS ? shown(w.blocks - 1) : w.blocks - 1, next = -1;
        if (BLOCKS && w.blocks > 0) w.blocks = j + 1;
        if (w.blocks > 0) next = shown(j - 1), load_k(j, next);
        barrier_wait(bars + EMPTY_Q + 8 * q.stage, q.phase ^ 1);
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(bars + WORK + 16 * q.stage), "r"(w.row),
                     "r"(w.head), "r"(w.batch), "r"(w.blocks)
                     : "memory");
        if (w.blocks < 0) { barrier_arrive(bars + FULL_Q + 8 * q.stage); return; }
        barrier_expect(bars + FULL_Q + 8 * q.stage, Q_BYTES);
        copy_tile(shared + q.stage * Q_BYTES, map_q, bars + FULL_Q + 8 * q.stage, BLOCK_M, w.row, w.head, w.batch);
        q.advance();
        int taken = atomicAdd(counter, 1);                       // one for each tile; its value is needed only below
        while (j >= 0) {
            int after = next < 0 ? -1 : shown(next - 1);
            if (next >= 0) load_k(next, after);
            barrier_wait(bars + EMPTY_V + 8 * v.stage, v.phase ^ 1);
            barrier_expect(bars + FULL_V + 8 * v.stage, KV_BYTES);
            copy_tile(shared + OFFSET_V + v.stage * KV_BYTES, map_v, bars + FULL_V + 8 * v.stage, BLOCK_N, j * BLOCK_N,
                      head_kv, w.batch);
            v.advance();
            j = next, next = after;
        }
        if (taken == z.tiles - 1) atomicExch(counter, 0);        // the last to be taken: ready for the next launch
        tile = gridDim.x + taken;
    }
}

DEVICE void consume(u32 shared, const Shape& z, float scale, u16* out, const Strides& stride, float* lse,
                    unsigned char* redo)
{
    u32 bars = shared + OFFSET_BARRIERS;
    int consumer = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1, lane = threadIdx.x % 32, lane4 = lane % 4;
    int my_row = consumer * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;        // and my_row + 8
    float scale_log2 = scale * 1.4426950408889634f;
    Ring<Q_STAGES> q;
    Ring<STAGES> k, v;
    float o[NO], top[2], sum[2], factor[2];
    u32 p[(1 + HIGH) * NP];
    // keys of the thread's rows; blocks j < unmasked need no mask
    int keys[2], unmasked;
    auto release = [&](u32 bar) { if (lane == 0) barrier_arrive(bar); };
    auto desc_q = [&]() { return descriptor(shared + q.stage * Q_BYTES + consumer * 64 * 128, 16); };
    auto desc_k = [&]() { return descriptor(shared + OFFSET_K + k.stage * KV_BYTES, 16); };
    auto desc_v = [&]() { return descriptor(shared + OFFSET_V + v.stage * KV_BYTES, BLOCK_N * 128); };
    // waits for the next tile: its rows are in shared memory
    auto fetch = [&]() {
        Work w = {};
        barrier_wait(bars + FULL_Q + 8 * q.stage, q.phase);
        if (lane == 0)                                                        // the lane that frees the slot
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(w.row), "=r"(w.head), "=r"(w.batch), "=r"(w.blocks)
                         : "r"(bars + WORK + 16 * q.stage)
                         : "memory");
        w.row = __shfl_sync(~0u, w.row, 0); w.head = __shfl_sync(~0u, w.head, 0);
        w.batch = __shfl_sync(~0u, w.batch, 0); w.blocks = __shfl_sync(~0u, w.blocks, 0);
        return w;
    };
    auto start = [&](const Work& w) {                                         // sets the running quantities of a tile
        int shift = z.n_k - z.n_q + 1, row = w.row + my_row;                  // a causal row sees row + shift keys
        keys[0] = keys[1] = z.n_k;
        unmasked = z.n_k / BLOCK_N;
        if (CAUSAL) {
            keys[0] = min(z.n_k, row + shift); keys[1] = min(z.n_k, row + 8 + shift);
            unmasked = max(0, min(z.n_k, w.row + consumer * 64 + shift)) / BLOCK_N;
        }
        top[0] = top[1] = -INFINITY_F; sum[0] = sum[1] = 0.f;
    };
    auto clear = [&]() {
#pragma unroll
        for (int i = 0; i < NO; i++) o[i] = 0.f;
    };
    auto mask = [&](float (&s)[NS], int j) {
        int base = j * BLOCK_N + 2 * lane4, limit[2] = {keys[0] - base, keys[1] - base};
        if (j >= unmasked) apply_mask(s, limit);
    };
    auto finish = [&](const Work& w) {
        int row = w.row + my_row;
        float inverse[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float total = quad_sum(sum[r]) * UNSHIFT;
            inverse[r] = total == 0.f ? 0.f : UNSHIFT / total;
            if (lane4 == 0 && row + 8 * r < z.n_q)
                lse[((long long)w.batch * z.heads + w.head) * z.n_q + row + 8 * r] =
                    total == 0.f ? -INFINITY_F : top[r] * scale + 0.6931471805599453f * __log2f(total);
        }
        u16* to[2];
#pragma unroll
        for (int r = 0; r < 2; r++)
            to[r] = row + 8 * r < z.n_q
                        ? out + w.batch * stride.batch + w.head * stride.head + (row + 8 * r) * stride.row
                        : nullptr;
        store_rows(to, o, inverse, z.d, lane4);
        if (CAUSAL) {
            float zero = 0.f;                                                 // 0 * x is 0, or NaN
#pragma unroll
            for (int i = 0; i < NO; i++) zero = fmaf(o[i], 0.f, zero);
            int first = w.row + consumer * 64;
            if (zero != 0.f && first < z.n_q)
                redo[((long long)w.batch * z.heads + w.head) * ((z.n_q + 63) / 64) + first / 64] = 1;
        }
    };
    // the block after j; the K tile of j is there
    auto next_block = [&](int j) {
        int next = j - 1;
        if (BLOCKS) {
            if (lane == 0)
                asm volatile("ld.shared.b32 %0, [%1];" : "=r"(next) : "r"(bars + NEXT + 4 * k.stage) : "memory");
            next = __shfl_sync(~0u, next, 0);
        }
        return next;
    };
    auto release_k = [&](int next) {
        release(bars + EMPTY_K + 8 * k.stage);
        if (next < 0) release(bars + EMPTY_Q + 8 * q.stage);
        k.advance();
    };
    auto release_v = [&]() { release(bars + EMPTY_V + 8 * v.stage); v.advance(); };
    // S = Q K^T of block j, O += P V of block j + 1, softmax of S
    auto step = [&](int j, auto masked) {
        float s[NS];
        barrier_wait(bars + FULL_K + 8 * k.stage, k.phase);
        const int next = next_block(j);
        if (PINGPONG) token_wait(consumer);
        wgmma_fence();
        product_qk(s, desc_q(), desc_k());
        barrier_wait(bars + FULL_V + 8 * v.stage, v.phase);
        wgmma_fence();
        product_pv(o, p, desc_v());
        if (PINGPONG) token_pass(consumer);
        wgmma_wait<1>();
        pin(s);
        release_k(next);
        if (masked.value) mask(s, j);
        bool moved = softmax<decltype(masked)::value>(s, top, sum, factor, scale_log2);
        wgmma_wait<0>();
        pin(o);
        release_v();
        round_p(p, s);
        if (moved) rescale(o, factor);
        return next;
    };
    if (PINGPONG && consumer == CONSUMERS - 1) token_pass(consumer);
    for (Work w = fetch(); w.blocks >= 0; w = fetch()) {
        start(w);
        clear();
        if (w.blocks > 0) {
            int j;
            {
                float s[NS];
                barrier_wait(bars + FULL_K + 8 * k.stage, k.phase);
                j = next_block(w.blocks - 1);
                wgmma_fence();
                product_qk(s, desc_q(), desc_k());
                wgmma_wait<0>();
                pin(s);
                release_k(j);
                mask(s, w.blocks - 1);
                softmax<true>(s, top, sum, factor, scale_log2);
                round_p(p, s);
            }
            while (CAUSAL && j >= unmasked) j = step(j, Yes());
            while (j >= 0) j = step(j, No());
            barrier_wait(bars + FULL_V + 8 * v.stage, v.phase);
            wgmma_fence();
            product_pv(o, p, desc_v());
            wgmma_wait<0>();
            pin(o);
            release_v();
        } else {
            release(bars + EMPTY_Q + 8 * q.stage);
        }
        q.advance();
        finish(w);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    attention_forward(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k,
                      const __grid_constant__ TensorMap map_v, u16* out, float* lse, int* counter, unsigned char* redo,
                      const Shape shape, const Strides stride, const BlockMask mask, float scale)
{
    extern __shared__ char memory[];
    u32 shared = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
    if (threadIdx.x == 0) {
        u32 bars = shared + OFFSET_BARRIERS;
        barriers_init(bars + FULL_Q, bars + EMPTY_Q, Q_STAGES, ARRIVALS);
        barriers_init(bars + FULL_K, bars + EMPTY_K, STAGES, ARRIVALS);
        barriers_init(bars + FULL_V, bars + EMPTY_V, STAGES, ARRIVALS);
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        if (threadIdx.x == 0) produce(&map_q, &map_k, &map_v, shared, shape, mask, counter);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        consume(shared, shape, scale, out, stride, lse, redo);
    }
}
