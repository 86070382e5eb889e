"""The encrypted program, once: power-softmax attention in terms of an arithmetic (see arithmetic.py)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from .arithmetic import Arithmetic, Counted, Levels, Numbers
from .inverse import Inverse, product
from .layout import BatchLayout, Layout
from .linear import Plain

__all__ = [
    "Arithmetic",
    "Counted",
    "Levels",
    "Numbers",
    "attend",
    "attend_sigmoid",
]  # those of arithmetic.py for who looks here


def attend(
    m: Any,
    layout: Layout | BatchLayout,
    p: int,
    inverse: Inverse | None,
    added: float,
    q: Sequence[Any],
    k: Sequence[Any],
    v: Sequence[Any],
) -> list[Any]:
    """Return a block of queries' attention: quotients, or numerators and the denominator where the client divides.

    Parameters
    ----------
    m : arithmetic
        What the program runs on.
    layout : Layout or BatchLayout
        Where features, keys and queries lie in the slots.
    p : int
        The even power.
    inverse : Inverse or None
        The polynomial for 1/D; None where the client divides.
    added : float
        epsilon, added to the denominator.
    q, k, v : sequences of ciphertexts
        As ``layout.query_slots``, ``key_slots`` and ``value_slots`` make them. Keys and values may be of fewer spans
        than the layout has; a span's may be numbers that the server knows (linear.Plain), None where those are zeros.
    """
    if isinstance(layout, BatchLayout):
        return _attend_batch(m, layout, p, inverse, added, q, k, v)
    m.step("products")
    turned_q = [_turns(m, layout, q[0], 1)] if layout.compact else []
    weights: list[Any] = []
    for of_span in _split(k, layout.parts):
        m.step("products")
        x = _turned(m, layout, turned_q, [of_span], 1) if layout.compact else _dot(m, q, of_span)
        x = m.add(x, m.conjugate(x))  # 2·Re: two features a slot
        for step in layout.group_steps():
            x = m.add(x, m.rotate(x, step))
        x = m.within(x, p)
        m.step("power")
        w = _power(m, x, p)
        weights.append(m.another(w) if weights else w)
    m.step("values")
    turned = [_turns(m, layout, w, -1) for w in weights]
    n = _turned(m, layout, turned, _split(v, layout.parts), -1)  # over `parts` neighbouring keys of all spans
    m.step("denominator")
    d, *rest = itertools.chain(*turned)
    for more in rest:
        d = m.add(d, more)
    for step in layout.key_steps():
        d = m.add(d, m.rotate(d, step))
    m.step("division")
    if inverse is None:
        return [_sum_keys(m, layout, n), d]
    n, d = m.quotient(n, d)
    return [_sum_keys(m, layout, inverse.apply(m, n, d, added))]


def attend_sigmoid(
    m: Any, layout: Layout | BatchLayout, polynomial: Any, shift: float,
    q: Sequence[Any], k: Sequence[Any], v: Sequence[Any],
) -> list[Any]:  # fmt: skip
    """Return a block of queries' sigmoid attention: weights are a polynomial of scores, and values have its constant.

    Parameters
    ----------
    m, layout, q, k, v
        As :func:`attend` takes them.
    polynomial : Polynomial
        Of w in [-1, 1]; its monic factors are multiplied here.
    shift : float
        Added to the products of queries and keys, which are then w.
    """
    weights = []
    together = layout.pairs if isinstance(layout, BatchLayout) else layout.parts  # of a key, or of a span of them
    for of_some in _split(k, together):
        m.step("products")
        x = _dot(m, q, of_some)
        x = m.add(x, m.conjugate(x))  # 2·Re: two features a slot
        for step in [] if isinstance(layout, BatchLayout) else layout.group_steps():
            x = m.add(x, m.rotate(x, step))
        m.step("sigmoid")
        w = m.within(m.add_constant(x, shift), 1)
        weights.append(product(m, polynomial.apply(m, w)))
    m.step("values")
    if isinstance(layout, BatchLayout):
        return [m.dot(weights, v[c :: layout.pairs]) for c in range(layout.pairs)]
    turned = [_turns(m, layout, w, -1) for w in weights]
    return [_sum_keys(m, layout, _turned(m, layout, turned, _split(v, layout.parts), -1))]


def _attend_batch(
    m: Any, layout: BatchLayout, p: int, inverse: Inverse | None, added: float,
    q: Sequence[Any], k: Sequence[Any], v: Sequence[Any],
) -> list[Any]:  # fmt: skip
    """Return a query's attention where a slot is an input: no rotations."""
    weights: list[Any] = []
    for j in range(layout.keys):
        m.step("products")
        x = m.dot(q, k[j * layout.pairs : (j + 1) * layout.pairs])
        x = m.within(m.add(x, m.conjugate(x)), p)
        m.step("power")
        w = _power(m, x, p)
        weights.append(m.another(w) if weights else w)
    d = weights[0]
    for w in weights[1:]:
        d = m.add(d, w)
    m.step("values")
    ns = [m.dot(weights, v[c :: layout.pairs]) for c in range(layout.pairs)]
    m.step("division")
    if inverse is None:
        return [*ns, d]
    bounded = [m.quotient(n, d) for n in ns]
    factors = inverse.factors(m, bounded[0][1], added)
    outs = []
    for n, _ in bounded:
        for f in factors:
            n = m.product(n, f)
        outs.append(n)
    return outs


