// Attention forward on tensor cores by mma.sync (sm_80 and later): out = softmax(scale Q K^T + ...) V and lse, 16-bit
// inputs.
//
// Steps
//  1. A block owns BLOCK_M query rows of one head; each of its WARPS warps owns M_TILES x 16 of them. Q goes to
//     shared memory.
//  2. The block walks the tiles of BLOCK_N keys, from the first to the last that causal order, the window and the
//     block mask leave. K and V tiles come by cp.async into swizzled shared memory. STAGES 2: tile t + 1 arrives
//     while t is computed, one barrier a tile. STAGES 1: V arrives during Q K^T and the next K during the rest, two
//     barriers a tile.
//  3. S = Q K^T by ldmatrix and mma m16n8k16, float32 accumulators in registers; softcap, bias and masks are applied
//     there.
//  4. Online softmax, base 2: p = 2^(c s - c max + OFFSET), c = scale log2 e. Row sums stay partial a lane until the
//     end. OFFSET moves P in the range of its type: up in float16, whose smallest numbers are not small; down in
//     bfloat16, so that sums of its largest values stay finite.
//  5. O += P V: the accumulator layout of S is the A operand layout, so P is packed in registers; V comes by
//     ldmatrix.trans.
//     ACCURACY_HIGH: P = hi + lo, two 16-bit parts, two mma: the rounding of P leaves the result.
//  6. Hidden keys: their scores become -inf, their p is 0. As 0 * NaN is NaN, a tile that is partly hidden is
//     searched for non-finite values of V while it is loaded; if there are any, they are added to the rows that see
//     them, then zeroed.
//  7. Epilogue: sum over lanes, sink, division; the tile goes out through shared memory in 16-byte stores.
//
// Macros: BF16 0|1; WIDTH_K, WIDTH_V: d_k, d_v padded to 32, 64, 96, 128, 192 or 256; WARPS, M_TILES, BLOCK_N
// (multiple of 32), STAGES, MIN_BLOCKS: the tiling; ALIGNED 0|1: pointers and strides of q, k, v, out are multiples
// of 16 bytes; ACCURACY_HIGH 0|1; CAUSAL, WINDOW, SOFTCAP, SINK, MASK, PACKED 0|1: the option is in use; BIAS 0, 1
// (type of the inputs), 2 (float); BLOCKS 0, 1 (bits packed by pack.cu, of multiples of BLOCK_M rows and BLOCK_N
// keys), 2 (bytes, of any size), 3 (as 1, but ints: 0 hidden, 1 whole, 2 + i seen by the bits of tile i of p.mask,
// (tiles, block_q, block_k / 32) words); PRESCALE 1: needed where scale <= 0.
//
// Launch: grid tiles * h * b with tiles = ceil(n_q / BLOCK_M), or n_q / BLOCK_M + sequences if PACKED (n_q, n_k:
// total rows; bias and mask are indexed by total rows and keys, too), block 32 * WARPS, dynamic shared memory
// mma.shared_bytes.

#include "params.cuh"
#include "mma_tiles.cuh"

// 8-column tiles of O
constexpr int NO = WIDTH_V / 8, WORDS = BLOCK_N / 32;
// the epilogue reuses Q
constexpr u32 Q_BYTES = BLOCK_M * 2 * (WIDTH_K > WIDTH_V ? WIDTH_K : WIDTH_V);
// UNSHIFT = 2^-OFFSET
constexpr float OFFSET = BF16 ? -16.f : 15.f, UNSHIFT = BF16 ? 65536.f : 1.f / 32768.f;
// BASE2: c = 1
constexpr bool HAS_RIGHT = CAUSAL || WINDOW, HAS_LEFT = WINDOW, BASE2 = SOFTCAP || BIAS || PRESCALE;

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 smem_q = shared_address(shared), smem_k = smem_q + Q_BYTES, smem_v = smem_k + STAGES * K_BYTES;
    const int lane = threadIdx.x & 31, warp_row = threadIdx.x / 32 * WARP_M, column = 2 * (lane & 3);

    // ---- the block's query rows: m0 .. m_last of sequence (batch, head); q_start, k_start: its place among packed
    // ones ----
    const int tiles = PACKED ? p.n_q / BLOCK_M + p.sequences : (p.n_q + BLOCK_M - 1) / BLOCK_M;
    int tile = blockIdx.x % tiles;
    if (HAS_RIGHT) tile = tiles - 1 - tile;  // long rows first
    const int head = blockIdx.x / tiles % p.h, batch = blockIdx.x / tiles / p.h, head_kv = head / (p.h / p.h_kv);
    int n_q = p.n_q, n_k = p.n_k, q_start = 0, k_start = 0;
