// SEAL's operations on a GPU, word for word, for one degree, 2**LOG_DEGREE (13, 14 or 15).
//
// A limb is N words modulo one prime. A launch has a list of items; an item is about one limb, and has addresses, so a
// batch may be of anything anywhere. A key switch is five launches: inverse_rows, spread, times_key, spread, drop; a
// rescaling three, of which the first is within a drop that comes before. What comes before or after a transform's pass
// is done with it.
#include "modular.cuh"
#include "tiles.cuh"

struct Item {
    u64 src, dst, x, add, plus, perm, key;
    u32 prime, from, count, flags, first, limbs;
};
struct Drop {  // by (dropped, kept)
    u64 inverse, inverse_shifted, fix;  // 1/dropped modulo kept; kept less half of dropped
};
enum { ROUND = 1, INVERSE = 2 };

// The inverse's pass over rows: dst = src, permuted if there is perm; below 4q. grid (N / 1024, items)
KERNEL(Rows::THREADS) inverse_rows(
    const Item* items, const Prime* primes, const ulonglong2* __restrict__ inverse_roots) {
    SHARED(s);
    const Item& it = items[blockIdx.y];
    const int thread = threadIdx.x, start = blockIdx.x * Rows::WORDS;
    const u64* src = words(it.src);
    const u32* perm = (const u32*)it.perm;
    u64 v[8];
#pragma unroll
    for (int e = 0; e < 8; e++) {
        int i = start + Last<Rows>::place(thread, e);
        v[e] = src[perm ? perm[i] : i];
    }
    inverse_tile<Rows>(v, s, inverse_roots + (size_t)it.prime * N, base_of(blockIdx.x), thread, primes[it.prime].q);
    u64* dst = words(it.dst) + start;
#pragma unroll
    for (int e = 0; e < 8; e++) dst[First<Rows>::place(thread, e)] = v[e];
}

// The inverse's pass over columns, modulo prime `from`; then for k = first, ..., first + count - 1 the forward pass
// over columns modulo prime k, or the last one where k is `limbs`: into dst + k·key words. Nothing for prime `from`.
// ROUND: half of the prime is added before, and taken away after. grid (2**S2 / 16, items)
extern "C" __global__ void __launch_bounds__(Columns::THREADS, 1024 / Columns::THREADS) spread(
    const Item* items, const Prime* primes, const ulonglong2* __restrict__ roots,
    const ulonglong2* __restrict__ inverse_roots, const Drop* drops, int count) {
    SHARED(s);
    const Item& it = items[blockIdx.y];
    const int thread = threadIdx.x, tile = blockIdx.x;
    const Prime& from = primes[it.from];
    const u64* src = words(it.src);
    u64* x = s + Columns::WORDS + thread;  // what each thread keeps: registers are short
    u64 v[8];
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = src[in_columns(Last<Columns>::place(thread, e), tile)];
    inverse_tile<Columns>(v, s, inverse_roots + (size_t)it.from * N, 1, thread, from.q);
    const u64 half = it.flags & ROUND ? from.q >> 1 : 0;
#pragma unroll
    for (int e = 0; e < 8; e++)
        x[e * Columns::THREADS] =
            below(below(scaled(v[e], from.inverse, from.inverse_shifted, from.q), from.q) + half, from.q);
#pragma unroll 1
    for (u32 k = it.first; k < it.first + it.count; k++) {
        const u32 prime = k == it.limbs ? count - 1 : k;
        if (prime == it.from) continue;
        const int thread = again(threadIdx.x);
        const Prime& p = primes[prime];
        const bool larger = from.q > p.q;
        const u64 fix = it.flags & ROUND ? drops[it.from * count + prime].fix : 0;
#pragma unroll
        for (int e = 0; e < 8; e++) {
            v[e] = x[e * Columns::THREADS];
            v[e] = (larger ? reduced(v[e], p) : v[e]) + fix;
        }
        __syncthreads();  // all have read what the tile before left in s
        forward_tile<Columns>(v, s, roots + (size_t)prime * N, 1, thread, p.q);
        u64* dst = words(it.dst) + k * it.key;
#pragma unroll
        for (int e = 0; e < 8; e++) dst[in_columns(Last<Columns>::place(thread, e), tile)] = v[e];
    }
}

