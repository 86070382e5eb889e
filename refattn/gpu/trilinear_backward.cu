// Gradients of trilinear (2-simplicial) attention for NVIDIA Hopper (sm_90a), bfloat16, without atomics: the same
// bits each time.
//
// s_xyz = scale * sum_l X_xl Y_yl z_l and dP_xyz = sum_l X'_xl Y'_yl z'_l do not change when query, k1 and k2 (dO, v1
// and v2) trade places. So one kernel gives the gradient of whatever X is, with rows of Y in tiles and rows of z one
// by one: QUERY 1: X = query, X' = dO; Y, Y' = k2, v2 (or k1, v1); z, z' = the others. dX = scale * sum_yz dS (Y *
// z). QUERY 0: X = k2, X' = v2 (or k1, v1); Y = query, Y' = dO; z, z' = the others. Also dX' = sum_yz P (Y' * z'). P
// = exp(s - lse), dS = P (dP - delta), delta = sum_l dO_l O_l (trilinear_delta). lse and delta stay float32.
//
// Steps
//  1. A block has 64 rows of X. Two warpgroups build (threads 0 to 255), two consume.
//  2. The builders hold a tile of 64 rows of Y and Y' in registers (KEEP; else each thread its part in shared
//     memory), and write Y * z and Y' * z', rounded to bfloat16, to slots in shared memory, for one z after another:
//     even ones for consumer 0, odd ones for consumer 1. Two slots a consumer.
//  3. A consumer computes S = X (Y z)^T, P, dP = X' (Y' z')^T and dS = P (dP - delta), P rounded to bfloat16; dX' +=
//     P (Y' z') and dX += dS (Y z). Meanwhile the other consumer has the tensor cores.
//  4. At the end, consumer 1 gives its sums to consumer 0, which stores both.
// Rows of queries are (place, head) as in trilinear.cu. A row of X sees an interval of a tile's columns; only there
// it is not masked.
//
// Macros: HEAD_DIM 64 | 128, QUERY 0 | 1, KEEP 0 | 1, BF16 1, CONSUMER_REGISTERS, BUILDER_REGISTERS. Rows 16-byte
// aligned, last axis contiguous. The wgmma wrappers qk_first, qk_next (both from shared memory) and pv_next are
// generated text (sm90.py), put in at the marker.
//
// Launch: a block a tile of X, 512 threads, dynamic shared memory trilinear.shared_bytes_backward.

#include "hopper.cuh"
#include "trilinear.cuh"

constexpr int NS = 32, NO = HEAD_DIM / 2, CHUNKS = HEAD_DIM / 8, PASSES = CHUNKS / 4, PASS_ROWS = 256 / CHUNKS;
constexpr u32 TILE_BYTES = 64 * HEAD_DIM * 2, SLOT_BYTES = 2 * TILE_BYTES;
// Shared memory, from a 1024-byte aligned base: X, X', the slots (of consumer, stage), lse and delta of the slots,
// barriers.
constexpr u32 OFFSET_SLOTS = 2 * TILE_BYTES, OFFSET_ROWS = OFFSET_SLOTS + 4 * SLOT_BYTES,
              OFFSET_BARRIERS = OFFSET_ROWS + 4 * 512, OFFSET_KEPT = OFFSET_BARRIERS + 64;

struct Tensor { u16* data; long long batch, head, row; };
struct Work { int head_kv, batch, place, head, tiles; };  // place: first query or key of X; tiles: of Y

