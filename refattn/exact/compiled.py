"""The elementwise steps of the streaming path, compiled by numba, with fused multiply-add.

They do what ``elementwise.py`` does, with the same bounds: a fused multiply-add gives a product's error exactly.
"""

# mypy: ignore-errors

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .doubledouble import EXP2_FLOOR, TABLE_BITS, table

__all__ = [
    "accumulate",
    "capped",
    "cut",
    "damped",
    "gains",
    "gradient_weights",
    "row_sum_error",
    "row_sums",
    "scores",
    "weights",
]

_HIGH, _LOW, (_C, _C_LOW) = table()
_BOTH = np.ascontiguousarray(np.concatenate([_HIGH, _LOW]))
_SIZE = 1 << TABLE_BITS
_MAGIC = 1.5 * 2.0**52
_MAGIC_BITS = int(np.float64(_MAGIC).view(np.int64))
_OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False, "cache": True}


@intrinsic
def _fma(context, a, b, c):
    def emit(ctx, builder, signature, args):
        return builder.fma(*args)

    return types.float64(types.float64, types.float64, types.float64), emit


@intrinsic
def _to_bits(context, a):
    def emit(ctx, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(64))

    return types.int64(types.float64), emit


@intrinsic
def _from_bits(context, a):
    def emit(ctx, builder, signature, args):
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), emit


@njit(inline="always", **_OPTIONS)
def _two_sum(a, b):
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@njit(inline="always", **_OPTIONS)
def _fast_two_sum(a, b):
    s = a + b
    return s, b - (s - a)


@njit(inline="always", **_OPTIONS)
def _exp2(h, low):
    z = h * float(_SIZE)
    shifted = z + _MAGIC
    k = shifted - _MAGIC
    r, r_low = _two_sum(z - k, low * float(_SIZE))
    index = _to_bits(shifted) - _MAGIC_BITS
    i = numba.uint64(index & (_SIZE - 1))
    power = _from_bits(((index >> TABLE_BITS) + 1023) << 52)
    y = r * _C
    y_low = _fma(r, _C, -y) + _fma(r, _C_LOW, r_low * _C)
    s = y * y
    s_low = _fma(y, y, -s) + 2.0 * (y * y_low)
    rest = (y * s) * _fma(y, _fma(y, _fma(y, 1 / 720, 1 / 120), 1 / 24), 1 / 6)
    q, e = _fast_two_sum(y, 0.5 * s)
    q_low = e + _fma(0.5, s_low, y_low) + rest
    t = _BOTH[i]
    t_low = _BOTH[i + numba.uint64(_SIZE)]
    p = t * q
    e = _fma(t, q, -p)
    out, e2 = _fast_two_sum(t, p)
    out, low_part = _fast_two_sum(out, e2 + (_fma(t, q_low, e) + _fma(t_low, q, t_low)))
    return out * power, low_part * power


@njit(**_OPTIONS)
def cut(x, y, sigma, heads, tails):
    """Cut a double-double x + y (n, m) along rows into heads (L, n, m), leaving tails (L + 1, n, m); sigma (L, n)."""
    n, m = x.shape
    for i in range(n):
        for j in range(m):
            a, b = x[i, j], y[i, j]
            tails[0, i, j] = a + b
            for s in range(sigma.shape[0]):
                c = sigma[s, i]
                head = (a + c) - c
                heads[s, i, j] = head
                a, b = _two_sum(a - head, b)
                tails[s + 1, i, j] = a + b


def row_sum_error(w):
    """Return the error of a sum over w keys, over the sum of absolute values: it is compensated, and rounded once."""
    return 2.0**-52


def _make_scores(count):
    @njit(**_OPTIONS)
    def compiled(c0, c1, c2, c3, c, c_low, h, low):
        rows, width = c0.shape
        for i in range(rows):
            x0, x1, x2, x3, to, to_low = c0[i], c1[i], c2[i], c3[i], h[i], low[i]
            for j in range(width):
                s = x0[j]
                s_low = 0.0
                if count > 1:
                    s, e = _two_sum(s, x1[j])
                    s_low += e
                if count > 2:
                    s, e = _two_sum(s, x2[j])
                    s_low += e
                if count > 3:
                    s, e = _two_sum(s, x3[j])
                    s_low += e
                p = s * c
                e = _fma(s, c, -p) + _fma(s, c_low, s_low * c)
                to[j], to_low[j] = _two_sum(p, e)

    return compiled


@njit(inline="always", **_OPTIONS)
def _cut(x, y, level, sigma0, sigma1, sigma2):
    a = b = c = 0.0
    if level > 0:
        a = (x + sigma0) - sigma0
        x -= a
    if level > 1:
        x, y = _two_sum(x, y)
        b = (x + sigma1) - sigma1
        x -= b
    if level > 2:
        x, y = _two_sum(x, y)
        c = (x + sigma2) - sigma2
        x -= c
    return a, b, c, x + y


