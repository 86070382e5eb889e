// Attention forward for NVIDIA Hopper (sm_90a): out = softmax(scale Q K^T + ...) V and lse, 16-bit inputs, float32
// accumulation.
//
// Steps
//  1. A block has one producer warpgroup and CONSUMERS consumer warpgroups; each consumer owns 64 query rows.
//  2. The producer (one thread) takes tiles of BLOCK_M query rows from a queue, and copies Q, K and V tiles to shared
//     memory by the bulk tensor copy engine (128-byte swizzle, boxes of 64 columns; columns past d_k and d_v arrive
//     as zeros). K and V each have a ring of STAGES slots with a "full" and an "empty" mbarrier a slot.
//     Out-of-range rows arrive as zeros. PACKED: a tile's rows are of one sequence; what follows them is masked.
//     BLOCKS: it skips the key blocks that a block mask hides, and tells with each K tile which one comes next.
//  3. A consumer walks the key blocks from the last to the first that its rows see: those to be masked (tail, right
//     edge of the band) come first, those in the middle need no mask, the left edge comes last. In each step it issues
//     S' = Q K'^T for the next block, then O += P V for the current one, and computes the softmax of S' while O += P V
//     runs. P stays in registers: the accumulator layout of S is the A operand layout of P V.
//     SCALED: scores are scaled before the softmax: softcap, then bias, which is loaded while S' is computed. Where all
//     of a tile's scores count and are small, softcap is a polynomial that the exponent's multiplication takes in.
//  4. PINGPONG: named barriers pass a token from consumer to consumer, so that one issues its products while the
//     others are in their softmax.
//  5. Softmax is online, base 2: p = 2^(s * scale * log2 e - max * scale * log2 e + OFFSET); the row sum is reduced
//     over the four lanes of a row at the end only. Rows without keys give 0 and lse = -inf. OFFSET moves P in the
//     range of its type: up in float16, whose smallest numbers are not small; down in bfloat16, so that sums of its
//     largest values stay finite.
//  6. HIGH: P = hi + lo, two 16-bit parts, O += hi V + lo V: the rounding of P leaves the result.
//  7. Epilogue: sink, division by the row sum, transpose within each quad of lanes, 16-byte stores. OVERLAP: the
//     first product of the next tile of rows runs meanwhile, queued right behind the last one of this tile.
//  8. REPAIR: a hidden key's p is 0, and 0 * NaN is NaN. Tiles with an output that is not finite are marked in
//     `redo`, a byte for 64 rows of a sequence; simt.cu computes them anew.
//
// Macros: WIDTH_K, WIDTH_V (multiples of 32: d_k, d_v filled up), STEPS_K, STEPS_V (of 16 columns of d_k, d_v), BF16,
// RIGHT, LEFT 0 | 1 (the band has that edge), SINK, SOFTCAP, MASK (bits packed by pack.cu), PACKED 0 | 1, BIAS 0, 1 (in
// the inputs' type), 2 (float), PRESCALE 1: needed where scale <= 0; HIGH 0 | 1, CONSUMERS 2 | 3, BLOCK_N (multiple of
// 16; of 32 with MASK), STAGES (K, V), Q_STAGES, PINGPONG 0 | 1, BLOCKS 0 | 1 (of multiples of BLOCK_M rows and BLOCK_N
// keys), CONSUMER_REGISTERS and PRODUCER_REGISTERS (multiples of 8). d_k, d_v: multiples of 8. Rows of q, k, v, out
// 16-byte aligned, last axis contiguous. The wgmma wrappers qk_first, qk_next (S (+)= Q K^T, both from shared memory)
// and pv (O += P V, P from registers) are generated text (sm90.py) put in at the marker below, since their asm
// statements have one operand an accumulator register.
//
// Launch: grid any size from 1 to `tiles` (tiles: plain grid; number of multiprocessors: persistent), block
// BLOCK_THREADS, dynamic shared memory sm90.shared_bytes, `counter` one zeroed int (zero again at the end; not to be
// shared by concurrent launches).

