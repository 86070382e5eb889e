// Attention forward of few queries over many keys, 16-bit queries, by mma.sync: every key is read once.
//
// Steps
//  1. Rows are the queries of all heads of a key head's group, in TILES tiles of 8. Keys come in parts of `unit`, a
//     number that depends on a sequence's keys alone: the same bits for any batch, on any GPU. A block takes
//     consecutive parts of consecutive key heads. CACHE: the keys of a sequence are lengths[batch], which `starts`
//     turns into parts.
//  2. Warp w takes tiles w, w + WARPS, ... of 16 keys of a part. They come by cp.async into the warp's own ring of
//     STAGES, ahead also across parts and heads, so that loads never stop. Q is in registers. CACHE 2: key j is row
//     j % page of page table[batch][j / page]; a lane reads a page's number a tile ahead of the copies that need it.
//     SCALES 2: tokens' scales are read a tile ahead, too.
//  3. S^T = K Q^T, softcap, band, online softmax (base 2, see OFFSET in mma.cu), O^T += V^T P^T: 16 keys, or columns,
//     by 8 rows, so that few rows waste little. ACCURACY_HIGH: P in two 16-bit parts. KV8: bytes become 16-bit numbers
//     on their way to registers (decode_tiles.cuh).
//  4. At a part's end the warps' O are added up, in order, four rows at a time through shared memory: two buffers in
//     turn, so that one barrier is enough. O, maximum and sum of the part go to device memory.
//  5. `merge` adds the parts of a row up: warp w takes parts w, w + 16, ... in order, then the warps' sums are
//     added in order; sink, division, out, lse.
//
// Hidden keys: as in mma.cu, step 6.
//
// Macros: BF16; WIDTH_K, WIDTH_V: 32, 64, 96 or 128; WARPS, TILES (of 8 rows: 1, 2, 4, 8), STAGES; BLOCK_N 16; ALIGNED;
// ACCURACY_HIGH, SOFTCAP, BAND (causal or window) 0|1; CACHE: 0 all keys, 1 lengths, 2 lengths and pages; KV8: keys and
// values in float8_e4m3fn; SCALES: 0 none, 1 a key head's, 2 a token's.
// Launch: starts: grid 1, block 1024; decode: grid s.workers, block 32 * WARPS, shared memory decode.shared_bytes;
// merge: grid b * h * n_q, block 512.

#include "params.cuh"
#include "mma_tiles.cuh"

// units: parts of a key head's keys
struct Split { float* parts; float2* stats; int first_key, keys, unit, units, workers; };
// starts: the parts before those of a sequence, and of all; scales: of keys and values, by page or batch, head, row;
// page: rows of one; most: the keys that a sequence has room for
struct Cache {
    const int *table, *lengths; int* starts; const float *k_scale, *v_scale;
    long long table_b, ks_b, ks_h, ks_n, vs_b, vs_h, vs_n;
    float k_by, v_by;                                     // scales of all keys and of all values
    int page, pages, most;
};
constexpr int COLUMNS = WIDTH_V / 16, QK = WIDTH_K / 16, STEP = 16 * WARPS, MOST = 8 * TILES;
constexpr int SUMS = WARPS * 4 * WIDTH_V;
constexpr int COPIES = ALIGNED ? 16 : 1;                  // of a lane at a time

#include "decode_tiles.cuh"

constexpr float OFFSET = HALF_P ? 15.f : -16.f, UNSHIFT = HALF_P ? 1.f / 32768.f : 65536.f;
constexpr u32 KEY_BYTES = 16 * sizeof(Item) * WIDTH_K, STAGE = KEY_BYTES + 16 * sizeof(Item) * WIDTH_V;

