"""Where the numbers of a head go in a call's arrays, and what the contract fixes of these."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .anywhere import beside, on_host, within
from .doubledouble import U, two_sum
from .heads import Head, finite_rows, numbers_of
from .levels import UP, Level

__all__ = ["Raw", "add", "add_dbias", "collect", "finite", "mark", "put", "single", "specials"]

Raw = dict[str, NDArray[Any]]
"""Arrays by name. Elements are an arithmetic's numbers; those of a level stand along a last axis as h, l, r."""
CHUNK = 2**20
"""Truth values of a mask that are made at a time."""


def put(one: Head, name: str, x: NDArray[Any], raw: Raw) -> None:
    """Write what a recurrence gives of one head."""
    if name in ("dk", "dv"):
        add(raw[name], (one.batch, one.head_kv, one.keys), x)
    else:
        of_state = name in ("state", "dstate")
        raw[name][(one.sequence, one.head) if of_state else (one.batch, one.head, one.rows)] = x


def collect(one: Head, at: Any, grads: dict[str, Any], raw: Raw, sums: bool) -> None:
    """Write the gradients of some rows, and add them where they are sums over rows."""
    b, h, _ = at
    raw["dq"][within(raw["dq"], at)] = numbers_of(grads["dq"])
    for name in ("dk", "dv") if sums else ():
        add(raw[name], (b, one.head_kv, one.keys), numbers_of(grads[name]))
    if "dsink" in grads:
        add(raw["dsink"], (h,), numbers_of(grads["dsink"])[0, 0])
    if "dalibi_slopes" in grads:
        index = (h,) if one.problem.alibi_slopes.ndim == 1 else (b, h)
        add(raw["dalibi_slopes"], index, numbers_of(grads["dalibi_slopes"])[0, 0])
    for name in ("dquery_norm", "dkey_norm"):
        if name in grads:
            add(raw[name], (slice(None),), numbers_of(grads[name])[0])
    if "dbias" in grads:
        add_dbias(one, at, slice(0, one.k.shape[0]), grads["dbias"], raw)


def add_dbias(one: Head, at: Any, columns: slice, g: Any, raw: Raw) -> None:
    """Add the gradient by the scores of some rows and keys where the bias has them, summed where it was spread."""
    b, h, lines = at
    shape = one.problem.bias.shape
    g = g if shape[2] > 1 else g.T.sum().T
    g = g if shape[3] > 1 else g.sum()
    rows = lines[:, None] if shape[2] > 1 else np.zeros((1, 1), int)
    places = np.arange(one.keys.start, one.keys.stop) if isinstance(one.keys, slice) else one.keys
    keys = places[None, columns] if shape[3] > 1 else np.zeros((1, 1), int)
    add(raw["dbias"], (b if shape[0] > 1 else 0, h if shape[1] > 1 else 0, rows, keys), numbers_of(g))


def add(target: NDArray[Any], index: Any, x: NDArray[Any]) -> None:
    """Add numbers in place."""
    index = within(target, index)
    old = target[index]
    if target.dtype == object or target.shape[-1] != 3 or x.ndim != old.ndim:
        target[index] = old + x
        return
    s, e = two_sum(old[..., 0], x[..., 0])
    low = old[..., 1] + x[..., 1]
    h, tail = two_sum(s, e + low)
    lost = 2 * U * (np.abs(e) + np.abs(old[..., 1]) + np.abs(x[..., 1]))
    target[index] = np.stack([h, tail, (old[..., 2] + x[..., 2] + lost) * UP], -1)


def odd_values(one: Head) -> NDArray[np.intp]:
    """Return the keys whose values have NaN or inf."""
    return np.zeros(0, np.intp) if one.v is one.values else np.nonzero(~finite_rows(one.values))[0]


def finite(one: Head) -> bool:
    """Tell whether no query of a head sees NaN or inf."""
    odd = odd_values(one)
    return not one.spoilt.any() and not (odd.size and one.allowed[:, odd].any())


def mark(to: NDArray[Any], where: Any, x: float, f: Any) -> None:
    """Write a number that the contract fixes where it says so."""
    if not isinstance(f, Level):
        to[where] = x
    elif where.any():
        for i, part in enumerate((x, 0.0, 0.0)):
            to[..., i][f.xp.asarray(where)] = part


def single(one: Head, raw: Raw, f: Level) -> None:
    """Write 0 for a level's gradients of rows that see one key: softmax weighs it 1, and dP - dout·out is 0.

    No radius would decide that these are 0. The mask is looked at where all of a row's dq may be.
    """
    at = (one.batch, one.head, one.rows)
    h, low, r = (np.abs(raw["dq"][at][..., i]) for i in range(3))
    rows = np.nonzero(on_host((h + low <= r).all(1) & (r > 0).any(1)))[0]
    alone, step = np.zeros(len(h), bool), max(1, CHUNK // len(one.k))
    for some in (rows[i : i + step] for i in range(0, len(rows), step)):
        alone[some] = one.allowed[some].sum(1) == 1
    own = "dbias" in raw and one.problem.bias.shape == (*one.problem.out_shape[:3], one.problem.n_k)
    for name in ("dq", "dbias") if own else ("dq",):
        mark(raw[name][at], alone, 0.0, f)


def specials(one: Head, raw: Raw, f: Any, positive: bool) -> None:
    """Write what the contract fixes: rows without keys, rows that see NaN or inf."""
    at = (one.batch, one.head, one.rows)
    out = raw["out"][at]
    if "lse" in raw:
        lse = raw["lse"][at]
        mark(lse, ~one.allowed.any(1), -np.inf if one.sink is None else one.sink, f)
        mark(lse, one.spoilt, np.nan, f)
    odd = odd_values(one)
    seen = one.allowed[:, odd].astype(np.float32)
    if seen.any():
        kinds = (np.isposinf, np.isneginf, np.isnan)
        values = on_host(one.values[beside(one.values, odd)])
        plus, minus, nan = (seen @ kind(values).astype(np.float32) > 0 for kind in kinds)
        nan |= (plus & minus) | ((plus | minus) & (not positive))
        for where, x in ((plus, np.inf), (minus, -np.inf), (nan, np.nan)):
            mark(out, where, x, f)
    mark(out, one.spoilt, np.nan, f)
