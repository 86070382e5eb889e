// The steps of the streaming path on a GPU, for one level (LEVEL): those of compiled.py, with the same bounds.
// THREADS of a block and PER keys of each, at least a tile's, are defined before this text.
// A product's error is exact by a fused multiply-add that is written out; no other product and sum may be fused.
#define PLANES (LEVEL + 1)
#define BITS 12
#define TABLE 4096
#define FLOOR (-250.0)
#define FULL_WARP 0xffffffffu
constexpr double BIG = 6755399441055744.0;  // 1.5 * 2**52: its last place is 1
constexpr long long BIG_BITS = 0x4338000000000000ll;

__device__ __forceinline__ void two_sum(double a, double b, double& s, double& e) {
    const double sum = a + b, t = sum - a;
    e = (a - (sum - t)) + (b - t);
    s = sum;
}

__device__ __forceinline__ void fast_two_sum(double a, double b, double& s, double& e) {
    const double sum = a + b;
    e = b - (sum - a);
    s = sum;
}

// 2**(h + low) for -250 <= h <= 1000 within 2**-92 of it; table: pairs of 2**(i / 4096)
__device__ __forceinline__ void exp2_of(
    double h, double low, const double* __restrict__ table, double ln2, double ln2_low, double& x, double& y) {
    const double z = h * TABLE, shifted = z + BIG, k = shifted - BIG;
    double r, r_low, q, e, e2, out, rest;
    two_sum(z - k, low * TABLE, r, r_low);
    const long long index = __double_as_longlong(shifted) - BIG_BITS;
    const int i = 2 * (int)(index & (TABLE - 1));
    const double power = __longlong_as_double(((index >> BITS) + 1023) << 52);
    const double a = r * ln2, a_low = fma(r, ln2, -a) + fma(r, ln2_low, r_low * ln2);
    const double s = a * a, s_low = fma(a, a, -s) + 2.0 * (a * a_low);
    const double more = (a * s) * fma(a, fma(a, fma(a, 1.0 / 720, 1.0 / 120), 1.0 / 24), 1.0 / 6);
    fast_two_sum(a, 0.5 * s, q, e);
    const double q_low = e + fma(0.5, s_low, a_low) + more;
    const double t = table[i], t_low = table[i + 1], p = t * q;
    e = fma(t, q, -p);
    fast_two_sum(t, p, out, e2);
    fast_two_sum(out, e2 + (fma(t, q_low, e) + fma(t_low, q, t_low)), out, rest);
    x = out * power;
    y = rest * power;
}

// The same as one number, within 2**-52 of it: all that level 0 keeps of a weight. The argument is off by 2**-54 of a
// place of the table, its exponential's few steps by less than 2**-64, the last sum by 2**-53.
__device__ __forceinline__ double short_exp2_of(
    double h, double low, const double* __restrict__ table, double ln2) {
    const double z = h * TABLE, shifted = z + BIG, k = shifted - BIG, r = fma(low, 1.0 * TABLE, z - k), a = r * ln2;
    const long long index = __double_as_longlong(shifted) - BIG_BITS;
    const int i = 2 * (int)(index & (TABLE - 1));
    const double power = __longlong_as_double(((index >> BITS) + 1023) << 52);
    const double q = a * fma(a, fma(a, fma(a, 1.0 / 24, 1.0 / 6), 0.5), 1.0), t = table[i];
    return (t + fma(t, q, table[i + 1])) * power;
}

// c tanh(x ln 2 / cap): c is the cap in base 2, k is 2 / cap
__device__ __forceinline__ void softly_capped(
    double& h, double& low, double k, double k_low, double c, double c_low,
    const double* __restrict__ table, double ln2, double ln2_low) {
    const bool minus = h < 0;
    const double x = minus ? -h : h, x_low = minus ? -low : low;
    double z = x * k, e = fma(x, k, -z) + fma(x, k_low, x_low * k), w, w_low, t, t_low;
    const bool far = !(z < -FLOOR);  // 1 but for 2**-249
    two_sum(far ? -FLOOR : z, far ? 0.0 : e, z, e);
    exp2_of(z, e, table, ln2, ln2_low, w, e);
    two_sum(w, 1.0, w, w_low);
    two_sum(w, w_low + e, w, w_low);
    const double q = 2.0 / w, rest = (fma(-q, w, 2.0) - q * w_low) / w;
    two_sum(1.0, -q, t, t_low);
    two_sum(t, t_low - rest, t, t_low);
    const double p = t * c;
    two_sum(p, fma(t, c, -p) + fma(t, c_low, t_low * c), t, e);
    h = minus ? -t : t;
    low = minus ? -e : e;
}

