// Attention forward on the CUDA cores (no tensor cores): out = softmax(scores) V and lse, for every type and every
// option. Products, sums and softmax are in float32 (float64 for float64 inputs).
//
// Steps
//  1. A block owns BLOCK_M query rows of one head (of one packed sequence). It finds the tiles of BLOCK_N keys that
//     causal mask, window and block mask leave; hidden tiles are never loaded.
//  2. Q, K and V tiles lie row-major in shared memory, in the type of the sums; a row is padded by 16 bytes, so that
//     eight rows are read without bank conflicts. float32 and float64 arrive by cp.async, 16-bit types are converted
//     on the way.
//  3. S = Q K^T: a thread holds ROWS x KEYS scores in registers, and reads VEC = 16 bytes along d of each of its rows
//     and keys. V of this tile is loaded meanwhile.
//  4. Scale, softcap, bias, masks; online softmax. The eight threads of a row share its maximum by shuffles; the sum
//     is reduced at the end only. P goes to shared memory; a warp reads only the rows that it wrote.
//  5. O += P V: a thread holds ROWS x COLS outputs in registers. A tile's products are added up first, in the
//     registers of S: sums of n numbers pass through BLOCK_N + n / BLOCK_N additions, not n. K of the next tile is
//     loaded meanwhile.
//  6. Epilogue: sink, division by the sum, out and lse.
//  7. Repair: with `redo` (a byte for each 64 rows of a head's sequence, set by another kernel) only marked tiles are
//     computed, and unmarked. Sequence t's bytes begin at cu_q[t] / 64 + t. Few blocks look at all tiles.
//
// A key that a row does not see gets the score -inf and the weight -0. If a tile with such keys holds a NaN or an
// infinity in V, the weight -0 is skipped instead of multiplied (product_pv_seen). A seen score that is infinite
// makes its row NaN.
//
// Macros: T float16 | bfloat16 | float32 | float64; D_K, D_V: d_k, d_v padded to multiples of 16; ROWS (rows a
// thread), WARPS, BLOCK_N (multiple of 32), MIN_BLOCKS (blocks a multiprocessor); features 0 | 1: BAND (causal or
// window), BITMASK, BLOCKS, PACKED, SOFTCAP; BIAS: type of the bias, not defined without one. sink and lse are null
// or not at run time. Launch: block 32 * WARPS, grid (row tiles * h * b), or fewer for a repair; row
// tiles = ceil(n_q / BLOCK_M) (+ sequences if PACKED, an upper bound).

#include "params.cuh"
#include "simt_tiles.cuh"

// Scores are in units of log2 e, folded into the scale; with a bias (which may be as large as the type allows) and in
// float64 they are natural.
#ifdef BIAS
constexpr bool BIASED = true;
#else
constexpr bool BIASED = false;
#endif
constexpr bool NATURAL = BIASED || sizeof(Acc) == 8;
constexpr double UNIT = NATURAL ? 1.0 : LOG2E;
// weights are at most TINY: sums of the largest values stay finite
constexpr Acc TINY = (Acc)(1.0 / 65536), UNTINY = 65536;
DEVICE float exponential(float x) { return exp2_float(NATURAL ? x * (float)LOG2E : x); }
DEVICE double exponential(double x) { return exp(x); }

// ---- sizes -------------------------------------------------------------------------------------------------------
constexpr int BLOCK_M = 4 * ROWS * WARPS;               // a warp is 4 rows x 8 keys of threads
constexpr int KEYS = BLOCK_N / 8;                       // keys a thread
constexpr int COLS = D_V / 8;                           // columns of O a thread
constexpr int VEC_V = D_V % (8 * VEC) == 0 ? VEC : 2;   // columns of V read at once
constexpr int STRIDE_QK = D_K + VEC;                    // an odd number of 16 bytes: rows fall on different banks
constexpr int STRIDE_P = BLOCK_N + 8;                   // the 4 rows of a warp's store fall on different banks
constexpr int BYTES_O = ROWS * COLS * sizeof(Acc);
// P V takes O in so many parts of PART columns a thread, so
constexpr int PARTS = BYTES_O > 384 ? 4 : BYTES_O > 256 ? 2 : 1;
// that a tile's products fit in the registers beside O
constexpr int PART = (COLS / PARTS + VEC_V - 1) / VEC_V * VEC_V;
constexpr int STEPS_PV = PARTS == 1 ? 2 : 1;                       // unrolled steps of P V

