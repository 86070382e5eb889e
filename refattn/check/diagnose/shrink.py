"""Make a failing call as small as it can be while it still fails, and write it as a program."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ...dropout import PHILOX
from ...errors import InvalidProblem, UnsupportedProblem
from ...gates import GATES, RECURRENT
from ...norms import NORMS, has_norms
from ...pages import appended, gathered
from ...positions import POSITIONS, ROTARY
from ...problem import Problem
from ...variants import Steps, variant_of
from ...variants.own import named

__all__ = ["boundary", "program", "shrink"]

Fails = Callable[[Problem, Any], bool]
Call = tuple[Problem, Any]


def shrink(problem: Problem, dout: Any, fails: Fails, seconds: float = 10.0) -> Call:
    """Return the smallest call that still fails, by greedy steps.

    Parameters
    ----------
    problem : Problem
        A call on NumPy arrays that fails.
    dout : (b, h_q, n_q, d_v) array or None
        The gradient arriving at out, where a gradient fails.
    fails : callable
        ``fails(problem, dout)``; called for every step.
    seconds : float
        When to stop.

    Returns
    -------
    Problem, array or None
    """
    end = time.monotonic() + seconds
    best: Call = (problem, dout)
    again = True
    while again and time.monotonic() < end:
        again = False
        for smaller in _steps(*best):
            if time.monotonic() > end:
                break
            if fails(*smaller):
                best, again = smaller, True
                break
    return best


def boundary(problem: Problem, dout: Any, fails: Fails) -> str:
    """Return at which lengths a call that fails begins to: "passes with n_k = 64, fails with 65", or "".

    Parameters
    ----------
    problem, dout, fails
        As in :func:`shrink`, whose result this is for.
    """
    p, found = problem, []
    if p.cu_seqlens_q is not None or p.block_table is not None:
        return ""
    cuts: list[tuple[str, int, Any]] = [
        ("n_k", p.n_k, _cut(p, dout, keys=slice(p.n_k - 1))),
        ("n_q", p.n_q, _cut(p, dout, rows=slice(p.n_q - 1))),
        ("d_k", p.d_k, _narrower(p, dout, slice(p.d_k - 1))),
    ]
    if _by_token(p):
        cuts[:2] = [("n_q", p.n_q, _cut(p, dout, rows=slice(p.n_q - 1), keys=slice(p.n_q - 1)))]
    for name, size, cut in cuts:
        if size > 1 and any(not fails(*call) for call in _valid(cut)):
            tile = max((t for t in TILES if (size - 1) % t == 0), default=0)
            where = f", an edge of tiles of {tile}" if tile else ""
            found.append(f"passes with {name} = {size - 1}, fails with {size}{where}")
    return "; ".join(found)


def _of_pages(p: Problem) -> Iterator[Call]:
    """Yield the call without pages, without new keys, of one item alone, or narrower."""
    yield from _valid((gathered(p), None))
    if p.new_key is not None:
        yield from _valid((p.replace(**appended(p), new_key=None, new_value=None), None))
    if p.cu_seqlens_q is None:
        for b in range(p.batch if p.batch > 1 else 0):
            names = ("query", "block_table", "new_key", "new_value", "lengths_q", "lengths_k")
            item = {n: getattr(p, n)[b : b + 1] for n in names if getattr(p, n) is not None}
            yield from _valid((p.replace(**item), None))
    for width, tensors in ((p.d_v, ["value", "new_value"]), (p.d_k, ["query", "key", "new_key"])):
        for part in _halves(width):
            given = {n: getattr(p, n)[..., part] for n in tensors if getattr(p, n) is not None}
            yield from _valid((p.replace(**given), None))


TILES = (8, 16, 32, 64, 128, 256)


def _steps(p: Problem, dout: Any) -> Iterator[Call]:
    """Yield smaller calls, those that take most away first."""
    if p.block_table is not None:
        yield from _of_pages(p)
        return
    if p.cu_seqlens_q is not None:
        yield from _shorter(p, dout)
    turned = ("rotary", *ROTARY)
    for names in ((*turned, "alibi_slopes", *POSITIONS), turned, ("alibi_slopes",), POSITIONS):
        if any(getattr(p, n) is not None for n in names):
            yield from _valid(lambda names=names: (p.replace(**dict.fromkeys(names)), dout))
    if has_norms(p):
        yield from _valid((p.replace(**dict.fromkeys((*NORMS, "norm_eps"))), dout))
    if p.dropout_p is not None:
        yield from _valid((p.replace(dropout_mask=None, dropout_p=None, **dict.fromkeys(PHILOX)), dout))
    for name in ("bias", "allowed", "sink", "softcap", "window", "causal", "scale", "state", "alpha"):
        if getattr(p, name) is not None and not (name == "causal" and p.window is not None):
            yield from _valid((p.replace(**{name: None}), dout))
    for side, width in enumerate(p.window or ()):
        for narrow in (width // 2, width - 1) if width else ():
            window = tuple(narrow if i == side else w for i, w in enumerate(p.window or ()))
            yield from _valid((p.replace(window=window), dout))
    group = p.heads // p.heads_kv
    for name, size in (("batch", p.batch), ("heads", p.heads_kv)):
        for part in _halves(size):
            if name == "batch":
                yield from _valid(_cut(p, dout, batch=part))
            else:
                yield from _valid(_cut(p, dout, heads=slice(part.start * group, part.stop * group), heads_kv=part))
    if group > 1:
        for at in range(group):
            yield from _valid(_cut(p, dout, heads=slice(at, None, group)))
    if p.cu_seqlens_q is None:
        for part in _halves(p.n_k):
            yield from _valid(_cut(p, dout, keys=part, **({"rows": part} if _by_token(p) else {})))
        for part in _halves(p.n_q) if not _by_token(p) else ():
            yield from _valid(_cut(p, dout, rows=part))
    for part in _halves(p.d_v):
        state = {} if p.state is None else {"state": p.state[..., part]}
        value, arriving = p.value[..., part], None if dout is None else dout[..., part]
        yield from _valid((p.replace(value=value, **state), arriving))
    for part in _halves(p.d_k):
        # the default scale is that of the width: keep it, so that a step changes one thing
        yield from _valid(_narrower(p, dout, part))
    yield from _simpler(p, dout)


def _by_token(p: Problem) -> bool:
    """Tell whether each token brings a query and a key: then both are cut together."""
    return isinstance(variant_of(p.variant).shape, Steps)


def _narrower(p: Problem, dout: Any, part: slice) -> Any:
    """Return a function that makes the call with some columns of queries and keys."""

    def make() -> Call:
        changed = {n: getattr(p, n)[..., part] for n in ("query", "key", *NORMS) if getattr(p, n) is not None}
        if p.state is not None:
            changed["state"] = np.concatenate([x[:, :, part] for x in np.split(p.state, p.state_parts, 2)], 2)
        if p.alpha is not None and p.alpha.shape[3] > 1:
            changed["alpha"] = p.alpha[..., part]
        return p.replace(**changed), dout

    return make


def _halves(n: int) -> Iterator[slice]:
    """Yield parts of a range of n: halves, then all but a quarter, then all but one."""
    seen = {(0, n)}
    for size in (n // 2, n - n // 4, n - 1):
        for start in (0, n - size):
            if size > 0 and (start, start + size) not in seen:
                seen.add((start, start + size))
                yield slice(start, start + size)


def _simpler(p: Problem, dout: Any) -> Iterator[Call]:
    """Yield the call with one tensor's numbers rounded to small integers."""
    for name in ("query", "key", "value", "bias", "sink", *RECURRENT, "dout"):
        x = dout if name == "dout" else getattr(p, name)
        if x is None:
            continue
        wide = np.asarray(x).astype(np.float64)
        with np.errstate(all="ignore"):
            whole = np.where(np.isfinite(wide), np.rint(wide), wide).astype(x.dtype)
        if whole.tobytes() != np.asarray(x).tobytes():
            yield from _valid((p, whole) if name == "dout" else (p.replace(**{name: whole}), dout))


