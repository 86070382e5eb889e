// What surrounds the backward kernels: which keys each row sees, delta = dout . out - dlse, the gradient of the
// sinks, sums of parts.
//
// keys_of_rows: a block of 64 threads has 64 rows and 64 keys, a half warp a granule of 16. Band (causal order and
//   window) and sequence leave a row an interval of keys, and a key an interval of rows: p.row_keys, p.key_rows, and
//   those of 16 rows or keys together. Launch: grid ceil(max(n_q, n_k) / 64), block 64.
// row_products: delta, a warp a row, its 32 partial sums added pairwise. Launch: grid ceil(b * h * n_q / 8), block
//   256.
// sinks: dsink of a head, -sum exp(sink - lse) delta, a block a head. Launch: grid h, block 256.
// add_parts: dbias, the `splits` parts of each element in order. Launch: any grid, block 256.
//
// Macros: T: type of the tensors; WARPS; BIAS, SINK: types of dbias and dsink.

#include "backward.cuh"
#include "simt_tiles.cuh"

DEVICE int offset(const int* x, int i, int n) { return min(max(x[i], 0), n); }   // wrong offsets stay inside the arrays
// The sequence of a row or key: the last one that begins there or before.
DEVICE int sequence_of(const int* offsets, int sequences, int n, int i) {
    int low = 0, high = sequences;
    while (high - low > 1) {
        const int t = (low + high) / 2;
        if (offset(offsets, t, n) <= i) low = t;
        else high = t;
    }
    return low;
}
struct Band { long long first, last; int q, n_q, k, n_k; };   // row q + i sees keys k + i + first to k + i + last
DEVICE Band band_of(const Params& p, int t) {
    Band s = {0, 0, 0, p.n_q, 0, p.n_k};
    if (p.sequences) {
        s.q = offset(p.cu_q, t, p.n_q), s.n_q = max(0, offset(p.cu_q, t + 1, p.n_q) - s.q);
        s.k = offset(p.cu_k, t, p.n_k), s.n_k = max(0, offset(p.cu_k, t + 1, p.n_k) - s.k);
    }
    const long long corner = p.causal == 1 ? 0 : (long long)s.n_k - s.n_q, far = 1LL << 40;
    s.first = corner - (p.left < 0 ? far : p.left);
    s.last = corner + (p.causal ? 0 : p.right < 0 ? far : p.right);
    return s;
}

extern "C" __global__ void keys_of_rows(const __grid_constant__ Params p) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    int2 keys = make_int2(NEVER, -1), rows = keys;
    if (i < p.n_q) {
        const Band s = band_of(p, p.sequences ? sequence_of(p.cu_q, p.sequences, p.n_q, i) : 0);
        const long long place = i - s.q;
        const long long first = max(place + s.first, 0LL), last = min(place + s.last, s.n_k - 1LL);
        if (place < s.n_q && first <= last) keys = make_int2(s.k + (int)first, s.k + (int)last);
        p.row_keys[i] = keys;
    }
    if (i < p.n_k) {
        const Band s = band_of(p, p.sequences ? sequence_of(p.cu_k, p.sequences, p.n_k, i) : 0);
        const long long place = i - s.k;
        const long long first = max(place - s.last, 0LL), last = min(place - s.first, s.n_q - 1LL);
        if (place < s.n_k && first <= last) rows = make_int2(s.q + (int)first, s.q + (int)last);
        p.key_rows[i] = rows;
    }
    // rows past the end do not count
    int4 all = make_int4(keys.x, i < p.n_q ? keys.x : -1, i < p.n_q ? keys.y : NEVER, keys.y);
    UNROLL for (int hop = 1; hop < GRANULE; hop *= 2) {
        all.x = min(all.x, __shfl_xor_sync(~0u, all.x, hop)), all.y = max(all.y, __shfl_xor_sync(~0u, all.y, hop));
        all.z = min(all.z, __shfl_xor_sync(~0u, all.z, hop)), all.w = max(all.w, __shfl_xor_sync(~0u, all.w, hop));
        rows.x = min(rows.x, __shfl_xor_sync(~0u, rows.x, hop)), rows.y = max(rows.y, __shfl_xor_sync(~0u, rows.y,
            hop));
    }
    if (threadIdx.x % GRANULE) return;
    if (i < p.n_q) p.granule_keys[i / GRANULE] = all;
    if (i < p.n_k) p.granule_rows[i / GRANULE] = rows;
}

extern "C" __global__ void row_products(const __grid_constant__ Params p) {
    const long long line = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    if (line >= (long long)p.b * p.h * p.n_q) return;
    const int lane = threadIdx.x % 32, i = line % p.n_q, head = line / p.n_q % p.h, batch = line / p.n_q / p.h;
    const T* out = (const T*)p.out.data + batch * p.out.b + head * p.out.h + i * p.out.n;
    const T* dout = (const T*)p.dout.data + batch * p.dout.b + head * p.dout.h + i * p.dout.n;
    Acc sum = 0;
    for (int c = lane; c < p.d_v; c += 32) sum = fma(to_sum(out[c]), to_sum(dout[c]), sum);
    UNROLL for (int hop = 16; hop; hop /= 2) sum += __shfl_xor_sync(~0u, sum, hop);
    if (lane == 0 && p.dlse.data) sum -= ((const Acc*)p.dlse.data)[batch * p.dlse.b + head * p.dlse.h + i * p.dlse.n];
    if (lane == 0) ((Acc*)p.delta.data)[batch * p.delta.b + head * p.delta.h + i] = sum;
}

DEVICE float exponential(float x) { return exp2_float(x * (float)LOG2E); }
DEVICE double exponential(double x) { return exp(x); }
#ifdef SINK
extern "C" __global__ void sinks(const __grid_constant__ Params p) {
    __shared__ Acc sums[256];
    const int head = blockIdx.x;
    const Acc sink = ((const Acc*)p.sink)[head], none = -infinity((Acc)0);
    Acc sum = 0;
    for (long long at = threadIdx.x; at < (long long)p.b * p.n_q; at += 256) {
        const long long batch = at / p.n_q, i = at % p.n_q;
        const Acc lse = ((const Acc*)p.lse.data)[batch * p.lse.b + head * p.lse.h + i * p.lse.n];
        const Acc delta = ((const Acc*)p.delta.data)[batch * p.delta.b + head * p.delta.h + i];
        if (lse != none) sum = fma(-exponential(sink - lse), delta, sum);
    }
    sums[threadIdx.x] = sum;
    for (int half = 128; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) put((SINK*)p.dsink + head, sums[0]);
}
#endif
#ifdef BIAS
extern "C" __global__ void add_parts(const __grid_constant__ Params p) {
    // dbias is contiguous; an axis of length 1 has stride 0
    const long long size = (p.dbias.b ? p.b : 1LL) * (p.dbias.h ? p.h : 1) * (p.dbias.n ? p.n_q : 1) * (p.dbias.m
        ? p.n_k : 1);
    for (long long i = blockIdx.x * 256LL + threadIdx.x; i < size; i += gridDim.x * 256LL) {
        Acc sum = 0;
        for (int s = 0; s < p.splits; s++) sum += ((const Acc*)p.parts)[s * size + i];
        put((BIAS*)p.dbias.data + i, sum);
    }
}
#endif
