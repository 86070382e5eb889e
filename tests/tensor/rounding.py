"""What the trilinear GPU kernels may lose, for each element, from their rounding model; and the definition, densely.

Model: q·k1 and d_out·v1 (or the like), P, dS and results are rounded to bfloat16 (unit U); sums, exponentials, lse and
the sums delta are float32, of relative error F for as many terms as there are here.
"""

import numpy as np

from .test_tensor import seen

U, F = 2.0**-8, 2.0**-12  # F: some thousand terms of unit 2**-24


def bounds(query, k1, k2, v1, v2, d_out, scale, causal=None, window=(None, None)):
    """Return (out, lse, gradients) in float64, and bounds on the kernels' errors in each of them."""
    group = query.shape[1] // k1.shape[1]
    wide = [np.repeat(x, group, 1) for x in (k1, k2, v1, v2)]
    a, b, x, y = wide
    q, go = query, d_out

    def three(left, middle, right):
        return np.einsum("bhid,bhjd,bhkd->bhijk", left, middle, right, optimize=True)

    size, e_size = abs(scale) * three(abs(q), abs(a), abs(b)), U + F
    s = scale * three(q, a, b)
    s = np.where(seen("trilinear", *s.shape[2:], causal, window), s, -np.inf)
    top = s.max((3, 4), keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    terms = np.exp(s - top)
    total = terms.sum((3, 4), keepdims=True)
    p = np.divide(terms, total, out=np.zeros_like(terms), where=total > 0)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0, 0]
    e = (e_size * np.where(np.isfinite(s), size, 0)).max((3, 4), keepdims=True)  # of a score, for each row
    spread = np.expm1(2 * e) + F  # of a weight before it is rounded, relative

    def sums(w, left, right, to):
        return np.einsum(f"bhijk,bhid,bh{'j' if to == 'k' else 'k'}d->bh{to}d", w, left, right, optimize=True)

    def rounded(value, error):
        return error + U * (np.abs(value) + error)

    out = np.einsum("bhijk,bhjd,bhkd->bhid", p, x, y, optimize=True)
    mass = np.einsum("bhijk,bhjd,bhkd->bhid", p, abs(x), abs(y), optimize=True)
    e_out = rounded(out, ((1 + spread) * (1 + U + F) - 1)[..., 0, 0, None] * mass)
    e_lse = (e + 2 * F)[..., 0, 0] * (1 + np.abs(np.where(np.isfinite(lse), lse, 0)))

    # gradients: P again, from lse; delta; dP; dS
    e_p = ((1 + np.expm1(e + e_lse[..., None, None]) + F) * (1 + U) - 1) * p
    delta = (go * out).sum(-1)[..., None, None]
    e_delta = ((abs(go) * e_out).sum(-1) + F * (abs(go) * abs(out)).sum(-1))[..., None, None]
    dp, e_dp = three(go, x, y), e_size * three(abs(go), abs(x), abs(y))
    ds = p * (dp - delta)
    e_ds = rounded(ds, e_p * np.abs(dp - delta) + (p + e_p) * (e_dp + e_delta))
    ds, e_ds = scale * ds, abs(scale) * e_ds

    def summed(w, e_w, left, right, to):
        value = sums(w, left, right, to)
        return value, rounded(value, sums(e_w + e_size * (np.abs(w) + e_w), abs(left), abs(right), to))

    dq = np.einsum("bhijk,bhjd,bhkd->bhid", ds, a, b, optimize=True)
    more = e_ds + e_size * (np.abs(ds) + e_ds)
    e_dq = rounded(dq, np.einsum("bhijk,bhjd,bhkd->bhid", more, abs(a), abs(b), optimize=True))
    found = [(dq, e_dq)]
    for w, e_w, left, others in ((ds, e_ds, q, (b, a)), (p, e_p, go, (y, x))):
        found += [summed(w, e_w, left, right, to) for right, to in zip(others, "jk", strict=True)]
    grads = [found[0], *(_grouped(g, group) for g in found[1:])]
    return (out, e_out), (lse, e_lse), grads


def _grouped(pair, group):
    """Add up the heads that share a key head."""
    return tuple(v.reshape(v.shape[0], -1, group, *v.shape[2:]).sum(2) for v in pair)
