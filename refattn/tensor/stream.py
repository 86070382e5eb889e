"""Triple-wise attention on the CPU by tiles: exact in what it computes, extra memory in proportion to n·d."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import dtype_name
from ..errors import InvalidProblem, UnsupportedProblem
from . import strassen
from .forms import Seen, Shape, check, scale_of

__all__ = ["attention", "backward"]

Array = NDArray[Any]
ROWS, FIRST, SECOND = 8, 64, 256
"""Rows, keys of k1 and keys of k2 in a tile."""


def attention(
    query: Array, k1: Array, k2: Array, v1: Array, v2: Array, *, form: str = "trilinear", scale: float | None = None,
    causal: str | None = None, window: tuple[int | None, int | None] | None = None,
    allowed: tuple[Array | None, Array | None] | None = None, return_lse: bool = False,
) -> Any:  # fmt: skip
    """Return triple-wise softmax attention: sum_jk P_ijk (v1_j ∘ v2_k), P the softmax over (j, k) of scale · s_ijk.

    Parameters
    ----------
    query : (b, h, n_q, d) float32 or float64 array
        The queries.
    k1, k2 : (b, h_kv, n1, d) and (b, h_kv, n2, d) arrays
        The two kinds of keys; h_kv divides h.
    v1, v2 : (b, h_kv, n1, d_v) and (b, h_kv, n2, d_v) arrays
        Their values.
    form : str
        s_ijk, out of ``refattn.tensor.FORMS``: "trilinear", "determinant" (d a multiple of 3), "strassen", "tree",
        "rank_one".
    scale : float, optional
        1/d by default.
    causal : {"bottom_right", "top_left"}, optional
        Row i sees keys of both kinds up to its own place. In the tree form k1_j sees those k2 up to its own place.
    window : (w1, w2), optional
        With causal: the last w1 keys k1 and the last w2 keys k2 only; None for all.
    allowed : (mask, mask), optional
        The keys k1, (b, h, n_q, n1) bools, and k2, (b, h, n_q, n2), that each row sees at most; b and h may be 1; None
        for all. In the tree form the second says which k2 each k1 sees, (b, h, n1, n2). What lies at keys that no row
        of a head sees counts for nothing, even NaN.
    return_lse : bool
        Also return the log-sum-exp over all pairs, (b, h, n_q); -inf for a row without keys, whose out is 0.

    Raises
    ------
    InvalidProblem
        Shapes, types or options that do not fit together.
    UnsupportedProblem
        Another type than float32 and float64.
    """
    shape = check(query, (k1, k2), (v1, v2), form, causal, window, allowed)
    if dtype_name(query) not in ("float32", "float64"):
        raise UnsupportedProblem(f"tensor.attention: takes float32 and float64, got {dtype_name(query)}")
    by = scale_of(scale, shape.d)
    arrays = [np.asarray(x) for x in (query, k1, k2, v1, v2)]
    out = np.zeros((*arrays[0].shape[:3], shape.d_v), arrays[0].dtype)
    lse = np.full(arrays[0].shape[:3], -np.inf, arrays[0].dtype)
    for b, h in np.ndindex(shape.batch, shape.heads):
        (q, *rest), seen = _head(arrays, b, h, shape, form)
        out[b, h], lse[b, h] = _forward(seen, form, [q * q.dtype.type(by), *rest], q.dtype.type(by))
    return (out, lse) if return_lse else out


def backward(
    query: Array, k1: Array, k2: Array, v1: Array, v2: Array, dout: Array, *, form: str = "trilinear",
    scale: float | None = None, causal: str | None = None, window: tuple[int | None, int | None] | None = None,
    allowed: tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    """Return the gradients of sum(out·dout) by query, k1, k2, v1 and v2, by tiles.

    Parameters
    ----------
    query, k1, k2, v1, v2, form, scale, causal, window, allowed
        As in :func:`attention`.
    dout : (b, h, n_q, d_v) array
        The gradient that arrives at out.

    Raises
    ------
    InvalidProblem, UnsupportedProblem
        As in :func:`attention`.
    """
    given = {"form": form, "scale": scale, "causal": causal, "window": window, "allowed": allowed}
    out, lse = attention(query, k1, k2, v1, v2, **given, return_lse=True)  # type: ignore[arg-type]
    shape = check(query, (k1, k2), (v1, v2), form, causal, window, allowed)
    if np.shape(dout) != out.shape:
        raise InvalidProblem(f"dout: got shape {np.shape(dout)}, expected {out.shape}")
    arrays = [np.asarray(x) for x in (query, k1, k2, v1, v2)]
    grads = [np.zeros_like(x) for x in arrays]
    by, group = arrays[0].dtype.type(scale_of(scale, shape.d)), shape.heads // shape.heads_kv
    for b, h in np.ndindex(shape.batch, shape.heads):
        (q, *rest), seen = _head(arrays, b, h, shape, form)
        g = np.asarray(dout[b, h], q.dtype)
        dq, *others = _backward(seen, form, [q * by, *rest], by, out[b, h], lse[b, h], g)
        grads[0][b, h] = dq * by
        for total, x in zip(grads[1:], others, strict=True):
            total[b, h // group] += x
    return tuple(grads)  # type: ignore[return-value]


def _head(arrays: list[Array], b: int, h: int, shape: Shape, form: str) -> tuple[list[Array], tuple[Seen, Seen]]:
    """Return a head's arrays, and the keys that its rows see."""
    kv, seen = h // (shape.heads // shape.heads_kv), shape.seen(form, b, h)
    (k1, v1), (k2, v2) = (s.shown([x[b, kv] for x in arrays[t::2]]) for t, s in enumerate(seen, 1))
    return [arrays[0][b, h], k1, k2, v1, v2], seen


