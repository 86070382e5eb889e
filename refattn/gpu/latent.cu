// Attention forward for NVIDIA Hopper (sm_90a) of wide heads, as latent attention has them: up to 576 columns of keys
// and 512 of values, many query heads on one key head. 16-bit inputs, float32 accumulation.
//
// Steps
//  1. A block owns 64 rows of one key head: `tile_heads` query heads of its group by 64 / tile_heads queries, heads
//     first, so that few queries of many heads fill a tile. It has one producer warpgroup and two consumers.
//  2. The producer (one thread) copies Q once, and tiles of BLOCK_N keys in turn into two slots, by the bulk tensor
//     copy engine (128-byte swizzle, boxes of 64 columns; what is past an array's end arrives as zeros). A slot has
//     three groups of boxes, each with a "full" and an "empty" mbarrier: KEYS, and the LEFT and RIGHT 256 columns of
//     values.
//     SHARED: values are the keys' first columns in memory. They are copied once, BLOCK_N is 64, and KEYS has only the
//     boxes from 512 columns on. Else a slot has both, and BLOCK_N is 32.
//  3. Consumer t % 2 computes S = Q K^T of tile t and its softmax (online, base 2; the maximum so far comes from the
//     other consumer), and hands P, the maximum and the factor of what was summed up before to the other one through
//     shared memory. Each consumer adds P V for its half of the columns of O, of its own tiles with P from registers.
//     So one consumer's softmax runs beside the other's products. Tiles go from the last keys to the first.
//  4. What a consumer reads last of a group it frees: the keys after S, its half of the values after P V.
//  5. Epilogue: the row sums of both consumers, sink, division, 16-byte stores, lse. SPLIT: where `splits` is above 1,
//     a block takes one of so many parts of its keys, and writes O, maximum and sum in float32; `merge` adds the parts
//     of a row up in their order.
//  6. REPAIR: a hidden key's p is 0, and 0 * NaN is NaN. Rows with an output that is not finite are marked in `redo`,
//     and `repair` computes them anew on the CUDA cores from lse, over the keys that they see.
//
// Macros: STEPS_K (of 16 columns of d_k), BF16, SHARED, RIGHT, LEFT 0 | 1 (the band has that edge), SINK, SOFTCAP,
// SPLIT 0 | 1, PRESCALE 1: needed where scale <= 0; BLOCK_N. d_k, d_v: multiples of 8 up to 576 and 512. The wgmma
// wrappers qk_first, qk_next (S (+)= Q K^T) and pv, pv_shared (O += P V, P from registers or shared memory) are
// generated text (latent.py) put in at the marker below.
//
// Launch: grid tiles of rows * key heads * batch * splits, block 384, dynamic shared memory latent.shared_bytes; merge:
// grid b * h * n_q, block 128; repair: any grid, block 256.

#include "hopper.cuh"

constexpr int NS = BLOCK_N / 2, NO = 128, NP = BLOCK_N / 4;        // registers of S, of half of O, of P a thread
constexpr int WIDTH_V = 512, HALF = WIDTH_V / 2, BOXES_HALF = HALF / 64, BOXES_VALUES = WIDTH_V / 64;
constexpr int BOXES_K = (STEPS_K + 3) / 4, BOXES_QUERY = 9;
constexpr u32 Q_BOX = 64 * 128, BOX = BLOCK_N * 128;               // bytes
constexpr int BOXES_KEYS = SHARED ? (BOXES_K > BOXES_VALUES ? BOXES_K - BOXES_VALUES : 0) : BOXES_K;
constexpr u32 SLOT = (BOXES_QUERY + (SHARED ? 0 : BOXES_VALUES)) * BOX, VALUES = SHARED ? 0 : BOXES_QUERY * BOX;
constexpr bool REPAIR = RIGHT || LEFT;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
enum Group { KEYS, LEFT_VALUES, RIGHT_VALUES, GROUPS };

// Shared memory, from a 1024-byte aligned base. P: 64 rows of 128 bytes.
constexpr u32 OFFSET_SLOTS = BOXES_QUERY * Q_BOX, OFFSET_P = OFFSET_SLOTS + 2 * SLOT, TOP = OFFSET_P + 64 * 128;
constexpr u32 FACTOR = TOP + 256, SUMS = FACTOR + 256, OFFSET_BARRIERS = SUMS + 512;
constexpr u32 FULL = 0, EMPTY = FULL + 8 * 2 * GROUPS, FULL_Q = EMPTY + 8 * 2 * GROUPS;

