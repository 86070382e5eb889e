// What simt.cu and mma.cu are given, by value. Strides are in elements, last axes are contiguous; absent arrays are
// null.
struct Params {
    const void *q, *k, *v; void *out; void *lse;            // lse, sink: float (double for double inputs)
    const void *bias; const void *sink;                     // sink: (h)
    // allowed, packed by pack.cu: key j of a row is bit j % 32 of word j / 32
    const unsigned* mask;
    const unsigned char* blocks;                            // block mask, 0: hidden
    const int *cu_q, *cu_k;                                 // offsets of packed sequences
    unsigned char* redo;                                    // see simt.cu
    long long q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n;
    long long o_b, o_h, o_n, lse_b, lse_h;
    long long bias_b, bias_h, bias_q, bias_k;               // 0 where an axis is spread
    long long mask_b, mask_h, mask_q;                       // in words
    long long blocks_b, blocks_h, blocks_q;                 // in bytes
    double scale, softcap;
    int b, h, h_kv, n_q, n_k, d_k, d_v;
    // causal: 0 none, 1 top left, 2 bottom right; window: -1 no limit
    int causal, left, right;
    int block_q, block_k, sequences;
};