// The keys of a sequence that some row sees, first .. last - 1, in parts.
struct Sequence { int n_k, first, last, unit, units; };
DEVICE Sequence sequence_of(const Params& p, const Split& s, const Cache& c, int batch) {
#if CACHE
    const int n = min(max(c.lengths[batch], 0), c.most), corner = p.causal == 1 ? 0 : n - p.n_q;
    const long long left = p.left < 0 ? 0 : (long long)corner - p.left,
                    right = p.causal ? (long long)corner + p.n_q
                                     : p.right < 0 ? n : (long long)corner + p.n_q + p.right;
    const int first = (int)clamp(left, 0, n), last = (int)clamp(right, first, n),
              unit = n >= 65536 ? 2048 : n >= 16384 ? 1024 : n >= 4096 ? 512 : 256;
    return {n, first, last, unit, (last - first + unit - 1) / unit};
#else
    return {p.n_k, s.first_key, s.first_key + s.keys, s.unit, s.units};
#endif
}
// Where a part lies: its sequence, key head and number.
struct Part { int batch, head, index; Sequence of; };
DEVICE Part part_of(const Params& p, const Split& s, const Cache& c, u32 part) {
#if CACHE
    int low = 0, high = p.b - 1;
    while (low < high) {                                  // the last sequence that starts at it or before, with parts
        const int middle = (low + high + 1) / 2;
        if (c.starts[middle] <= (int)part) low = middle;
        else high = middle - 1;
    }
    const Sequence of = sequence_of(p, s, c, low);
    const int inside = (int)(part - c.starts[low]);
    return {low, inside / of.units, inside % of.units, of};
#else
    const u32 pair = part / (u32)s.units, batch = pair / (u32)p.h_kv;
    return {(int)batch, (int)(pair - batch * p.h_kv), (int)(part - pair * s.units), sequence_of(p, s, c, 0)};
#endif
}

// Which page a key lies in, and its row there; a division takes long, and pages are mostly of a power of two.
struct Spot { int page, row; };
DEVICE Spot spot_of(const Cache& c, int key) {
    if ((c.page & (c.page - 1)) == 0) return {key >> (31 - __clz(c.page)), key & (c.page - 1)};
    return {key / c.page, key % c.page};
}

// What is loaded next: keys key .. last - 1; row: the page of the lane's row of that tile
struct Place { u32 part, end; int key, last, batch, row; const Item *k, *v; };
DEVICE void look_up(Place& x, const Cache& c) {
#if CACHE == 2
    const int key = x.key + (threadIdx.x & 15);
    x.row = key < x.last ? c.table[x.batch * c.table_b + spot_of(c, key).page] : -1;
#endif
}
DEVICE void find(Place& x, const Params& p, const Split& s, const Cache& c) {   // the warp's first tile of a part
    Part at;
    for (; x.part < x.end; x.part++) {                    // some parts have none
        at = part_of(p, s, c, x.part);
        const int first = at.of.first + at.index * at.of.unit;
        x.key = first + threadIdx.x / 32 * 16, x.last = min(at.of.last, first + at.of.unit);
        if (x.key < x.last) break;
    }
    if (x.part >= x.end) return;
    x.batch = at.batch;
    const long long batch = CACHE == 2 ? 0 : at.batch;
    x.k = (const Item*)p.k + batch * p.k_b + at.head * p.k_h, x.v = (const Item*)p.v + batch * p.v_b + at.head * p.v_h;
    look_up(x, c);
}
DEVICE void load(Place& x, const Params& p, const Split& s, const Cache& c, u32 to) {
    if (x.part < x.end) {
        bool whole = ALIGNED && x.key + 16 <= x.last && p.d_k == WIDTH_K && p.d_v == WIDTH_V;
#if CACHE == 2
        // where the lane's row begins, or nowhere: a page that is none is not read
        const int inside = spot_of(c, x.key + (threadIdx.x & 15)).row, first = __shfl_sync(~0u, inside, 0);
        const bool there = x.row >= 0 && x.row < c.pages;
        whole = whole && first + 16 <= c.page && __shfl_sync(~0u, there, 0);     // 16 rows of one page
        if (whole) {
            RowsK::copy(to, x.k + (x.row * p.k_b + first * p.k_n), p.k_n);
            RowsV::copy(to + KEY_BYTES, x.v + (x.row * p.v_b + first * p.v_n), p.v_n);
        } else {
            RowsK::copy_some(to, x.k, there ? x.row * p.k_b + inside * p.k_n : -1, 16, p.d_k);
            RowsV::copy_some(to + KEY_BYTES, x.v, there ? x.row * p.v_b + inside * p.v_n : -1, 16, p.d_v);
        }
#else
        if (whole) {
            RowsK::copy(to, x.k + x.key * p.k_n, p.k_n);
            RowsV::copy(to + KEY_BYTES, x.v + x.key * p.v_n, p.v_n);
        } else {
            RowsK::copy_some(to, x.k + x.key * p.k_n, p.k_n, x.last - x.key, p.d_k);
            RowsV::copy_some(to + KEY_BYTES, x.v + x.key * p.v_n, p.v_n, x.last - x.key, p.d_v);
        }
#endif
        x.key += STEP;
        if (x.key >= x.last) x.part++, find(x, p, s, c);
        else look_up(x, c);
    }
    commit();
}
// Tokens' scales: those of the lane's two keys of a tile, of page or batch, head and row, by strides; 1 where there is
// no key: what no sequence owns is not read.
struct Scales { float k[2], v[2]; };
DEVICE Scales scales_of(const Cache& c, const Part& at, int key, int last) {
    Scales y = {{1.f, 1.f}, {1.f, 1.f}};
#if SCALES == 2
    UNROLL for (int h = 0; h < 2; h++) {
        const int j = key + (threadIdx.x & 31) / 4 + 8 * h;
        if (j >= last) continue;
        long long first = at.batch, row = j;
#if CACHE == 2
        const Spot spot = spot_of(c, j);
        first = c.table[at.batch * c.table_b + spot.page], row = spot.row;
        if (first < 0 || first >= c.pages) continue;
#endif
        if (c.k_scale) y.k[h] = c.k_scale[first * c.ks_b + at.head * c.ks_h + row * c.ks_n];
        if (c.v_scale) y.v[h] = c.v_scale[first * c.vs_b + at.head * c.vs_h + row * c.vs_n];
    }
#endif
    return y;
}

