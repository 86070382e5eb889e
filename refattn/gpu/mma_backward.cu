// Attention backward on tensor cores by mma.sync (sm_80 and later), 16-bit inputs, without atomics: the same bits
// each time.
//
//   P = exp(S - lse), dP = dout V^T, dS = P (dP - delta), delta = dout . out - dlse (backward.cu)
// One kernel gives the gradients of whatever X is. X is owned, Y passes by:
//   QUERY 1: X, X2 = q, dout; Y, Y2 = k, v.  dX = dq = scale dS' Y.
//   QUERY 0: X, X2 = k, v; Y, Y2 = q, dout.  dX = dk = scale dS'^T Y; dX2 = dv = P^T Y2.
// dS' is dS times the slope of the softcap, 1 - tanh^2.
//
// Steps
//  1. A block owns BLOCK_M rows of X and X2 in swizzled shared memory; each of its warps owns M_TILES x 16 of them.
//  2. It walks the tiles of BLOCK_N rows of Y, Y2 that band, sequences and block mask leave (for dk, dv: those of
//     all heads of the group). Tile t + 1 comes by cp.async while t is computed, one barrier a tile.
//  3. S = X Y^T and dP = X2 Y2^T by ldmatrix and mma m16n8k16, float32 accumulators; P and dS in the same
//     registers, softcap, bias and masks applied there.
//  4. The accumulator layout of S is the A operand layout: P and dS are rounded to the type of the inputs and
//     multiplied by Y2 and Y, which come by ldmatrix.trans.
//  5. Hidden keys: P and dS are 0. As 0 * NaN is NaN, a tile that is partly hidden is searched for non-finite
//     values; if there are any, the block marks its rows in `redo`, and simt_backward.cu computes them anew.
//
// Macros: BF16; WIDTH_K, WIDTH_V: 32, 64, 96 or 128; WARPS, M_TILES, BLOCK_N (multiple of 16), MIN_BLOCKS: the
// tiling; ALIGNED; QUERY; SOFTCAP, MASK, BLOCKS 0|1; BIAS 0, 1 (type of the inputs), 2 (float); DBIAS 0|1 (QUERY
// only): dbias, of the bias's type and spread along no axis, is written too; it is 0 where nothing is written.
//
// Launch: grid tiles * heads * b with tiles = ceil(rows of X / BLOCK_M), block 32 * WARPS, shared memory
// mma_backward.shared_bytes.

#include "backward.cuh"
#include "mma_tiles.cuh"

[[maybe_unused]] constexpr int NK = WIDTH_K / 8, NV = WIDTH_V / 8;
constexpr u32 X_BYTES = BLOCK_M * 2 * WIDTH_K, X2_BYTES = BLOCK_M * 2 * WIDTH_V,
    STAGE = K_BYTES + V_BYTES + 8 * BLOCK_N;
constexpr bool ALWAYS = MASK || BIAS || BLOCKS;           // every tile may be partly hidden

DEVICE void copy_async4(u32 dst, const void* src, bool valid) {  // 4 bytes, 0 where not valid
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(__cvta_generic_to_global(src)),
        "r"(valid ? 4 : 0) : "memory");
}
DEVICE float2 load_pair(u32 a) { float2 x; asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x),
    "=f"(x.y) : "r"(a) : "memory"); return x; }
template <bool VALUE> struct Flag { static constexpr bool value = VALUE; };
DEVICE void put(float* p, float x) { *p = x; }
DEVICE void put(u16* p, float x) { *p = (u16)pack(x, 0.f); }

