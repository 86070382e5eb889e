"""Run the checks of a kernel."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from ..arrays import to_numpy
from ..dtypes import FORMATS
from ..errors import InvalidInput, KernelError, UnsupportedProblem
from ..problem import VARIANT, Problem
from ..variants import variant_of
from .bounds.expected import Expected, expected, of_case
from .call import Function, Result, call_gradients, call_kernel
from .compare import Worst, compare
from .diagnose.rules import verdicts
from .inputs.families import Case, cases
from .kernel import Kernel
from .laws import LAWS, Law, Trial, law_problem
from .model import Capabilities, Model, ModelFor
from .report.report import Check, Report

RAISED = "the kernel raised"
__all__ = ["Item", "check_kernel", "check_problem", "plan"]


@dataclass(frozen=True)
class Item:
    """One check to run: its name, its format, and the call that runs it."""

    name: str
    dtype: str
    run: Callable[[], Check]


def check_kernel(
    kernel: Function | Kernel,
    variant: str = VARIANT,
    *,
    model: Model | ModelFor | None = None,
    capabilities: Capabilities | None = None,
    dtypes: Sequence[str] | None = None,
    only: str | None = None,
    budget: str = "ci",
    name: str | None = None,
    version: str = "",
    progress: Callable[[Item], None] | None = None,
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
        Run only the checks whose name is this, or matches it as a shell pattern.
    budget : str
        "quick" (seconds), "ci" (every case) or "nightly" (every case in several draws).
    name, version : str
        What to call the kernel in the report.
    progress : callable
        Called with each Item before it runs.

    Returns
    -------
    Report

    Raises
    ------
    InvalidInput
        An unknown variant, format or budget, or `only` matches nothing.
    """
    judged = Kernel.of(kernel, model=model, capabilities=capabilities, name=name, version=version)
    items = plan(judged, variant, dtypes=dtypes, only=only, budget=budget)
    done = []
    for item in items:
        if progress is not None:
            progress(item)
        done.append(item.run())
    models = {d: asdict(judged.model(d)) for d in sorted({i.dtype for i in items})}
    return Report(judged.name, variant, tuple(done), judged.version, models)


def plan(
    kernel: Function | Kernel,
    variant: str = VARIANT,
    *,
    model: Model | ModelFor | None = None,
    capabilities: Capabilities | None = None,
    dtypes: Sequence[str] | None = None,
    only: str | None = None,
    budget: str = "ci",
) -> list[Item]:
    """Return the checks of a kernel without running them; the arguments are those of :func:`check_kernel`."""
    v, judged = variant_of(variant), Kernel.of(kernel, model=model, capabilities=capabilities)
    able = judged.capabilities
    unknown = [d for d in dtypes or () if d not in FORMATS]
    if unknown:
        raise InvalidInput(f"dtype: got {unknown[0]!r}, expected one of {', '.join(FORMATS)}")
    wanted = tuple(dtypes or [d for d in FORMATS if d in able.dtypes])
    items = []
    for dtype in wanted:
        for case in cases(variant, budget):
            if not case.dtypes or dtype in case.dtypes:
                items.append(Item(f"{case.name}[{dtype}]", dtype, _case_run(judged, case, dtype)))
                if able.gradients and case.backward:
                    name = f"{case.name}/gradients[{dtype}]"
                    items.append(Item(name, dtype, _gradients_run(judged, case, dtype, name)))
        for law in (LAWS[n] for n in v.laws):
            name = f"law/{law.name}[{dtype}]"
            if not law.named_only or only == name:
                items.append(Item(name, dtype, _law_run(judged, law, dtype, variant)))
    if only is not None:
        items = [i for i in items if matches(i.name, only)]
        if not items:
            raise InvalidInput(
                f"only: no check of {variant} is named {only!r}; refattn list --checks {variant} shows the names"
            )
    return items


def matches(name: str, only: str | None) -> bool:
    """Tell whether a check's name is `only`, or matches it as a shell pattern (brackets stand for themselves)."""
    return only is None or name == only or fnmatch.fnmatchcase(name, only.replace("[", "[[]"))


def check_problem(
    kernel: Function | Kernel | str,
    problem: Problem,
    label: str,
    *,
    gradients: Any = None,
    model: Model | ModelFor | None = None,
    name: str | None = None,
) -> Report:
    """Check a kernel on one problem of the caller's own.

    Parameters
    ----------
    kernel : callable or str
        As in :func:`check_kernel`, or a name that ``refattn check`` takes.
    problem : Problem
        The call.
    label : str
        What to call the check.
    gradients : (b, h_q, n_q, d_v) array, optional
        The gradient arriving at out: checks the gradients, too.
    model, name
        As in :func:`check_kernel`.
    """
    if isinstance(kernel, str):
        from .kernels import find

        kernel = find(kernel)[0].kernel()
    judged, plain = Kernel.of(kernel, model=model, name=name), problem.to("numpy")
    chosen, called = judged.model(problem.dtype), judged.call
    checks = [
        _guard(f"{label}[{problem.dtype}]", lambda: _judge(called, plain, expected(plain, chosen), chosen, False, {})),
    ]
    if gradients is not None:
        dout = to_numpy(gradients)
        name_of = f"{label}/gradients[{problem.dtype}]"
        checks.append(
            _guard(name_of, lambda: _judge_gradients(called, plain, dout, expected(plain, chosen, dout), frozenset()))
        )
    models = {problem.dtype: asdict(chosen)}
    return Report(judged.name, problem.variant, tuple(checks), models=models)


