"""The command line: refattn check, exact, list, show, doctor, bench, golden, he."""

from __future__ import annotations

import sys
from typing import Any

import click

from ..check.inputs.families import FAMILIES, cases
from ..check.kernels import KERNELS
from ..check.laws import LAWS
from ..errors import InvalidInput, InvalidProblem, ServiceError, UnsupportedProblem, printable
from ..files import check_folders
from ..operators import load
from ..variants import VARIANTS, variant_of
from ..version import VERSION
from .check import check
from .doctor import doctor
from .exact import exact
from .functions import table_of_functions
from .golden import golden
from .he import he
from .init import init
from .output import console_of, table_with
from .theory import theory

__all__ = ["main"]


class _Group(click.Group):
    """Turn the package's own errors into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (InvalidInput, InvalidProblem, ServiceError, UnsupportedProblem) as e:
            text = "\n".join(map(printable, str(e).splitlines()))
            click.echo(f"error: {text}", err=True)
            ctx.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="refattn")
def main() -> None:
    """Check attention kernels against the exact answer."""


@main.command(name="list")
@click.option("--kernels", is_flag=True, help="List the kernels that refattn can call.")
@click.option("--checks", help="List the checks of an operator.")
def list_(kernels: bool, checks: str | None) -> None:
    """List the operators, and those that are functions of arrays by their papers; or the kernels, or the checks."""
    console = console_of(sys.stdout)
    if checks is not None:
        checks = load(checks)
        for case in cases(checks):
            console.print(case.name, markup=False)
        for law in variant_of(checks).laws:
            why = LAWS[law].named_only
            console.print(f"law/{law}" + (f"  (only by --only 'law/{law}[DTYPE]': {why})" if why else ""), markup=False)
        return
    if kernels:
        table = table_with({"kernel": 30, "package": 20, "here": 4, "formats": 30, "features": 60})
        for e in KERNELS.values():
            table.add_row(
                e.name,
                e.package or "refattn",
                "yes" if e.here else "no",
                ", ".join(sorted(e.capabilities.dtypes)),
                ", ".join(sorted(e.capabilities.features)),
            )
    else:
        table = table_with({"operator": 20, "options of Problem": 40, "own options": 20, "checks": 6, "source": 60})
        for v in VARIANTS.values():
            table.add_row(
                v.name,
                ", ".join(sorted(v.uses)),
                ", ".join(v.options) or "-",
                str(len(cases(v.name)) + len(v.laws)),
                v.source,
            )
    console.print(table)
    if not kernels:
        console.print(table_of_functions())


@main.command()
@click.argument("variant")
def show(variant: str) -> None:
    """Show an operator's formula, contract and source.

    VARIANT is one that `refattn list` prints, or path/file.py:NAME.
    """
    v = variant_of(load(variant))
    console = console_of(sys.stdout)

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    line(f"{v.name} attention\n\n  {v.formula}\n\nerror unit: {v.unit}")
    scale = "1/sqrt(d_k)" if v.default_scale == "rsqrt" else "1"
    line(f"options of Problem: {', '.join(sorted(v.uses)) or 'none'}; scale None is {scale}")
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
    line("  - models: calls that models in use make\n  - calls: drawn anew in every run, by --seed")
    line(f"\nplanted bugs that its checks must catch: {', '.join(v.bugs)}\n\nsource: {v.source}")


main.add_command(check)
main.add_command(exact)
main.add_command(init)
main.add_command(golden)
main.add_command(doctor)
main.add_command(he)
main.add_command(theory)


@main.command()
@click.argument("name")
@click.option("--json", "json_file", help="Also write the figures to this file as JSON.")
@click.option("--only", help="Of he_gpu: only the parts whose name contains this.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Of he_data: where the server computes.")
def bench(name: str, json_file: str | None, **given: str | None) -> None:
    """Run a benchmark and print a row for each figure. Exit code: 1 where one is not held.

    NAME is accuracy, accuracy_long, decode, dropout_gpu, exact, exact_gpu, float8_gpu, gpu, gpu_backward,
    gpu_catalogue, gpu_latent, gpu_options, gpu_recurrence, gpu_training, he, he_data, he_gpu, he_peers, imports, judge,
    recurrence, rules, tensor, tensor_gpu or verdicts.
    """
    from ..bench import benchmarks, run

    if name not in benchmarks():
        raise InvalidInput(f"bench: got {name!r}, expected one of {', '.join(benchmarks())}")
    check_folders(json_file)
    asked = {k: x for k, x in given.items() if x is not None}
    rows = run(name, console_of(sys.stdout), json_file, **asked)
    sys.exit(0 if all(r.holds for r in rows) else 1)
