"""Our kernel for softmax attention over some keys, in NumPy: it picks the keys of a row, gathers them, and attends.

Keys are picked by rules and float32 scores written here, not by the operators' definitions. Float32 inside, P rounded
to the input's type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import from_float64, to_float64
from ...dtypes import FORMATS
from ...errors import UnsupportedProblem
from ...problem import Problem
from ...variants import variant_of

__all__ = ["of_row", "seen", "sparse"]

Array = NDArray[Any]
Pick = Callable[[Array, Array, dict[str, Any]], Iterator[list[int]]]


def sparse(problem: Problem) -> tuple[Array, Array]:
    """Return out (b, h_q, n_q, d_v) and lse (b, h_q, n_q) of an operator that attends to some keys.

    Raises
    ------
    UnsupportedProblem
        Another operator.
    """
    if problem.variant not in PICKS:
        raise UnsupportedProblem(f"refattn-sparse: takes {', '.join(PICKS)}, got {problem.variant}")
    p, form = problem.to("numpy"), FORMATS[problem.dtype]
    q, k, v = (to_float64(x).astype(np.float32) for x in (p.query, p.key, p.value))
    out, lse = np.zeros(p.out_shape, np.float32), np.full(p.out_shape[:3], -np.inf, np.float32)
    options = variant_of(p.variant).settings(p)
    with np.errstate(all="ignore"):
        for b, h in product(range(p.batch), range(p.heads)):
            g, own, group = h * p.heads_kv // p.heads, dict(options), p.heads // p.heads_kv
            if (blocks := own.get("blocks")) and isinstance(blocks[0][0], tuple):  # a mask for each head
                own["blocks"] = blocks[h if len(blocks) > 1 else 0]
            weight = None if p.weight is None else [of_row(p.weight, b, h, i, p.n_k) for i in range(p.n_q)]
            own["weighs"] = np.ones((p.n_q, p.n_k), bool) if weight is None else to_float64(np.array(weight)) > 0
            own |= {"group": q[b, g * group : (g + 1) * group], "scale": _scale(p)}
            for i, picked in enumerate(PICKS[p.variant](q[b, h], k[b, g], own)):
                keys = seen(p, b, h, i, np.array(picked, np.intp))
                out[b, h, i], lse[b, h, i] = _row(p, (b, h, i), q[b, h, i], k[b, g, keys], v[b, g, keys], keys)
    return from_float64(form.round_array(out.astype(np.float64)), p.dtype), lse


def rows_with_keys(p: Problem) -> Iterator[tuple[int, int, int, int, Array]]:
    """Yield the batch, head, row, key head and seen keys of each row that sees a key."""
    for b, h, i in product(*map(range, p.out_shape[:3])):
        keys = seen(p, b, h, i, np.arange(p.n_k))
        if len(keys):
            yield b, h, i, h * p.heads_kv // p.heads, keys


def seen(p: Problem, b: int, h: int, i: int, keys: Array) -> Array:
    """Return those of a row's keys that the call shows it."""
    at = i + (0 if p.causal == "top_left" else p.n_k - p.n_q)
    left, right = p.window or (None, None)
    right = 0 if p.causal else right
    keys = keys if left is None else keys[keys >= at - left]
    keys = keys if right is None else keys[keys <= at + right]
    return keys if p.allowed is None else keys[of_row(p.allowed, b, h, i, p.n_k)[keys]]


def of_row(x: Array, b: int, h: int, i: int, n_k: int) -> Array:
    """Return a row of a mask, bias or weight whose axes of one element stand for all."""
    at = tuple(j if n > 1 else 0 for j, n in zip((b, h, i), x.shape, strict=False))
    return np.broadcast_to(x[at], n_k)


def _scale(p: Problem) -> Any:
    return np.float32(1 / np.sqrt(p.d_k) if p.scale is None else p.scale)


def _row(p: Problem, at: tuple[int, int, int], q: Array, k: Array, v: Array, keys: Array) -> tuple[Array, Any]:
    """Return one row's out and lse over the keys it sees."""
    s = (k @ q) * _scale(p)
    if not (np.isfinite(q).all() and np.isfinite(k).all()) and len(keys):  # it shows in all of the row
        return np.full(v.shape[1], np.nan, np.float32), np.float32(np.nan)
    if p.softcap is not None:
        s = np.tanh(s / np.float32(p.softcap)) * np.float32(p.softcap)
    if p.bias is not None:
        s = s + to_float64(of_row(p.bias, *at, p.n_k)[keys]).astype(np.float32)
    sink = -np.inf if p.sink is None else np.float32(to_float64(p.sink)[at[1]])
    top = np.maximum(s.max(initial=-np.inf), np.float32(sink))
    base = np.float32(0) if top == -np.inf else top
    w = np.exp(s - base)
    if p.weight is not None:
        w = w * to_float64(of_row(p.weight, *at, p.n_k)[keys]).astype(np.float32)
    total = w.sum(dtype=np.float32) + (np.exp(sink - base) if p.sink is not None else np.float32(0))
    if total == 0:
        return np.zeros(v.shape[1], np.float32), np.float32(-np.inf)
    w = FORMATS[p.dtype].round_array(w.astype(np.float64)).astype(np.float32)
    return (w @ v) / total, base + np.log(total)