@njit(inline="always", **_OPTIONS)
def _weight(h, low, shift):
    z, e = _two_sum(h, -shift)
    z, z_low = _two_sum(z, e + low)
    dead = not z >= EXP2_FLOOR  # also where a masked key's -inf has become no number
    z = EXP2_FLOOR if dead else z
    z_low = 0.0 if dead else z_low
    x, y = _exp2(z, z_low)
    return 0.0 if dead else x, 0.0 if dead else y


@njit(inline="always", **_OPTIONS)
def _put(room, out):
    """Copy all of it. As `out[:] = room` numba compiles for 7 s what to do where shapes differ."""
    for s in range(room.shape[0]):
        for j in range(room.shape[1]):
            out[s, j] = room[s, j]


def _make_weights(level):
    @njit(**_OPTIONS)
    def compiled(h, low, m, sigma0, sigma1, sigma2, out):
        rows, width = h.shape
        # one row's parts apart from `out`, whose interleaved parts the compiler cannot tell from one another
        room = np.empty((level + 1, width))
        p0, p1, p2, p3 = room[0], room[min(1, level)], room[min(2, level)], room[level]
        for i in range(rows):
            shift, x_, y_ = m[i], h[i], low[i]
            for j in range(width):
                x, y = _weight(x_[j], y_[j], shift)
                head0, head1, head2, tail = _cut(x, y, level, sigma0, sigma1, sigma2)
                if level > 0:
                    p0[j] = head0
                if level > 1:
                    p1[j] = head1
                if level > 2:
                    p2[j] = head2
                p3[j] = tail
            _put(room, out[i])

    return compiled


def _make_gradient_weights(level):
    @njit(**_OPTIONS)
    def compiled(h, low, m, g, g_low, d, d_low, unit, sigma0, sigma1, sigma2, out, out_g):
        rows, width = h.shape
        room, room_g = np.empty((level + 1, width)), np.empty((level + 1, width))
        p0, p1, p2, p3 = room[0], room[min(1, level)], room[min(2, level)], room[level]
        q0, q1, q2, q3 = room_g[0], room_g[min(1, level)], room_g[min(2, level)], room_g[level]
        product, product_low = np.empty(width), np.empty(width)
        for i in range(rows):
            shift, x_, y_, g_, gl_ = m[i], h[i], low[i], g[i], g_low[i]
            di, dli, ui = d[i], d_low[i], unit[i]
            for j in range(width):
                x, y = _weight(x_[j], y_[j], shift)
                a, e = _two_sum(g_[j], -di)
                a, a_low = _two_sum(a, e + (gl_[j] - dli))
                a *= ui
                a_low *= ui
                p = x * a
                e = _fma(x, a, -p) + _fma(x, a_low, y * a)
                product[j], product_low[j] = _two_sum(p, e)
                head0, head1, head2, tail = _cut(x, y, level, sigma0, sigma1, sigma2)
                if level > 0:
                    p0[j] = head0
                if level > 1:
                    p1[j] = head1
                if level > 2:
                    p2[j] = head2
                p3[j] = tail
            for j in range(width):
                head0, head1, head2, tail = _cut(product[j], product_low[j], level, sigma0, sigma1, sigma2)
                if level > 0:
                    q0[j] = head0
                if level > 1:
                    q1[j] = head1
                if level > 2:
                    q2[j] = head2
                q3[j] = tail
            _put(room, out[i])
            _put(room_g, out_g[i])

    return compiled


_SCORES = {n: _make_scores(n) for n in (1, 2, 3, 4)}
_WEIGHTS = {n: _make_weights(n) for n in (0, 1, 2, 3)}
_GRADIENT_WEIGHTS = {n: _make_gradient_weights(n) for n in (0, 1, 2, 3)}


def scores(levels, c, c_low, h, low):
    """Write c · (sum of the levels) as a double-double into h and low."""
    full = levels + [levels[0]] * (4 - len(levels))
    _SCORES[len(levels)](*full, c, c_low, h, low)