def _shorter(p: Problem, dout: Any) -> Iterator[Call]:
    """Yield packed calls with one sequence alone, or dropped, or shorter."""
    segments = p.segments()
    for i, (rows, keys) in enumerate(segments):
        yield from _valid(_cut(p, dout, (None, None), rows=rows, keys=keys, sequences=slice(i, i + 1)))
        n_q, n_k = rows.stop - rows.start, keys.stop - keys.start
        parts: list[tuple[slice, slice] | None] = [None] if len(segments) > 1 else []
        some = [slice(rows.start + r.start, rows.start + r.stop) for r in _halves(n_q)]
        if _by_token(p):
            parts += [(r, r) for r in some]
        else:
            parts += [(r, keys) for r in some]
            parts += [(rows, slice(keys.start + k.start, keys.start + k.stop)) for k in _halves(n_k)]
        for part in parts:
            kept = segments[:i] + ([] if part is None else [part]) + segments[i + 1 :]
            at = [np.concatenate([np.arange(s[axis].start, s[axis].stop) for s in kept]) for axis in (0, 1)]
            offsets = [np.cumsum([0, *(s[axis].stop - s[axis].start for s in kept)], dtype=np.int32) for axis in (0, 1)]
            left = [j for j in range(len(segments)) if part is not None or j != i]
            yield from _valid(_cut(p, dout, offsets, rows=at[0], keys=at[1], sequences=left))


