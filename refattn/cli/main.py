"""The command line: refattn check, exact, list, show, doctor, bench, golden, he."""

from __future__ import annotations

import os
import secrets
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..check.diagnose.explain import explain as explain_report
from ..check.inputs.families import FAMILIES, cases
from ..check.kernels import KERNELS, Entry, find, found
from ..check.kernels.isolated import Isolated
from ..check.kernels.problem import check_problem
from ..check.kernels.untrusted import Untrusted
from ..check.laws import LAWS
from ..check.model import MODELS, model_named
from ..check.report.page import page
from ..check.report.report import Report, junit, summary
from ..check.runner import Item, check_kernel, plan
from ..dtypes import FORMATS
from ..errors import InvalidInput, InvalidProblem, ServiceError, UnsupportedProblem
from ..files import check_folders, load_problem, write_text
from ..operators import load
from ..problem import VARIANT
from ..variants import VARIANTS, variant_of
from ..version import VERSION
from .baseline import Baseline
from .doctor import doctor
from .exact import exact
from .golden import golden
from .he import he
from .init import init
from .output import print_failures, print_outside, table_of
from .theory import theory

__all__ = ["main"]

EXPLAIN = 5.0  # seconds for each kernel
TIME_LIMIT, MEMORY_LIMIT = 60.0, 16.0  # seconds for a call of an untrusted kernel, GiB
MOST_JOBS = 8  # more would wait for the kernel


def _console(stderr: bool = False) -> Console:
    # a pipe or a log has no width of its own: let tables be as wide as they are there
    wide = None if (sys.stderr if stderr else sys.stdout).isatty() else 1000
    return Console(stderr=stderr, width=wide, highlight=False)


class _Group(click.Group):
    """Turn the package's own errors into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (InvalidInput, InvalidProblem, ServiceError, UnsupportedProblem) as e:
            click.echo(f"error: {e}", err=True)
            ctx.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="refattn")
def main() -> None:
    """Check attention kernels against the exact answer."""


@main.command()
@click.argument("kernels", nargs=-1)
@click.option(
    "--variant",
    default=VARIANT,
    show_default=True,
    help="The operator that the kernel computes: a name, or path/file.py:NAME for one of your own.",
)
@click.option(
    "--dtype", "dtypes", multiple=True, help="A format to check; may be repeated. Default: all that the kernel has."
)
@click.option("--only", help="Run only the checks of this name (a shell pattern).")
@click.option(
    "--budget", default="ci", show_default=True, help="quick (seconds), ci (every case) or nightly (each in 8 draws)."
)
@click.option("--seconds", type=float, help="Stop each kernel after so many seconds; the quick checks come first.")
@click.option("--model", help="Judge by a named rounding model: " + ", ".join(MODELS) + ". Default: the kernel's own.")
@click.option("--time-limit", type=float, help="Run each kernel in a process of its own, so many seconds for a call.")
@click.option("--untrusted", is_flag=True, help="Run each kernel, a file's, where it cannot see what judges it.")
@click.option("--memory-limit", type=float, help=f"GiB for an untrusted kernel, by default {MEMORY_LIMIT:g}; 0: none.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Draw the family calls by this seed. Default: anew.")
@click.option("--n-jobs", type=click.IntRange(1), help="Processes that make exact answers. Default: one for each core.")
@click.option("--strict", is_flag=True, help="An edge that differs, or an option that is not read, is a failure, too.")
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
    only: str | None,
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

    A kernel is a name from `refattn list --kernels`, package.module:function, or path/file.py:function.
    Exit code: 0 all are right (with --strict: and keep every contract), 1 one is not, 2 bad input or nothing ran, 130
    interrupted.
    """
    variant = load(variant)
    cases(variant, budget)
    baseline, seed = _known(baseline_file, update_baseline, seed)
    check_folders(json_file, junit_file, html_file, baseline_file if update_baseline else None)
    problem = None if problem_file is None else load_problem(problem_file)
    if problem is not None and (only is not None or seconds is not None or budget != "ci"):
        raise InvalidInput("problem: one call is checked; leave out --only, --seconds and --budget")
    entries = (_untrusted if untrusted else _entries)(kernels, variant, model, time_limit, memory_limit)
    unknown = [d for d in dtypes if d not in FORMATS]
    if unknown:
        raise InvalidInput(f"dtype: got {unknown[0]!r}, expected one of {', '.join(FORMATS)}")
    console = _console()
    reports: list[Report] = []
    interrupted = False
    try:
        if problem is not None:
            reports = [check_problem(e.kernel(), problem, f"file/{Path(str(problem_file)).stem}") for e in entries]
        else:
            more = {"seconds": seconds, "n_jobs": n_jobs or min(os.cpu_count() or 1, MOST_JOBS)}
            _run(entries, variant, dtypes, {"only": only, "budget": budget, "seed": seed}, more, reports)
    except KeyboardInterrupt:
        interrupted = True
        click.echo("interrupted: what follows covers the kernels that were done", err=True)
    reports = [replace(r, flags="--untrusted") for r in reports] if untrusted else reports
    reports, stale = _held(baseline, update_baseline, reports)
    if explain and problem is None:
        reports = [_explained(e, r) for e, r in zip(entries, reports, strict=False)]
    for file, written in ((json_file, summary), (junit_file, junit), (html_file, page)):
        if file is not None:
            write_text(file, written(reports))
    print_failures(console, reports)
    console.print(table_of(reports))
    print_outside(console, reports, kernels)
    for name in stale:
        click.echo(f"error: {name} is in the baseline and passes; --update-baseline takes it out", err=True)
    _exit(reports, strict, interrupted, bool(stale), update_baseline)


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
    entries = [e for name in kernels for e in find(name)] if kernels else found()
    if variant != VARIANT and not kernels:
        raise InvalidInput(
            f"kernel: no kernel here computes {variant}; name yours as package.module:function or path/file.py:function"
        )
    named = [e for e in entries if e.name in KERNELS]
    if variant != VARIANT and named:
        raise InvalidInput(f"kernel: {named[0].name} computes {VARIANT}, not {variant}")
    if model is not None:
        entries = [replace(e, model=model_named(model)) for e in entries]
    if time_limit is not None:
        entries = [replace(e, load=partial(Isolated, e.name, time_limit)) for e in entries]
    return entries


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