// the larger number, or what is none
__device__ __forceinline__ double larger(double a, double b) { return a > b || a != a ? a : b; }

// Add the sums of a block's threads, total + rest of each plane, to h + low in its first thread.
__device__ __forceinline__ void add_planes(
    double (&total)[PLANES], double (&rest)[PLANES], double (*sums)[PLANES][2], double& h, double& low) {
    for (int step = 16; step; step /= 2)
#pragma unroll
        for (int s = 0; s < PLANES; s++) {
            double e;
            two_sum(total[s], __shfl_xor_sync(FULL_WARP, total[s], step), total[s], e);
            rest[s] += __shfl_xor_sync(FULL_WARP, rest[s], step);
            rest[s] += e;
        }
    if (threadIdx.x % 32 == 0)
#pragma unroll
        for (int s = 0; s < PLANES; s++) {
            sums[threadIdx.x / 32][s][0] = total[s];
            sums[threadIdx.x / 32][s][1] = rest[s];
        }
    __syncthreads();
    if (threadIdx.x) return;
    for (int s = 0; s < PLANES; s++) {
        double all = 0.0, all_low = 0.0, e;
        for (int i = 0; i < THREADS / 32; i++) {
            two_sum(all, sums[i][s][0], all, e);
            all_low += e + sums[i][s][1];
        }
        two_sum(h, all + all_low, h, e);
        two_sum(h, low + e, h, low);
    }
}

// Heads and tails of x + low, as elementwise.cut has them. Arrays have an outer axis and an inner one, whose steps are
// given, and heads and tails one more; sigma (LEVEL, rows) goes by whichever of them is the rows.
extern "C" __global__ void __launch_bounds__(THREADS) cut(
    const double* __restrict__ x, const double* __restrict__ low, const double* __restrict__ sigma, double* heads,
    double* tails, long long outer, long long inner, long long rows, long long sigma_outer, long long sigma_inner,
    long long x_outer, long long x_inner, long long low_outer, long long low_inner, long long heads_next,
    long long heads_outer, long long heads_inner, long long tails_next, long long tails_outer, long long tails_inner) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x, o = i / inner, n = i % inner;
    if (o >= outer) return;
    double a = x[o * x_outer + n * x_inner], b = low[o * low_outer + n * low_inner];
    double* head = heads + o * heads_outer + n * heads_inner;
    double* tail = tails + o * tails_outer + n * tails_inner;
    *tail = a + b;
    for (int s = 0; s < LEVEL; s++) {
        const double c = sigma[s * rows + o * sigma_outer + n * sigma_inner], first = (a + c) - c;
        two_sum(a - first, b, a, b);
        head[s * heads_next] = first;
        tail[(s + 1) * tails_next] = a + b;
    }
}

// One block a row: turn the scores' levels of a tile, planes (rows, LEVEL + 1, w), into the weights' heads and tail in
// their place; raise the row's shift m, add to its denominator, and count the tile. fade is what the row's sums were
// multiplied with.
// sees is null where every row sees every key.
extern "C" __global__ void __launch_bounds__(THREADS, LEVEL < 2 ? 4 - LEVEL : 2) weigh(
    double* planes, int w, double c, double c_low,
    const double* __restrict__ table, double ln2, double ln2_low,
    int capped, double k, double k_low, double cap, double cap_low,
    const double* __restrict__ bias, double log2e, double log2e_low,
    const int* __restrict__ sees, const unsigned char* __restrict__ mask,
    double cut0, double cut1, double cut2, double* m, double* den, double* den_low, double* fade, double* done) {
    __shared__ double tops[THREADS / 32], sums[THREADS / 32][PLANES][2];
    const int row = blockIdx.x, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    double* own = planes + (size_t)row * PLANES * w;
    const double before = m[row], minus_infinity = -__longlong_as_double(0x7ff0000000000000ll);
    // the row's first key in the tile, the one behind its last, and its line of the mask, below 0 where it needs none
    const int first = sees ? sees[3 * row] : 0, end = sees ? sees[3 * row + 1] : w;
    const unsigned char* seen = sees && sees[3 * row + 2] >= 0 ? mask + (size_t)sees[3 * row + 2] * w : 0;
    double h[PER], low[PER], top = minus_infinity;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int j = thread + i * THREADS;
        h[i] = minus_infinity;
        low[i] = 0.0;
        if (j >= first && j < end && (!seen || seen[j])) {
            double s = own[j], s_low = 0.0, e;
            if (LEVEL > 0) { two_sum(s, own[w + j], s, e); s_low += e; }
            if (LEVEL > 1) { two_sum(s, own[2 * w + j], s, e); s_low += e; }
            if (LEVEL > 2) { two_sum(s, own[3 * w + j], s, e); s_low += e; }
            const double p = s * c;
            two_sum(p, fma(s, c, -p) + fma(s, c_low, s_low * c), h[i], low[i]);
            if (capped) softly_capped(h[i], low[i], k, k_low, cap, cap_low, table, ln2, ln2_low);
            if (bias) {
                const double b = bias[(size_t)row * w + j], product = b * log2e;
                double x, x_low;
                two_sum(product, fma(b, log2e, -product) + b * log2e_low, x, x_low);
                two_sum(h[i], x, s, e);
                two_sum(s, e + (low[i] + x_low), h[i], low[i]);
            }
        }
        top = larger(top, h[i]);
    }
    for (int step = 16; step; step /= 2) top = larger(top, __shfl_xor_sync(FULL_WARP, top, step));
    if (!lane) tops[warp] = top;
    __syncthreads();
    for (int i = 0; i < THREADS / 32; i++) top = larger(top, tops[i]);
    const double after = larger(before, ceil(top));
    double total[PLANES], rest[PLANES];
