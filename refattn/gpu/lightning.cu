// Lightning attention forward on tensor cores by mma.sync (sm_80 and later), bfloat16: out and the last state.
//
//   S_t = fade S_(t-1) + k_t^T v_t,   out_t = scale q_t S_t;   sums and the state are in float32.
//
// Steps
//  1. A block owns WIDTH_V columns of the values of one head, and one part of the tokens of one sequence: parts are as
//     many as fill the GPU. `lightning_states` computes what each part but the last one adds to the state, from nothing
//     (the first one from the given start), `lightning_scan` adds them up along a sequence with their decays;
//     `lightning` then computes each part's out from the state that the part before it left. One part needs the last
//     kernel alone.
//  2. The state lies transposed in registers, for each warp WARP_M columns of the values by all channels: what a
//     product leaves there is the left operand of the next, so it meets the queries as it is, as two bfloat16 numbers
//     for each float32 one (what both leave is 2^-16 of it, no more than what the rounding in 5. stays below its bound).
//  3. A block goes through its tokens by chunks of 64; the next chunk arrives by cp.async meanwhile. Weights
//     P_ij = (q_i k_j) fade^(i-j), j up to i, are shared out between the warps by rows, rounded to bfloat16 and laid
//     into shared memory.
//  4. out^T = (S^T Q^T) fade^(i+1) + V^T P^T.
//  5. S^T = fade^64 S^T + (V^T fade^(63-j)) K: values times their decays are rounded to bfloat16.
//  6. Tiles of out^T are turned round in registers (movmatrix), and four lanes exchange so that each stores 16 bytes.
//
// Decays are powers made once, in double. All sums have a fixed order.
//
// Macros: BF16 1; WIDTH_K, WIDTH_V 64 | 128; WARPS 4, M_TILES WIDTH_V / 64, BLOCK_N 64, ALIGNED 1, BIAS 0: see
// mma_tiles.cuh; MIN_BLOCKS. cu: offsets of packed sequences, or null. Launch: block 128, grid sequences * heads *
// ceil(d_v / WIDTH_V) * parts (`lightning_states`: parts - 1; `lightning_scan`: see there), dynamic shared memory as
// lightning_mma.py says.

#include "mma_tiles.cuh"

