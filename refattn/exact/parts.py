"""A call in parts that know nothing of one another: for many processes or machines, and for going on after a stop."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import native
from ..errors import InvalidInput, WorkerDied
from ..files import load_arrays, plain, save_arrays, sync
from ..masks import both, visible
from ..norms import has_norms
from ..positions import part_of
from ..problem import Problem
from ..rules import Rule, View
from ..variants import Rows, Variant, variant_of
from ..variants.own import definition, know, portable
from ..version import VERSION

__all__ = ["Part", "by_rows", "fingerprint", "parts", "whole", "work_through"]

ROWS = 2048  # query rows to a part

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """One key head of one batch, or a block of its rows: what to evaluate, and where its arrays belong."""

    problem: Problem
    dout: NDArray[np.float64] | None
    batch: int
    heads: slice
    head_kv: int
    rows: slice
    dlse: NDArray[np.float64] | None = None

    def place(self, name: str) -> tuple[Any, ...]:
        """Return the index of one of its arrays in the whole."""
        if self.batch < 0:
            return (...,)
        b = slice(self.batch, self.batch + 1)
        if name in ("dk", "dv"):
            return (b, slice(self.head_kv, self.head_kv + 1))
        return (self.heads,) if name == "dsink" else (b, self.heads, self.rows)


def parts(problem: Problem, dout: NDArray[np.float64] | None, rows: int | None = None) -> list[Part]:
    """Cut a call along batches, key heads and, where no gradient is asked for, blocks of so many rows.

    A gradient that is a sum over batches or heads (of a bias, a sink or weights that they share) keeps the call whole,
    and so does an operator in which places count (distances, a recurrence) or heads have options of their own, and
    lengths.
    """
    p = problem.to("numpy")
    shared = (p.bias is not None and (p.bias.shape[0] < p.batch or p.bias.shape[1] < p.heads)) or (
        p.sink is not None and p.batch > 1
    )
    shared = shared or has_norms(p) or p.alibi_slopes is not None
    ragged = any(x is not None and not isinstance(x, int) for x in (p.lengths_q, p.lengths_k, p.offset))
    if p.cu_seqlens_q is not None or ragged or not by_rows(p) or (dout is not None and shared):
        return []
    return list(_parts(p, dout, rows or ROWS))


def by_rows(problem: Problem) -> bool:
    """Tell whether a row of a call's operator stands alone: it is no recurrence, and places count in no option."""
    v = variant_of(problem.variant)
    placed = v.places or any(o.places and n in problem.options for n, o in v.options.items())
    return isinstance(v.shape, Rows) and not v.shape.together and not placed


def whole(problem: Problem, dout: NDArray[np.float64] | None, dlse: NDArray[np.float64] | None = None) -> Part:
    """Return a call that cannot be cut as its only part."""
    p = problem.to("numpy")
    return Part(p, dout, -1, slice(0, p.heads), 0, slice(0, p.n_q), dlse)


def _parts(p: Problem, dout: NDArray[np.float64] | None, size: int) -> Iterator[Part]:
    group = p.heads // p.heads_kv
    # a block of rows needs its mask written out
    masked = (p.causal or p.window) and "allowed" not in variant_of(p.variant).uses
    step = size if dout is None and not masked else max(p.n_q, 1)
    for b in range(p.batch):
        for h in range(p.heads_kv):
            heads = slice(h * group, (h + 1) * group)
            for i in range(0, max(p.n_q, 1), step):
                rows = slice(i, min(i + step, p.n_q))
                cut: dict[str, Any] = {
                    "query": p.query[b : b + 1, heads, rows],
                    "key": p.key[b : b + 1, h : h + 1],
                    "value": p.value[b : b + 1, h : h + 1],
                    "sink": None if p.sink is None else p.sink[heads],
                    "bias": _block(p.bias, b, heads, rows),
                    "allowed": _allowed(p, b, heads, rows),
                    "weight": _block(p.weight, b, heads, rows),
                    "dropout_mask": _block(p.dropout_mask, b, heads, rows),
                }
                if rows != slice(0, p.n_q) and (p.causal or p.window):
                    # a block of rows is not aligned as the whole is: write its mask out
                    rule = p.replace(bias=None, allowed=None)
                    mask = visible(rule, b, h * group, slice(0, p.n_q), slice(0, p.n_k))[rows][None, None]
                    cut["allowed"] = both(cut["allowed"], mask)
                    cut |= {"causal": None, "window": None}
                cut |= part_of(p, b, heads, rows)
                yield Part(p.replace(**cut), None if dout is None else dout[b : b + 1, heads], b, heads, h, rows)