// Queries that may see one of the keys from k on.
DEVICE int first_query(const Shape& z, int k) { return z.causal ? max(k - z.tiled.shift, 0) : 0; }
DEVICE int last_query(const Shape& z, int k)
{ return z.causal ? min(z.n_q - 1, k - z.tiled.shift + z.tiled.window - 1) : z.n_q - 1; }
DEVICE Work decode(const Shape& z) {
    Work w;
    int rest = blockIdx.x;
    if (QUERY) { w.head = (rest % head_tiles(z)) << z.row_heads_log2; rest /= head_tiles(z); } else w.head = 0;
    w.head_kv = rest % z.heads_kv; rest /= z.heads_kv;
    w.batch = rest % z.batch; rest /= z.batch;
    if (QUERY) {
        w.place = rest * places(z);
        int last = min(w.place + places(z), z.n_q) - 1;
        w.tiles = (max(end_seen(z, z.tiled, last) - first_seen(z, z.tiled, w.place), 0) + 63) / 64;
    } else {
        w.place = rest * 64;
        int first = first_query(z, w.place), last = last_query(z, min(w.place + 63, z.tiled.n - 1));
        w.tiles = last < first ? 0 : (last - first + places(z)) / places(z) * head_tiles(z);
    }
    return w;
}
// A tile of Y: its first query or key, its first head, and the z that any of its rows (or of X's) sees.
struct Tile { int place, head, first, end; };
DEVICE Tile tile_of(const Shape& z, const Work& w, int t) {
    Tile y;
    if (QUERY) { y.place = first_seen(z, z.tiled, w.place) + 64 * t; y.head = 0;
    } else {
        y.place = first_query(z, w.place) + t / head_tiles(z) * places(z);
        y.head = t % head_tiles(z) << z.row_heads_log2;
    }
    int from = QUERY ? w.place : y.place, last = min(from + places(z), z.n_q) - 1;
    y.first = first_seen(z, z.single, from); y.end = max(end_seen(z, z.single, last), y.first);
    return y;
}
// Row r of a tile of queries or of keys, or null.
DEVICE u16* row_of(const Tensor& x, const Shape& z, const Work& w, int place, int head, int r, bool queries) {
    if (!queries)
        return place + r < z.tiled.n ? x.data + w.batch * x.batch + w.head_kv * x.head + (place + r) * x.row : nullptr;
    int i = place + place_in(z, r), h = w.head_kv * z.group + head + head_in(z, r);
    return i < z.n_q ? x.data + w.batch * x.batch + h * x.head + i * x.row : nullptr;
}
// Index of row r of a tile of queries in (batch, heads, n_q) arrays; -1 past the end.
DEVICE long long index_of(const Shape& z, const Work& w, int place, int head, int r) {
    int i = place + place_in(z, r), h = w.head_kv * z.group + head + head_in(z, r);
    return i < z.n_q ? ((long long)w.batch * z.heads_kv * z.group + h) * z.n_q + i : -1;
}
DEVICE uint4 piece(const u16* row, int chunk, int d)
{ return row && 8 * chunk < d ? *(const uint4*)(row + 8 * chunk) : make_uint4(0, 0, 0, 0); }
DEVICE u32 place_of(int row, int chunk) { return chunk / 8 * 8192 + row * 128 + ((chunk % 8 ^ row % 8) << 4); }
DEVICE void store_shared(u32 a, uint4 x)
{
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
DEVICE uint4 load_shared4(u32 a) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(a)
                 : "memory");
    return x;
}
DEVICE float2 load_pair(u32 a)
{
    float2 x;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(a) : "memory");
    return x;
}
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE uint4 product(uint4 x, uint4 y)
{ return make_uint4(product(x.x, y.x), product(x.y, y.y), product(x.z, y.z), product(x.w, y.w)); }

// (wgmma wrappers)