def _exit(reports: list[Report], strict: bool, interrupted: bool, stale: bool, written: bool) -> None:
    """End with the exit code that reports ask for."""
    if interrupted:
        sys.exit(130)
    if stale or (not written and any(_bad(r, strict) for r in reports)):
        sys.exit(1)
    if not any(r.ran for r in reports):
        left = any(r.left for r in reports)
        why = "the time was over before the first check" if left else "no check is within the kernel's capabilities"
        click.echo(f"error: nothing ran: {why}", err=True)
        sys.exit(2)


def _bad(r: Report, strict: bool) -> bool:
    return r.count("failed") > 0 or bool(r.kept) or (strict and (bool(r.failures) or r.count("unread") > 0))


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
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console(stderr=True), transient=True) as progress:
        task = progress.add_task("checks", total=total)
        for entry, wanted in chosen:

            def step(item: Item, name: str = entry.name) -> None:
                progress.update(task, advance=1, description=f"{name} {item.name}")

            reports.append(check_kernel(entry.kernel(), variant, dtypes=wanted, progress=step, **which, **more))


def _explained(entry: Entry, report: Report) -> Report:
    if not report.count("failed"):
        return report
    return replace(report, diagnosis=explain_report(entry.kernel(), report, seconds=EXPLAIN))


@main.command(name="list")
@click.option("--kernels", is_flag=True, help="List the kernels that refattn can call.")
@click.option("--checks", help="List the checks of an operator.")
def list_(kernels: bool, checks: str | None) -> None:
    """List the operators, the kernels or the checks."""
    console = _console()
    if checks is not None:
        checks = load(checks)
        for case in cases(checks):
            console.print(case.name, markup=False)
        for law in variant_of(checks).laws:
            why = LAWS[law].named_only
            console.print(f"law/{law}" + (f"  (only by --only 'law/{law}[DTYPE]': {why})" if why else ""), markup=False)
        return
    if kernels:
        table = Table("kernel", "package", "here", "formats", "features")
        for e in KERNELS.values():
            table.add_row(
                e.name,
                e.package or "refattn",
                "yes" if e.here else "no",
                ", ".join(sorted(e.capabilities.dtypes)),
                ", ".join(sorted(e.capabilities.features)),
            )
    else:
        table = Table("operator", "options of Problem", "own options", "checks", "source")
        for v in VARIANTS.values():
            table.add_row(
                v.name,
                ", ".join(sorted(v.uses)),
                ", ".join(v.options) or "-",
                str(len(cases(v.name)) + len(v.laws)),
                v.source,
            )
    console.print(table)


@main.command()
@click.argument("variant")
def show(variant: str) -> None:
    """Show an operator's formula, contract and source."""
    v = variant_of(load(variant))
    console = _console()

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    line(f"{v.name} attention\n\n  {v.formula}\n\nerror unit: {v.unit}")
    scale = "1/sqrt(d_k)" if v.default_scale == "rsqrt" else "1"
    line(f"options of Problem: {', '.join(sorted(v.uses))}; scale None is {scale}")
    for name, option in v.options.items():
        line(f"option {name} (default {option.default!r}): {option.meaning}")
    line("\ncontract:")
    for text in v.contract:
        line(f"  - {text}")
    line("\nlaws:")
    for name in v.laws:
        line(f"  - {name}: {LAWS[name].statement}")
    line("\ninput families:")
    for name in v.families:
        line(f"  - {name}: {FAMILIES[name]}")
    line(f"\nplanted bugs that its checks must catch: {', '.join(v.bugs)}\n\nsource: {v.source}")


main.add_command(exact)
main.add_command(init)
main.add_command(golden)
main.add_command(doctor)
main.add_command(he)
main.add_command(theory)


@main.command()
@click.argument("name")
@click.option("--json", "json_file", help="Also write the figures to this file as JSON.")
def bench(name: str, json_file: str | None) -> None:
    """Run a benchmark and print a row for each figure."""
    from ..bench import benchmarks, run

    if name not in benchmarks():
        raise InvalidInput(f"bench: got {name!r}, expected one of {', '.join(benchmarks())}")
    check_folders(json_file)
    rows = run(name, _console(), json_file)
    sys.exit(0 if all(r.holds for r in rows) else 1)
