"""Run the checks of a kernel."""

from __future__ import annotations

import fnmatch
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..dtypes import FORMATS, no_format
from ..errors import InvalidInput, KernelError, UnsupportedProblem, expect
from ..exact.blas import one_thread
from ..exact.driver import enclose
from ..problem import VARIANT, Problem
from ..variants import Steps, variant_of
from .ahead import Ahead
from .bounds.expected import Expected, Key, UnboundedError, bounded, expected, of_answer, of_case, unbounded
from .bounds.truth import device_of, made_by, on_device
from .call import Function, Result, call_gradients, call_kernel
from .compare import Worst, against
from .diagnose.rules import verdicts
from .inputs.families import Case, calls, cases, fitted
from .inputs.sample import WHOLE, Sample
from .kernel import Kernel
from .laws import LAWS, Law, law_problem
from .model import Capabilities, Model, ModelFor
from .native import lost
from .probe import probed
from .report.report import Check, Report
from .settle import Notes, settled, unasked
from .suspects import suspects
from .trial import Trial

__all__ = ["Item", "check_kernel", "failing", "guarded", "judged", "judged_gradients", "plan"]


@dataclass(frozen=True)
class Item:
    """One check to run: its name, its format, the call that runs it, and what exact answer that needs."""

    name: str
    dtype: str
    run: Callable[[], Check]
    key: Key | None = None


def check_kernel(
    kernel: Function | Kernel,
    variant: str = VARIANT,
    *,
    model: Model | ModelFor | None = None,
    capabilities: Capabilities | None = None,
    dtypes: Sequence[str] | None = None,
    only: str | None = None,
    budget: str = "ci",
    seed: int | None = None,
    seconds: float | None = None,
    name: str | None = None,
    version: str = "",
    progress: Callable[[Item], None] | None = None,
    n_jobs: int = 1,
) -> Report:
    """Check a kernel against the exact answer, on every input family and law of an operator.

    Parameters
    ----------
    kernel : callable
        ``kernel(problem) -> out`` or ``(out, lse)``; the problem's arrays are NumPy arrays, and
        ``problem.to("torch")`` gives the same call in another library.
    variant : str
        The operator that the kernel computes.
    model : Model, or a function from a format's name to one
        How the kernel rounds; by default a flash kernel's model. There is no tolerance to set.
    capabilities : Capabilities
        What the kernel can do; by default the kernel's attribute ``capabilities``, or float32 with every feature.
    dtypes : sequence of str
        Formats to check, by default all that the capabilities name.
    only : str
        Run only the checks whose name is this (with its format or without), or matches it as a shell pattern; with
        "!" before it, all others.
    budget : str
        "quick" (seconds), "ci" (every case) or "nightly" (every case in several draws).
    seed : int
        What the family "calls" is drawn by; by default another in every run. The report has it.
    seconds : float
        Stop after the check in which so much time is over; those of the budget "quick" run first.
    name, version : str
        What to call the kernel in the report.
    progress : callable
        Called with each Item before it runs.
    n_jobs : int
        Processes: those beside this one make exact answers ahead. The kernel runs in this one.

    Returns
    -------
    Report

    Raises
    ------
    InvalidInput
        An unknown variant, format or budget, or `only` matches nothing.
    """
    judged = Kernel.of(kernel, model=model, capabilities=capabilities, name=name, version=version)
    seed = secrets.randbelow(2**31) if seed is None else seed
    expect(_whole(seed) and seed >= 0, "seed", seed, "an integer of at least 0")
    expect(_whole(n_jobs) and n_jobs >= 1, "n_jobs", n_jobs, "an integer of at least 1")
    expect(isinstance(only, str | None), "only", only, "a name or a shell pattern")
    number = isinstance(seconds, Real) and not isinstance(seconds, bool)
    expect(seconds is None or (number and seconds > 0), "seconds", seconds, "a number above 0")
    items = plan(judged, variant, dtypes=dtypes, only=only, budget=budget, seed=seed)
    if seconds is not None:
        first = {i.name for i in plan(judged, variant, dtypes=dtypes, budget="quick", seed=seed)}
        items.sort(key=lambda i: i.name not in first)
    done, gone, there, start = list[Check](), "", not lost(judged.capabilities), time.perf_counter()
    with on_device(device_of(judged.capabilities)) as truth, Ahead([i.key for i in items if i.key], n_jobs) as ahead:
        for item in items:
            if seconds is not None and time.perf_counter() - start > seconds:
                break
            if progress is not None:
                progress(item)
            ahead.prepare(item.key)
            done.append(item.run())
            if there and done[-1].verdict != "passed" and lost(judged.capabilities):
                gone, text = item.name, f"the kernel lost the device: {done[-1].message}"
                done[-1] = replace(done[-1], verdict="failed", message=text)
                break
    left, models = len(items) - len(done), {d: asdict(judged.model(d)) for d in sorted({i.dtype for i in items})}
    missed = unasked(judged, variant, done) if only is None else ()
    whole = only is None and budget != "quick" and not left
    return Report(
        judged.name, variant, tuple(done), judged.version, models, judged.capabilities.edges, whole, seed, left, budget,
        unasked=missed, truth=str(truth), lost=gone,
    )  # fmt: skip