// The forward pass over rows of `count` digits, src, modulo one prime, times the key's digits, summed in 128 bits: dst
// and add, the sums for the key's two polynomials. Digit `from` is not at src: it is x, permuted if there is perm.
// key: this prime's limb of the first digit's first polynomial. INVERSE: followed by the inverse's pass over rows.
// grid (N / 1024, items)
extern "C" __global__ void __launch_bounds__(Rows::THREADS, 4) times_key(
    const Item* items, const Prime* primes, const ulonglong2* __restrict__ roots,
    const ulonglong2* __restrict__ inverse_roots, int count) {
    SHARED(s);
    const int start = blockIdx.x * Rows::WORDS;
    u64 upper0[8] = {}, lower0[8] = {}, upper1[8] = {}, lower1[8] = {};
    constexpr int ROOM = Rows::WORDS;
    int turn = 0;  // two rooms in turns: who writes to one has seen all read from it
#pragma unroll 1
    for (u32 j = 0; j < items[blockIdx.y].count; j++) {
        const int thread = again(threadIdx.x);
        const Item& it = items[again(blockIdx.y)];
        const Prime& p = primes[it.prime];
        const u64* key = words(it.key) + (size_t)j * 2 * count * N + start;
        u64 v[8];
        if (j == it.from) {
            const u64* x = words(it.x);
            const u32* perm = (const u32*)it.perm;
#pragma unroll
            for (int e = 0; e < 8; e++) {
                int i = start + Last<Rows>::place(thread, e);
                v[e] = x[perm ? perm[i] : i];
            }
        } else {
            const u64* src = words(it.src) + (size_t)j * N + start;
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = src[First<Rows>::place(thread, e)];
            forward_tile<Rows>(v, s + turn * ROOM, roots + (size_t)it.prime * N, base_of(blockIdx.x), thread, p.q);
            turn ^= 1;
        }
#pragma unroll
        for (int e = 0; e < 8; e++) {
            int i = Last<Rows>::place(thread, e);
            add_product(upper0[e], lower0[e], v[e], key[i]);
            add_product(upper1[e], lower1[e], v[e], key[i + count * N]);
        }
    }
    const int thread = again(threadIdx.x);
    const Item& it = items[again(blockIdx.y)];
    const Prime& p = primes[it.prime];
    const bool inverse = it.flags & INVERSE;
#pragma unroll
    for (int e = 0; e < 8; e++) {
        lower0[e] = reduced_wide(upper0[e], lower0[e], p);
        lower1[e] = reduced_wide(upper1[e], lower1[e], p);
    }
    if (inverse) {
        const ulonglong2* w = inverse_roots + (size_t)it.prime * N;
        inverse_tile<Rows>(lower0, s + turn * ROOM, w, base_of(blockIdx.x), thread, p.q);
        inverse_tile<Rows>(lower1, s + (turn ^ 1) * ROOM, w, base_of(blockIdx.x), thread, p.q);
    }
    u64 *a = words(it.dst) + start, *b = words(it.add) + start;
#pragma unroll
    for (int e = 0; e < 8; e++) {
        int i = inverse ? First<Rows>::place(thread, e) : Last<Rows>::place(thread, e);
        a[i] = lower0[e];
        b[i] = lower1[e];
    }
}

