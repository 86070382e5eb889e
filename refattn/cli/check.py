"""`refattn check`: judge kernels, print what was found, write the reports."""

from __future__ import annotations

import os
import secrets
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..check.diagnose.explain import explain as explain_report
from ..check.inputs.families import cases
from ..check.kernels import EXAMPLE, KERNELS, Entry, find, found
from ..check.kernels.isolated import Isolated
from ..check.kernels.problem import check_problem
from ..check.kernels.untrusted import Untrusted
from ..check.model import MODELS, model_named
from ..check.report.page import page
from ..check.report.report import Report, junit, summary
from ..check.runner import Item, check_kernel, plan
from ..dtypes import FORMATS, no_format
from ..errors import InvalidInput
from ..files import check_folders, load_problem, write_text
from ..operators import load
from ..problem import VARIANT, Problem
from .baseline import Baseline
from .guard import at, reached
from .output import OPERATORS, console_of, print_failures, print_outside, table_of

__all__ = ["check"]

EXPLAIN = 5.0  # seconds for each kernel
TIME_LIMIT, MEMORY_LIMIT = 60.0, 16.0  # seconds for a call of an untrusted kernel, GiB
MOST_JOBS = 16
EVERY = 5.0  # seconds between lines of progress in a log


@click.command()
@click.argument("kernels", nargs=-1)
@click.option(
    "--variant",
    default=VARIANT,
    show_default=True,
    help="The operator that the kernel computes, or path/file.py:NAME for one of your own: " + OPERATORS,
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    help=f"A format to check; may be repeated. Default: all that the kernel has. One of {', '.join(FORMATS)}.",
)
@click.option(
    "--only", multiple=True, help="Run only the checks of this name (a shell pattern); refattn list --checks softmax."
)
@click.option(
    "--budget", default="ci", show_default=True, help="quick (seconds), ci (every case) or nightly (each in 8 draws)."
)
@click.option("--seconds", type=float, help="Stop each kernel after so many seconds; the quick checks come first.")
@click.option("--model", help="Judge by a named rounding model: " + ", ".join(MODELS) + ". Default: the kernel's own.")
@click.option(
    "--time-limit",
    type=float,
    help="Run each kernel in a process of its own, so many seconds for a call (60 where --untrusted).",
)
@click.option("--untrusted", is_flag=True, help="Run each kernel, a file's, where it cannot see what judges it.")
@click.option("--memory-limit", type=float, help=f"GiB for an untrusted kernel, by default {MEMORY_LIMIT:g}; 0: none.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Draw the family calls by this seed. Default: anew.")
@click.option("--n-jobs", type=click.IntRange(1), help="Processes that make exact answers. Default: one for each core.")
@click.option("--strict", is_flag=True, help="Edges that differ, options not read, features not asked for: failures.")
@click.option("--baseline", "baseline_file", help="A TOML file of known failures: they do not count, new ones do.")
@click.option("--update-baseline", is_flag=True, help="Write the failures of this run to the baseline.")
@click.option("--problem", "problem_file", help="Check on one problem, from a file of refattn.save_problem.")
@click.option("--explain/--no-explain", default=True, help="Shrink a failure, and say what it looks like (seconds).")
@click.option("--json", "json_file", help="Also write the reports to this file as JSON.")
@click.option("--junit", "junit_file", help="Also write the reports to this file as JUnit XML.")
@click.option("--html", "html_file", help="Also write the reports to this file as one HTML page.")
def check(
    kernels: tuple[str, ...],
    variant: str,
    dtypes: tuple[str, ...],
    only: tuple[str, ...],
    budget: str,
    seconds: float | None,
    model: str | None,
    time_limit: float | None,
    untrusted: bool,
    memory_limit: float | None,
    seed: int | None,
    n_jobs: int | None,
    strict: bool,
    baseline_file: str | None,
    update_baseline: bool,
    problem_file: str | None,
    explain: bool,
    json_file: str | None,
    junit_file: str | None,
    html_file: str | None,
) -> None:
    """Judge KERNELS (all that are found here, if none is named) against the exact answer.

    Where only refattn's own kernel is here, a wrong one is judged beside it, which does not count.

    A kernel is a name from `refattn list --kernels`, package.module:function, or path/file.py:function.
    Exit code: 0 all are right (with --strict: and keep every contract), 1 one is not, 2 bad input or nothing ran, 130
    interrupted.
    """
    variant = load(variant)
    cases(variant, budget)
    baseline, seed = _known(baseline_file, update_baseline, seed)
    check_folders(json_file, junit_file, html_file, baseline_file if update_baseline else None)
    problem = _problem(problem_file, variant, bool(only or seconds is not None or budget != "ci" or dtypes))
    if len(only) > 1:
        raise InvalidInput(f"only: got {len(only)} patterns, expected one; [ab]* or *cap* match several names")
    entries = (_untrusted if untrusted else _entries)(kernels, variant, model, time_limit, memory_limit)
    unknown = [d for d in dtypes if d not in FORMATS]
    if unknown:
        raise no_format("dtype", unknown[0])
    which = {"only": only[0] if only else None, "budget": budget, "seed": seed}
    more = {"seconds": seconds, "n_jobs": n_jobs or min(os.cpu_count() or 1, MOST_JOBS)}
    reports: list[Report] = []

    def judge() -> None:
        if problem is not None:
            label = f"file/{Path(str(problem_file)).stem}"
            reports.extend(check_problem(e.kernel(), problem, label) for e in entries)
        else:
            _run(entries, variant, dtypes, which, more, reports)

    broken = _ended(judge)
    reports = [replace(r, flags=_flags(problem_file, untrusted)) for r in reports]
    reports, stale = _held(baseline, update_baseline, reports)
    if explain and problem is None and not broken:
        broken = _ended(partial(_explain, entries, reports))
    console = console_of(sys.stdout)
    print_failures(console, reports)
    console.print(table_of(reports))
    print_outside(console, reports, kernels)
    _say_known(reports, baseline_file)
    for file, written in ((json_file, summary), (junit_file, junit), (html_file, page)):
        if file is not None:
            write_text(file, written(reports))
    for name in stale:
        click.echo(f"error: {name} is in the baseline and passes; --update-baseline takes it out", err=True)
    counted = [r for r in reports if kernels or r.kernel != EXAMPLE]
    _exit(counted, strict, broken, bool(stale), update_baseline)


