"""Right kernels that multiply in narrower types, written for the tests of their models."""

import numpy as np

from refattn.arrays import from_float64, to_float64
from refattn.check.model import TF32
from refattn.dtypes import FORMATS

F8 = FORMATS["float8_e4m3fn"]


def scaled(x, scales, block=128):
    """Return an operand rounded to float8 under its tensor's or its blocks' scale, and multiplied back."""
    x, largest = x.astype(np.float32), np.float32(F8.largest)
    if scales == "tensor":
        s = np.full((*x.shape[:3], 1), np.abs(x).max(initial=0) / largest, np.float32)
    elif scales == "block":
        starts = np.arange(0, x.shape[2], block)
        s = np.maximum.reduceat(np.abs(x).max(3), starts, axis=2)[:, :, np.arange(x.shape[2]) // block, None] / largest
    else:
        s = np.ones((*x.shape[:3], 1), np.float32)
    s = np.where(s > 0, s, np.float32(1)).astype(np.float32)
    return F8.round_array(np.clip(x / s, -largest, largest).astype(np.float64)).astype(np.float32) * s


def parts(x):
    """Return the two tf32 parts of float32 numbers."""
    high = to_tf32(x)
    return high, to_tf32(x - high)


def to_tf32(x):
    """Round float32 numbers to tf32, to nearest, ties to even."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    drop = 24 - TF32.precision
    odd = (bits >> drop) & 1
    return ((bits + (1 << (drop - 1)) - 1 + odd) >> drop << drop).astype(np.uint32).view(np.float32)


def product(x, y, passes):
    """Multiply float32 matrices as the matrix units do in tf32, in one pass or three."""
    (a, b), (c, d) = parts(x), parts(y)
    return a @ c if passes == 1 else (b @ c + a @ d) + a @ c


def attend(problem, multiply, weights):
    """Return plain softmax attention in float32 with products of one's own."""
    q, k, v = (to_float64(x).astype(np.float32) for x in (problem.query, problem.key, problem.value))
    s = multiply(q, k.swapaxes(2, 3)) * np.float32(1 / np.sqrt(problem.d_k) if problem.scale is None else problem.scale)
    m = s.max(3, keepdims=True)
    w = np.exp(s - m)
    z = w.sum(3, keepdims=True)
    out = multiply(weights(w), v) / z
    lse = (m + np.log(z))[..., 0]
    return from_float64(FORMATS[problem.dtype].round_array(out.astype(np.float64)), problem.dtype), lse


def float8(scales):
    """Return a kernel that rounds query, key, value and P to float8."""

    def kernel(p):
        q, k, v = (scaled(to_float64(x), scales) for x in (p.query, p.key, p.value))
        wide = p.replace(query=q, key=k, value=v)
        out, lse = attend(wide, np.matmul, lambda w: F8.round_array(w.astype(np.float64)).astype(np.float32))
        return from_float64(FORMATS[p.dtype].round_array(out.astype(np.float64)), p.dtype), lse

    return kernel


def tf32(passes):
    """Return a float32 kernel on tf32 products."""
    return lambda p: attend(p, lambda x, y: product(x, y, passes), lambda w: w)