// ---- primitives --------------------------------------------------------------------------------------------------
// The same number, of which nothing is known: what is made of it is made again for each chunk, and takes no registers
// meanwhile.
DEVICE int again(int x) { asm volatile("" : "+r"(x)); return x; }
DEVICE u32 turned(u32 x) {  // 8 x 8 numbers of 16 bits
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
// ---- end of primitives --------------------------------------------------------------------------------------------
constexpr int CHUNK = BLOCK_N, N_K = WIDTH_K / 8, STEPS = CHUNK / 16;
constexpr u32 P_BYTES = CHUNK * CHUNK * 2;
constexpr long long STATE = WIDTH_K * WIDTH_V;
typedef Tile<CHUNK> TileP;

struct Tensor { void* data; long long batch, head, row; };  // strides in elements, the last axis contiguous
struct Sizes { int heads, group, n, d_k, d_v, parts, length; };  // length: tokens of a part, a multiple of CHUNK

struct Place { int head, head_kv, batch, sequence, offset, first, last, tokens, column, width, part; };

// Where a block's tokens and columns are: tokens first .. last of the sequence's `tokens`, which begin at `offset`.
DEVICE Place place_of(const Sizes& z, const int* cu, int parts) {
    const int slices = (z.d_v + WIDTH_V - 1) / WIDTH_V;
    int rest = blockIdx.x;
    Place p;
    p.part = rest % parts, rest /= parts;
    p.column = rest % slices * WIDTH_V, rest /= slices;
    p.head = rest % z.heads, p.head_kv = p.head / z.group;
    p.sequence = rest / z.heads;
    p.batch = cu ? 0 : p.sequence;
    p.offset = cu ? cu[p.sequence] : 0;
    p.tokens = (cu ? cu[p.sequence + 1] : z.n) - p.offset;
    p.first = p.part * z.length;
    p.last = min(p.tokens, p.first + z.length);
    p.width = min(WIDTH_V, z.d_v - p.column);
    return p;
}
DEVICE const u16* at(const Tensor& x, const Place& p, int head, int token, int column) {
    return (const u16*)x.data + p.batch * x.batch + head * x.head + (p.offset + (long long)token) * x.row + column;
}

// The state of a thread, S^T: row 16 m + 8 (e / 2) + lane / 4 of its warp's, channel 8 n + 2 (lane % 4) + e % 2.
typedef float State[M_TILES][N_K][4];
template <typename F> DEVICE void each(const Sizes& z, const Place& p, F f) {
    const int lane = threadIdx.x & 31, row = threadIdx.x / 32 * WARP_M + lane / 4, channel = 2 * (lane & 3);
    const long long start = (long long)(p.sequence * z.heads + p.head) * z.d_k * z.d_v + p.column;
    UNROLL for (int m = 0; m < M_TILES; m++) UNROLL for (int n = 0; n < N_K; n++) UNROLL for (int e = 0; e < 4; e++) {
        const int c = row + 16 * m + 8 * (e / 2), x = channel + 8 * n + e % 2;
        f(m, n, e, x < z.d_k && c < p.width, start + (long long)x * z.d_v + c);
    }
}
DEVICE void begin(State& s, const Sizes& z, const Place& p, const float* start) {
    each(z, p, [&](int m, int n, int e, bool here, long long i) { s[m][n][e] = start && here ? start[i] : 0.f; });
}
// Where the state that part `part` of this head's and these columns' tokens leaves is kept, in the threads' order.
DEVICE float4* kept_at(float* states, int block, int parts, int part) {
    return (float4*)(states + (block * (long long)(parts - 1) + part) * STATE) + threadIdx.x;
}

DEVICE void powers(float* fade, double rate) {
    if (threadIdx.x <= CHUNK) fade[threadIdx.x] = (float)exp(-rate * threadIdx.x);
}
// 16 tokens' values as the left operand, V^T, times the decays up to the chunk's last token.
DEVICE u32 faded(u32 x, float2 by) { return pack(lower_half(x) * by.x, upper_half(x) * by.y); }

// Takes a chunk of `count` tokens into the state: V^T fade^(count - 1 - j) times K.
DEVICE void take_in(State& s, const u32 (&values)[M_TILES], u32 keys, const float* fade, int count) {
    UNROLL for (int i = 0; i < STEPS; i++) {
        u32 a[M_TILES][4], b[4];
        UNROLL for (int h = 0; h < 2; h++) {
            const int left = count - 1 - 16 * i - 8 * h - 2 * (threadIdx.x & 3);  // tokens after this one
            const float2 by = make_float2(fade[max(0, left)], fade[max(0, left - 1)]);
            UNROLL for (int m = 0; m < M_TILES; m++) {
                if (h == 0) load_matrix_transposed(a[m], values[m] + i * 32 * WIDTH_V);
                a[m][2 * h] = faded(a[m][2 * h], by), a[m][2 * h + 1] = faded(a[m][2 * h + 1], by);
            }
        }
        UNROLL for (int n = 0; n < N_K; n += 2) {
            load_matrix_transposed(b, TileK::step(keys, n / 2) + i * 32 * WIDTH_K);
            UNROLL for (int m = 0; m < M_TILES; m++) mma(s[m][n], a[m], b[0], b[1]), mma(s[m][n + 1], a[m], b[2], b[3]);
        }
    }
}
DEVICE void fade_all(State& s, float by) {
    UNROLL for (int m = 0; m < M_TILES; m++) UNROLL for (int n = 0; n < N_K; n++)
        UNROLL for (int e = 0; e < 4; e++) s[m][n][e] *= by;
}
// Addresses of the warp's part of V^T, 16 rows each.
DEVICE void values_at(u32 (&v)[M_TILES], u32 tile) {
    const int lane = threadIdx.x & 31;
    UNROLL for (int m = 0; m < M_TILES; m++)
        v[m] = TileV::step(tile + TileV::chunk((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1),
                           threadIdx.x / 32 * M_TILES + m);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
lightning_states(const Tensor k, const Tensor v, const float* start, float* states, const double* rates, const int* cu,
                 Sizes z) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 smem_k = shared_address(shared), smem_v = smem_k + 2 * K_BYTES;
    float* fade = (float*)(shared + 2 * (K_BYTES + V_BYTES));
    const Place p = place_of(z, cu, z.parts - 1);
    if (p.tokens <= p.first + z.length) return;  // no part follows
    const int lane = threadIdx.x & 31;
    const u32 k_start = TileK::chunk(lane & 15, lane >> 4);
    powers(fade, rates[p.head]);
    auto load = [&](int t, int stage) {
        TileK::load<CHUNK>(smem_k + stage * K_BYTES, at(k, p, p.head_kv, t, 0), k.row, CHUNK, z.d_k);
        TileV::load<CHUNK>(smem_v + stage * V_BYTES, at(v, p, p.head_kv, t, p.column), v.row, CHUNK, p.width);
    };
    State s;
    begin(s, z, p, p.part ? nullptr : start);
    load(p.first, 0);
    for (int t = p.first, stage = 0; t < p.last; t += CHUNK, stage ^= 1) {
        copy_wait();
        __syncthreads();
        if (t + CHUNK < p.last) load(t + CHUNK, stage ^ 1);
        u32 v_at[M_TILES];
        values_at(v_at, smem_v + stage * V_BYTES);
        fade_all(s, fade[CHUNK]);
        take_in(s, v_at, smem_k + stage * K_BYTES + k_start, fade, CHUNK);
    }
    float4* to = kept_at(states, blockIdx.x / (z.parts - 1), z.parts, p.part);
    UNROLL for (int m = 0; m < M_TILES; m++) UNROLL for (int n = 0; n < N_K; n++)
        to[(m * N_K + n) * THREADS] = make_float4(s[m][n][0], s[m][n][1], s[m][n][2], s[m][n][3]);
}

// Adds up what the parts leave: a thread for 4 numbers of a head's state, block 256, grid sequences * heads * slices *
// STATE / 1024.
extern "C" __global__ void __launch_bounds__(256)
lightning_scan(float* states, const double* rates, Sizes z) {
    const int slices = (z.d_v + WIDTH_V - 1) / WIDTH_V, which = blockIdx.x / (int)(STATE / 1024);
    const float by = (float)exp(-rates[which / slices % z.heads] * z.length);
    float4* x = (float4*)(states + which * (long long)(z.parts - 1) * STATE) + blockIdx.x % (int)(STATE / 1024) * 256 +
                threadIdx.x;
    float4 sum = x[0];
#pragma unroll 4
    for (int i = 1; i < z.parts - 1; i++) {
        const float4 y = x[i * (STATE / 4)];
        sum = make_float4(sum.x * by + y.x, sum.y * by + y.y, sum.z * by + y.z, sum.w * by + y.w);
        x[i * (STATE / 4)] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
lightning(const Tensor q, const Tensor k, const Tensor v, const Tensor out, const float* start, float* states,
          float* last, const double* rates, const int* cu, Sizes z, float scale) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 smem_q = shared_address(shared), smem_k = smem_q + 2 * K_BYTES, smem_v = smem_k + 2 * K_BYTES,
              smem_p = smem_v + 2 * V_BYTES;
    float* fade = (float*)(shared + 4 * K_BYTES + 2 * V_BYTES + P_BYTES);
    const Place p = place_of(z, cu, z.parts);
    if (p.part && p.tokens <= p.first) return;
    powers(fade, rates[p.head]);
    auto load = [&](int t, int stage) {
        const int rows = p.last - t;
        TileK::load<CHUNK>(smem_q + stage * K_BYTES, at(q, p, p.head, t, 0), q.row, rows, z.d_k);
        TileK::load<CHUNK>(smem_k + stage * K_BYTES, at(k, p, p.head_kv, t, 0), k.row, rows, z.d_k);
        TileV::load<CHUNK>(smem_v + stage * V_BYTES, at(v, p, p.head_kv, t, p.column), v.row, rows, p.width);
    };
    if (p.first < p.last) load(p.first, 0);
    State s;
    if (p.part == 0) begin(s, z, p, start);
    else {
        const float4* from = kept_at(states, blockIdx.x / z.parts, z.parts, p.part - 1);
        UNROLL for (int m = 0; m < M_TILES; m++) UNROLL for (int n = 0; n < N_K; n++) {
            const float4 x = from[(m * N_K + n) * THREADS];
            s[m][n][0] = x.x, s[m][n][1] = x.y, s[m][n][2] = x.z, s[m][n][3] = x.w;
        }
    }
    for (int t = p.first, stage = 0; t < p.last; t += CHUNK, stage ^= 1) {
        const u32 q_s = smem_q + stage * K_BYTES, k_s = smem_k + stage * K_BYTES;
        const int count = min(CHUNK, p.last - t), thread = again(threadIdx.x), warp = thread / 32, lane = thread & 31,
                  column = 2 * (lane & 3), row = lane / 4;
        const u32 left = TileK::chunk(16 * warp + (lane & 15), lane >> 4), along = TileK::chunk(lane & 15, lane >> 4),
                  right = TileK::chunk((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1),
                  right_p = smem_p + TileP::chunk((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
        copy_wait();
        __syncthreads();
        if (t + CHUNK < p.last) load(t + CHUNK, stage ^ 1);

        // ---- P: 16 rows a warp ----
        {
            float w[NS][4] = {};
            UNROLL for (int i = 0; i < WIDTH_K / 16; i++) {
                u32 a[4], b[4];
                load_matrix(a, TileK::step(q_s + left, i));
                UNROLL for (int j = 0; j < STEPS; j++)
                    if (j <= warp) {
                        load_matrix(b, TileK::step(k_s + right, i) + j * 32 * WIDTH_K);
                        mma(w[2 * j], a, b[0], b[1]), mma(w[2 * j + 1], a, b[2], b[3]);
                    }
            }
            UNROLL for (int n = 0; n < NS; n++)
                if (n / 2 <= warp)
                    UNROLL for (int h = 0; h < 2; h++) {
                        const int i = 16 * warp + row + 8 * h, ahead = i - 8 * n - column;
                        const float x = ahead >= 0 ? w[n][2 * h] * fade[ahead] : 0.f,
                                    y = ahead >= 1 ? w[n][2 * h + 1] * fade[ahead - 1] : 0.f;
                        store_shared(smem_p + TileP::chunk(i, n) + 2 * column, pack(x, y));
                    }
        }

        // ---- out^T = S^T Q^T: the state in two parts ----
        float o[M_TILES][NS][4];
        UNROLL for (int m = 0; m < M_TILES; m++) UNROLL for (int n = 0; n < NS; n++)
            UNROLL for (int e = 0; e < 4; e++) o[m][n][e] = 0.f;
        UNROLL for (int i = 0; i < WIDTH_K / 16; i++) {
            u32 high[M_TILES][4], low[M_TILES][4], b[4];
            UNROLL for (int m = 0; m < M_TILES; m++) UNROLL for (int e = 0; e < 4; e++) {
                const float x = s[m][2 * i + e / 2][e % 2 * 2], y = s[m][2 * i + e / 2][e % 2 * 2 + 1];
                high[m][e] = pack(x, y);
                low[m][e] = pack(x - lower_half(high[m][e]), y - upper_half(high[m][e]));
            }
            UNROLL for (int n = 0; n < NS; n += 2) {
                load_matrix(b, TileK::step(q_s + right, i) + n * 16 * WIDTH_K);
                UNROLL for (int m = 0; m < M_TILES; m++) {
                    mma(o[m][n], high[m], b[0], b[1]), mma(o[m][n + 1], high[m], b[2], b[3]);
                    mma(o[m][n], low[m], b[0], b[1]), mma(o[m][n + 1], low[m], b[2], b[3]);
                }
            }
        }
        UNROLL for (int n = 0; n < NS; n++) {
            const float x = fade[8 * n + column + 1], y = fade[8 * n + column + 2];
            UNROLL for (int m = 0; m < M_TILES; m++)
                o[m][n][0] *= x, o[m][n][1] *= y, o[m][n][2] *= x, o[m][n][3] *= y;
        }
        __syncthreads();  // P is there

        // ---- out^T += V^T P^T ----
        u32 v_at[M_TILES], a[M_TILES][4];
        values_at(v_at, smem_v + stage * V_BYTES);
        UNROLL for (int i = 0; i < STEPS; i++) {
            UNROLL for (int m = 0; m < M_TILES; m++) load_matrix_transposed(a[m], v_at[m] + i * 32 * WIDTH_V);
            UNROLL for (int n = 2 * i; n < NS; n += 2) {
                u32 b[4];
                load_matrix(b, TileP::step(right_p, i) + n * 16 * CHUNK);
                UNROLL for (int m = 0; m < M_TILES; m++) mma(o[m][n], a[m], b[0], b[1]),
                    mma(o[m][n + 1], a[m], b[2], b[3]);
            }
        }

        // ---- out: lane c of four takes 8 columns of one token ----
        constexpr int TOGETHER = 2 / M_TILES;  // tiles of 8 tokens that the four lanes share out
        UNROLL for (int n = 0; n < NS; n += TOGETHER) {
            u32 x[4];
            UNROLL for (int i = 0; i < 4; i++) {
                const float* from = o[M_TILES == 2 ? i / 2 : 0][M_TILES == 2 ? n : n + i / 2] + 2 * (i % 2);
                x[i] = turned(pack(from[0] * scale, from[1] * scale));
            }
            UNROLL for (int bit = 1; bit < 4; bit *= 2) UNROLL for (int i = 0; i < 4; i++)
                if (!(i & bit)) {
                    const u32 got = __shfl_xor_sync(~0u, lane & bit ? x[i] : x[i | bit], bit);
                    if (lane & bit) x[i] = got;
                    else x[i | bit] = got;
                }
            const int lane4 = lane & 3, token = 8 * (M_TILES == 2 ? n : n + lane4 / 2) + row;
            const int c = WARP_M * warp + 8 * (M_TILES == 2 ? lane4 : lane4 % 2);
            if (token >= count || c >= p.width) continue;
            u16* to = (u16*)at(out, p, p.head, t + token, p.column + c);
            if (z.d_v % 8 == 0) *(uint4*)to = make_uint4(x[0], x[1], x[2], x[3]);
            else
                UNROLL for (int e = 0; e < 8; e++) if (c + e < p.width) to[e] = (u16)(x[e / 2] >> e % 2 * 16);
        }

        // ---- S^T = fade S^T + V^T K ----
        fade_all(s, fade[count]);
        take_in(s, v_at, k_s + along, fade, count);
    }
    if (p.part == max(0, (p.tokens - 1) / z.length))
        each(z, p, [&](int m, int n, int e, bool here, long long i) { if (here) last[i] = s[m][n][e]; });
}
