// Arithmetic modulo primes below 2**60; modular.py says the same in NumPy.
typedef unsigned long long u64;
typedef unsigned int u32;
#ifndef SHARED
#define SHARED(name) extern __shared__ u64 name[]
#endif
#define DEVICE static __device__ __forceinline__
#define MEMBER __device__ __forceinline__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

constexpr int N = 1 << LOG_DEGREE;

struct Prime {
    u64 q, ratio1, ratio0;  // floor(2**128/q) = ratio1·2**64 + ratio0
    u64 inverse, inverse_shifted;  // 1/N, and floor(that·2**64/q)
    u64 most;  // a random word from here on is left out
    u64 size, over;  // the bits of q and 1/q in float64, of a prime below 2**48; 0 of others
};

// x, of which the compiler does not know that it was there before: what follows from it is computed again in each turn
// of a loop, where keeping it would take registers.
DEVICE int again(int x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

DEVICE u64* words(u64 address) { return (u64*)address; }

// x modulo m, of x below 2m
DEVICE u64 below(u64 x, u64 m) { return x >= m ? x - m : x; }

// x·w modulo q, or q more, of any word x
DEVICE u64 scaled(u64 x, u64 w, u64 w_shifted, u64 q) { return x * w - __umul64hi(w_shifted, x) * q; }

// x·w modulo q, or up to three times q more: without the product of the lower halves, and what the middle ones carry
DEVICE u64 nearly(u64 x, u64 w, u64 w_shifted, u64 q) {
    const u32 x0 = x, x1 = x >> 32, w0 = w_shifted, w1 = w_shifted >> 32;
    return x * w - ((u64)x1 * w1 + __umulhi(x1, w0) + __umulhi(x0, w1)) * q;
}

DEVICE u64 reduced(u64 x, const Prime& p) { return below(x - __umul64hi(x, p.ratio1) * p.q, p.q); }

DEVICE u64 reduced_wide(u64 upper, u64 lower, const Prime& p) {
    u64 t = lower * p.ratio1, s = t + __umul64hi(lower, p.ratio0);
    u64 carry = __umul64hi(lower, p.ratio1) + (s < t);
    u64 t2 = upper * p.ratio0, s2 = s + t2;
    u64 quotient = upper * p.ratio1 + carry + __umul64hi(upper, p.ratio0) + (s2 < t2);
    return below(lower - quotient * p.q, p.q);
}

DEVICE void add_product(u64& upper, u64& lower, u64 a, u64 b) {
#ifdef __CUDA_ARCH__
    asm("mad.lo.cc.u64 %0, %2, %3, %0;\n\tmadc.hi.u64 %1, %2, %3, %1;" : "+l"(lower), "+l"(upper) : "l"(a), "l"(b));
#else
    u64 low = a * b;
    lower += low;
    upper += __umul64hi(a, b) + (lower < low);
#endif
}
