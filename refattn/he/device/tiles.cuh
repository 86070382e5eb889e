// Number-theoretic transforms of N points in two passes over tiles: S1 stages on columns, S2 on rows of 2**S2 points.
//
// A tile has 2**LOG words; the IN lowest bits of a word's number only tell columns side by side. A thread has 8 of its
// words, and does its stages in three rounds of 3, up to 3, and 1 or 2; between rounds words change hands in shared
// memory. A round that does bits [LO, LO + K) has 2**K words of a butterfly in one thread.

constexpr int S1 = (LOG_DEGREE + 1) / 2, S2 = LOG_DEGREE - S1;

template <int S_, int IN_, int LOG_>
struct Tile {
    static constexpr int S = S_, IN = IN_, LOG = LOG_, WORDS = 1 << LOG_, THREADS = WORDS / 8;
    static constexpr int K1 = 3, K3 = S_ == 8 ? 2 : 1, K2 = S_ - K1 - K3;  // stages of the rounds, from the top
};
using Columns = Tile<S1, 4, S1 + 4>;  // 16 columns of 2**S1 points
using Rows = Tile<S2, 0, 10>;  // rows of contiguous points

// Where in the shared array a word lies: no two threads of a half warp in one bank.
DEVICE int padded(int x) { return x + (x >> 3); }

// Where in its tile a thread's word is: the k-th of the g-th butterfly.
template <class T, int LO, int K>
DEVICE int place(int thread, int g, int k) {
    constexpr int b = T::IN + LO;
    int rest = thread + g * T::THREADS;
    return (rest >> b) << (b + K) | k << b | (rest & ((1 << b) - 1));
}

// The number of the first stage's root for a butterfly; base: that of the tile's first row.
template <class T, int LO, int K>
DEVICE u32 first_root(int thread, int g, u32 base) {
    int x = place<T, LO, K>(thread, g, 0);
    u32 point = (x >> T::IN) & ((1 << T::S) - 1), row = x >> (T::S + T::IN);
    return ((base + row) << (T::S - LO - K)) + (point >> (LO + K));
}

// One stage of K, then the rest (by recursion, so that every index is known when this is compiled).
template <int K, int STAGE, int FIRST>
DEVICE void forward_stages(u64 (&v)[8], const ulonglong2* roots, u32 root, u64 q) {
#pragma unroll
    for (int a = 0; a < 1 << STAGE; a++) {
        const ulonglong2 w = roots[(root << STAGE) + a];
#pragma unroll
        for (int b = 0; b < 1 << (K - 1 - STAGE); b++) {
            const int i = FIRST + (a << (K - STAGE)) + b, j = i + (1 << (K - 1 - STAGE));
            u64 x = below(v[i], q << 1), y = scaled(v[j], w.x, w.y, q);
            v[i] = x + y;
            v[j] = x + ((q << 1) - y);
        }
    }
    if constexpr (STAGE + 1 < K) forward_stages<K, STAGE + 1, FIRST>(v, roots, root, q);
}
template <int K, int STAGE, int FIRST>
DEVICE void inverse_stages(u64 (&v)[8], const ulonglong2* roots, u32 root, u64 q) {
#pragma unroll
    for (int a = 0; a < 1 << STAGE; a++) {
        const ulonglong2 w = roots[(root << STAGE) + a];
#pragma unroll
        for (int b = 0; b < 1 << (K - 1 - STAGE); b++) {
            const int i = FIRST + (a << (K - STAGE)) + b, j = i + (1 << (K - 1 - STAGE));
            u64 x = v[i], y = v[j];
            v[i] = below(x + y, q << 1);
            v[j] = scaled(x + ((q << 1) - y), w.x, w.y, q);
        }
    }
    if constexpr (STAGE > 0) inverse_stages<K, STAGE - 1, FIRST>(v, roots, root, q);
}

template <class T, int LO, int K, int G = 0>
DEVICE void forward_round(u64 (&v)[8], const ulonglong2* roots, u32 base, int thread, u64 q) {
    forward_stages<K, 0, (G << K)>(v, roots, first_root<T, LO, K>(thread, G, base), q);
    if constexpr (G + 1 < 8 >> K) forward_round<T, LO, K, G + 1>(v, roots, base, thread, q);
}
template <class T, int LO, int K, int G = 0>
DEVICE void inverse_round(u64 (&v)[8], const ulonglong2* roots, u32 base, int thread, u64 q) {
    inverse_stages<K, K - 1, (G << K)>(v, roots, first_root<T, LO, K>(thread, G, base), q);
    if constexpr (G + 1 < 8 >> K) inverse_round<T, LO, K, G + 1>(v, roots, base, thread, q);
}

// A thread's word e is the (e mod 2**K)-th of its (e / 2**K)-th butterfly: of the first round, and of the last.
template <class T>
DEVICE int place_first(int thread, int e) { return place<T, T::S - T::K1, T::K1>(thread, e >> T::K1, e & 7); }
template <class T>
DEVICE int place_last(int thread, int e) {
    return place<T, 0, T::K3>(thread, e >> T::K3, e & ((1 << T::K3) - 1));
}
template <class T>
DEVICE int place_middle(int thread, int e) {
    return place<T, T::K3, T::K2>(thread, e >> T::K2, e & ((1 << T::K2) - 1));
}

// The forward transform of a tile: v in the order of the first round, then in that of the last; below 4q both times.
template <class T>
DEVICE void forward_tile(u64 (&v)[8], u64* s, const ulonglong2* roots, u32 base, int thread, u64 q) {
    forward_round<T, T::S - T::K1, T::K1>(v, roots, base, thread, q);
#pragma unroll
    for (int e = 0; e < 8; e++) s[padded(place_first<T>(thread, e))] = v[e];
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = s[padded(place_middle<T>(thread, e))];
    forward_round<T, T::K3, T::K2>(v, roots, base, thread, q);
#pragma unroll
    for (int e = 0; e < 8; e++) s[padded(place_middle<T>(thread, e))] = v[e];
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = s[padded(place_last<T>(thread, e))];
    forward_round<T, 0, T::K3>(v, roots, base, thread, q);
}

// Its inverse but for a factor of 2**-S, the orders the other way round; below 2q both times.
template <class T>
DEVICE void inverse_tile(u64 (&v)[8], u64* s, const ulonglong2* roots, u32 base, int thread, u64 q) {
    inverse_round<T, 0, T::K3>(v, roots, base, thread, q);
#pragma unroll
    for (int e = 0; e < 8; e++) s[padded(place_last<T>(thread, e))] = v[e];
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = s[padded(place_middle<T>(thread, e))];
    inverse_round<T, T::K3, T::K2>(v, roots, base, thread, q);
#pragma unroll
    for (int e = 0; e < 8; e++) s[padded(place_middle<T>(thread, e))] = v[e];
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = s[padded(place_first<T>(thread, e))];
    inverse_round<T, T::S - T::K1, T::K1>(v, roots, base, thread, q);
}

// Where a tile's word is in its limb, and the root of its first row.
DEVICE int in_columns(int x, int tile) { return (x >> 4) << S2 | tile << 4 | (x & 15); }
DEVICE u32 base_of(int tile) { return (1u << S1) + (tile << (Rows::LOG - S2)); }
