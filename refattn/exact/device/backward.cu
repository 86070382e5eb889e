// The steps of the gradients on a GPU, after the text of kernels.cu and in its words: those of compiled.py.

// the levels of a product at key j, as two numbers
__device__ __forceinline__ void levels_of(const double* own, int w, int j, double& s, double& s_low) {
    double e;
    s = own[j];
    s_low = 0.0;
    if (LEVEL > 0) { two_sum(s, own[w + j], s, e); s_low += e; }
    if (LEVEL > 1) { two_sum(s, own[2 * w + j], s, e); s_low += e; }
    if (LEVEL > 2) { two_sum(s, own[3 * w + j], s, e); s_low += e; }
}

// x + y as heads and a tail
__device__ __forceinline__ void cut_into(
    double x, double y, double cut0, double cut1, double cut2, double (&part)[PLANES]) {
    if (LEVEL > 0) { part[0] = (x + cut0) - cut0; x -= part[0]; }
    if (LEVEL > 1) { two_sum(x, y, x, y); part[1 % PLANES] = (x + cut1) - cut1; x -= part[1 % PLANES]; }
    if (LEVEL > 2) { two_sum(x, y, x, y); part[2 % PLANES] = (x + cut2) - cut2; x -= part[2 % PLANES]; }
    part[LEVEL] = x + y;
}

// the slope 1 - (x / cap)**2 of a softcap at a capped score x = h + low
__device__ __forceinline__ void gain_at(
    double h, double low, double per_cap, double per_cap_low, double& g, double& g_low) {
    double p = h * per_cap, y, y_low, z, rest, e;
    two_sum(p, fma(h, per_cap, -p) + fma(h, per_cap_low, low * per_cap), y, y_low);
    p = y * y;
    two_sum(p, fma(y, y, -p) + 2.0 * (y * y_low), z, rest);
    two_sum(1.0, -z, p, e);
    two_sum(p, e - rest, g, g_low);
}

// One block a row: turn the scores' levels of a tile, planes (rows, LEVEL + 1, w), into the weights' heads and tail,
// and the levels of dout·v, slopes of the same shape, into those of weight (dout·v - d) / e, in their places. Add the
// latter's sum over keys to sum + sum_low, and the sum of their first heads' sizes to size.
// sees is null where every row sees every key; per_e is 1 / e, a power of two. Where scores are capped, the softcap's
// slopes at them go to gain (rows, 2, w), of which the second are what the first leave; per_cap is 1 / cap in base 2.
extern "C" __global__ void __launch_bounds__(THREADS, 2) slope(
    double* planes, double* slopes, int w, double c, double c_low,
    const double* __restrict__ table, double ln2, double ln2_low,
    int capped, double k, double k_low, double cap, double cap_low, double per_cap, double per_cap_low, double* gain,
    const double* __restrict__ bias, double log2e, double log2e_low,
    const int* __restrict__ sees, const unsigned char* __restrict__ mask,
    const double* __restrict__ m, const double* __restrict__ d, const double* __restrict__ d_low,
    const double* __restrict__ per_e, double cut0, double cut1, double cut2,
    double* sum, double* sum_low, double* size) {
    __shared__ double sums[THREADS / 32][PLANES][2], sizes[THREADS / 32];
    const int row = blockIdx.x, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    double *own = planes + (size_t)row * PLANES * w, *mine = slopes + (size_t)row * PLANES * w;
    const int first = sees ? sees[3 * row] : 0, end = sees ? sees[3 * row + 1] : w;
    const unsigned char* seen = sees && sees[3 * row + 2] >= 0 ? mask + (size_t)sees[3 * row + 2] * w : 0;
    const double shift = m[row], off = d[row], off_low = d_low[row], unit = per_e[row];
    double total[PLANES], rest[PLANES], most = 0.0;
#pragma unroll
    for (int s = 0; s < PLANES; s++) total[s] = rest[s] = 0.0;
    for (int j = thread; j < w; j += THREADS) {
        double x = 0.0, y = 0.0, p = 0.0, p_low = 0.0, g = 0.0, g_low = 0.0, e, part[PLANES];
        if (j >= first && j < end && (!seen || seen[j])) {
            double s, s_low, h, low, z, a, a_low;
            levels_of(own, w, j, s, s_low);
            h = s * c;
            two_sum(h, fma(s, c, -h) + fma(s, c_low, s_low * c), h, low);
            if (capped) {
                softly_capped(h, low, k, k_low, cap, cap_low, table, ln2, ln2_low);
                gain_at(h, low, per_cap, per_cap_low, g, g_low);
            }
            if (bias) {
                const double b = bias[(size_t)row * w + j], product = b * log2e;
                double t, t_low;
                two_sum(product, fma(b, log2e, -product) + b * log2e_low, t, t_low);
                two_sum(h, t, s, e);
                two_sum(s, e + (low + t_low), h, low);
            }
            two_sum(h, -shift, z, e);
            two_sum(z, e + low, z, e);
            if (z >= FLOOR) {
                exp2_of(z, e, table, ln2, ln2_low, x, y);
                levels_of(mine, w, j, s, s_low);
                two_sum(s, s_low, s, s_low);
                two_sum(s, -off, a, e);
                two_sum(a, e + (s_low - off_low), a, a_low);
                a *= unit;
                a_low *= unit;
                p = x * a;
                two_sum(p, fma(x, a, -p) + fma(x, a_low, y * a), p, p_low);
            }
        }
        if (capped) {
            gain[(size_t)row * 2 * w + j] = g;
            gain[(size_t)row * 2 * w + w + j] = g_low;
        }
        cut_into(x, y, cut0, cut1, cut2, part);
#pragma unroll
        for (int s = 0; s < PLANES; s++) own[s * w + j] = part[s];
        cut_into(p, p_low, cut0, cut1, cut2, part);
        most += fabs(part[0]);
#pragma unroll
        for (int s = 0; s < PLANES; s++) {
            mine[s * w + j] = part[s];
            two_sum(total[s], part[s], total[s], e);
            rest[s] += e;
        }
    }
    for (int step = 16; step; step /= 2) most += __shfl_xor_sync(FULL_WARP, most, step);
    if (!lane) sizes[warp] = most;
    double h = thread ? 0.0 : sum[row], low = thread ? 0.0 : sum_low[row];
    add_planes(total, rest, sums, h, low);
    if (thread) return;
    sum[row] = h;
    sum_low[row] = low;
    for (int i = 0; i < THREADS / 32; i++) size[row] += sizes[i];
}

