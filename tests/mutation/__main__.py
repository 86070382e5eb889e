"""Mutate refattn with mutmut and count what its tests notice: python -m tests.mutation [AREA ...].

It works on a copy of the tree. A mutant that lives is either listed in survivors.toml, with the reason why no test can
notice it (it changes no behaviour), or printed here. mutmut is not among the test requirements: pip install mutmut.
"""

import os
import shutil
import signal
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


def mutmut(place, *arguments, seconds=None):
    command = [sys.executable, "-m", "mutmut", *arguments]
    with subprocess.Popen(command, cwd=place, stdout=-1, stderr=-2, text=True, start_new_session=True) as process:
        try:
            return process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.communicate()[0]


def living(place, area, children, seconds, only):
    """Run the mutants of an area in a copy of the tree, or those whose names match one of some patterns.

    Returns how many were run, how many time was too short for, and what those change that live.
    """
    text = (ROOT / "pyproject.toml").read_text() + CONFIG.format(**areas()[area])
    (place / "pyproject.toml").write_text(text)
    shutil.rmtree(place / "mutants", ignore_errors=True)
    done = mutmut(place, "run", "--max-children", str(children), *only, seconds=seconds)
    listed = mutmut(place, "results", "--all", "true")
    states = dict(x.strip().split(": ", 1) for x in listed.splitlines() if "__mutmut_" in x and ": " in x)
    if not states or "Failed to run clean test" in done:
        raise click.ClickException(f"mutmut ran nothing:\n{done[-4000:]}")
    found = []
    for name, state in states.items():
        if state in ("survived", "no tests"):
            diff = mutmut(place, "show", name)
            file = next(x[4:] for x in diff.splitlines() if x.startswith("--- "))
            found.append((file, change_of(diff)))
    left = sum(x in ("not checked", "check was interrupted by user") for x in states.values())
    return len(states) - left, left, found


@click.command()
@click.argument("names", nargs=-1)
@click.option("--children", default=2, help="Processes.")
@click.option("--seconds", type=float, help="Most time of an area; what is left then is counted.")
@click.option("--only", multiple=True, help="A pattern of mutants' names, e.g. '*7': each tenth of a function's.")
def main(names, children, seconds, only):
    """Mutate AREAS (all of areas.toml, if none is named)."""
    total, lives, excused, used = 0, 0, 0, set()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, place / name)
        for area in names or areas():
            count, left, found = living(place, area, children, seconds, only)
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
            text = f"{area}: {killed} of {count - alike} killed, {alike} change nothing, {len(open_)} live"
            click.echo(f"{text}, {left} not run" if left else text)
    share = 1 - lives / max(1, total - excused)
    click.echo(f"{total} mutants, {excused} change nothing, {share:.1%} of the others killed")
    sys.exit(share < LEAST)


if __name__ == "__main__":
    main()