#pragma unroll
    for (int s = 0; s < PLANES; s++) total[s] = rest[s] = 0.0;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int j = thread + i * THREADS;
        if (j >= w) break;
        double z, e, x, y, part[PLANES];
        two_sum(h[i], -after, z, e);
        two_sum(z, e + low[i], z, e);
        const bool dead = !(z >= FLOOR);  // also where a masked key's -inf has become no number
        if (LEVEL > 0)
            exp2_of(dead ? FLOOR : z, dead ? 0.0 : e, table, ln2, ln2_low, x, y);
        else
            x = short_exp2_of(dead ? FLOOR : z, dead ? 0.0 : e, table, ln2), y = 0.0;
        if (dead) x = y = 0.0;
        if (LEVEL > 0) { part[0] = (x + cut0) - cut0; x -= part[0]; }
        if (LEVEL > 1) { two_sum(x, y, x, y); part[1 % PLANES] = (x + cut1) - cut1; x -= part[1 % PLANES]; }
        if (LEVEL > 2) { two_sum(x, y, x, y); part[2 % PLANES] = (x + cut2) - cut2; x -= part[2 % PLANES]; }
        part[LEVEL] = x + y;
#pragma unroll
        for (int s = 0; s < PLANES; s++) {
            own[s * w + j] = part[s];
            two_sum(total[s], part[s], total[s], e);
            rest[s] += e;
        }
    }
    double d = 0.0, d_low = 0.0, factor = 1.0;
    if (!thread) {
        const double by = larger(before - after, -1074.0);
        factor = by == by ? ldexp(1.0, (int)by) : by;
        d = den[row] * factor;
        d_low = den_low[row] * factor;
    }
    add_planes(total, rest, sums, d, d_low);
    if (thread) return;
    m[row] = after;
    den[row] = d;
    den_low[row] = d_low;
    fade[row] = factor;
    done[row] += 1.0;
}

// num + num_low (rows, width) times the row's fade, plus the levels of a product, parts (LEVEL + 1, stride)
extern "C" __global__ void __launch_bounds__(THREADS) collect(
    const double* __restrict__ parts, long long stride, int rows, int width, const double* __restrict__ fade,
    double* num, double* num_low) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= (long long)rows * width) return;
    const double factor = fade[i / width];
    double h = num[i] * factor, low = num_low[i] * factor, e;
    for (int s = 0; s < PLANES; s++) {
        two_sum(h, parts[s * stride + i], h, e);
        two_sum(h, low + e, h, low);
    }
    num[i] = h;
    num_low[i] = low;
}

// What these kernels take for granted: out[0] half a number, out[1] a product and a sum, each rounded, out[2] the same
// fused, out[3] + out[4] the sum of two numbers, out[5] a sum rounded.
extern "C" __global__ void trusted(const double* in, double* out) {
    if (threadIdx.x || blockIdx.x) return;
    out[0] = in[0] * 0.5;
    out[1] = in[1] * in[2] + in[3];
    out[2] = fma(in[1], in[2], in[3]);
    two_sum(in[4], in[5], out[3], out[4]);
    out[5] = in[4] + in[5];
}