// (wgmma wrappers)

#include "softcap.cuh"

// group: query heads a key head; tile_heads: of a tile of 64 rows; tiles_heads, tiles_queries: tiles of a key head
struct Shape { int batch, heads_kv, group, n_q, n_k, d_k, d, tile_heads, tiles_heads, tiles_queries, splits; };
// a row at i sees keys i + corner - left .. i + corner + right, corner: 0 (top_left) or n_k - n_q
struct Options { const float* sink; float softcap; int top_left, left, right; };
// SPLIT: float32 (splits, b, h, n_q, 512), and of each row the maximum in powers of 2 and the sum
struct Parts { float* out; float2* stats; };
struct Band { int low, high; };
DEVICE Band band_of(const Shape& z, const Options& x) {       // no sum passes 2^31: lengths and limits are below 2^30
    const int corner = x.top_left ? 0 : z.n_k - z.n_q;
    return {LEFT ? max(corner - x.left, -z.n_q) : -z.n_q, RIGHT ? min(corner + x.right, z.n_k) : z.n_k};
}
// head: the first of the tile in its group; query: the first; blocks first .. end - 1 of keys, of part `split`
struct Work { int batch, head_kv, head, query, first, end, split; };
DEVICE Work work_of(const Shape& z, const Options& x) {
    Work w;
    u32 i = blockIdx.x;
    w.split = SPLIT ? i % z.splits : 0;
    if (SPLIT) i /= z.splits;
    w.head = i % z.tiles_heads * z.tile_heads, i /= z.tiles_heads;
    int m = i % z.tiles_queries;
    i /= z.tiles_queries;
    if (RIGHT) m = z.tiles_queries - 1 - m;                        // the longest first
    w.head_kv = i % z.heads_kv, w.batch = i / z.heads_kv;
    const int rows = 64 / z.tile_heads;
    w.query = m * rows;
    const Band band = band_of(z, x);
    const int keys = RIGHT ? min(z.n_k, min(w.query + rows, z.n_q) + band.high) : z.n_k;
    w.end = keys > 0 ? (keys + BLOCK_N - 1) / BLOCK_N : 0;
    w.first = LEFT ? min(max(0, w.query + band.low) / BLOCK_N, w.end) : 0;
    if (SPLIT) {
        const int count = w.end - w.first, from = w.first;
        w.first = from + (int)((long long)count * w.split / z.splits);
        w.end = from + (int)((long long)count * (w.split + 1) / z.splits);
    }
    return w;
}

// Boxes of 64 columns from column 64 * first on.
DEVICE void copy_boxes(u32 to, const TensorMap* map, u32 bar, int first, int count, int row, int head, int batch) {
#pragma unroll
    for (int i = 0; i < count; i++)
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
                     "%4, %5, %6}], [%2];" ::"r"(to + i * BOX),
                     "l"(map), "r"(bar), "r"(64 * (first + i)), "r"(row), "r"(head), "r"(batch)
                     : "memory");
}
DEVICE bool barrier_done(u32 bar, u32 parity) {
    u32 done;
    asm volatile("{.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    return done;
}
DEVICE void copy_queries(u32 to, const TensorMap* map, u32 bar, const Work& w) {
#pragma unroll
    for (int i = 0; i < BOXES_K; i++)
        asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
                     "%4, %5, %6, %7}], [%2];" ::"r"(to + i * Q_BOX),
                     "l"(map), "r"(bar), "r"(64 * i), "r"(w.head), "r"(w.query), "r"(w.head_kv), "r"(w.batch)
                     : "memory");
}
DEVICE void produce(const TensorMap* map_q, const TensorMap* map_k, const TensorMap* map_v, u32 shared, const Work& w) {
    const u32 bars = shared + OFFSET_BARRIERS;
    if (w.end <= w.first) return;
    barrier_expect(bars + FULL_Q, BOXES_K * Q_BOX);
    copy_queries(shared, map_q, bars + FULL_Q, w);
    for (int t = 0; t < w.end - w.first; t++) {
        const u32 slot = t & 1, other = ~t >> 1 & 1, to = shared + OFFSET_SLOTS + slot * SLOT;
        const int row = (w.end - 1 - t) * BLOCK_N;
        auto load = [&](int group, const TensorMap* map, u32 at, int first, int count) {
            const u32 full = bars + FULL + 8 * (GROUPS * slot + group);
            if (count == 0) return;
            barrier_wait(bars + EMPTY + 8 * (GROUPS * slot + group), other);
            barrier_expect(full, count * BOX);
            copy_boxes(at, map, full, first, count, row, w.head_kv, w.batch);
        };
        if (SHARED) load(KEYS, map_k, to + BOXES_VALUES * BOX, BOXES_VALUES, BOXES_KEYS);
        else load(KEYS, map_k, to, 0, BOXES_KEYS);
        load(LEFT_VALUES, SHARED ? map_k : map_v, to + VALUES, 0, BOXES_HALF);
        load(RIGHT_VALUES, SHARED ? map_k : map_v, to + VALUES + BOXES_HALF * BOX, BOXES_HALF, BOXES_HALF);
    }
}

