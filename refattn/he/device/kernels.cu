// SEAL's operations on a GPU, word for word, for one degree, 2**LOG_DEGREE (13, 14 or 15).
//
// A limb is N words modulo one prime. A launch has a list of items; an item is about one limb, and has addresses, so a
// batch may be of anything anywhere. A key switch is five launches: inverse_rows, spread, times_key, spread, drop; a
// rescaling three, of which the first is within a drop that comes before. What comes before or after a transform's pass
// is done with it.
#include "modular.cuh"
#include "fields.cuh"
#include "tiles.cuh"

struct Item {
    u64 src, dst, x, add, plus, perm, key;
    u32 prime, from, count, flags, first, limbs;
};
struct Drop {  // by (dropped, kept)
    u64 inverse, inverse_shifted, fix;  // 1/dropped modulo kept; kept less half of dropped
};
enum { ROUND = 1, INVERSE = 2 };

// Two words side by side: a thread's words of the last round of rows are such pairs, and one access is for both.
DEVICE ulonglong2 two(const u64* x, int i) { return *(const ulonglong2*)(x + i); }
DEVICE void put(u64* x, int i, u64 a, u64 b) {
    ulonglong2 y;
    y.x = a, y.y = b;
    *(ulonglong2*)(x + i) = y;
}
// A limb's words as the last round has them, from start on; permuted if there is perm.
DEVICE void in_last(u64 (&v)[8], const u64* x, const u32* perm, int start, int thread) {
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
        const int i = start + Last<Rows>::place(thread, e);
        if (perm) {
            v[e] = x[perm[i]], v[e + 1] = x[perm[i + 1]];
        } else {
            const ulonglong2 y = two(x, i);
            v[e] = y.x, v[e + 1] = y.y;
        }
    }
}

// A kernel's text for fields of both kinds, of which the one of a prime is taken.
#define BY_PRIME(prime, text, ...) ((prime).size ? text<Real>(__VA_ARGS__) : text<Whole>(__VA_ARGS__))

// The inverse's pass over rows: dst = src, permuted if there is perm; below 4q. grid (N / 1024, items)
template <class F>
DEVICE void inverse_rows_in(
    const Item& it, const Prime* primes, const ulonglong2* __restrict__ inverse_roots, u64* s) {
    const F f(primes[it.prime]);
    const int thread = threadIdx.x, start = blockIdx.x * Rows::WORDS;
    const u64* src = words(it.src);
    const u32* perm = (const u32*)it.perm;
    u64 v[8];
    in_last(v, src, perm, start, thread);
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = f.of(v[e]);
    inverse_tile<Rows>(v, s, inverse_roots + (size_t)it.prime * N, base_of(blockIdx.x), thread, f);
    u64* dst = words(it.dst) + start;
#pragma unroll
    for (int e = 0; e < 8; e++) dst[First<Rows>::place(thread, e)] = v[e];
}
KERNEL(Rows::THREADS) inverse_rows(
    const Item* items, const Prime* primes, const ulonglong2* __restrict__ inverse_roots) {
    SHARED(s);
    const Item& it = items[blockIdx.y];
    BY_PRIME(primes[it.prime], inverse_rows_in, it, primes, inverse_roots, s);
}

