// Tiles of 16 keys or values in a warp's own shared memory, of 16-bit numbers or of bytes (KV8: float8_e4m3fn), and
// their fragments for mma.sync.m16n8k16.
//
// Bytes: a lane takes four consecutive ones of a key, which stand for columns 2t, 2t + 1, 2t + 8, 2t + 9 of the product
// (t: lane % 4); queries are read in that order, too. Values come through ldmatrix.trans as pairs of columns: the even
// ones make one tile of 8 columns, the odd ones the next.

DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

#if KV8
typedef unsigned char Item;
// Chunks of 16 bytes are swizzled so that 8 rows of one chunk column meet all 32 banks.
template <int WIDTH> struct Rows {
    static constexpr int CHUNKS = WIDTH / 16, SHIFT = CHUNKS == 8 ? 0 : CHUNKS == 4 ? 1 : 2;
    static constexpr int MASK = CHUNKS == 8 ? 7 : CHUNKS == 4 ? 3 : 1;
    static DEVICE u32 chunk(int row, int c) { return (row * CHUNKS + (c ^ (row >> SHIFT & MASK))) * 16; }
};
#else
typedef u16 Item;
template <int WIDTH> struct Rows {
    static constexpr int CHUNKS = WIDTH / 8;
    static DEVICE u32 chunk(int row, int c) { return Tile<WIDTH>::chunk(row, c); }
};
#endif
typedef Rows<WIDTH_K> RowsK;
typedef Rows<WIDTH_V> RowsV;
constexpr int PER_CHUNK = 16 / sizeof(Item);

// A warp copies 16 rows of `d` elements; rows from `rows` on, and columns from d on, become 0. along: elements from row
// to row; CACHE 2: where the row lane % 16 begins, -1 for none.
template <int WIDTH> DEVICE void copy_rows(u32 to, const Item* from, long long along, int rows, int d) {
    typedef Rows<WIDTH> Of;
#pragma unroll COPIES
    for (int i = 0; i < 16 * Of::CHUNKS / 32; i++) {
        const int at = i * 32 + (threadIdx.x & 31), row = at / Of::CHUNKS, c = at % Of::CHUNKS;
#if CACHE == 2
        const long long begin = __shfl_sync(~0u, along, row);
#else
        const long long begin = row < rows ? row * along : -1;
#endif
        const int count = begin >= 0 ? max(0, min(PER_CHUNK, d - PER_CHUNK * c)) : 0;
        const Item* source = from + begin + PER_CHUNK * c;
#if ALIGNED
        copy_async(to + Of::chunk(row, c), count ? source : from, (int)sizeof(Item) * count);
#else
        u32 x[4] = {};
        UNROLL for (int e = 0; e < PER_CHUNK; e++)
            if (e < count) x[e * sizeof(Item) / 4] |= (u32)source[e] << 8 * sizeof(Item) * (e % (4 / sizeof(Item)));
        store_shared(to + Of::chunk(row, c), make_uint4(x[0], x[1], x[2], x[3]));
#endif
    }
}

#if KV8
// Two bytes as two 16-bit numbers, exactly.
DEVICE u32 widened(u32 x) {
    u32 y;
    asm("{.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;}" : "=r"(y) : "r"(x));
#if BF16
    float low, high;
    asm("{.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;}"
        : "=f"(low), "=f"(high) : "r"(y));
    y = pack(low, high);
#endif
    return y;
}
DEVICE void key_fragment(u32 (&b)[4], u32 tile, int i) {
    const int lane = threadIdx.x & 31;
    UNROLL for (int n = 0; n < 2; n++) {
        const u32 x = load_shared(tile + RowsK::chunk(8 * n + lane / 4, i) + 4 * (lane & 3));
        b[2 * n] = widened(x), b[2 * n + 1] = widened(x >> 16);
    }
}
DEVICE void value_fragment(u32 (&b)[4], u32 tile, int c) {          // 16 columns: the even ones, then the odd ones
    const int lane = threadIdx.x & 31;
    u32 x[2];
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(x[0]), "=r"(x[1]) : "r"(tile + RowsV::chunk(lane & 15, c)) : "memory");
    UNROLL for (int odd = 0; odd < 2; odd++)
        UNROLL for (int k = 0; k < 2; k++) b[2 * odd + k] = widened(__byte_perm(x[k], 0, odd ? 0x4431 : 0x4420));
}
DEVICE int query_column(int i, int upper) { return 16 * i + 4 * (threadIdx.x & 3) + 2 * upper; }
DEVICE int value_column(int n, int e) { return 16 * (n / 2) + 2 * (2 * (threadIdx.x & 3) + e) + n % 2; }
DEVICE u32 odd_bytes(u32 x) { return ((x & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u; }   // NaN: all ones
DEVICE u32 odd_items(u32 x) { return odd_bytes(x); }
DEVICE u32 zero_odd(u32 x) { return x & ~((odd_bytes(x) >> 7) * 0xffu); }
DEVICE float odd_value(u32 tile, int j, int column) {               // NaN, or 0 for a number
    const u32 x = load_shared(tile + RowsV::chunk(j, column / 16) + column % 16 / 4 * 4) >> 8 * (column % 4);
    return (x & 0x7f) == 0x7f ? __int_as_float(0x7fffffff) : 0.f;
}
#else
DEVICE void key_fragment(u32 (&b)[4], u32 tile, int i) {
    const int lane = threadIdx.x & 31;
    load_matrix(b, TileK::step(tile + TileK::chunk((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1), i));
}
DEVICE void value_fragment(u32 (&b)[4], u32 tile, int c) {
    const int lane = threadIdx.x & 31;
    load_matrix_transposed(b, TileV::step(tile + TileV::chunk(lane & 15, lane >> 4), c));
}
DEVICE int query_column(int i, int upper) { return 16 * i + 8 * upper + 2 * (threadIdx.x & 3); }
DEVICE int value_column(int n, int e) { return 8 * n + 2 * (threadIdx.x & 3) + e; }
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
// Values that are no numbers: added to the rows that see them, then zeroed (rare).
DEVICE void odd_values(float (&o)[M_TILES][NO][4], const float (&s)[M_TILES][NS][4], u32 tile) {
    const int lane = threadIdx.x & 31, column = 2 * (lane & 3);
    u32 seen[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) {
        seen[r] = 0;
        UNROLL for (int n = 0; n < NS; n++)
            UNROLL for (int e = 0; e < 2; e++) seen[r] |= (s[r / 2][n][r % 2 * 2 + e] != -INF ? 1u : 0u) << (8 * n + e);
        seen[r] = quad_or(seen[r] << column);
    }
#pragma unroll 1
    for (int j = 0; j < 16; j++)
        UNROLL for (int n = 0; n < NO; n++)
            UNROLL for (int e = 0; e < 2; e++) {
                const float x = odd_value(tile, j, value_column(n, e));
                if (x != 0)
                    UNROLL for (int r = 0; r < ROWS; r++)
                        if (seen[r] >> j & 1) o[r / 2][n][r % 2 * 2 + e] += x;
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