// The queries of a key head as fragments: row lane / 4 of each tile of 8. HALF: whether they are float16.
struct Queries { u32 x[TILES][QK][2]; float by[TILES][2]; bool half; };
DEVICE void fetch(Queries& q, const Params& p, int batch, int head) {
    const int lane = threadIdx.x & 31, group = p.h / p.h_kv, rows = group * p.n_q;
    const u16* from = (const u16*)p.q + batch * p.q_b + head * group * p.q_h;
    UNROLL for (int n = 0; n < TILES; n++) {
        const int row = 8 * n + lane / 4;
        const u16* first = from + row / p.n_q * p.q_h + row % p.n_q * p.q_n;
        UNROLL for (int i = 0; i < QK; i++)
            UNROLL for (int e = 0; e < 2; e++) {
                const int d = query_column(i, e);
                q.x[n][i][e] = (row < rows && d < p.d_k ? first[d] : 0)
                             | (row < rows && d + 1 < p.d_k ? (u32)first[d + 1] << 16 : 0);
            }
    }
    q.half = HALF_Q;
    UNROLL for (int n = 0; n < TILES; n++) q.by[n][0] = q.by[n][1] = 1.f;
#if KV8 && BF16
    // Times a power of two a row, which `by` takes back; where that loses a bit they stay bfloat16.
    u32 narrow[TILES][QK][2];
    bool lost = false;
    UNROLL for (int n = 0; n < TILES; n++) {
        float top = 0.f;
        UNROLL for (int i = 0; i < QK; i++)
            UNROLL for (int e = 0; e < 2; e++) top = fmaxf(top, fmaxf(fabsf(lower_of<false>(q.x[n][i][e])),
                fabsf(lower_of<false>(q.x[n][i][e] >> 16))));
        top = quad_max(top);
        const int power = top == 0 ? 0 : min(14 - (__float_as_int(top) >> 23) + 127, 100);
        const float up = __int_as_float((127 + power) << 23), down = __int_as_float((127 - power) << 23);
        UNROLL for (int i = 0; i < QK; i++)
            UNROLL for (int e = 0; e < 2; e++) {
                const float y = lower_of<false>(q.x[n][i][e]) * up, z = lower_of<false>(q.x[n][i][e] >> 16) * up;
                const u32 w = packed<true>(y, z);
                narrow[n][i][e] = w;
                lost |= !(lower_of<true>(w) == y && lower_of<true>(w >> 16) == z);
            }
        UNROLL for (int e = 0; e < 2; e++) q.by[n][e] = __shfl_sync(~0u, down, 4 * (2 * (lane & 3) + e));
    }
    q.half = !__any_sync(~0u, lost);
    UNROLL for (int n = 0; n < TILES; n++) {
        if (!q.half) q.by[n][0] = q.by[n][1] = 1.f;
        UNROLL for (int i = 0; i < QK; i++)
            UNROLL for (int e = 0; e < 2; e++) q.x[n][i][e] = q.half ? narrow[n][i][e] : q.x[n][i][e];
    }
#endif
}
// Scores of 16 keys: lane 4 i + j has those of keys i, i + 8 and of rows 2 j, 2 j + 1 of each tile.
template <bool HALF> DEVICE void scores(float (&x)[TILES][4], const Queries& q, u32 tile) {
    constexpr int CHAINS = TILES == 1 ? 2 : 1;            // products that do not wait for each other
    float y[CHAINS][TILES][4] = {};
    const Keys keys(tile);
    UNROLL for (int i = 0; i < QK; i++) {
        u32 a[4];
        keys.template fragment<HALF>(a, i);
        UNROLL for (int n = 0; n < TILES; n++) product<HALF>(y[i % CHAINS][n], a, q.x[n][i][0], q.x[n][i][1]);
    }
    UNROLL for (int n = 0; n < TILES; n++)
        UNROLL for (int e = 0; e < 4; e++) x[n][e] = CHAINS == 2 ? y[0][n][e] + y[CHAINS - 1][n][e] : y[0][n][e];
}
// O^T += V^T P^T for weights x as `scores` gives them.
DEVICE void add_values(float (&o)[COLUMNS][TILES][4], const float (&x)[TILES][4], u32 tile) {
    constexpr int PARTS = 1 + ACCURACY_HIGH;
    u32 b[PARTS][TILES][2];
    UNROLL for (int n = 0; n < TILES; n++)
        UNROLL for (int h = 0; h < 2; h++) {
            const u32 w = packed<HALF_P>(x[n][2 * h], x[n][2 * h + 1]);
            b[0][n][h] = transposed(w);
            if (ACCURACY_HIGH) b[PARTS - 1][n][h] = transposed(packed<HALF_P>(
                x[n][2 * h] - lower_of<HALF_P>(w), x[n][2 * h + 1] - lower_of<HALF_P>(w >> 16)));
        }
    UNROLL for (int c = 0; c < COLUMNS; c += 2) {
        u32 a[2][4];
        value_fragments(a, tile, c);
        UNROLL for (int i = 0; i < 2; i++)
            UNROLL for (int n = 0; n < TILES; n++)
                UNROLL for (int k = 0; k < PARTS; k++) product<HALF_P>(o[c + i][n], a[i], b[k][n][0], b[k][n][1]);
    }
}

