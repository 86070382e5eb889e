"""The terms that others are made of: distances, slopes, tables by distance or place, T5's buckets, penalties.

With i' the place of query i on the diagonal, as in the rules. A table's numbers are finite, in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput, expect
from .atoms import corner_of, extent, whole, written
from .rule import Rule, remade
from .term import Lookup, Plain, Term, number

__all__ = [
    "alibi",
    "behind",
    "bucket",
    "by_head",
    "by_key",
    "by_query",
    "dense",
    "distance",
    "number",
    "relative",
    "t5",
    "when",
]

Float = NDArray[np.float64]
FARTHEST = 2**20
"""The largest distance that a table has numbers of."""
SHOWN = 8
"""Numbers of a table that are printed; of a longer one its shape is."""


@remade
def behind(corner: str = "bottom_right") -> Term:
    """Return how far the key lies behind the query: i' - j, below 0 where it lies ahead.

    Parameters
    ----------
    corner : {"bottom_right", "top_left"}
        Which corner the diagonal meets: i' = i + n_k - n_q, or i' = i.
    """
    return Plain(written("behind", corner=corner_of(corner)), lambda x: x.behind(corner) - x.k)


@remade
def distance(corner: str = "bottom_right") -> Term:
    """Return the distance of query and key: abs(i' - j)."""
    return Plain(written("distance", corner=corner_of(corner)), lambda x: abs(x.behind(corner) - x.k))


@remade
def by_head(values: Any) -> Term:
    """Return a number for each query head, (h,) or (b, h)."""
    table = _table("values", values, 2)
    text = f"by_head({_shown(values)})"
    return Lookup(text, "heads", table, lambda x: (x.b, x.h), batches=len(table), heads=table.shape[1])


def alibi(slopes: Any, corner: str = "bottom_right") -> Term:
    """Return ALiBi's term: -slope abs(i' - j), slopes of (h,) or (b, h) (Press et al., arXiv 2108.12409)."""
    return -(by_head(slopes) * distance(corner))


@remade
def by_query(values: Any) -> Term:
    """Return a number for each query, (n_q,), or with axes of heads, or of batches and heads, before."""
    return _by("by_query", "queries", values, lambda x: x.q, 0)


@remade
def by_key(values: Any) -> Term:
    """Return a number for each key, (n_k,), or with axes of heads, or of batches and heads, before."""
    return _by("by_key", "keys", values, lambda x: x.k, 1)


def _by(name: str, what: str, values: Any, place: Any, axis: int) -> Term:
    table, text = _table("values", values, 3), f"{name}({_shown(values)})"
    n = table.shape[2]

    def misfit(n_q: int, n_k: int) -> str | None:
        there = (n_q, n_k)[axis]
        return None if n == there else f"{text} has numbers of {n} {what}, and the call has {there}"

    return Lookup(text, what, table, lambda x: (x.b, x.h, place(x)), misfit, table.shape[0], table.shape[1])


@remade
def dense(values: Any) -> Term:
    """Return the numbers of an array: (n_q, n_k), (h, n_q, n_k) or (b, h, n_q, n_k), 1 for all."""
    table, text = _table("values", values, 4), f"dense({_numbers(np.shape(values))})"

    def misfit(n_q: int, n_k: int) -> str | None:
        good = all(a in (1, n) for a, n in zip(table.shape[2:], (n_q, n_k), strict=True))
        return None if good else f"{text} does not fit the call's {n_q} queries and {n_k} keys"

    return Lookup(text, "dense", table, lambda x: (x.b, x.h, x.q, x.k), misfit, *table.shape[:2])


@remade
def relative(values: Any, corner: str = "bottom_right") -> Term:
    """Return a number for each distance that has a sign: values[m + i' - j] of 2m + 1, ends for all beyond.

    Parameters
    ----------
    values : (2m + 1,) or (h, 2m + 1) array
        From the key m ahead of the query to the one m behind it.
    corner : {"bottom_right", "top_left"}
        As in :func:`behind`.
    """
    table = _table("values", values, 2)
    m, odd = divmod(table.shape[1], 2)
    if not odd or m > FARTHEST:
        raise InvalidInput(f"values: got {table.shape[1]} distances, expected 2m + 1, of keys m ahead to m behind")
    text = written("relative", _shown(values), corner=corner_of(corner))
    return Lookup(
        text,
        "relative",
        table,
        lambda x: (x.h, x.clip(x.behind(corner) - x.k + m, 0, 2 * m)),
        heads=len(table),
    )


@remade
def t5(values: Any, most: int = 128, both: bool = True, corner: str = "bottom_right") -> Term:
    """Return T5's relative bias: values[h, bucket of i' - j] (Raffel et al., arXiv 1910.10683; its released code).

    Parameters
    ----------
    values : (buckets,) or (h, buckets) array
        A number for each bucket, as :func:`bucket` numbers them.
    most : int
        The distance from which on all share the last bucket.
    both : bool
        Whether keys ahead of the query have the second half of the buckets; else they are in bucket 0.
    corner : {"bottom_right", "top_left"}
        As in :func:`behind`.

    Notes
    -----
    The released code finds a bucket by logarithms in float32; here it is exact, by integers.
    """
    table, most = _table("values", values, 2), _most(most)
    of = bucket(np.arange(-most, most + 1), table.shape[1], most, both)
    named = [f"{most}"] * (most != 128) + ["both=False"] * (not both)
    text = written("t5", _shown(values), *named, corner=corner_of(corner))

    def index(x: Any) -> tuple[Any, Any]:
        return x.h, x.look("buckets", of, x.clip(x.behind(corner) - x.k + most, 0, 2 * most))

    return Lookup(text, "t5", table, index, heads=len(table))


def bucket(behind: Any, buckets: int, most: int = 128, both: bool = True) -> NDArray[np.int64]:
    """Return T5's bucket of each distance i' - j, below 0 where the key lies ahead.

    Of N buckets, or half of them where `both` sides have some, the first M = N // 2 hold one distance each, and the
    others those from M to `most` in steps of a logarithm: distance n is in M + floor((N - M) log(n / M) / log(most /
    M)), at most N - 1.

    Raises
    ------
    InvalidInput
        Numbers of buckets that have no such steps.
    """
    far = np.asarray(behind)
    expect(far.dtype.kind in "iu", "behind", far.dtype.name, "integers")
    buckets, most = whole("buckets", buckets, 2), _most(most)
    expect(isinstance(both, bool), "both", both, "True or False")
    if both and buckets % 2:
        raise InvalidInput(f"values: got {buckets} buckets, expected an even number where both sides have half of them")
    n = buckets // 2 if both else buckets
    m = n // 2
    if n < 2 or most <= m:
        raise InvalidInput(f"most: got {most} with {n} buckets to a side, expected at least 2 and most above {m}")
    # the first distance of bucket m + t is the least x with (x / m)**(n - m) >= (most / m)**t, in integers
    firsts, x = [], m
    for t in range(1, n - m):
        while x ** (n - m) * m**t < most**t * m ** (n - m):
            x += 1
        firsts.append(x)
    away = np.abs(far.astype(np.int64)) if both else np.maximum(far.astype(np.int64), 0)
    found = np.where(away < m, away, m + np.searchsorted(np.array(firsts, np.int64), away, "right"))
    return found + np.where(both & (far < 0), n, 0)


@remade
def when(rule: Rule) -> Term:
    """Return 1 where a rule holds, else 0: ``-2.0 * when(~document(ids))`` takes 2 off keys of other documents."""
    expect(isinstance(rule, Rule), "rule", rule, "a rule, such as refattn.rules.causal()")
    return Plain(f"when({rule!r})", lambda x: x.number(rule.at(x)), rule.misfit, rule.batches, rule.heads)


def _most(most: Any) -> int:
    far = whole("most", most, 1)
    if far > FARTHEST:
        raise InvalidInput(f"most: got {far}, expected at most {FARTHEST}")
    return far


def _table(name: str, x: Any, axes: int) -> Float:
    """Return a table of finite numbers with all of its axes; the first may be left out."""
    try:
        found = np.asarray(x)
        plain = found.dtype.kind in "iuf" or found.dtype.isbuiltin == 2  # 2: ml_dtypes' floats
        wide = found.astype(np.float64) if plain else found
    except (TypeError, ValueError, RuntimeError) as e:  # RuntimeError: PyTorch's, of a tensor that requires grad
        raise InvalidInput(f"{name}: got {repr(x)[:200]}, expected numbers, as many in each row") from e
    if isinstance(x, np.ma.MaskedArray) or not plain or not max(axes - 2, 1) <= found.ndim <= axes or not found.size:
        raise InvalidInput(
            f"{name}: got {found.dtype} of shape {found.shape}, expected numbers on {max(axes - 2, 1)} to {axes} axes"
        )
    if not np.isfinite(wide).all():
        raise InvalidInput(f"{name}: has NaN or inf, expected finite numbers; hide keys by `allowed`")
    return wide.reshape((1,) * (axes - found.ndim) + found.shape)


def _shown(x: Any) -> str:
    table = np.asarray(x)
    return str(table.astype(np.float64).tolist()) if table.size <= SHOWN else _numbers(table.shape)


def _numbers(shape: tuple[int, ...]) -> str:
    return f"<numbers {extent(shape)}>"
