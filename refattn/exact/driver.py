"""The driver: run a definition in balls, raise the precision until the answer is decided."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import dtype_name, kind_of, to_float64, to_numpy
from ..dtypes import FORMATS, Format, format_of
from ..errors import InvalidInput, InvalidProblem, UnsupportedProblem
from ..masks import unused
from ..problem import Problem
from ..variants import Steps, variant_of
from .answer import Answer
from .anywhere import narrowed, on_host
from .arithmetics import Balls, Floats
from .device.asked import asked, on
from .device.card import Card
from .enclosure import Enclosure, Fetched
from .field import Field
from .levels import Level
from .lowering import lower
from .matrix import UnsureSign
from .parts import Part, fingerprint, parts, whole, work_through
from .run import Raw, RowsByHead, Work, run
from .state import State
from .ties import decide_by_ends, exact_lse, exact_ties

__all__ = ["check_arriving", "enclose", "evaluate", "reference"]

START = {53: 2, 24: 1, 11: 0, 8: 0, 4: 0, 3: 0}  # the first level by the precision of the result
START_BACK = START | {53: 3}  # what a level leaves open of dk and dv costs a forward pass of the next
LADDER = tuple(128 * 2**i for i in range(12))  # 128 ... 262144 bits
FEW_KEYS = 1 / 16  # of all: so many go on alone with what the rows know
EXACT_FROM = 256  # what these bits leave open is tested for being exact


def evaluate(
    problem: Problem,
    bits: int = 128,
    *,
    rounding: str | None = None,
    lse_rounding: str | None = None,
    gradients: Any = None,
    dlse: Any = None,
    dstate_out: Any = None,
    n_jobs: int | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    device: str = "cpu",
) -> Answer:
    """Evaluate one attention call exactly.

    Inputs are taken as the exact numbers that they are; scale None is the exact real number.

    Parameters
    ----------
    problem : Problem
        The call.
    bits : int
        Working precision of the balls (from 32); the radius is proven whatever it is. Not used with `rounding`.
    rounding : str, optional
        A format of ``refattn.dtypes.FORMATS``: every value is then the correctly rounded one, to nearest, ties to even,
        found by raising the precision until the rounding is decided; exact ties and zeros are recognised.
    lse_rounding : str, optional
        Another format for lse, which is often kept wider than out.
    gradients : (b, h_q, n_q, d_v) array, optional
        The gradient arriving at out: asks for dq, dk, dv, dbias, dsink, dalpha, dbeta, deta,
        dstate, those whose inputs the call has.
    dlse : (b, h_q, n_q) array, optional
        The gradient arriving at lse, beside the one at out (or alone): the score of key j gets p_ij dlse_i more. A row
        without keys passes nothing on, but to its sink.
    dstate_out : array of the state's shape, optional
        Of a recurrence: the gradient arriving at its last state, beside the one at out (or alone).
    n_jobs : int, optional
        With `rounding`: processes for batches, heads and blocks of rows (by joblib, where it is installed), or threads
        where there is one part; None is this process, a thread for each core. The answer does not depend on it.
    checkpoint : path, optional
        With `rounding`: a folder that keeps finished parts; the same call goes on from there after an interrupt.
    progress : callable, optional
        Called as ``progress(done, total)`` after each part.
    device : str
        "cpu", or with `rounding` an NVIDIA GPU: "cuda" (CuPy's current one), "cuda:0" and so on. There it computes all
        operators but recurrences, and their gradients, to the same bits; what is left undecided goes on in Arb on the
        CPU.

    Returns
    -------
    Answer
        Values with a proven radius for each element.

    Raises
    ------
    InvalidProblem, InvalidInput
        An option that the operator does not take; `bits`, `rounding` or `gradients` that make no sense.
    UnsupportedProblem
        An option of Problem that means nothing for the operator; gradients of non-finite inputs; what a GPU does not
        compute, no GPU, too little memory of it (says how much is needed), or one whose arithmetic is not trusted.
    """
    if not isinstance(problem, Problem):
        what = type(problem).__name__
        raise InvalidInput(f"problem: got {what}, expected a Problem; write evaluate(Problem(query, key, value))")
    lowered = lower(problem)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 32 <= bits <= 2**20:
        raise InvalidInput(f"bits: got {bits!r}, expected an integer from 32 to {2**20}")
    if n_jobs is not None and (isinstance(n_jobs, bool) or not isinstance(n_jobs, int) or n_jobs < 1):
        raise InvalidInput(f"n_jobs: got {n_jobs!r}, expected an integer of at least 1 or None")
    card = asked(device, problem, rounding, n_jobs=n_jobs, checkpoint=checkpoint, progress=progress)
    threads = n_jobs or os.cpu_count() or 1
    dout, at_lse = _both(problem, gradients, dlse, dstate_out)
    if lowered.problem is not problem:
        more: Any = {
            "dlse": dlse,
            "dstate_out": dstate_out,
            "n_jobs": n_jobs,
            "checkpoint": checkpoint,
            "progress": progress,
        }
        more["device"] = device
        answer = evaluate(
            lowered.problem, bits, rounding=rounding, lse_rounding=lse_rounding, gradients=gradients, **more
        )
        return replace(answer, problem=problem, core=answer.core or lowered.problem, margins=lowered.margins)
    if rounding is None:
        balls = Balls(bits)
        with balls.working():
            raw = _over_balls(Work(problem, dout, dlse=at_lse), balls)
            enclosures = {n: Enclosure.of(x) for n, x in raw.items()}
        return Answer(problem, {n: e.mid for n, e in enclosures.items()}, enclosures, None, {}, raw)
    form, lse_form = format_of(rounding), format_of(lse_rounding or rounding)
    if card is not None:
        with on(card):
            return _rounded(problem, form, lse_form, dout, threads, at_lse, card)
    cut = at_lse is None and (checkpoint is not None or progress is not None or (n_jobs or 1) > 1)
    pieces = parts(problem, dout) if cut else []
    if len(pieces) < 2 and checkpoint is None:
        return _rounded(problem, form, lse_form, dout, threads, at_lse)
    pieces = pieces or [whole(problem, dout, at_lse)]
    return _in_parts(problem, form, lse_form, dout, pieces, n_jobs or 1, threads, checkpoint, progress)


def enclose(problem: Problem, level: int = 2, *, gradients: Any = None, device: str = "cpu") -> Answer:
    """Return values with a proven radius from one run in certified floating point: the fastest proven answer.

    Parameters
    ----------
    problem : Problem
        The call.
    level : int
        0 to 3: about 20, 40, 60 and 80 bits where nothing cancels. Where it proves nothing, a number is left to
        :func:`evaluate`.
    gradients : (b, h_q, n_q, d_v) array, optional
        As in :func:`evaluate`, which says what is raised, too.
    device : str
        As in :func:`evaluate`.
    """
    lowered, card = lower(problem), asked(device, problem, "float64")
    if lowered.problem is not problem:
        answer = enclose(lowered.problem, level, gradients=gradients, device=device)
        return replace(answer, problem=problem, core=answer.core or lowered.problem, margins=lowered.margins)
    dout = None if gradients is None else _arriving(problem, gradients)
    try:
        with on(card):
            work, need = Work(problem, dout, os.cpu_count() or 1, device=card), np.ones(problem.out_shape[:3], bool)
            raw = {n: on_host(x) for n, x in work.run(Level(level, card), need, None, {}).items()}
    except UnsureSign:
        return evaluate(problem, rounding="float64", gradients=gradients)
    enclosures = {n: _enclosed(x) for n, x in raw.items()}
    if any(np.isinf(e.radius).any() for e in enclosures.values()):
        return evaluate(problem, rounding="float64", gradients=gradients, device=device)
    return Answer(problem, {n: e.mid for n, e in enclosures.items()}, enclosures, None, {}, {})


def reference(problem: Problem, dtype: Any = np.float64) -> dict[str, NDArray[Any]]:
    """Return the definition run in plain NumPy floating point, by name: what a careful user would write, no proof."""
    return run(problem, Floats(dtype))


def _both(
    problem: Problem, gradients: Any, dlse: Any, dstate_out: Any
) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Return the gradients that arrive at out and at what comes beside it: lse, or a recurrence's last state.

    The one at out is 0 where only the other is there.
    """
    variant = variant_of(problem.variant)
    if dlse is not None and not variant.has_lse:
        raise UnsupportedProblem(f"dlse: {problem.variant} attention has no lse; leave it out")
    if dstate_out is not None and not isinstance(variant.shape, Steps):
        raise UnsupportedProblem(f"dstate_out: {problem.variant} attention has no state; leave it out")
    if dlse is None and dstate_out is None:
        return None if gradients is None else _arriving(problem, gradients), None
    other = _arriving(problem, dlse, "dlse") if dstate_out is None else _arriving(problem, dstate_out, "dstate_out")
    return np.zeros(problem.out_shape) if gradients is None else _arriving(problem, gradients), other


def check_arriving(problem: Problem, x: Any, name: str = "gradients") -> None:
    """Refuse an arriving gradient that is no array of the right shape and type."""
    of, shape = {
        "gradients": ("out", problem.out_shape),
        "dlse": ("lse", problem.out_shape[:3]),
        "dstate_out": ("the state", problem.state_shape),
    }[name]
    if kind_of(x) is None or tuple(x.shape) != shape:
        got = tuple(getattr(x, "shape", ())) or type(x).__name__
        raise InvalidProblem(f"{name}: got {got}, expected an array of {of}'s shape {shape}")
    if dtype_name(x) not in FORMATS:
        raise InvalidProblem(f"{name}: got dtype {dtype_name(x)}, expected one of {', '.join(FORMATS)}; cast it")


def _arriving(problem: Problem, x: Any, name: str = "gradients") -> NDArray[np.float64]:
    if problem.block_table is not None:
        raise UnsupportedProblem(f"{name}: keys in pages have none; ask for those of refattn.pages.gathered(problem)")
    check_arriving(problem, x, name)
    wide = to_float64(to_numpy(x))
    if name != "dstate_out" and (gone := unused(problem)) is not None:
        rows = gone[0][:, None, :]
        wide = np.where(rows if wide.ndim == 3 else rows[..., None], 0.0, wide)
    if not np.isfinite(wide).all():
        raise UnsupportedProblem(f"{name}: NaN or inf in the arriving gradient; remove it")
    return wide


def _rounded(
    problem: Problem,
    form: Format,
    lse_form: Format,
    dout: NDArray[np.float64] | None,
    threads: int,
    dlse: NDArray[np.float64] | None = None,
    device: Card | None = None,
) -> Answer:
    need = np.ones(problem.out_shape[:3], bool)
    own_bias = problem.bias is not None and problem.bias.shape == (*problem.out_shape[:3], problem.n_k)
    state = State(form, lse_form, ("out", "lse", "dq", "dbias") if own_bias else ("out", "lse", "dq"))
    work = Work(problem, dout, threads, dlse, device)
    by_key, keys = work.by_keys, None
    first = (START if dout is None else START_BACK)[form.precision]
    levels: list[Level | Balls] = [Level(level, device) for level in range(first, 4)]
    levels += [Balls(bits) for bits in LADDER]
    for f in levels:
        start = time.perf_counter()
        with f.working() if isinstance(f, Balls) else nullcontext():
            known: RowsByHead = {}
            try:
                if isinstance(f, Balls):
                    raw = _over_balls(work, f, need, keys, known, state.open_columns() if work.by_columns else None)
                else:
                    raw = work.run(f, need, keys, known)
            except UnsureSign:
                if f is levels[-1]:
                    raise
                continue
            enclose = Enclosure.of if isinstance(f, Balls) else _enclosed if device is None else device.enclosed
            state.take(raw, need, keys, enclose)
            boundaries = decide_by_ends(raw, state) if isinstance(f, Balls) else {}
            if by_key and keys is None and isinstance(f, Level) and (few := _few_keys(state)) is not None:
                # again, one level up, with what this level's rows know
                none = np.zeros_like(need)
                raw = work.run(Level(min(f.level + 1, 3), device), none, few, known)
                state.take(raw, none, few, enclose)
        if isinstance(f, Balls) and f.bits == EXACT_FROM and not state.done:
            exact_lse(problem, state, boundaries)
            exact_ties(work, state, state.open_rows(), boundaries)
        state.count(f.name, time.perf_counter() - start)
        if state.done:
            break
        keys = _few_keys(state) if by_key and not state.sums_open else None
        need = state.open_rows(keys_apart=keys is not None)
    typed = {n: narrowed(v, state.form(n), device) for n, v in state.values.items()}
    open_ = {n: d.size - int(np.count_nonzero(d)) for n, d in state.decided.items()}
    enclosures = state.enclosures if device is None else Fetched(state.enclosures)
    return Answer(problem, typed, enclosures, form.name, open_, {}, state.stats, state.decided)


def _over_balls(work: Work, f: Balls, *some: Any) -> Raw:
    """Run a call over balls; signs of a gradient's relus that these leave open are looked up in a prime field."""
    raw = work.run(f, *some)
    if not f.doubts:
        return raw
    field, again = Field(work.p.d_k), Balls(f.bits)
    try:
        work.run(field, *some[:2])
    except (UnsupportedProblem, ZeroDivisionError):
        return raw
    again.signs = field.signs
    return work.run(again, *some[:2])


def _in_parts(
    problem: Problem,
    form: Format,
    lse_form: Format,
    dout: NDArray[np.float64] | None,
    pieces: list[Part],
    n_jobs: int,
    threads: int,
    checkpoint: str | Path | None,
    progress: Callable[[int, int], None] | None,
) -> Answer:
    name = fingerprint(problem, form.name, lse_form.name, len(pieces), dout=dout, dlse=pieces[0].dlse)
    each = partial(_part, form=form, lse_form=lse_form, threads=threads if n_jobs == 1 else 1)
    folder = None if checkpoint is None else Path(checkpoint)
    found: dict[str, NDArray[Any]] = {}
    stats: dict[str, dict[str, float]] = {}
    for part, arrays in work_through(pieces, each, n_jobs, folder, name, progress):
        for key, x in arrays.items():
            if key.startswith("stats "):
                row = stats.setdefault(key[6:], {"decided": 0, "seconds": 0.0})
                row["decided"] += float(x[0])
                row["seconds"] += float(x[1])
                continue
            array = key.split(".")[0]
            if key not in found:
                found[key] = np.zeros(_shape(problem, array), x.dtype)
            found[key][part.place(array)] = x
    names = {k.split(".")[0] for k in found}
    enclosures = {n: Enclosure(*(found[f"{n}.{p}"] for p in ("mid", "tail", "radius"))) for n in names}
    undecided = {n: int((~found[f"{n}.decided"]).sum()) for n in names}
    return Answer(problem, {n: found[f"{n}.value"] for n in names}, enclosures, form.name, undecided, {}, stats)


def _part(part: Part, form: Format, lse_form: Format, threads: int) -> dict[str, NDArray[Any]]:
    a = _rounded(part.problem, form, lse_form, part.dout, threads, part.dlse)
    out: dict[str, NDArray[Any]] = {}
    for n, x in a.values.items():
        e = a.enclosures[n]
        out |= {f"{n}.value": x, f"{n}.mid": e.mid, f"{n}.tail": e.tail, f"{n}.radius": e.radius}
        out[f"{n}.decided"] = a.decided[n]
    return out | {f"stats {t}": np.array([s["decided"], s["seconds"]]) for t, s in a.stats.items()}


def _shape(problem: Problem, name: str) -> tuple[int, ...]:
    if name == "state":
        return problem.state_shape
    if name in ("out", "lse"):
        return problem.out_shape if name == "out" else problem.out_shape[:3]
    source = {"dq": "query", "dk": "key", "dv": "value"}.get(name, name[1:])
    return tuple(getattr(problem, source).shape)


def _enclosed(x: NDArray[np.float64]) -> Enclosure:
    """Return a level's numbers as enclosures; where anything is no number, nothing is proven."""
    lost = ~np.isfinite(x).all(-1) & ~((x[..., 1] == 0) & (x[..., 2] == 0))
    mid, tail, radius = np.moveaxis(x, -1, 0)
    if not lost.any():
        return Enclosure(mid, tail, radius)
    return Enclosure(np.where(lost, np.nan, mid), np.where(lost, 0.0, tail), np.where(lost, np.inf, radius))


def _few_keys(state: State) -> NDArray[np.bool_] | None:
    """Return the keys with an open gradient, (b, h_kv, n_k), where these are few."""
    keys = state.open_keys()
    return keys if 0 < keys.sum() < FEW_KEYS * keys.size else None
