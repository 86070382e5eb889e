"""Triple-wise attention: what its forms mean, and each as softmax attention over pairs of keys.

A row i attends to pairs (j, k): out_i = sum_jk P_ijk · (v1_j ∘ v2_k), P the softmax over all pairs of scale · s_ijk.
Every form's s_ijk is a product of features of the query and of the pair, so that pairwise attention over n1·n2 keys is
its definition, and the certified engine answers for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import dtype_name, kind_of, to_float64
from ..dtypes import FORMATS
from ..errors import InvalidProblem, UnsupportedProblem
from ..exact import Answer, evaluate
from ..problem import Problem

__all__ = ["FORMS", "Form", "Seen", "Shape", "as_pairs", "check", "exact", "scale_of", "turned"]

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Form:
    """A form.

    Attributes
    ----------
    formula : str
        s_ijk.
    source : str
        Where it is from, and what of it was read.
    """

    formula: str
    source: str


FORMS = {
    "trilinear": Form(
        "sum_l q_il k1_jl k2_kl",
        "Alman and Song, arXiv 2310.04064 (the abstract was read); 2-simplicial attention, arXiv 2507.02754",
    ),
    "determinant": Form(
        "sum over chunks of three features of det(q_i, k1_j, k2_k)",
        "the signed determinant form of 2-simplicial attention, arXiv 2507.02754 (public code was read)",
    ),
    "strassen": Form("q_i·k1_j + k1_j·k2_k + k2_k·q_i", "Strassen attention, arXiv 2501.19215 (a summary was read)"),
    "tree": Form("q_i·k1_j + k1_j·k2_k", "tree attention of Poly-attention, arXiv 2602.02422 (a summary was read)"),
    "rank_one": Form(
        "q_i·k1_j + q_i·k2_k", "the rank-one variant in FBGEMM's simplicial attention (its code was read)"
    ),
}
"""The forms, by name."""


@dataclass(frozen=True)
class Seen:
    """Which of n keys each row sees.

    Attributes
    ----------
    n : int
        How many keys there are.
    first, last : (rows,) int arrays
        The first key in sight of a row, and the first behind those.
    allowed : (rows, n) bool array, optional
        Which of these it sees; all by default.
    """

    n: int
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    allowed: NDArray[np.bool_] | None = None

    def __getitem__(self, rows: Any) -> Seen:
        """Return what some rows see."""
        allowed = None if self.allowed is None else self.allowed[rows]
        return Seen(self.n, self.first[rows], self.last[rows], allowed)

    def mask(self, keys: slice | None = None) -> NDArray[np.bool_]:
        """Return (rows, keys) bools of some keys, all by default."""
        keys = keys or slice(0, self.n)
        at = np.arange(keys.start, keys.stop)
        seen = (at >= self.first[:, None]) & (at < self.last[:, None])
        return np.asarray(seen if self.allowed is None else seen & self.allowed[:, keys])

    def spans(self, size: int) -> list[slice]:
        """Return spans of keys that hold all that a row sees."""
        end = int(self.last.max())
        return [slice(j, min(j + size, end)) for j in range(int(self.first.min()), end, size)]

    def shown(self, xs: Sequence[Any]) -> Sequence[Any]:
        """Return arrays of the keys, 0 at those that no row sees: what lies there counts for nothing."""
        if self.allowed is None:
            return xs
        some = np.asarray(self.mask().any(0))[:, None]
        return [np.where(some, x, x.dtype.type(0)) for x in xs]


@dataclass(frozen=True)
class Shape:
    """Sizes and masks of a checked call.

    Attributes
    ----------
    batch, heads, heads_kv, n_q, n1, n2, d, d_v : int
        Sizes; heads_kv divides heads.
    causal : str or None
        "bottom_right", "top_left" or None.
    window : (int or None, int or None)
        Row i sees the last w keys up to its own place, of each kind; None for all.
    allowed : (array or None, array or None)
        Which keys of each kind rows see besides; in the tree form the second is of k1's rows.
    """

    batch: int
    heads: int
    heads_kv: int
    n_q: int
    n1: int
    n2: int
    d: int
    d_v: int
    causal: str | None
    window: tuple[int | None, int | None]
    allowed: tuple[Any, Any] = (None, None)

    def bounds(self, axis: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return for each row the first key that it sees, and the first behind them, of k1 (0) or k2 (1)."""
        n, width = (self.n1, self.n2)[axis], self.window[axis]
        if self.causal is None:
            return np.zeros(self.n_q, np.int64), np.full(self.n_q, n)
        end = np.arange(self.n_q) + 1 + (n - self.n_q if self.causal == "bottom_right" else 0)
        return np.clip(end - (n + self.n_q if width is None else width), 0, n), np.clip(end, 0, n)

    def seen(self, form: str, batch: int, head: int) -> tuple[Seen, Seen]:
        """Return the keys k1 that each row of a head sees, and the keys k2: in the tree form those that each k1 sees.

        A k1 sees those k2 that a row at its place would.
        """
        of = self if form != "tree" else replace(self, n_q=self.n1, n1=self.n2, window=(self.window[1],) * 2)
        masks = [None if x is None else x[batch % len(x), head % x.shape[1]] for x in self.allowed]
        return Seen(self.n1, *self.bounds(0), masks[0]), Seen(self.n2, *of.bounds(form != "tree"), masks[1])


