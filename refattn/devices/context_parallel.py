"""A function that computes attention on several ranks, each rank's result beside the exact one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..check.bounds.expected import Expected, expected
from ..check.compare import Worst, compare
from ..check.model import Model, flash
from ..check.report.report import Check, Report, element
from ..dtypes import FORMATS
from ..errors import KernelError, UnsupportedProblem, expect
from ..functions.arguments import whole
from ..problem import VARIANT, Problem
from .ranks import Ranks, function_of
from .shards import LAYOUTS, SETTINGS, Places, places

__all__ = ["check_context_parallel", "judged_ranks"]

Found = list[dict[str, NDArray[Any]]]
OF_ROWS, OF_KEYS = ("out", "lse", "dq"), ("dk", "dv")
CHUNK = 8
"""Rows to the smallest chunk of the calls that are drawn."""


def check_context_parallel(
    function: Any,
    *,
    world_size: int = 2,
    layout: str = "contiguous",
    problem: Problem | None = None,
    model: Model | None = None,
    backend: str = "gloo",
    seconds: float = 60.0,
    seed: int = 0,
) -> Report:
    """Check attention that several processes compute together, each on its shard of one call.

    Every rank is a process on this machine, in a group of torch.distributed. What it returns is compared
    with its rows, and its keys, of the exact answer of the whole call, element by element, by the bound of a kernel
    that merges parts as small as the layout's chunks.

    Parameters
    ----------
    function : callable or str
        ``function(shard)`` of a :class:`Shard`, called on every rank. It returns a mapping: "out", of the shape and
        type of the shard's rows, and if it likes "lse", and "dq", "dk", "dv" of the gradient ``shard.dout``. A function
        at the top level of a module, or its name, ``package.module:function`` or ``path/file.py:function``.
    world_size : int
        Ranks, 1 to 64.
    layout : {"contiguous", "zigzag", "striped"}
        Which rows and keys each rank has, as ``refattn.devices.shards.LAYOUTS`` says.
    problem : Problem, optional
        A call of query, key, value and numbers: no mask or bias as an array. By default seven calls with grouped
        heads are drawn, in float32: a causal one; one with keys that grow along the sequence, so that parts weigh
        unequally; two batch items without a mask, with a scale; causal ones with a window, with an offset, and with
        the other corner and more keys than queries; a softcap. A function raises UnsupportedProblem for what it does
        not take of ``shard.options``.
    model : Model, optional
        How the parts are computed and merged; by default a flash kernel's, merged in its accumulator. An implementation
        that rounds each part's out to 16 bits before the merge loses more: check it in float32.
    backend : {"gloo", "nccl"}
        The group's backend. With NCCL rank r has GPU r, and its shard is there.
    seconds : float
        The time limit of one call on all ranks, and of their start.
    seed : int
        What draws the calls, and dout.

    Returns
    -------
    Report
        A check for each call and rank, ``case/rank-r[dtype]``.

    Raises
    ------
    InvalidInput
        Which argument cannot be used, and what to change.
    KernelError
        A rank raised, ended its process, or was not done in time. Nothing is left running.
    """
    name, sent = function_of(function)
    number, cases = whole("seed", seed, 0), _cases(problem, world_size, layout, seed)
    expect(isinstance(model, Model | None), "model", model, "a Model, such as refattn.check.model.flash('float32')")
    checks: list[Check] = []
    with Ranks(world_size, backend, seconds) as ranks:
        for label, p in cases.items():
            chosen = model or _merging(p, world_size, layout)
            checks += judged_ranks(ranks, sent, p, layout, chosen, label=label, seed=number)
    models = {p.out_type: asdict(model or _merging(p, world_size, layout)) for p in cases.values()}
    return Report(name, VARIANT, tuple(checks), models=models, seed=number)


def judged_ranks(
    ranks: Ranks, function: bytes, problem: Problem, layout: str, model: Model, *, label: str = "call", seed: int = 0
) -> list[Check]:
    """Return the checks of one call, one for each rank of a group that is there; as :func:`check_context_parallel`."""
    start, size = time.perf_counter(), ranks.world_size
    p = problem.to("numpy")
    dout = _normal(np.random.default_rng([seed, 1]), p.out_shape, p.out_type)
    rows, keys = places(layout, p.n_q, size), places(layout, p.n_k, size)
    names = [f"{label}/rank-{r}[{p.out_type}]" for r in range(size)]
    try:
        found = ranks.run(function, _fields(p, dout, layout, rows, keys))
    except UnsupportedProblem as e:
        return [Check(n, "unsupported", message=str(e), seconds=time.perf_counter() - start) for n in names]
    _expect_results(found, p, rows, keys)
    known = dict.fromkeys(("out", "lse"), expected(p, model))
    if set(found[0]) - set(known):
        known |= dict.fromkeys(("dq", "dk", "dv"), expected(p, model, dout))
    took = (time.perf_counter() - start) / size
    by_rank = zip(names, found, rows, keys, strict=True)
    return [_check(n, list(_compared(x, q, k, known)), took) for n, x, q, k in by_rank]


def _cases(problem: Problem | None, world_size: int, layout: str, seed: int) -> dict[str, Problem]:
    """Return the calls by label, after looking whether each can be cut so."""
    size = whole("world_size", world_size, 1)
    expect(isinstance(layout, str) and layout in LAYOUTS, "layout", layout, f"one of {', '.join(LAYOUTS)}")
    if problem is None:
        n, rng = CHUNK * 2 * size, np.random.default_rng(whole("seed", seed, 0))
        q, k, v = (_normal(rng, (1, h, n, 16), "float32") for h in (4, 2, 2))
        plain = Problem(q, k, v, causal="bottom_right")
        growing = (k * np.linspace(0.1, 4, n, dtype=np.float32)[:, None]).astype(np.float32)
        # of two batch items, which the first says nothing of, and without a mask
        q, k, v = (_normal(rng, (2, h, n, 8), "float32") for h in (2, 1, 1))
        options = {"scaled": Problem(q, k, v, scale=0.7)}
        options["window"] = Problem(q[1:], k[1:], v[1:], causal="bottom_right", window=(n // 2 - 3, None))
        # each alone, so that what a function does not take is told for that option
        options["offset"] = Problem(q[1:], k[1:], v[1:], causal="bottom_right", offset=n // 4 + 1)
        options["softcap"] = Problem(q[1:], k[1:], v[1:], softcap=0.75)
        options["corner"] = Problem(q[1:, :, : n // 2], k[1:], v[1:], causal="top_left")
        return {"gaussian": plain, "growing": plain.replace(key=growing), **options}
    expect(isinstance(problem, Problem), "problem", problem, "a Problem")
    for name in (*problem.arrays(), *problem.settings()):
        good = name in ("query", "key", "value") or (name in SETTINGS and name not in problem.arrays())
        expect(good, "problem", name, f"a call of query, key, value and the numbers {', '.join(SETTINGS)} alone")
    for n in (problem.n_q, problem.n_k):
        places(layout, n, size)
    return {"call": problem}


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    form = FORMATS[dtype]
    return np.asarray(form.round_array(rng.standard_normal(shape)).astype(form.dtype))


def _merging(p: Problem, world_size: int, layout: str) -> Model:
    """Return the model of a flash kernel whose parts are as small as a layout's chunks."""
    smallest = p.n_k // (world_size * (2 if layout == "zigzag" else 1))
    return replace(flash(p.out_type), split=max(1, smallest))