DEVICE void run(const Params& p, const Split& s, const Cache& c) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const int lane = threadIdx.x & 31, own = lane / 4, column = 2 * (lane & 3), warp = threadIdx.x / 32;
    const u32 ring = shared_address(shared) + warp * STAGES * STAGE;
    // two each, in turn, so that one barrier is enough: O of 4 rows of each warp; maxima and sums of each warp's rows
    float* sums = (float*)(shared + WARPS * STAGES * STAGE);
    float2* tops = (float2*)(sums + 2 * SUMS);
    int turn = 0, group = 0;
    const int rows = p.h / p.h_kv * p.n_q;
    const long long total = CACHE ? c.starts[p.b] : (long long)p.b * p.h_kv * s.units;
    Place next = {(u32)(blockIdx.x * total / s.workers), (u32)((blockIdx.x + 1) * total / s.workers)};
    const u32 begin = next.part, end = next.end;
    find(next, p, s, c);
    UNROLL for (int i = 0; i < STAGES - 1; i++) load(next, p, s, c, ring + i * STAGE);

    Queries q;
    int known_batch = -1, known_head = -1;                // whose queries are in q
    float k_by = CACHE ? c.k_by : 1.f, v_by = CACHE ? c.v_by : 1.f;          // SCALES 1: times the key head's
    int stage = 0;
    for (u32 part = begin; part < end; part++) {
        const Part at = part_of(p, s, c, part);
        const int n_k = at.of.n_k;
        // row i of queries sees keys i + left .. i + right
        const long long corner = p.causal == 1 ? 0 : (long long)n_k - p.n_q, far = 1LL << 30;
        const int left = (int)max(corner - (p.left < 0 ? far : p.left), -far);
        const int right = (int)min(corner + (p.causal ? 0 : p.right < 0 ? far : p.right), far);
        if (at.batch != known_batch || at.head != known_head) {
            known_batch = at.batch, known_head = at.head;
            fetch(q, p, at.batch, at.head);
#if SCALES == 1
            k_by = c.k_by * (c.k_scale ? c.k_scale[at.batch * c.ks_b + at.head * c.ks_h] : 1.f);
            v_by = c.v_by * (c.v_scale ? c.v_scale[at.batch * c.vs_b + at.head * c.vs_h] : 1.f);
#endif
        }
        const float inner = (float)(SOFTCAP ? p.scale / p.softcap : p.scale * 1.4426950408889634) * k_by,
            outer = (float)(p.softcap * 1.4426950408889634);
        float o[COLUMNS][TILES][4] = {}, row_max[TILES][2], row_sum[TILES][2] = {};
        UNROLL for (int n = 0; n < TILES; n++) row_max[n][0] = row_max[n][1] = -INF;
        const int first = at.of.first + at.index * at.of.unit, last = min(at.of.last, first + at.of.unit);
        Scales ahead = scales_of(c, at, first + 16 * warp, last);
#pragma unroll 1
        for (int key = first + 16 * warp; key < last; key += STEP) {
            wait<STAGES - 2>();
            // the tile is there for all lanes, and the last one is read by all
            __syncwarp();
            load(next, p, s, c, ring + (stage ? stage - 1 : STAGES - 1) * STAGE);
            const u32 tile = ring + stage * STAGE;
            stage = stage == STAGES - 1 ? 0 : stage + 1;
            const Scales by = ahead;
            ahead = scales_of(c, at, key + STEP, last);

            float x[TILES][4];
            if (HALF_Q && (!BF16 || q.half)) scores<true>(x, q, tile);
            else scores<false>(x, q, tile);
            UNROLL for (int n = 0; n < TILES; n++)
                UNROLL for (int e = 0; e < 4; e++) {
                    float y = x[n][e];
                    if (SCALES == 2) y *= by.k[e / 2];
                    // rounded here in every variant: joined with the subtraction below, bits would differ
                    y = __fmul_rn(y, KV8 && BF16 ? inner * q.by[n][e % 2] : inner);
                    x[n][e] = SOFTCAP ? __fmul_rn(outer, tanhf(y)) : y;
                }
            if (key + 16 > n_k || (BAND && (p.n_q - 1 + left > key || right < key + 15))) {
                UNROLL for (int n = 0; n < TILES; n++)
                    UNROLL for (int e = 0; e < 4; e++) {
                        const int i = (8 * n + column + e % 2) % p.n_q, j = key + own + 8 * (e / 2);
                        const bool on = j < n_k && (!BAND || (j >= i + left && j <= i + right));
                        x[n][e] = on ? x[n][e] : -INF;
                    }
                if (__any_sync(~0u, not_numbers(tile + KEY_BYTES))) odd_values(o, x, tile + KEY_BYTES);
            }
            // ---- online softmax: maxima of rows are looked for where some lane has a larger score ----
            bool move = false;
            UNROLL for (int n = 0; n < TILES; n++)
                UNROLL for (int e = 0; e < 2; e++) move |= fmaxf(x[n][e], x[n][2 + e]) > row_max[n][e];
            if (__any_sync(~0u, move)) {
                UNROLL for (int n = 0; n < TILES; n++)
                    UNROLL for (int e = 0; e < 2; e++) {
                        const float old = row_max[n][e];
                        row_max[n][e] = fmaxf(old, column_max(fmaxf(x[n][e], x[n][2 + e])));
                        const float factor = row_max[n][e] == old || old == -INF ? 1.f : exp2_fast(old - row_max[n][e]);
                        row_sum[n][e] = __fmul_rn(row_sum[n][e], factor);
                        UNROLL for (int i = 0; i < COLUMNS; i++) o[i][n][e] *= factor, o[i][n][2 + e] *= factor;
                    }
            }
            UNROLL for (int n = 0; n < TILES; n++)
                UNROLL for (int e = 0; e < 4; e++) {
                    const float top = row_max[n][e % 2], y = exp2_fast(x[n][e] - ((top == -INF ? 0.f : top) - OFFSET));
                    row_sum[n][e % 2] += y;
                    x[n][e] = SCALES == 2 && y != 0 ? y * by.v[e / 2] : y;    // of a hidden key nothing is taken
                }
            add_values(o, x, tile + KEY_BYTES);
        }
        // ---- the part's sums ----
        float2* top_of = tops + turn * WARPS * MOST;
        turn ^= 1;
        UNROLL for (int n = 0; n < TILES; n++)
            UNROLL for (int e = 0; e < 2; e++) {
                const float sum = column_sum(row_sum[n][e]) * UNSHIFT;
                if (own == 0) top_of[warp * MOST + 8 * n + column + e] = make_float2(row_max[n][e], sum);
            }
        UNROLL for (int j = 0; j < MOST / 4; j++) {       // four rows at a time
            if (4 * j >= rows) break;
            float* sum_of = sums + group * SUMS;
            group ^= 1;
            if (column / 4 == j % 2) {
                UNROLL for (int i = 0; i < COLUMNS; i++)
                    UNROLL for (int e = 0; e < 4; e++)
                        sum_of[(warp * 4 + column % 4 + e % 2) * WIDTH_V + value_column(i, e / 2)] = o[i][j / 2][e];
            }
            __syncthreads();
            for (int i = 2 * threadIdx.x; i < 4 * WIDTH_V; i += 2 * THREADS) {
                const int row = 4 * j + i / WIDTH_V;
                if (row >= rows) break;
                float top = -INF;
                UNROLL for (int w = 0; w < WARPS; w++) top = fmaxf(top, top_of[w * MOST + row].x);
                float2 x = make_float2(0.f, 0.f);
                float sum = 0.f;
                UNROLL for (int w = 0; w < WARPS; w++) {
                    const float2 own = top_of[w * MOST + row], y = *(const float2*)(sum_of + w * 4 * WIDTH_V + i);
                    const float weight = own.x == -INF ? 0.f : exp2_fast(own.x - top), by = weight * (UNSHIFT * v_by);
                    sum = fmaf(weight, own.y, sum);
                    x.x = fmaf(by, y.x, x.x), x.y = fmaf(by, y.y, x.y);
                }
                *(float2*)(s.parts + ((long long)part * rows + 4 * j) * WIDTH_V + i) = x;
                if (i % WIDTH_V == 0) s.stats[(long long)part * rows + row] = make_float2(top, sum);
            }
        }
    }
}

