"""The client's transforms, compiled by numba: the operations of ``transform.py`` and ``embedding.py``, in their order.

Whole numbers come out below their primes, so any exact way gives the same words. Of double-doubles each operation is
rounded as NumPy rounds it: a fused multiply-add gives the error of a product, which is exact either way.
"""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["add_whole", "inverse", "turned"]

_OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False, "cache": True}
_INLINE = {"forceinline": True, **_OPTIONS}
# _fma and the two sums are those of exact/compiled.py, written here again: numba's cache looks at a function's own file
# alone, so a change there would leave these compiled as they were


@intrinsic
def _fma(context, a, b, c):
    def emit(ctx, builder, signature, args):
        return builder.fma(*args)

    return types.float64(types.float64, types.float64, types.float64), emit


@intrinsic
def _rint(context, a):
    def emit(ctx, builder, signature, args):
        kind = ir.FunctionType(ir.DoubleType(), [ir.DoubleType()])
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [ir.DoubleType()], kind), args)

    return types.float64(types.float64), emit


@njit(**_INLINE)
def _near(x, q, inverse):
    """Return x less the multiple of q that brings it near 0."""
    return x - np.int64(_rint(x * inverse)) * q


@njit(**_OPTIONS)
def _steps(a, b, w, share, q, large):
    """Do the butterflies of two runs of words that meet one root."""
    if large:
        inverse = 1 / np.float64(q)
        for i in range(a.shape[0]):
            b[i] = _near(b[i], q, inverse)
    for i in range(a.shape[0]):
        y = b[i] * w - np.int64(_rint(b[i] * share)) * q
        b[i] = a[i] - y
        a[i] += y


@njit(**_OPTIONS)
def _steps_by_root(a, b, w, share, q, large):
    """Do the butterflies of two runs of words that each meet a root of their own."""
    if large:
        inverse = 1 / np.float64(q)
        for i in range(a.shape[0]):
            b[i] = _near(b[i], q, inverse)
    for i in range(a.shape[0]):
        y = b[i] * w[i] - np.int64(_rint(b[i] * share[i])) * q
        b[i] = a[i] - y
        a[i] += y