def _flags(problem_file: str | None, untrusted: bool) -> str:
    """Return what a command that repeats a check needs, beside its name."""
    flags = [f"--problem {shlex.quote(problem_file)}"] if problem_file else []
    return " ".join(flags + ["--untrusted"] * untrusted)


def _say_known(reports: list[Report], file: str | None) -> None:
    for r in reports:
        if n := r.count("known"):
            click.echo(f"{r.kernel}: {n} {'failure' if n == 1 else 'failures'} of {file} not counted")


def _problem(file: str | None, variant: str, more: bool) -> Problem | None:
    """Return the one call to check, if there is one; what asks for other calls does not go with it."""
    if file is None:
        return None
    problem = load_problem(file)
    if more:
        raise InvalidInput("problem: one call is checked; leave out --only, --seconds, --budget and --dtype")
    if variant not in (VARIANT, problem.variant):
        raise InvalidInput(f"problem: {file} is a call of {problem.variant}, not of {variant}")
    return problem


def _held(baseline: Baseline | None, update: bool, reports: list[Report]) -> tuple[list[Report], list[str]]:
    """Return the reports in the light of a baseline, and what is in it and passes; or write it."""
    if baseline is None or update:
        if baseline is not None:
            baseline.write(reports)
        return reports, []
    pairs = [baseline.without_known(r) for r in reports]
    return [r for r, _ in pairs], [n for _, names in pairs for n in names]


def _known(file: str | None, new: bool, seed: int | None) -> tuple[Baseline | None, int]:
    """Return the baseline, if there is one, and the seed: the one given, else the baseline's, else a new one."""
    if new and file is None:
        raise InvalidInput("update-baseline: name the file with --baseline")
    baseline = None if file is None else Baseline(file, new=new)
    known = None if baseline is None else baseline.seed
    return baseline, next((s for s in (seed, known) if s is not None), secrets.randbelow(2**31))


def _entries(
    kernels: tuple[str, ...], variant: str, model: str | None, time_limit: float | None, memory: float | None
) -> list[Entry]:
    """Return the kernels that are named, or all that are here."""
    if memory is not None:
        raise InvalidInput("memory-limit: only an --untrusted kernel has one")
    entries = [e for name in kernels for e in find(name)] if kernels else _all(variant)
    if not entries:
        raise InvalidInput(
            f"kernel: no kernel here computes {variant}; name yours as package.module:function or path/file.py:function"
        )
    for e in entries:
        if e.name in KERNELS and variant not in e.variants:
            raise InvalidInput(f"kernel: {e.name} computes {', '.join(sorted(e.variants))}, not {variant}")
    if model is not None:
        entries = [replace(e, model=model_named(model)) for e in entries]
    if time_limit is not None:
        entries = [replace(e, load=partial(Isolated, e.name, time_limit)) for e in entries]
    return entries


