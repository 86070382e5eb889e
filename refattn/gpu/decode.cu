// Attention forward of few queries over many keys, 16-bit inputs, by mma.sync: every key is read once.
//
// Steps
//  1. The rows of a tile are the queries of all heads of a key head's group. Keys come in parts of `unit`, a number
//     that depends on n_k alone: the same bits for any batch, on any GPU. A block takes consecutive parts of
//     consecutive key heads.
//  2. Warp w takes tiles w, w + WARPS, ... of 16 keys of a part. They come by cp.async into the warp's own ring of
//     STAGES, ahead also across parts and heads, so that loads never stop. Q is in registers.
//  3. S = Q K^T, softcap, band, online softmax (base 2, see OFFSET in mma.cu), O += P V. ACCURACY_HIGH: P in two
//     16-bit parts.
//  4. At a part's end the warps' O are added up, in order, four rows at a time through shared memory. O, maximum
//     and sum of the part go to device memory.
//  5. `merge` adds the parts of a row up: warp w takes parts w, w + 16, ... in order, then the warps' sums are
//     added in order; sink, division, out, lse.
//
// Hidden keys: as in mma.cu, step 6.
//
// Macros: BF16; WIDTH_K, WIDTH_V: 32, 64, 96 or 128; WARPS, M_TILES (of 16 rows), STAGES; BLOCK_N 16; ALIGNED;
// ACCURACY_HIGH, SOFTCAP, BAND (causal or window) 0|1.
// Launch: decode: grid s.workers, block 32 * WARPS, shared memory decode.shared_bytes; merge: grid b * h * n_q,
// block 512.

#include "params.cuh"
#include "mma_tiles.cuh"

// units: parts of a key head's keys
struct Split { float* parts; float2* stats; int first_key, keys, unit, units, workers; };
constexpr int NO = WIDTH_V / 8, QK = WIDTH_K / 16, STEP = 16 * WARPS;
constexpr u32 STAGE = K_BYTES + V_BYTES;
constexpr int COPIES = ALIGNED ? 16 : 1;                  // of a lane at a time
constexpr float OFFSET = BF16 ? -16.f : 15.f, UNSHIFT = BF16 ? 65536.f : 1.f / 32768.f;

DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// A warp copies 16 rows of `d` elements; rows from `rows` on, and columns from d on, become 0.
template <int WIDTH> DEVICE void copy_rows(u32 to, const u16* from, long long stride, int rows, int d) {
    typedef Tile<WIDTH> Of;
#pragma unroll COPIES
    for (int i = 0; i < 16 * Of::CHUNKS / 32; i++) {
        const int at = i * 32 + (threadIdx.x & 31), row = at / Of::CHUNKS, c = at % Of::CHUNKS;
        const int count = row < rows ? max(0, min(8, d - 8 * c)) : 0;
        const u16* source = from + row * stride + 8 * c;
#if ALIGNED
        copy_async(to + Of::chunk(row, c), count ? source : from, 2 * count);
#else
        u32 x[4];
        UNROLL for (int e = 0; e < 4; e++) x[e] = (2 * e < count ? source[2 * e] : 0) | (2 * e + 1 < count
            ? (u32)source[2 * e + 1] << 16 : 0);
        store_shared(to + Of::chunk(row, c), make_uint4(x[0], x[1], x[2], x[3]));
#endif
    }
}

struct Place { long long part, end; int key, last; const u16 *k, *v; };   // what is loaded next: keys key .. last - 1
DEVICE void find(Place& x, const Params& p, const Split& s) {   // the warp's first tile of a part; some parts have none
    for (; x.part < x.end; x.part++) {
        const int first = s.first_key + (int)(x.part % s.units) * s.unit;
        x.key = first + threadIdx.x / 32 * 16, x.last = min(s.first_key + s.keys, first + s.unit);
        if (x.key < x.last) break;
    }
    if (x.part >= x.end) return;
    const long long pair = x.part / s.units;
    const int batch = pair / p.h_kv, head = pair % p.h_kv;
    x.k = (const u16*)p.k + batch * p.k_b + head * p.k_h, x.v = (const u16*)p.v + batch * p.v_b + head * p.v_h;
}
DEVICE void load(Place& x, const Params& p, const Split& s, u32 to) {
    if (x.part < x.end) {
        copy_rows<WIDTH_K>(to, x.k + x.key * p.k_n, p.k_n, x.last - x.key, p.d_k);
        copy_rows<WIDTH_V>(to + K_BYTES, x.v + x.key * p.v_n, p.v_n, x.last - x.key, p.d_v);
        x.key += STEP;
        if (x.key >= x.last) x.part++, find(x, p, s);
    }
    commit();
}

