"""The builders of the input families: one entry a problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...dtypes import FORMATS
from ...masks import unused
from ...problem import Problem
from .draw import Draw
from .dropped import DROPPED
from .paged import PAGED
from .positioned import POSITIONED
from .typed import TYPED

__all__ = ["BUILDERS", "Build", "Entry"]

Build = Callable[[Draw], Problem]
Entry = tuple[Build, frozenset[str], tuple[str, ...]]


def _entry(build: Build, *needs: str, dtypes: tuple[str, ...] = ()) -> Entry:
    return build, frozenset(needs), dtypes


def _everything(d: Draw) -> Problem:
    return d.problem(
        b=2, h=6, h_kv=2, d_v=24, causal="bottom_right", softcap=5.0, bias=d.normal(1, 6, 37, 67), sink=d.normal(6),
        allowed=d.mask(2, 1, 1, 67),
    )  # fmt: skip


def _empty_rows(d: Draw) -> Problem:
    allowed = d.mask(1, 1, 37, 67)
    allowed[..., 3, :] = False
    allowed[..., 20:23, :] = False
    return d.problem(allowed=allowed)


def _empty_with_everything(d: Draw) -> Problem:
    p = _everything(d)
    allowed = np.broadcast_to(p.allowed, (2, 1, 37, 67)).copy()
    allowed[..., [3, 20, 21], :] = False
    return p.replace(allowed=allowed, sink=None)


def _empty_rows_bias(d: Draw) -> Problem:
    bias = d.normal(1, 1, 37, 67)
    bias[..., 5, :] = -np.inf
    bias[..., 30, :40] = -np.inf
    return d.problem(bias=bias)


def _needle(d: Draw, own: bool) -> Problem:
    q = d.normal(1, 2, 67, 32)
    k = (
        3 * q
        if own
        else 3 * np.repeat(q[..., -1:, :], 67, axis=2) * (np.arange(67) == 66)[:, None] + d.normal(1, 2, 67, 32) / 4
    )
    return d.problem(q=q, k=k, causal="bottom_right")


def _one_hot(d: Draw) -> Problem:
    eye = np.eye(67) * 128.0
    return d.problem(v=np.broadcast_to(eye, (1, 2, 67, 67)), causal="bottom_right")


def _head_scales(d: Draw, **more: Any) -> Problem:
    v = d.normal(1, 4, 67, 32) * 2.0 ** np.array([0, -6, 3, 6])[None, :, None, None]
    return d.problem(h=4, v=v, **more)


def _own_value(d: Draw) -> Problem:
    v = d.normal(1, 2, 67, 32)
    v[..., -1, :] = 256.0
    return d.problem(67, 67, v=v, causal="bottom_right")


def _offset(d: Draw, size: float, n_q: int = 37, n_k: int = 67, **more: Any) -> Problem:
    """Scores near sign(size)·size² (times two axes and the scale), differing by normal numbers."""
    q, k = d.normal(1, 2, n_q, 32), d.normal(1, 2, n_k, 32)
    q[..., :2], k[..., :2] = abs(size), size
    return d.problem(n_q, n_k, q=q, k=k, **more)


def _far_bias(d: Draw) -> Problem:
    far = -min(1000.0, d.form.largest)
    bias = np.where(np.arange(67) % 2, far, d.normal(1, 2, 37, 67))
    bias[..., 5:9, :] = far
    return d.problem(bias=bias)


def _near_tie(d: Draw) -> Problem:
    base = d.normal(1, 2, 1, 32)
    q = base * 100 + d.normal(1, 2, 37, 32) / 10
    return d.problem(q=q, k=base * 25 + d.normal(1, 2, 67, 32) / 200)


def _integers(d: Draw, **more: Any) -> Problem:
    q, k = (d.rng.integers(-1, 2, (1, 2, n, 16)).astype(float) for n in (37, 67))
    return d.problem(q=q, k=k, v=d.rng.integers(-3, 4, (1, 2, 67, 16)).astype(float), **more)


def _one_huge_value(d: Draw) -> Problem:
    v = d.normal(1, 2, 67, 32)
    v[..., 40, :] = 2.0**d.form.emax
    return d.problem(67, 67, v=v, causal="bottom_right")


def _faint_key(d: Draw) -> Problem:
    """One key with about e^-10 of the others' weight and values of 2^15."""
    q, k, v = d.normal(1, 2, 37, 32), d.normal(1, 2, 67, 32), d.normal(1, 2, 67, 32)
    q[..., 0], k[..., 40, 0], v[..., 40, :] = 4, -14, 2.0**15
    return d.problem(q=q, k=k, v=v)