#include "hopper.cuh"

constexpr int BLOCK_M = 64 * CONSUMERS;
constexpr int BLOCK_THREADS = 128 * (CONSUMERS + 1);
constexpr int NS = BLOCK_N / 2;                       // registers of S a thread
constexpr int NO = WIDTH_V / 2;                       // registers of O a thread
constexpr int NP = BLOCK_N / 4;                       // registers of P a thread
constexpr int BOXES_K = (WIDTH_K + 63) / 64, BOXES_V = (WIDTH_V + 63) / 64;
constexpr u32 Q_BYTES = BLOCK_M * BOXES_K * 128, K_BYTES = BLOCK_N * BOXES_K * 128, V_BYTES = BLOCK_N * BOXES_V * 128;
constexpr bool SCALED = SOFTCAP || BIAS || PRESCALE, REPAIR = RIGHT || LEFT || MASK || PACKED;
// The first product of the next tile of rows runs while this one goes out: with more to keep, registers do not last
// (bias), or it took longer.
constexpr bool OVERLAP = !BIAS && !LEFT && !PACKED && !HIGH;
// A consumer whose rows see nothing of a tile's first block leaves it out. Blocks as large as tiles are mostly seen
// (but with a mask, registers do not last without this).
constexpr bool SKIPS = RIGHT && !LEFT && !BLOCKS && (MASK || BLOCK_M != BLOCK_N);
constexpr int BIAS_WORDS = BIAS == 2 ? NS : BIAS ? NS / 2 : 1;   // registers of a tile's bias a thread
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr u32 ARRIVALS = 4 * CONSUMERS;               // one arrival a consumer warp frees a slot

// Shared memory, from a 1024-byte aligned base.
constexpr u32 OFFSET_K = Q_STAGES * Q_BYTES;
constexpr u32 OFFSET_V = OFFSET_K + STAGES * K_BYTES;
constexpr u32 OFFSET_BARRIERS = OFFSET_V + STAGES * V_BYTES;
constexpr u32 FULL_Q = 0, EMPTY_Q = FULL_Q + 8 * Q_STAGES, FULL_K = EMPTY_Q + 8 * Q_STAGES,
              EMPTY_K = FULL_K + 8 * STAGES, FULL_V = EMPTY_K + 8 * STAGES, EMPTY_V = FULL_V + 8 * STAGES,
              WORK = EMPTY_V + 8 * STAGES, NEXT = WORK + 32 * Q_STAGES;

DEVICE void token_wait(int consumer) { asm volatile("bar.sync %0, 256;" ::"r"(consumer + 1) : "memory"); }
DEVICE void token_pass(int consumer) {
    int next = consumer + 1 == CONSUMERS ? 0 : consumer + 1;
    asm volatile("bar.arrive %0, 256;" ::"r"(next + 1) : "memory");
}

// (wgmma wrappers)

DEVICE void product_qk(float (&s)[NS], u64 q, u64 k) {  // q, k: descriptors of the tiles
#pragma unroll
    for (int i = 0; i < STEPS_K; i++) {
        u64 dq = q + (((i / 4) * BLOCK_M * 128 + (i % 4) * 32) >> 4),
            dk = k + (((i / 4) * BLOCK_N * 128 + (i % 4) * 32) >> 4);
        if (i == 0) qk_first(s, dq, dk);
        else qk_next(s, dq, dk);
    }
    wgmma_commit();
}
// keep: 0 where O is set, not added to
DEVICE void product_pv(float (&o)[NO], const u32 (&p)[(1 + HIGH) * NP], u64 v, int keep) {
    float (&sums)[8 * STEPS_V] = reinterpret_cast<float (&)[8 * STEPS_V]>(o);     // columns past d_v stay 0
#pragma unroll
    for (int i = 0; i < BLOCK_N / 16; i++) {
        u64 dv = v + ((i * 2048) >> 4);
        pv(sums, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], dv, i == 0 ? keep : 1);
#if HIGH
        pv(sums, p[NP + 4 * i], p[NP + 4 * i + 1], p[NP + 4 * i + 2], p[NP + 4 * i + 3], dv, 1);
#endif
    }
    wgmma_commit();
}