def check(
    query: Any, keys: Sequence[Any], values: Sequence[Any], form: str, causal: str | None, window: Any,
    allowed: Any = None,
) -> Shape:  # fmt: skip
    """Return the sizes of a call, or say what is wrong with it.

    Raises
    ------
    InvalidProblem
        Shapes, types or options that do not fit together.
    """
    if form not in FORMS:
        raise InvalidProblem(f"form: got {form!r}, expected one of {', '.join(FORMS)}")
    if causal not in (None, "bottom_right", "top_left"):
        raise InvalidProblem(f"causal: got {causal!r}, expected None, 'bottom_right' or 'top_left'")
    arrays = {"query": query, "k1": keys[0], "k2": keys[1], "v1": values[0], "v2": values[1]}
    kind, dtype = kind_of(query), dtype_name(query)
    for name, x in arrays.items():
        if kind_of(x) != kind or dtype_name(x) != dtype:
            raise InvalidProblem(f"{name}: is {dtype_name(x)} of {kind_of(x)} and query {dtype} of {kind}")
        if len(x.shape) != 4 or min(x.shape) < 1:
            raise InvalidProblem(f"{name}: got shape {tuple(x.shape)}, expected four axes of at least 1: (b, h, n, d)")
    (b, h, n_q, d), (_, h_kv, n1, _), n2 = query.shape, keys[0].shape, keys[1].shape[2]
    d_v = values[0].shape[3]
    expected = {"k1": (b, h_kv, n1, d), "k2": (b, h_kv, n2, d), "v1": (b, h_kv, n1, d_v), "v2": (b, h_kv, n2, d_v)}
    for name, shape in expected.items():
        if tuple(arrays[name].shape) != shape:
            raise InvalidProblem(f"{name}: got shape {tuple(arrays[name].shape)}, expected {shape}")
    if h % h_kv:
        raise InvalidProblem(f"k1: has {h_kv} heads, expected a divisor of query's {h}")
    if form == "determinant" and d % 3:
        raise InvalidProblem(f"d: got {d}, expected a multiple of 3 for the determinant form")
    window = (None, None) if window is None else tuple(window)
    if len(window) != 2 or any(
        w is not None and (isinstance(w, bool) or not isinstance(w, int) or w < 1) for w in window
    ):
        raise InvalidProblem(f"window: got {window!r}, expected two integers of at least 1, or None")
    if window != (None, None) and causal is None:
        raise InvalidProblem("window: counts keys back from a row's own place, so it needs causal")
    rows = (n_q, n1 if form == "tree" else n_q)
    masks = _masks(allowed, [(b, h, rows[0], n1), (b, h, rows[1], n2)])
    return Shape(b, h, h_kv, n_q, n1, n2, d, d_v, causal, window, masks)


def _masks(allowed: Any, wanted: Sequence[tuple[int, ...]]) -> tuple[Any, Any]:
    """Return two masks of some shapes, whose first two axes may be 1, or None."""
    if allowed is None:
        return None, None
    if not isinstance(allowed, (tuple, list)) or len(allowed) != 2:
        raise InvalidProblem(f"allowed: got {type(allowed).__name__}, expected two masks, of k1 and of k2, or None")
    found = []
    for name, x, shape in zip(("k1", "k2"), allowed, wanted, strict=True):
        if x is not None:
            x = np.asarray(x)
            if x.dtype != np.bool_:
                raise InvalidProblem(f"allowed: the mask of {name} is {x.dtype}, expected bool")
            fits = x.ndim == 4 and x.shape[2:] == shape[2:]
            if not fits or x.shape[0] not in (1, shape[0]) or x.shape[1] not in (1, shape[1]):
                raise InvalidProblem(
                    f"allowed: the mask of {name} has shape {x.shape}, expected {shape}, whose first two may be 1"
                )
        found.append(x)
    return tuple(found)