// The forward pass over rows of what rounding takes away, src, and the division by prime `from`:
// dst = (x - src) / from + add (permuted if there is perm) + plus. INVERSE: followed by the inverse's pass over rows.
// grid (N / 1024, items)
KERNEL(Rows::THREADS) drop(
    const Item* items, const Prime* primes, const ulonglong2* __restrict__ roots,
    const ulonglong2* __restrict__ inverse_roots, const Drop* drops, int count) {
    SHARED(s);
    const Item& it = items[blockIdx.y];
    const int thread = threadIdx.x, start = blockIdx.x * Rows::WORDS;
    const u64 q = primes[it.prime].q;
    const Drop d = drops[it.from * count + it.prime];
    const u64 *src = words(it.src) + start, *x = words(it.x) + start;
    const u64 *add = words(it.add), *plus = words(it.plus);
    const u32* perm = (const u32*)it.perm;
    u64 v[8];
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = src[First<Rows>::place(thread, e)];
    forward_tile<Rows>(v, s, roots + (size_t)it.prime * N, base_of(blockIdx.x), thread, q);
#pragma unroll
    for (int e = 0; e < 8; e++) {
        int i = Last<Rows>::place(thread, e), whole = start + i;
        v[e] = below(scaled(x[i] + ((q << 3) - v[e]), d.inverse, d.inverse_shifted, q), q);
        if (add) v[e] = below(v[e] + add[perm ? perm[whole] : whole], q);
        if (plus) v[e] = below(v[e] + plus[whole], q);
    }
    u64* dst = words(it.dst) + start;
    if (it.flags & INVERSE) {
        __syncthreads();
        inverse_tile<Rows>(v, s, inverse_roots + (size_t)it.prime * N, base_of(blockIdx.x), thread, q);
    }
#pragma unroll
    for (int e = 0; e < 8; e++)
        dst[it.flags & INVERSE ? First<Rows>::place(thread, e) : Last<Rows>::place(thread, e)] = v[e];
}

// Whole numbers modulo a prime, and the forward pass over columns. src: the lower words of their sizes; N words on, the
// upper ones, with signs on top. grid (2**S2 / 16, items)
KERNEL(Columns::THREADS) residues(const Item* items, const Prime* primes, const ulonglong2* __restrict__ roots) {
    SHARED(s);
    const Item& it = items[blockIdx.y];
    const int thread = threadIdx.x, tile = blockIdx.x;
    const Prime& p = primes[it.prime];
    const u64* src = words(it.src);
    u64 v[8];
#pragma unroll
    for (int e = 0; e < 8; e++) {
        int i = in_columns(First<Columns>::place(thread, e), tile);
        u64 upper = src[i + N], r = reduced_wide(upper & ~(1ull << 63), src[i], p);
        v[e] = upper >> 63 && r ? p.q - r : r;
    }
    forward_tile<Columns>(v, s, roots + (size_t)it.prime * N, 1, thread, p.q);
    u64* dst = words(it.dst);
#pragma unroll
    for (int e = 0; e < 8; e++) dst[in_columns(Last<Columns>::place(thread, e), tile)] = v[e];
}

// The forward pass over rows of src: dst = x less that, or that where there is no x. grid (N / 1024, items)
KERNEL(Rows::THREADS) subtract(const Item* items, const Prime* primes, const ulonglong2* __restrict__ roots) {
    SHARED(s);
    const Item& it = items[blockIdx.y];
    const int thread = threadIdx.x, start = blockIdx.x * Rows::WORDS;
    const u64 q = primes[it.prime].q;
    const u64 *src = words(it.src) + start, *x = words(it.x) + start;
    u64 v[8];
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = src[First<Rows>::place(thread, e)];
    forward_tile<Rows>(v, s, roots + (size_t)it.prime * N, base_of(blockIdx.x), thread, q);
    u64* dst = words(it.dst) + start;
#pragma unroll
    for (int e = 0; e < 8; e++) {
        int i = Last<Rows>::place(thread, e);
        u64 y = below(below(below(v[e], q << 2), q << 1), q);
        dst[i] = it.x ? below(x[i] + (q - y), q) : y;
    }
}