#if !CACHE
extern "C" __global__ void __launch_bounds__(THREADS, 1) decode(const __grid_constant__ Params p,
    const __grid_constant__ Split s) { run(p, s, {}); }
#else
extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_cache(const __grid_constant__ Params p,
    const __grid_constant__ Split s, const __grid_constant__ Cache c) { run(p, s, c); }

// The parts before those of each sequence, and of all: one block.
extern "C" __global__ void __launch_bounds__(1024) starts(const __grid_constant__ Params p,
    const __grid_constant__ Split s, const __grid_constant__ Cache c) {
    __shared__ int ends[1024];
    const int each = (p.b + 1023) / 1024, first = min((int)threadIdx.x * each, p.b), last = min(first + each, p.b);
    int sum = 0;
    for (int i = first; i < last; i++) sum += p.h_kv * sequence_of(p, s, c, i).units;
    ends[threadIdx.x] = sum;
    for (int hop = 1; hop < 1024; hop *= 2) {
        __syncthreads();
        const int x = threadIdx.x >= hop ? ends[threadIdx.x - hop] : 0;
        __syncthreads();
        ends[threadIdx.x] += x;
    }
    int at = ends[threadIdx.x] - sum;
    for (int i = first; i < last; i++) {
        c.starts[i] = at;
        at += p.h_kv * sequence_of(p, s, c, i).units;
    }
    if (threadIdx.x == 1023) c.starts[p.b] = ends[1023];
}
#endif