def scale_of(scale: float | None, d: int) -> float:
    """Return the scale: 1/d by default, as in the paper."""
    if scale is None:
        return 1 / d
    if not np.isfinite(scale):
        raise InvalidProblem(f"scale: got {scale!r}, expected a finite number")
    return float(scale)


def as_pairs(
    query: Any, k1: Any, k2: Any, v1: Any, v2: Any, *, form: str = "trilinear", scale: float | None = None,
    causal: str | None = None, window: Any = None, allowed: Any = None,
) -> Problem:  # fmt: skip
    """Return the same call as softmax attention over pairs of keys: its definition, and what `exact` evaluates.

    Parameters
    ----------
    query, k1, k2, v1, v2, form, scale, causal, window, allowed
        As in :func:`refattn.tensor.attention`; any format whose products are exact in float64: float32, float16,
        bfloat16 and float8.

    Returns
    -------
    Problem
        In float64, which holds the products of two of those formats' numbers exactly. Its key (j, k) is j·n2 + k.

    Raises
    ------
    InvalidProblem
        As in `attention`.
    UnsupportedProblem
        float64, whose products float64 cannot hold.
    """
    shape = check(query, (k1, k2), (v1, v2), form, causal, window, allowed)
    dtype = dtype_name(query)
    if 2 * FORMATS[dtype].precision > 53:
        raise UnsupportedProblem(
            f"tensor: products of {dtype} are not exact in float64; give float32 or a narrower format"
        )
    q, a, b, x, y = (to_float64(np.asarray(t)) for t in (query, k1, k2, v1, v2))

    def pairs(x: Float, y: Float) -> Float:
        x, y = np.broadcast_arrays(x[:, :, :, None], y[:, :, None])
        return x.reshape(*x.shape[:2], -1, x.shape[4]), y.reshape(*y.shape[:2], -1, y.shape[4])  # type: ignore[return-value]

    left, right = pairs(a, b)
    one = np.ones_like(q)
    if form == "trilinear":
        features, keys = [q], [left * right]
    elif form == "determinant":  # q · (k1 × k2)
        up, down = (turned(left, 1) * turned(right, 2)), (turned(left, 2) * turned(right, 1))
        features, keys = [q, -q], [up, down]
    elif form == "strassen":
        features, keys = [q, one, q], [left, left * right, right]
    elif form == "tree":
        features, keys = [q, one], [left, left * right]
    else:
        features, keys = [q, q], [left, right]
    of_pairs = None
    if causal is not None or any(m is not None for m in shape.allowed):
        alike = all(m is None or m.shape[:2] == (1, 1) for m in shape.allowed)
        sizes = (1, 1) if alike else (shape.batch, shape.heads)
        of_pairs = np.empty((*sizes, shape.n_q, shape.n1 * shape.n2), bool)
        for at in np.ndindex(*sizes):
            first, second = (s.mask() for s in shape.seen(form, *at))
            both = first[:, :, None] & (second if form == "tree" else second[:, None, :])
            of_pairs[at] = both.reshape(shape.n_q, -1)
    value = np.multiply(*pairs(x, y))
    return Problem(
        np.concatenate(features, -1), np.concatenate(keys, -1), value, scale=scale_of(scale, shape.d), allowed=of_pairs
    )


def turned(x: Any, by: int) -> Any:
    """Return each chunk of three features, turned: component c becomes c + by."""
    return np.roll(x.reshape(*x.shape[:-1], -1, 3), -by, -1).reshape(x.shape)


def exact(
    query: Any, k1: Any, k2: Any, v1: Any, v2: Any, *, form: str = "trilinear", scale: float | None = None,
    causal: str | None = None, window: Any = None, allowed: Any = None, rounding: str | None = None,
) -> Answer:  # fmt: skip
    """Return triple-wise attention, correctly rounded, from the certified engine over all pairs of keys.

    Parameters
    ----------
    query, k1, k2, v1, v2, form, scale, causal, window, allowed
        As in `as_pairs`. Time and memory grow with n_q·n1·n2 and n1·n2.
    rounding : str, optional
        The format of the answer: query's by default.

    Returns
    -------
    Answer
        out (b, h, n_q, d_v) and lse (b, h, n_q).
    """
    problem = as_pairs(query, k1, k2, v1, v2, form=form, scale=scale, causal=causal, window=window, allowed=allowed)
    return evaluate(problem, rounding=rounding or dtype_name(query))