@njit(**_OPTIONS)
def _forward(x, room, roots, shares, q, rows, large):
    """Transform words modulo a prime; what comes out is in `room`, (columns, rows), and x is written over.

    `roots` has those of the stage with m groups from place m on, of later stages in the order of the words they meet.
    """
    n = x.shape[0]
    columns, m = n // rows, 1
    while m < rows:
        half = n // (2 * m)
        for g in range(m):
            at = 2 * g * half
            _steps(x[at : at + half], x[at + half : at + 2 * half], roots[m + g], shares[m + g], q, large)
        m *= 2
    for c in range(columns):  # words that meet are next to each other from here on: rows become columns
        for r in range(rows):
            room[c, r] = x[r * columns + c]
    while m < n:
        half = n // (2 * m)
        for g in range(m // rows):
            at = m + g * rows
            w, share = roots[at : at + rows], shares[at : at + rows]
            for i in range(2 * g * half, (2 * g + 1) * half):
                _steps_by_root(room[i], room[i + half], w, share, q, large)
        m *= 2


@njit(**_OPTIONS)
def add_whole(out, high, low, primes, factors, roots, shares, rows, large):
    """Add whole numbers, transformed, to words below their primes, (primes, N); `factors` are 2**60 modulo each."""
    n = high.shape[0]
    columns = n // rows
    x, room = np.empty(n, np.int64), np.empty((columns, rows), np.int64)
    for k in range(out.shape[0]):
        q, factor = primes[k], factors[k]
        inverse, share = 1 / np.float64(q), np.float64(factor) / np.float64(q)
        for i in range(n):
            top = np.int64(high[i] * 2.0**-60)
            rest = np.int64(high[i] - np.float64(top) * 2.0**60)
            of = top * factor - np.int64(_rint(np.float64(top) * share)) * q
            x[i] = _near(of + _near(rest, q, inverse) + _near(np.int64(low[i]), q, inverse), q, inverse)
        _forward(x, room, roots[k], shares[k], q, rows, large[k])
        to = out[k]
        for r in range(rows):
            for c in range(columns):
                v = _near(room[c, r], q, inverse)
                v += np.int64(to[r * columns + c]) + ((v >> 63) & q) - q
                to[r * columns + c] = np.uint64(v + ((v >> 63) & q))


@njit(**_INLINE)
def _fast_two_sum(a, b):
    s = a + b
    return s, b - (s - a)


@njit(**_INLINE)
def _two_sum(a, b):
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@njit(**_INLINE)
def _add(a, a_low, b, b_low):
    s, e = _two_sum(a, b)
    t, f = _two_sum(a_low, b_low)
    s, e = _fast_two_sum(s, e + t)
    return _fast_two_sum(s, e + f)


@njit(**_INLINE)
def _mul(a, a_low, b, b_low):
    p = a * b
    return _fast_two_sum(p, _fma(a, b, -p) + (a * b_low + a_low * b))


@njit(**_INLINE)
def _times(a, a_low, b, b_low, c, c_low, d, d_low):
    """Return (a + ib)·(c + id)."""
    x, x_low = _mul(a, a_low, c, c_low)
    y, y_low = _mul(b, b_low, d, d_low)
    z, z_low = _mul(a, a_low, d, d_low)
    t, t_low = _mul(b, b_low, c, c_low)
    re, re_low = _add(x, x_low, -y, -y_low)
    im, im_low = _add(z, z_low, t, t_low)
    return re, re_low, im, im_low


@njit(**_OPTIONS)
def _sums(x, i, k, w, out, at, stride):
    """Do the steps of a stage that share a root: to places `at` and after it, from i and from k on."""
    a, a_low, b, b_low = (x[0, i : i + stride], x[1, i : i + stride], x[2, i : i + stride], x[3, i : i + stride])
    c, c_low, d, d_low = (x[0, k : k + stride], x[1, k : k + stride], x[2, k : k + stride], x[3, k : k + stride])
    s, s_low = out[0, at : at + 2 * stride], out[1, at : at + 2 * stride]
    t, t_low = out[2, at : at + 2 * stride], out[3, at : at + 2 * stride]
    for j in range(stride):
        s[j], s_low[j] = _add(a[j], a_low[j], c[j], c_low[j])
        t[j], t_low[j] = _add(b[j], b_low[j], d[j], d_low[j])
        re, re_low = _add(a[j], a_low[j], -c[j], -c_low[j])
        im, im_low = _add(b[j], b_low[j], -d[j], -d_low[j])
        re, re_low, im, im_low = _times(re, re_low, im, im_low, w[0], w[1], w[2], w[3])
        s[stride + j], s_low[stride + j], t[stride + j], t_low[stride + j] = re, re_low, im, im_low


@njit(**_OPTIONS)
def turned(x, roots):
    """Return the transform of complex double-doubles, (4, n); x is written over.

    The rows are real parts, what is left of them, imaginary parts, and what is left of them.
    """
    n = x.shape[1]
    stride, other, w = 1, np.empty_like(x), np.empty(4)
    while n > 1:
        half = n // 2
        for p in range(half):
            for k in range(4):
                w[k] = roots[k, 4 * stride * p]
            _sums(x, p * stride, (p + half) * stride, w, other, 2 * p * stride, stride)
        x, other = other, x
        n, stride = half, 2 * stride
    return x


@njit(**_OPTIONS)
def inverse(re, im, root_re, root_im, factor):
    """Do SEAL's inverse transform of float64 numbers in place, the last stage times a factor."""
    used, gap, m = 0, 1, re.shape[0] // 2
    while m >= 1:
        by = factor if m == 1 else 1.0
        for g in range(m):
            w_re, w_im = root_re[used + g] * by, root_im[used + g] * by
            a, b = 2 * g * gap, (2 * g + 1) * gap
            for i in range(gap):
                rest_re, rest_im = re[a + i] - re[b + i], im[a + i] - im[b + i]
                re[a + i], im[a + i] = (re[a + i] + re[b + i]) * by, (im[a + i] + im[b + i]) * by
                re[b + i] = rest_re * w_re - rest_im * w_im
                im[b + i] = rest_re * w_im + rest_im * w_re
        used, gap, m = used + m, 2 * gap, m // 2