// S = Q K^T; what has not arrived is waited for where it is needed. full: the slot's barriers
DEVICE void product_qk(float (&s)[NS], u64 q, u64 k, u32 full, u32 phase) {
    constexpr int TAIL = SHARED && STEPS_K > 32 ? STEPS_K - 32 : 0;   // steps of KEYS where it is not all
    if (BOXES_KEYS) barrier_wait(full + 8 * KEYS, phase);
#pragma unroll
    for (int n = 0; n < STEPS_K; n++) {
        const int i = n < TAIL ? 32 + n : n - TAIL;
        if (SHARED && i == 0) barrier_wait(full + 8 * LEFT_VALUES, phase);
        if (SHARED && i == 4 * BOXES_HALF) barrier_wait(full + 8 * RIGHT_VALUES, phase);
        if (n == 0 || (SHARED && i % (4 * BOXES_HALF) == 0)) wgmma_fence();
        const u64 dq = q + (((i / 4) * Q_BOX + (i % 4) * 32) >> 4), dk = k + (((i / 4) * BOX + (i % 4) * 32) >> 4);
        if (n == 0) qk_first(s, dq, dk);
        else qk_next(s, dq, dk);
    }
    wgmma_commit();
}
// keeps keys from low[row] to limit[row] - 1; registers of S as in sm90.cu
DEVICE void hide(float (&s)[NS], const int (&low)[2], const int (&limit)[2]) {
#pragma unroll
    for (int i = 0; i < NS; i++) {
        const int c = 8 * (i / 4) + i % 2, r = i / 2 % 2;
        if (c >= limit[r] || (LEFT && c < low[r])) s[i] = -INFINITY_F;
    }
}
DEVICE void store_float(u32 to, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory"); }
DEVICE float load_float(u32 from) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
    return x;
}
// Barrier 1 + c: P of consumer c is there.
DEVICE void hand_over(int consumer) { asm volatile("bar.arrive %0, 256;" ::"r"(consumer + 1) : "memory"); }
DEVICE void take_over(int consumer) { asm volatile("bar.sync %0, 256;" ::"r"(consumer + 1) : "memory"); }
DEVICE float sunk(float sink, float& most, float& total) {        // takes a sink in; returns what O is multiplied with
    const float old = most;
    sink *= LOG2E, most = fmaxf(old, sink);
    const float shrink = old == -INFINITY_F ? 1.f : exp2_fast(old - most);
    total = total * shrink + (sink == -INFINITY_F ? 0.f : exp2_fast(sink - most));
    return shrink;
}