// x[m][.] += A B^T, A: 16 M_TILES rows, B: BLOCK_N rows, both of WIDTH columns; a, b: the lane's addresses.
template <int WIDTH> DEVICE void dots(float (&x)[M_TILES][NS][4], u32 a, u32 b) {
    typedef Tile<WIDTH> Of;
    UNROLL for (int m = 0; m < M_TILES; m++)
        UNROLL for (int n = 0; n < NS; n++) x[m][n][0] = x[m][n][1] = x[m][n][2] = x[m][n][3] = 0;
    UNROLL for (int i = 0; i < WIDTH / 16; i++) {
        u32 from[M_TILES][4], with[4];
        UNROLL for (int m = 0; m < M_TILES; m++) load_matrix(from[m], Of::step(a, i) + m * 16 * WIDTH * 2);
        UNROLL for (int n = 0; n < NS; n += 2) {
            load_matrix(with, Of::step(b, i) + n * 8 * WIDTH * 2);
            UNROLL for (int m = 0; m < M_TILES; m++) mma(x[m][n], from[m], with[0], with[1]), mma(x[m][n + 1], from[m],
                with[2], with[3]);
        }
    }
}
// total += W B, W: what `dots` gives, rounded; B: BLOCK_N rows of WIDTH columns; b: the lane's address.
template <int WIDTH> DEVICE void gather(float (&total)[M_TILES][WIDTH / 8][4], const float (&w)[M_TILES][NS][4],
    u32 b) {
    typedef Tile<WIDTH> Of;
    UNROLL for (int i = 0; i < BLOCK_N / 16; i++) {
        u32 from[M_TILES][4], with[4];
        UNROLL for (int m = 0; m < M_TILES; m++)
            UNROLL for (int e = 0; e < 4; e++) from[m][e] = pack(w[m][2 * i + e / 2][e % 2 * 2],
                w[m][2 * i + e / 2][e % 2 * 2 + 1]);
        UNROLL for (int n = 0; n < WIDTH / 8; n += 2) {
            load_matrix_transposed(with, Of::step(b, n / 2) + i * 16 * WIDTH * 2);
            UNROLL for (int m = 0; m < M_TILES; m++) mma(total[m][n], from[m], with[0], with[1]), mma(total[m][n + 1],
                from[m], with[2], with[3]);
        }
    }
}
// Writes a warp's rows of a gradient, through its own rows of shared memory.
template <int WIDTH>
DEVICE void store(const Array& to, int batch, int head, int first, int n, int d, float (&x)[M_TILES][WIDTH / 8][4],
    float by, u32 shared) {
    typedef Tile<WIDTH> Of;
    const int lane = threadIdx.x & 31, warp_row = threadIdx.x / 32 * WARP_M;
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < WIDTH / 8; c++)
            store_shared(shared + Of::chunk(warp_row + r * 8 + lane / 4, c) + 4 * (lane & 3),
                pack(x[r / 2][c][r % 2 * 2] * by, x[r / 2][c][r % 2 * 2 + 1] * by));
    __syncwarp();
    u16* data = (u16*)to.data + batch * to.b + head * to.h;
    for (int i = lane; i < WARP_M * Of::CHUNKS; i += 32) {
        const int row = warp_row + i / Of::CHUNKS, chunk = i % Of::CHUNKS, count = min(8, d - 8 * chunk);
        if (first + row >= n || count <= 0) continue;
        const uint4 y = load_shared4(shared + Of::chunk(row, chunk));
        u16* at = data + (first + row) * to.n + 8 * chunk;
        if (ALIGNED && count == 8) *(uint4*)at = y;
        else {
            const u32 words[4] = {y.x, y.y, y.z, y.w};
            UNROLL for (int e = 0; e < 8; e++)
                if (e < count) at[e] = (u16)(words[e / 2] >> (e % 2 * 16));
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) backward(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 smem_x = shared_address(shared), smem_x2 = smem_x + X_BYTES, smem_y = smem_x2 + X2_BYTES;
    const int lane = threadIdx.x & 31, warp_row = threadIdx.x / 32 * WARP_M, column = 2 * (lane & 3),
        group = p.h / p.h_kv;
    const Array &ax = QUERY ? p.q : p.k, &ax2 = QUERY ? p.dout : p.v, &ay = QUERY ? p.k : p.q,
        &ay2 = QUERY ? p.v : p.dout;
    const int n_x = QUERY ? p.n_q : p.n_k, n_y = QUERY ? p.n_k : p.n_q, heads = QUERY ? p.h : p.h_kv;
    const int tiles = (n_x + BLOCK_M - 1) / BLOCK_M, head_x = blockIdx.x / tiles % heads,
        batch = blockIdx.x / tiles / heads;
    // long ones first, if causal
    const int tile = blockIdx.x % tiles, x0 = (QUERY ? tiles - 1 - tile : tile) * BLOCK_M;

    // ---- which tiles of Y: `count` of them for each head, from `first` on ----
    int4 keys = make_int4(0, 0, 0, 0);
    int2 range;
    if (QUERY) keys = keys_of(p.granule_keys, x0, BLOCK_M, n_x), range = make_int2(keys.x, keys.w);
    else range = rows_of(p.granule_rows, x0, BLOCK_M, n_x);
    const int first = range.x / BLOCK_N, count = range.y < range.x ? 0 : range.y / BLOCK_N - first + 1,
        total = QUERY ? count : count * group;
    auto head_of = [&](int t) { return QUERY ? head_x / group : head_x * group + t / count; };   // of Y
    auto place_of = [&](int t) { return (first + (QUERY ? t : t % count)) * BLOCK_N; };
    bool whole = false;                                   // all of the tile's rows see all of its keys
    auto next_tile = [&](int t) {
        for (; t < total; t++) {
            const int y0 = place_of(t);
            if (QUERY) whole = keys.y <= y0 && keys.z >= y0 + BLOCK_N - 1;
            else {
                const int4 seen = keys_of(p.granule_keys, y0, BLOCK_N, n_y);
                if (seen.x > x0 + BLOCK_M - 1 || seen.w < x0) continue;
                whole = seen.y <= x0 && seen.z >= x0 + BLOCK_M - 1;
            }
#if BLOCKS
            const int head = QUERY ? head_x : head_of(t), m0 = QUERY ? x0 : y0, n0 = QUERY ? y0 : x0;
            const unsigned char* blocks = (const unsigned char*)p.blocks.data + batch * p.blocks.b + head * p.blocks.h;
            const int q0 = m0 / p.block_q, q_count = (min(m0 + (QUERY ? BLOCK_M : BLOCK_N),
                p.n_q) - 1) / p.block_q - q0 + 1;
            const int k0 = n0 / p.block_k, k_count = (min(n0 + (QUERY ? BLOCK_N : BLOCK_M),
                p.n_k) - 1) / p.block_k - k0 + 1;
            bool any = false;
            for (int i = lane; i < q_count * k_count; i += 32) any |= blocks[(q0 + i / k_count) * p.blocks.n + (k0
                + i % k_count) * p.blocks.m];
            if (!__any_sync(~0u, any)) continue;
#endif
            break;
        }
        return t;
    };
    auto load = [&](int t, int stage) {
        const u32 to = smem_y + stage * STAGE;
        const int y0 = place_of(t), head = head_of(t);
        TileK::load<BLOCK_N>(to, (const u16*)ay.data + batch * ay.b + head * ay.h + y0 * ay.n, ay.n, n_y - y0, p.d_k);
        TileV::load<BLOCK_N>(to + K_BYTES, (const u16*)ay2.data + batch * ay2.b + head * ay2.h + y0 * ay2.n, ay2.n,
            n_y - y0, p.d_v);
        if (!QUERY && threadIdx.x < BLOCK_N) {            // lse and delta of the rows
            const int i = y0 + threadIdx.x;
            const float* lse = (const float*)p.lse.data + batch * p.lse.b + head * p.lse.h + i * p.lse.n;
            const float* delta = (const float*)p.delta.data + batch * p.delta.b + head * p.delta.h + i;
            const u32 at = to + K_BYTES + V_BYTES + 4 * threadIdx.x;
            copy_async4(at, i < n_y ? lse : (const float*)p.lse.data, i < n_y);
            copy_async4(at + 4 * BLOCK_N, i < n_y ? delta : (const float*)p.delta.data, i < n_y);
        }
    };

    // ---- registers ----
    float dx[M_TILES][NK][4], row_lse[ROWS], row_delta[ROWS];   // of queries, if they are X
#if !QUERY
    float dx2[M_TILES][NV][4];
#endif
    UNROLL for (int m = 0; m < M_TILES; m++) {
        UNROLL for (int n = 0; n < NK; n++) dx[m][n][0] = dx[m][n][1] = dx[m][n][2] = dx[m][n][3] = 0;
#if !QUERY
        UNROLL for (int n = 0; n < NV; n++) dx2[m][n][0] = dx2[m][n][1] = dx2[m][n][2] = dx2[m][n][3] = 0;
#endif
    }
    const int row0 = x0 + warp_row + lane / 4;            // the lane's row 0; row r is 8 r further
    if (QUERY) {
        UNROLL for (int r = 0; r < ROWS; r++) {
            const long long i = min(row0 + 8 * r, n_x - 1);
            row_lse[r] = LOG2E * ((const float*)p.lse.data)[batch * p.lse.b + head_x * p.lse.h + i * p.lse.n];
            row_delta[r] = ((const float*)p.delta.data)[batch * p.delta.b + head_x * p.delta.h + i];
        }
    }
    const float scale2 = (float)(p.scale * 1.4426950408889634);
    const u32 x_start = smem_x + TileK::chunk(warp_row + (lane & 15), lane >> 4),
        x2_start = smem_x2 + TileV::chunk(warp_row + (lane & 15), lane >> 4);
    const u32 y_start = TileK::chunk((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1),
        y2_start = TileV::chunk((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
    // for ldmatrix.trans
    [[maybe_unused]] const u32 y_rows = TileK::chunk(lane & 15, lane >> 4), y2_rows = TileV::chunk(lane & 15,
        lane >> 4);
    bool bad = false;                                     // some hidden value may not be finite

    int t = next_tile(0), stage = 0;
    if (t < total) {
        TileK::load<BLOCK_M>(smem_x, (const u16*)ax.data + batch * ax.b + head_x * ax.h + x0 * ax.n, ax.n, n_x - x0,
            p.d_k);
        TileV::load<BLOCK_M>(smem_x2, (const u16*)ax2.data + batch * ax2.b + head_x * ax2.h + x0 * ax2.n, ax2.n,
            n_x - x0, p.d_v);
        load(t, 0);
    }
    while (t < total) {
        const int y0 = place_of(t), head = QUERY ? head_x : head_of(t);   // of the queries
        const bool masked = ALWAYS || !whole;
        const u32 y = smem_y + stage * STAGE, y2 = y + K_BYTES, stats = y2 + V_BYTES + 4 * column;
        copy_wait();
        if (masked) bad |= (TileK::scan<BLOCK_N, false>(y) | (QUERY ? 0 : TileV::scan<BLOCK_N, false>(y2))) != 0;
        __syncthreads();
        const int next = next_tile(t + 1);
        if (next < total) load(next, stage ^ 1);

        float s[M_TILES][NS][4], ds[M_TILES][NS][4];
        dots<WIDTH_K>(s, x_start, y + y_start);
        dots<WIDTH_V>(ds, x2_start, y2 + y2_start);

        // ---- P and dS; `check`: of a tile of which something may be hidden ----
        auto weigh = [&](auto check) {
            constexpr bool CHECK = decltype(check)::value;
            UNROLL for (int n = 0; n < NS; n++) {
                float2 lse = make_float2(0.f, 0.f), delta = lse;
                if (!QUERY) lse = load_pair(stats + 32 * n), delta = load_pair(stats + 4 * BLOCK_N + 32 * n),
                    lse.x *= LOG2E, lse.y *= LOG2E;
                UNROLL for (int e = 0; e < 2; e++) {
                    const int at = y0 + column + 8 * n + e;   // of Y
                    int2 seen = make_int2(0, 0);
                    if (!QUERY && CHECK) seen = at < n_y ? p.row_keys[at] : make_int2(NEVER, -1);
                    UNROLL for (int r = 0; r < ROWS; r++) {
                        float &x = s[r / 2][n][r % 2 * 2 + e], &g = ds[r / 2][n][r % 2 * 2 + e];
                        const float l = QUERY ? row_lse[r] : e ? lse.y : lse.x,
                            d = QUERY ? row_delta[r] : e ? delta.y : delta.x;
                        float score, slope = 1.f;
                        if (SOFTCAP) {
                            const float c = tanhf(x * (float)(p.scale / p.softcap));
                            slope = fmaf(-c, c, 1.f), score = fmaf((float)(p.softcap * 1.4426950408889634), c, -l);
                        } else score = fmaf(x, scale2, -l);
                        bool on = true;
                        [[maybe_unused]] const int i = QUERY ? row0 + 8 * r : at, j = QUERY ? at : row0 + 8 * r;
                        if constexpr (CHECK) {
                            if (QUERY) seen = i < n_x ? p.row_keys[i] : make_int2(NEVER, -1);
                            on = j >= seen.x && j <= seen.y;
#if MASK
                            const u32* bits = (const u32*)p.mask.data + batch * p.mask.b + head * p.mask.h
                                + i * p.mask.n;
                            on = on && (bits[j / 32] >> (j & 31) & 1);
#endif
#if BLOCKS
                            const unsigned char* blocks = (const unsigned char*)p.blocks.data + batch * p.blocks.b
                                + head * p.blocks.h;
                            on = on && blocks[i / p.block_q * p.blocks.n + j / p.block_k * p.blocks.m];
#endif
#if BIAS
                            const BiasType* bias = (const BiasType*)p.bias.data + batch * p.bias.b + head * p.bias.h;
                            const float b = on ? value_of(bias[i * p.bias.n + j * p.bias.m]) : 0.f;
                            on = on && b != -INF;
                            score = fmaf(b, LOG2E, score);
#endif
                        }
                        const float weight = exp2_fast(score), grad = weight * (g - d);
#if DBIAS
                        if (i < p.n_q && j < p.n_k)
                            put((BiasType*)p.dbias.data + batch * p.dbias.b + head * p.dbias.h + i * p.dbias.n
                                + j * p.dbias.m, on ? grad : 0.f);
#endif
                        x = on ? weight : 0.f, g = on ? grad * slope : 0.f;
                    }
                }
            }
        };
        if constexpr (ALWAYS) weigh(Flag<true>());
        else if (masked) weigh(Flag<true>());
        else weigh(Flag<false>());
        // ---- dX2 += P Y2, dX += dS Y ----
#if !QUERY
        gather<WIDTH_V>(dx2, s, y2 + y2_rows);
#endif
        gather<WIDTH_K>(dx, ds, y + y_rows);
        t = next, stage ^= 1;
    }

    // ---- results ----
    __syncthreads();
    const Array& to = QUERY ? p.dq : p.dk;
    store<WIDTH_K>(to, batch, head_x, x0, n_x, p.d_k, dx, (float)p.scale, smem_x);
#if !QUERY
    store<WIDTH_V>(p.dv, batch, head_x, x0, n_x, p.d_v, dx2, 1.f, smem_x2);
#endif
    if (__syncthreads_or(bad) && p.redo && threadIdx.x < BLOCK_M / GRANULE && x0 + threadIdx.x * GRANULE < n_x)
        p.redo[(batch * (long long)heads + head_x) * ((n_x + GRANULE - 1) / GRANULE) + x0 / GRANULE + threadIdx.x] = 1;
}
