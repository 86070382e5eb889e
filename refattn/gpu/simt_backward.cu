// Attention backward on the CUDA cores, for every type and every option, without atomics: the same bits each time.
// Products, sums and exponentials are in float32 (float64 for float64 inputs).
//
//   P = exp(S - lse), dP = dout V^T, dS = P (dP - delta), delta = dout . out - dlse (backward.cu)
//   GRADIENT 0: dq = scale dS' K;  1: dk = scale dS'^T q and dv = P^T dout;  2: dbias = dS
// dS' is dS times the slope of the softcap, 1 - tanh^2.
//
// Steps
//  1. A block owns BLOCK_M query rows of one head (0), BLOCK_N keys of one key head (1), or a tile of dbias (2),
//     and walks the tiles of scores that it needs: those of other keys; of other rows, for all heads of the group;
//     of what the bias is spread over. p.row_keys and its sums over 16 rows tell which tiles band and sequences
//     hide; they are not loaded.
//  2. Q, dout, K and V tiles lie row-major in shared memory, in the type of the sums, rows padded by 16 bytes. A
//     thread of the 16 x 16 holds rows ty + 16 i and keys tx + 16 j of S and dP in registers, and makes P and dS.
//  3. 0, 1: P and dS go to shared memory, and the second products add to registers, a tile's sum first: sums of n
//     numbers pass through BLOCK + n / BLOCK additions, not n. 2: dS adds to registers.
//  4. 2: the splits of a tile's work go to p.parts, which backward.cu adds up.
//  5. Repair: with `redo`, set by another kernel, only marked tiles are computed, and unmarked. Few blocks look at all.
//
// A key that a row does not see gets the weights -0. If a tile with such keys holds a NaN or an infinity, these are
// skipped instead of multiplied.
//
// Macros: T; D_K, D_V: padded to multiples of 32; BLOCK_M, BLOCK_N: multiples of 16; WARPS 8; MIN_BLOCKS; GRADIENT;
// features 0 | 1: BITMASK, BLOCKS, SOFTCAP; BIAS: type of the bias, not defined without one.
// Launch: block 256, grid (0) row tiles * h * b, (1) key tiles * h_kv * b, (2) tiles of dbias * splits.

#include "backward.cuh"
#include "simt_tiles.cuh"

// a thread's part
[[maybe_unused]] constexpr int SIDE = 16, RI = BLOCK_M / SIDE, KJ = BLOCK_N / SIDE, CK = D_K / SIDE, CV = D_V / SIDE;
constexpr int STRIDE_K = D_K + VEC, STRIDE_V = D_V + VEC, STRIDE_S = BLOCK_N + VEC;
DEVICE float exponential(float x) { return exp2_float(x * (float)LOG2E); }
DEVICE double exponential(double x) { return exp(x); }

struct Tiles { Acc *q, *dout, *k, *v, *p, *ds, *lse, *delta; int2* keys; };
struct Scores { Acc p[RI][KJ], ds[RI][KJ]; };