DEVICE void consume(u32 shared, const Shape& z, const Work& w, float scale, u16* out, const Strides& stride, float* lse,
                    unsigned char* redo, const Parts& parts, const Options& x)
{
    const u32 bars = shared + OFFSET_BARRIERS;
    const int consumer = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1, lane = threadIdx.x % 32, lane4 = lane % 4,
              my_row = threadIdx.x / 32 % 4 * 16 + lane / 4;      // and my_row + 8
    const float unit = PRESCALE ? 1.f : SOFTCAP ? x.softcap : scale, scale_log2 = unit * LOG2E;   // as in sm90.cu
    const Band band = band_of(z, x);
    const int rows = 64 / z.tile_heads;
    const int unmasked = (RIGHT ? max(0, min(z.n_k, w.query + band.high + 1)) : z.n_k) / BLOCK_N,
              unmasked_from = LEFT ? (max(0, w.query + rows - 1 + band.low) + BLOCK_N - 1) / BLOCK_N : 0;
    int keys[2], lows[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int query = w.query + (my_row + 8 * r) / z.tile_heads;
        keys[r] = RIGHT ? min(z.n_k, query + band.high + 1) : z.n_k, lows[r] = LEFT ? query + band.low : 0;
    }
    float o[NO], top[2] = {-INFINITY_F, -INFINITY_F}, sum[2] = {}, factor[2];
#pragma unroll
    for (int i = 0; i < NO; i++) o[i] = 0.f;
    auto barrier = [&](u32 kind, int slot, int group) { return bars + kind + 8 * (GROUPS * slot + group); };
    auto release = [&](int slot, int group) { if (lane == 0) barrier_arrive(barrier(EMPTY, slot, group)); };
    const u64 desc_q = descriptor(shared, 16), desc_p = descriptor(shared + OFFSET_P, 16);
    const int mine = LEFT_VALUES + consumer;
    auto values = [&](int slot) {
        return descriptor(shared + OFFSET_SLOTS + slot * SLOT + VALUES + consumer * BOXES_HALF * BOX, BOX);
    };
    // the place of one of the thread's rows in an array of the block's rows
    auto of_row = [&](u32 array, int r) { return shared + array + 4 * (my_row + 8 * r); };
    auto own = [&](int t) {
        const int slot = t & 1, phase = t >> 1 & 1, j = w.end - 1 - t;
        float s[NS];
        // what was queued of tile t - 1 runs on if this tile's keys are there; else its values are freed first
        const u32 last = barrier(FULL, slot, SHARED ? RIGHT_VALUES : KEYS);
        const bool ready = __all_sync(~0u, barrier_done(last, phase));
        if (t > 0 && !ready) wgmma_wait<0>(), release(slot ^ 1, mine);
        product_qk(s, desc_q, descriptor(shared + OFFSET_SLOTS + slot * SLOT, 16), barrier(FULL, slot, 0), phase);
        if (t > 0 && ready) wgmma_wait<1>(), release(slot ^ 1, mine);
        wgmma_wait<0>();
        pin(s);
        pin(o);
        if (BOXES_KEYS) release(slot, KEYS);
        if (SOFTCAP) cap(s, scale / x.softcap);
        if (PRESCALE) {
#pragma unroll
            for (int i = 0; i < NS; i++) s[i] *= SOFTCAP ? x.softcap : scale;
        }
        bool moved;
        if (j >= unmasked || (LEFT && j < unmasked_from)) {
            const int base = j * BLOCK_N + 2 * lane4, low[2] = {lows[0] - base, lows[1] - base},
                      limit[2] = {keys[0] - base, keys[1] - base};
            hide(s, low, limit);
            moved = softmax<true>(s, top, sum, factor, scale_log2);
        } else {
            moved = softmax<false>(s, top, sum, factor, scale_log2);
        }
        u32 p[NP];
#pragma unroll
        for (int i = 0; i < NP; i++) {
            p[i] = pack(s[2 * i], s[2 * i + 1]);
            const int row = my_row + 8 * (i % 2);
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(
                             shared + OFFSET_P + row * 128 + ((i / 2 ^ (row & 7)) << 4) + 4 * lane4), "r"(p[i])
                         : "memory");
        }
        if (lane4 == 0) {
#pragma unroll
            for (int r = 0; r < 2; r++) store_float(of_row(TOP, r), top[r]), store_float(of_row(FACTOR, r), factor[r]);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        hand_over(consumer);
        if (moved) rescale(o, factor);
        barrier_wait(barrier(FULL, slot, mine), phase);
        wgmma_fence();
        const u64 v = values(slot);
#pragma unroll
        for (int i = 0; i < BLOCK_N / 16; i++)
            pv(o, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], v + ((i * 2048) >> 4));
        wgmma_commit();
    };
    auto others = [&](int t) {
        const int slot = t & 1, phase = t >> 1 & 1;
        wgmma_wait<0>();
        pin(o);
        if (t > 0) release(slot ^ 1, mine);
        take_over(slot);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            top[r] = load_float(of_row(TOP, r)), factor[r] = load_float(of_row(FACTOR, r));
            sum[r] *= factor[r];
        }
        if (__any_sync(~0u, factor[0] != 1.f || factor[1] != 1.f)) rescale(o, factor);
        barrier_wait(barrier(FULL, slot, mine), phase);
        wgmma_fence();
        const u64 v = values(slot);
#pragma unroll
        for (int i = 0; i < BLOCK_N / 16; i++) pv_shared(o, desc_p + ((i * 32) >> 4), v + ((i * 2048) >> 4));
        wgmma_commit();
    };
    const int tiles = w.end - w.first;
    if (tiles > 0) barrier_wait(bars + FULL_Q, 0);
    int t = 0;
    if (consumer == 1 && tiles > 0) others(t++);