def _all(variant: str) -> list[Entry]:
    """Return the kernels that are here; beside ours alone, a wrong one that shows what is said of such a kernel."""
    entries = found(variant)
    return [*entries, KERNELS[EXAMPLE]] if [e.package for e in entries] == [""] and variant == VARIANT else entries


def _untrusted(
    kernels: tuple[str, ...], variant: str, model: str | None, time_limit: float | None, memory: float | None
) -> list[Entry]:
    """Return kernels that are not imported here."""
    if not kernels or variant != VARIANT:
        raise InvalidInput(f"untrusted: name a kernel of {VARIANT} attention, path/file.py:function")
    most = MEMORY_LIMIT if memory is None else memory

    def entry(name: str) -> Entry:
        kernel = Untrusted(name, TIME_LIMIT if time_limit is None else time_limit, most)
        click.get_current_context().call_on_close(kernel.close)
        return Entry(name, "", lambda: kernel, kernel.capabilities, model_named(model or "flash"))

    return [entry(name) for name in kernels]


def _exit(reports: list[Report], strict: bool, broken: int, stale: bool, written: bool) -> None:
    """End with the exit code that reports ask for."""
    reached()
    if broken:
        sys.exit(broken)
    if stale or (not written and any(_bad(r, strict) for r in reports)):
        sys.exit(1)
    if not any(r.ran for r in reports):
        left = any(r.left for r in reports)
        why = "the time was over before the first check" if left else "no check is within the kernel's capabilities"
        click.echo(f"error: nothing ran: {why}", err=True)
        sys.exit(2)


def _bad(r: Report, strict: bool) -> bool:
    more = bool(r.failures or r.unasked) or r.count("unread") > 0
    return r.count("failed") > 0 or (r.ran > 0 and not r.agreed) or bool(r.kept) or (strict and more)


def _run(
    entries: list[Entry],
    variant: str,
    dtypes: tuple[str, ...],
    which: dict[str, Any],
    more: dict[str, Any],
    reports: list[Report],
) -> None:
    chosen = [(e, tuple(d for d in FORMATS if d in (dtypes or e.capabilities.dtypes))) for e in entries]
    total = sum(len(plan(e.kernel(), variant, dtypes=d, **which)) for e, d in chosen)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console, said, began = console_of(sys.stderr), time.monotonic(), time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("checks", total=total)
        for entry, wanted in chosen:

            def step(item: Item, name: str = entry.name) -> None:
                nonlocal said
                progress.update(task, advance=1, description=f"{name} {item.name}")
                if not console.is_terminal and time.monotonic() - said > EVERY:  # a log gets a line now and then
                    said, done = time.monotonic(), progress.tasks[0].completed
                    click.echo(f"{name}: {done:.0f} of {total} checks, {said - began:.0f} s", err=True)
                at(f"{name} {item.name}")

            reports.append(check_kernel(entry.kernel(), variant, dtypes=wanted, progress=step, **which, **more))
            if reports[-1].lost and (after := [e.name for e, _ in chosen[len(reports) :]]):
                click.echo(f"the device is lost for this process: {', '.join(after)} did not run", err=True)
                return


def _ended(work: Callable[[], None]) -> int:
    """Do something in which kernels run; return 0, or the exit code where they or the terminal end it."""
    try:
        work()
    except (KeyboardInterrupt, SystemExit, click.exceptions.Exit) as e:
        code = 130 if isinstance(e, KeyboardInterrupt) else 1
        why = "interrupted" if code == 130 else f"a kernel's code raised {type(e).__name__} outside of its call"
        click.echo(f"{why}: what follows covers the kernels that were done", err=True)
        return code
    return 0


def _explain(entries: list[Entry], reports: list[Report]) -> None:
    for i, (entry, report) in enumerate(zip(entries, reports, strict=False)):
        if report.count("failed") and not report.lost:
            reports[i] = replace(report, diagnosis=explain_report(entry.kernel(), report, seconds=EXPLAIN))
