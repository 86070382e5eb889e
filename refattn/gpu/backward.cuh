// What the backward kernels are given, by value. Strides are in elements, 0 where an axis is spread; absent arrays are
// null.
struct Array { void* data; long long b, h, n, m; };       // m: of the keys, for bias, its gradient and the masks
struct Params {
    Array q, k, v, out, dout, dq, dk, dv;
    Array lse, dlse, delta;                               // float (double for double inputs); dlse: the gradient of lse
    Array bias, dbias;
    Array mask;                                           // allowed, packed by pack.cu; strides in words
    Array blocks;                                         // block mask, a byte a block, 0: hidden
    const void* sink; void* dsink;                        // (h)
    const int *cu_q, *cu_k;                               // offsets of packed sequences
    // by row: the first and the last key that band and sequence leave
    int2* row_keys;
    // by key: the first and the last row that sees it
    int2* key_rows;
    // by 16 rows: the least and the most of the first, and of the last
    int4* granule_keys;
    // by 16 keys: the first and the last row that sees one of them
    int2* granule_rows;
    // by 16 rows (or keys) of a head: to be computed anew by simt_backward.cu
    unsigned char* redo;
    void* parts;                                          // dbias of each of `splits` parts of the work, to be added up
    double scale, softcap;
    int b, h, h_kv, n_q, n_k, d_k, d_v;
    // causal: 0 none, 1 top left, 2 bottom right; window: -1 no limit
    int causal, left, right;
    int block_q, block_k, sequences, splits;
};
constexpr int GRANULE = 16, NEVER = 0x7fffffff;           // a row without keys: first NEVER, last -1

// First and last row or key of a tile's granules, from `first` on; past the end they leave the interval as it is.
__device__ __forceinline__ int4 keys_of(const int4* granules, int first, int count, int n) {
    int4 x = make_int4(NEVER, -1, NEVER, -1);
    for (int i = first / GRANULE; i < (first + count) / GRANULE && i * GRANULE < n; i++) {
        const int4 g = granules[i];
        x.x = min(x.x, g.x), x.y = max(x.y, g.y), x.z = min(x.z, g.z), x.w = max(x.w, g.w);
    }
    return x;
}
__device__ __forceinline__ int2 rows_of(const int2* granules, int first, int count, int n) {
    int2 x = make_int2(NEVER, -1);
    for (int i = first / GRANULE; i < (first + count) / GRANULE && i * GRANULE < n; i++) {
        const int2 g = granules[i];
        x.x = min(x.x, g.x), x.y = max(x.y, g.y);
    }
    return x;
}
