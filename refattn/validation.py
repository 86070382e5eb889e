"""What a call must be: the checks of a Problem's arguments, each error with what to change."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .arrays import KINDS, dtype_name, kind_of, to_numpy, why_unusable
from .dtypes import ELEMENTS, FORMATS, HELD
from .errors import InvalidInput, InvalidProblem
from .gates import RECURRENT, check_shape
from .pages import AXES
from .rules import Rule, Term

__all__ = [
    "ALIGNMENTS",
    "LENGTHS",
    "OFFSETS",
    "SCALES",
    "check_lengths",
    "check_masks",
    "check_offsets",
    "check_options",
    "check_packing",
    "check_scales",
    "check_tensors",
    "expect_array",
    "is_finite",
    "shown",
]

ALIGNMENTS = ("bottom_right", "top_left")
OFFSETS = ("cu_seqlens_q", "cu_seqlens_k")
LENGTHS = ("lengths_q", "lengths_k", "offset")
"""Numbers for each batch item, or each packed sequence."""
SCALES = ("query_scale", "key_scale", "value_scale", "out_scale")
WIDEST = 2**62
"""The widest side of a window: sums with it are still integers of 64 bits."""


def check_tensors(p: Any) -> None:
    """Refuse query, key and value that do not fit together."""
    names = AXES[p.page_layout]
    for name in ("query", "key", "value"):
        x = getattr(p, name)
        expect_array(name, x)
        if len(x.shape) != 4:
            raise InvalidProblem(
                f"{name}: got {len(x.shape)} axes {tuple(x.shape)}, expected 4 "
                f"({', '.join(AXES[None] if name == 'query' else names)}); "
                "add or split axes"
            )
        known = FORMATS if p.out_dtype is None else ELEMENTS
        if dtype_name(x) not in known:
            more = "; cast it" if dtype_name(x) not in ELEMENTS else "; cast it, or name out's type in out_dtype"
            raise InvalidProblem(f"{name}: got dtype {dtype_name(x)}, expected one of {', '.join(known)}{more}")
    q, k, v = p.query, p.key, p.value
    for name, x in (("key", k), ("value", v)):
        if kind_of(x) != kind_of(q):
            raise InvalidProblem(f"{name}: is of {kind_of(x)} and query of {kind_of(q)}; pass arrays of one library")
        if dtype_name(x) != dtype_name(q) and p.out_dtype is None:
            raise InvalidProblem(
                f"{name}: got dtype {dtype_name(x)}, expected query's {dtype_name(q)}; cast one of them, "
                "or name out's type in out_dtype"
            )
        if p.block_table is None and x.shape[0] != q.shape[0]:
            raise InvalidProblem(
                f"{name}: axis batch is {x.shape[0]}, expected query's {q.shape[0]}; repeat or slice it"
            )
    heads = names.index("heads")
    for i in (heads, 3 - heads, 0):
        if v.shape[i] != k.shape[i]:
            raise InvalidProblem(
                f"value: axis {names[i]} is {v.shape[i]}, expected key's {k.shape[i]}; every key needs its value"
            )
    if k.shape[3] != q.shape[3]:
        raise InvalidProblem(f"key: axis dim is {k.shape[3]}, expected query's {q.shape[3]}; project one of them")
    for name, x, i, axis in (
        ("query", q, 1, "heads"),
        ("key", k, heads, "heads"),
        ("value", v, 3, "dim"),
        *([("key", k, 3 - heads, "page")] if p.block_table is not None else []),
    ):
        if x.shape[i] < 1:
            raise InvalidProblem(f"{name}: axis {axis} is 0 and must be at least 1")
    if q.shape[1] % k.shape[heads]:
        seq = k.shape[2] if p.block_table is None else 0
        turned = seq and q.shape[2] % seq == 0 and q.shape[2] < q.shape[1]
        raise InvalidProblem(
            f"key: axis heads is {k.shape[heads]} and must divide query's {q.shape[1]} "
            "(grouped-query attention); repeat or slice the key heads"
            + ("; arrays are (b, h, s, d): is your layout (b, s, h, d)? then swap axes 1 and 2" if turned else "")
        )


def check_options(p: Any) -> None:
    """Refuse options that are no such numbers or names; keep them as Python's."""
    for name in ("causal", "alignment"):
        x = getattr(p, name)
        if x is not None and not (isinstance(x, str) and x in ALIGNMENTS):
            raise InvalidProblem(
                f"{name}: got {shown(x)}, expected None, 'bottom_right' or 'top_left'; "
                "name the corner that the diagonal meets"
            )
    if p.alignment is not None and p.causal not in (None, p.alignment):
        raise InvalidProblem(f"alignment: got {p.alignment!r} beside causal={p.causal!r}, which names the corner")
    if p.window is not None:
        ok = isinstance(p.window, tuple | list) and len(p.window) == 2
        if not ok or any(not _is_int(w) and w is not None for w in p.window):
            raise InvalidProblem(f"window: got {shown(p.window)}, expected (left, right) of integers or None")
        left, right = p.window
        if any(w is not None and not -WIDEST <= w <= WIDEST for w in p.window):
            raise InvalidProblem(
                f"window: got {shown(tuple(p.window))}, expected sides from -2**62 to 2**62; None lifts a limit"
            )
        if p.causal is not None:
            right = min(0, 0 if right is None else right)
        if left is not None and right is not None and left + right < 0:
            raise InvalidProblem(
                f"window: got {shown(tuple(p.window))}, which lets no query see a key; None (not -1) lifts a limit"
            )
        object.__setattr__(p, "window", tuple(None if w is None else int(w) for w in p.window))
    for name, positive in (("scale", False), ("softcap", True)):
        x = getattr(p, name)
        if x is None:
            continue
        if isinstance(x, bool) or not isinstance(x, int | float | np.integer | np.floating):
            raise InvalidProblem(f"{name}: got {shown(x)}, expected a real number or None")
        if not is_finite(x) or (positive and x <= 0):
            want = "a finite number above 0" if positive else "a finite number"
            none = "is 1/sqrt(d_k)" if name == "scale" else "turns it off"
            raise InvalidProblem(f"{name}: got {shown(x)}, expected {want}; None {none}")
        object.__setattr__(p, name, float(x))