def _similar_rows(d: Draw) -> Problem:
    q = d.normal(1, 2, 1, 32) + d.normal(1, 2, 37, 32) / 64
    return d.problem(37, 131, q=q, v=1.5 + d.normal(1, 2, 131, 32) / 64)


def _all_positive(d: Draw) -> Problem:
    q, k, v = (d.rng.uniform(0.5, 1, (1, 1, n, 16)) for n in (37, 257, 257))
    return d.problem(37, 257, h=1, q=q, k=k, v=v)


def _halves(d: Draw) -> Problem:
    """Equal weights over 64 keys; column c of the answer lies c/32 of the way from 1 to the next number, or from -1."""
    step = 2.0 ** (1 - d.form.precision) * (np.arange(64)[:, None] < 2 * np.arange(32))
    v = np.where(np.arange(32) % 2, -1.0, 1.0) * (1 + step)
    return d.problem(37, 64, q=np.zeros((1, 2, 37, 32)), v=np.broadcast_to(v, (1, 2, 64, 32)))


def _huge_values(d: Draw) -> Problem:
    top = 2.0**d.form.emax * 1.75
    signs = np.where(np.arange(32) % 2, 1.0, -1.0)
    return d.problem(q=d.normal(1, 2, 37, 32) / 64, v=np.broadcast_to(signs * top, (1, 2, 67, 32)))


def _tiny_values(d: Draw) -> Problem:
    return d.problem(v=d.normal(1, 2, 67, 32) * d.form.smallest_normal / 4)


def _huge_products(d: Draw) -> Problem:
    q, k = d.normal(1, 2, 37, 32) * 2.0**63, d.normal(1, 2, 67, 32) * 2.0**67
    return d.problem(q=q, k=k, scale=2.0**-132)


def _poison(d: Draw, where: str) -> Problem:
    p = d.problem(allowed=np.broadcast_to(np.arange(67) % 9 != 7, (1, 1, 37, 67)).copy())
    hidden = np.arange(67) % 9 == 7
    k, v = p.key.copy(), p.value.copy()
    if where == "key":
        k[..., hidden, 3] = np.nan
    elif d.form.infinities and where == "inf":
        v[..., hidden, 5] = np.inf
    else:
        v[..., hidden, 5] = np.nan
    return p.replace(key=k, value=v)


def _poison_causal(d: Draw) -> Problem:
    p = d.problem(37, 37, causal="bottom_right")
    v = p.value.copy()
    v[..., 25, 5] = np.nan  # rows from 25 on see it, in one column
    return p.replace(value=v)


def _poison_key(d: Draw) -> Problem:
    p = d.problem(37, 37, causal="bottom_right")
    k = p.key.copy()
    k[..., 25, 5] = np.nan
    return p.replace(key=k)


def _spoilt(d: Draw, name: str, x: float, **more: Any) -> Problem:
    """Put one number that is none into one row of queries, keys, a bias or a sink."""
    q = d.normal(1, 2, 37, 32)
    q[..., 3] = np.abs(q[..., 3]) + 1  # an infinite key scores +inf in every row: one that scores -inf weighs nothing
    p = d.problem(37, 67, q=q, **more)
    array = getattr(p, name).copy()
    array[(1,) if name == "sink" else (0, 1, 5, 3)] = x
    return p.replace(**{name: array})


def _many_keys(d: Draw) -> Problem:
    n = 33000
    return d.problem(2, n, h=1, d=4, causal="bottom_right", bias=d.normal(1, 1, 2, n))


def _packed(d: Draw, q: list[int], k: list[int], causal: str | None = "bottom_right") -> Problem:
    offsets: dict[str, Any] = {"cu_seqlens_q": np.array(q, np.int32), "cu_seqlens_k": np.array(k, np.int32)}
    return d.problem(q[-1], k[-1], causal=causal, **offsets)


def _lengths(d: Draw, q: list[int] | None, k: list[int], behind: float = 8.0, **more: Any) -> Problem:
    """Return a call of whose rows and keys so many are used; numbers that must not matter lie behind them."""
    lengths: dict[str, Any] = {"lengths_k": np.array(k, np.int32)} | (
        {} if q is None else {"lengths_q": np.array(q, np.int32)}
    )
    p = d.problem(**{"b": len(k)} | more, **lengths)
    gone = unused(p)
    assert gone is not None
    found = {}
    for name, rows in (("query", gone[0]), ("key", gone[1]), ("value", gone[1])):
        found[name] = getattr(p, name).copy()
        found[name].swapaxes(1, 2)[rows] = behind
    return p.replace(**found)


