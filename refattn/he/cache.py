"""Decoding's tokens and cache: what a token's ciphertexts hold, and what the server keeps of those before it.

A slot is (features, key, head), as in a call with one query a head. A token's ciphertexts of keys and values are zero
but in its own row, so the server adds them to those of the tokens before it: a span of keys takes as many ciphertexts
with one token as with all of its rows. The next span begins when a span is full. Keys in the clear take the first rows:
whole spans of them are products with numbers that are known, and the rest is added to the first ciphertexts that come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput, InvalidProblem, UnsupportedProblem
from .arguments import numbers_of
from .linear import Plain

__all__ = ["Cache", "Context", "Tokens", "context_of"]

Float = NDArray[np.float64]
Complex = NDArray[np.complex128]


@dataclass(frozen=True)
class Context:
    """Keys and values in the clear, by blocks of heads.

    Attributes
    ----------
    keys, values : sequence of sequences of Plain or None
        Of whole spans; None for numbers that are all zero.
    rest : sequence of (keys, values)
        What is added to the first encrypted span; nothing where the context fills whole spans.
    """

    keys: Sequence[Sequence[Plain | None]]
    values: Sequence[Sequence[Plain | None]]
    rest: Sequence[tuple[Sequence[Plain], Sequence[Plain]]]


class Tokens:
    """The tokens of a sequence, at the client: checked against the plan's ranges, and placed in slots.

    Parameters
    ----------
    plan : DecodingPlan
        The plan.
    context_keys : (heads, context, d_k) array, optional
        Keys in the clear, where they are known here: without them no denominator is known, but a part of it.
    """

    def __init__(self, plan: Any, context_keys: Any = None) -> None:
        self.plan, self.count = plan, 0
        self._whole = plan.context == 0 or context_keys is not None
        if context_keys is None:
            self._keys: Float = np.zeros((plan.heads, 0, plan.d_k))
        else:
            self._keys = shaped("context", context_keys, (plan.heads, plan.context, plan.d_k))
            _within_norm("context", self._keys, plan.norms[1])

    def encoded(self, q: Any, k: Any, v: Any) -> list[tuple[Complex, int]]:
        """Return slots and primes of each ciphertext of the next token, which is then one of those before.

        Raises
        ------
        InvalidInput
            The sequence has its longest length.
        InvalidProblem
            Shapes or numbers that are not the plan's.
        """
        plan, layout = self.plan, self.plan.layout
        if self.count >= plan.longest:
            raise InvalidInput(
                f"he: the sequence has its longest, {plan.longest} tokens; begin another one, or plan a longer one"
            )
        q, k = (shaped(n, x, (plan.heads, plan.d_k)) for n, x in (("query", q), ("key", k)))
        v = shaped("value", v, (plan.heads, plan.d_v))
        keys = np.concatenate([self._keys, k[:, None]], 1)
        self._check(q, k, v, keys)
        at, top = plan.context + self.count, plan.ring.levels + 1
        row_q, row_k, row_v = (np.pad(x, ((0, 0), (0, 2 * layout.pairs - x.shape[1]))) for x in (q, k, v))
        of_k, of_v = np.zeros((2, plan.heads, layout.keys, 2 * layout.pairs))
        of_k[:, at], of_v[:, at] = row_k, row_v
        of_q, of_v = row_q[:, None] * plan.token_factors[0], of_v * plan.token_factors[1]
        seen, span = np.ones((plan.heads, 1, layout.keys), bool), [at // layout.rows]
        found: list[tuple[Complex, int]] = []
        for block in layout.blocks():
            found += [(x, top) for x in layout.query_slots(of_q, seen, block)]
            found += [(x, top) for x in layout.key_slots(of_k, seen, block, span)]
            found += [(x, plan.value_limbs) for x in layout.value_slots(of_v, block, span)]
        self._keys, self.count = keys, self.count + 1
        return found

    def _check(self, q: Float, k: Float, v: Float, keys: Float) -> None:
        """Refuse numbers outside the plan's ranges: the result would be wrong without a sign of it."""
        plan = self.plan
        _within_norm("query", q, plan.norms[0])
        _within_norm("key", k, plan.norms[1])
        _within_most("value", v, plan.value_most)
        plan.check_token(q, keys, self.count, self._whole)