def _cut(p: Problem, dout: Any, offsets: Any = None, **parts: Any) -> Any:
    """Return a function that makes the call with parts of its axes: slices or indices."""

    def make() -> Call:
        b, h, hk, i, j = (parts.get(n, slice(None)) for n in ("batch", "heads", "heads_kv", "rows", "keys"))
        changed: dict[str, Any] = {"query": p.query[b][:, h][:, :, i]}
        changed |= {n: getattr(p, n)[b][:, hk][:, :, j] for n in ("key", "value")}
        for name in ("bias", "allowed", "dropout_mask"):
            x = getattr(p, name)
            if x is not None:
                for axis, at in enumerate((b, h, i, j)):
                    if x.shape[axis] > 1:
                        x = x[(slice(None),) * axis + (at,)]
                changed[name] = x
        if p.sink is not None:
            changed["sink"] = p.sink[h]
        if (slopes := p.alibi_slopes) is not None:
            changed["alibi_slopes"] = slopes[h] if slopes.ndim == 1 else slopes[b][:, h]
        for name, at in zip(POSITIONS, (i, j), strict=True):
            if (x := getattr(p, name)) is not None:
                changed[name] = x[at] if x.ndim == 1 else x[b][:, at]
        for name in GATES:
            if (x := getattr(p, name)) is not None:
                changed[name] = x[b][:, h][:, :, j]
        if p.state is not None:
            changed["state"] = p.state[parts.get("sequences", b)][:, h]
        changed = {n: np.ascontiguousarray(x) for n, x in changed.items()}
        changed["options"] = {n: _of_heads(p, n, x, h) for n, x in p.options.items()}
        if offsets is not None:
            changed |= {"cu_seqlens_q": offsets[0], "cu_seqlens_k": offsets[1]}
        return p.replace(**changed), None if dout is None else dout[b][:, h][:, :, i]

    return make


def _of_heads(p: Problem, name: str, x: Any, heads: slice) -> Any:
    """Return an operator's own option for some heads."""
    by_head = variant_of(p.variant).options[name].by_head and isinstance(x, tuple) and len(x) == p.heads
    return x[heads] if by_head else x


def _valid(call: Any) -> Iterator[Call]:
    """Yield a call that can be made."""
    try:
        yield call() if callable(call) else call
    except (InvalidProblem, UnsupportedProblem):
        return


def program(kernel: str, problem: Problem, dout: Any = None) -> str:
    """Return a call as a Python program that makes it and judges the kernel; its numbers are exact.

    Parameters
    ----------
    kernel : str
        The kernel's name, as ``refattn check`` takes it.
    problem : Problem
        The call, small.
    dout : array, optional
        The gradient arriving at out.
    """
    problem = problem.written_out()
    parts = [f"{n}={_literal(x)}" for n, x in problem.arrays().items()]
    parts += [f"{n}={v!r}" for n, v in problem.settings().items()]
    more = "" if dout is None else f", gradients={_literal(dout)}"
    own = named(problem.variant)
    return (
        "import numpy as np, refattn\n"
        f"{f'refattn.register({own!r}){chr(10)}' if own != problem.variant else ''}"
        f"p = refattn.Problem({', '.join(parts)})\n"
        f"print(*(c.message for c in refattn.check_problem({kernel!r}, p, 'found'{more}).failures))"
    )


def _literal(x: Any) -> str:
    a = np.asarray(x)
    if a.dtype == bool or np.issubdtype(a.dtype, np.integer):
        return f"np.array({a.tolist()}, {a.dtype.name!r})"
    numbers = str(a.astype(np.float64).tolist()).replace("nan", "np.nan").replace("inf", "np.inf")
    return f"np.array({numbers}).astype({a.dtype.name!r})"