def _gaps(d: Draw) -> Problem:
    ends: dict[str, Any] = {
        f"cu_seqlens_{x}": np.array(e, np.int32) for x, e in (("q", [0, 20, 40, 60]), ("k", [0, 25, 50, 75]))
    }
    return _lengths(d, [17, 20, 3], [25, 21, 9], b=1, n_q=60, n_k=75, causal="bottom_right", **ends)


def _edge(n_q: int, n_k: int) -> Entry:
    return _entry(lambda d: d.problem(n_q, n_k, h=1, d=16))


INFINITE = tuple(n for n, f in FORMATS.items() if f.infinities)

BUILDERS: dict[str, dict[str, Entry]] = {
    "gaussian": {
        "plain": _entry(lambda d: d.problem(b=2)),
        "causal-bottom-right": _entry(lambda d: d.problem(causal="bottom_right"), "causal"),
        "causal-top-left": _entry(lambda d: d.problem(causal="top_left"), "causal"),
        "causal-square": _entry(lambda d: d.problem(67, 67, causal="top_left"), "causal"),
        "window": _entry(lambda d: d.problem(67, 67, window=(9, 4)), "window"),
        "window-causal": _entry(lambda d: d.problem(causal="bottom_right", window=(11, 0)), "window"),
        # the window aligned to the top left although lengths differ
        "window-lengths-differ": _entry(lambda d: d.problem(window=(9, 4)), "window"),
        # the right side of the window lets rows see past the diagonal
        "window-both-sides-causal": _entry(lambda d: d.problem(causal="bottom_right", window=(9, 4)), "window"),
        # the window does not follow the corner that causal names
        "window-both-sides-top-left": _entry(lambda d: d.problem(causal="top_left", window=(9, 4)), "window"),
        # the corner named without causal, and sides that leave the diagonal out
        "window-top-left": _entry(lambda d: d.problem(window=(9, 4), alignment="top_left"), "window", "alignment"),
        "window-before": _entry(lambda d: d.problem(window=(None, -1)), "window"),
        "window-after": _entry(lambda d: d.problem(window=(-1, 20)), "window"),
        # the diagonal of a chunk that starts at a key, of each batch item its own
        "offset": _entry(lambda d: d.problem(causal="top_left", offset=11), "causal", "offset"),
        "offset-by-batch": _entry(
            lambda d: d.problem(b=3, causal="top_left", offset=np.array([30, -7, 0])), "causal", "offset"
        ),
        "offset-window": _entry(lambda d: d.problem(b=2, window=(9, 4), offset=np.array([-20, 5])), "window", "offset"),
        "allowed": _entry(lambda d: d.problem(b=2, allowed=d.mask(2, 1, 37, 67)), "allowed"),
        # a mask that hides nothing is taken for none, and its call for another
        "allowed-whole": _entry(lambda d: d.problem(allowed=np.ones((1, 1, 37, 67), bool)), "allowed"),
        "bias": _entry(lambda d: d.problem(bias=d.normal(1, 2, 37, 67)), "bias"),
        # a stride of 0 that is not kept: rows, heads, batches or keys past the first read other memory
        "bias-for-all-rows": _entry(lambda d: d.problem(bias=d.normal(1, 2, 1, 67)), "bias"),
        "bias-for-all-heads": _entry(lambda d: d.problem(b=2, h=4, bias=d.normal(2, 1, 37, 67)), "bias"),
        "bias-for-all-batches": _entry(lambda d: d.problem(b=2, bias=d.normal(1, 2, 37, 67)), "bias"),
        "bias-for-all-keys": _entry(lambda d: d.problem(bias=3 * d.normal(1, 2, 37, 1)), "bias"),
        "softcap": _entry(lambda d: d.problem(q=3 * d.normal(1, 2, 37, 32), softcap=4.0), "softcap"),
        "softcap-bias": _entry(lambda d: d.problem(softcap=2.0, bias=3 * d.normal(1, 1, 37, 67)), "softcap", "bias"),
        "sink": _entry(lambda d: d.problem(sink=3 * d.normal(2)), "sink"),
        # some keys count twice, some not at all
        "weight": _entry(lambda d: d.problem(weight=d.rng.integers(0, 4, (1, 2, 37, 67)) * 1.0), "weight"),
        "weight-for-all-rows": _entry(
            lambda d: d.problem(b=2, weight=np.exp(d.normal(2, 1, 1, 67)), causal="bottom_right"), "weight", "causal"
        ),
        "grouped-heads": _entry(lambda d: d.problem(h=6, h_kv=2)),
        # heads mapped right only where a group is as large as the number of key heads, or has three
        "grouped-heads-6-on-3": _entry(lambda d: d.problem(h=6, h_kv=3)),
        "grouped-heads-8-on-2": _entry(lambda d: d.problem(h=8, h_kv=2)),
        "narrow-values": _entry(lambda d: d.problem(d=64, d_v=24)),
        "dim-128": _entry(lambda d: d.problem(d=128)),
        # a width that is no multiple of 16: columns past the last whole vector
        "dim-40": _entry(lambda d: d.problem(d=40, d_v=20)),
        "negative-scale": _entry(lambda d: d.problem(q=6 * d.normal(1, 2, 37, 32), scale=-0.5)),  # scores far apart
        "everything": _entry(_everything, "causal", "softcap", "bias", "sink", "allowed"),
    },
    "ragged": {
        "one-query": _entry(lambda d: d.problem(1, 129)),
        "one-key": _entry(lambda d: d.problem(5, 1)),
        "tile-plus-one": _entry(lambda d: d.problem(65, 65, causal="top_left"), "causal"),
        "tile-minus-one": _entry(lambda d: d.problem(63, 127)),
        # offsets and positions past 2**15: indices in 16 bits, where kernels wrap at 2**31 and up
        "rows-past-16-bits": _entry(lambda d: d.problem(1100, 5)),
        "keys-past-16-bits": _entry(_many_keys, "causal", "bias"),
        # queries and keys without a column: every key weighs the same, and 1 / sqrt(0) must not be read
        "no-width": _entry(lambda d: d.problem(d=0, d_v=16, causal="bottom_right"), "causal", "lengths_k"),
        "no-batch": _entry(lambda d: d.problem(7, 7, b=0)),
        "no-keys": _entry(lambda d: d.problem(5, 0)),
        "no-queries": _entry(lambda d: d.problem(0, 5)),
        # a tile that is full, one short, one over; lengths that no tile divides
        **{f"{n}-by-{n}": _edge(n, n) for n in (63, 64, 65, 127, 128, 129)},
        **{f"{n_q}-by-{n_k}": _edge(n_q, n_k) for n_q, n_k in ((61, 131), (131, 61))},
        "packed": _entry(lambda d: _packed(d, [0, 17, 17, 40, 60], [0, 17, 20, 50, 70]), "causal"),
        # sequences of no rows first, of neither last, more rows than keys between: offsets that stand still, the corner
        "packed-ends": _entry(lambda d: _packed(d, [0, 0, 25, 60, 60], [0, 3, 20, 70, 70]), "causal"),
        # a cache longer than what is in it; the corner of what is used, not of what there is room for
        "lengths-of-keys": _entry(
            lambda d: _lengths(d, None, [67, 33, 5], n_q=4, causal="bottom_right"), "causal", "lengths_k"
        ),
        "lengths": _entry(
            lambda d: _lengths(d, [37, 1, 20], [67, 33, 31], causal="bottom_right"), "causal", "lengths_q", "lengths_k"
        ),
        "lengths-packed": _entry(_gaps, "causal", "lengths_q", "lengths_k"),
        # rows whose sequence has no keys, first and last: they read the neighbour's
        "packed-no-keys": _entry(lambda d: _packed(d, [0, 5, 40, 48], [0, 0, 60, 60], None)),
    },
    "peaked": {
        "needle-own-key": _entry(lambda d: _needle(d, True), "causal"),
        "needle-last-key": _entry(lambda d: _needle(d, False), "causal"),
    },
    "probe": {
        "one-hot-values": _entry(_one_hot, "causal"),
        "head-scales": _entry(_head_scales),
        # the sink of another head, or a sink that scales the values
        "head-scales-sink": _entry(lambda d: _head_scales(d, sink=2 * d.normal(4)), "sink"),
        "own-value": _entry(_own_value, "causal"),
        # a key dropped for its small weight: its value makes up for it
        "faint-key": _entry(_faint_key),
    },
    "shifted": {
        "large": _entry(lambda d: _offset(d, 420.0)),
        "small": _entry(lambda d: _offset(d, -420.0)),
        "below-minus-100": _entry(lambda d: _offset(d, -20.0)),
        "near-tie": _entry(_near_tie),
        # masked scores filled with -1e4 or -5e4, or a maximum that starts there: the row's only key lies below
        "one-key-below-sentinels": _entry(
            lambda d: _offset(d, -420.0, allowed=np.eye(37, 67, 30, bool)[None, None]), "allowed"
        ),
        "below-sentinels-causal": _entry(lambda d: _offset(d, -420.0, 67, 67, causal="bottom_right"), "causal"),
        "below-sentinels-window": _entry(
            lambda d: _offset(d, -420.0, 67, 67, causal="bottom_right", window=(9, None)), "window"
        ),
        # exp(-lse) overflows, and the masked tail of the last tile meets it: 0 · inf
        "below-minus-100-masked-tail": _entry(
            lambda d: _offset(d, -20.0, 37, 192, allowed=(np.arange(192) < 150)[None, None, None]), "allowed"
        ),
        # weights that underflow without a mask, and rows of them alone: taken for rows without keys
        "bias-far-below": _entry(_far_bias, "bias"),
        # the maximum is taken over the keys alone: exp(sink - maximum) overflows
        "large-sink": _entry(lambda d: d.problem(h=4, sink=np.array([100.0, 92.0, -100.0, 0.0])), "sink"),
    },
    "sparse": {
        "integers": _entry(_integers),
        "scale-zero": _entry(lambda d: _integers(d, scale=0.0)),
    },
    "empty": {
        "rows-allowed": _entry(_empty_rows, "allowed"),
        "rows-bias": _entry(_empty_rows_bias, "bias"),
        # a row without keys is looked after for each option alone
        "rows-with-everything": _entry(_empty_with_everything, "causal", "softcap", "bias", "sink", "allowed"),
        "lengths-of-none": _entry(lambda d: _lengths(d, [37, 20], [0, 67]), "lengths_q", "lengths_k"),
        "rows-causal": _entry(lambda d: d.problem(67, 37, causal="bottom_right"), "causal"),
    },
    "drift": {
        # a rounding that is biased goes the same way in every row and key
        "similar-rows": _entry(_similar_rows),
        # sums that only grow: a narrow accumulator stands still
        "all-positive": _entry(_all_positive),
        # every fraction of the last place, ties among them: truncation instead of rounding
        "halves": _entry(_halves),
    },
    "extreme": {
        "huge-values": _entry(_huge_values),
        "tiny-values": _entry(_tiny_values),
        # values scaled by the largest of all: rows that do not see it lose theirs
        "one-huge-value": _entry(_one_huge_value, "causal"),
        "huge-products": _entry(_huge_products, dtypes=("float32", "bfloat16", "float64")),
    },
    "positions": {label: _entry(build, *needs) for label, (build, needs) in POSITIONED.items()},
    "dropout": {label: _entry(build, *needs) for label, (build, needs) in DROPPED.items()},
    "types": {label: _entry(build, dtypes=dtypes) for label, (build, dtypes) in TYPED.items()},
    "pages": {label: _entry(build, "lengths_k", dtypes=dtypes) for label, (build, dtypes) in PAGED.items()},
    "poison": {
        "key-behind-mask": _entry(lambda d: _poison(d, "key"), "allowed"),
        "value-behind-mask": _entry(lambda d: _poison(d, "value"), "allowed"),
        "inf-behind-mask": _entry(lambda d: _poison(d, "inf"), "allowed"),
        "behind-lengths": _entry(
            lambda d: _lengths(d, [37, 1, 20], [67, 33, 31], np.nan, causal="top_left"),
            "causal",
            "lengths_q",
            "lengths_k",
        ),
        "value-seen-by-some": _entry(_poison_causal, "causal"),
        # NaN that must show: a maximum that skips it hides it
        "key-seen-by-some": _entry(_poison_key, "causal"),
        "query-nan": _entry(lambda d: _spoilt(d, "query", np.nan)),
        "query-inf": _entry(lambda d: _spoilt(d, "query", np.inf), dtypes=INFINITE),
        "key-inf": _entry(lambda d: _spoilt(d, "key", np.inf), dtypes=INFINITE),
        "bias-nan": _entry(lambda d: _spoilt(d, "bias", np.nan, bias=d.normal(1, 2, 37, 67)), "bias"),
        "bias-inf": _entry(lambda d: _spoilt(d, "bias", np.inf, bias=d.normal(1, 2, 37, 67)), "bias", dtypes=INFINITE),
        "sink-nan": _entry(lambda d: _spoilt(d, "sink", np.nan, sink=d.normal(2)), "sink"),
        "sink-inf": _entry(lambda d: _spoilt(d, "sink", np.inf, sink=d.normal(2)), "sink"),
    },
}