// ---- word by word: grid (N / 512, items), 256 threads with two words each ----
#define TWO ((blockIdx.x * 256 + threadIdx.x) * 2)
DEVICE ulonglong2 two(u64 address, size_t i) { return *(const ulonglong2*)(words(address) + i); }
DEVICE void put(u64 address, size_t i, u64 a, u64 b) {
    ulonglong2 y;
    y.x = a, y.y = b;
    *(ulonglong2*)(words(address) + i) = y;
}

enum { NEGATE, TIMES, PLUS, TIMES_PLAIN, PLUS_PLAIN, COPY };
// dst = src, changed as flags say: by the constant key (add: its quotient for `scaled`), or by the words at x.
KERNEL(256) each(const Item* items, const Prime* primes) {
    const Item& it = items[blockIdx.y];
    const Prime& p = primes[it.prime];
    const u64 q = p.q;
    ulonglong2 a = two(it.src, TWO), b = it.x ? two(it.x, TWO) : a;
    switch (it.flags) {
        case NEGATE: a.x = a.x ? q - a.x : 0, a.y = a.y ? q - a.y : 0; break;
        case TIMES:
            a.x = below(scaled(a.x, it.key, it.add, q), q), a.y = below(scaled(a.y, it.key, it.add, q), q);
            break;
        case PLUS: a.x = below(a.x + it.key, q), a.y = below(a.y + it.key, q); break;
        case TIMES_PLAIN:
            a.x = reduced_wide(__umul64hi(a.x, b.x), a.x * b.x, p);
            a.y = reduced_wide(__umul64hi(a.y, b.y), a.y * b.y, p);
            break;
        case PLUS_PLAIN: a.x = below(a.x + b.x, q), a.y = below(a.y + b.y, q); break;
    }
    put(it.dst, TWO, a.x, a.y);
}

// dst = the sum of `count` limbs, whose addresses are at x.
KERNEL(256) sum(const Item* items, const Prime* primes) {
    const Item& it = items[blockIdx.y];
    const u64 q = primes[it.prime].q;
    const u64* list = words(it.x);
    ulonglong2 total = two(list[0], TWO);
    for (u32 r = 1; r < it.count; r++) {
        ulonglong2 a = two(list[r], TWO);
        total.x = below(total.x + a.x, q), total.y = below(total.y + a.y, q);
    }
    put(it.dst, TWO, total.x, total.y);
}

// The sum of `count` products of ciphertexts, this prime's limb of three polynomials, key words apart, from dst on.
// x: for each product the addresses of this limb of both operands' first polynomials, and of their second.
KERNEL(256) dot(const Item* items, const Prime* primes) {
    const Item& it = items[blockIdx.y];
    const Prime& p = primes[it.prime];
    const u64* list = words(it.x);
    u64 upper[3][2] = {}, lower[3][2] = {};
#pragma unroll 2
    for (u32 r = 0; r < it.count; r++, list += 4) {
        const ulonglong2 a0 = two(list[0], TWO), a1 = two(list[1], TWO), b0 = two(list[2], TWO), b1 = two(list[3], TWO);
        add_product(upper[0][0], lower[0][0], a0.x, b0.x), add_product(upper[0][1], lower[0][1], a0.y, b0.y);
        add_product(upper[1][0], lower[1][0], a0.x, b1.x), add_product(upper[1][1], lower[1][1], a0.y, b1.y);
        add_product(upper[1][0], lower[1][0], a1.x, b0.x), add_product(upper[1][1], lower[1][1], a1.y, b0.y);
        add_product(upper[2][0], lower[2][0], a1.x, b1.x), add_product(upper[2][1], lower[2][1], a1.y, b1.y);
    }
#pragma unroll
    for (int c = 0; c < 3; c++) {
        u64 a = reduced_wide(upper[c][0], lower[c][0], p), b = reduced_wide(upper[c][1], lower[c][1], p);
        put(it.dst, TWO + c * it.key, a, b);
    }
}

#include "seeds.cuh"
