// What is asked of a matrix before its products, what a tile of rows ends with, rounding, and narrow formats, after the
// text of kernels.cu and in its words: the operators of levels.py, what rows lose and are finished with in stream.py,
// the rounding test of enclosure.py.
// U, UP, ETA, SLACK, SQUARED, EXP2_ERROR, SHORT_ERROR and BELOW are theirs, and defined before this text.
#define LEAST_EXPONENT (-1074.0)

struct Number { double h, low, r; };  // h + low, known within r

__device__ __forceinline__ double infinite() { return __longlong_as_double(0x7ff0000000000000ll); }
__device__ __forceinline__ double smaller(double a, double b) { return a < b || a != a ? a : b; }

__device__ __forceinline__ Number plus(Number a, Number b) {
    double s, e, h, low;
    two_sum(a.h, b.h, s, e);
    two_sum(s, e + (a.low + b.low), h, low);
    const double small = fabs(e) + fabs(a.low) + fabs(b.low);
    return {h, low, (a.r + b.r + 2.0 * U * small) * UP};
}

__device__ __forceinline__ Number times(Number a, Number b) {
    const double p = a.h * b.h, e = fma(a.h, b.h, -p), c = a.h * b.low, d = a.low * b.h;
    double h, low;
    two_sum(p, e + (c + d), h, low);
    const double small = fabs(a.low * b.low) + 4.0 * U * (fabs(e) + fabs(c) + fabs(d));
    const double x = fabs(a.h) + fabs(a.low), y = fabs(b.h) + fabs(b.low);
    const bool none = x + a.r == 0.0 || y + b.r == 0.0;
    return {h, low, none ? 0.0 : (small + x * b.r + y * a.r + a.r * b.r) * UP + ETA};
}

__device__ __forceinline__ Number over(Number a, Number b) {
    const double q = a.h / b.h, p = q * b.h, e = fma(q, b.h, -p), first = (a.h - p) - e, back = q * b.low;
    const double n = first + a.low - back, t = n / b.h, least = fabs(b.h) - fabs(b.low);
    double h, low;
    two_sum(q, t, h, low);
    double lost = 5.0 * U * (fabs(first) + fabs(a.low) + fabs(back)) + 2.0 * U * fabs(n) + fabs(n * b.low) / least;
    lost = lost + a.r + (fabs(q) + 2.0 * fabs(t)) * b.r + ETA;
    const bool sure = least > 2.0 * b.r;
    if (sure && a.h == 0.0 && a.low == 0.0 && a.r == 0.0) return {h, low, 0.0};
    return {h, low, sure ? lost / (least - b.r) * UP + ETA : infinite()};
}

// 2 to a number whose radius is delta is off by this of itself, without what computing it loses
__device__ __forceinline__ double moved(double delta) {
    return delta <= 0x1p-10 ? 0.694 * delta : delta <= 1.0 ? 1.05 * delta : infinite();
}

__device__ __forceinline__ Number exp_of(Number x, Number log2e, const double* table, double ln2, double ln2_low) {
    const Number t = times(x, log2e);
    const bool dead = !(t.h >= FLOOR);
    double h, low;
    exp2_of(dead ? FLOOR : smaller(t.h, 1000.0), dead ? 0.0 : t.low, table, ln2, ln2_low, h, low);
    if (dead) h = low = 0.0;
    const double floor = t.h > 1000.0 ? infinite() : BELOW, relative = (EXP2_ERROR + moved(t.r)) * UP;
    return {h, low, (floor + relative * fabs(h)) * UP};
}

__device__ __forceinline__ Number log_of(Number x, Number log_two, const double* table, double ln2, double ln2_low) {
    const bool near = x.h > 0x1p-240 && x.h < 0x1p240;
    const double t = log2(near ? x.h : 1.0);
    Number power, e;
    exp2_of(-t, 0.0, table, ln2, ln2_low, power.h, power.low);
    power.r = power.h * (2.0 * EXP2_ERROR);
    e = plus(times(x, power), {-1.0, 0.0, 0.0});
    const double size = fabs(e.h) + fabs(e.low) + e.r;
    e.r = near && size <= 0.5 ? (e.r + size * size) * UP : infinite();
    return plus(times({t, 0.0, 0.0}, log_two), e);
}