DEVICE void build(u32 shared, const Shape& z, const Work& w, const Tensor& y, const Tensor& y2, const Tensor& single,
                  const Tensor& single2, const float* lse, const float* delta)
{
    const int chunk = threadIdx.x % CHUNKS, row = threadIdx.x / CHUNKS;
    const u16* from = single.data + w.batch * single.batch + w.head_kv * single.head;
    const u16* from2 = single2.data + w.batch * single2.batch + w.head_kv * single2.head;
    const u32 mine = shared + OFFSET_KEPT + 16 * threadIdx.x;      // the thread's own
    u32 built[2] = {0, 0};
    for (int t = 0; t < w.tiles; t++) {
        const Tile tile = tile_of(z, w, t);
        [[maybe_unused]] uint4 a[2 * PASSES];
#pragma unroll
        for (int i = 0; i < 2 * PASSES; i++) {
            uint4 x =
                piece(row_of(i < PASSES ? y : y2, z, w, tile.place, tile.head, row + i % PASSES * PASS_ROWS, !QUERY),
                      chunk, z.d);
            if (KEEP) a[i] = x;
            else store_shared(mine + 4096 * i, x);
        }
        auto kept = [&](int i) { return KEEP ? a[i] : load_shared4(mine + 4096 * i); };
        float row_lse = 0.f, row_delta = 0.f;
        if (!QUERY && threadIdx.x < 64) {
            long long at = index_of(z, w, tile.place, tile.head, threadIdx.x);
            if (at >= 0) { row_lse = lse[at] * LOG2E; row_delta = delta[at]; }
        }
#pragma unroll 1
        for (int j = tile.first; j < tile.end; j++) {
            const int c = j - tile.first & 1;
            uint4 k = piece(from + j * single.row, chunk, z.d);
            const u32 count = c ? built[1] : built[0], slot = 2 * c + (count & 1),
                      bar = shared + OFFSET_BARRIERS + 8 * slot;
            barrier_wait(bar + 32, count / 2 & 1 ^ 1);
            u32 to = shared + OFFSET_SLOTS + slot * SLOT_BYTES;
#pragma unroll
            for (int i = 0; i < PASSES; i++) {
                u32 at = place_of(row + i * PASS_ROWS, chunk);
                store_shared(to + at, product(kept(i), k));
            }
            k = piece(from2 + j * single2.row, chunk, z.d);
#pragma unroll
            for (int i = 0; i < PASSES; i++)
                store_shared(to + TILE_BYTES + place_of(row + i * PASS_ROWS, chunk), product(kept(PASSES + i), k));
            if (!QUERY && threadIdx.x < 64) {
                store_float(shared + OFFSET_ROWS + slot * 512 + 4 * threadIdx.x, row_lse);
                store_float(shared + OFFSET_ROWS + slot * 512 + 256 + 4 * threadIdx.x, row_delta);
            }
            fence_async();
            barrier_arrive(bar);
            if (c) built[1]++;
            else built[0]++;
        }
    }
}

