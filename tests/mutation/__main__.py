"""Mutate refattn with mutmut and count what its tests notice: python -m tests.mutation [AREA ...].

It works on a copy of the tree. A mutant that lives is either listed in survivors.toml, with the reason why no test can
notice it (it changes no behaviour), or printed here. mutmut is not among the test requirements: pip install mutmut.
"""

import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
COPIED = ("refattn", "tests", "benchmarks", "docs", "pyproject.toml", "README.md", "constraints.txt")
CONFIG = """
[tool.mutmut]
source_paths = ["refattn"]
only_mutate = {files}
pytest_add_cli_args_test_selection = {tests}
also_copy = ["tests", "pyproject.toml", "benchmarks", "docs", "README.md"]
mutate_only_covered_lines = true
"""
LEAST = 0.95


def areas():
    """Return the areas by name: files, and the tests that must notice."""
    return tomllib.loads((HERE / "areas.toml").read_text())


def survivors():
    """Return the changes that no test can notice, by file: a line before and after, and why."""
    return tomllib.loads((HERE / "survivors.toml").read_text())


def change_of(diff):
    """Return what a mutant changes: its lines before and after, without their indentation."""
    lines = [x for x in diff.splitlines() if x[:1] in "+-" and x[:3] not in ("+++", "---")]
    return "\n".join(f"{x[0]} {x[1:].strip()}" for x in lines)


def mutmut(place, *arguments):
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)


def living(place, area, children):
    """Run the mutants of an area in a copy of the tree; return their number, and what those change that live."""
    text = (ROOT / "pyproject.toml").read_text() + CONFIG.format(**areas()[area])
    (place / "pyproject.toml").write_text(text)
    shutil.rmtree(place / "mutants", ignore_errors=True)
    done = mutmut(place, "run", "--max-children", str(children))
    listed = mutmut(place, "results", "--all", "true").stdout.split()
    states = dict(zip([x.rstrip(":") for x in listed[::2]], listed[1::2], strict=False))
    if not states:
        raise click.ClickException(f"mutmut ran nothing:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = []
    for name, state in states.items():
        if state == "survived":
            diff = mutmut(place, "show", name).stdout
            file = next(x[4:] for x in diff.splitlines() if x.startswith("--- "))
            found.append((file, change_of(diff)))
    return len(states), found


@click.command()
@click.argument("names", nargs=-1)
@click.option("--children", default=2, help="Processes.")
def main(names, children):
    """Mutate AREAS (all of areas.toml, if none is named)."""
    total, lives, excused, used = 0, 0, 0, set()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, place / name)
        for area in names or areas():
            count, found = living(place, area, children)
            known = survivors()
            open_ = []
            for file, change in found:
                if change in known.get(file, {}):
                    used.add((file, change))
                else:
                    open_.append((file, change))
            alike = len(found) - len(open_)
            total, lives, excused = total + count, lives + len(open_), excused + alike
            for file, change in open_:
                click.echo(f"{file}\n{change}\n")
            killed = count - len(found)
            click.echo(f"{area}: {killed} of {count - alike} killed, {alike} change nothing, {len(open_)} live")
    share = 1 - lives / (total - excused)
    click.echo(f"{total} mutants, {excused} change nothing, {share:.1%} of the others killed")
    sys.exit(share < LEAST)


if __name__ == "__main__":
    main()
