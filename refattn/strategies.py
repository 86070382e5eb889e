"""Hypothesis strategies for property tests: attention calls, gradients, arrays and memory layouts.

Import it as ``from refattn import strategies``; it needs the package hypothesis. Sizes and options are drawn; numbers
follow from a drawn seed and the name of a family. So a failing call shrinks to few options and small sizes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from hypothesis import assume, note
from hypothesis import strategies as st
from numpy.typing import NDArray

from .arrays import from_float64, kind_of, like
from .check.inputs.draw import Draw
from .check.inputs.values import RARE, VALUES, numbers
from .check.model import FEATURES, FURTHER
from .drawn_options import APART, FURTHER_ON, NEEDS, PAGED, TYPES, dropped, lengths, norms, paged, positioned, typed
from .dtypes import FORMATS, Format, format_of, is_float
from .errors import InvalidInput
from .gates import RECURRENT
from .masks import visible
from .problem import MEANINGS, VARIANT, Problem
from .validation import ALIGNMENTS
from .variants import Variant, variant_of

__all__ = ["VALUES", "arrays", "gradients", "layouts", "problems"]

Shape = tuple[int, ...]

PRIMES = (13, 37, 61, 131)
KINDS = ("integers", "normal", "positive", "one", "wide", "largest")


def problems(
    variant: str = VARIANT,
    *,
    dtypes: Sequence[str] = ("float32",),
    max_rows: int = 131,
    max_keys: int = 131,
    max_dim: int = 32,
    tile: int = 64,
    features: Collection[str] | None = None,
    families: Sequence[str] | None = None,
) -> st.SearchStrategy[Problem]:
    """Return a strategy of attention calls over every option that an operator has.

    Lengths are 1, 2, 3, 5, 8, some primes, the edges of one and two tiles, and the largest; 0 too where
    ``no_rows_or_keys`` is wanted. The simplest call is one query and one key of width 1, without options.

    Parameters
    ----------
    variant : str
        The operator's name in ``refattn.VARIANTS``.
    dtypes : sequence of str
        Names of formats, the simplest first.
    max_rows, max_keys, max_dim : int
        The largest n_q, n_k, and d_k and d_v.
    tile : int
        Lengths are drawn about its edges: tile and 2·tile, one less, one more.
    features : collection of str, optional
        What a call may ask for, out of ``refattn.check.FEATURES`` and ``FURTHER``: a kernel's
        ``capabilities.features``, say. By default all that the operator has.
    families : sequence of str, optional
        Out of ``VALUES``, the simplest first. By default all, "shifted", "near_tie" and "extreme" only for operators
        whose checks have such problems.

    Returns
    -------
    SearchStrategy of Problem
        With NumPy arrays: query (b, h_q, n_q, d_k), key (b, h_kv, n_k, d_k), value (b, h_kv, n_k, d_v). All numbers
        are finite but for the family "poison", and for biases and sinks of -inf.

    Raises
    ------
    InvalidInput
        An unknown name, a limit below 1, or a feature that the operator does not have.
    """
    least = {"max_dim": (v := variant_of(variant)).narrowest}
    for name, limit in (("max_rows", max_rows), ("max_keys", max_keys), ("max_dim", max_dim), ("tile", tile)):
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < least.get(name, 1):
            raise InvalidInput(f"{name}: got {limit!r}, expected an integer of at least {least.get(name, 1)}")
    able = _features(v)
    wanted = able if features is None else _some("features", features, sorted(FEATURES | FURTHER))
    for name in wanted:
        if name not in able:
            raise InvalidInput(f"features: got {name!r}, expected what {v.name} attention has: {', '.join(able)}")
    usual = [n for n in VALUES if n not in RARE or RARE[n] in v.families]
    chosen = usual if families is None else _some("families", families, list(VALUES))
    formats = [FORMATS[n] for n in _some("dtypes", dtypes, list(FORMATS))]
    if not formats or not chosen:
        raise InvalidInput(f"{'families' if formats else 'dtypes'}: got none, expected at least one name")
    wanted = [n for n in able if n in wanted]  # in one order, whatever the order of a set
    return _problems(v, formats, (max_rows, max_keys, max_dim), tile, wanted, chosen)


def _features(v: Variant) -> list[str]:
    """Return the features that an operator has, the simplest first."""
    always = ["lengths_differ", "d_v_differs", "grouped_heads", "scale", "variable_lengths", "no_rows_or_keys"]
    causal = [f"causal_{a}" for a in reversed(ALIGNMENTS)] if "causal" in v.uses else []  # a later flag is kept
    found = causal + always + [n for n in MEANINGS[::-1] if n in v.uses and n not in APART]
    found += [n for n in FURTHER_ON if NEEDS.get(n, n) in v.uses]
    found += (TYPES if "types" in v.families else ()) + (PAGED if "pages" in v.families else ())
    return [n for n in found if n not in v.never]


def _some(name: str, given: Collection[str], known: Sequence[str]) -> list[str]:
    if isinstance(given, str):
        raise InvalidInput(f"{name}: got {given!r}, expected a collection of names, e.g. ({given!r},)")
    for x in given:
        if x not in known:
            raise InvalidInput(f"{name}: got {x!r}, expected some of {', '.join(known)}")
    return list(given)


def _sizes(limit: int, tile: int) -> list[int]:
    edges = {t + i for t in (tile, 2 * tile) for i in (-1, 0, 1)}
    return sorted(n for n in {1, 2, 3, 5, 8, limit, *PRIMES, *edges} if 1 <= n <= limit)


@st.composite
def _problems(
    draw: st.DrawFn,
    v: Variant,
    formats: list[Format],
    limits: tuple[int, int, int],
    tile: int,
    able: list[str],
    families: list[str],
) -> Problem:
    # a flag for each, one in three: what does not matter shrinks away alone
    on = {name for name in able if name in v.always or draw(st.sampled_from((False, False, True)))}
    rows, keys, dims = (_sizes(x, tile) for x in limits)
    none = [0] if "no_rows_or_keys" in on else []
    if "lengths_differ" in on:
        n_q, n_k = draw(st.sampled_from(rows + none)), draw(st.sampled_from(keys + none))
    else:
        n_q = n_k = draw(st.sampled_from(_sizes(min(limits[:2]), tile) + none))
    d_k = d_v = draw(st.sampled_from([x for x in dims if x >= v.narrowest] or [v.narrowest]))
    if "d_v_differs" in on and len(dims) > 1:
        d_v = draw(st.sampled_from([x for x in dims if x != d_k]))
    h_kv = draw(st.sampled_from((1, 2, 3)))
    h = h_kv * draw(st.sampled_from((2, 3, 4))) if "grouped_heads" in on else h_kv
    b = 1 if "variable_lengths" in on else draw(st.sampled_from((1, 2)))
    family = draw(st.sampled_from(families))
    seed = draw(st.integers(0, 1023))
    note(f"numbers: family {family!r}, seed {seed}")
    d = Draw(draw(st.sampled_from(formats)), _generator(seed, family), v.name)
    more: dict[str, Any] = {"causal": next((a for a in ALIGNMENTS if f"causal_{a}" in on), None)}
    more |= _numbers(draw, on, more["causal"], max(n_q, n_k))
    if "variable_lengths" in on:
        more |= _packs(draw, n_q, n_k, alike="lengths_differ" in v.never)
    more |= lengths(draw, on, more, (b, n_q, n_k))
    if "weight" in on:
        more["weight"] = np.exp(d.normal(*_broadcastable(draw, (b, h, n_q, n_k))))
    sequences = len(more["cu_seqlens_q"]) - 1 if "variable_lengths" in on else b
    more |= _recurrent(draw, d, on, (b, h, n_k, d_k, d_v), sequences)
    if "sink" in on:
        size = draw(st.sampled_from((1.0, 100.0, -np.inf)))
        more["sink"] = size * (d.normal(h) if np.isfinite(size) else np.ones(h))
    full = (b, h, n_q, n_k)
    if "bias" in on:
        removed = draw(st.sampled_from(("nothing", "far", "keys", "rows")))
        shape = _broadcastable(draw, full)
        more["bias"] = np.where(_mask(d, shape, removed), d.normal(*shape), -200.0 if removed == "far" else -np.inf)
    # poison needs a mask to stand behind
    if "allowed" in on or (family == "poison" and "allowed" in able):
        removed = draw(st.sampled_from(("keys", "nothing", "rows")))
        more["allowed"] = _mask(d, _broadcastable(draw, full), removed)
    more |= dropped(draw, on, full, _broadcastable, more)
    more |= norms(draw, on, 0 if "d_k_zero" in on else d_k)
    more["options"] = _own(draw, v, h, more) if v.tries is None else dict(draw(st.sampled_from(v.tries(n_q, n_k))))
    q, k, x = numbers(family, d, (b, h, n_q, d_k), (b, h_kv, n_k, d_k), (b, h_kv, n_k, d_v))
    if "d_k_zero" in on:
        q, k, d_k = q[..., :0], k[..., :0], 0
    problem = d.problem(n_q, n_k, b=b, h=h, h_kv=h_kv, d=d_k, d_v=d_v, q=q, k=k, v=x, **more)
    assume(v.takes(problem))
    problem = positioned(draw, problem, on)
    found = typed(draw, _poison(problem, d) if family == "poison" else problem, on)
    return paged(draw, found, on, np.nan if family == "poison" else 1.0)


def _packs(draw: st.DrawFn, n_q: int, n_k: int, alike: bool) -> dict[str, Any]:
    """Draw the offsets of packed sequences, with as many queries as keys in each where that must be so."""
    cuts = draw(st.lists(st.tuples(st.integers(0, n_q), st.integers(0, n_k)), max_size=3))
    ends = (("cu_seqlens_q", n_q, 0), ("cu_seqlens_k", n_k, 0 if alike else 1))
    return {name: np.array([0, *sorted(c[at] for c in cuts), end], np.int32) for name, end, at in ends}


def _recurrent(
    draw: st.DrawFn, d: Draw, on: set[str], size: tuple[int, int, int, int, int], sequences: int
) -> dict[str, Any]:
    """Draw a recurrence's gates, and a state for each sequence, those that are asked for."""
    if not on & set(RECURRENT):
        return {}
    given = d.recurrent(*size, channels="alpha" in on and draw(st.booleans()), sequences=sequences)
    return {n: x for n, x in given.items() if n in on}