@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, on an arithmetic. A token makes another cache, this one stays as it is.

    Attributes
    ----------
    plan : DecodingPlan
        The plan.
    context : Context or None
        What is in the clear.
    count : int
        Encrypted tokens so far.
    keys, values : tuple of tuple
        The ciphertexts by blocks of heads, span by span.
    """

    plan: Any
    context: Context | None = None
    count: int = 0
    keys: tuple[tuple[Any, ...], ...] = ()
    values: tuple[tuple[Any, ...], ...] = ()

    def appended(self, m: Any, parts: Sequence[Any]) -> Cache:
        """Return the cache with a token, of the ciphertexts of one in the plan's order."""
        layout = self.plan.layout
        fresh = self.count == 0 or (self.plan.context + self.count) % layout.rows == 0
        keys: list[tuple[Any, ...]] = []
        values: list[tuple[Any, ...]] = []
        for i, (own, _) in enumerate(self.plan.tasks(parts)):
            k, v = tuple(own[: layout.parts]), tuple(own[layout.parts :])
            if self.count == 0 and self.context is not None and self.context.rest:
                k, v = (
                    tuple(m.plus(x, y) for x, y in zip(of, rest, strict=True))
                    for of, rest in zip((k, v), self.context.rest[i], strict=True)
                )
            for found, so_far, more in ((keys, self.keys, k), (values, self.values, v)):
                if fresh:
                    found.append((so_far[i] if self.count else ()) + more)
                else:
                    last = so_far[i][-layout.parts :]
                    added = tuple(m.add(x, y) for x, y in zip(last, more, strict=True))
                    found.append(so_far[i][: -layout.parts] + added)
        return replace(self, count=self.count + 1, keys=tuple(keys), values=tuple(values))

    def attend(self, m: Any, parts: Sequence[Any]) -> list[Any]:
        """Return the result of a token's query over the context and all tokens, the last of which is its own."""
        found = []
        for i, (_, queries) in enumerate(self.plan.tasks(parts)):
            keys, values = list(self.keys[i]), list(self.values[i])
            if self.context is not None:
                keys += self.context.keys[i]
                values += self.context.values[i]
            found += self.plan.compute(m, [*keys, *values], queries)
        return found


def context_of(plan: Any, context: Any, zero: Callable[[Plain], bool] = lambda x: False) -> Context | None:
    """Return keys and values in the clear as a plan wants them.

    Parameters
    ----------
    plan : DecodingPlan
        The plan.
    context : (k, v) or None
        (heads, context, d_k) and (heads, context, d_v) arrays.
    zero : callable
        What tells whether numbers are all zero when they are encoded: SEAL does not multiply by those.

    Raises
    ------
    InvalidInput
        There is one where the plan has none, or none where it has one.
    InvalidProblem
        Shapes or numbers that are not the plan's.
    """
    if context is None and plan.context == 0:
        return None
    if context is None or plan.context == 0 or not isinstance(context, tuple | list) or len(context) != 2:
        got = "None" if context is None else type(context).__name__
        expected = f"(k, v) of {plan.context} tokens" if plan.context else "None: the plan has no tokens in the clear"
        raise InvalidInput(f"context: got {got}, expected {expected}")
    layout, n = plan.layout, plan.context
    k = shaped("context", context[0], (plan.heads, n, plan.d_k))
    v = shaped("context", context[1], (plan.heads, n, plan.d_v))
    _within_norm("context", k, plan.norms[1])
    _within_most("context", v, plan.value_most)
    width = 2 * layout.pairs
    k, v = (np.pad(x, ((0, 0), (0, layout.keys - n), (0, width - x.shape[2]))) for x in (k, v))
    v = v * plan.token_factors[1]
    seen, whole, rest = np.ones((plan.heads, 1, layout.keys), bool), n // layout.rows, n % layout.rows
    keys, values, more = [], [], []
    for block in layout.blocks():
        of_k, of_v = ([None if zero(x) else x for x in xs] for xs in _known(plan, block, k, v, seen, range(whole)))
        # keys that are all zero have no weight, or one that is in the clear
        used = [i for i, x in enumerate(of_k) if any(y is not None for y in _span(of_k, i, layout.parts))]
        if plan.operator == "sigmoid" and len(used) < len(of_k):
            raise UnsupportedProblem(
                f"he: context: {layout.rows} keys in a row are all zero, whose weights are no ciphertexts; leave these "
                "tokens out of the context, or encrypt them"
            )
        keys.append([of_k[i] for i in used])
        values.append([of_v[i] for i in used])
        if rest:
            more.append(_known(plan, block, k, v, seen, [whole]))
    return Context(keys, values, more)


def _span(xs: Sequence[Any], i: int, parts: int) -> Sequence[Any]:
    """Return the ciphertexts of the span that one is of."""
    return xs[i // parts * parts : (i // parts + 1) * parts]


def _known(
    plan: Any, block: Any, k: Float, v: Float, seen: Any, spans: Sequence[int]
) -> tuple[list[Plain], list[Plain]]:
    scale, layout = 2.0**plan.ring.middle, plan.layout
    keys, values = layout.key_slots(k, seen, block, spans), layout.value_slots(v, block, spans)
    return [Plain(x, scale) for x in keys], [Plain(x, scale) for x in values]


def shaped(name: str, x: Any, shape: tuple[int, ...]) -> Float:
    """Return an array of real numbers of a shape, a copy."""
    found = numbers_of(name, x)
    if found.shape != shape:
        raise InvalidProblem(f"{name}: got shape {found.shape}, expected {shape}: heads first, by the plan")
    return np.array(found)


def _within_norm(name: str, x: Float, most: float) -> None:
    largest = float(np.linalg.norm(x, axis=-1).max())
    if not largest <= most:  # NaN, too
        raise InvalidProblem(f"{name}: its largest row norm is {largest:.4g}, beyond the plan's {most:.4g}")


def _within_most(name: str, x: Float, most: float) -> None:
    largest = float(np.abs(x).max())
    if not largest <= most:  # NaN, too
        raise InvalidProblem(f"{name}: its largest element is {largest:.4g}, beyond the plan's {most:.4g}")
