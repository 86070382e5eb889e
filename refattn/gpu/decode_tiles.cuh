// Tiles of 16 keys or values in a warp's own shared memory, of 16-bit numbers or of bytes (KV8: float8_e4m3fn), and
// their fragments for mma.sync.m16n8k16: keys are the 16 rows of S^T = K Q^T, columns of values those of O^T = V^T P^T.
//
// Bytes become float16, which holds each of them: HALF_Q, HALF_P say that queries and P are float16, too. A lane takes
// a quarter of a key in a row: step i of the product has its bytes 4 i .. 4 i + 3, and queries are read in that order.
// Values come through ldmatrix.trans as pairs of columns: the even ones make rows 0-7 of a fragment, the odd ones 8-15.

constexpr bool HALF_Q = !BF16 || KV8, HALF_P = !BF16 || (KV8 && SCALES != 2);

DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
#define PRODUCT(type) asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 " \
    "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <bool HALF> DEVICE void product(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if (HALF) PRODUCT("f16");
    else PRODUCT("bf16");
}
template <bool HALF> DEVICE u32 packed(float lower, float upper) {
    u32 r;
    if (HALF) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(upper), "f"(lower));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(upper), "f"(lower));
    return r;
}
template <bool HALF> DEVICE float lower_of(u32 x) {
    if (!HALF) return __int_as_float(x << 16);
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((u16)x));
    return y;
}
// The 8 x 8 matrix of 16-bit numbers of which lane 4 i + j has columns 2 j and 2 j + 1 of row i, transposed.
DEVICE u32 transposed(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
DEVICE uint2 load_shared2(u32 a) {
    uint2 x;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(a) : "memory");
    return x;
}
// Over the lanes of a column: what rows lane / 4 have.
DEVICE float column_max(float x) {
    UNROLL for (int hop = 4; hop < 32; hop *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, hop));
    return x;
}
DEVICE float column_sum(float x) {
    UNROLL for (int hop = 4; hop < 32; hop *= 2) x += __shfl_xor_sync(~0u, x, hop);
    return x;
}

#if KV8
typedef unsigned char Item;
#else
typedef u16 Item;
#endif
constexpr int PER_CHUNK = 16 / sizeof(Item);

// Rows of WIDTH items in chunks of 16 bytes, swizzled so that what is read at once meets all 32 banks: 8 rows of one
// chunk column; KEYS of bytes: 8 quarters of two rows.
template <int WIDTH, bool KEYS> struct Rows {
    static constexpr int CHUNKS = WIDTH / PER_CHUNK, BYTES = WIDTH * sizeof(Item);
    // lanes of a row, rows of a pass: a warp copies whole rows of 16 lanes and fewer
    static constexpr int LANES = CHUNKS % 3 ? CHUNKS : CHUNKS / 3, PASS = 32 / LANES;
    // of bits of a row's number: of two numbers without common bits it is that of each, by xor
    static DEVICE constexpr int swizzle(int row) {
        return KV8 && KEYS ? (CHUNKS == 8 ? row & 1 : 0)
             : CHUNKS % 8 == 0 ? row & 7 : CHUNKS == 2 ? row >> 2 & 1 : CHUNKS == 6 ? row >> 2 & 1 : row >> 1 & 3;
    }
    static DEVICE u32 chunk(int row, int c) { return row * BYTES + ((c ^ swizzle(row)) << 4); }
    // A warp copies 16 whole rows; along: items from row to row.
    static DEVICE void copy(u32 to, const Item* from, long long along) {
        const int lane = threadIdx.x & 31, first = lane / LANES, c = lane % LANES;
        const Item* source = from + first * along + PER_CHUNK * c;
        const u32 at = chunk(first, c);
        UNROLL for (int i = 0; i < 16 / PASS; i++, source += PASS * along)
            UNROLL for (int j = 0; j < CHUNKS / LANES; j++)
                copy_async(to + (at ^ swizzle(i * PASS) << 4) + i * PASS * BYTES + j * LANES * 16,
                           source + j * LANES * PER_CHUNK, 16);
    }
    // A warp copies 16 rows of `d` items; rows from `rows` on, and columns from d on, become 0. CACHE 2: along is
    // where the row lane % 16 begins, -1 for none.
    static DEVICE void copy_some(u32 to, const Item* from, long long along, int rows, int d) {
#pragma unroll COPIES
        for (int i = 0; i < 16 * CHUNKS / 32; i++) {
            const int at = i * 32 + (threadIdx.x & 31), row = at / CHUNKS, c = at % CHUNKS;
#if CACHE == 2
            const long long begin = __shfl_sync(~0u, along, row);
#else
            const long long begin = row < rows ? row * along : -1;
#endif
            const int count = begin >= 0 ? max(0, min(PER_CHUNK, d - PER_CHUNK * c)) : 0;
            const Item* source = from + begin + PER_CHUNK * c;
#if ALIGNED
            copy_async(to + chunk(row, c), count ? source : from, (int)sizeof(Item) * count);
#else
            u32 x[4] = {};
            UNROLL for (int e = 0; e < PER_CHUNK; e++)
                if (e < count) x[e * sizeof(Item) / 4] |= (u32)source[e] << 8 * sizeof(Item) * (e % (4 / sizeof(Item)));
            store_shared(to + chunk(row, c), make_uint4(x[0], x[1], x[2], x[3]));
#endif
        }
    }
};
typedef Rows<WIDTH_K, true> RowsK;
typedef Rows<WIDTH_V, false> RowsV;