// ---- softmax -----------------------------------------------------------------------------------------------------
// Register i of S holds row 8 * (i / 2 % 2) of the thread's two rows, column 8 * (i / 4) + i % 2 after the thread's
// first column.
// keeps columns before edge[row], or from it on where FROM
template <bool FROM> DEVICE void apply_mask(float (&s)[NS], const int (&edge)[2]) {
#pragma unroll
    for (int i = 0; i < NS; i++) {
        const int c = 8 * (i / 4) + i % 2, r = i / 2 % 2;
        if ((c < edge[r]) == FROM) s[i] = -INFINITY_F;
    }
}
#include "softcap.cuh"
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
// group: query heads a key head; head_group: see decode; d: of out
struct Shape { int batch, heads, group, n_q, n_k, d, head_group, tiles; };
// packed by pack.cu; strides in words
struct BlockMask { const u32* bits; long long batch, head, row; int block_q, block_k; };
// a row at i sees keys i + corner - left .. i + corner + right, corner: 0 (top_left) or n_k - n_q of its sequence
struct Options {
    const float* sink; const void* bias; const u32* mask; const int *cu_q, *cu_k;
    long long bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q;
    float softcap; int top_left, left, right, sequences;
};
// row: in its sequence, which begins at q_start and has n_q rows and n_k keys from k_start on; keys of blocks first ..
// blocks - 1; slot: of the sequence's first rows in `redo`, as simt.cu counts; band: first and last key that row 0 sees
struct Work { int row, head, batch, blocks, q_start, n_q, n_k, slot, k_start, first; };
struct Band { int low, high; };
DEVICE Band band_of(int n_q, int n_k, const Options& x) {       // no sum passes 2^31: lengths and limits are below 2^30
    const int corner = x.top_left ? 0 : n_k - n_q;
    return {LEFT ? max(corner - x.left, -n_q) : -n_q, RIGHT ? min(corner + x.right, n_k) : n_k};
}
// Tiles in the order of the queue: groups of head_group heads (whose K and V fit in the L2 cache together), inside a
// group the query blocks (the longest first when causal), innermost the heads.
DEVICE Work decode(int tile, const Shape& z, const Options& x) {
    int rows = PACKED ? z.n_q / BLOCK_M + x.sequences : (z.n_q + BLOCK_M - 1) / BLOCK_M,
        g = tile / (z.head_group * rows), rest = tile - g * z.head_group * rows;
    int first = g * z.head_group, width = min(z.head_group, z.batch * z.heads - first), m = rest / width,
        h = first + rest - m * width;
    if (RIGHT) m = rows - 1 - m;
    Work w = {0, 0, h / z.heads, 0, 0, z.n_q, z.n_k, 0, 0, 0};
    w.head = h - w.batch * z.heads;
    if (PACKED) {            // sequence t takes slots cu_q[t] / BLOCK_M + t and on: always enough of them
        int t = 0, high = x.sequences;
        while (high - t > 1) {
            const int middle = (t + high) / 2;
            if (x.cu_q[middle] / BLOCK_M + middle <= m) t = middle;
            else high = middle;
        }
        auto offset = [](int i, int n) { return min(max(i, 0), n); };        // wrong offsets stay inside the arrays
        w.q_start = offset(x.cu_q[t], z.n_q), w.n_q = max(0, offset(x.cu_q[t + 1], z.n_q) - w.q_start);
        w.k_start = offset(x.cu_k[t], z.n_k), w.n_k = max(0, offset(x.cu_k[t + 1], z.n_k) - w.k_start);
        w.slot = w.q_start / 64 + t, m -= w.q_start / BLOCK_M + t;
    }
    w.row = m * BLOCK_M;
    const Band band = band_of(w.n_q, w.n_k, x);
    const int keys = RIGHT ? min(w.n_k, min(w.row + BLOCK_M, w.n_q) + band.high) : w.n_k;
    w.blocks = keys > 0 ? (keys + BLOCK_N - 1) / BLOCK_N : 0;
    if (LEFT) w.first = max(0, w.row + band.low) / BLOCK_N, w.blocks = w.first < w.blocks ? w.blocks : 0;
    return w;
}
DEVICE void produce(const TensorMap* map_q, const TensorMap* map_k, const TensorMap* map_v, u32 shared, const Shape& z,
                    const BlockMask& mask, const Options& x, int* counter)
{
    u32 bars = shared + OFFSET_BARRIERS;
    Ring<Q_STAGES> q;
    Ring<STAGES> k, v;
    auto after = [&](int taken) {
        if (taken == z.tiles - 1) atomicExch(counter, 0);        // the last to be taken: ready for the next launch
        return (int)gridDim.x + taken;
    };
    for (int tile = blockIdx.x;;) {
        Work w = {0, 0, 0, -1};                                  // blocks < 0: the end
        if (tile < z.tiles) w = decode(tile, z, x);
        if (PACKED && w.blocks >= 0 && (w.row < 0 || w.row >= w.n_q)) {  // no rows
            tile = after(atomicAdd(counter, 1));
            continue;
        }
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
            return LEFT && j < w.first ? -1 : j;
        };
        auto load_k = [&](int j, int next) {
            barrier_wait(bars + EMPTY_K + 8 * k.stage, k.phase ^ 1);
            if (BLOCKS) asm volatile("st.shared.b32 [%0], %1;" ::"r"(bars + NEXT + 4 * k.stage), "r"(next) : "memory");
            barrier_expect(bars + FULL_K + 8 * k.stage, K_BYTES);
            copy_tile<BOXES_K>(shared + OFFSET_K + k.stage * K_BYTES, map_k, bars + FULL_K + 8 * k.stage, BLOCK_N,
                               w.k_start + j * BLOCK_N, head_kv, w.batch);
            k.advance();
        };
        int j = BLOCKS ? shown(w.blocks - 1) : w.blocks - 1, next = -1;
        if (BLOCKS && w.blocks > 0) w.blocks = j + 1;
        if (w.blocks > 0) next = shown(j - 1), load_k(j, next);
        barrier_wait(bars + EMPTY_Q + 8 * q.stage, q.phase ^ 1);
        store_four(bars + WORK + 32 * q.stage, w.row, w.head, w.batch, w.blocks);
        if (PACKED) store_four(bars + WORK + 32 * q.stage + 16, w.q_start, w.n_q, w.n_k, w.slot);
        if (w.blocks < 0) { barrier_arrive(bars + FULL_Q + 8 * q.stage); return; }
        barrier_expect(bars + FULL_Q + 8 * q.stage, Q_BYTES);
        copy_tile<BOXES_K>(shared + q.stage * Q_BYTES, map_q, bars + FULL_Q + 8 * q.stage, BLOCK_M, w.q_start + w.row,
                           w.head, w.batch);
        q.advance();
        const int taken = atomicAdd(counter, 1);                 // one for each tile; its value is needed only below
        while (j >= 0) {
            const int later = next < 0 ? -1 : shown(next - 1);
            if (next >= 0) load_k(next, later);
            barrier_wait(bars + EMPTY_V + 8 * v.stage, v.phase ^ 1);
            barrier_expect(bars + FULL_V + 8 * v.stage, V_BYTES);
            copy_tile<BOXES_V>(shared + OFFSET_V + v.stage * V_BYTES, map_v, bars + FULL_V + 8 * v.stage, BLOCK_N,
                               w.k_start + j * BLOCK_N, head_kv, w.batch);
            v.advance();
            j = next, next = later;
        }
        tile = after(taken);
    }
}