def check_masks(p: Any) -> None:
    """Refuse masks and other arrays that do not fit the tensors."""
    full = (p.batch, p.heads, p.n_q, p.n_k)
    for name in ("bias", "allowed", "sink", "weight", *RECURRENT):
        x = getattr(p, name)
        if x is None:
            continue
        if (name == "allowed" and isinstance(x, Rule)) or (name == "bias" and isinstance(x, Term)):
            _check_rule(name, x, full)
            continue
        expect_array(name, x)
        if kind_of(x) != p.kind:
            raise InvalidProblem(f"{name}: is of {kind_of(x)} and query of {p.kind}; pass arrays of one library")
        if name == "allowed" and dtype_name(x) != "bool":
            raise InvalidProblem(f"allowed: got dtype {dtype_name(x)}, expected bool; numbers to add go into bias")
        if name != "allowed" and dtype_name(x) not in FORMATS:
            raise InvalidProblem(
                f"{name}: got dtype {dtype_name(x)}, expected one of {', '.join(FORMATS)}; "
                "a boolean mask goes into allowed"
            )
        if name == "sink":
            if tuple(x.shape) != (p.heads,):
                raise InvalidProblem(f"sink: got shape {tuple(x.shape)}, expected ({p.heads},), a logit for each head")
        elif name in RECURRENT:
            check_shape(p, name, tuple(x.shape))
        elif len(x.shape) != 4 or any(a not in (1, b) for a, b in zip(x.shape, full, strict=True)):
            raise InvalidProblem(
                f"{name}: got shape {tuple(x.shape)}, expected {full} or 1 in place of an axis; add axes of length 1"
            )


def _check_rule(name: str, rule: Rule | Term, call: tuple[int, int, int, int]) -> None:
    try:
        rule.check(*call)
    except InvalidInput as e:
        raise InvalidProblem(f"{name}: {e}") from e


def check_packing(p: Any) -> None:
    """Refuse packed sequences that do not fill the axes."""
    if p.block_table is not None and p.cu_seqlens_k is not None:
        raise InvalidProblem(
            "cu_seqlens_k: got offsets beside block_table, whose rows say where keys are; leave it out"
        )
    if p.cu_seqlens_q is None and p.cu_seqlens_k is None:
        return
    paged = p.block_table is not None
    check_offsets(p, p.cu_seqlens_q, p.cu_seqlens_q if paged else p.cu_seqlens_k)
    for name, end in (("cu_seqlens_q", p.n_q), *(() if paged else (("cu_seqlens_k", p.n_k),))):
        _one_library(p, name, getattr(p, name))
        x = to_numpy(getattr(p, name), name)
        if x[0] != 0 or x[-1] != end or (np.diff(x.astype(np.int64)) < 0).any():
            raise InvalidProblem(
                f"{name}: got {x.tolist()}, expected offsets that start at 0, never fall and end at {end}"
            )


def check_lengths(p: Any) -> None:
    """Refuse lengths past their axis or sequence, and offsets that are no integers."""
    many = p.batch if p.cu_seqlens_q is None else p.cu_seqlens_q.shape[0] - 1
    for name in LENGTHS:
        x = getattr(p, name)
        if x is None:
            continue
        if name == "offset" and (kind_of(x) is None or _is_int(x)):
            if not _is_int(x) or not -WIDEST <= x <= WIDEST:
                raise InvalidProblem(
                    f"offset: got {shown(x)}, expected an integer from -2**62 to 2**62, or an array of {many}"
                )
            object.__setattr__(p, name, int(x))
            continue
        expect_array(name, x)
        _one_library(p, name, x)
        if tuple(x.shape) != (many,) or not dtype_name(x).lstrip("u").startswith("int"):
            what = "batch item" if p.cu_seqlens_q is None else "packed sequence"
            raise InvalidProblem(
                f"{name}: got {dtype_name(x)} of shape {tuple(x.shape)}, expected ({many},) integers, one for a {what}"
            )
        values = to_numpy(x, name).tolist()
        if name == "offset":
            if any(not -WIDEST <= n <= WIDEST for n in values):
                raise InvalidProblem(f"offset: got {shown(values)}, expected integers from -2**62 to 2**62")
            continue
        room = [p.room if name == "lengths_k" else p.n_q] * many
        starts = getattr(p, f"cu_seqlens{name[-2:]}")
        if starts is not None:
            room = np.diff(to_numpy(starts).astype(np.int64)).tolist()
        if any(not 0 <= n <= most for n, most in zip(values, room, strict=True)):
            raise InvalidProblem(
                f"{name}: got {shown(values)}, expected numbers from 0 to {shown(room)}, the rows that there are"
            )