def _numbers(draw: st.DrawFn, on: set[str], causal: str | None, longest: int) -> dict[str, Any]:
    """Draw the window, the scale and the softcap."""
    found: dict[str, Any] = {}
    if on & {"window", "negative_window"}:
        side = st.none() | st.integers(0, longest)
        found["window"] = draw(st.tuples(side, side))
        if "negative_window" in on:
            sides = ((None, -1), (None, -3), *(((-2, None),) if causal is None else ()))
            found["window"] = draw(st.sampled_from(sides))
    if "scale" in on:
        found["scale"] = draw(st.sampled_from((1.0, 0.0, -0.25, 0.3)))
    if "softcap" in on:
        found["softcap"] = draw(st.sampled_from((1.0, 5.0, 30.0)))
    return found


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _broadcastable(draw: st.DrawFn, full: Shape) -> Shape:
    """Draw which axes a bias or a mask has; none of them is the simplest."""
    has = draw(st.tuples(*[st.booleans()] * 4))
    return tuple(n if yes else 1 for n, yes in zip(full, has, strict=True))


def _mask(d: Draw, shape: Shape, removed: str) -> NDArray[np.bool_]:
    """Return what stays: everything, two keys in three, or of these only two rows in three."""
    mask = np.ones(shape, bool) if removed == "nothing" else d.mask(*shape)
    if removed == "rows":
        mask[..., ::3, :] = False
    return mask