#pragma unroll 1
    while (t < tiles) {
        own(t++);
        if (t < tiles) others(t++);
    }
    wgmma_wait<0>();
    pin(o);

    // both consumers have the rows' sums of their own tiles, relative to one maximum
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] = quad_sum(sum[r]);
        if (lane4 == 0) store_float(of_row(SUMS + 256 * consumer, r), sum[r]);
    }
    asm volatile("bar.sync 3, 256;" ::: "memory");
    float inverse[2];
    u16* to[2];
    const bool split = SPLIT && z.splits > 1;
    float zero[2] = {};                                           // 0 * x is 0, or NaN
    if (REPAIR) {
#pragma unroll
        for (int i = 0; i < NO; i++) zero[i / 2 % 2] = fmaf(o[i], 0.f, zero[i / 2 % 2]);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = my_row + 8 * r, head = w.head + row % z.tile_heads, query = w.query + row / z.tile_heads;
        const bool inside = head < z.group && query < z.n_q;
        const long long place =
            (((long long)w.batch * z.heads_kv + w.head_kv) * z.group + head) * z.n_q + query;   // in (b, h, n_q)
        float total = (load_float(of_row(SUMS, r)) + load_float(of_row(SUMS + 256, r))) * UNSHIFT,
              most = top[r] == -INFINITY_F ? -INFINITY_F : top[r] * scale_log2, by = UNSHIFT;
        if (split) {
            const long long at = place + (long long)w.split * z.batch * z.heads_kv * z.group * z.n_q;
            if (!inside) continue;
            if (lane4 == 0 && consumer == 0) parts.stats[at] = make_float2(most, total);
            float* dst = parts.out + at * WIDTH_V + HALF * consumer + 2 * lane4;
#pragma unroll
            for (int c = 0; c < NO / 4; c++)
                *(float2*)(dst + 8 * c) = make_float2(o[4 * c + 2 * r] * by, o[4 * c + 2 * r + 1] * by);
            continue;
        }
        if (SINK) by *= sunk(inside ? x.sink[w.head_kv * z.group + head] : 0.f, most, total);
        inverse[r] = total == 0.f ? 0.f : by / total;
        if (inside && lane4 == 0 && consumer == 0)
            lse[place] = total == 0.f ? -INFINITY_F : LN2 * (most + __log2f(total));
        if (REPAIR && inside && zero[r] != 0.f) redo[place] = 1;
        to[r] = inside ? out + w.batch * stride.batch + (long long)(w.head_kv * z.group + head) * stride.head
            + (long long)query * stride.row + HALF * consumer : nullptr;
    }
    if (!split) store_rows(to, o, inverse, z.d - HALF * consumer, lane4);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_latent(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k,
                     const __grid_constant__ TensorMap map_v, u16* out, float* lse, unsigned char* redo,
                     const Parts parts, const Shape shape, const Strides stride, const Options options, float scale)
{
    extern __shared__ char memory[];
    const u32 shared = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
    if (threadIdx.x == 0) {
        const u32 bars = shared + OFFSET_BARRIERS;
        barriers_init(bars + FULL, bars + EMPTY, 2 * GROUPS, 4);       // a consumer's warps free a group
        barrier_init(bars + FULL_Q, 1);
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    const Work w = work_of(shape, options);
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) produce(&map_q, &map_k, &map_v, shared, w);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume(shared, shape, w, scale, out, stride, lse, redo, parts, options);
    }
}

