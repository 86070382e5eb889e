// Numbers modulo a prime as transforms have them, in words of 64 bits: `Whole`, of any prime, below some times it; or
// `Real`, float64 of either sign, of a prime below 2**48. A product of these takes 6 operations of float64, which a
// multiprocessor does 64 of in a clock, where one of words takes above 20. Sums and products are exact: nothing is
// above 14 times the prime, and of a product h + l, h = fl(x·w), both h less the quotient times q and l are integers
// below 2**53. So both are the same numbers modulo q, and what leaves a transform is the same word.
#ifdef __CUDA_ARCH__
DEVICE double real(u64 x) { return __longlong_as_double((long long)x); }
DEVICE u64 bits(double x) { return (u64)__double_as_longlong(x); }
#else
DEVICE double real(u64 x) { double y; __builtin_memcpy(&y, &x, 8); return y; }
DEVICE u64 bits(double x) { u64 y; __builtin_memcpy(&y, &x, 8); return y; }
#endif

// What both have: of, a number of a word (below 2**52, real); REACH, how many times q a word of another prime may be;
// forward and inverse, butterflies, `last` where the round's sums end; times, x·w of a constant, as a word below q;
// less, a word y less x; of what a forward transform leaves, word, a word below 8q, and rest, below q.
struct Whole {
    static constexpr u64 REACH = 1;
    u64 q;
    MEMBER explicit Whole(const Prime& p) : q(p.q) {}
    MEMBER u64 of(u64 x) const { return x; }
    MEMBER void forward(u64& a, u64& b, const ulonglong2& w) const {
        const u64 x = below(a, q << 2), y = nearly(b, w.x, w.y, q);
        a = x + y, b = x + ((q << 2) - y);
    }
    MEMBER void inverse(u64& a, u64& b, const ulonglong2& w, bool) const {
        const u64 x = a, y = b;
        a = below(x + y, q << 2), b = nearly(x + ((q << 2) - y), w.x, w.y, q);
    }
    MEMBER u64 times(u64 x, u64 w, u64 w_shifted) const { return below(scaled(x, w, w_shifted, q), q); }
    MEMBER u64 less(u64 y, u64 x) const { return y + ((q << 3) - x); }
    MEMBER u64 word(u64 x) const { return x; }
    MEMBER u64 rest(u64 x) const { return below(below(below(x, q << 2), q << 1), q); }
};
struct Real {
    static constexpr u64 REACH = 2;
    static constexpr u64 EXPONENT = 0x433ull << 52;  // of 2**52, whose last bit is 1
    static constexpr double ROUND_OFF = 1.5 * (1ull << 52);  // plus and minus that: the nearest integer, below 2**51
    double q, over;
    MEMBER explicit Real(const Prime& p) : q(real(p.size)), over(real(p.over)) {}
    MEMBER u64 of(u64 x) const { return bits(real(x | EXPONENT) - real(EXPONENT)); }
    MEMBER double product(double x, double w, double w_over) const {  // |w| <= q/2
        const double high = x * w, quotient = fma(x, w_over, ROUND_OFF) - ROUND_OFF;
        return fma(-quotient, q, high) + fma(x, w, -high);
    }
    MEMBER double small(double x) const { return fma(ROUND_OFF - fma(x, over, ROUND_OFF), q, x); }
    MEMBER u64 positive(double x) const { return bits((x < 0 ? x + q : x) + real(EXPONENT)) ^ EXPONENT; }
    MEMBER void forward(u64& a, u64& b, const ulonglong2& w) const {
        const double x = real(a), y = product(real(b), real(w.x), real(w.y));
        a = bits(x + y), b = bits(x - y);
    }
    MEMBER void inverse(u64& a, u64& b, const ulonglong2& w, bool last) const {  // a round's sums are up to 8 times
        const double x = real(a), y = real(b);
        a = bits(last ? small(x + y) : x + y), b = bits(product(x - y, real(w.x), real(w.y)));
    }
    MEMBER u64 times(u64 x, u64 w, u64) const {
        double factor = real(of(w));
        factor = factor + factor > q ? factor - q : factor;
        return positive(product(real(x), factor, factor * over));
    }
    MEMBER u64 less(u64 y, u64 x) const { return bits(real(of(y)) - real(x)); }
    MEMBER u64 word(u64 x) const { return positive(small(real(x))); }
    MEMBER u64 rest(u64 x) const { return word(x); }
};
