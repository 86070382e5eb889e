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
//     for each float32 one (what both leave is 2^-16 of it: no more than the rounding in 5. stays below its bound).
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
#include "recurrence_tiles.cuh"

constexpr long long STATE = WIDTH_K * WIDTH_V;

struct Sizes { int heads, group, n, d_k, d_v, parts, length; };  // length: tokens of a part, a multiple of CHUNK

// Where the state that part `part` of a head's and some columns' tokens leaves is kept, in the threads' order.
DEVICE float4* kept_at(float* states, int block, int parts, int part) {
    return (float4*)(states + (block * (long long)(parts - 1) + part) * STATE) + threadIdx.x;
}
DEVICE void powers(float* fade, double rate) {
    if (threadIdx.x <= CHUNK) fade[threadIdx.x] = (float)exp(-rate * threadIdx.x);
}
DEVICE u32 faded(u32 x, float2 by) { return pack(lower_half(x) * by.x, upper_half(x) * by.y); }

// Takes a chunk of `count` tokens into the state: V^T fade^(count - 1 - j) times K.
DEVICE void take_in(State& s, const u32 (&values)[M_TILES], u32 keys, const float* fade, int count) {
    UNROLL for (int i = 0; i < STEPS; i++) {
        u32 a[M_TILES][4];
        UNROLL for (int h = 0; h < 2; h++) {
            const int left = count - 1 - 16 * i - 8 * h - 2 * (threadIdx.x & 3);  // tokens after this one
            const float2 by = make_float2(fade[max(0, left)], fade[max(0, left - 1)]);
            UNROLL for (int m = 0; m < M_TILES; m++) {
                if (h == 0) load_matrix_transposed(a[m], values[m] + i * 32 * WIDTH_V);
                a[m][2 * h] = faded(a[m][2 * h], by), a[m][2 * h + 1] = faded(a[m][2 * h + 1], by);
            }
        }
        take_in(s, a, keys + i * 32 * WIDTH_K);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
lightning_states(const Tensor k, const Tensor v, const float* start, float* states, const double* rates, const int* cu,
                 Sizes z) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 smem_k = shared_address(shared), smem_v = smem_k + 2 * K_BYTES;
    float* fade = (float*)(shared + 2 * (K_BYTES + V_BYTES));
    const int block = blockIdx.x / (z.parts - 1), part = blockIdx.x % (z.parts - 1);
    const Place p = place_of(z, cu, block);
    const int first = part * z.length, end = first + z.length;
    if (p.tokens <= end) return;  // no part follows
    powers(fade, rates[p.head]);
    auto load = [&](int t, int stage) {
        TileK::load<CHUNK>(smem_k + stage * K_BYTES, at(k, p, p.head_kv, t, 0), k.row, CHUNK, z.d_k);
        TileV::load<CHUNK>(smem_v + stage * V_BYTES, at(v, p, p.head_kv, t, p.column), v.row, CHUNK, p.width);
    };
    State s;
    begin(s, z, p, part ? nullptr : start);
    load(first, 0);
    for (int t = first, stage = 0; t < end; t += CHUNK, stage ^= 1) {
        copy_wait();
        __syncthreads();
        if (t + CHUNK < end) load(t + CHUNK, stage ^ 1);
        u32 v_at[M_TILES];
        values_at(v_at, smem_v + stage * V_BYTES);
        fade_all(s, fade[CHUNK]);
        take_in(s, v_at, smem_k + stage * K_BYTES + along_of<TileK>(threadIdx.x & 31), fade, CHUNK);
    }
    float4* to = kept_at(states, block, z.parts, part);
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
    const int block = blockIdx.x / z.parts, part = blockIdx.x % z.parts;
    const Place p = place_of(z, cu, block);
    const int first = part * z.length, end = min(p.tokens, first + z.length);
    if (part && p.tokens <= first) return;
    powers(fade, rates[p.head]);
    auto load = [&](int t, int stage) {
        const int rows = end - t;
        TileK::load<CHUNK>(smem_q + stage * K_BYTES, at(q, p, p.head, t, 0), q.row, rows, z.d_k);
        TileK::load<CHUNK>(smem_k + stage * K_BYTES, at(k, p, p.head_kv, t, 0), k.row, rows, z.d_k);
        TileV::load<CHUNK>(smem_v + stage * V_BYTES, at(v, p, p.head_kv, t, p.column), v.row, rows, p.width);
    };
    if (first < end) load(first, 0);
    State s;
    if (part == 0) begin(s, z, p, start);
    else {
        const float4* from = kept_at(states, block, z.parts, part - 1);
        UNROLL for (int m = 0; m < M_TILES; m++) UNROLL for (int n = 0; n < N_K; n++) {
            const float4 x = from[(m * N_K + n) * THREADS];
            s[m][n][0] = x.x, s[m][n][1] = x.y, s[m][n][2] = x.z, s[m][n][3] = x.w;
        }
    }
    for (int t = first, stage = 0; t < end; t += CHUNK, stage ^= 1) {
        const u32 q_s = smem_q + stage * K_BYTES, k_s = smem_k + stage * K_BYTES;
        const int count = min(CHUNK, end - t), warp = threadIdx.x / 32, lane = threadIdx.x & 31,
                  column = 2 * (lane & 3), row = lane / 4;
        const u32 left = along_of<TileK>(lane) + 32 * WIDTH_K * warp, right = right_of<TileK>(lane),
                  right_p = smem_p + right_of<TileP>(lane);
        copy_wait();
        __syncthreads();
        if (t + CHUNK < end) load(t + CHUNK, stage ^ 1);

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

        // ---- out^T = fade^(i+1) S^T Q^T ----
        float o[M_TILES][NS][4];
        read_state<4>(o, s, q_s + right);
        by_token(o, fade + 1);
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

        store_out(o, out, z, p, t, count, scale);

        // ---- S^T = fade S^T + V^T K ----
        fade_all(s, fade[count]);
        take_in(s, v_at, k_s + along_of<TileK>(lane), fade, count);
    }
    if (part == max(0, (p.tokens - 1) / z.length)) finish(s, z, p, last);
}