// Of each row of x (rows, columns), whose neighbours in memory are columns: the largest size, the sum of sizes, and a
// bound of the 2-norm, in out (3, rows). A warp has one row.
extern "C" __global__ void __launch_bounds__(THREADS) sizes_across(
    const double* __restrict__ x, long long rows, long long columns, long long step, double* out) {
    const long long row = (long long)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    double top = 0.0, sum = 0.0, squares = 0.0;
    if (row < rows)
        for (long long j = threadIdx.x % 32; j < columns; j += 32) {
            const double a = fabs(x[row * step + j]);
            top = larger(top, a);
            sum += a;
            squares += a * a;
        }
    for (int step = 16; step; step /= 2) {
        top = larger(top, __shfl_xor_sync(FULL_WARP, top, step));
        sum += __shfl_xor_sync(FULL_WARP, sum, step);
        squares += __shfl_xor_sync(FULL_WARP, squares, step);
    }
    if (row < rows && threadIdx.x % 32 == 0) {
        out[row] = top;
        out[rows + row] = sum;
        out[2 * rows + row] = sqrt(squares) * UP + SQUARED;
    }
}

// The same where neighbours are rows, but sums of squares: by parts of `each` columns, out (3, parts, rows). A thread
// has one row of a part, and blocks are `across` to a part.
extern "C" __global__ void __launch_bounds__(THREADS) sizes_down(
    const double* __restrict__ x, long long rows, long long columns, long long step, int across, int parts,
    long long each, double* out) {
    const long long row = (long long)(blockIdx.x % across) * THREADS + threadIdx.x, part = blockIdx.x / across;
    if (row >= rows) return;
    double top = 0.0, sum = 0.0, squares = 0.0;
    for (long long j = part * each; j < (part + 1) * each && j < columns; j++) {
        const double a = fabs(x[j * step + row]);
        top = larger(top, a);
        sum += a;
        squares += a * a;
    }
    const long long at = part * rows + row, next = parts * rows;
    out[at] = top;
    out[next + at] = sum;
    out[2 * next + at] = squares;
}

// The parts of sizes_down joined, in found (3, rows) as sizes_across has it. A thread has one row.
extern "C" __global__ void __launch_bounds__(THREADS) sizes_joined(
    long long rows, int parts, const double* __restrict__ x, double* found) {
    const long long row = (long long)blockIdx.x * THREADS + threadIdx.x, next = parts * rows;
    if (row >= rows) return;
    double top = 0.0, sum = 0.0, squares = 0.0;
    for (long long at = row; at < next; at += rows) {
        top = larger(top, x[at]);
        sum += x[next + at];
        squares += x[2 * next + at];
    }
    found[row] = top;
    found[rows + row] = sum;
    found[2 * rows + row] = sqrt(squares) * UP + SQUARED;
}

// What is added to a row's numbers and taken off again to leave its heads, sigma (level, rows): first, times next for
// each head, for a row below 1. top are the rows' largest sizes.
extern "C" __global__ void __launch_bounds__(THREADS) places(
    long long rows, int level, double first, double next, const double* __restrict__ top, double* sigma) {
    const long long row = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (row >= rows) return;
    const double x = top[row];
    int e;
    frexp(isfinite(x) ? x : 1.0, &e);
    double place = x > 0.0 ? ldexp(first, e) : first;
    for (int s = 0; s < level; s++, place *= next) sigma[s * rows + row] = place;
}

// One thread a row: the radius of its scores in base 2 and a bound of their sizes, found (2, rows). each (PLANES + 1,
// 3, rows) are the sizes of heads, of the tail and of the queries; t and n are of the keys' tails the largest numbers
// and norms.
extern "C" __global__ void __launch_bounds__(THREADS) radii(
    long long rows, double rounding, double c, double rc, double t0, double t1, double t2, double t3, double n0,
    double n1, double n2, double n3, const double* __restrict__ each, double* found) {
    const long long row = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (row >= rows) return;
    const double top[4] = {t0, t1, t2, t3}, norm[4] = {n0, n1, n2, n3};
    double lost = 0.0;
#pragma unroll
    for (int s = 0; s < PLANES; s++) {
        const double one = each[(3 * s + 1) * rows + row], two = each[(3 * s + 2) * rows + row];
        lost += smaller(one * top[LEVEL - s], two * norm[LEVEL - s]) * UP;
    }
    lost = rounding * lost * UP;
    const double size = each[(3 * PLANES + 2) * rows + row] * n0 * UP, r = lost + 0x1p-100 * size;
    found[row] = (16.0 * U * U * size * c + (size + r) * rc + c * r) * UP + ETA;
    found[rows + row] = size * c * UP;
}

