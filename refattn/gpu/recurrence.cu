// Recurrences forward on the CUDA cores, in time O(n): out and the last state of Lightning attention and of the gated
// delta rule. Products and sums are in float32, and so is the state.
//
//   lightning:    S_t = fade S_(t-1) + k_t^T v_t,                                     out_t = scale q_t S_t
//   gated_delta:  S' = alpha_t S_(t-1),  S_t = S' + beta_t k_t^T (v_t - k_t S'),      out_t = scale q_t S_t
//
// Steps
//  1. A column of the state knows nothing of the others: a block has COLS columns of the values of one head of one
//     sequence, and goes through its tokens by chunks, which it copies to shared memory as float32.
//  2. lightning: within a chunk scores (q_i k_j) fade^(i-j), of j up to i, meet the values; the state of the chunk's
//     start meets q_i fade^(i+1). Then the state fades by all of the chunk and gains its keys and values. Decays are
//     powers made once, in double. A thread holds ROWS x 4 numbers of the state, which lies in shared memory, too.
//  3. gated_delta: token by token. Four threads hold a column of the state in registers; they add up what it says of
//     the key, and what the query reads, by shuffles. Decays are applied as they come: nothing is divided, no logarithm
//     is taken, so that a decay of 0 is none of a special case.
//
// Macros: T float16 | bfloat16 | float32 (of q, k, v, out); D 64 | 128 (at least d); WARPS 4; GATE 0 (no alpha) | 1 (a
// number a token) | 2 (a number for each channel). cu: offsets of packed sequences, or null. Launch: block 128, grid
// sequences * heads * ceil(d_v / COLS), dynamic shared memory as recurrence.py says.

#include "simt_tiles.cuh"

constexpr int COLS = 32, CHUNK = 32, STRIDE = D + 4, STRIDE_A = CHUNK + 4;  // rows on different banks
constexpr int ROWS = D / 16;       // of the state, of a thread
constexpr int GROUPS = D / 16;     // of 4 channels, of a thread

struct Tensor { void* data; long long batch, head, row; };  // strides in elements, the last axis contiguous
struct Gate { const float* data; long long batch, head, row; };
struct Sizes { int heads, group, n, d_k, d_v; };

struct Place { int head, batch, sequence, first, tokens, column, width; };

DEVICE Place place_of(const Sizes& z, const int* cu) {
    int parts = (z.d_v + COLS - 1) / COLS, part = blockIdx.x % parts, rest = blockIdx.x / parts;
    Place p;
    p.head = rest % z.heads;
    p.sequence = rest / z.heads;
    p.batch = cu ? 0 : p.sequence;
    p.first = cu ? cu[p.sequence] : 0;
    p.tokens = (cu ? cu[p.sequence + 1] : z.n) - p.first;
    p.column = part * COLS;
    p.width = min(COLS, z.d_v - p.column);
    return p;
}
DEVICE T* at(const Tensor& x, const Place& p, int head, int token, int column) {
    return (T*)x.data + p.batch * x.batch + head * x.head + (p.first + token) * x.row + column;
}
DEVICE const float* at(const Gate& x, const Place& p, int token) {
    return x.data + p.batch * x.batch + p.head * x.head + (p.first + token) * x.row;
}
// Where a state's row lies, (sequences, heads, d_k, d_v) and contiguous.
DEVICE long long state_at(const Sizes& z, const Place& p, int row) {
    return ((long long)(p.sequence * z.heads + p.head) * z.d_k + row) * z.d_v + p.column;
}
DEVICE float4 read4(const float* p) { return *(const float4*)p; }
DEVICE void fma4(float (&y)[4], float a, float4 x) {
    y[0] += a * x.x; y[1] += a * x.y; y[2] += a * x.z; y[3] += a * x.w;
}
DEVICE float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
template <int WIDTH, int S>
DEVICE void load(float* tile, const Tensor& x, const Place& p, int head, int token, int column, int width, int rows) {
    bool aligned = is_aligned(at(x, p, head, 0, column), width, x.batch, x.head, x.row);
    load_tile<CHUNK, WIDTH, S>(tile, at(x, p, head, token, column), x.row, rows, width, aligned);
}