def _cross(a: Array, b: Array) -> Array:
    x, y = np.broadcast_arrays(a, b)
    chunks = np.cross(x.reshape(*x.shape[:-1], -1, 3), y.reshape(*y.shape[:-1], -1, 3))
    return np.asarray(chunks.reshape(x.shape))


def _left(form: str, q: Array, k1: Array, by: Any) -> tuple[Array, Array | None]:
    """Return (rows, keys, d) factors X and (rows, keys) terms r: scale·s_ijk = X_ij·k2_k + r_ij. q is scaled."""
    if form == "trilinear":
        return q[:, None] * k1, None
    if form == "determinant":
        return _cross(q[:, None], k1[None]), None
    return q[:, None] + by * k1, q @ k1.T  # strassen


def _tiles(seen: tuple[Seen, Seen]) -> Any:
    """Yield (rows, keys of k1, keys of k2, mask or None) of every tile that holds a pair that a row sees."""
    n = len(seen[0].first)
    for i in range(0, n, ROWS):
        rows = slice(i, min(i + ROWS, n))
        one, two = (s[rows] for s in seen)
        for js in one.spans(FIRST):
            of_one = one.mask(js)
            if not of_one.any():
                continue
            for ks in two.spans(SECOND):
                of_two = two.mask(ks)
                if of_two.any():
                    whole = of_one.all() and of_two.all()
                    yield rows, js, ks, None if whole else of_one[:, :, None] & of_two[:, None, :]


def _scores(form: str, q: Array, k1: Array, k2: Array, by: Any, mask: Array | None) -> Array:
    x, r = _left(form, q, k1, by)
    s = (x.reshape(-1, x.shape[2]) @ k2.T).reshape(*x.shape[:2], -1)
    if r is not None:
        s += r[:, :, None]
    return s if mask is None else np.where(mask, s, -np.inf)


def _forward(seen: tuple[Seen, Seen], form: str, arrays: list[Array], by: Any) -> tuple[Array, Array]:
    """Return out and lse of a head; its query is scaled."""
    q, k1, k2, v1, v2 = arrays
    if form == "rank_one":
        a, b = _pairwise(q, k1, v1, seen[0], None), _pairwise(q, k2, v2, seen[1], None)
        return a[0] * b[0], a[1] + b[1]
    if form == "tree":
        inner, inner_lse = _pairwise(by * k1, k2, v2, seen[1], None)
        return _pairwise(q, k1, v1 * inner, seen[0], inner_lse)
    if form == "strassen":
        return strassen.forward(arrays, by, seen, lambda some, of: _by_tiles(form, some, by, of))
    return _by_tiles(form, arrays, by, seen)


def _by_tiles(form: str, arrays: list[Array], by: Any, seen: tuple[Seen, Seen]) -> tuple[Array, Array]:
    """Return out and lse of a head's rows, pairs of keys in tiles."""
    q, k1, k2, v1, v2 = arrays
    n, d_v = len(q), v1.shape[1]
    top, total = np.full(n, -np.inf, q.dtype), np.zeros(n, q.dtype)
    out = np.zeros((n, d_v), q.dtype)
    for rows, js, ks, mask in _tiles(seen):
        s = _scores(form, q[rows], k1[js], k2[ks], by, mask)
        largest = np.maximum(top[rows], s.max((1, 2)))
        base = np.where(np.isfinite(largest), largest, 0)
        shrink = np.exp(top[rows] - base)
        s -= base[:, None, None]
        p = np.exp(s, out=s)
        total[rows] = total[rows] * shrink + p.sum((1, 2))
        weighted = (p.reshape(-1, p.shape[2]) @ v2[ks]).reshape(*p.shape[:2], d_v)
        out[rows] = out[rows] * shrink[:, None] + np.einsum("ijc,jc->ic", weighted, v1[js])
        top[rows] = largest
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, np.where(np.isfinite(top), top, 0) + np.log(total), -np.inf)
    return out / np.where(total > 0, total, 1)[:, None], lse