DEVICE void consume(u32 shared, const Shape& z, const Work& w, float scale, const float* lse, const float* delta,
                    const Tensor& dx, const Tensor& dx2)
{
    const int consumer = __shfl_sync(~0u, threadIdx.x / 128, 0) - 2, lane = threadIdx.x % 32, lane4 = lane % 4;
    const int my_row = threadIdx.x / 32 % 4 * 16 + lane / 4;  // and my_row + 8
    const float scale_log2 = scale * LOG2E;
    float gradient[NO], other[QUERY ? 1 : NO], row_lse[2] = {0.f, 0.f}, row_delta[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < NO; i++) gradient[i] = other[QUERY ? 0 : i] = 0.f;
    if (QUERY)
        for (int r = 0; r < 2; r++) {
            long long at = index_of(z, w, w.place, w.head, my_row + 8 * r);
            if (at >= 0) { row_lse[r] = lse[at] * LOG2E; row_delta[r] = delta[at]; }
        }
    u32 p[16], ds[16], done = 0;
    const u32 bars = shared + OFFSET_BARRIERS + 16 * consumer;
    for (int t = 0; t < w.tiles; t++) {
        const Tile tile = tile_of(z, w, t);
#pragma unroll 1
        for (int j = tile.first + consumer; j < tile.end; j += 2) {
            const u32 slot = shared + OFFSET_SLOTS + (2 * consumer + (done & 1)) * SLOT_BYTES;
            float s[NS];
            barrier_wait(bars + 8 * (done & 1), done / 2 & 1);
            auto product_s = [&](u32 from) {                       // X (Y z)^T at 0, X' (Y' z')^T at TILE_BYTES
#pragma unroll
                for (int i = 0; i < HEAD_DIM / 16; i++) {
                    const u32 at = from + i / 4 * 8192 + i % 4 * 32;
                    if (i == 0) qk_first(s, descriptor(shared + at, 16), descriptor(slot + at, 16));
                    else qk_next(s, descriptor(shared + at, 16), descriptor(slot + at, 16));
                }
                wgmma_commit();
            };
            wgmma_fence();
            product_s(0);
            wgmma_wait<0>();
            pin(s);
            int low[2], high[2];
            bool edge = false;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int row = my_row + 8 * r;
                if (QUERY) {
                    int i = w.place + place_in(z, row);
                    low[r] = first_seen(z, z.tiled, i) - tile.place;
                    high[r] = j >= first_seen(z, z.single, i) && j < end_seen(z, z.single, i)
                                  ? end_seen(z, z.tiled, i) - tile.place
                                  : 0;
                } else {
                    int a = 0, b = z.n_q - 1;
                    if (z.causal) {
                        int first = w.place + row - z.tiled.shift, second = j - z.single.shift;
                        a = max(max(first, second), 0);
                        b = min(min(first + z.tiled.window, second + z.single.window) - 1, b);
                    }
                    low[r] = (a - tile.place) * (1 << z.row_heads_log2);
                    high[r] = (b + 1 - tile.place) * (1 << z.row_heads_log2);
                }
                edge = edge || low[r] > 0 || high[r] < 64;
                low[r] -= 2 * lane4; high[r] -= 2 * lane4;
            }
            edge = __any_sync(~0u, edge);
            const u32 rows = shared + OFFSET_ROWS + (2 * consumer + (done & 1)) * 512 + 8 * lane4;
#pragma unroll
            for (int c = 0; c < 8; c++) {
                float2 l;
                if (!QUERY) l = load_pair(rows + 32 * c);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    if (QUERY) l = make_float2(row_lse[r], row_lse[r]);
                    float p0 = exp2_fast(fmaf(s[4 * c + 2 * r], scale_log2, -l.x)),
                          p1 = exp2_fast(fmaf(s[4 * c + 2 * r + 1], scale_log2, -l.y));
                    if (edge) {
                        p0 = 8 * c >= low[r] && 8 * c < high[r] ? p0 : 0.f;
                        p1 = 8 * c + 1 >= low[r] && 8 * c + 1 < high[r] ? p1 : 0.f;
                    }
                    p[2 * c + r] = pack(p0, p1);
                }
            }
            wgmma_fence();
            product_s(TILE_BYTES);                                // dP, in the same registers: all of it would not fit
#if !QUERY
#pragma unroll
            for (int i = 0; i < 4; i++)
                pv_next(other, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3],
                        descriptor(slot + TILE_BYTES + 2048 * i, 8192));
            wgmma_commit();
            wgmma_wait<1>();
#else
            wgmma_wait<0>();
#endif
            pin(s);