// s[i][j] += a_i . b_j over `width` columns; a, b: the thread's first row of each.
template <int STRIDE> DEVICE void dots(Acc (&s)[RI][KJ], const Acc* a, const Acc* b, int width) {
#pragma unroll 1
    for (int d = 0; d < width; d += VEC) {
        Vector<VEC> x[RI];
        UNROLL for (int i = 0; i < RI; i++) x[i] = *(const Vector<VEC>*)(a + SIDE * i * STRIDE + d);
        UNROLL for (int j = 0; j < KJ; j++) {
            const Vector<VEC> y = *(const Vector<VEC>*)(b + SIDE * j * STRIDE + d);
            UNROLL for (int e = 0; e < VEC; e++)
                UNROLL for (int i = 0; i < RI; i++) s[i][j] = fma(x[i].x[e], y.x[e], s[i][j]);
        }
    }
}
// total[i][c] += sum over `count` of w[.. + SIDE i][.] x[.][c]; w's element (i, j) lies at i * ROW + j * STEP.
template <int PARTS, int COLUMNS, int ROW, int STEP, int STRIDE>
DEVICE void gather(Acc (&total)[PARTS][COLUMNS], const Acc* w, const Acc* x, int count, bool careful) {
    Acc sum[PARTS][COLUMNS] = {};
#pragma unroll 2
    for (int j = 0; j < count; j++) {
        Acc a[PARTS];
        UNROLL for (int i = 0; i < PARTS; i++) a[i] = w[SIDE * i * ROW + j * STEP];
        UNROLL for (int c = 0; c < COLUMNS; c += 2) {
            const Vector<2> y = *(const Vector<2>*)(x + j * STRIDE + SIDE * c);
            UNROLL for (int i = 0; i < PARTS; i++)
                UNROLL for (int e = 0; e < 2; e++)
                    if (!careful || !is_unseen(a[i])) sum[i][c + e] = fma(a[i], y.x[e], sum[i][c + e]);
        }
    }
    UNROLL for (int i = 0; i < PARTS; i++)
        UNROLL for (int c = 0; c < COLUMNS; c++) total[i][c] += sum[i][c];
}
// Does a tile hold a NaN or an infinity? The thread's part of it.
DEVICE bool any_nonfinite(const Acc* tile, int rows, int width, int stride) {
    Acc sum = 0;                                          // 0 * x is 0, or NaN
    for (int i = threadIdx.x; i < rows * width; i += THREADS) sum = fma(tile[i / width * stride + i % width], (Acc)0,
        sum);
    return !(sum == 0);
}
DEVICE void load_rows(const Tiles& t, const Params& p, int batch, int head, int m0) {
    const T* q = (const T*)p.q.data + batch * p.q.b + head * p.q.h + m0 * p.q.n;
    const T* dout = (const T*)p.dout.data + batch * p.dout.b + head * p.dout.h + m0 * p.dout.n;
    const Array &a = p.q, &b = p.dout;
    load_tile<BLOCK_M, D_K, STRIDE_K>(t.q, q, a.n, p.n_q - m0, p.d_k, is_aligned(a.data, p.d_k, a.b, a.h, a.n));
    load_tile<BLOCK_M, D_V, STRIDE_V>(t.dout, dout, b.n, p.n_q - m0, p.d_v, is_aligned(b.data, p.d_v, b.b, b.h, b.n));
    for (int r = threadIdx.x; r < BLOCK_M; r += THREADS) {
        const bool here = m0 + r < p.n_q;
        const long long i = min(m0 + r, p.n_q - 1);
        t.keys[r] = here ? p.row_keys[i] : make_int2(NEVER, -1);
        t.lse[r] = ((const Acc*)p.lse.data)[batch * p.lse.b + head * p.lse.h + i * p.lse.n];
        t.delta[r] = ((const Acc*)p.delta.data)[batch * p.delta.b + head * p.delta.h + i];
    }
}
DEVICE void load_keys(const Tiles& t, const Params& p, int batch, int head_kv, int n0) {
    const T* k = (const T*)p.k.data + batch * p.k.b + head_kv * p.k.h + n0 * p.k.n;
    const T* v = (const T*)p.v.data + batch * p.v.b + head_kv * p.v.h + n0 * p.v.n;
    const Array &a = p.k, &b = p.v;
    load_tile<BLOCK_N, D_K, STRIDE_K>(t.k, k, a.n, p.n_k - n0, p.d_k, is_aligned(a.data, p.d_k, a.b, a.h, a.n));
    load_tile<BLOCK_N, D_V, STRIDE_V>(t.v, v, b.n, p.n_k - n0, p.d_v, is_aligned(b.data, p.d_v, b.b, b.h, b.n));
}
// Does band, sequence and block mask hide a whole tile? All threads get the answer.
DEVICE bool hidden(const Params& p, int4 keys, int batch, int head, int m0, int n0) {
    if (keys.x > n0 + BLOCK_N - 1 || keys.w < n0) return true;
#if BLOCKS
    const unsigned char* blocks = (const unsigned char*)p.blocks.data + batch * p.blocks.b + head * p.blocks.h;
    const int q0 = m0 / p.block_q, q_count = (min(m0 + BLOCK_M, p.n_q) - 1) / p.block_q - q0 + 1;
    const int k0 = n0 / p.block_k, k_count = (min(n0 + BLOCK_N, p.n_k) - 1) / p.block_k - k0 + 1;
    bool any = false;
    for (int i = threadIdx.x; i < q_count * k_count; i += THREADS)
        any |= blocks[(q0 + i / k_count) * p.blocks.n + (k0 + i % k_count) * p.blocks.m];
    return !__syncthreads_or(any);
#else
    return false;
#endif
}
// Does every row of a tile see every key?
DEVICE bool whole(int4 keys, int n0) {
#ifdef BIAS
    return false;
#else
    return !BITMASK && !BLOCKS && keys.y <= n0 && keys.z >= n0 + BLOCK_N - 1;
#endif
}
// P and dS of a tile: `raw`, dS by the scores before the bias; else by those after it.
DEVICE void scores(Scores& x, const Tiles& t, const Params& p, int batch, int head, int m0, int n0, bool raw) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    UNROLL for (int i = 0; i < RI; i++)
        UNROLL for (int j = 0; j < KJ; j++) x.p[i][j] = x.ds[i][j] = 0;
    dots<STRIDE_K>(x.p, t.q + ty * STRIDE_K, t.k + tx * STRIDE_K, D_K);
    dots<STRIDE_V>(x.ds, t.dout + ty * STRIDE_V, t.v + tx * STRIDE_V, D_V);
    const Acc scale = (Acc)(SOFTCAP ? p.scale / p.softcap : p.scale), cap = (Acc)p.softcap;
    UNROLL for (int i = 0; i < RI; i++) {
        const int r = ty + SIDE * i;
        const int2 keys = t.keys[r];
        [[maybe_unused]] const long long row = min(m0 + r, p.n_q - 1);
        const Acc lse = t.lse[r], delta = t.delta[r];
        UNROLL for (int j = 0; j < KJ; j++) {
            const int key = n0 + tx + SIDE * j;
            bool seen = key >= keys.x && key <= keys.y;
            Acc s = x.p[i][j] * scale, slope = 1;
            if (SOFTCAP) {
                const Acc c = tanh(s);
                slope = fma(-c, c, (Acc)1), s = cap * c;
            }
#ifdef BIAS
            Acc b = 0;
            if (seen) b = to_sum(((const BIAS*)p.bias.data)[batch * p.bias.b + head * p.bias.h + row * p.bias.n
                + key * p.bias.m]);
            seen = seen && b != -infinity((Acc)0);
            s += b;
#endif
#if BITMASK
            const u32* bits = (const u32*)p.mask.data + batch * p.mask.b + head * p.mask.h + row * p.mask.n;
            seen = seen && (bits[key / 32] >> (key & 31) & 1);
#endif
#if BLOCKS
            const unsigned char* blocks = (const unsigned char*)p.blocks.data + batch * p.blocks.b + head * p.blocks.h;
            seen = seen && blocks[row / p.block_q * p.blocks.n + key / p.block_k * p.blocks.m];
#endif
            const Acc weight = exponential(s - lse), ds = weight * (x.ds[i][j] - delta) * (raw ? slope : (Acc)1);
            x.p[i][j] = seen ? weight + 0 : -(Acc)0;
            x.ds[i][j] = seen ? ds + 0 : -(Acc)0;         // -0 is left to what is not seen
        }
    }
}
template <int PARTS, int COLUMNS>
DEVICE void store(const Array& to, int batch, int head, int first, int n, int d, Acc (&x)[PARTS][COLUMNS], Acc factor) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    T* data = (T*)to.data + batch * to.b + head * to.h;
    UNROLL for (int i = 0; i < PARTS; i++) {
        const int row = first + ty + SIDE * i;
        UNROLL for (int c = 0; c < COLUMNS; c++) {
            const int column = 2 * tx + SIDE * (c - c % 2) + c % 2;
            if (row < n && column < d) put(data + row * to.n + column, x[i][c] * factor);
        }
    }
}
// A repair: is the tile marked? Then it is unmarked.
DEVICE bool wanted(const Params& p, long long head, int first, int count, int n) {
    if (!p.redo) return true;
    unsigned char* redo = p.redo + head * ((n + GRANULE - 1) / GRANULE) + first / GRANULE;
    const bool found = threadIdx.x < count / GRANULE && first + threadIdx.x * GRANULE < n && redo[threadIdx.x];
    if (!__syncthreads_or(found)) return false;
    if (found) redo[threadIdx.x] = 0;
    return true;
}