def check_scales(p: Any) -> None:
    """Refuse scales that are no numbers above 0, blocks that do not divide their tensor, and a strange out_dtype."""
    if p.out_dtype is not None and (not isinstance(p.out_dtype, str) or p.out_dtype not in FORMATS):
        raise InvalidProblem(f"out_dtype: got {shown(p.out_dtype)}, expected one of {', '.join(FORMATS)}, or None")
    for name in SCALES:
        x = getattr(p, name)
        if x is None:
            continue
        if isinstance(x, bool) or not isinstance(x, int | float | np.integer | np.floating):
            _check_scale(p, name, x)
            values = to_numpy(x, name).astype(np.float64)
        else:
            values = np.array(float(x) if is_finite(x) else np.nan)
            object.__setattr__(p, name, float(values))
        if not (np.isfinite(values) & (values > 0)).all():
            wrong = values[~(np.isfinite(values) & (values > 0))].flat[0]
            raise InvalidProblem(f"{name}: has {wrong:g}, expected finite numbers above 0; a block of zeros can have 1")


def _check_scale(p: Any, name: str, x: Any) -> None:
    expect_array(name, x)
    if kind_of(x) != kind_of(p.query):
        raise InvalidProblem(f"{name}: is of {kind_of(x)} and query of {kind_of(p.query)}; pass arrays of one library")
    if dtype_name(x) not in HELD:
        raise InvalidProblem(f"{name}: got dtype {dtype_name(x)}, expected one of {', '.join(HELD)}; cast it")
    if name == "out_scale":
        whole = (p.query.shape[0], p.query.shape[1], 1, 1)
        if len(x.shape) != 4 or any(m not in (1, n) for m, n in zip(x.shape, whole, strict=True)):
            raise InvalidProblem(f"{name}: got shape {tuple(x.shape)}, expected {whole} or 1 in place of an axis")
        return
    whole = tuple(getattr(p, name.removesuffix("_scale")).shape)
    if len(x.shape) != 4 or any(m < 1 or n % m for m, n in zip(x.shape, whole, strict=True)):
        raise InvalidProblem(
            f"{name}: got shape {tuple(x.shape)}, expected 4 axes, each a divisor of the tensor's {whole}; "
            "pad the last block, or add axes of length 1"
        )


def check_offsets(p: Any, q: Any, k: Any) -> None:
    """Refuse offsets of packed sequences that do not fit a call; their values are not looked at."""
    if q is None or k is None:
        raise InvalidProblem("cu_seqlens_q and cu_seqlens_k: got only one, expected both or none")
    if p.batch != 1:
        raise InvalidProblem(f"query: axis batch is {p.batch}, expected 1 with cu_seqlens; pack along the seq axis")
    for name, x in zip(OFFSETS, (q, k), strict=True):
        expect_array(name, x)
        if len(x.shape) != 1 or x.shape[0] < 2 or not dtype_name(x).lstrip("u").startswith("int"):
            raise InvalidProblem(
                f"{name}: got {dtype_name(x)} of shape {tuple(x.shape)}, expected at least 2 integers on one axis"
            )
    if q.shape[0] != k.shape[0]:
        raise InvalidProblem(f"cu_seqlens_k: has {k.shape[0]} offsets, expected cu_seqlens_q's {q.shape[0]}")


def shown(x: Any) -> str:
    """Return a value as an error shows it: short, whatever it is; a huge integer or an odd object is named only."""
    try:
        text = str(x) if isinstance(x, np.generic) else repr(x)
    except Exception:  # of an integer of thousands of digits, and of whatever a foreign class does
        return f"a value of {type(x).__name__} that cannot be shown"
    return text if len(text) <= 200 else f"{text[:200]}..."


def is_finite(x: Any) -> bool:
    """Tell whether a number is finite, and within float64's range."""
    try:
        return math.isfinite(x)
    except OverflowError:  # an integer beyond float64
        return False


def _is_int(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _one_library(p: Any, name: str, x: Any) -> None:
    if kind_of(x) != p.kind:
        raise InvalidProblem(f"{name}: is of {kind_of(x)} and query of {p.kind}; pass arrays of one library")


def expect_array(name: str, x: Any) -> None:
    """Refuse what is no array that can be read."""
    if kind_of(x) is None:
        raise InvalidProblem(f"{name}: got {type(x).__name__}, expected an array of {', '.join(KINDS)}")
    if (why := why_unusable(x)) is not None:
        raise InvalidProblem(f"{name}: {why}")