@njit(**_OPTIONS)
def _capped(h, low, k, k_low, c, c_low):
    for i in range(h.shape[0]):
        x_, y_ = h[i], low[i]
        for j in range(h.shape[1]):
            minus = x_[j] < 0
            x = -x_[j] if minus else x_[j]
            y = -y_[j] if minus else y_[j]
            z = x * k
            e = _fma(x, k, -z) + _fma(x, k_low, y * k)
            far = not z < -EXP2_FLOOR  # 1 but for 2**-249
            z = -EXP2_FLOOR if far else z
            e = 0.0 if far else e
            z, e = _two_sum(z, e)
            w, e = _exp2(z, e)
            w, w_low = _two_sum(w, 1.0)
            w, w_low = _two_sum(w, w_low + e)
            q = 2.0 / w
            rest = (_fma(-q, w, 2.0) - q * w_low) / w
            t, t_low = _two_sum(1.0, -q)
            t, t_low = _two_sum(t, t_low - rest)
            p = t * c
            e = _fma(t, c, -p) + _fma(t, c_low, t_low * c)
            p, e = _two_sum(p, e)
            x_[j] = -p if minus else p
            y_[j] = -e if minus else e


def capped(h, low, k, c):
    """Replace scores x = h + low in base 2 by c tanh(x ln 2 / cap), in place: c is the cap in base 2, k is 2 / cap."""
    _capped(h, low, *k, *c)


@njit(**_OPTIONS)
def _gains(h, low, c, c_low, gain, gain_low):
    for i in range(h.shape[0]):
        x_, y_, to, to_low = h[i], low[i], gain[i], gain_low[i]
        for j in range(h.shape[1]):
            x, y = x_[j], y_[j]
            p = x * c
            p, e = _two_sum(p, _fma(x, c, -p) + _fma(x, c_low, y * c))
            z = p * p
            z, rest = _two_sum(z, _fma(p, p, -z) + 2.0 * (p * e))
            s, e = _two_sum(1.0, -z)
            to[j], to_low[j] = _two_sum(s, e - rest)


def gains(h, low, per_cap, gain, gain_low):
    """Write the softcap's slopes 1 - (x / cap)**2 at capped scores x = h + low; per_cap is 1 / cap as two numbers."""
    _gains(h, low, *per_cap, gain, gain_low)


@njit(**_OPTIONS)
def _damped(products, gain, gain_low, sigma0, sigma1, sigma2):
    level = products.shape[1] - 1
    for i in range(products.shape[0]):
        for j in range(products.shape[2]):
            h, low = products[i, 0, j], 0.0
            for s in range(1, level + 1):
                h, e = _two_sum(h, products[i, s, j])
                low += e
            x, y = gain[i, j], gain_low[i, j]
            p = h * x
            p, e = _two_sum(p, _fma(h, x, -p) + _fma(h, y, low * x))
            head0, head1, head2, tail = _cut(p, e, level, sigma0, sigma1, sigma2)
            if level > 0:
                products[i, 0, j] = head0
            if level > 1:
                products[i, 1, j] = head1
            if level > 2:
                products[i, 2, j] = head2
            products[i, level, j] = tail


def damped(products, gain, gain_low, sigma):
    """Multiply products (r, L + 1, w), heads and tail, by gain + gain_low (r, w), in place, and cut them again."""
    _damped(products, gain, gain_low, *[*sigma, 0.0, 0.0, 0.0][:3])


def weights(h, low, m, sigma, out):
    """Write 2**(h + low - m) as heads and tail into out (r, L + 1, w)."""
    cuts = [*sigma, 0.0, 0.0, 0.0][:3]
    _WEIGHTS[len(sigma)](h, low, m, *cuts, out)


def gradient_weights(h, low, m, g, g_low, d, d_low, unit, sigma, out, out_g):
    """Write weights w = 2**(h + low - m) into out and w · (g + g_low - d - d_low) · unit into out_g, both cut."""
    cuts = [*sigma, 0.0, 0.0, 0.0][:3]
    _GRADIENT_WEIGHTS[len(sigma)](h, low, m, g, g_low, d, d_low, unit, *cuts, out, out_g)


@njit(**_OPTIONS)
def row_sums(p, out):
    """Write the sums of p (r, L + 1, w) over keys into out (r, L + 1), within :func:`row_sum_error`."""
    lanes, low = np.empty(16), np.empty(16)
    for i in range(p.shape[0]):
        for s in range(p.shape[1]):
            row = p[i, s]
            full = row.shape[0] & ~15
            lanes[:] = 0.0
            low[:] = 0.0
            for j in range(0, full, 16):
                for k in range(16):
                    lanes[k], e = _two_sum(lanes[k], row[j + k])
                    low[k] += e
            total, rest = 0.0, 0.0
            for k in range(16):
                total, e = _two_sum(total, lanes[k])
                rest += e + low[k]
            for j in range(full, row.shape[0]):
                total, e = _two_sum(total, row[j])
                rest += e
            out[i, s] = total + rest


@njit(**_OPTIONS)
def accumulate(h, low, x):
    """Add x to the double-double h + low, in place."""
    for i in range(h.shape[0]):
        for j in range(h.shape[1]):
            s, e = _two_sum(h[i, j], x[i, j])
            h[i, j], low[i, j] = _two_sum(s, low[i, j] + e)