constexpr int MERGING = 16, TOGETHER = CACHE ? 4 : 8;     // warps, parts that are read at once: registers
DEVICE void merge_parts(const Params& p, const Split& s, const Cache& c) {
    __shared__ float tops[MERGING], sums[MERGING], outs[MERGING][WIDTH_V];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, group = p.h / p.h_kv, rows = group * p.n_q;
    const long long pair = blockIdx.x / rows;
    const int row = blockIdx.x % rows, batch = pair / p.h_kv, head = pair % p.h_kv * group + row / p.n_q,
        query = row % p.n_q;
    const int units = CACHE ? (c.starts[batch + 1] - c.starts[batch]) / p.h_kv : s.units;
    const long long before = CACHE ? c.starts[batch] + (long long)(pair % p.h_kv) * units : pair * units;
    const float2* stats = s.stats + before * rows + row;
    const float* parts = s.parts + (before * rows + row) * WIDTH_V + 4 * lane;
    float top = -INF;
    for (int i = threadIdx.x; i < units; i += 32 * MERGING) top = fmaxf(top, stats[(long long)i * rows].x);
    UNROLL for (int hop = 16; hop; hop /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, hop));
    if (lane == 0) tops[warp] = top;
    __syncthreads();
    UNROLL for (int i = 0; i < MERGING; i++) top = fmaxf(top, tops[i]);
    const float sink = p.sink ? ((const float*)p.sink)[head] : -INF, sink2 = __fmul_rn(sink, LOG2E);
    top = fmaxf(top, sink2);
    const float base = top == -INF ? 0.f : top;
    float sum = 0.f, o[4] = {};