#if KV8
// Two bytes as two 16-bit numbers, exactly.
template <bool HALF> DEVICE u32 widened(u32 x) {
    u32 y;
    asm("{.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;}" : "=r"(y) : "r"(x));
    return HALF ? y : packed<false>(lower_of<true>(y), lower_of<true>(y >> 16));
}
// The lane's quarters of keys lane / 4 and lane / 4 + 8.
struct Keys {
    u32 x[2][WIDTH_K / 16];
    DEVICE Keys(u32 tile) {
        const int row = (threadIdx.x & 31) / 4, t = threadIdx.x & 3;
        UNROLL for (int h = 0; h < 2; h++) {
#if WIDTH_K == 64 || WIDTH_K == 128
            UNROLL for (int i = 0; i < WIDTH_K / 64; i++) {
                const uint4 y = load_shared4(tile + RowsK::chunk(row + 8 * h, WIDTH_K / 64 * t + i));
                x[h][4 * i] = y.x, x[h][4 * i + 1] = y.y, x[h][4 * i + 2] = y.z, x[h][4 * i + 3] = y.w;
            }
#else
            UNROLL for (int i = 0; i < WIDTH_K / 32; i++) {
                const uint2 y = load_shared2(tile + (row + 8 * h) * WIDTH_K + WIDTH_K / 4 * t + 8 * i);
                x[h][2 * i] = y.x, x[h][2 * i + 1] = y.y;
            }
#endif
        }
    }
    template <bool HALF> DEVICE void fragment(u32 (&a)[4], int i) const {
        UNROLL for (int e = 0; e < 4; e++) a[e] = widened<HALF>(x[e % 2][i] >> 16 * (e / 2));
    }
};
// Of columns 16 c .. 16 c + 31.
DEVICE void value_fragments(u32 (&a)[2][4], u32 tile, int c) {
    const int lane = threadIdx.x & 31;
    u32 x[4];
    load_matrix_transposed(x, tile + RowsV::chunk(lane & 15, c + lane / 16));
    UNROLL for (int i = 0; i < 2; i++)
        UNROLL for (int e = 0; e < 4; e++)
            a[i][e] = widened<HALF_P>(__byte_perm(x[2 * i + e / 2], 0, e % 2 ? 0x4431 : 0x4420));
}
DEVICE int query_column(int i, int upper) { return WIDTH_K / 4 * (threadIdx.x & 3) + 4 * i + 2 * upper; }
DEVICE int value_column(int c, int e) { return 16 * c + 2 * ((threadIdx.x & 31) / 4) + e; }
DEVICE u32 odd_bytes(u32 x) { return ((x & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u; }   // NaN: all ones
DEVICE u32 odd_items(u32 x) { return odd_bytes(x); }
DEVICE u32 zero_odd(u32 x) { return x & ~((odd_bytes(x) >> 7) * 0xffu); }
DEVICE float odd_value(u32 tile, int j, int column) {               // NaN, or 0 for a number
    const u32 x = load_shared(tile + RowsV::chunk(j, column / 16) + column % 16 / 4 * 4) >> 8 * (column % 4);
    return (x & 0x7f) == 0x7f ? __int_as_float(0x7fffffff) : 0.f;
}
#else
struct Keys {
    u32 at;
    DEVICE Keys(u32 tile) {
        const int lane = threadIdx.x & 31;
        at = tile + TileK::chunk(lane & 15, lane >> 4);
    }
    template <bool HALF> DEVICE void fragment(u32 (&a)[4], int i) const { load_matrix(a, TileK::step(at, i)); }
};
DEVICE void value_fragments(u32 (&a)[2][4], u32 tile, int c) {
    const int lane = threadIdx.x & 31;
    const u32 at = tile + TileV::chunk((lane & 7) + lane / 16 * 8, lane >> 3 & 1);
    UNROLL for (int i = 0; i < 2; i++) load_matrix_transposed(a[i], TileV::step(at, c + i));
}
DEVICE int query_column(int i, int upper) { return 16 * i + 8 * upper + 2 * (threadIdx.x & 3); }
DEVICE int value_column(int c, int e) { return 16 * c + 8 * e + (threadIdx.x & 31) / 4; }
DEVICE u32 odd_items(u32 x) { return not_finite(x); }
DEVICE u32 zero_odd(u32 x) { return zero_not_finite(x); }
DEVICE float odd_value(u32 tile, int j, int column) {               // inf or NaN, or 0 for a number
    const u32 x = load_shared(tile + RowsV::chunk(j, column / 8) + column % 8 / 2 * 4);
    const u32 odd = not_finite(x) & (column % 2 ? 0x80000000u : 0x8000u);
    return odd ? (column % 2 ? upper_half(x) : lower_half(x)) : 0.f;
}
#endif

// Whether a value of the tile is no number, for the chunks that the lane looks at.
DEVICE u32 not_numbers(u32 tile) {
    u32 bad = 0;
    for (int i = threadIdx.x & 31; i < 16 * RowsV::CHUNKS; i += 32) {
        const uint4 x = load_shared4(tile + RowsV::chunk(i / RowsV::CHUNKS, i % RowsV::CHUNKS));
        bad |= odd_items(x.x) | odd_items(x.y) | odd_items(x.z) | odd_items(x.w);
    }
    return bad;
}
// Values that are no numbers: added to the rows that see them, then zeroed (rare). s: scores of keys lane / 4 and 8
// more, -inf for a hidden one.
DEVICE void odd_values(float (&o)[COLUMNS][TILES][4], const float (&s)[TILES][4], u32 tile) {
    const int lane = threadIdx.x & 31;
    u32 seen[TILES][2];
    UNROLL for (int n = 0; n < TILES; n++)
        UNROLL for (int e = 0; e < 2; e++) {
            u32 x = (s[n][e] != -INF ? 1u : 0u) << lane / 4 | (s[n][2 + e] != -INF ? 256u : 0u) << lane / 4;
            UNROLL for (int hop = 4; hop < 32; hop *= 2) x |= __shfl_xor_sync(~0u, x, hop);
            seen[n][e] = x;
        }
#pragma unroll 1
    for (int j = 0; j < 16; j++)
        UNROLL for (int c = 0; c < COLUMNS; c++)
            UNROLL for (int e = 0; e < 4; e++) {
                const float x = odd_value(tile, j, value_column(c, e / 2));
                if (x != 0)
                    UNROLL for (int n = 0; n < TILES; n++)
                        if (seen[n][e % 2] >> j & 1) o[c][n][e] += x;
            }
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < 16 * RowsV::CHUNKS; i += 32) {
        const u32 at = tile + RowsV::chunk(i / RowsV::CHUNKS, i % RowsV::CHUNKS);
        const uint4 x = load_shared4(at);
        store_shared(at, make_uint4(zero_odd(x.x), zero_odd(x.y), zero_odd(x.z), zero_odd(x.w)));
    }
    __syncwarp();
}