#if PACKED
    int t_low = 0, t_high = p.sequences;  // sequence t takes slots cu_q[t] / BLOCK_M + t and on: always enough of them
    while (t_high - t_low > 1) {
        int t = (t_low + t_high) / 2;
        if (p.cu_q[t] / BLOCK_M + t <= tile) t_low = t;
        else t_high = t;
    }
    // wrong offsets stay inside the arrays
    auto offset = [](int x, int n) { return min(max(x, 0), n); };
    q_start = offset(p.cu_q[t_low], p.n_q), n_q = offset(p.cu_q[t_low + 1], p.n_q) - q_start;
    k_start = offset(p.cu_k[t_low], p.n_k), n_k = max(0, offset(p.cu_k[t_low + 1], p.n_k) - k_start);
    tile -= q_start / BLOCK_M + t_low;
#endif
    if (tile < 0 || n_q - 1 < (long long)tile * BLOCK_M) return;
    const int m0 = tile * BLOCK_M, m_count = min(BLOCK_M, n_q - m0);

    const u16* q = (const u16*)p.q + batch * p.q_b + head * p.q_h + (q_start + (long long)m0) * p.q_n;
    const u16* k = (const u16*)p.k + batch * p.k_b + head_kv * p.k_h + k_start * p.k_n;
    const u16* v = (const u16*)p.v + batch * p.v_b + head_kv * p.v_h + k_start * p.v_n;

    // ---- its keys: row m0 + r sees left + r <= j <= right + r ----
    const long long corner = m0 + (CAUSAL && p.causal == 1 ? 0ll : (long long)n_k - n_q);
    const int right = CAUSAL                   ? (int)clamp(corner, -BLOCK_M - 1, n_k)
                      : WINDOW && p.right >= 0 ? (int)clamp(corner + p.right, -BLOCK_M - 1, n_k)
                                               : n_k;
    const int left = HAS_LEFT && p.left >= 0 ? (int)clamp(corner - p.left, -BLOCK_M, n_k) : -BLOCK_M;
    const int key_end = HAS_RIGHT ? max(0, min(n_k, right + m_count)) : n_k, end = (key_end + BLOCK_N - 1) / BLOCK_N;
    const int first_tile = HAS_LEFT ? max(0, left) / BLOCK_N : 0;
#if BLOCKS == 1
    const u32* block_bits = (const u32*)p.blocks + batch * p.blocks_b + head * p.blocks_h + m0 / p.block_q * p.blocks_q;
    const int tiles_a_block = p.block_k / BLOCK_N;
    auto next_tile = [&](int t) {
        while (t < end) {
            const int block = t / tiles_a_block;
            const u32 rest = block_bits[block / 32] >> (block & 31);
            if (rest & 1) break;
            t = (rest ? block + __ffs(rest) - 1 : block / 32 * 32 + 32) * tiles_a_block;
        }
        return t;
    };
#elif BLOCKS == 3
    const int* blocks = (const int*)p.blocks + batch * p.blocks_b + head * p.blocks_h + m0 / p.block_q * p.blocks_q;
    const int tiles_a_block = p.block_k / BLOCK_N;
    auto next_tile = [&](int t) {
        const int count = (n_k + p.block_k - 1) / p.block_k;
        while (t < end) {
            const int block = t / tiles_a_block, mine = block + lane;
            const u32 seen = __ballot_sync(~0u, mine < count && blocks[min(mine, count - 1)]);
            if (seen & 1) break;
            t = (seen ? block + __ffs(seen) - 1 : block + 32) * tiles_a_block;
        }
        return t;
    };
