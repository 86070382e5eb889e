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

// The number of a thread's butterfly, or of a later one of it, with K bits let in at those of a round. Numbers of
// different bits add up, so a place is what the thread gives and a constant, which costs nothing.
template <class T, int LO, int K>
DEVICE constexpr int apart(int number) {
    constexpr int b = T::IN + LO;
    return (number >> b) << (b + K) | (number & ((1 << b) - 1));
}

// Where in its tile the k-th word of the g-th butterfly is, but for apart(thread).
template <class T, int LO, int K>
DEVICE constexpr int further(int g, int k) {
    return apart<T, LO, K>(g * T::THREADS) + (k << (T::IN + LO));
}

// Where in the shared array a word of rows lies: at no time two threads of a half warp in one bank. A half warp's words
// of columns are side by side.
DEVICE constexpr int bank(int x) { return x ^ (x >> 4 & 7) << 1 ^ (x >> 4 & 1); }

template <class T, int LO, int K>
DEVICE int shared_place(int thread, int further) {
    const int x = apart<T, LO, K>(thread);
    return T::IN ? x + further : bank(x) ^ bank(further);
}

// The number of the first stage's root for a word of a tile, but for its first row's; that of a sum is the sum.
template <class T, int LO, int K>
DEVICE constexpr int root_of(int x) {
    return (x >> (T::S + T::IN) << (T::S - LO - K)) + ((x >> T::IN & ((1 << T::S) - 1)) >> (LO + K));
}

// One stage of K, then the rest (by recursion, so that every index is known when this is compiled).
template <int K, int STAGE, int FIRST, int ROOT, class F>
DEVICE void forward_stages(u64 (&v)[8], const ulonglong2* roots, int root, const F& f) {
    const ulonglong2* own = roots + (root << STAGE);
#pragma unroll
    for (int a = 0; a < 1 << STAGE; a++) {
        const ulonglong2 w = own[(ROOT << STAGE) + a];
#pragma unroll
        for (int b = 0; b < 1 << (K - 1 - STAGE); b++) {
            const int i = FIRST + (a << (K - STAGE)) + b;
            f.forward(v[i], v[i + (1 << (K - 1 - STAGE))], w);
        }
    }
    if constexpr (STAGE + 1 < K) forward_stages<K, STAGE + 1, FIRST, ROOT>(v, roots, root, f);
}
template <int K, int STAGE, int FIRST, int ROOT, class F>
DEVICE void inverse_stages(u64 (&v)[8], const ulonglong2* roots, int root, const F& f) {
    const ulonglong2* own = roots + (root << STAGE);
#pragma unroll
    for (int a = 0; a < 1 << STAGE; a++) {
        const ulonglong2 w = own[(ROOT << STAGE) + a];
#pragma unroll
        for (int b = 0; b < 1 << (K - 1 - STAGE); b++) {
            const int i = FIRST + (a << (K - STAGE)) + b;
            f.inverse(v[i], v[i + (1 << (K - 1 - STAGE))], w, STAGE == 0);
        }
    }
    if constexpr (STAGE > 0) inverse_stages<K, STAGE - 1, FIRST, ROOT>(v, roots, root, f);
}

// A round's stages; root: that of the tile's first row.
template <class T, int LO, int K, int G = 0, class F>
DEVICE void forward_round(u64 (&v)[8], const ulonglong2* roots, int root, int thread, const F& f) {
    constexpr int more = root_of<T, LO, K>(further<T, LO, K>(G, 0));
    const int own = (root << (T::S - LO - K)) + root_of<T, LO, K>(apart<T, LO, K>(thread));
    forward_stages<K, 0, (G << K), more>(v, roots, own, f);
    if constexpr (G + 1 < 8 >> K) forward_round<T, LO, K, G + 1>(v, roots, root, thread, f);
}
template <class T, int LO, int K, int G = 0, class F>
DEVICE void inverse_round(u64 (&v)[8], const ulonglong2* roots, int root, int thread, const F& f) {
    constexpr int more = root_of<T, LO, K>(further<T, LO, K>(G, 0));
    const int own = (root << (T::S - LO - K)) + root_of<T, LO, K>(apart<T, LO, K>(thread));
    inverse_stages<K, K - 1, (G << K), more>(v, roots, own, f);
    if constexpr (G + 1 < 8 >> K) inverse_round<T, LO, K, G + 1>(v, roots, root, thread, f);
}

// A round: its lowest bit and its bits. A thread's word e is the (e mod 2**K)-th of its (e / 2**K)-th butterfly.
template <class T, int LO, int K>
struct Round {
    DEVICE constexpr int more(int e) { return further<T, LO, K>(e >> K, e & ((1 << K) - 1)); }
    DEVICE int place(int thread, int e) { return apart<T, LO, K>(thread) + more(e); }
    DEVICE int shared(int thread, int e) { return shared_place<T, LO, K>(thread, more(e)); }
};
template <class T> using First = Round<T, T::S - T::K1, T::K1>;
template <class T> using Middle = Round<T, T::K3, T::K2>;
template <class T> using Last = Round<T, 0, T::K3>;

// The forward transform of a tile: v in the order of the first round, then in that of the last; whole numbers are below
// 8q both times, real ones between passes up to 3 and 8q, after both up to 13q.
template <class T, class F>
DEVICE void forward_tile(u64 (&v)[8], u64* s, const ulonglong2* roots, int base, int thread, const F& f) {
    forward_round<T, T::S - T::K1, T::K1>(v, roots, base, thread, f);
#pragma unroll
    for (int e = 0; e < 8; e++) s[First<T>::shared(thread, e)] = v[e];
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = s[Middle<T>::shared(thread, e)];
    forward_round<T, T::K3, T::K2>(v, roots, base, thread, f);
#pragma unroll
    for (int e = 0; e < 8; e++) s[Middle<T>::shared(thread, e)] = v[e];
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = s[Last<T>::shared(thread, e)];
    forward_round<T, 0, T::K3>(v, roots, base, thread, f);
}

// Its inverse but for a factor of 2**-S, the orders the other way round; below 4q both times, real ones below q after.
template <class T, class F>
DEVICE void inverse_tile(u64 (&v)[8], u64* s, const ulonglong2* roots, int base, int thread, const F& f) {
    inverse_round<T, 0, T::K3>(v, roots, base, thread, f);
#pragma unroll
    for (int e = 0; e < 8; e++) s[Last<T>::shared(thread, e)] = v[e];
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = s[Middle<T>::shared(thread, e)];
    inverse_round<T, T::K3, T::K2>(v, roots, base, thread, f);
#pragma unroll
    for (int e = 0; e < 8; e++) s[Middle<T>::shared(thread, e)] = v[e];
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = s[First<T>::shared(thread, e)];
    inverse_round<T, T::S - T::K1, T::K1>(v, roots, base, thread, f);
}

// Where a tile's word is in its limb, and the root of its first row.
DEVICE int in_columns(int x, int tile) { return (x >> 4) << S2 | tile << 4 | (x & 15); }
DEVICE int base_of(int tile) { return (1 << S1) + (tile << (Rows::LOG - S2)); }