def _fields(p: Problem, dout: Any, layout: str, rows: list[Places], keys: list[Places]) -> list[dict[str, Any]]:
    """Return what each rank's Shard holds."""
    options = {n: x for n, x in p.settings().items() if n in SETTINGS}
    same: dict[str, Any] = {"layout": layout, "world_size": len(rows), "n_q": p.n_q, "n_k": p.n_k, "options": options}
    by_rank = [
        {"query": p.query[:, :, i], "dout": dout[:, :, i], "key": p.key[:, :, j], "value": p.value[:, :, j]}
        for i, j in zip(rows, keys, strict=True)
    ]
    return [x | same | {"rank": r, "rows": rows[r], "keys": keys[r]} for r, x in enumerate(by_rank)]


def _expect_results(found: Found, p: Problem, rows: list[Places], keys: list[Places]) -> None:
    """Refuse results of other names, shapes or types than the contract's."""
    for r, given in enumerate(found):
        unknown = sorted(set(given) - {*OF_ROWS, *OF_KEYS})
        if "out" not in given or unknown:
            raise KernelError(
                f"rank {r}: the function returned {', '.join(map(repr, given)) or 'nothing'}; expected 'out' and, if "
                "it likes, 'lse', 'dq', 'dk', 'dv'"
            )
        if set(given) != set(found[0]):
            raise KernelError(f"rank {r}: the function returned {', '.join(given)}, on rank 0 {', '.join(found[0])}")
        q, k = len(rows[r]), len(keys[r])
        shapes = {
            "out": (p.batch, p.heads, q, p.d_v),
            "lse": (p.batch, p.heads, q),
            "dq": (p.batch, p.heads, q, p.d_k),
            "dk": (p.batch, p.heads_kv, k, p.d_k),
            "dv": (p.batch, p.heads_kv, k, p.d_v),
        }
        for name, x in given.items():
            if x.shape != shapes[name]:
                raise KernelError(f"rank {r}: {name}: got shape {x.shape}, expected {shapes[name]}")
            good = (p.out_type,) if name != "lse" else tuple(FORMATS)
            if x.dtype.name not in good:
                raise KernelError(f"rank {r}: {name}: got dtype {x.dtype.name}, expected {' or '.join(good)}")


def _compared(given: Mapping[str, Any], rows: Places, keys: Places, known: Mapping[str, Expected]) -> Iterator[Worst]:
    """Yield the worst element of each array of one rank, at its place in the whole call.

    What other ranks have is filled with the exact values.
    """
    for name, x in given.items():
        of = known[name]
        filled = of.answer.enclosures[name].mid.copy()
        filled[:, :, rows if name in OF_ROWS else keys] = x.astype(np.float64)
        yield compare(name, filled, of.answer, of.allowed[name], x.dtype.name)


def _check(name: str, found: list[Worst], seconds: float) -> Check:
    top = max(found, key=lambda w: (not w.passed, w.ratio))
    bad = [w for w in found if not w.passed]
    message = "; ".join(f"{element(w)} ({', '.join(w.symptoms)})" for w in bad)
    return Check(name, "failed" if bad else "passed", top, message, seconds, tuple(found))
