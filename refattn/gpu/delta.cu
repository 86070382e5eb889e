// The gated delta rule forward on tensor cores by mma.sync (sm_80 and later), bfloat16, an alpha for each token or
// none: out and the last state.
//
//   S' = alpha_t S_(t-1),  S_t = S' + beta_t k_t^T (v_t - k_t S'),  out_t = scale q_t S_t;  sums and S are in float32.
//
// Steps (the WY form: the changes of 64 tokens are solved for together)
//  1. `delta_chunks`, a block a chunk: with L_ij the product of alpha after token j up to i, and below the diagonal
//     A_ij = beta_i (k_i k_j) L_ij, it makes W = (I + A)^-1 diag(beta) by substitution in float32, a thread a column,
//     and P_ij = (q_i k_j) L_ij, j up to i. Both are kept as two bfloat16 parts, with the decays g from the chunk's
//     start and those to its end. Products, not differences of logarithms: an alpha of 0 is no special case.
//  2. `gated_delta`, a block for 32 columns of the values of a head, goes through the chunks. Two warps solve: the
//     changes are U = W (V - g K S), and the state becomes g_end S + K^T (U L_end). Two warps read, one chunk later,
//     from a copy of the state that the same products make: out = g Q S + P U.
//  3. S, and what W meets, are multiplied as two bfloat16 numbers for each float32 one, so that U is known to float32's
//     precision or nearly; U is then rounded to bfloat16, once for out, and once, with its decay, for the state.
//
// All sums have a fixed order.
//
// Macros: BF16 1; WIDTH_K 64 | 128, WIDTH_V 32, WARPS 4, M_TILES 1, BLOCK_N 64, ALIGNED 1, BIAS 0: see mma_tiles.cuh;
// GATE 0 (no alpha) | 1. cu: offsets of packed sequences, or null. Launch: block 128; delta_chunks: grid slots * heads,
// gated_delta: grid sequences * heads * ceil(d_v / WIDTH_V); dynamic shared memory as delta_mma.py says.

#include "mma_tiles.cuh"
#include "recurrence_tiles.cuh"

struct Gate { const float* data; long long batch, head, row; };
struct Sizes { int heads, group, n, d_k, d_v, sequences; };

// What is kept of a chunk: W and P, high and low parts, as tiles in shared memory; g; the decays to the chunk's end.
constexpr u32 KEPT_BYTES = 4 * P_BYTES + 2 * 4 * CHUNK;
constexpr int STRIDE = CHUNK + 8;  // of a row of L and A