// ---- the two products
// ----------------------------------------------------------------------------------------------------- Both add to
// their first argument. q, k: this thread's first row in the tiles of Q and K; its rows are 4 apart, its keys 8.
DEVICE void product_qk(Acc (&s)[ROWS][KEYS], const Acc* q, const Acc* k) {
#pragma unroll 2
    for (int d = 0; d < D_K; d += VEC) {
        Vector<VEC> a[ROWS];
        UNROLL for (int i = 0; i < ROWS; i++) a[i] = *(const Vector<VEC>*)(q + 4 * i * STRIDE_QK + d);
        UNROLL for (int j = 0; j < KEYS; j++) {
            Vector<VEC> b = *(const Vector<VEC>*)(k + 8 * j * STRIDE_QK + d);
            UNROLL for (int e = 0; e < VEC; e++)
                UNROLL for (int i = 0; i < ROWS; i++) s[i][j] = fma(a[i].x[e], b.x[e], s[i][j]);
        }
    }
}
// p: this thread's first row of P; v: its first column of V. Its columns come in groups of VEC_V, 8 * VEC_V apart;
// `first` is the first of this part.
DEVICE void product_pv(Acc (&o)[ROWS][PART], const Acc* p, const Acc* v, int first) {
#pragma unroll STEPS_PV
    for (int key = 0; key < BLOCK_N; key += VEC) {
        Vector<VEC> a[ROWS];
        UNROLL for (int i = 0; i < ROWS; i++) a[i] = *(const Vector<VEC>*)(p + 4 * i * STRIDE_P + key);
        UNROLL for (int e = 0; e < VEC; e++)
            UNROLL for (int c = 0; c < PART; c += VEC_V) {
                if (first + c >= COLS) break;
                Vector<VEC_V> b = *(const Vector<VEC_V>*)(v + (key + e) * D_V + 8 * (first + c));
                UNROLL for (int i = 0; i < ROWS; i++)
                    UNROLL for (int f = 0; f < VEC_V; f++) o[i][c + f] = fma(a[i].x[e], b.x[f], o[i][c + f]);
            }
    }
}
// The same, but the value of an unseen key is not touched. Rare, so it is written for size.
DEVICE void product_pv_seen(Acc (&o)[ROWS][PART], const Acc* p, const Acc* v, int first) {
#pragma unroll 1
    for (int key = 0; key < BLOCK_N; key++)
        UNROLL for (int i = 0; i < ROWS; i++) {
            Acc weight = p[4 * i * STRIDE_P + key];
            if (is_unseen(weight)) continue;
            UNROLL for (int c = 0; c < PART; c++) if (first + c < COLS) o[i][c] =
                fma(weight, v[key * D_V + 8 * (first + c - c % VEC_V) + c % VEC_V], o[i][c]);
        }
}
// Does the tile of V hold a NaN or an infinity? All threads get the answer.
DEVICE bool any_nonfinite(const Acc* v) {
    Acc sum = 0;                                          // 0 * x is 0, or NaN
#pragma unroll 4
    for (int i = threadIdx.x * VEC; i < BLOCK_N * D_V; i += THREADS * VEC) {
        Vector<VEC> x = *(const Vector<VEC>*)(v + i);
        UNROLL for (int e = 0; e < VEC; e++) sum = fma(x.x[e], (Acc)0, sum);
    }
    return __syncthreads_or(!(sum == 0));
}

// wrong offsets of sequences stay inside the arrays
DEVICE int clamp(int offset, int n) { return min(max(offset, 0), n); }

// ---- which keys a tile of rows sees ------------------------------------------------------------------------------
enum Tile { HIDDEN, PARTIAL, FULL };
// Does the block mask show any, or all, of the rows and keys of a tile? The threads share the look-ups.
DEVICE Tile blocks_of_tile(const Params& p, const unsigned char* blocks, int row, int rows, int key, int keys) {
    int q0 = row / p.block_q, q_count = (row + rows - 1) / p.block_q - q0 + 1;
    int k0 = key / p.block_k, k_count = (key + keys - 1) / p.block_k - k0 + 1;
    bool any = false, all = true;
    for (int i = threadIdx.x; i < q_count * k_count; i += THREADS) {
        bool computed = blocks[(q0 + i / k_count) * p.blocks_q + k0 + i % k_count];
        any |= computed, all &= computed;
    }
    return !__syncthreads_or(any) ? HIDDEN : __syncthreads_and(all) ? FULL : PARTIAL;
}

