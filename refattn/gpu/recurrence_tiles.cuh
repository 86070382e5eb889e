// What the recurrences' kernels on tensor cores share: where a block's tokens are, the state in registers, a chunk's
// out. Macros: those of mma_tiles.cuh; BLOCK_N is a chunk's 64 tokens, WIDTH_V the block's columns of the values.
//
// The state lies transposed, 16 M_TILES columns of the values by all channels for a warp: what a product leaves in
// registers is the left operand of the next. It meets a tile's rows as two bfloat16 numbers for each float32 one; what
// both leave is 2^-16 of it.

// ---- primitives --------------------------------------------------------------------------------------------------
DEVICE u32 turned(u32 x) {  // 8 x 8 numbers of 16 bits
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
// ---- end of primitives --------------------------------------------------------------------------------------------
constexpr int CHUNK = BLOCK_N, N_K = WIDTH_K / 8, STEPS = CHUNK / 16;
constexpr u32 P_BYTES = CHUNK * CHUNK * 2;
typedef Tile<CHUNK> TileP;

struct Tensor { void* data; long long batch, head, row; };  // strides in elements, the last axis contiguous

// A sequence's tokens begin at `offset`; the block has `width` columns of the values from `column` on.
struct Place { int head, head_kv, batch, sequence, offset, tokens, column, width; };

// rest: the block's number among sequences * heads * slices of the values.
template <typename Z> DEVICE Place place_of(const Z& z, const int* cu, int rest) {
    const int slices = (z.d_v + WIDTH_V - 1) / WIDTH_V;
    Place p;
    p.column = rest % slices * WIDTH_V, rest /= slices;
    p.head = rest % z.heads, p.head_kv = p.head / z.group;
    p.sequence = rest / z.heads;
    p.batch = cu ? 0 : p.sequence;
    p.offset = cu ? cu[p.sequence] : 0;
    p.tokens = (cu ? cu[p.sequence + 1] : z.n) - p.offset;
    p.width = min(WIDTH_V, z.d_v - p.column);
    return p;
}
DEVICE const u16* at(const Tensor& x, const Place& p, int head, int token, int column) {
    return (const u16*)x.data + p.batch * x.batch + head * x.head + (p.offset + (long long)token) * x.row + column;
}

// A thread's part of S^T: row 16 m + 8 (e / 2) + lane / 4 of its warp's, channel 8 n + 2 (lane % 4) + e % 2.
typedef float State[M_TILES][N_K][4];
DEVICE int first_row(int thread) { return thread / 32 % (WIDTH_V / WARP_M) * WARP_M; }
template <typename Z, typename F> DEVICE void each(const Z& z, const Place& p, F f) {
    const int lane = threadIdx.x & 31, row = first_row(threadIdx.x) + lane / 4, channel = 2 * (lane & 3);
    const long long start = (long long)(p.sequence * z.heads + p.head) * z.d_k * z.d_v + p.column;
    UNROLL for (int m = 0; m < M_TILES; m++) UNROLL for (int n = 0; n < N_K; n++) UNROLL for (int e = 0; e < 4; e++) {
        const int c = row + 16 * m + 8 * (e / 2), x = channel + 8 * n + e % 2;
        f(m, n, e, x < z.d_k && c < p.width, start + (long long)x * z.d_v + c);
    }
}
template <typename Z> DEVICE void begin(State& s, const Z& z, const Place& p, const float* start) {
    each(z, p, [&](int m, int n, int e, bool here, long long i) { s[m][n][e] = start && here ? start[i] : 0.f; });
}
template <typename Z> DEVICE void finish(const State& s, const Z& z, const Place& p, float* last) {
    each(z, p, [&](int m, int n, int e, bool here, long long i) { if (here) last[i] = s[m][n][e]; });
}
DEVICE void fade_all(State& s, float by) {
    UNROLL for (int m = 0; m < M_TILES; m++) UNROLL for (int n = 0; n < N_K; n++)
        UNROLL for (int e = 0; e < 4; e++) s[m][n][e] *= by;
}
// 16 columns of a product as the left operand of the next, in two parts.
DEVICE void parts_of(u32 (&high)[4], u32 (&low)[4], const float (&x)[4], const float (&y)[4]) {
    UNROLL for (int e = 0; e < 4; e++) {
        const float a = e < 2 ? x[2 * e] : y[2 * e - 4], b = e < 2 ? x[2 * e + 1] : y[2 * e - 3];
        high[e] = pack(a, b);
        low[e] = pack(a - lower_half(high[e]), b - upper_half(high[e]));
    }
}
// Where a lane's rows of a right operand lie in a tile, with its rows (`right`) or across them (`along`, as of a left
// one).
template <typename T> DEVICE u32 right_of(int lane) { return T::chunk((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1); }
template <typename T> DEVICE u32 along_of(int lane) { return T::chunk(lane & 15, lane >> 4); }
// Addresses of the warp's part of V^T, 16 rows each.
DEVICE void values_at(u32 (&v)[M_TILES], u32 tile) {
    UNROLL for (int m = 0; m < M_TILES; m++)
        v[m] = TileV::step(tile + right_of<TileV>(threadIdx.x & 31), first_row(threadIdx.x) / 16 + m);
}

// o = S^T X^T: X's 64 rows of all channels, at x with the lane's place in it. TOGETHER: tiles of 8 rows whose products
// with the high part come before those with the low part, which wait for them.
template <int TOGETHER> DEVICE void read_state(float (&o)[M_TILES][NS][4], const State& s, u32 x) {
    UNROLL for (int m = 0; m < M_TILES; m++) UNROLL for (int n = 0; n < NS; n++)
        UNROLL for (int e = 0; e < 4; e++) o[m][n][e] = 0.f;
    UNROLL for (int i = 0; i < WIDTH_K / 16; i++) {
        u32 parts[2][M_TILES][4], b[TOGETHER / 2][4];
        UNROLL for (int m = 0; m < M_TILES; m++) parts_of(parts[0][m], parts[1][m], s[m][2 * i], s[m][2 * i + 1]);
        UNROLL for (int n = 0; n < NS; n += TOGETHER) {
            UNROLL for (int j = 0; j < TOGETHER; j += 2)
                load_matrix(b[j / 2], TileK::step(x, i) + (n + j) * 16 * WIDTH_K);
            UNROLL for (int h = 0; h < 2; h++) UNROLL for (int j = 0; j < TOGETHER; j++)
                UNROLL for (int m = 0; m < M_TILES; m++)
                    mma(o[m][n + j], parts[h][m], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
}
// o times a number for each of the 64 tokens.
DEVICE void by_token(float (&o)[M_TILES][NS][4], const float* by) {
    UNROLL for (int n = 0; n < NS; n++) {
        const float x = by[8 * n + 2 * (threadIdx.x & 3)], y = by[8 * n + 2 * (threadIdx.x & 3) + 1];
        UNROLL for (int m = 0; m < M_TILES; m++) o[m][n][0] *= x, o[m][n][1] *= y, o[m][n][2] *= x, o[m][n][3] *= y;
    }
}
// S^T += a K for 16 tokens, whose keys are at `keys` with the lane's place across them.
DEVICE void take_in(State& s, const u32 (&a)[M_TILES][4], u32 keys) {
    UNROLL for (int n = 0; n < N_K; n += 2) {
        u32 b[4];
        load_matrix_transposed(b, TileK::step(keys, n / 2));
        UNROLL for (int m = 0; m < M_TILES; m++) mma(s[m][n], a[m], b[0], b[1]), mma(s[m][n + 1], a[m], b[2], b[3]);
    }
}
// Stores out^T times scale, tokens t .. t + count - 1: tiles are turned round, and lane c of four gets 8 columns of one
// token.
template <typename Z>
DEVICE void store_out(const float (&o)[M_TILES][NS][4], const Tensor& out, const Z& z, const Place& p, int t, int count,
                      float scale) {
    constexpr int TOGETHER = 2 / M_TILES;  // tiles of 8 tokens that the four lanes share out
    const int lane = threadIdx.x & 31, lane4 = lane & 3;
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
        const int token = 8 * (M_TILES == 2 ? n : n + lane4 / 2) + lane / 4;
        const int c = first_row(threadIdx.x) + 8 * (M_TILES == 2 ? lane4 : lane4 % 2);
        if (token >= count || c >= p.width) continue;
        u16* to = (u16*)at(out, p, p.head, t + token, p.column + c);
        if (z.d_v % 8 == 0) *(uint4*)to = make_uint4(x[0], x[1], x[2], x[3]);
        else
            UNROLL for (int e = 0; e < 8; e++) if (c + e < p.width) to[e] = (u16)(x[e / 2] >> e % 2 * 16);
    }
}