// The inverse's pass over columns, modulo prime `from`; then for k = first, ..., first + count - 1 the forward pass
// over columns modulo prime k, or the last one where k is `limbs`: into dst + k·key words. Nothing for prime `from`.
// ROUND: half of the prime is added before, and taken away after. grid (2**S2 / 16, items)
template <class F>
DEVICE void back(const Item& it, const Prime& from, const ulonglong2* __restrict__ inverse_roots, u64* s, u64* x) {
    const F f(from);
    const int thread = threadIdx.x;
    const u64* src = words(it.src);
    u64 v[8];
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = src[in_columns(Last<Columns>::place(thread, e), blockIdx.x)];
    inverse_tile<Columns>(v, s, inverse_roots + (size_t)it.from * N, 1, thread, f);
    const u64 half = it.flags & ROUND ? from.q >> 1 : 0;
#pragma unroll
    for (int e = 0; e < 8; e++)
        x[e * Columns::THREADS] = below(f.times(v[e], from.inverse, from.inverse_shifted) + half, from.q);
}
template <class F>
DEVICE void brought_to(const Prime& p, u64 from, u64 fix, const ulonglong2* __restrict__ roots, u64* s, u64* dst) {
    const F f(p);
    const int thread = again(threadIdx.x);
    const u64* x = s + Columns::WORDS + thread;
    const bool larger = from > F::REACH * p.q;
    u64 v[8];
#pragma unroll
    for (int e = 0; e < 8; e++) {
        v[e] = x[e * Columns::THREADS];
        v[e] = f.of((larger ? reduced(v[e], p) : v[e]) + fix);
    }
    __syncthreads();  // all have read what the tile before left in s
    forward_tile<Columns>(v, s, roots, 1, thread, f);
#pragma unroll
    for (int e = 0; e < 8; e++) dst[in_columns(Last<Columns>::place(thread, e), blockIdx.x)] = v[e];
}
extern "C" __global__ void __launch_bounds__(Columns::THREADS, 1024 / Columns::THREADS) spread(
    const Item* items, const Prime* primes, const ulonglong2* __restrict__ roots,
    const ulonglong2* __restrict__ inverse_roots, const Drop* drops, int count) {
    SHARED(s);
    const Item& it = items[blockIdx.y];
    const Prime& from = primes[it.from];
    u64* x = s + Columns::WORDS + threadIdx.x;  // what each thread keeps: registers are short
    BY_PRIME(from, back, it, from, inverse_roots, s, x);
#pragma unroll 1
    for (u32 k = it.first; k < it.first + it.count; k++) {
        const u32 prime = k == it.limbs ? count - 1 : k;
        if (prime == it.from) continue;
        const Prime& p = primes[prime];
        const u64 fix = it.flags & ROUND ? drops[it.from * count + prime].fix : 0;
        u64* dst = words(it.dst) + k * it.key;
        BY_PRIME(p, brought_to, p, from.q, fix, roots + (size_t)prime * N, s, dst);
    }
}

// The forward pass over rows of `count` digits, src, modulo one prime, times the key's digits, summed in 128 bits: dst
// and add, the sums for the key's two polynomials. Digit `from` is not at src: it is x, permuted if there is perm.
// key: this prime's limb of the first digit's first polynomial. INVERSE: followed by the inverse's pass over rows.
// grid (N / 1024, items)
template <class F>
DEVICE void times_key_in(
    const Item* items, const Prime* primes, const ulonglong2* __restrict__ roots,
    const ulonglong2* __restrict__ inverse_roots, int count, u64* s) {
    const int start = blockIdx.x * Rows::WORDS;
    u64 upper0[8] = {}, lower0[8] = {}, upper1[8] = {}, lower1[8] = {};
    constexpr int ROOM = Rows::WORDS;
    int turn = 0;  // two rooms in turns: who writes to one has seen all read from it
#pragma unroll 1
    for (u32 j = 0; j < items[blockIdx.y].count; j++) {
        const int thread = again(threadIdx.x);
        const Item& it = items[again(blockIdx.y)];
        const F f(primes[it.prime]);
        const u64* key = words(it.key) + (size_t)j * 2 * count * N + start;
        u64 v[8];
        if (j == it.from) {
            in_last(v, words(it.x), (const u32*)it.perm, start, thread);
        } else {
            const u64* src = words(it.src) + (size_t)j * N + start;
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = src[First<Rows>::place(thread, e)];
            forward_tile<Rows>(v, s + turn * ROOM, roots + (size_t)it.prime * N, base_of(blockIdx.x), thread, f);
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = f.word(v[e]);
            turn ^= 1;
        }
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
            const int i = Last<Rows>::place(thread, e);
            const ulonglong2 k0 = two(key, i), k1 = two(key, i + count * N);
            add_product(upper0[e], lower0[e], v[e], k0.x), add_product(upper0[e + 1], lower0[e + 1], v[e + 1], k0.y);
            add_product(upper1[e], lower1[e], v[e], k1.x), add_product(upper1[e + 1], lower1[e + 1], v[e + 1], k1.y);
        }
    }
    const int thread = again(threadIdx.x);
    const Item& it = items[again(blockIdx.y)];
    const Prime& p = primes[it.prime];
    const F f(p);
    const bool inverse = it.flags & INVERSE;