DEVICE void attend(const Params& p, u32 block, unsigned char* shared) {
    Acc* tile_q = (Acc*)shared;
    Acc* tile_k = tile_q + BLOCK_M * STRIDE_QK;
    Acc* tile_v = tile_k + BLOCK_N * STRIDE_QK;
    Acc* tile_p = tile_v + BLOCK_N * D_V;
    const Acc INF = infinity((Acc)0);

    // Which rows: the last rows come first, since they see the most keys under a causal mask. In 64 bits only where
    // needed.
    u32 row_tiles = (p.n_q + BLOCK_M - 1) / BLOCK_M + (PACKED ? p.sequences : 0);
    int row_tile = row_tiles - 1 - block % row_tiles;
    int head = block / row_tiles % p.h, batch = block / row_tiles / p.h, head_kv = head / (p.h / p.h_kv);
    int n_q = p.n_q, n_k = p.n_k, start_q = 0, start_k = 0, sequence = 0;
#if PACKED
    for (; sequence < p.sequences; sequence++) {
        start_q = clamp(p.cu_q[sequence], p.n_q);
        n_q = clamp(p.cu_q[sequence + 1], p.n_q) - start_q;
        int count = (max(0, n_q) + BLOCK_M - 1) / BLOCK_M;
        if (row_tile < count) break;
        row_tile -= count;
    }
    if (sequence == p.sequences) return;
    start_k = clamp(p.cu_k[sequence], p.n_k);
    n_k = max(0, clamp(p.cu_k[sequence + 1], p.n_k) - start_k);
#endif
    int row0 = row_tile * BLOCK_M, rows = min(BLOCK_M, n_q - row0);
    if (p.redo) {                                         // a repair (step 7)
        const int slots = (p.n_q + 63) / 64 + p.sequences, slot = start_q / 64 + sequence;
        unsigned char* redo = p.redo + (batch * p.h + head) * (long long)slots + slot + row0 / 64;
        int i = threadIdx.x, found = i < (rows + 63) / 64 && redo[i];
        if (!__syncthreads_or(found)) return;
        if (found) redo[i] = 0;
    }

    const T* q = (const T*)p.q + batch * p.q_b + head * p.q_h + (start_q + (long long)row0) * p.q_n;
    const T* k = (const T*)p.k + batch * p.k_b + head_kv * p.k_h + start_k * p.k_n;
    const T* v = (const T*)p.v + batch * p.v_b + head_kv * p.v_h + start_k * p.v_n;
    bool aligned_k = is_aligned(p.k, p.d_k, p.k_b, p.k_h, p.k_n),
         aligned_v = is_aligned(p.v, p.d_v, p.v_b, p.v_h, p.v_n);
#if BITMASK
    const u32* mask = p.mask + batch * p.mask_b + head * p.mask_h;
#endif
#if BLOCKS
    const unsigned char* blocks = p.blocks + batch * p.blocks_b + head * p.blocks_h;
#endif
#ifdef BIAS
    const BIAS* bias = (const BIAS*)p.bias + batch * p.bias_b + head * p.bias_h;
#endif
    constexpr bool SELECTIVE = BAND || BITMASK || BLOCKS || BIASED;   // rows of one tile may see different keys

    // Lanes: i and i ^ 1 read the same key, i and i ^ 2 the same row, so that a half warp's 16-byte reads take one
    // pass.
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int row_thread = warp * 4 * ROWS + (lane & 1) + (lane >> 4) * 2, key_thread = lane >> 1 & 7;
    const Acc* q_thread = tile_q + row_thread * STRIDE_QK;
    const Acc* k_thread = tile_k + key_thread * STRIDE_QK;
    const Acc* v_thread = tile_v + key_thread * VEC_V;
    Acc* p_thread = tile_p + row_thread * STRIDE_P;

    // Which tiles of keys.
    int first_key = 0, end_key = n_k;
    // causal mask and window: row i sees keys i + band_first .. i + band_last
    long long band_first = 0, band_last = 0;
    if (BAND) {
        long long corner = p.causal == 1 ? 0 : (long long)n_k - n_q, far = 1LL << 40;
        band_first = corner - (p.left < 0 ? far : p.left);
        band_last = corner + (p.causal ? 0 : p.right < 0 ? far : p.right);
        first_key = (int)min(max(row0 + band_first, 0LL), (long long)n_k);
        end_key = (int)min(max(row0 + rows + band_last, 0LL), (long long)n_k);
    }
    int tiles = (int)(((long long)end_key + BLOCK_N - 1) / BLOCK_N);
    Tile kind = HIDDEN;
    // From tile t on, the next one that is not hidden.
    auto next_tile = [&](int t) {
        for (; t < tiles; t++) {
            int key0 = t * BLOCK_N, keys = min(BLOCK_N, n_k - key0);
            kind = keys == BLOCK_N ? FULL : PARTIAL;
            if (BAND && (key0 < row0 + rows - 1 + band_first || key0 + BLOCK_N - 1 > row0 + band_last)) kind = PARTIAL;
#if BLOCKS
            Tile shown = blocks_of_tile(p, blocks, row0, rows, key0, keys);
            if (shown == HIDDEN) continue;
            if (shown == PARTIAL) kind = PARTIAL;
#endif
            break;
        }
        return t;
    };
    auto load_k = [&](int t) {
        int key0 = t * BLOCK_N;
        load_tile<BLOCK_N, D_K, STRIDE_QK>(tile_k, k + key0 * p.k_n, p.k_n, n_k - key0, p.d_k, aligned_k);
        copy_commit();
    };

    Acc o[ROWS][COLS] = {}, row_max[ROWS], row_sum[ROWS] = {};
    UNROLL for (int i = 0; i < ROWS; i++) row_max[i] = -INF;

    int tile = next_tile(first_key / BLOCK_N);
    if (tile < tiles) {
        load_tile<BLOCK_M, D_K, STRIDE_QK>(tile_q, q, p.q_n, rows, p.d_k, is_aligned(p.q, p.d_k, p.q_b, p.q_h, p.q_n));
        load_k(tile);
    }
    const Acc scale = (Acc)(SOFTCAP ? p.scale / p.softcap : p.scale * UNIT), cap = (Acc)(p.softcap * UNIT);
#pragma unroll 1
    while (tile < tiles) {
        int key0 = tile * BLOCK_N;
        const bool partial = BITMASK || BIASED || kind == PARTIAL;
        copy_wait<0>();
        // K is there for all; all have done with V and P of the last tile
        __syncthreads();
        load_tile<BLOCK_N, D_V, D_V>(tile_v, v + key0 * p.v_n, p.v_n, n_k - key0, p.d_v, aligned_v);
        copy_commit();

        Acc s[ROWS][KEYS] = {};
        product_qk(s, q_thread, k_thread);
        int first_row = row_thread;
        // else ptxas keeps the addresses of all rows in registers all along
        asm volatile("" : "+r"(first_row));
        UNROLL for (int i = 0; i < ROWS; i++) {
            UNROLL for (int j = 0; j < KEYS; j++) {
                s[i][j] = fma(s[i][j] * scale, (Acc)0, s[i][j] * scale);   // an infinite score makes the row NaN
                if (SOFTCAP) s[i][j] = cap * tanh(s[i][j]);
            }
            if (!partial) continue;
            // from, to: keys seen, less key0
            int row = row0 + min(first_row + 4 * i, rows - 1), from = 0, to = n_k - 1 - key0;
            if (BAND) {
                from = (int)min(max(row + band_first - key0, 0LL), (long long)BLOCK_N);
                to = (int)min(max(row + band_last - key0, -1LL), (long long)to);
            }
#ifdef BIAS
            const BIAS* bias_row = bias + (start_q + (long long)row) * p.bias_q;
#endif
#if BITMASK
            const u32* words = mask + (start_q + (long long)row) * p.mask_q;
#endif
#if BLOCKS
            const unsigned char* blocks_row = blocks + row / p.block_q * p.blocks_q;
#endif
            UNROLL for (int j = 0; j < KEYS; j++) {
                int offset = key_thread + 8 * j;
                long long key = min(key0 + offset, n_k - 1);
                bool seen = offset >= from && offset <= to;
#ifdef BIAS
                Acc b = (Acc)to_sum(bias_row[(start_k + key) * p.bias_k]);
                seen = seen && b != -INF;
                s[i][j] += b;
#endif
#if BITMASK
                seen = seen && (words[(start_k + key) / 32] >> (start_k + key) % 32 & 1);
#endif
#if BLOCKS
                seen = seen && blocks_row[(int)key / p.block_k];
#endif
                if (!seen) s[i][j] = -INF;
            }
        }

        // Online softmax.
        Acc shrink[ROWS];
        UNROLL for (int i = 0; i < ROWS; i++) {
            Acc top = row_max[i];
            UNROLL for (int j = 0; j < KEYS; j++) top = fmax(top, s[i][j]);
            UNROLL for (int hop = 2; hop < 16; hop *= 2) top = fmax(top, __shfl_xor_sync(~0u, top, hop));
            Acc base = top == -INF ? (Acc)0 : top;        // no key yet: all weights are exp(-inf)
            shrink[i] = exponential(row_max[i] - base);
            row_max[i] = top;
            Acc sum = 0;
            UNROLL for (int j = 0; j < KEYS; j++) {
                Acc weight = exponential(s[i][j] - base) * TINY;
                if (SELECTIVE && s[i][j] == -INF) weight = -(Acc)0;
                sum += weight;
                p_thread[4 * i * STRIDE_P + key_thread + 8 * j] = weight;
            }
            row_sum[i] = fma(row_sum[i], shrink[i], sum);
        }

        int next = next_tile(tile + 1);
        copy_wait<0>();
        __syncthreads();                                  // V is there for all, K is read by all, P is written
        if (next < tiles) load_k(next);
        const bool careful = SELECTIVE && partial && any_nonfinite(tile_v);
        UNROLL for (int first = 0; first < COLS; first += PART) {
            Acc products[ROWS][PART] = {};
            if (careful) product_pv_seen(products, p_thread, v_thread, first);
            else product_pv(products, p_thread, v_thread, first);
            UNROLL for (int i = 0; i < ROWS; i++)
                UNROLL for (int c = 0; c < PART; c++)
                    if (first + c < COLS) o[i][first + c] = fma(o[i][first + c], shrink[i], products[i][c]);
        }
        tile = next;
    }

    // Epilogue.
    T* out = (T*)p.out + batch * p.o_b + head * p.o_h + (start_q + (long long)row0) * p.o_n;
    Acc* lse = (Acc*)p.lse + batch * p.lse_b + head * p.lse_h + start_q + (long long)row0;
    UNROLL for (int i = 0; i < ROWS; i++) {
        int row = row_thread + 4 * i;
        Acc sum = row_sum[i], top = row_max[i];
        UNROLL for (int hop = 2; hop < 16; hop *= 2) sum += __shfl_xor_sync(~0u, sum, hop);
        Acc factor = UNTINY;
        sum *= UNTINY;
        if (p.sink) {
            Acc sink = ((const Acc*)p.sink)[head] * (Acc)UNIT;
            top = fmax(top, sink);
            Acc base = top == -INF ? (Acc)0 : top;
            Acc shrink = exponential(row_max[i] - base);
            sum = fma(sum, shrink, exponential(sink - base));
            factor *= shrink;
        }
        factor = sum == 0 ? (Acc)0 : factor / sum;
        if (row >= rows) continue;
        if (p.lse && key_thread == 0) lse[row] = sum == 0 ? -INF : (NATURAL ? top : top * (Acc)LN2) + log(sum);
        UNROLL for (int c = 0; c < COLS; c++) {
            int column = 8 * (c - c % VEC_V) + key_thread * VEC_V + c % VEC_V;
            if (column < p.d_v) put(out + row * p.o_n + column, o[i][c] * factor);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) unsigned char shared[];
    if (p.redo && !any_marked(p.redo, ((p.n_q + 63) / 64 + p.sequences) * (long long)p.h * p.b)) return;
    for (u32 block = blockIdx.x;; block += gridDim.x) {
        attend(p, block, shared);
        if (sizeof(Acc) == 8 || !p.redo) return;          // few blocks look at all tiles of a repair, of 16-bit types
        if (block + gridDim.x >= ((p.n_q + BLOCK_M - 1) / BLOCK_M + (PACKED ? p.sequences : 0)) * p.h * p.b) return;
    }
}
