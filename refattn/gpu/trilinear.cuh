// What the trilinear kernels share: sizes and masks, which keys a row sees, words of shared memory, products in
// bfloat16.

struct Keys { int n, shift, window; };  // row i sees keys [end - window, end), end = i + 1 + shift, where causal
// single: the keys that come one by one. tiled: the others, whose rows (or the rows of queries) come in tiles.
struct Shape { int batch, heads_kv, group, n_q, d, causal, row_heads_log2, tiles; Keys single, tiled; };
constexpr float LOG2E = 1.4426950408889634f;

DEVICE int first_seen(const Shape& z, const Keys& k, int i)
{ return z.causal ? min(max(i + 1 + k.shift - k.window, 0), k.n) : 0; }
DEVICE int end_seen(const Shape& z, const Keys& k, int i) { return z.causal ? min(max(i + 1 + k.shift, 0), k.n) : k.n; }
DEVICE int places(const Shape& z) { return 64 >> z.row_heads_log2; }               // of a tile of 64 rows
DEVICE int head_tiles(const Shape& z) { return z.group >> z.row_heads_log2; }
DEVICE int place_in(const Shape& z, int row) { return row >> z.row_heads_log2; }   // of a row of a tile
DEVICE int head_in(const Shape& z, int row) { return row & (1 << z.row_heads_log2) - 1; }

DEVICE u32 load_shared(u32 a)
{
    u32 x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(a) : "memory");
    return x;
}
DEVICE float load_float(u32 a) { return __uint_as_float(load_shared(a)); }
DEVICE void store_float(u32 a, float x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(a), "f"(x) : "memory"); }
DEVICE u32 product(u32 x, u32 y) { u32 z; asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y)); return z; }