// One thread a row: the radius of its denominator, the sink, its log-sum-exp, and what the radius of its numerator
// needs, by_row (rows, PLANES + 2): bounds of the sums of heads and of the tail, the weights' error, and what the sink
// multiplies with.
extern "C" __global__ void __launch_bounds__(THREADS) close_rows(
    int rows, double keys, double half0, double half1, double half2, double sums_lose,
    const double* __restrict__ table, double ln2, double ln2_low, double e_h, double e_low, double e_r,
    double two_h, double two_low, double two_r, int sunk, double sink_h, double sink_low, double sink_r,
    const double* __restrict__ m, const double* __restrict__ den, const double* __restrict__ den_low,
    const double* __restrict__ done, const double* __restrict__ radius, const double* __restrict__ size,
    double* shift, double* relative, double* sums, double* lse, double* by_row) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= rows) return;
    const Number log2e = {e_h, e_low, e_r}, log_two = {two_h, two_low, two_r}, sink = {sink_h, sink_low, sink_r};
    const double delta = radius[i] + 128.0 * U * U * (2.0 * size[i] + 2.0);
    const double off = (LEVEL ? EXP2_ERROR : SHORT_ERROR) + moved(delta);
    const double z = fabs(den[i]) * (1.0 + 0x1p-30), half[3] = {half0, half1, half2};
    double* own = by_row + (size_t)i * (PLANES + 2);
    double tail = z + (LEVEL > 0 ? keys * half0 : 0.0);
    own[0] = tail;
#pragma unroll
    for (int s = 0; s < LEVEL; s++) own[s + 1] = tail = smaller(z, keys * half[s]);
    const double adds = 8.0 * done[i] * PLANES * U * U, weight = (off + adds) * z + keys * BELOW;
    Number bottom = {den[i], den_low[i], (weight + sums_lose * tail) * SLACK * UP + ETA};
    double up = m[i], fade = 1.0;
    if (sunk) {
        up = larger(up, ceil(sink.h));
        const double by = larger(m[i] - up, LEAST_EXPONENT);
        fade = ldexp(1.0, (int)by);
        bottom = {bottom.h * fade, bottom.low * fade, bottom.r * fade + ETA};
        bottom = plus(bottom, exp_of(times(plus(sink, {-up, 0.0, 0.0}), log_two), log2e, table, ln2, ln2_low));
    }
    const Number found = plus(log_of(bottom, log_two, table, ln2, ln2_low), times({up, 0.0, 0.0}, log_two));
    own[PLANES] = weight;
    own[PLANES + 1] = fade;
    shift[i] = up;
    relative[i] = off;
    sums[3 * i] = bottom.h;
    sums[3 * i + 1] = bottom.low;
    sums[3 * i + 2] = bottom.r;
    lse[3 * i] = found.h;
    lse[3 * i + 1] = found.low;
    lse[3 * i + 2] = found.r;
}

// One thread an element: numerators num + num_low (rows, width) with their radii over the rows' denominators, in
// out (rows, width, 3). most and each (PLANES, width) are the largest size and the sum of sizes of a column's tails.
extern "C" __global__ void __launch_bounds__(THREADS) divide(
    int rows, int width, double half0, double half1, double half2, double rounding,
    const double* __restrict__ num, const double* __restrict__ num_low, const double* __restrict__ by_row,
    const double* __restrict__ most, const double* __restrict__ each, const double* __restrict__ sums, double* out) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= (long long)rows * width) return;
    const long long row = i / width, c = i % width;
    const double* own = by_row + row * (PLANES + 2);
    const double half[3] = {half0, half1, half2}, top = most[c], fade = own[PLANES + 1];
    double rounded = own[0] * most[LEVEL * width + c], last = own[0] * top;
#pragma unroll
    for (int s = 1; s < PLANES; s++) {
        const int part = LEVEL - s;
        rounded += smaller(own[s] * most[part * width + c], half[s - 1] * each[part * width + c]);
        if (s == LEVEL) last = smaller(own[s] * top, half[s - 1] * each[c]);
    }
    double r = own[PLANES] * top + 2.0 * U * last;
    r = top == 0.0 ? 0.0 : (r + rounding * rounded) * SLACK * UP + ETA;
    if (fade != 1.0 && r != 0.0) r = r * fade + ETA;
    const Number bottom = {sums[3 * row], sums[3 * row + 1], sums[3 * row + 2]};
    const Number found = over({num[i] * fade, num_low[i] * fade, r}, bottom);
    out[3 * i] = found.h;
    out[3 * i + 1] = found.low;
    out[3 * i + 2] = found.r;
}