def failing(kernel: Function, model: Model, able: frozenset[str]) -> Callable[[Problem, Any], bool]:
    """Return a function that tells whether a kernel fails a call (with an arriving gradient: its gradients)."""

    def fails(problem: Problem, dout: Any) -> bool:
        def judge() -> Iterator[Worst]:
            known = expected(problem, model, dout)
            if dout is None:
                return _judge(kernel, problem, known, model, False, {})
            return _judge_gradients(kernel, problem, dout, known, able)

        return _guard("", judge).verdict == "failed"

    return fails


def _case_run(kernel: Kernel, case: Case, dtype: str) -> Callable[[], Check]:
    name, able, model = f"{case.name}[{dtype}]", kernel.capabilities, kernel.model(dtype)

    def run() -> Check:
        problem = case.problem(dtype)
        others: dict[str, bool | None] = {}
        known = partial(of_case, case, dtype, model, backward=False)
        lacks = able.missing(problem)
        if lacks:
            return _outside(name, lacks, lambda: _judge(kernel.call, problem, known(), model, False, {}))
        check = _guard(name, lambda: _judge(kernel.call, problem, known(), model, able.lse, others))
        return replace(check, rules=others)

    return run


def _outside(name: str, lacks: list[str], judge: Callable[[], Iterator[Worst]]) -> Check:
    """Run a case outside the capabilities: the kernel may raise or be right, but it may not be wrong."""
    check = _guard(name, judge)
    text = f"not in its capabilities: {', '.join(lacks)}"
    raised = check.worst is None and check.message.startswith(RAISED)
    if check.verdict != "failed" or raised:
        return Check(name, "unsupported", message=text, seconds=check.seconds)
    return replace(check, message=f"{text}; it must raise there, and gave a wrong answer: {check.message}")


def _gradients_run(kernel: Kernel, case: Case, dtype: str, name: str) -> Callable[[], Check]:
    able, model = kernel.capabilities, kernel.model(dtype)

    def run() -> Check:
        problem, dout = case.problem(dtype), case.arriving(dtype)
        lacks = able.missing(problem)
        if lacks:
            return Check(name, "unsupported", message=f"not in its capabilities: {', '.join(lacks)}")

        def judge() -> Iterator[Worst]:
            return _judge_gradients(
                kernel.call, problem, dout, of_case(case, dtype, model, backward=True), able.gradients
            )

        return _guard(name, judge)

    return run


def _law_run(kernel: Kernel, law: Law, dtype: str, variant: str) -> Callable[[], Check]:
    name, able = f"law/{law.name}[{dtype}]", kernel.capabilities

    def run() -> Check:
        problem = law_problem(law, dtype, variant)
        lacks = able.missing(problem) + law.missing(able)
        if lacks:
            return Check(name, "unsupported", message=f"not in its capabilities: {', '.join(lacks)}")

        return _guard(name, lambda: iter([law.test(Trial(kernel.call, kernel.model(dtype), able), problem)]))

    return run


def _judge(
    kernel: Function, problem: Problem, known: Expected, model: Model, lse: bool, others: dict[str, bool | None]
) -> Iterator[Worst]:
    """Yield the worst element of each array; note what other rules say of out."""
    result: Result = call_kernel(kernel, problem)
    known = known.for_result({"out": result.out, **result.more()})
    answer, allowed = known.answer, known.allowed
    others.update(verdicts(answer.call, result.out, answer.enclosures["out"].mid))
    yield compare("out", result.out, answer, allowed["out"], problem.dtype, known.variance.get("out"))
    for name, x in result.more().items():
        if name not in allowed:
            continue
        got, wanted = x.dtype.name, model.lse if name == "lse" else model.accumulator
        if FORMATS[got].precision < FORMATS[wanted].precision:
            raise KernelError(f"{name}: got dtype {got}, expected {wanted} as its model says")
        yield compare(name, x, answer, allowed[name], got, known.variance.get(name))
    if result.lse is None and lse and "lse" in allowed:
        raise KernelError("the kernel returned no lse, but its capabilities name it; return (out, lse)")


def _judge_gradients(
    kernel: Function, problem: Problem, dout: Any, known: Expected, able: frozenset[str]
) -> Iterator[Worst]:
    """Yield the worst element of each gradient."""
    result = call_gradients(kernel, problem, dout)
    missing = sorted((able & set(known.answer.values)) - set(result))
    if missing:
        raise KernelError(f"gradients: the kernel returned no {missing[0]}, but its capabilities name it")
    for name, got in result.items():
        yield compare(name, got, known.answer, known.allowed[name], got.dtype.name, known.variance.get(name))


def _guard(name: str, judge: Callable[[], Iterator[Worst]]) -> Check:
    start = time.perf_counter()
    found: list[Worst] = []
    try:
        for worst in judge():
            found.append(worst)
    except UnsupportedProblem as e:
        return Check(name, "unsupported", message=str(e), seconds=time.perf_counter() - start)
    except KernelError as e:
        worst_seen = max(found, key=lambda w: w.ratio, default=None)
        said = [text for w in found if not w.passed for text in w.symptoms]
        return Check(name, "failed", worst_seen, "; ".join([str(e), *said]), time.perf_counter() - start, tuple(found))
    top = max(found, key=lambda w: (not w.passed, w.ratio))
    failed = [w for w in found if not w.passed]
    message = "; ".join(text for w in failed for text in w.symptoms)
    return Check(name, "failed" if failed else "passed", top, message, time.perf_counter() - start, tuple(found))
