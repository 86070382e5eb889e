// Seeds of polynomials, expanded as seeds.py does: SEAL's Blake2xb stream, reduced modulo each prime.
// An item is a polynomial of `limbs` primes: src its seed, dst its words, x room for its roots (8 words for each 512),
// add a list of places whose words are left out: how many, then at most `count` places.
DEVICE u64 turned(u64 x, int bits) { return x >> bits | x << (64 - bits); }

#define START                                                                                                  \
    {0x6A09E667F3BCC908ull, 0xBB67AE8584CAA73Bull, 0x3C6EF372FE94F82Bull, 0xA54FF53A5F1D36F1ull,                \
     0x510E527FADE682D1ull, 0x9B05688C2B3E6C1Full, 0x1F83D9ABFB41BD6Bull, 0x5BE0CD19137E2179ull}
#define MIX(a, b, c, d, x, y)     \
    v[a] += v[b] + (x);           \
    v[d] = turned(v[d] ^ v[a], 32); \
    v[c] += v[d];                 \
    v[b] = turned(v[b] ^ v[c], 24); \
    v[a] += v[b] + (y);           \
    v[d] = turned(v[d] ^ v[a], 16); \
    v[c] += v[d];                 \
    v[b] = turned(v[b] ^ v[c], 63);
#define MIX_ALL(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, aa, ab, ac, ad, ae, af)                           \
    MIX(0, 4, 8, 12, m[a0], m[a1]) MIX(1, 5, 9, 13, m[a2], m[a3]) MIX(2, 6, 10, 14, m[a4], m[a5])         \
    MIX(3, 7, 11, 15, m[a6], m[a7]) MIX(0, 5, 10, 15, m[a8], m[a9]) MIX(1, 6, 11, 12, m[aa], m[ab])       \
    MIX(2, 7, 8, 13, m[ac], m[ad]) MIX(3, 4, 9, 14, m[ae], m[af])

// BLAKE2b's state after a block of 16 words (RFC 7693, section 3.2).
DEVICE void compress(u64 (&h)[8], const u64 (&m)[16], u64 taken, bool last) {
    const u64 start[8] = START;
    u64 v[16];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = h[i], v[i + 8] = start[i];
    v[12] ^= taken;
    if (last) v[14] = ~v[14];
    MIX_ALL(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    MIX_ALL(14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3)
    MIX_ALL(11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4)
    MIX_ALL(7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8)
    MIX_ALL(9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13)
    MIX_ALL(2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9)
    MIX_ALL(12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11)
    MIX_ALL(13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10)
    MIX_ALL(6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5)
    MIX_ALL(10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0)
    MIX_ALL(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    MIX_ALL(14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3)
#pragma unroll
    for (int i = 0; i < 8; i++) h[i] ^= v[i] ^ v[i + 8];
}
// The root of a block of 512 words, by its counter.
DEVICE void root_of(u64 (&h)[8], const u64* seed, u64 counter) {
    const u64 start[8] = START;
    u64 m[16] = {};
#pragma unroll
    for (int i = 0; i < 8; i++) h[i] = start[i], m[i] = seed[i];
    h[0] ^= 0x01014040ull;  // depth, fan-out, bytes of the key and the digest
    h[1] ^= 4096ull << 32;  // bytes in all
#pragma unroll 1
    for (int last = 0; last < 2; last++) {  // the key, then the counter
        compress(h, m, 128 + 8 * last, last);
#pragma unroll
        for (int i = 0; i < 8; i++) m[i] = 0;
        m[0] = counter;
    }
}
// The i-th 8 words of a block.
DEVICE void leaf_of(u64 (&h)[8], const u64* root, u64 i) {
    const u64 start[8] = START;
    u64 m[16] = {};
#pragma unroll
    for (int k = 0; k < 8; k++) h[k] = start[k], m[k] = root[k];
    h[0] ^= 64ull | 64ull << 32;  // bytes of the digest and a leaf
    h[1] ^= 4096ull << 32 ^ i;
    h[2] ^= 64ull << 8;  // bytes inside
    compress(h, m, 64, true);
}

// A thread has 512 words' root. grid (limbs·N / 512 / 64, items)
KERNEL(64) seed_roots(const Item* items) {
    const Item& it = items[blockIdx.y];
    const u32 block = blockIdx.x * 64 + threadIdx.x;
    if (block >= it.limbs * (u32)(N / 512)) return;
    if (block == 0) words(it.add)[0] = 0;
    u64 h[8];
    root_of(h, words(it.src), block);
    u64* out = words(it.x) + (size_t)block * 8;
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = h[i];
}
// A thread has 8 words. grid (limbs·N / 8 / 128, items)
KERNEL(128) seed_words(const Item* items, const Prime* primes) {
    const Item& it = items[blockIdx.y];
    const u32 leaf = blockIdx.x * 128 + threadIdx.x;
    if (leaf >= it.limbs * (u32)(N / 8)) return;
    u64 h[8];
    leaf_of(h, words(it.x) + (size_t)(leaf >> 6) * 8, leaf & 63);
    const Prime& p = primes[leaf >> (LOG_DEGREE - 3)];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (h[i] >= p.most) {
            u64 k = atomicAdd(words(it.add), 1ull);
            if (k < it.count) words(it.add)[1 + k] = (u64)leaf * 8 + i;
        }
        h[i] = reduced(h[i], p);
    }
#pragma unroll
    for (int i = 0; i < 8; i += 2) put(it.dst, (size_t)leaf * 8 + i, h[i], h[i + 1]);
}
// What is left out takes the stream's next words, by order of places: hardly ever any. grid (1, items), one thread
KERNEL(1) seed_again(const Item* items, const Prime* primes) {
    const Item& it = items[blockIdx.y];
    const u64* list = words(it.add) + 1;
    const u64 count = list[-1] < it.count ? list[-1] : it.count;
    u64 root[8], leaf[8], word = (u64)it.limbs * N, block = ~0ull, eight = ~0ull, least = 0;
    for (u64 done = 0; done < count; done++) {
        u64 place = ~0ull;
        for (u64 k = 0; k < count; k++)
            if (list[k] >= least && list[k] < place) place = list[k];
        least = place + 1;
        const Prime& p = primes[place >> LOG_DEGREE];
        u64 x = 0;
        do {
            if (word / 512 != block) root_of(root, words(it.src), block = word / 512);
            if (word / 8 != eight) leaf_of(leaf, root, (eight = word / 8) & 63);
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (i == (word & 7)) x = leaf[i];  // an index that is known keeps leaf in registers
            word++;
        } while (x >= p.most);
        words(it.dst)[place] = reduced(x, p);
    }
}
