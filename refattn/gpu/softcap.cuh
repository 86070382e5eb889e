// Softcap of the Hopper kernel: tanh within 3 ulp, and the softmax of capped scores. Register layout: sm90.cu.

DEVICE float reciprocal(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// Below these arguments a tanh is a polynomial, of fewer terms. STEEP: from here on powers of `inner` would overflow.
constexpr float SMALL = 0.3f, SMALLER = 0.16f, STEEP = 1e5f;
// What P may lose of its type's range: a row's bound may be that far above its scores, in powers of 2.
constexpr float SPARE = BF16 ? 64.f : 15.f;
// tanh(x inner) / x for |x inner| below 0.3 (DEGREE 3) or 0.16 (2), within 3 ulp: a polynomial of x^2, times `by`.
template <int DEGREE> struct Cap {
    float c[DEGREE + 1], back;
    DEVICE Cap(float inner, float by) : back(1.f / by) {
        const float t = inner * inner, up = inner * by;
        c[0] = up, c[1] = (DEGREE == 3 ? -0.333332861f : -0.333313733f) * t * up;
        c[2] = (DEGREE == 3 ? 0.133238735f : 0.131285191f) * t * t * up;
        if (DEGREE == 3) c[DEGREE] = -0.0511326762f * t * t * t * up;
    }
    DEVICE float slope(float x) const {
        const float u = x * x;
        float y = c[DEGREE];
#pragma unroll
        for (int i = DEGREE - 1; i >= 0; i--) y = fmaf(y, u, c[i]);
        return y;
    }
    DEVICE float value(float x) const { return x * slope(x) * back; }
};
// s: tanh(s inner), within 3 ulp: Cap where no argument of the warp reaches 0.3, else an odd polynomial up to 0.6, and
// the exponential
DEVICE void cap(float (&s)[NS], float inner) {
    float most[2];
    largest<true>(s, most);
    if (__any_sync(~0u, fmaxf(most[0], most[1]) * fabsf(inner) >= SMALL) || fabsf(inner) >= STEEP) {
#pragma unroll
        for (int i = 0; i < NS; i++) {
            const float y = s[i] * inner, x = fabsf(y), u = y * y,
                        large = 1.f - 2.f * reciprocal(1.f + exp2_fast(x * (2.f * LOG2E)));
            float z = fmaf(u, 0.0157296831f, -0.0523029624f);
            z = fmaf(z, u, 0.133152977f), z = fmaf(z, u, -0.333327681f);
            s[i] = x >= 0.6f ? copysignf(large, y) : fmaf(z * u, y, y);
        }
    } else {
        const Cap<3> of(inner, 1.f);
#pragma unroll
        for (int i = 0; i < NS; i++) s[i] *= of.slope(s[i]);
    }
}
// softmax of scores that all count, capped first: where they are small, the polynomial is the exponent's slope, and a
// row is bounded by its absolute values, which are looked at anyway
DEVICE bool capped_softmax(float (&s)[NS], float (&top)[2], float (&sum)[2], float (&factor)[2], float inner,
                           float scale_log2)
{
    float most[2];
    largest<true>(s, most);
    const float reach = inner < STEEP ? fmaxf(most[0], most[1]) * inner : INFINITY_F;
    if (2.f * SMALLER * scale_log2 <= SPARE && !__any_sync(~0u, reach >= SMALLER))
        return softmax<false>(s, most, top, sum, factor, scale_log2, Cap<2>(inner, scale_log2));
    if (2.f * SMALL * scale_log2 <= SPARE && !__any_sync(~0u, reach >= SMALL))
        return softmax<false>(s, most, top, sum, factor, scale_log2, Cap<3>(inner, scale_log2));
    cap(s, inner);
    return softmax<false>(s, top, sum, factor, scale_log2);
}