// Values that are not finite: added to the rows that see them, then zeroed (rare).
DEVICE void odd_values(float (&o)[M_TILES][NO][4], const float (&s)[M_TILES][NS][4], u32 v) {
    const int lane = threadIdx.x & 31, column = 2 * (lane & 3);
    u32 seen[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) {
        seen[r] = 0;
        UNROLL for (int n = 0; n < NS; n++)
            UNROLL for (int e = 0; e < 2; e++) seen[r] |= (s[r / 2][n][r % 2 * 2 + e] != -INF ? 1u : 0u) << (8 * n + e);
        seen[r] = quad_or(seen[r] << column);
    }
#pragma unroll 1
    for (int j = 0; j < 16; j++)
        UNROLL for (int n = 0; n < NO; n++) {
            const u32 x = load_shared(v + TileV::chunk(j, n) + 2 * column), odd = not_finite(x);
            if (odd) {
                UNROLL for (int r = 0; r < ROWS; r++) {
                    if (seen[r] >> j & 1 && odd & 0x8000u) o[r / 2][n][r % 2 * 2] += lower_half(x);
                    if (seen[r] >> j & 1 && odd >> 31) o[r / 2][n][r % 2 * 2 + 1] += upper_half(x);
                }
            }
        }
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < 16 * TileV::CHUNKS; i += 32) {
        const u32 at = v + TileV::chunk(i / TileV::CHUNKS, i % TileV::CHUNKS);
        const uint4 x = load_shared4(at);
        store_shared(at, make_uint4(zero_not_finite(x.x), zero_not_finite(x.y), zero_not_finite(x.z),
            zero_not_finite(x.w)));
    }
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode(const __grid_constant__ Params p,
    const __grid_constant__ Split s) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const int lane = threadIdx.x & 31, column = 2 * (lane & 3), warp = threadIdx.x / 32;
    const u32 ring = shared_address(shared) + warp * STAGES * STAGE;
    float* sums = (float*)(shared + WARPS * STAGES * STAGE);                  // of 4 rows of each warp
    float2* tops = (float2*)(sums + WARPS * 4 * WIDTH_V);                     // maximum and sum of each warp's rows
    const int group = p.h / p.h_kv, rows = group * p.n_q;
    const long long total = (long long)p.b * p.h_kv * s.units;
    Place next = {blockIdx.x * total / s.workers, (blockIdx.x + 1) * total / s.workers};
    const long long begin = next.part, end = next.end;
    find(next, p, s);
    UNROLL for (int i = 0; i < STAGES - 1; i++) load(next, p, s, ring + i * STAGE);

    // row i of queries sees keys i + left .. i + right
    const long long corner = p.causal == 1 ? 0 : (long long)p.n_k - p.n_q, far = 1LL << 30;
    const int left = (int)max(corner - (p.left < 0 ? far : p.left), -far);
    const int right = (int)min(corner + (p.causal ? 0 : p.right < 0 ? far : p.right), far);
    const float scale2 = (float)(p.scale * 1.4426950408889634);
    const u32 k_start = TileK::chunk((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1),
        v_start = K_BYTES + TileV::chunk(lane & 15, lane >> 4);
    u32 q[M_TILES][QK][4];
    long long known = -1;                                 // the key head whose queries are in q
    int stage = 0;
    for (long long part = begin; part < end; part++) {
        const long long pair = part / s.units;
        if (pair != known) {
            known = pair;
            const u16* from = (const u16*)p.q + pair / p.h_kv * p.q_b + pair % p.h_kv * group * p.q_h;
            UNROLL for (int m = 0; m < M_TILES; m++)
                UNROLL for (int e = 0; e < 4; e++) {
                    const int row = 16 * m + lane / 4 + e % 2 * 8;
                    const u16* at = from + row / p.n_q * p.q_h + row % p.n_q * p.q_n;
                    UNROLL for (int i = 0; i < QK; i++) {
                        const int c = 16 * i + e / 2 * 8 + column;
                        q[m][i][e] = (row < rows && c < p.d_k ? at[c] : 0) | (row < rows
                            && c + 1 < p.d_k ? (u32)at[c + 1] << 16 : 0);
                    }
                }
        }
        float o[M_TILES][NO][4], row_max[ROWS], row_sum[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++) row_max[r] = -INF, row_sum[r] = 0;
        UNROLL for (int m = 0; m < M_TILES; m++)
            UNROLL for (int n = 0; n < NO; n++) o[m][n][0] = o[m][n][1] = o[m][n][2] = o[m][n][3] = 0;
        const int first = s.first_key + (int)(part % s.units) * s.unit, last = min(s.first_key + s.keys,
            first + s.unit);
#pragma unroll 1
        for (int key = first + 16 * warp; key < last; key += STEP) {
            wait<STAGES - 2>();
            // the tile is there for all lanes, and the last one is read by all
            __syncwarp();
            load(next, p, s, ring + (stage ? stage - 1 : STAGES - 1) * STAGE);
            const u32 tile = ring + stage * STAGE;
            stage = stage == STAGES - 1 ? 0 : stage + 1;

            float x[M_TILES][NS][4];
            UNROLL for (int m = 0; m < M_TILES; m++)
                UNROLL for (int n = 0; n < NS; n++) x[m][n][0] = x[m][n][1] = x[m][n][2] = x[m][n][3] = 0;
            UNROLL for (int i = 0; i < QK; i++) {
                u32 b[4];
                load_matrix(b, TileK::step(tile + k_start, i));
                UNROLL for (int m = 0; m < M_TILES; m++) mma(x[m][0], q[m][i], b[0], b[1]), mma(x[m][1], q[m][i], b[2],
                    b[3]);
            }
            const float inner = SOFTCAP ? (float)(p.scale / p.softcap) : scale2,
                outer = (float)(p.softcap * 1.4426950408889634);
            UNROLL for (int m = 0; m < M_TILES; m++)
                UNROLL for (int n = 0; n < NS; n++)
                    UNROLL for (int e = 0; e < 4; e++) x[m][n][e] = SOFTCAP
                        ? outer * tanhf(x[m][n][e] * inner) : x[m][n][e] * inner;
            if (key + 16 > p.n_k || (BAND && (p.n_q - 1 + left > key || right < key + 15))) {
                UNROLL for (int r = 0; r < ROWS; r++) {
                    const int i = (16 * (r / 2) + r % 2 * 8 + lane / 4) % p.n_q;
                    UNROLL for (int n = 0; n < NS; n++)
                        UNROLL for (int e = 0; e < 2; e++) {
                            const int at = key + 8 * n + column + e;
                            const bool on = at < p.n_k && (!BAND || (at >= i + left && at <= i + right));
                            x[r / 2][n][r % 2 * 2 + e] = on ? x[r / 2][n][r % 2 * 2 + e] : -INF;
                        }
                }
                u32 bad = 0;
                for (int i = lane; i < 16 * TileV::CHUNKS; i += 32) {
                    const uint4 y = load_shared4(tile + K_BYTES + TileV::chunk(i / TileV::CHUNKS, i % TileV::CHUNKS));
                    bad |= not_finite(y.x) | not_finite(y.y) | not_finite(y.z) | not_finite(y.w);
                }
                if (__any_sync(~0u, bad)) odd_values(o, x, tile + K_BYTES);
            }
            // ---- online softmax ----
            float top[ROWS];
            bool move = false;
            UNROLL for (int r = 0; r < ROWS; r++) {
                const float* y = &x[r / 2][0][r % 2 * 2];
                top[r] = quad_max(fmaxf(fmaxf(y[0], y[1]), fmaxf(y[4], y[5])));
                move |= top[r] > row_max[r];
            }
            if (__any_sync(~0u, move)) {
                UNROLL for (int r = 0; r < ROWS; r++) {
                    const float old = row_max[r];
                    row_max[r] = fmaxf(old, top[r]);
                    const float factor = row_max[r] == old || old == -INF ? 1.f : exp2_fast(old - row_max[r]);
                    row_sum[r] *= factor;
                    UNROLL for (int n = 0; n < NO; n++) o[r / 2][n][r % 2 * 2] *= factor,
                        o[r / 2][n][r % 2 * 2 + 1] *= factor;
                }
            }
            UNROLL for (int r = 0; r < ROWS; r++) {
                const float shift = (row_max[r] == -INF ? 0.f : row_max[r]) - OFFSET;
                UNROLL for (int n = 0; n < NS; n++)
                    UNROLL for (int e = 0; e < 2; e++) {
                        float& y = x[r / 2][n][r % 2 * 2 + e];
                        y = exp2_fast(y - shift);
                        row_sum[r] += y;
                    }
            }
            // ---- O += P V ----
            u32 a[M_TILES][4];
#if ACCURACY_HIGH
            u32 rest[M_TILES][4];
#endif
            UNROLL for (int m = 0; m < M_TILES; m++)
                UNROLL for (int e = 0; e < 4; e++) {
                    const float y = x[m][e / 2][e % 2 * 2], z = x[m][e / 2][e % 2 * 2 + 1];
                    a[m][e] = pack(y, z);
#if ACCURACY_HIGH
                    rest[m][e] = pack(y - lower_half(a[m][e]), z - upper_half(a[m][e]));
#endif
                }
            UNROLL for (int n = 0; n < NO; n += 2) {
                u32 b[4];
                load_matrix_transposed(b, TileV::step(tile + v_start, n / 2));
                UNROLL for (int m = 0; m < M_TILES; m++) {
                    mma(o[m][n], a[m], b[0], b[1]), mma(o[m][n + 1], a[m], b[2], b[3]);
#if ACCURACY_HIGH
                    mma(o[m][n], rest[m], b[0], b[1]), mma(o[m][n + 1], rest[m], b[2], b[3]);
#endif
                }
            }
        }
        // ---- the part's sums ----
        UNROLL for (int r = 0; r < ROWS; r++) {
            const float sum = quad_sum(row_sum[r]) * UNSHIFT;
            if ((lane & 3) == 0) tops[warp * WARP_M + 8 * r + lane / 4] = make_float2(row_max[r], sum);
        }
        __syncthreads();
        UNROLL for (int r = 0; r < ROWS; r++) {
            float top = -INF;
            UNROLL for (int w = 0; w < WARPS; w++) top = fmaxf(top, tops[w * WARP_M + 8 * r + lane / 4].x);
            const float factor = row_max[r] == -INF ? 0.f : exp2_fast(row_max[r] - top) * UNSHIFT;
            UNROLL for (int n = 0; n < NO; n++) o[r / 2][n][r % 2 * 2] *= factor, o[r / 2][n][r % 2 * 2 + 1] *= factor;
        }
        if (threadIdx.x < rows) {
            float top = -INF, sum = 0.f;
            UNROLL for (int w = 0; w < WARPS; w++) top = fmaxf(top, tops[w * WARP_M + threadIdx.x].x);
            UNROLL for (int w = 0; w < WARPS; w++) {
                const float2 x = tops[w * WARP_M + threadIdx.x];
                if (x.x != -INF) sum = fmaf(exp2_fast(x.x - top), x.y, sum);
            }
            s.stats[part * rows + threadIdx.x] = make_float2(top, sum);
        }
        UNROLL for (int j = 0; j < WARP_M / 4; j++) {
            if (4 * j >= rows) break;
            if (lane / 16 == j % 2) {
                float* to = sums + (warp * 4 + lane / 4 % 4) * WIDTH_V + column;
                UNROLL for (int n = 0; n < NO; n++)
                    *(float2*)(to + 8 * n) = make_float2(o[j / 4][n][j / 2 % 2 * 2], o[j / 4][n][j / 2 % 2 * 2 + 1]);
            }
            __syncthreads();
            for (int i = threadIdx.x; i < 4 * WIDTH_V; i += THREADS) {
                float x = 0.f;
                UNROLL for (int w = 0; w < WARPS; w++) x += sums[w * 4 * WIDTH_V + i];
                if (4 * j + i / WIDTH_V < rows) s.parts[(part * rows + 4 * j) * WIDTH_V + i] = x;
            }
            __syncthreads();
        }
    }
}

