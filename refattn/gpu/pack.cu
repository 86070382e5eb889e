// Packs a boolean mask (one byte an element, any strides, 0 where an axis is spread) to bits: bit j % 32 of word j /
// 32 of a row.
//
// Steps
//  1. The words of all rows are numbered; a warp takes one word at a time, in turns (any grid).
//  2. Each lane reads the byte of its key; a ballot makes the word; bits past n_k are 0. Lane 0 stores it.
//
// Launch: block a multiple of 32, any grid. out: (b, h, n_q, words) contiguous, words = ceil(n_k / 32); an axis that
// is spread over batches, heads or rows has length 1 here, and stride 0 in the kernel that reads it.

struct PackParams {
    const unsigned char* mask; unsigned* out;
    long long mask_b, mask_h, mask_q, mask_k;             // strides in bytes
    int b, h, n_q, n_k;
};

extern "C" __global__ void pack(const __grid_constant__ PackParams p) {
    int lane = threadIdx.x % 32, words = (p.n_k + 31) / 32;
    long long warps = (long long)gridDim.x * (blockDim.x / 32), total = (long long)p.b * p.h * p.n_q * words;
    for (long long i = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; i < total; i += warps) {
        long long line = i / words, plane = line / p.n_q;   // row of all rows, head of all heads
        int key = (int)(i % words) * 32 + lane;
        const unsigned char* row = p.mask + plane / p.h * p.mask_b + plane % p.h * p.mask_h + line % p.n_q * p.mask_q;
        bool allowed = (long long)(i % words) * 32 + lane < p.n_k && row[key * p.mask_k];
        unsigned word = __ballot_sync(~0u, allowed);
        if (lane == 0) p.out[i] = word;
    }
}