// x rounded to a format, once
__device__ __forceinline__ double rounded_to(double x, int precision, int emin, double largest, int infinities) {
    if (precision == 53) return x;
    if (isfinite(x)) {
        int e;
        frexp(x, &e);
        const double place = ldexp(1.0, (e - 1 > emin ? e - 1 : emin) - precision + 1);
        x = rint(x / place) * place;
    }
    if (!(fabs(x) > largest)) return x;
    return infinities ? copysign(infinite(), x) : infinite() - infinite();
}

// Round numbers x (count, 3) to a format where all of an enclosure rounds alike, as enclosure.py does. Where anything
// is no number, nothing is proven: x says so afterwards.
extern "C" __global__ void __launch_bounds__(THREADS) settle(
    double* x, long long count, int precision, int emin, double largest, int infinities,
    double* value, unsigned char* decided) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    double h = x[3 * i], low = x[3 * i + 1], r = x[3 * i + 2];
    if (!(isfinite(h) && isfinite(low) && isfinite(r)) && !(low == 0.0 && r == 0.0)) {
        x[3 * i] = h = infinite() - infinite();
        x[3 * i + 1] = low = 0.0;
        x[3 * i + 2] = r = infinite();
    }
    const bool point = r == 0.0, whole = precision < 53 && point && low == 0.0;
    double least = h + (point ? low : nextafter(low - r, -infinite()));
    double most = h + (point ? low : nextafter(low + r, infinite()));
    if (precision < 53) {
        least = whole ? h : nextafter(least, -infinite());
        most = whole ? h : nextafter(most, infinite());
    }
    const double a = rounded_to(least, precision, emin, largest, infinities);
    const double b = rounded_to(most, precision, emin, largest, infinities);
    const bool same = a == b && signbit(a) == signbit(b), none = isnan(h) && point;
    const bool past = isnan(a) && isnan(b) && !isnan(least) && signbit(least) == signbit(most);
    const bool zero = h == 0.0 && point && low == 0.0;
    const double found = same || past ? a : rounded_to(h, precision, emin, largest, infinities);
    value[i] = zero ? 0.0 : found;
    decided[i] = same || none || past || zero;
}

// A format of `bits` bits, of which `fraction` are behind the point, has a float64's bits times a power of two, without
// the last ones: so its numbers are widened and narrowed without a step in float32, where CuPy's compiler options flush
// subnormal numbers to 0.
__device__ __forceinline__ unsigned long long infinite_of(int bits, int fraction) {
    return ((1ull << (bits - 1)) - 1) >> fraction << fraction;
}

// Make numbers of such a format, of two bytes or of four, float64: up is 2 to the difference of the exponents' biases.
extern "C" __global__ void __launch_bounds__(THREADS) widen(
    const void* __restrict__ x, long long count, int bits, int fraction, double up, double* out) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    const unsigned long long all = bits == 16 ? ((const unsigned short*)x)[i] : ((const unsigned int*)x)[i];
    const unsigned long long size = all & ((1ull << (bits - 1)) - 1), last = infinite_of(bits, fraction);
    double y = __longlong_as_double((long long)(size << (52 - fraction))) * up;
    if (size >= last) y = size == last ? infinite() : infinite() - infinite();
    out[i] = size != all ? -y : y;
}

// Write numbers that such a format has as its bits; down is 1 / up.
extern "C" __global__ void __launch_bounds__(THREADS) narrow(
    const double* __restrict__ x, long long count, int bits, int fraction, double down, void* out) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    const double y = x[i];
    const unsigned long long last = infinite_of(bits, fraction), sign = signbit(y) ? 1ull << (bits - 1) : 0;
    unsigned long long size = (unsigned long long)__double_as_longlong(fabs(y) * down) >> (52 - fraction);
    if (!isfinite(y)) size = isnan(y) ? last | 1ull << (fraction - 1) : last;
    if (bits == 16)
        ((unsigned short*)out)[i] = (unsigned short)(size | sign);
    else
        ((unsigned int*)out)[i] = (unsigned int)(size | sign);
}