DEVICE void gradient(const Params& p, int block, unsigned char* shared) {
    Tiles t;
    t.q = (Acc*)shared, t.dout = t.q + BLOCK_M * STRIDE_K, t.k = t.dout + BLOCK_M * STRIDE_V,
        t.v = t.k + BLOCK_N * STRIDE_K;
    t.p = t.v + BLOCK_N * STRIDE_V, t.ds = t.p + (GRADIENT == 1 ? BLOCK_M * STRIDE_S : 0);
    t.lse = t.ds + BLOCK_M * STRIDE_S, t.delta = t.lse + BLOCK_M, t.keys = (int2*)(t.delta + BLOCK_M);
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE, group = p.h / p.h_kv;
    [[maybe_unused]] const int row_tiles = (p.n_q + BLOCK_M - 1) / BLOCK_M, key_tiles = (p.n_k + BLOCK_N - 1) / BLOCK_N;
    Scores x;
#if GRADIENT == 0
    const int m0 = (row_tiles - 1 - block % row_tiles) * BLOCK_M;   // under a causal mask the last rows see most
    const int head = block / row_tiles % p.h, batch = block / row_tiles / p.h;
    if (!wanted(p, batch * (long long)p.h + head, m0, BLOCK_M, p.n_q)) return;
    Acc dq[RI][CK] = {};
    const int4 keys = keys_of(p.granule_keys, m0, BLOCK_M, p.n_q);
    load_rows(t, p, batch, head, m0);
    for (int n0 = keys.x / BLOCK_N * BLOCK_N; n0 <= keys.w; n0 += BLOCK_N) {
        if (hidden(p, keys, batch, head, m0, n0)) continue;
        __syncthreads();                                  // all have done with the last tile
        load_keys(t, p, batch, head / group, n0);
        copy_commit(), copy_wait<0>();
        __syncthreads();
        scores(x, t, p, batch, head, m0, n0, true);
        UNROLL for (int i = 0; i < RI; i++)
            UNROLL for (int j = 0; j < KJ; j++) t.ds[(ty + SIDE * i) * STRIDE_S + tx + SIDE * j] = x.ds[i][j];
        const bool careful = __syncthreads_or(!whole(keys, n0) && any_nonfinite(t.k, BLOCK_N, D_K, STRIDE_K));
        gather<RI, CK, STRIDE_S, 1, STRIDE_K>(dq, t.ds + ty * STRIDE_S, t.k + 2 * tx, BLOCK_N, careful);
    }
    store(p.dq, batch, head, m0, p.n_q, p.d_k, dq, (Acc)p.scale);
#elif GRADIENT == 1
    const int n0 = block % key_tiles * BLOCK_N, head_kv = block / key_tiles % p.h_kv;
    const int batch = block / key_tiles / p.h_kv;
    if (!wanted(p, batch * (long long)p.h_kv + head_kv, n0, BLOCK_N, p.n_k)) return;
    Acc dk[KJ][CK] = {}, dv[KJ][CV] = {};
    const int2 rows = rows_of(p.granule_rows, n0, BLOCK_N, p.n_k);
    load_keys(t, p, batch, head_kv, n0);
    for (int head = head_kv * group; head < (head_kv + 1) * group; head++)
        for (int m0 = rows.x / BLOCK_M * BLOCK_M; m0 <= rows.y; m0 += BLOCK_M) {
            const int4 keys = keys_of(p.granule_keys, m0, BLOCK_M, p.n_q);
            if (hidden(p, keys, batch, head, m0, n0)) continue;
            __syncthreads();
            load_rows(t, p, batch, head, m0);
            copy_commit(), copy_wait<0>();
            __syncthreads();
            scores(x, t, p, batch, head, m0, n0, true);
            UNROLL for (int i = 0; i < RI; i++)
                UNROLL for (int j = 0; j < KJ; j++) {
                    t.p[(ty + SIDE * i) * STRIDE_S + tx + SIDE * j] = x.p[i][j];
                    t.ds[(ty + SIDE * i) * STRIDE_S + tx + SIDE * j] = x.ds[i][j];
                }
            bool odd = !whole(keys, n0);
            odd = odd && (any_nonfinite(t.q, BLOCK_M, D_K, STRIDE_K) || any_nonfinite(t.dout, BLOCK_M, D_V, STRIDE_V));
            const bool careful = __syncthreads_or(odd);
            gather<KJ, CK, 1, STRIDE_S, STRIDE_K>(dk, t.ds + ty, t.q + 2 * tx, BLOCK_M, careful);
            gather<KJ, CV, 1, STRIDE_S, STRIDE_V>(dv, t.p + ty, t.dout + 2 * tx, BLOCK_M, careful);
        }
    store(p.dk, batch, head_kv, n0, p.n_k, p.d_k, dk, (Acc)p.scale);
    store(p.dv, batch, head_kv, n0, p.n_k, p.d_v, dv, (Acc)1);
#else
    // the tile of dbias, and what it is summed over: all of an axis that the bias is spread along, else one
    const Array& to = p.dbias;
    long long tile = block / p.splits;
    const int split = block % p.splits;
    auto take = [&](bool own, int n) { const int i = own ? (int)(tile % n) : 0; tile = own ? tile / n : tile; return i;
        };
    const int key0 = take(to.m, key_tiles), row0 = take(to.n, row_tiles), head0 = take(to.h, p.h), batch0 = take(to.b,
        p.b);
    const int keys_n = to.m ? 1 : key_tiles, rows_n = to.n ? 1 : row_tiles, heads_n = to.h ? 1 : p.h,
        batches_n = to.b ? 1 : p.b;
    const long long work = (long long)keys_n * rows_n * heads_n * batches_n;
    Acc sum[RI][KJ] = {};
    for (long long at = work * split / p.splits; at < work * (split + 1) / p.splits; at++) {
        const int n0 = (key0 + (int)(at % keys_n)) * BLOCK_N, m0 = (row0 + (int)(at / keys_n % rows_n)) * BLOCK_M;
        const int head = head0 + (int)(at / keys_n / rows_n % heads_n),
            batch = batch0 + (int)(at / keys_n / rows_n / heads_n);
        if (hidden(p, keys_of(p.granule_keys, m0, BLOCK_M, p.n_q), batch, head, m0, n0)) continue;
        __syncthreads();
        load_rows(t, p, batch, head, m0);
        load_keys(t, p, batch, head / group, n0);
        copy_commit(), copy_wait<0>();
        __syncthreads();
        scores(x, t, p, batch, head, m0, n0, false);
        UNROLL for (int i = 0; i < RI; i++)
            UNROLL for (int j = 0; j < KJ; j++) sum[i][j] += x.ds[i][j];
    }
    __syncthreads();
    UNROLL for (int i = 0; i < RI; i++)
        UNROLL for (int j = 0; j < KJ; j++) t.ds[(ty + SIDE * i) * STRIDE_S + tx + SIDE * j] = sum[i][j];
    __syncthreads();
    const long long n_keys = to.m ? p.n_k : 1, n_rows = to.n ? p.n_q : 1, n_heads = to.h ? p.h : 1,
        n_batches = to.b ? p.b : 1;
    const int keys = to.m ? BLOCK_N : 1, rows = to.n ? BLOCK_M : 1;
    for (int i = threadIdx.x; i < rows * keys; i += THREADS) {
        const int r = i / keys, c = i % keys, row = row0 * BLOCK_M + r, key = key0 * BLOCK_N + c;
        if (row >= n_rows || key >= n_keys) continue;
        Acc total = 0;
        for (int a = r; a < (to.n ? r + 1 : BLOCK_M); a++)
            for (int b = c; b < (to.m ? c + 1 : BLOCK_N); b++) total += t.ds[a * STRIDE_S + b];
        const long long place = ((batch0 * n_heads + head0) * n_rows + row) * n_keys + key;
        ((Acc*)p.parts)[split * (n_batches * n_heads * n_rows * n_keys) + place] = total;
    }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) backward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int n = GRADIENT ? p.n_k : p.n_q, heads = GRADIENT ? p.h_kv : p.h;
    if (p.redo && !any_marked(p.redo, (n + GRANULE - 1) / GRANULE * (long long)heads * p.b)) return;
    for (int block = blockIdx.x;; block += gridDim.x) {
        gradient(p, block, shared);
        if (!p.redo) return;
        const int size = GRADIENT ? BLOCK_N : BLOCK_M;    // few blocks look at all tiles of a repair
        if (block + gridDim.x >= (n + size - 1) / size * heads * p.b) return;
    }
}