extern "C" __global__ void __launch_bounds__(128, 3)
lightning(const Tensor q, const Tensor k, const Tensor v, const Tensor out, const float* start, float* last,
          const double* rates, const int* cu, Sizes z, float scale) {
    extern __shared__ __align__(16) float memory[];
    float *q_s = memory, *k_s = q_s + CHUNK * STRIDE, *v_s = k_s + CHUNK * STRIDE, *a_s = v_s + CHUNK * COLS,
          *s_s = a_s + CHUNK * STRIDE_A, *fade = s_s + D * COLS;
    const Place p = place_of(z, cu);
    const int head_kv = p.head / z.group, lane = threadIdx.x % 8, row = threadIdx.x / 8, c = 4 * lane;
    float s[ROWS][4];
    UNROLL for (int i = 0; i < ROWS; i++) {
        int x = row * ROWS + i;
        UNROLL for (int m = 0; m < 4; m++) {
            bool here = start && x < z.d_k && c + m < p.width;
            s[i][m] = here ? start[state_at(z, p, x) + c + m] : 0.f;
            s_s[x * COLS + c + m] = s[i][m];
        }
    }
    if (threadIdx.x <= CHUNK) fade[threadIdx.x] = (float)exp(-rates[p.head] * threadIdx.x);
    for (int t = 0; t < p.tokens; t += CHUNK) {
        const int m = min(CHUNK, p.tokens - t);
        __syncthreads();
        load<D, STRIDE>(q_s, q, p, p.head, t, 0, z.d_k, m);
        load<D, STRIDE>(k_s, k, p, head_kv, t, 0, z.d_k, m);
        load<COLS, COLS>(v_s, v, p, head_kv, t, p.column, p.width, m);
        copy_commit();
        copy_wait<0>();
        __syncthreads();
        float a[2][4] = {};  // rows `row` and `row` + 16, keys `lane` + 8 n
#pragma unroll 4
        for (int x = 0; x < D; x += 4) {
            const float4 q0 = read4(q_s + row * STRIDE + x), q1 = read4(q_s + (row + 16) * STRIDE + x);
            UNROLL for (int n = 0; n < 4; n++) {
                const float4 y = read4(k_s + (lane + 8 * n) * STRIDE + x);
                a[0][n] += dot(q0, y);
                a[1][n] += dot(q1, y);
            }
        }
        UNROLL for (int h = 0; h < 2; h++)
            UNROLL for (int n = 0; n < 4; n++) {
                const int i = row + 16 * h, j = lane + 8 * n;
                a_s[i * STRIDE_A + j] = j <= i ? a[h][n] * fade[i - j] : 0.f;
            }
        __syncthreads();
        float o[2][4] = {};
#pragma unroll 4
        for (int x = 0; x < D; x += 4) {
            const float4 q0 = read4(q_s + row * STRIDE + x), q1 = read4(q_s + (row + 16) * STRIDE + x);
            const float one[4] = {q0.x, q0.y, q0.z, q0.w}, two[4] = {q1.x, q1.y, q1.z, q1.w};
            UNROLL for (int e = 0; e < 4; e++) {
                const float4 y = read4(s_s + (x + e) * COLS + c);
                fma4(o[0], one[e], y);
                fma4(o[1], two[e], y);
            }
        }
        UNROLL for (int h = 0; h < 2; h++)
            UNROLL for (int e = 0; e < 4; e++) o[h][e] *= fade[row + 16 * h + 1];
#pragma unroll 8
        for (int j = 0; j < CHUNK; j++) {
            const float4 y = read4(v_s + j * COLS + c);
            fma4(o[0], a_s[row * STRIDE_A + j], y);
            fma4(o[1], a_s[(row + 16) * STRIDE_A + j], y);
        }
        UNROLL for (int h = 0; h < 2; h++) {
            const int i = row + 16 * h;
            UNROLL for (int e = 0; e < 4; e++)
                if (i < m && c + e < p.width) put(at(out, p, p.head, t + i, p.column + c + e), o[h][e] * scale);
        }
        UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int e = 0; e < 4; e++) s[i][e] *= fade[m];
        for (int j = 0; j < m; j++) {
            const float4 y = read4(v_s + j * COLS + c);
            const float by = fade[m - 1 - j];
            UNROLL for (int i = 0; i < ROWS; i += 4) {
                const float4 x = read4(k_s + j * STRIDE + row * ROWS + i);
                fma4(s[i], x.x * by, y);
                fma4(s[i + 1], x.y * by, y);
                fma4(s[i + 2], x.z * by, y);
                fma4(s[i + 3], x.w * by, y);
            }
        }
        __syncthreads();  // all have read the state
        UNROLL for (int i = 0; i < ROWS; i++)
            UNROLL for (int e = 0; e < 4; e++) s_s[(row * ROWS + i) * COLS + c + e] = s[i][e];
    }
    UNROLL for (int i = 0; i < ROWS; i++) {
        const int x = row * ROWS + i;
        UNROLL for (int e = 0; e < 4; e++)
            if (x < z.d_k && c + e < p.width) last[state_at(z, p, x) + c + e] = s[i][e];
    }
}