def _own(draw: st.DrawFn, v: Variant, heads: int, more: dict[str, Any]) -> dict[str, Any]:
    """Draw the operator's own options; only those that differ from their default are set."""
    # an option without a usable default is drawn among the others
    start = {n: 0 if o.check(o.default, heads) is None else 1 for n, o in v.options.items()}
    drawn = {n: draw(st.sampled_from(o.draws(heads)[start[n] :])) for n, o in v.options.items()}
    lacking = {n for n, o in v.options.items() if o.needs and more.get(o.needs) is None}
    return {n: x for n, x in drawn.items() if x != v.options[n].default and n not in lacking}


def _poison(p: Problem, d: Draw) -> Problem:
    """Put NaN into the keys, and NaN or inf into the values, that no row sees."""
    seen = np.zeros((p.batch, p.heads_kv, p.n_k), bool)
    for b in range(p.batch):
        for h in range(p.heads):
            for rows, keys in p.segments(b):
                seen[b, h // (p.heads // p.heads_kv), keys] |= visible(p, b, h, rows, keys).any(0)
    key, value = p.key.copy(), p.value.copy()
    key[~seen] = np.nan
    value[~seen] = d.rng.choice((np.nan, np.inf, -np.inf)) if d.form.infinities else np.nan
    return p.replace(key=key, value=value)


def arrays(form: Any, shape: Sequence[int]) -> st.SearchStrategy[NDArray[Any]]:
    """Return a strategy of finite arrays: small integers, normal and positive numbers, one 1, wide exponents, extremes.

    Parameters
    ----------
    form : Format, str or dtype
        The format, as :func:`refattn.dtypes.format_of` takes it.
    shape : sequence of int
        The arrays' shape.

    Returns
    -------
    SearchStrategy of numpy.ndarray

    Raises
    ------
    InvalidInput
        An unknown format, or a shape that is none.
    """
    if not isinstance(shape, tuple | list) or any(not isinstance(n, int | np.integer) or n < 0 for n in shape):
        raise InvalidInput(f"shape: got {shape!r}, expected a tuple of integers of at least 0")
    one, whole = (form if isinstance(form, Format) else format_of(form)), tuple(int(n) for n in shape)
    return st.builds(lambda kind, seed: _array(one, whole, kind, seed), st.sampled_from(KINDS), st.integers(0, 1023))


def _array(form: Format, shape: Shape, kind: str, seed: int) -> NDArray[Any]:
    rng = _generator(seed, kind)
    if kind == "integers":
        x = rng.integers(-2, 3, shape).astype(np.float64)
    elif kind == "one":
        x = np.zeros(shape)
        if x.size:
            x.flat[int(rng.integers(0, x.size))] = 1
    elif kind == "largest":
        x = rng.choice((form.largest, -form.largest, form.smallest_subnormal, 0.0), shape)
    else:
        x = rng.standard_normal(shape)
        x = np.abs(x) if kind == "positive" else x
        x = np.ldexp(x, rng.integers(-10, 11, shape)) if kind == "wide" else x
    return from_float64(form.round_array(np.clip(x, -form.largest, form.largest)), form.name)


def gradients(problem: Problem) -> st.SearchStrategy[Any]:
    """Return a strategy of gradients of a call's output, as ``evaluate(problem, gradients=...)`` takes them.

    Parameters
    ----------
    problem : Problem
        The call.

    Returns
    -------
    SearchStrategy of (b, h_q, n_q, d_v) arrays
        Of query's type and kind, drawn as :func:`arrays` draws.

    Raises
    ------
    InvalidInput
        `problem` is none.
    """
    if not isinstance(problem, Problem):
        raise InvalidInput(f"problem: got {type(problem).__name__}, expected a Problem")
    return arrays(problem.dtype, problem.out_shape).map(lambda x: like(x, problem.query))


def layouts(array: NDArray[Any]) -> st.SearchStrategy[NDArray[Any]]:
    """Return a strategy of the same numbers in other memory layouts, the plain one first.

    The others are views: elements apart (NaN between them), rows with room behind them (NaN too), an axis stored
    backwards (negative stride), two axes stored the other way round (heads after sequence, say), and stride 0 along an
    axis on which all elements agree. Give a call other layouts by ``problem.replace(key=draw(layouts(problem.key)))``.

    Parameters
    ----------
    array : numpy.ndarray
        Of any type and shape.

    Returns
    -------
    SearchStrategy of numpy.ndarray
        Equal to `array` bit by bit.

    Raises
    ------
    InvalidInput
        `array` is no NumPy array.
    """
    if kind_of(array) != "numpy":
        raise InvalidInput(f"array: got {type(array).__name__}, expected a NumPy array")
    x = np.array(array, order="C", copy=True)
    long = [a for a in range(x.ndim) if x.shape[a] > 1]
    found: list[tuple[Any, ...]] = [("plain",)]
    found += [("padded",)] if x.size and x.ndim > 1 else []
    for a in long if x.size else ():
        found += [("apart", a), ("backwards", a)]
        found += [("swapped", a, b) for b in long if a < b]
        found += [("stretched", a)] if _agrees(x, a) else []
    return st.sampled_from(found).map(lambda how: LAYOUTS[how[0]](x, *how[1:]))


def _filled(shape: Shape, like: NDArray[Any]) -> NDArray[Any]:
    return np.full(shape, np.nan if is_float(like.dtype) else 1, like.dtype)


def _apart(x: NDArray[Any], axis: int) -> NDArray[Any]:
    room = _filled((*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :]), x)
    view = room[(slice(None),) * axis + (slice(None, None, 2),)]
    view[...] = x
    return view


def _padded(x: NDArray[Any]) -> NDArray[Any]:
    view = _filled((*x.shape[:-1], x.shape[-1] + 3), x)[..., :-3]
    view[...] = x
    return view


def _backwards(x: NDArray[Any], axis: int) -> NDArray[Any]:
    return np.flip(np.flip(x, axis).copy(), axis)


def _swapped(x: NDArray[Any], a: int, b: int) -> NDArray[Any]:
    return x.swapaxes(a, b).copy().swapaxes(a, b)


def _stretched(x: NDArray[Any], axis: int) -> NDArray[Any]:
    return np.broadcast_to(x.take([0], axis), x.shape)


def _agrees(x: NDArray[Any], axis: int) -> bool:
    return _stretched(x, axis).tobytes() == x.tobytes()  # NaN agrees with itself, -0 and 0 do not


LAYOUTS: dict[str, Callable[..., NDArray[Any]]] = {
    "plain": np.copy,
    "padded": _padded,
    "apart": _apart,
    "backwards": _backwards,
    "swapped": _swapped,
    "stretched": _stretched,
}