#pragma unroll
            for (int c = 0; c < 8; c++) {
                float2 e;
                if (!QUERY) e = load_pair(rows + 256 + 32 * c);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    if (QUERY) e = make_float2(row_delta[r], row_delta[r]);
                    u32 x = p[2 * c + r];
                    ds[2 * c + r] =
                        pack(lower_half(x) * (s[4 * c + 2 * r] - e.x), upper_half(x) * (s[4 * c + 2 * r + 1] - e.y));
                }
            }
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 4; i++)
                pv_next(gradient, ds[4 * i], ds[4 * i + 1], ds[4 * i + 2], ds[4 * i + 3],
                        descriptor(slot + 2048 * i, 8192));
            wgmma_commit();
            wgmma_wait<0>();
            pin(gradient);
            pin(other);
            barrier_arrive(bars + 32 + 8 * (done & 1));           // each lane, which has read lse and delta
            done++;
        }
    }
    // one sum of two, through consumer 1's slots
    u32 merge = shared + OFFSET_SLOTS + 2 * SLOT_BYTES + threadIdx.x % 128 * 4;
    if (consumer == 1) {
#pragma unroll
        for (int i = 0; i < NO; i++) {
            store_float(merge + 512 * i, gradient[i]);
            if (!QUERY) store_float(merge + 512 * (NO + i), other[QUERY ? 0 : i]);
        }
    }
    asm volatile("bar.sync 1, 256;" ::: "memory");
    if (consumer == 1) return;
#pragma unroll
    for (int i = 0; i < NO; i++) {
        gradient[i] += load_float(merge + 512 * i);
        if (!QUERY) other[QUERY ? 0 : i] += load_float(merge + 512 * (NO + i));
    }
    const float by[2] = {scale, scale};
    u16* to[2] = {row_of(dx, z, w, w.place, w.head, my_row, QUERY),
                  row_of(dx, z, w, w.place, w.head, my_row + 8, QUERY)};
    store_rows(to, gradient, by, z.d, lane4);
#if !QUERY
    u16* to2[2] = {row_of(dx2, z, w, w.place, w.head, my_row, QUERY),
                   row_of(dx2, z, w, w.place, w.head, my_row + 8, QUERY)};
    const float one[2] = {1.f, 1.f};
    store_rows(to2, other, one, z.d, lane4);
#endif
}

extern "C" __global__ void __launch_bounds__(512, 1)
    trilinear_backward(const Tensor x, const Tensor x2, const Tensor y, const Tensor y2, const Tensor single,
                       const Tensor single2, const Tensor dx, const Tensor dx2, const float* lse, const float* delta,
                       const Shape shape, float scale)
{
    extern __shared__ char memory[];
    u32 shared = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
    const Work w = decode(shape);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; i++) {
            barrier_init(shared + OFFSET_BARRIERS + 8 * i, 256);
            barrier_init(shared + OFFSET_BARRIERS + 32 + 8 * i, 128);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    for (int i = threadIdx.x; i < 64 * CHUNKS; i += 512) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        store_shared(shared + place_of(row, chunk),
                     piece(row_of(x, shape, w, w.place, w.head, row, QUERY), chunk, shape.d));
        store_shared(shared + TILE_BYTES + place_of(row, chunk),
                     piece(row_of(x2, shape, w, w.place, w.head, row, QUERY), chunk, shape.d));
    }
    fence_async();
    __syncthreads();
    if (threadIdx.x < 256) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(BUILDER_REGISTERS));
        build(shared, shape, w, y, y2, single, single2, lse, delta);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        consume(shared, shape, w, scale, lse, delta, dx, dx2);
    }
}

// delta of every query: a warp a row.
extern "C" __global__ void trilinear_delta(const Tensor out, const Tensor d_out, float* delta, int heads, int n_q,
                                           long long rows, int d)
{
    const long long row = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x % 32;
    if (row >= rows) return;
    const int i = row % n_q, h = row / n_q % heads, b = row / n_q / heads;
    float sum = 0.f;
    if (8 * lane < d) {
        uint4 x = piece(out.data + b * out.batch + h * out.head + i * out.row, lane, d);
        uint4 y = piece(d_out.data + b * d_out.batch + h * d_out.head + i * d_out.row, lane, d);
        const u32 a[4] = {x.x, x.y, x.z, x.w}, c[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int e = 0; e < 4; e++) sum += lower_half(a[e]) * lower_half(c[e]) + upper_half(a[e]) * upper_half(c[e]);
    }
#pragma unroll
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) delta[row] = sum;
}