def _power_blocks(q: Array, k: Array, o: dict[str, Any]) -> Iterator[list[int]]:
    size = o["block_size"]
    for i in range(len(q)):
        own = (i + len(k) - len(q)) // size
        back = {own - d for d in (0, *(2**e for e in range(own.bit_length() + 1)), *range(o["window_blocks"]))}
        blocks = {b for b in back | set(range(min(o["sink_blocks"], own + 1))) if 0 <= b <= own}
        yield [j for b in sorted(blocks) for j in range(b * size, min(b * size + size, len(k)))]


def _neighborhood(q: Array, k: Array, o: dict[str, Any]) -> Iterator[list[int]]:
    shape = o["shape"] or (len(q),)
    ones = (1,) * len(shape)
    extra = list(range(len(q), len(k)))
    given = (o["window"] or shape, o["stride"] or ones, o["dilation"] or ones, o["is_causal"] or (False,) * len(shape))
    sides = [[_near(x, *axis) for x in range(axis[0])] for axis in zip(shape, *given, strict=True)]
    for at in product(*map(range, shape)):
        near = product(*(side[x] for x, side in zip(at, sides, strict=True)))
        yield [int(np.ravel_multi_index(place, shape)) for place in near] + extra


def _near(x: int, n: int, window: int, stride: int, dilation: int, causal: bool) -> list[int]:
    """Return the tokens of an axis that one sees: of its dilation's group, a window that stays inside."""
    mates, own = list(range(x % dilation, n, dilation)), x // dilation
    leader = min(own - own % stride + (stride - 1 if causal else stride // 2), len(mates) - 1)
    if causal:
        return mates[max(leader - window + 1, 0) : own + 1]
    first = min(max(leader - window // 2, 0), len(mates) - window)
    return mates[first : first + window]


def _titans_mac(q: Array, k: Array, o: dict[str, Any]) -> Iterator[list[int]]:
    kept, size = o["persistent"], o["segment"]
    for i in range(len(q)):
        t = i + len(k) - len(q) - kept
        first = max(t - size, 0) if o["sliding"] else t - t % size
        yield [*range(kept), *range(kept + first, kept + t + 1)]


def _there(weighs: Array, first: int, count: int, size: int) -> Array:
    """Tell which of some whole blocks have a key that counts."""
    return np.asarray(weighs[first : first + count * size].reshape(count, size).any(1))


def _moba(q: Array, k: Array, o: dict[str, Any]) -> Iterator[list[int]]:
    size = o["block_size"]
    blocks = range(0, len(k), size)
    means = np.array([k[a : a + size].mean(0, dtype=np.float32) for a in blocks]).reshape(len(blocks), k.shape[1])
    for i in range(len(q)):
        own = (i + len(k) - len(q)) // size
        there = _there(o["weighs"][i], 0, own, size)
        asking = o["group"][:, i].sum(0, dtype=np.float32) if o["by_group"] else q[i]
        taken = {own} if o["forced"] == "own" else {own, max(own - 1, 0), 0}
        order = np.argsort(-np.where(there, means[:own] @ asking, -np.inf), kind="stable").tolist()
        left = [b for b in order if b not in taken]
        taken |= set(left[: o["topk"] - (1 if o["forced"] == "own" else 3)])
        yield [j for b in sorted(taken) for j in range(b * size, min(b * size + size, len(k)))]


def _nsa_selected(q: Array, k: Array, o: dict[str, Any]) -> Iterator[list[int]]:
    size = o["block_size"]
    means = np.array([k[a : a + size].mean(0, dtype=np.float32) for a in range(0, len(k), size)])
    for i in range(len(q)):
        at = i + len(k) - len(q)
        own, whole = at // size, (at + 1) // size
        weigh = np.zeros(whole, np.float32)
        there = _there(o["weighs"][i], 0, whole, size)
        for asking in o["group"][:, i]:
            s = np.where(there, (means[:whole] @ asking) * o["scale"], -np.inf)
            w = np.exp(s - s.max()) if there.any() else np.ones_like(s)
            weigh += np.where(there, w / w.sum(dtype=np.float32), -np.inf)
        taken = {own} if o["forced"] == "own" else {own, max(own - 1, 0), 0}
        left = [b for b in np.argsort(-weigh[:own], kind="stable").tolist() if b not in taken]
        taken |= set(left[: o["topk"] - (1 if o["forced"] == "own" else 3)])
        yield [j for b in sorted(taken) for j in range(b * size, min(b * size + size, len(k)))]


def _topk(q: Array, k: Array, o: dict[str, Any]) -> Iterator[list[int]]:
    size, first = o["block_size"], o["sink_keys"]
    for i in range(len(q)):
        at = i + len(k) - len(q)
        near = max(at - o["local"] + 1, 0)
        count = max(near - first, 0) // size
        means = k[first : first + count * size].reshape(count, size, k.shape[1]).mean(1, dtype=np.float32)
        asking = o["group"][:, i].sum(0, dtype=np.float32) if o["by_group"] else q[i]
        there = _there(o["weighs"][i], first, count, size)
        best = np.argsort(-np.where(there, means @ asking, -np.inf), kind="stable")[: o["topk"]]
        chosen = [first + int(b) * size + j for b in sorted(best) for j in range(size)]
        yield [*range(min(first, at + 1)), *chosen, *range(max(first + count * size, min(first, near)), at + 1)]


def _dsa(q: Array, k: Array, o: dict[str, Any]) -> Iterator[list[int]]:
    for i in range(len(q)):
        asking, own = o["group"][:, i], i + len(k) - len(q) + 1
        s = np.maximum(asking[:, :-1] @ k[:own, :-1].T, 0)
        s = (asking[:, -1:] * s).sum(0, dtype=np.float32)
        s = np.where(o["weighs"][i, :own], s, -np.inf)
        yield sorted(np.argsort(-s, kind="stable")[: o["topk"]].tolist())


def _seer(q: Array, k: Array, o: dict[str, Any]) -> Iterator[list[int]]:
    d, n, size = o["gate_dim"] or k.shape[1], len(k), o["block_size"]
    starts = range(0, n, size)
    asking, k = (np.where(np.isfinite(x), x, np.float32(0)) for x in (o["group"], k))  # in the gate alone
    x = np.array([asking[:, a : a + size, -d:].mean(1, dtype=np.float32).sum(0) for a in starts])
    y = np.array([k[a : a + size, -d:].mean(0, dtype=np.float32) for a in starts])
    count = max(1, int((1 - np.sqrt(1 - (o["ratio"] or 0))) * len(starts)))
    for i in range(n):
        s = (y[: i // size + 1] @ x[i // size]) * np.float32(o["gate_scale"])
        gate = np.exp(s - s.max())
        gate = gate / gate.sum(dtype=np.float32)
        best = np.argsort(-s, kind="stable")[:count] if o["ratio"] else np.flatnonzero(gate > o["threshold"])
        taken = best if o["ratio"] or o["threshold"] else np.arange(len(s))
        yield [j for b in taken.tolist() for j in range(b * size, min(b * size + size, n))]


def _block_sparse(q: Array, k: Array, o: dict[str, Any]) -> Iterator[list[int]]:
    blocks, size = o["blocks"], o["block_k"]
    for i in range(len(q)):
        row = None if blocks is None else blocks[i // o["block_q"]]
        yield [j for j in range(len(k)) if row is None or row[j // size]]


def _view_local(q: Array, k: Array, o: dict[str, Any]) -> Iterator[list[int]]:
    side, size, r = o["image"], o["patches"], round(len(q) ** (1 / 3))
    released, others = o["mode"] == "released", len(k) - size**2
    reach = Fraction(o["radius"]) - (Fraction(1, 10**6) if released else 0)
    middles = [Fraction(side * (2 * i + 1), 2 * size) for i in range(size)]  # of patches, in pixels
    if o["projection"] is None:
        yield from [list(range(len(k)))] * len(q)
        return
    for at in product(range(r), repeat=3):
        x: list[Any] = [*(Fraction(2 * i + 1 - r, r) for i in at), 1]
        u, v, d = (sum(Fraction(a) * b for a, b in zip(row, x, strict=True)) for row in o["projection"])
        column, row = u / d, v / d
        if released:
            column, row = (max(0, min(round(i), side - 1)) + Fraction(1, 2) for i in (column, row))
            column = side - column
        across, down = ([((i - m) * size / side) ** 2 for m in middles] for i in (column, row))
        near = [i * size + j for i, j in product(range(size), repeat=2) if down[i] + across[j] <= reach**2]
        yield [*range(others), *(others + j for j in near if reach >= 0)]


PICKS: dict[str, Pick] = {
    "block_sparse": _block_sparse,
    "power_blocks": _power_blocks,
    "neighborhood": _neighborhood,
    "titans_mac": _titans_mac,
    "moba": _moba,
    "topk": _topk,
    "nsa_selected": _nsa_selected,
    "dsa": _dsa,
    "seer": _seer,
    "view_local": _view_local,
}
"""By operator, the keys of each row of a head."""