// ---- parts of keys -----------------------------------------------------------------------------------------------
// A block adds up the parts of a row, a thread four columns.
extern "C" __global__ void __launch_bounds__(128)
    merge(u16* out, float* lse, unsigned char* redo, const Parts parts, const Shape shape, const Strides stride,
          const Options options)
{
    const int heads = shape.heads_kv * shape.group, row = blockIdx.x, query = row % shape.n_q,
              head = row / shape.n_q % heads, batch = row / shape.n_q / heads, column = 4 * threadIdx.x;
    const long long rows = (long long)shape.batch * heads * shape.n_q;
    float most = -INFINITY_F, total = 0.f, o[4] = {};
    for (int i = 0; i < shape.splits; i++) most = fmaxf(most, parts.stats[i * rows + row].x);
    const float base = most == -INFINITY_F ? 0.f : most;
    for (int i = 0; i < shape.splits; i++) {
        const float2 x = parts.stats[i * rows + row];
        const float4 y = *(const float4*)(parts.out + (i * rows + row) * WIDTH_V + column);
        const float weight = exp2_fast(x.x - base);
        total = fmaf(weight, x.y, total);
        o[0] = fmaf(weight, y.x, o[0]), o[1] = fmaf(weight, y.y, o[1]), o[2] = fmaf(weight, y.z, o[2]),
            o[3] = fmaf(weight, y.w, o[3]);
    }
    float by = 1.f;
    if (SINK) by = sunk(options.sink[head], most, total);
    const float inverse = total == 0.f ? 0.f : by / total;
    if (threadIdx.x == 0) lse[row] = total == 0.f ? -INFINITY_F : LN2 * (most + __log2f(total));
    if (column >= shape.d) return;
    if (REPAIR && (o[0] + o[1] + o[2] + o[3]) * 0.f != 0.f) redo[row] = 1;
    *(uint2*)(out + batch * stride.batch + head * stride.head + query * stride.row + column) =
        make_uint2(pack(o[0] * inverse, o[1] * inverse), pack(o[2] * inverse, o[3] * inverse));
}

// ---- rows with a NaN behind their masks --------------------------------------------------------------------------
struct Inputs { const u16 *q, *k, *v; long long q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n; };
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int hop = 16; hop; hop /= 2) x += __shfl_xor_sync(~0u, x, hop);
    return x;
}
DEVICE void repair_row(long long row, const Inputs& from, u16* out, const float* lse, const Shape& z,
                       const Strides& stride, const Options& x, float scale)
{
    const int heads = z.heads_kv * z.group, query = row % z.n_q, head = row / z.n_q % heads,
              batch = row / z.n_q / heads, head_kv = head / z.group, lane = threadIdx.x % 32;
    const Band band = band_of(z, x);
    const int first = LEFT ? max(0, query + band.low) : 0, end = RIGHT ? min(z.n_k, query + band.high + 1) : z.n_k;
    const u16* q = from.q + batch * from.q_b + head * from.q_h + query * from.q_n;
    float o[WIDTH_V / 32] = {}, part[WIDTH_V / 32] = {};
    for (int key = first; key < end; key++) {
        const u16* k = from.k + batch * from.k_b + head_kv * from.k_h + key * from.k_n;
        const u16* v = from.v + batch * from.v_b + head_kv * from.v_h + key * from.v_n;
        float s = 0.f;
        for (int c = lane; c < z.d_k; c += 32) s = fmaf(lower_half(q[c]), lower_half(k[c]), s);
        s = warp_sum(s) * scale;
        if (SOFTCAP) s = x.softcap * tanhf(s / x.softcap);
        const float p = exp2f((s - lse[row]) * LOG2E);
        const bool last = key % BLOCK_N == BLOCK_N - 1 || key == end - 1;      // sums of tiles are added up
#pragma unroll
        for (int i = 0; i < WIDTH_V / 32; i++) {
            if (32 * i + lane < z.d) part[i] = fmaf(p, lower_half(v[32 * i + lane]), part[i]);
            if (last) o[i] += part[i], part[i] = 0.f;
        }
    }
    u16* to = out + batch * stride.batch + head * stride.head + query * stride.row;
#pragma unroll
    for (int i = 0; i < WIDTH_V / 32; i++)
        if (32 * i + lane < z.d) to[32 * i + lane] = (u16)pack(o[i], 0.f);
}
// A warp looks at the marks of 128 rows, and computes those that have one.
extern "C" __global__ void __launch_bounds__(256)
    repair(const Inputs inputs, u16* out, const float* lse, unsigned char* redo, const Shape shape,
           const Strides stride, const Options options, float scale)
{
    const long long rows = (long long)shape.batch * shape.heads_kv * shape.group * shape.n_q, words = (rows + 3) / 4;
    const int lane = threadIdx.x % 32;
    for (long long at = blockIdx.x * 8 + threadIdx.x / 32; 32 * at < words; at += gridDim.x * 8) {
        u32* mark = (u32*)redo + 32 * at + lane;
        const u32 marks = 32 * at + lane < words ? *mark : 0;
        if (!__any_sync(~0u, marks)) continue;
        if (marks) *mark = 0;
        for (int i = 0; i < 128; i++)
            if (__shfl_sync(~0u, marks, i / 4) >> i % 4 * 8 & 255)
                repair_row(128 * at + i, inputs, out, lse, shape, stride, options, scale);
    }
}