def _allowed(p: Problem, b: int, heads: slice, rows: slice) -> Any:
    """Return a part's own mask: a rule's is written out, unless it is of all rows and the same for all batches."""
    rule = p.allowed
    if not isinstance(rule, Rule):
        return _block(rule, b, heads, rows)
    if rows == slice(0, p.n_q) and (rule.batches, rule.heads) == (1, 1):
        return rule
    each = range(heads.start, heads.stop if rule.heads > 1 else heads.start + 1)
    return np.stack([View.of(rule, p.n_q, p.n_k, b if rule.batches > 1 else 0, h)[rows] for h in each])[None]


def _block(x: Any, b: int, heads: slice, rows: slice) -> Any:
    if x is None:
        return None
    x = x[b : b + 1] if x.shape[0] > 1 else x
    x = x[:, heads] if x.shape[1] > 1 else x
    return x[:, :, rows] if x.shape[2] > 1 else x


def fingerprint(problem: Problem, *more: Any, **arriving: NDArray[np.float64] | None) -> str:
    """Return a name for a call and how it is evaluated, by what version: those with the same one have one answer."""
    about = [VERSION, problem.settings() | {"allowed": None}, definition(problem.variant), more]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=plain).encode())
    arrays = problem.to("numpy").arrays() | {n: x for n, x in arriving.items() if x is not None}
    for name, x in sorted(arrays.items()):
        x = native(x)  # else other numbers in the other byte order have these bytes
        digest.update(f"{name} {x.dtype.name} {x.dtype.str} {x.shape}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    if isinstance(problem.allowed, Rule):
        digest.update(pickle.dumps(problem.allowed))
    return digest.hexdigest()[:24]


def work_through(
    todo: list[Part],
    evaluate: Callable[[Part], Arrays],
    n_jobs: int,
    folder: Path | None,
    name: str,
    tell: Callable[[int, int], None] | None,
) -> Iterator[tuple[Part, Arrays]]:
    """Yield the arrays of every part, those found in the checkpoint folder first.

    Each part is written whole as soon as it is done, so an interrupt loses only parts under way. Processes come from
    joblib where it is installed: within ``joblib.parallel_config(backend="dask")`` they are a cluster's.
    """
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sync(folder.parent)
        except OSError as e:
            raise InvalidInput(f"checkpoint: {folder} cannot be made ({e.strerror}); choose another folder") from e
    done, files = 0, [None if folder is None else folder / f"{name}-{i}.npz" for i in range(len(todo))]
    left = []
    for i, part in enumerate(todo):
        path = files[i]
        if path is not None and path.is_file():
            done += 1
            yield part, load_arrays(path)
        else:
            left.append(i)
    if tell is not None:
        tell(done, len(todo))
    for i, arrays in _run(left, todo, evaluate, n_jobs):
        path = files[i]
        if path is not None:
            save_arrays(arrays, path)
        done += 1
        if tell is not None:
            tell(done, len(todo))
        yield todo[i], arrays


def _run(
    left: list[int], todo: list[Part], evaluate: Callable[[Part], Arrays], n_jobs: int
) -> Iterator[tuple[int, Arrays]]:
    if n_jobs == 1 or len(left) < 2 or importlib.util.find_spec("joblib") is None:
        for i in left:
            yield i, evaluate(todo[i])
        return
    from joblib import Parallel, delayed

    own = portable(todo[0].problem.variant)
    calls = (delayed(_numbered)(i, evaluate, todo[i], own) for i in left)
    try:
        yield from Parallel(n_jobs=n_jobs, return_as="generator_unordered")(calls)
    except BrokenExecutor as e:
        raise WorkerDied(
            "n_jobs: a worker process died, perhaps for want of memory; use fewer, "
            "and checkpoint= to go on from the parts that are done"
        ) from e


def _numbered(i: int, evaluate: Callable[[Part], Arrays], part: Part, own: Variant | str | None) -> tuple[int, Arrays]:
    know(own)
    return i, evaluate(part)