constexpr int MERGING = 16;                               // warps
extern "C" __global__ void __launch_bounds__(32 * MERGING) merge(const __grid_constant__ Params p,
    const __grid_constant__ Split s) {
    __shared__ float tops[MERGING], sums[MERGING], outs[MERGING][WIDTH_V];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, group = p.h / p.h_kv, rows = group * p.n_q;
    const long long pair = blockIdx.x / rows;
    const int row = blockIdx.x % rows, batch = pair / p.h_kv, head = pair % p.h_kv * group + row / p.n_q,
        query = row % p.n_q;
    const float2* stats = s.stats + pair * s.units * rows + row;
    const float* parts = s.parts + (pair * s.units * rows + row) * WIDTH_V + 4 * lane;
    float top = -INF;
    for (int i = threadIdx.x; i < s.units; i += 32 * MERGING) top = fmaxf(top, stats[(long long)i * rows].x);
    UNROLL for (int hop = 16; hop; hop /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, hop));
    if (lane == 0) tops[warp] = top;
    __syncthreads();
    UNROLL for (int i = 0; i < MERGING; i++) top = fmaxf(top, tops[i]);
    const float sink = p.sink ? ((const float*)p.sink)[head] : -INF, sink2 = sink * LOG2E;
    top = fmaxf(top, sink2);
    const float base = top == -INF ? 0.f : top;
    float sum = 0.f, o[4] = {};
#pragma unroll 8
    for (int i = warp; i < s.units; i += MERGING) {
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