// The bias of a tile: of the thread's two rows, at the places of its scores.
struct Bias { const u16* rows[2]; long long along; };            // rows: 4-byte elements where BIAS is 2
DEVICE void load_bias(u32 (&to)[BIAS_WORDS], const Bias& x, int key, int n_k) {
    const bool whole = x.along == 1 && key - key % BLOCK_N + BLOCK_N <= n_k
        && ((u64)x.rows[0] | (u64)x.rows[1]) % 4 == 0;
#pragma unroll
    for (int i = 0; i < NS; i += 2) {
        const int at = key + 8 * (i / 4), next = min(at + 1, n_k - 1);
        const u16* row = x.rows[i / 2 % 2];
        if (BIAS == 2) {
            const u32* from = (const u32*)row;
            to[BIAS == 2 ? i : 0] = from[min(at, n_k - 1) * x.along], to[BIAS == 2 ? i + 1 : 0] = from[next * x.along];
        } else if (whole) {
            to[i / 2] = *(const u32*)(row + at);
        } else {
            to[i / 2] = row[min(at, n_k - 1) * x.along] | (u32)row[next * x.along] << 16;
        }
    }
}

DEVICE void consume(u32 shared, const Shape& z, float scale, u16* out, const Strides& stride, float* lse,
                    unsigned char* redo, const Options& x)
{
    u32 bars = shared + OFFSET_BARRIERS;
    int consumer = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1, lane = threadIdx.x % 32, lane4 = lane % 4;
    int my_row = consumer * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;        // and my_row + 8
    // what a score in the registers is multiplied with: 1 once it is a logit, softcap where only the tanh is there
    const float unit = BIAS || PRESCALE ? 1.f : SOFTCAP ? x.softcap : scale, scale_log2 = unit * LOG2E;
    Ring<Q_STAGES> q;
    Ring<STAGES> k, v;
    float o[NO], top[2], sum[2], factor[2];
    u32 p[(1 + HIGH) * NP];
    int keep = 1;                                                             // 0: O is of the tile before
    // the thread's rows see keys lows[r] .. keys[r] - 1; blocks unmasked_from <= j < unmasked need no mask
    int keys[2], lows[2], unmasked, unmasked_from, first_block;
    bool skipped = false;                                                     // the tile's first block is left out
    const u32* bits[2];
    Bias bias;
    auto release = [&](u32 bar) { if (lane == 0) barrier_arrive(bar); };
    auto desc_q = [&]() { return descriptor(shared + q.stage * Q_BYTES + consumer * 64 * 128, 16); };
    auto desc_k = [&]() { return descriptor(shared + OFFSET_K + k.stage * K_BYTES, 16); };
    auto desc_v = [&]() { return descriptor(shared + OFFSET_V + v.stage * V_BYTES, BLOCK_N * 128); };
    // waits for the next tile: its rows are in shared memory
    auto fetch = [&]() {
        Work w = {0, 0, 0, 0, 0, z.n_q, z.n_k};
        barrier_wait(bars + FULL_Q + 8 * q.stage, q.phase);
        if (lane == 0) {                                                      // the lane that frees the slot
            const uint4 y = load_four(bars + WORK + 32 * q.stage);
            w.row = y.x, w.head = y.y, w.batch = y.z, w.blocks = y.w;
            if (PACKED) {
                const uint4 more = load_four(bars + WORK + 32 * q.stage + 16);
                w.q_start = more.x, w.n_q = more.y, w.n_k = more.z, w.slot = more.w;
            }
        }
        w.row = __shfl_sync(~0u, w.row, 0); w.head = __shfl_sync(~0u, w.head, 0);
        w.batch = __shfl_sync(~0u, w.batch, 0); w.blocks = __shfl_sync(~0u, w.blocks, 0);
        if (PACKED) {
            w.q_start = __shfl_sync(~0u, w.q_start, 0);
            w.n_q = __shfl_sync(~0u, w.n_q, 0), w.n_k = __shfl_sync(~0u, w.n_k, 0);
            w.slot = __shfl_sync(~0u, w.slot, 0);
        }
        return w;
    };
    auto start = [&](const Work& w) {                                         // sets the running quantities of a tile
        const Band band = band_of(w.n_q, w.n_k, x);
        const int top_row = w.row + consumer * 64;
        unmasked = (RIGHT ? max(0, min(w.n_k, top_row + band.high + 1)) : w.n_k) / BLOCK_N;
        unmasked_from = LEFT ? (max(0, top_row + 63 + band.low) + BLOCK_N - 1) / BLOCK_N : 0;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = w.row + my_row + 8 * r, inside = min(row, w.n_q - 1);
            keys[r] = RIGHT ? min(w.n_k, row + band.high + 1) : w.n_k;
            lows[r] = LEFT ? row + band.low : 0;
            if (MASK) bits[r] = x.mask + w.batch * x.mask_b + w.head * x.mask_h + inside * x.mask_q;
            if (BIAS)
                bias.rows[r] = (const u16*)x.bias + (w.batch * x.bias_b + w.head * x.bias_h + inside * x.bias_q) * BIAS;
            top[r] = -INFINITY_F, sum[r] = 0.f;
        }
        bias.along = x.bias_k;
    };
    auto clear = [&]() {
#pragma unroll
        for (int i = 0; i < NO; i++) o[i] = 0.f;
    };
    auto mask = [&](float (&s)[NS], int j) {
        const int base = j * BLOCK_N + 2 * lane4, limit[2] = {keys[0] - base, keys[1] - base},
                  low[2] = {lows[0] - base, lows[1] - base};
        if (j >= unmasked) apply_mask<false>(s, limit);
        if (LEFT && j < unmasked_from) apply_mask<true>(s, low);
        if (MASK) {
#pragma unroll
            for (int i = 0; i < NS; i += 16)                                  // 32 keys
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int word = (j * BLOCK_N + 2 * i) / 32;
                    const u32 seen = 32 * word < z.n_k ? bits[r][word] >> 2 * lane4 : 0;
#pragma unroll
                    for (int e = 0; e < 8; e++)
                        if (!(seen >> (8 * (e / 2) + e % 2) & 1)) s[i + 4 * (e / 2) + 2 * r + e % 2] = -INFINITY_F;
                }
        }
    };
    // scores to logits, or to their tanh alone
    auto finish_scores = [&](float (&s)[NS], const u32 (&given)[BIAS_WORDS]) {
        if (SOFTCAP) cap(s, scale / x.softcap);
        if (BIAS || PRESCALE) {
            const float by = SOFTCAP ? x.softcap : scale;
#pragma unroll
            for (int i = 0; i < NS; i++) {
                const float plus = BIAS == 2 ? __uint_as_float(given[BIAS == 2 ? i : 0]) : BIAS == 0 ? 0.f
                    : i % 2 ? upper_half(given[BIAS == 1 ? i / 2 : 0]) : lower_half(given[BIAS == 1 ? i / 2 : 0]);
                s[i] = fmaf(s[i], by, plus);
            }
        }
    };
    auto finish = [&](const Work& w, const float (&o)[NO], const float (&top)[2], const float (&sum)[2]) {
        const int row = w.row + my_row;
        float inverse[2];
        u16* to[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float total = quad_sum(sum[r]) * UNSHIFT, most = top[r] * scale_log2, factor = UNSHIFT;
            if (SINK) {
                const float sink = x.sink[w.head] * LOG2E, old = top[r] == -INFINITY_F ? -INFINITY_F : most;
                most = fmaxf(old, sink);
                const float shrink = old == -INFINITY_F ? 1.f : exp2_fast(old - most);
                total = total * shrink + (sink == -INFINITY_F ? 0.f : exp2_fast(sink - most)), factor *= shrink;
            }
            inverse[r] = total == 0.f ? 0.f : factor / total;
            const bool inside = row + 8 * r < w.n_q;
            if (lane4 == 0 && inside)
                lse[((long long)w.batch * z.heads + w.head) * z.n_q + w.q_start + row + 8 * r] =
                    total == 0.f ? -INFINITY_F : LN2 * (most + __log2f(total));
            to[r] = inside ? out + w.batch * stride.batch + w.head * stride.head
                + (long long)(w.q_start + row + 8 * r) * stride.row : nullptr;
        }
        store_rows(to, o, inverse, z.d, lane4);
        if (REPAIR) {
            float zero = 0.f;                                                 // 0 * x is 0, or NaN
#pragma unroll
            for (int i = 0; i < NO; i++) zero = fmaf(o[i], 0.f, zero);
            const int first = w.row + consumer * 64;
            if (zero != 0.f && first < w.n_q) {
                const int slots = (z.n_q + 63) / 64 + x.sequences;
                redo[((long long)w.batch * z.heads + w.head) * slots + w.slot + first / 64] = 1;
            }
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
        return LEFT && next < first_block ? -1 : next;
    };
    auto release_k = [&](int next) {
        release(bars + EMPTY_K + 8 * k.stage);
        if (next < 0) release(bars + EMPTY_Q + 8 * q.stage);
        k.advance();
    };
    auto release_v = [&]() { release(bars + EMPTY_V + 8 * v.stage); v.advance(); };
    // A block that is left out: its K, the consumer's turn, its V, as others count on them.
    auto skip_k = [&]() {
        barrier_wait(bars + FULL_K + 8 * k.stage, k.phase);
        release(bars + EMPTY_K + 8 * k.stage);
        k.advance();
    };
    auto skip_turn = [&]() { if (PINGPONG) token_wait(consumer), token_pass(consumer); };
    auto skip_v = [&]() { barrier_wait(bars + FULL_V + 8 * v.stage, v.phase), release_v(); };
    // S = Q K^T of block j, O += P V of block j + 1, softmax of S
    auto step = [&](int j, auto masked) {
        float s[NS];
        barrier_wait(bars + FULL_K + 8 * k.stage, k.phase);
        const int next = next_block(j);
        u32 given[BIAS_WORDS];
        if (BIAS) load_bias(given, bias, j * BLOCK_N + 2 * lane4, z.n_k);
        if (PINGPONG) token_wait(consumer);
        wgmma_fence();
        product_qk(s, desc_q(), desc_k());
        barrier_wait(bars + FULL_V + 8 * v.stage, v.phase);
        wgmma_fence();
        product_pv(o, p, desc_v(), OVERLAP ? keep : 1), keep = 1;
        if (PINGPONG) token_pass(consumer);
        wgmma_wait<1>();
        pin(s);
        release_k(next);
        bool moved;
        if (SOFTCAP && !BIAS && !PRESCALE && !masked.value) {
            moved = capped_softmax(s, top, sum, factor, scale / x.softcap, scale_log2);
        } else {
            if (SCALED) finish_scores(s, given);
            if (masked.value) mask(s, j);
            moved = softmax<decltype(masked)::value>(s, top, sum, factor, scale_log2);
        }
        wgmma_wait<0>();
        pin(o);
        release_v();
        round_p(p, s);
        if (moved) rescale(o, factor);
        return next;
    };
    if (PINGPONG && consumer == CONSUMERS - 1) token_pass(consumer);
    // the next tile that sees keys; those before it get zeros
    auto next_tile = [&]() {
        Work w = fetch();
        for (; w.blocks == 0; w = fetch()) {
            const float none[NO] = {}, no_top[2] = {-INFINITY_F, -INFINITY_F}, no_sum[2] = {};
            release(bars + EMPTY_Q + 8 * q.stage);
            q.advance();
            finish(w, none, no_top, no_sum);
        }
        return w;
    };
    // queues S = Q K^T of the tile's first block; returns the next one
    auto begin = [&](const Work& w, float (&s)[NS], u32 (&given)[BIAS_WORDS]) {
        if (!OVERLAP) start(w);
        int j = w.blocks - 1;
        if (SKIPS) {
            const int top_row = w.row + consumer * 64, last = min(top_row + 63, w.n_q - 1);
            skipped = j > 0 && (top_row >= w.n_q || last + band_of(w.n_q, w.n_k, x).high < j * BLOCK_N);
            if (skipped) skip_k(), j--;
        }
        if (BIAS) load_bias(given, bias, j * BLOCK_N + 2 * lane4, z.n_k);
        first_block = LEFT ? max(0, w.row + band_of(w.n_q, w.n_k, x).low) / BLOCK_N : 0;
        barrier_wait(bars + FULL_K + 8 * k.stage, k.phase);
        const int next = next_block(j);
        wgmma_fence();
        product_qk(s, desc_q(), desc_k());
        return next;
    };
    // the softmax of that block
    auto begun = [&](const Work& w, float (&s)[NS], const u32 (&given)[BIAS_WORDS], int next) {
        if (OVERLAP) start(w), keep = 0;
        wgmma_wait<0>();
        pin(s);
        release_k(next);
        if (SCALED) finish_scores(s, given);
        mask(s, w.blocks - 1 - skipped);
        if (SKIPS && skipped) skip_turn();
        softmax<true>(s, top, sum, factor, scale_log2);
        round_p(p, s);
        if (SKIPS && skipped) skip_v();
    };
    auto end = [&](const Work& w, auto queued) {                              // products queued after the last one
        wgmma_wait<decltype(queued)::value>();
        pin(o);
        release_v();
        finish(w, o, top, sum);
    };
    auto walk = [&](int j) {                                                  // up to the last product, which is queued
        while ((MASK && j >= 0) || (RIGHT && j >= unmasked && j >= 0)) j = step(j, Yes());
        while (j >= unmasked_from) j = step(j, No());
        while (LEFT && j >= 0) j = step(j, Yes());
        barrier_wait(bars + FULL_V + 8 * v.stage, v.phase);
        wgmma_fence();
        product_pv(o, p, desc_v(), OVERLAP ? keep : 1);
        q.advance();
    };
    u32 given[BIAS_WORDS];
    Work w = next_tile();
    if (!OVERLAP) {
        for (; w.blocks > 0; w = next_tile()) {
            float s[NS];
            clear();
            const int j = begin(w, s, given);
            begun(w, s, given, j);
            walk(j);
            end(w, Number<0>());
        }
        return;
    }
    clear();
    int j = 0;
    if (w.blocks > 0) {
        float s[NS];
        j = begin(w, s, given);
        begun(w, s, given, j);
    }
    while (w.blocks > 0) {
        walk(j);
        // the last product runs while the next tile's first one is queued, and that one while this tile goes out
        const Work done = w;
        w = next_tile();
        if (w.blocks > 0) {
            float s[NS];
            j = begin(w, s, given);
            end(done, Number<1>());
            begun(w, s, given, j);
        } else {
            end(done, Number<0>());
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    attention_forward(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k,
                      const __grid_constant__ TensorMap map_v, u16* out, float* lse, int* counter, unsigned char* redo,
                      const Shape shape, const Strides stride, const BlockMask mask, const Options options, float scale)
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
        if (threadIdx.x == 0) produce(&map_q, &map_k, &map_v, shared, shape, mask, options, counter);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        consume(shared, shape, scale, out, stride, lse, redo, options);
    }
}