extern "C" __global__ void __launch_bounds__(128, 3)
gated_delta(const Tensor q, const Tensor k, const Tensor v, const Tensor out, const float* start, float* last,
            const Gate alpha, const Gate beta, const int* cu, Sizes z, float scale) {
    extern __shared__ __align__(16) float memory[];
    float *q_s = memory, *k_s = q_s + CHUNK * D, *v_s = k_s + CHUNK * D, *beta_s = v_s + CHUNK * COLS,
          *alpha_s = beta_s + CHUNK;
    const Place p = place_of(z, cu);
    const int head_kv = p.head / z.group, lane = threadIdx.x % 4, c = threadIdx.x / 4;
    float s[GROUPS][4];  // channels 16 i + 4 lane + e of column c
    UNROLL for (int i = 0; i < GROUPS; i++)
        UNROLL for (int e = 0; e < 4; e++) {
            const int x = 16 * i + 4 * lane + e;
            s[i][e] = start && x < z.d_k && c < p.width ? start[state_at(z, p, x) + c] : 0.f;
        }
    for (int t = 0; t < p.tokens; t += CHUNK) {
        const int m = min(CHUNK, p.tokens - t);
        __syncthreads();
        load<D, D>(q_s, q, p, p.head, t, 0, z.d_k, m);
        load<D, D>(k_s, k, p, head_kv, t, 0, z.d_k, m);
        load<COLS, COLS>(v_s, v, p, head_kv, t, p.column, p.width, m);
        if (threadIdx.x < m) beta_s[threadIdx.x] = *at(beta, p, t + threadIdx.x);
        if (GATE == 1 && threadIdx.x < m) alpha_s[threadIdx.x] = *at(alpha, p, t + threadIdx.x);
        for (int i = threadIdx.x; GATE == 2 && i < m * D; i += THREADS)
            alpha_s[i] = i % D < z.d_k ? at(alpha, p, t + i / D)[i % D] : 0.f;
        copy_commit();
        copy_wait<0>();
        __syncthreads();
        for (int j = 0; j < m; j++) {
            float said[4] = {};
            UNROLL for (int i = 0; i < GROUPS; i++) {
                const int x = 16 * i + 4 * lane;
                if (GATE == 1) UNROLL for (int e = 0; e < 4; e++) s[i][e] *= alpha_s[j];
                if (GATE == 2) {
                    const float4 keep = read4(alpha_s + j * D + x);
                    s[i][0] *= keep.x; s[i][1] *= keep.y; s[i][2] *= keep.z; s[i][3] *= keep.w;
                }
                const float4 y = read4(k_s + j * D + x);
                said[0] += y.x * s[i][0]; said[1] += y.y * s[i][1];
                said[2] += y.z * s[i][2]; said[3] += y.w * s[i][3];
            }
            float sum = (said[0] + said[1]) + (said[2] + said[3]);
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const float change = beta_s[j] * (v_s[j * COLS + c] - sum);
            float read[4] = {};
            UNROLL for (int i = 0; i < GROUPS; i++) {
                const float4 y = read4(k_s + j * D + 16 * i + 4 * lane), x = read4(q_s + j * D + 16 * i + 4 * lane);
                fma4(s[i], change, y);
                read[0] += x.x * s[i][0]; read[1] += x.y * s[i][1];
                read[2] += x.z * s[i][2]; read[3] += x.w * s[i][3];
            }
            float seen = (read[0] + read[1]) + (read[2] + read[3]);
            seen += __shfl_xor_sync(0xffffffffu, seen, 1);
            seen += __shfl_xor_sync(0xffffffffu, seen, 2);
            if (lane == 0) v_s[j * COLS + c] = seen * scale;  // its four threads have read the value
        }
        __syncthreads();
        for (int i = threadIdx.x; i < m * COLS; i += THREADS)
            if (i % COLS < p.width) put(at(out, p, p.head, t + i / COLS, p.column + i % COLS), v_s[i]);
    }
    UNROLL for (int i = 0; i < GROUPS; i++)
        UNROLL for (int e = 0; e < 4; e++) {
            const int x = 16 * i + 4 * lane + e;
            if (x < z.d_k && c < p.width) last[state_at(z, p, x) + c] = s[i][e];
        }
}