#pragma unroll
    for (int e = 0; e < 8; e++) {
        lower0[e] = reduced_wide(upper0[e], lower0[e], p);
        lower1[e] = reduced_wide(upper1[e], lower1[e], p);
    }
    if (inverse) {
        const ulonglong2* w = inverse_roots + (size_t)it.prime * N;
#pragma unroll
        for (int e = 0; e < 8; e++) lower0[e] = f.of(lower0[e]), lower1[e] = f.of(lower1[e]);
        inverse_tile<Rows>(lower0, s + turn * ROOM, w, base_of(blockIdx.x), thread, f);
        inverse_tile<Rows>(lower1, s + (turn ^ 1) * ROOM, w, base_of(blockIdx.x), thread, f);
    }
    u64 *a = words(it.dst) + start, *b = words(it.add) + start;
    if (inverse) {
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int i = First<Rows>::place(thread, e);
            a[i] = lower0[e], b[i] = lower1[e];
        }
    } else {
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
            const int i = Last<Rows>::place(thread, e);
            put(a, i, lower0[e], lower0[e + 1]), put(b, i, lower1[e], lower1[e + 1]);
        }
    }
}
extern "C" __global__ void __launch_bounds__(Rows::THREADS, 3) times_key(
    const Item* items, const Prime* primes, const ulonglong2* __restrict__ roots,
    const ulonglong2* __restrict__ inverse_roots, int count) {
    SHARED(s);
    BY_PRIME(primes[items[blockIdx.y].prime], times_key_in, items, primes, roots, inverse_roots, count, s);
}

// The forward pass over rows of what rounding takes away, src, and the division by prime `from`:
// dst = (x - src) / from + add (permuted if there is perm) + plus. INVERSE: followed by the inverse's pass over rows.
// grid (N / 1024, items)
template <class F>
DEVICE void drop_in(
    const Item& it, const Prime* primes, const ulonglong2* __restrict__ roots,
    const ulonglong2* __restrict__ inverse_roots, const Drop* drops, int count, u64* s) {
    const int thread = threadIdx.x, start = blockIdx.x * Rows::WORDS;
    const F f(primes[it.prime]);
    const u64 q = primes[it.prime].q;
    const Drop d = drops[it.from * count + it.prime];
    const u64 *src = words(it.src) + start, *x = words(it.x) + start;
    const u64 *add = words(it.add), *plus = words(it.plus);
    const u32* perm = (const u32*)it.perm;
    u64 v[8];
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = src[First<Rows>::place(thread, e)];
    forward_tile<Rows>(v, s, roots + (size_t)it.prime * N, base_of(blockIdx.x), thread, f);
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
        const int i = Last<Rows>::place(thread, e), whole = start + i;
        const ulonglong2 y = two(x, i);
        v[e] = f.times(f.less(y.x, v[e]), d.inverse, d.inverse_shifted);
        v[e + 1] = f.times(f.less(y.y, v[e + 1]), d.inverse, d.inverse_shifted);
        if (add) {
            if (perm) {
                v[e] = below(v[e] + add[perm[whole]], q), v[e + 1] = below(v[e + 1] + add[perm[whole + 1]], q);
            } else {
                const ulonglong2 z = two(add, whole);
                v[e] = below(v[e] + z.x, q), v[e + 1] = below(v[e + 1] + z.y, q);
            }
        }
        if (plus) {
            const ulonglong2 z = two(plus, whole);
            v[e] = below(v[e] + z.x, q), v[e + 1] = below(v[e + 1] + z.y, q);
        }
    }
    u64* dst = words(it.dst) + start;
    if (it.flags & INVERSE) {
        __syncthreads();
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] = f.of(v[e]);
        inverse_tile<Rows>(v, s, inverse_roots + (size_t)it.prime * N, base_of(blockIdx.x), thread, f);
#pragma unroll
        for (int e = 0; e < 8; e++) dst[First<Rows>::place(thread, e)] = v[e];
    } else {
#pragma unroll
        for (int e = 0; e < 8; e += 2) put(dst, Last<Rows>::place(thread, e), v[e], v[e + 1]);
    }
}
KERNEL(Rows::THREADS) drop(
    const Item* items, const Prime* primes, const ulonglong2* __restrict__ roots,
    const ulonglong2* __restrict__ inverse_roots, const Drop* drops, int count) {
    SHARED(s);
    const Item& it = items[blockIdx.y];
    BY_PRIME(primes[it.prime], drop_in, it, primes, roots, inverse_roots, drops, count, s);
}