def _backward(
    seen: tuple[Seen, Seen], form: str, arrays: list[Array], by: Any, out: Array, lse: Array, g: Array
) -> list[Array]:
    """Return the gradients of a head by scaled query, k1, k2, v1 and v2."""
    q, k1, k2, v1, v2 = arrays
    if form == "rank_one":
        a, b = _pairwise(q, k1, v1, seen[0], None), _pairwise(q, k2, v2, seen[1], None)
        da = _pairwise_backward(q, k1, v1, seen[0], None, *a, g * b[0], None)
        db = _pairwise_backward(q, k2, v2, seen[1], None, *b, g * a[0], None)
        return [da[0] + db[0], da[1], db[1], da[2], db[2]]
    if form == "tree":
        inner, inner_lse = _pairwise(by * k1, k2, v2, seen[1], None)
        dq, dk1, dv, dbias = _pairwise_backward(q, k1, v1 * inner, seen[0], inner_lse, out, lse, g, None)
        dk, dk2, dv2, _ = _pairwise_backward(by * k1, k2, v2, seen[1], None, inner, inner_lse, dv * v1, dbias)
        return [dq, dk1 + by * dk, dk2, dv * inner, dv2]
    grads = [np.zeros_like(x) for x in (q, k1, k2, v1, v2)]
    dq, dk1, dk2, dv1, dv2 = grads
    delta = (g * out).sum(1)
    base = np.where(np.isfinite(lse), lse, 0)
    for rows, js, ks, mask in _tiles(seen):
        a, b = q[rows], k1[js]
        x, _ = _left(form, a, b, by)
        s = _scores(form, a, b, k2[ks], by, mask)
        p = np.exp(s - base[rows, None, None])
        flat = (-1, p.shape[2])
        gv = g[rows, None] * v1[js]
        dp = (gv.reshape(-1, gv.shape[2]) @ v2[ks].T).reshape(p.shape)
        ds = p * (dp - delta[rows, None, None])
        pv = (p.reshape(flat) @ v2[ks]).reshape(*p.shape[:2], -1)
        dv1[js] += np.einsum("ijc,ic->jc", pv, g[rows])
        dv2[ks] += p.reshape(flat).T @ gv.reshape(-1, gv.shape[2])
        dx = (ds.reshape(flat) @ k2[ks]).reshape(x.shape)
        dk2[ks] += ds.reshape(flat).T @ x.reshape(-1, x.shape[2])
        if form == "trilinear":
            dq[rows] += np.einsum("ijl,jl->il", dx, b)
            dk1[js] += np.einsum("ijl,il->jl", dx, a)
        elif form == "determinant":
            dq[rows] += _cross(b[None], dx).sum(1)
            dk1[js] += _cross(dx, a[:, None]).sum(0)
        else:
            dr = ds.sum(2)
            dq[rows] += dx.sum(1) + dr @ b
            dk1[js] += by * dx.sum(0) + dr.T @ a
    return grads


def _pairwise_tiles(seen: Seen) -> Any:
    n = len(seen.first)
    for i in range(0, n, SECOND):
        rows = slice(i, min(i + SECOND, n))
        of = seen[rows]
        for js in of.spans(SECOND):
            yield rows, js, of.mask(js)


def _pairwise(q: Array, k: Array, v: Array, seen: Seen, bias: Array | None) -> tuple[Array, Array]:
    """Return out and lse of pairwise softmax attention, a term for each key added to its scores."""
    n = len(q)
    top, total, out = np.full(n, -np.inf, q.dtype), np.zeros(n, q.dtype), np.zeros((n, v.shape[1]), q.dtype)
    for rows, js, mask in _pairwise_tiles(seen):
        s = q[rows] @ k[js].T
        if bias is not None:
            s += bias[js]
        s = np.where(mask, s, -np.inf)
        largest = np.maximum(top[rows], s.max(1))
        base = np.where(np.isfinite(largest), largest, 0)
        shrink, p = np.exp(top[rows] - base), np.exp(s - base[:, None])
        total[rows] = total[rows] * shrink + p.sum(1)
        out[rows] = out[rows] * shrink[:, None] + p @ v[js]
        top[rows] = largest
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, np.where(np.isfinite(top), top, 0) + np.log(total), -np.inf)
    return out / np.where(total > 0, total, 1)[:, None], lse.astype(q.dtype)


def _pairwise_backward(
    q: Array, k: Array, v: Array, seen: Seen, bias: Array | None, out: Array, lse: Array, g: Array,
    dlse: Array | None,
) -> list[Array]:  # fmt: skip
    """Return gradients by q, k, v and the keys' terms; dlse is what arrives at lse."""
    dq, dk, dv, dbias = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(len(k), q.dtype)
    delta = (g * out).sum(1)
    if dlse is not None:
        delta = delta - dlse
    base = np.where(np.isfinite(lse), lse, 0)
    for rows, js, mask in _pairwise_tiles(seen):
        s = q[rows] @ k[js].T
        if bias is not None:
            s += bias[js]
        p = np.exp(np.where(mask, s, -np.inf) - base[rows, None])
        ds = p * (g[rows] @ v[js].T - delta[rows, None])
        dv[js] += p.T @ g[rows]
        dq[rows] += ds @ k[js]
        dk[js] += ds.T @ q[rows]
        dbias[js] += ds.sum(0)
    return [dq, dk, dv, dbias]