// Multiply slopes (rows, LEVEL + 1, w), heads and tail, by gain (rows, 2, w), and cut them again. One thread a number.
extern "C" __global__ void __launch_bounds__(THREADS) damp(
    double* slopes, int rows, int w, const double* __restrict__ gain, double cut0, double cut1, double cut2) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x, row = i / w, j = i % w;
    if (row >= rows) return;
    double *own = slopes + row * PLANES * w, s, s_low, part[PLANES];
    levels_of(own, w, j, s, s_low);
    const double g = gain[2 * row * w + j], g_low = gain[(2 * row + 1) * w + j], p = s * g;
    two_sum(p, fma(s, g, -p) + fma(s, g_low, s_low * g), s, s_low);
    cut_into(s, s_low, cut0, cut1, cut2, part);
#pragma unroll
    for (int k = 0; k < PLANES; k++) own[k * w + j] = part[k];
}

// For each key the sums over rows, `each` of them at a time, of its first weights times omega (rows, 4), and of the
// sizes of its first slopes times relative: out (parts, 5, w). Blocks are `across` to a part.
extern "C" __global__ void __launch_bounds__(THREADS) by_key(
    const double* __restrict__ planes, const double* __restrict__ slopes, int rows, int w, int across, int each,
    const double* __restrict__ omega, const double* __restrict__ relative, double* out) {
    const int j = (blockIdx.x % across) * THREADS + threadIdx.x, part = blockIdx.x / across;
    if (j >= w) return;
    double found[5] = {0.0, 0.0, 0.0, 0.0, 0.0};
    for (int i = part * each; i < (part + 1) * each && i < rows; i++) {
        const size_t at = (size_t)i * PLANES * w + j;
        const double x = planes[at];
        for (int k = 0; k < 4; k++) found[k] += x * omega[4 * i + k];
        found[4] += fabs(slopes[at]) * relative[i];
    }
    for (int k = 0; k < 5; k++) out[((size_t)part * 5 + k) * w + j] = found[k];
}

// Add `count` matrices (rows, width), one every `stride` numbers, to h + low, whose rows begin `pitch` numbers apart.
extern "C" __global__ void __launch_bounds__(THREADS) add_all(
    const double* __restrict__ parts, int count, long long stride, int rows, int width, long long pitch,
    double* h, double* low) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= (long long)rows * width) return;
    const long long at = i / width * pitch + i % width;
    double s = h[at], s_low = low[at], e;
    for (int k = 0; k < count; k++) {
        two_sum(s, parts[k * stride + i], s, e);
        two_sum(s, s_low + e, s, s_low);
    }
    h[at] = s;
    low[at] = s_low;
}