#pragma unroll TOGETHER
    for (int i = warp; i < units; i += MERGING) {
        const float2 x = stats[(long long)i * rows];
        const float weight = exp2_fast(x.x - base);
        sum = fmaf(weight, x.y, sum);
        if (4 * lane < WIDTH_V) {
            const float4 y = *(const float4*)(parts + (long long)i * rows * WIDTH_V);
            o[0] = fmaf(weight, y.x, o[0]), o[1] = fmaf(weight, y.y, o[1]), o[2] = fmaf(weight, y.z, o[2]),
                o[3] = fmaf(weight, y.w, o[3]);
        }
    }
    if (lane == 0) sums[warp] = sum;
    if (4 * lane < WIDTH_V) {
        UNROLL for (int e = 0; e < 4; e++) outs[warp][4 * lane + e] = o[e];
    }
    __syncthreads();
    float keys = 0.f;
    UNROLL for (int i = 0; i < MERGING; i++) keys += sums[i];
    sum = keys + (sink == -INF ? 0.f : exp2_fast(sink2 - base));
    if (threadIdx.x == 0)                                 // a row without keys: lse is the sink itself, or -inf
        ((float*)p.lse)[batch * p.lse_b + head * p.lse_h + query] = keys == 0 ? sink : (top + log2f(sum)) * LN2;
    u16* out = (u16*)p.out + batch * p.o_b + head * p.o_h + query * p.o_n;
    for (int c = threadIdx.x; c < p.d_v; c += 32 * MERGING) {
        float x = 0.f;
        UNROLL for (int i = 0; i < MERGING; i++) x += outs[i][c];
        out[c] = (u16)pack(sum == 0 ? 0.f : x / sum, 0.f);
    }
}

#if !CACHE
extern "C" __global__ void __launch_bounds__(32 * MERGING) merge(const __grid_constant__ Params p,
    const __grid_constant__ Split s) { merge_parts(p, s, {}); }
#else
extern "C" __global__ void __launch_bounds__(32 * MERGING) merge_cache(const __grid_constant__ Params p,
    const __grid_constant__ Split s, const __grid_constant__ Cache c) { merge_parts(p, s, c); }
#endif