DEVICE const float* at(const Gate& x, const Place& p, int token) {
    return x.data + p.batch * x.batch + p.head * x.head + (p.offset + (long long)token) * x.row;
}
// Chunks of a sequence take slots from this one on: always enough of them.
DEVICE int first_slot(const Sizes& z, const int* cu, int sequence) {
    return cu ? cu[sequence] / CHUNK + sequence : sequence * ((z.n + CHUNK - 1) / CHUNK);
}
DEVICE unsigned char* kept_at(unsigned char* kept, const Sizes& z, int slot, int head) {
    return kept + (slot * (long long)z.heads + head) * KEPT_BYTES;
}
// Stores two numbers side by side in a tile and in that of what bfloat16 leaves of them.
DEVICE void store_parts(u32 tile, int row, int column, float x, float y) {
    const u32 high = pack(x, y), to = tile + TileP::chunk(row, column / 8) + column % 8 * 2;
    store_shared(to, high);
    store_shared(to + P_BYTES, pack(x - lower_half(high), y - upper_half(high)));
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
delta_chunks(const Tensor q, const Tensor k, const Gate alpha, const Gate beta, unsigned char* kept, const int* cu,
             Sizes z) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 smem = shared_address(shared);
    const u32 smem_q = smem, smem_k = smem + K_BYTES;  // later: W and P
    float* l = (float*)(shared + 4 * P_BYTES);
    float *g = l + CHUNK * STRIDE, *end = g + CHUNK, *a_s = end + CHUNK, *b_s = a_s + CHUNK;
    const int slot = blockIdx.x / z.heads;
    Place p;
    p.head = blockIdx.x % z.heads, p.head_kv = p.head / z.group, p.column = 0, p.width = 0;
    int low = 0, high = z.sequences;
    while (high - low > 1) {
        const int i = (low + high) / 2;
        if (first_slot(z, cu, i) <= slot) low = i;
        else high = i;
    }
    p.sequence = low, p.batch = cu ? 0 : low, p.offset = cu ? cu[low] : 0;
    p.tokens = (cu ? cu[low + 1] : z.n) - p.offset;
    const int first = (slot - first_slot(z, cu, low)) * CHUNK, count = min(CHUNK, p.tokens - first);
    if (count <= 0) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, column = 2 * (lane & 3);
    TileK::load<CHUNK>(smem_q, at(q, p, p.head, first, 0), q.row, count, z.d_k);
    TileK::load<CHUNK>(smem_k, at(k, p, p.head_kv, first, 0), k.row, count, z.d_k);
    if (threadIdx.x < CHUNK) {  // past the last token nothing fades or moves
        const bool here = (int)threadIdx.x < count;
        a_s[threadIdx.x] = GATE && here ? *at(alpha, p, first + threadIdx.x) : 1.f;
        b_s[threadIdx.x] = here ? *at(beta, p, first + threadIdx.x) : 0.f;
    }
    __syncthreads();
    if (threadIdx.x <= CHUNK) {  // a column of L; the last thread has the decays from the chunk's start
        const int j = (int)threadIdx.x < CHUNK ? (int)threadIdx.x : -1;
        float x = 1.f;
        for (int i = 0; i < CHUNK; i++) {
            if (i > j) x *= a_s[i];
            if (j < 0) g[i] = x;
            else l[i * STRIDE + j] = i >= j ? x : 0.f;
        }
        if (j >= 0) end[j] = x;
    }
    copy_wait();
    __syncthreads();
    float w[NS][4] = {}, a[NS][4] = {};  // Q K^T, K K^T: 16 rows a warp
    UNROLL for (int i = 0; i < WIDTH_K / 16; i++) {
        u32 x[4], y[4], b[4];
        load_matrix(x, TileK::step(smem_q + along_of<TileK>(lane), i) + warp * 32 * WIDTH_K);
        load_matrix(y, TileK::step(smem_k + along_of<TileK>(lane), i) + warp * 32 * WIDTH_K);
        UNROLL for (int j = 0; j < STEPS; j++)
            if (j <= warp) {
                load_matrix(b, TileK::step(smem_k + right_of<TileK>(lane), i) + j * 32 * WIDTH_K);
                mma(w[2 * j], x, b[0], b[1]), mma(w[2 * j + 1], x, b[2], b[3]);
                mma(a[2 * j], y, b[0], b[1]), mma(a[2 * j + 1], y, b[2], b[3]);
            }
    }
    __syncthreads();  // all have read Q and K
    const u32 tile_w = smem, tile_p = smem + 2 * P_BYTES;
    UNROLL for (int n = 0; n < NS; n++) UNROLL for (int h = 0; h < 2; h++) {
        const int i = 16 * warp + 8 * h + lane / 4, j = 8 * n + column;
        float* to = l + i * STRIDE + j;
        const float x = to[0], y = to[1];
        store_parts(tile_p, i, j, w[n][2 * h] * x, w[n][2 * h + 1] * y);
        to[0] = j < i ? b_s[i] * (a[n][2 * h] * x) : 0.f;
        to[1] = j + 1 < i ? b_s[i] * (a[n][2 * h + 1] * y) : 0.f;
    }
    __syncthreads();
    if (threadIdx.x < CHUNK) {  // column j of (I + A)^-1, times beta_j
        const int j = threadIdx.x;
        float x[CHUNK];
        UNROLL for (int i = 0; i < CHUNK; i++) {
            float sum[4] = {i == j ? 1.f : 0.f, 0.f, 0.f, 0.f};
            UNROLL for (int s = 0; s < i; s += 4) {
                const float4 y = *(const float4*)(l + i * STRIDE + s);
                sum[0] -= y.x * x[s];
                if (s + 1 < i) sum[1] -= y.y * x[s + 1];
                if (s + 2 < i) sum[2] -= y.z * x[s + 2];
                if (s + 3 < i) sum[3] -= y.w * x[s + 3];
            }
            x[i] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
        const float by = b_s[j];
        UNROLL for (int i = 0; i < CHUNK; i++) {
            const u32 to = TileP::chunk(i, j / 8) + j % 8 * 2, high = pack(x[i] * by, 0.f);
            *(u16*)(shared + to) = (u16)high;
            *(u16*)(shared + to + P_BYTES) = (u16)pack(x[i] * by - lower_half(high), 0.f);
        }
    }
    __syncthreads();
    uint4* to = (uint4*)kept_at(kept, z, slot, p.head);
    for (int i = threadIdx.x; i < (int)(4 * P_BYTES / 16); i += THREADS) to[i] = load_shared4(tile_w + 16 * i);
    float* decays = (float*)(to + 4 * P_BYTES / 16);
    if (threadIdx.x < CHUNK) decays[threadIdx.x] = g[threadIdx.x], decays[CHUNK + threadIdx.x] = end[threadIdx.x];
}

// Products with a tile's rows of 64 by 64 numbers that are 0 above the diagonal: o += a X^T.
DEVICE void by_lower(float (&o)[1][NS][4], const u32 (&a)[4], u32 tile, int i, int lane) {
    UNROLL for (int n = 2 * i; n < NS; n += 2) {
        u32 b[4];
        load_matrix(b, TileP::step(tile + right_of<TileP>(lane), i) + n * 16 * CHUNK);
        mma(o[0][n], a, b[0], b[1]), mma(o[0][n + 1], a, b[2], b[3]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
gated_delta(const Tensor q, const Tensor k, const Tensor v, const Tensor out, const float* start, float* last,
            unsigned char* kept, const int* cu, Sizes z, float scale) {
    extern __shared__ __align__(1024) unsigned char shared[];
    // stages: K and decays 3, Q, V, W and P 2; then the changes, in two parts, of each pair of warps
    const u32 smem_q = shared_address(shared), smem_k = smem_q + 2 * K_BYTES, smem_v = smem_k + 3 * K_BYTES,
              smem_w = smem_v + 2 * V_BYTES, smem_p = smem_w + 4 * P_BYTES, smem_u = smem_p + 4 * P_BYTES,
              smem_g = smem_u + 2 * 2 * STEPS * 2 * 32 * 16;
    const float* decays = (const float*)(shared + (smem_g - smem_q));
    const Place p = place_of(z, cu, blockIdx.x);
    const int lane = threadIdx.x & 31, pair = threadIdx.x / 32 % 2, chunks = (p.tokens + CHUNK - 1) / CHUNK;
    const bool solves = threadIdx.x < THREADS / 2;
    unsigned char* chunk = kept_at(kept, z, first_slot(z, cu, p.sequence), p.head);
    auto copy = [&](u32 to, const unsigned char* from, u32 bytes) {
        for (u32 i = 16 * threadIdx.x; i < bytes; i += 16 * THREADS) copy_async(to + i, from + i, 16);
    };
    auto load_early = [&](int i) {  // what solving takes
        const int rows = p.tokens - i * CHUNK;
        TileK::load<CHUNK>(smem_k + i % 3 * K_BYTES, at(k, p, p.head_kv, i * CHUNK, 0), k.row, rows, z.d_k);
        TileV::load<CHUNK>(smem_v + i % 2 * V_BYTES, at(v, p, p.head_kv, i * CHUNK, p.column), v.row, rows, p.width);
        const unsigned char* from = chunk + (long long)i * z.heads * KEPT_BYTES;
        copy(smem_w + i % 2 * 2 * P_BYTES, from, 2 * P_BYTES);
        copy(smem_g + i % 3 * 8 * CHUNK, from + 4 * P_BYTES, 8 * CHUNK);
    };
    auto load_late = [&](int i) {  // what reading takes
        const int rows = p.tokens - i * CHUNK;
        TileK::load<CHUNK>(smem_q + i % 2 * K_BYTES, at(q, p, p.head, i * CHUNK, 0), q.row, rows, z.d_k);
        copy(smem_p + i % 2 * 2 * P_BYTES, chunk + (long long)i * z.heads * KEPT_BYTES + 2 * P_BYTES, 2 * P_BYTES);
    };
    State s;
    begin(s, z, p, start);
    if (chunks) load_early(0);
    for (int i = 0; i <= chunks; i++) {
        copy_wait();
        __syncthreads();
        if (i + 1 < chunks) load_early(i + 1);
        if (i < chunks) load_late(i);
        const int now = solves ? i : i - 1;  // the chunk of this warp
        if (now < 0 || now >= chunks) continue;
        const float *g = decays + now % 3 * 2 * CHUNK, *end = g + CHUNK;
        const u32 k_s = smem_k + now % 3 * K_BYTES,
                  u_s = smem_u + (now % 2 * 2 + pair) * STEPS * 2 * 32 * 16 + lane * 16;
        float o[1][NS][4];
        read_state<NS>(o, s, (solves ? k_s : smem_q + now % 2 * K_BYTES) + right_of<TileK>(lane));
        by_token(o, g);
        if (solves) {
            // ---- R = V - g K S ----
            u32 v_at[1], high[STEPS][4], low[STEPS][4];
            values_at(v_at, smem_v + now % 2 * V_BYTES);
            UNROLL for (int j = 0; j < STEPS; j++) {
                u32 x[4];
                load_matrix_transposed(x, v_at[0] + j * 32 * WIDTH_V);
                UNROLL for (int e = 0; e < 4; e++) {
                    float* to = o[0][2 * j + e / 2] + e % 2 * 2;
                    to[0] = lower_half(x[e]) - to[0], to[1] = upper_half(x[e]) - to[1];
                }
                parts_of(high[j], low[j], o[0][2 * j], o[0][2 * j + 1]);
            }
            // ---- U = W R ----
            float u[1][NS][4] = {};
            UNROLL for (int j = 0; j < STEPS; j++) {
                const u32 tile = smem_w + now % 2 * 2 * P_BYTES;
                by_lower(u, high[j], tile, j, lane);
                by_lower(u, low[j], tile, j, lane);
                by_lower(u, high[j], tile + P_BYTES, j, lane);
            }
            // ---- S = g_end S + K^T (U L_end) ----
            fade_all(s, g[CHUNK - 1]);
            UNROLL for (int j = 0; j < STEPS; j++) {
                u32 x[4], a[1][4];
                UNROLL for (int e = 0; e < 4; e++) {
                    const float* from = u[0][2 * j + e / 2] + e % 2 * 2;
                    const float* by = end + 16 * j + 8 * (e / 2) + 2 * (lane & 3);
                    x[e] = pack(from[0], from[1]), a[0][e] = pack(from[0] * by[0], from[1] * by[1]);
                }
                store_shared(u_s + j * 2 * 32 * 16, make_uint4(x[0], x[1], x[2], x[3]));
                store_shared(u_s + (j * 2 + 1) * 32 * 16, make_uint4(a[0][0], a[0][1], a[0][2], a[0][3]));
                take_in(s, a, k_s + along_of<TileK>(lane) + j * 32 * WIDTH_K);
            }
        } else {
            // ---- out = g Q S + P U ----
            const u32 tile = smem_p + now % 2 * 2 * P_BYTES;
            UNROLL for (int j = 0; j < STEPS; j++) {
                const uint4 x = load_shared4(u_s + j * 2 * 32 * 16);
                const u32 a[4] = {x.x, x.y, x.z, x.w};
                by_lower(o, a, tile, j, lane);
                by_lower(o, a, tile + P_BYTES, j, lane);
            }
            store_out(o, out, z, p, now * CHUNK, min(CHUNK, p.tokens - now * CHUNK), scale);
            fade_all(s, g[CHUNK - 1]);
            UNROLL for (int j = 0; j < STEPS; j++) {
                const uint4 x = load_shared4(u_s + (j * 2 + 1) * 32 * 16);
                const u32 a[1][4] = {{x.x, x.y, x.z, x.w}};
                take_in(s, a, k_s + along_of<TileK>(lane) + j * 32 * WIDTH_K);
            }
        }
    }
    if (solves) finish(s, z, p, last);
}