def _whole(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def plan(
    kernel: Function | Kernel,
    variant: str = VARIANT,
    *,
    model: Model | ModelFor | None = None,
    capabilities: Capabilities | None = None,
    dtypes: Sequence[str] | None = None,
    only: str | None = None,
    budget: str = "ci",
    seed: int = 0,
) -> list[Item]:
    """Return the checks of a kernel without running them; the arguments are those of :func:`check_kernel`."""
    known, v, by_seed = cases(variant, budget), variant_of(variant), asked(only, "calls")  # those of models are fixed
    judged = Kernel.of(kernel, model=model, capabilities=capabilities)
    able = judged.capabilities
    fitting = able if judged.declared or not by_seed else probed(judged, variant)
    drawn = calls(variant, fitting, budget, seed if by_seed else None) if by_seed or asked(only, "models") else []
    expect(not isinstance(dtypes, str) and dtypes != [], "dtypes", dtypes, "a sequence of names, or None")
    unknown = [d for d in dtypes or () if d not in FORMATS]
    if unknown:
        raise no_format("dtype", unknown[0])
    if able.gradients and isinstance(v.shape, Steps) and v.rows is None:
        raise InvalidInput(
            f"gradients: {v.name} has no form with all tokens at once, from which their bounds follow; add one to "
            "forms=, or leave gradients out of the capabilities"
        )
    wanted = tuple(dtypes or [d for d in FORMATS if d in able.dtypes])
    given = [c for c in (fitted(c, able) for c in known if asked(only, c.family)) if c is not None]
    items = []
    for dtype in wanted:
        for case in given + drawn:
            if (not case.dtypes or dtype in case.dtypes) and case.says(judged.model(dtype)):
                key = (case, dtype, judged.model(dtype), False)
                items.append(Item(f"{case.name}[{dtype}]", dtype, _case_run(judged, case, dtype), key))
                if able.gradients and case.backward and not judged.model(dtype).forward_only:
                    name = f"{case.name}/gradients[{dtype}]"
                    items.append(Item(name, dtype, _gradients_run(judged, case, dtype, name), (*key[:3], True)))
        for law in (LAWS[n] for n in v.laws):
            name = f"law/{law.name}[{dtype}]"
            if not law.named_only or only == name:
                items.append(Item(name, dtype, _law_run(judged, law, dtype, variant)))
    if only is not None:
        items = [i for i in items if matches(i.name, only)]
        if not items:
            where = f"refattn list --checks {variant} shows the names"
            more = ", of which quick has some" if budget == "quick" else ""
            raise InvalidInput(f"only: no check of {variant} is named {only!r}; {where}{more}")
    return items


def asked(only: str | None, family: str) -> bool:
    """Tell whether some check of a family may be among those asked for: drawing calls for none takes half a second."""
    if only is None:
        return True
    if only.startswith("!"):
        head, _, rest = only[1:].partition("/")
        return not (rest == "*" and fnmatch.fnmatchcase(family, head))
    literal = re.split(r"[*?]", only)[0]
    return f"{family}/".startswith(literal) or literal.startswith(f"{family}/")


def matches(name: str, only: str | None) -> bool:
    """Tell whether a check's name is `only`, with its format or without, or matches it as a shell pattern.

    Brackets stand for themselves; a pattern that starts with "!" takes all other names.
    """
    if only is None:
        return True
    if only.startswith("!"):
        return not matches(name, only[1:])
    return only in (name, name.rpartition("[")[0]) or fnmatch.fnmatchcase(name, only.replace("[", "[[]"))


ALONE = "its call is wrong by itself, too: what the law says may not be the cause"


def failing(kernel: Function, model: Model, able: frozenset[str]) -> Callable[[Problem, Any], bool]:
    """Return a function that tells whether a kernel fails a call (with an arriving gradient: its gradients)."""

    def fails(problem: Problem, dout: Any) -> bool:
        if not variant_of(problem.variant).takes(problem):
            return False

        def judge() -> Iterator[Worst]:
            known = partial(expected, problem, model, dout)
            if dout is None:
                return judged(kernel, problem, known, model, False, Notes())
            return judged_gradients(kernel, problem, dout, known, able, Notes())

        return guarded("", judge).verdict in ("failed", "edge")

    return fails


def _case_run(kernel: Kernel, case: Case, dtype: str) -> Callable[[], Check]:
    name, able, model = f"{case.name}[{dtype}]", kernel.capabilities, kernel.model(dtype)

    def run() -> Check:
        problem, notes = case.problem(dtype), Notes()
        lacks = able.missing(problem)
        known = partial(bounded, case, dtype, model)
        lse, some = able.lse and not lacks, case.sample(problem)
        try:
            check = guarded(name, lambda: judged(kernel.call, problem, known, model, lse, notes, some))
        except UnboundedError as e:
            return Check(name, "unsupported", message=str(e))
        check = settled(check, kernel, problem, lacks, notes)
        return replace(check, rules=notes.rules, either=notes.either, features=tuple(sorted(problem.features())))

    return run


def _gradients_run(kernel: Kernel, case: Case, dtype: str, name: str) -> Callable[[], Check]:
    able, model = kernel.capabilities, kernel.model(dtype)

    def run() -> Check:
        problem, dout, notes = case.problem(dtype), case.arriving(dtype), Notes()
        lacks = able.missing(problem)
        wanted = frozenset() if lacks else able.gradients

        def judge() -> Iterator[Worst]:
            known = partial(of_case, case, dtype, model, backward=True)
            return judged_gradients(kernel.call, problem, dout, known, wanted, notes, case.sample(problem))

        return settled(guarded(name, judge), kernel, problem, lacks, notes)

    return run


def _law_run(kernel: Kernel, law: Law, dtype: str, variant: str) -> Callable[[], Check]:
    name, able = f"law/{law.name}[{dtype}]", kernel.capabilities

    def run() -> Check:
        problem = law_problem(law, dtype, variant, able)
        lacks = able.missing(problem) + law.missing(able, kernel.serial)
        if lacks:
            return Check(name, "unsupported", message=f"not in its capabilities: {', '.join(lacks)}")
        if why := unbounded(problem, kernel.model(dtype)):
            return Check(name, "unsupported", message=why)
        ask = Trial(kernel.call, kernel.model(dtype), able)
        check = guarded(name, lambda: iter([law.test(ask, problem)]))
        small = problem.batch * problem.heads * problem.n_q * problem.n_k <= WHOLE
        if check.verdict == "failed" and small and failing(ask.kernel, ask.model, able.gradients)(problem, None):
            check = replace(check, message=f"{check.message}; {ALONE}")
        return settled(check, kernel, problem, [], Notes(read=frozenset(ask.seen) if ask.seen else None))

    return run


def judged(
    kernel: Function,
    problem: Problem,
    making: Callable[[], Expected],
    model: Model,
    lse: bool,
    notes: Notes,
    some: Sample | None = None,
) -> Iterator[Worst]:
    """Yield the worst element of each array; note what other rules say of out, and what was read.

    `making` gives what to compare with, once the kernel has answered: of a call that it refuses nobody needs it.
    """
    whole: Result = call_kernel(kernel, problem)
    notes.read = whole.read
    parts: dict[str, Any] = {} if some is None else {n: some.take(n, x) for n, x in whole.arrays().items()}
    result = Result(**parts) if parts else whole
    known = making().for_result({"out": result.out, **result.more()})
    notes.either = 0 if known.either is None else int((known.either.rows > 0).sum())
    answer, allowed = known.answer, known.allowed
    notes.rules.update(verdicts(answer.call, result.out, answer.enclosures["out"].mid))
    yield _at(some, against(known, "out", result.out, problem.out_type))
    for name, x in result.more().items():
        if name not in allowed:
            continue
        got, wanted = x.dtype.name, model.lse if name == "lse" else model.accumulator
        if FORMATS[got].precision < FORMATS[wanted].precision:
            raise KernelError(f"{name}: got dtype {got}, expected {wanted} as its model says")
        yield _at(some, against(known, name, x, got))
    if result.lse is None and lse and "lse" in allowed:
        raise KernelError("the kernel returned no lse, but its capabilities name it; return (out, lse)")
    other = None if some is None else suspects(problem, whole)
    if other is not None:
        rows = of_answer(made_by(enclose, other.of(problem)), model)
        for name in [n for n in whole.arrays() if n in rows.allowed]:
            x = other.take(name, whole.arrays()[name])
            # chosen for their errors, they say nothing of errors in general
            yield replace(_at(other, against(rows, name, x, x.dtype.name)), figures=None)


def judged_gradients(
    kernel: Function,
    problem: Problem,
    dout: Any,
    making: Callable[[], Expected],
    able: frozenset[str],
    notes: Notes,
    some: Sample | None = None,
) -> Iterator[Worst]:
    """Yield the worst element of each gradient."""
    result, notes.read = call_gradients(kernel, problem, dout)
    known = making()
    missing = sorted((able & set(known.answer.values)) - set(result))
    if missing:
        raise KernelError(f"gradients: the kernel returned no {missing[0]}, but its capabilities name it")
    for name, got in result.items():
        x = got if some is None else some.take(name, got)
        yield _at(some, against(known, name, x, got.dtype.name))
        if some is not None and (stray := some.rest(name, got)).any():
            yield _stray(name, stray, problem)


def _stray(name: str, x: Any, problem: Problem) -> Worst:
    """Return what is wrong with elements of a gradient that no row with a gradient reaches, and that are not 0."""
    lost = ~np.isfinite(x.astype(np.float64))
    hidden = not all(np.isfinite(np.asarray(a).astype(np.float64)).all() for a in (problem.key, problem.value))
    n = int(np.count_nonzero(x))
    text = f"{n} elements are not 0 that no row with a gradient reaches"
    at = tuple(int(i) for i in np.argwhere(x)[0])
    edges = {"nan-behind-mask": n} if hidden and int(lost.sum()) == n else {}
    return Worst(name, np.inf, at, float(x[at]), 0.0, 0.0, n, x.size, (text,), None, edges)


def _at(some: Sample | None, w: Worst) -> Worst:
    """Return a comparison of some rows with its place in the whole call; where failures lie is not known of rows."""
    if some is None or not w.place:
        return w
    symptoms = tuple(x for x in w.symptoms if not x.startswith("only "))
    return replace(w, place=some.place(w.array, w.place), symptoms=symptoms)


def guarded(name: str, judge: Callable[[], Iterator[Worst]]) -> Check:
    """Return the check that comparisons make, or that something raised on the way to them makes."""
    start = time.perf_counter()
    found: list[Worst] = []
    try:
        with one_thread():  # of BLAS: others would spin while they wait, beside the processes for exact answers
            for worst in judge():
                found.append(worst)
    except UnsupportedProblem as e:
        return Check(name, "unsupported", message=str(e), seconds=time.perf_counter() - start)
    except KernelError as e:
        worst_seen = max(found, key=lambda w: w.ratio, default=None)
        said = [_said(w) for w in found if not w.passed]
        return Check(name, "failed", worst_seen, "; ".join([str(e), *said]), time.perf_counter() - start, tuple(found))
    top = max(found, key=lambda w: (w.wrong, not w.passed, w.ratio))
    message = "; ".join(_said(w) for w in found if not w.passed)
    edges = tuple(dict.fromkeys(n for w in found for n in w.edges))
    verdict = "failed" if any(w.wrong for w in found) else "edge" if edges else "passed"
    edges = edges if verdict == "edge" else ()
    return Check(name, verdict, top, message, time.perf_counter() - start, tuple(found), edges=edges)


def _said(w: Worst) -> str:
    return f"{w.array}: " + "; ".join(w.symptoms)