#elif BLOCKS == 2
    const unsigned char* blocks = p.blocks + batch * p.blocks_b + head * p.blocks_h;
    bool partial = false;  // whether some block of the tile is 0
    auto next_tile = [&](int t) {
        const int low_q = m0 / p.block_q, high_q = (m0 + m_count - 1) / p.block_q;
        for (; t < end; t++) {
            const int low_k = t * BLOCK_N / p.block_k,
                      count_k = (min(n_k, (t + 1) * BLOCK_N) - 1) / p.block_k - low_k + 1;
            bool any = false, all = true;
            for (int i = lane; i < (high_q - low_q + 1) * count_k; i += 32) {
                bool on = blocks[(low_q + i / count_k) * p.blocks_q + low_k + i % count_k];
                any |= on, all &= on;
            }
            partial = !__all_sync(~0u, all);
            if (__any_sync(~0u, any)) break;
        }
        return t;
    };
#else
    auto next_tile = [&](int t) { return t; };
#endif
    auto load_k = [&](int t, int stage) {
        TileK::load<BLOCK_N>(smem_k + stage * K_BYTES, k + (long long)t * BLOCK_N * p.k_n, p.k_n, n_k - t * BLOCK_N,
                             p.d_k);
    };
    auto load_v = [&](int t, int stage) {
        TileV::load<BLOCK_N>(smem_v + stage * V_BYTES, v + (long long)t * BLOCK_N * p.v_n, p.v_n, n_k - t * BLOCK_N,
                             p.d_v);
    };

    // ---- registers ----
    // row 2 m + i of a lane: m * 16 + i * 8 + lane / 4 of its warp
    float o[M_TILES][NO][4], row_max[ROWS], row_sum[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) row_max[r] = -INF, row_sum[r] = 0;
    UNROLL for (int m = 0; m < M_TILES; m++)
        UNROLL for (int n = 0; n < NO; n++) o[m][n][0] = o[m][n][1] = o[m][n][2] = o[m][n][3] = 0;
    const float scale2 = (float)(p.scale * 1.4426950408889634), c = BASE2 ? 1.f : scale2;
    const int row0 = warp_row + lane / 4;  // the lane's row 0, from m0
    const u32 q_start0 = smem_q + TileK::chunk(warp_row + (lane & 15), lane >> 4);
    const u32 k_start0 = smem_k + TileK::chunk((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
    const u32 v_start0 = smem_v + TileV::chunk(lane & 15, lane >> 4);

    int t = next_tile(first_tile), stage = 0;
    if (t < end) {
        TileK::load<BLOCK_M>(smem_q, q, p.q_n, m_count, p.d_k);
        load_k(t, 0);
        if (STAGES == 2) load_v(t, 0);
    }
    while (t < end) {
        const int n0 = t * BLOCK_N;
        // ---- the tile's state: `masked`: some of its rows do not see some of its keys; `active`: this warp sees
        // some ----
        bool masked = MASK || BIAS || n0 + BLOCK_N > n_k || (HAS_RIGHT && n0 + BLOCK_N - 1 > right) ||
                      (HAS_LEFT && n0 < left + m_count - 1);
#if BLOCKS == 3
        const int kind = blocks[n0 / p.block_k];
        masked |= kind > 1;
#elif BLOCKS == 2
        const bool some_zero = partial;  // next_tile below moves `partial` on
        masked |= some_zero;
#endif
        const bool active = warp_row < m_count && !(HAS_RIGHT && n0 > right + warp_row + WARP_M - 1) &&
                            !(HAS_LEFT && n0 + BLOCK_N <= left + warp_row);
        bool bad = false;  // some hidden value may not be finite
        int next = t;
        auto arrive = [&](bool values) {  // everything asked for has come, for all threads
            copy_wait();
            if (values && (masked || ACCURACY_HIGH))
                bad = __syncthreads_or(TileV::scan<BLOCK_N, false>(smem_v + stage * V_BYTES));
            else __syncthreads();
        };
        arrive(STAGES == 2);
        if (STAGES == 2) {
            next = next_tile(t + 1);
            if (next < end) load_k(next, stage ^ 1), load_v(next, stage ^ 1);
        } else load_v(t, 0);

        // ---- S = Q K^T ----
        float s[M_TILES][NS][4];
        if (active) {
            UNROLL for (int m = 0; m < M_TILES; m++)
                UNROLL for (int n = 0; n < NS; n++) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
            UNROLL for (int i = 0; i < WIDTH_K / 16; i++) {
                u32 a[M_TILES][4], b[4];
                UNROLL for (int m = 0; m < M_TILES; m++)
                    load_matrix(a[m], TileK::step(q_start0, i) + m * 16 * WIDTH_K * 2);
                UNROLL for (int n = 0; n < NS; n += 2) {
                    load_matrix(b, TileK::step(k_start0 + stage * K_BYTES, i) + n * 8 * WIDTH_K * 2);
                    UNROLL for (int m = 0; m < M_TILES; m++) mma(s[m][n], a[m], b[0], b[1]),
                        mma(s[m][n + 1], a[m], b[2], b[3]);
                }
            }
        }
        if (STAGES == 1) {
            arrive(true);
            next = next_tile(t + 1);
            if (next < end) load_k(next, 0);
        }

        // ---- softcap, bias, masks ----
        if (active) {
#if SOFTCAP || PRESCALE || BIAS
            const float inner = SOFTCAP ? (float)(p.scale / p.softcap) : scale2,
                        outer = (float)(p.softcap * 1.4426950408889634);
            UNROLL for (int m = 0; m < M_TILES; m++) UNROLL for (int n = 0; n < NS; n++)
                UNROLL for (int e = 0; e < 4; e++) s[m][n][e] =
                    SOFTCAP ? outer * tanhf(s[m][n][e] * inner) : s[m][n][e] * inner;
#endif
            if (masked) {
                UNROLL for (int r = 0; r < ROWS; r++) {
                    const int row = row0 + r * 8;
                    const int last = min(n_k - 1, right + row) - n0 - column, first = left + row - n0 - column;
#if MASK || BIAS
                    // the row and the lane's first column among the total
                    const long long i = q_start + m0 + min(row, m_count - 1);
                    [[maybe_unused]] const long long j = (long long)k_start + n0 + column;
#endif
#if BLOCKS == 3
                    u32 bits[WORDS];
                    const long long line = max(kind - 2, 0) * (long long)p.block_q + (m0 + row) % p.block_q;
                    const u32* mask = p.mask + line * (p.block_k / 32) + n0 % p.block_k / 32;
                    UNROLL for (int w = 0; w < WORDS; w++) bits[w] = (kind > 1 ? mask[w] : ~0u) >> column;
#elif MASK
                    const u32* mask = p.mask + batch * p.mask_b + head * p.mask_h + i * p.mask_q;
                    u32 bits[WORDS + 1];
                    const int first_word = (k_start + n0) / 32, last_word = (p.n_k - 1) / 32,
                              shift = ((PACKED ? k_start + n0 : 0) & 31);
                    UNROLL for (int w = 0; w < WORDS + PACKED; w++) bits[w] = mask[min(first_word + w, last_word)];
                    UNROLL for (int w = 0; w < WORDS; w++) bits[w] =
                        (PACKED ? __funnelshift_r(bits[w], bits[w + 1], shift) : bits[w]) >> column;
#endif
#if BIAS
                    const BiasType* bias =
                        (const BiasType*)p.bias + batch * p.bias_b + head * p.bias_h + i * p.bias_q + j * p.bias_k;
                    const bool pairs =
                        p.bias_k == 1 && n0 + BLOCK_N <= n_k && (unsigned long long)bias % sizeof(BiasPair) == 0;
                    UNROLL for (int n = 0; n < NS; n++) {
                        float add[2] = {0, 0};
                        if (pairs) unpack(((const BiasPair*)bias)[4 * n], add);
                        else {
                            UNROLL for (int e = 0; e < 2; e++) if (8 * n + e <= last) add[e] =
                                value_of(bias[(8 * n + e) * p.bias_k]);
                        }
                        UNROLL for (int e = 0; e < 2; e++) {
                            float& x = s[r / 2][n][r % 2 * 2 + e];
                            x = add[e] == -INF ? -INF : x + add[e] * LOG2E;
                        }
                    }
#endif
                    UNROLL for (int n = 0; n < NS; n++)
                        UNROLL for (int e = 0; e < 2; e++) {
                            const int at = 8 * n + e;
                            float& x = s[r / 2][n][r % 2 * 2 + e];
                            bool seen = at <= last && !(HAS_LEFT && at < first);
#if MASK || BLOCKS == 3
                            seen = seen && (bits[n / 4] >> (n % 4 * 8 + e) & 1);
#endif
#if BLOCKS == 2
                            if (some_zero)
                                seen = seen && row < m_count &&
                                       blocks[(m0 + row) / p.block_q * p.blocks_q + (n0 + column + at) / p.block_k];
#endif
                            x = seen ? x : -INF;
                        }
                }
            }
        }

        // ---- values that are not finite: added to the rows that see them, then zeroed (rare) ----
        if (bad) {
            const u32 base = smem_v + stage * V_BYTES;
            if (active) {
                UNROLL for (int w = 0; w < WORDS; w++) {
                    u32 seen[ROWS];
                    UNROLL for (int r = 0; r < ROWS; r++) {
                        seen[r] = 0;
                        UNROLL for (int n = 0; n < 4; n++) UNROLL for (int e = 0; e < 2; e++) seen[r] |=
                            (s[r / 2][4 * w + n][r % 2 * 2 + e] != -INF ? 1u : 0u) << (8 * n + e);
                        seen[r] = quad_or(seen[r] << column);
                    }
#pragma unroll 1
                    for (int j = 0; j < 32; j++)
                        UNROLL for (int n = 0; n < NO; n++) {
                            u32 x = load_shared(base + TileV::chunk(32 * w + j, n) + 2 * column), odd = not_finite(x);
                            if (odd) {
                                UNROLL for (int r = 0; r < ROWS; r++) {
                                    if (seen[r] >> j & 1 && odd & 0x8000u) o[r / 2][n][r % 2 * 2] += lower_half(x);
                                    if (seen[r] >> j & 1 && odd >> 31) o[r / 2][n][r % 2 * 2 + 1] += upper_half(x);
                                }
                            }
                        }
                }
            }
            __syncthreads();
            TileV::scan<BLOCK_N, true>(base);
            __syncthreads();
        }

        if (active) {
            // ---- online softmax ----
            float top[ROWS];
            bool move = false;
            UNROLL for (int r = 0; r < ROWS; r++) {
                top[r] = -INF;
                UNROLL for (int n = 0; n < NS; n++) top[r] =
                    fmaxf(top[r], fmaxf(s[r / 2][n][r % 2 * 2], s[r / 2][n][r % 2 * 2 + 1]));
                top[r] = quad_max(top[r]);
                move |= top[r] > row_max[r];
            }
            if (__any_sync(~0u, move)) {
                UNROLL for (int r = 0; r < ROWS; r++) {
                    const float old = row_max[r];
                    row_max[r] = fmaxf(old, top[r]);
                    const float factor = row_max[r] == old || old == -INF ? 1.f : exp2_fast((old - row_max[r]) * c);
                    row_sum[r] *= factor;
                    UNROLL for (int n = 0; n < NO; n++) o[r / 2][n][r % 2 * 2] *= factor,
                        o[r / 2][n][r % 2 * 2 + 1] *= factor;
                }
            }
            UNROLL for (int r = 0; r < ROWS; r++) {
                const float shift = (row_max[r] == -INF ? 0.f : row_max[r] * c) - OFFSET;
                UNROLL for (int n = 0; n < NS; n++)
                    UNROLL for (int e = 0; e < 2; e++) {
                        float& x = s[r / 2][n][r % 2 * 2 + e];
                        x = exp2_fast(x * c - shift);
                        row_sum[r] += x;
                    }
            }

            // ---- O += P V ----
            UNROLL for (int i = 0; i < BLOCK_N / 16; i++) {
                u32 a[M_TILES][4], b[4];
#if ACCURACY_HIGH
                u32 rest[M_TILES][4];
#endif
                UNROLL for (int m = 0; m < M_TILES; m++)
                    UNROLL for (int e = 0; e < 4; e++) {
                        const float x = s[m][2 * i + e / 2][e % 2 * 2], y = s[m][2 * i + e / 2][e % 2 * 2 + 1];
                        a[m][e] = pack(x, y);
#if ACCURACY_HIGH
                        rest[m][e] = pack(x - lower_half(a[m][e]), y - upper_half(a[m][e]));
#endif
                    }
                UNROLL for (int n = 0; n < NO; n += 2) {
                    load_matrix_transposed(b, TileV::step(v_start0 + stage * V_BYTES, n / 2) + i * 16 * WIDTH_V * 2);
                    UNROLL for (int m = 0; m < M_TILES; m++) {
                        mma(o[m][n], a[m], b[0], b[1]), mma(o[m][n + 1], a[m], b[2], b[3]);
#if ACCURACY_HIGH
                        mma(o[m][n], rest[m], b[0], b[1]), mma(o[m][n + 1], rest[m], b[2], b[3]);
#endif
                    }
                }
            }
        }
        t = next;
        if (STAGES == 2) stage ^= 1;
    }

    // ---- epilogue ----
    __syncthreads();
    UNROLL for (int r = 0; r < ROWS; r++) {
        float sum = quad_sum(row_sum[r]) * UNSHIFT, top = row_max[r] * c, factor = UNSHIFT;  // top: base 2
#if SINK
        const float sink = ((const float*)p.sink)[head] * LOG2E, old = row_max[r] == -INF ? -INF : top;
        top = fmaxf(old, sink);
        const float shrink = old == -INF ? 1.f : exp2_fast(old - top);
        sum = sum * shrink + (sink == -INF ? 0.f : exp2_fast(sink - top));
        factor *= shrink;
#endif
        const float inverse = sum == 0 ? 0.f : factor / sum;
        const int row = row0 + 8 * r;
        if (p.lse && (lane & 3) == 0 && row < m_count)
            ((float*)p.lse)[batch * p.lse_b + head * p.lse_h + q_start + m0 + row] =
                sum == 0 ? -INF : (top + log2f(sum)) * LN2;
        UNROLL for (int n = 0; n < NO; n++)
            store_shared(smem_q + TileV::chunk(row, n) + 2 * column,
                         pack(o[r / 2][n][r % 2 * 2] * inverse, o[r / 2][n][r % 2 * 2 + 1] * inverse));
    }
    __syncwarp();
    u16* out = (u16*)p.out + batch * p.o_b + head * p.o_h + (q_start + (long long)m0) * p.o_n;
    for (int i = lane; i < WARP_M * TileV::CHUNKS; i += 32) {
        const int row = warp_row + i / TileV::CHUNKS, chunk = i % TileV::CHUNKS, count = min(8, p.d_v - 8 * chunk);
        if (row >= m_count || count <= 0) continue;
        const uint4 x = load_shared4(smem_q + TileV::chunk(row, chunk));
        u16* to = out + row * p.o_n + 8 * chunk;
        if (ALIGNED && count == 8) *(uint4*)to = x;
        else {
            const u32 words[4] = {x.x, x.y, x.z, x.w};
            UNROLL for (int e = 0; e < 8; e++)
                if (e < count) to[e] = (u16)(words[e / 2] >> (e % 2 * 16));
        }
    }
}