def _power(m: Any, x: Any, p: int) -> Any:
    square = m.rescale(m.relinearize(m.square(x)))
    if p == 2:
        return square
    fourth = m.rescale(m.relinearize(m.square(square)))
    if p == 4:
        return fourth
    if p == 6:
        return m.product(fourth, square)
    return m.rescale(m.relinearize(m.square(fourth)))  # 8


def _turns(m: Any, layout: Layout, a: Any, sign: int) -> list[Any]:
    """Return a, turned by as many rows as a giant step leaves over."""
    return [a] + [m.rotate(a, r * sign * layout.columns) for r in range(1, layout.baby)]


def _split(xs: Sequence[Any], each: int) -> list[Sequence[Any]]:
    return [xs[i : i + each] for i in range(0, len(xs), each)]


def _dot(m: Any, a: Sequence[Any], b: Sequence[Any]) -> Any:
    """Return a sum of products, rescaled once; those with known numbers are not relinearised, and None has none."""
    sealed = [(x, y) for x, y in zip(a, b, strict=True) if not (y is None or isinstance(y, Plain))]
    if len(sealed) == len(a):
        return m.dot(a, b)
    total = None
    for x, y in sealed:
        more = m.mul(x, y)
        total = more if total is None else m.add(total, more)
    total = None if total is None else m.relinearize(total)
    for x, y in zip(a, b, strict=True):
        if isinstance(y, Plain):
            more = m.times(x, y)
            total = more if total is None else m.add(total, more)
    return m.rescale(total)


def _turned(m: Any, layout: Layout, turned: Sequence[Sequence[Any]], bs: Sequence[Sequence[Any]], sign: int) -> Any:
    """Return the sum over spans and r of a, turned by r rows, times b_r: a by baby steps, sums by giant steps."""
    baby, unit = layout.baby, sign * layout.columns
    every = [x for of_span in turned for x in of_span]
    total = None
    for giant in range(layout.parts // baby):
        part = _dot(m, every, [x for of_span in bs for x in of_span[giant * baby : (giant + 1) * baby]])
        if giant:
            part = m.rotate(part, giant * baby * unit)
        total = part if total is None else m.add(total, part)
    return total


def _sum_keys(m: Any, layout: Layout, n: Any) -> Any:
    """Return the sum over the rest of the keys: last, where rotations are cheapest."""
    for step in layout.value_steps():
        n = m.add(n, m.rotate(n, step))
    return n