// Whole numbers modulo a prime, and the forward pass over columns. src: the lower words of their sizes; N words on, the
// upper ones, with signs on top. grid (2**S2 / 16, items)
template <class F>
DEVICE void residues_in(const Item& it, const Prime& p, const ulonglong2* __restrict__ roots, u64* s) {
    const F f(p);
    const int thread = threadIdx.x, tile = blockIdx.x;
    const u64* src = words(it.src);
    u64 v[8];
#pragma unroll
    for (int e = 0; e < 8; e++) {
        int i = in_columns(First<Columns>::place(thread, e), tile);
        u64 upper = src[i + N], r = reduced_wide(upper & ~(1ull << 63), src[i], p);
        v[e] = f.of(upper >> 63 && r ? p.q - r : r);
    }
    forward_tile<Columns>(v, s, roots + (size_t)it.prime * N, 1, thread, f);
    u64* dst = words(it.dst);
#pragma unroll
    for (int e = 0; e < 8; e++) dst[in_columns(Last<Columns>::place(thread, e), tile)] = v[e];
}
KERNEL(Columns::THREADS) residues(const Item* items, const Prime* primes, const ulonglong2* __restrict__ roots) {
    SHARED(s);
    const Item& it = items[blockIdx.y];
    BY_PRIME(primes[it.prime], residues_in, it, primes[it.prime], roots, s);
}

// The forward pass over rows of src: dst = x less that, or that where there is no x. grid (N / 1024, items)
template <class F>
DEVICE void subtract_in(const Item& it, const Prime& p, const ulonglong2* __restrict__ roots, u64* s) {
    const F f(p);
    const int thread = threadIdx.x, start = blockIdx.x * Rows::WORDS;
    const u64* src = words(it.src) + start;
    u64 v[8];
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = src[First<Rows>::place(thread, e)];
    forward_tile<Rows>(v, s, roots + (size_t)it.prime * N, base_of(blockIdx.x), thread, f);
    const u64 q = p.q, *x = it.x ? words(it.x) + start : nullptr;
    u64* dst = words(it.dst) + start;
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const int i = Last<Rows>::place(thread, e);
        const u64 y = f.rest(v[e]);
        dst[i] = x ? below(x[i] + (q - y), q) : y;
    }
}
KERNEL(Rows::THREADS) subtract(const Item* items, const Prime* primes, const ulonglong2* __restrict__ roots) {
    SHARED(s);
    const Item& it = items[blockIdx.y];
    BY_PRIME(primes[it.prime], subtract_in, it, primes[it.prime], roots, s);
}

// ---- word by word: grid (N / 512, items), 256 threads with two words each ----
#define TWO ((blockIdx.x * 256 + threadIdx.x) * 2)
DEVICE ulonglong2 two(u64 address, size_t i) { return *(const ulonglong2*)(words(address) + i); }
DEVICE void put(u64 address, size_t i, u64 a, u64 b) { put(words(address) + i, 0, a, b); }

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

// DOTS sums of `count` products of ciphertexts, whose first operands are the same: this prime's limb of three
// polynomials each, key words apart. list: where each sum goes; then for each product the addresses of this limb of the
// first operand's polynomials, and of each second one's.
template <int DOTS>
DEVICE void dots_of(const Item& it, const u64* list, const Prime& p) {
    const size_t at = blockIdx.x * 128 + threadIdx.x;
    u64 upper[DOTS][3] = {}, lower[DOTS][3] = {};
    const u64* from = list + DOTS;
#pragma unroll 2
    for (u32 r = 0; r < it.count; r++, from += 2 + 2 * DOTS) {
        const u64 a0 = words(from[0])[at], a1 = words(from[1])[at];
        u64 b0[DOTS], b1[DOTS];
#pragma unroll
        for (int d = 0; d < DOTS; d++) b0[d] = words(from[2 + 2 * d])[at], b1[d] = words(from[3 + 2 * d])[at];
#pragma unroll
        for (int d = 0; d < DOTS; d++) {
            add_product(upper[d][0], lower[d][0], a0, b0[d]);
            add_product(upper[d][1], lower[d][1], a0, b1[d]);
            add_product(upper[d][1], lower[d][1], a1, b0[d]);
            add_product(upper[d][2], lower[d][2], a1, b1[d]);
        }
    }
#pragma unroll
    for (int d = 0; d < DOTS; d++)
#pragma unroll
        for (int c = 0; c < 3; c++) words(list[d])[at + c * it.key] = reduced_wide(upper[d][c], lower[d][c], p);
}
// `limbs` of them, 1 to 4. grid (N / 128, items)
KERNEL(128) dot(const Item* items, const Prime* primes) {
    const Item& it = items[blockIdx.y];
    const Prime& p = primes[it.prime];
    const u64* list = words(it.x);
    switch (it.limbs) {
        case 1: dots_of<1>(it, list, p); break;
        case 2: dots_of<2>(it, list, p); break;
        case 3: dots_of<3>(it, list, p); break;
        case 4: dots_of<4>(it, list, p); break;
    }
}

#include "seeds.cuh"
