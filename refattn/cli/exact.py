"""The command line: refattn exact, the exact answer from files."""

from __future__ import annotations

import re
import time
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..dtypes import FORMATS, no_format
from ..errors import InvalidInput, UnsupportedProblem
from ..exact import evaluate, query_rows
from ..files import BAD_FILE, check_folders, load_problem, save_arrays
from ..operators import load
from ..positions import PLACED
from ..problem import TENSORS, Problem
from ..validation import LENGTHS, OFFSETS, SCALES
from .output import OPERATORS

__all__ = ["exact"]

MASK = "a boolean mask is called allowed, numbers to add are called bias"
OF_ROWS = ("out", "lse", "dq")
"""What a row has for itself; other gradients are sums over all rows."""
LARGE, PROBED, PATIENCE = 2**26, 64, 20.0
"""Scores from which gradients may take long; the rows that are timed; the seconds from which that is said."""
HINTS = {n: f"give it as --{n}" for n in ("causal", "scale", "softcap")} | {"mask": MASK, "attn_mask": MASK}
"""What to do about arrays that a plain file should not have."""


@click.command()
@click.argument("source", metavar="INPUT.npz")
@click.option("--rounding", required=True, help="The format to round to: " + ", ".join(FORMATS) + ".")
@click.option(
    "--out", "target", required=True, help="Where to write the answer (.npz; refattn.files.load_arrays reads it)."
)
@click.option("--causal", type=click.Choice(["bottom_right", "top_left"]), help="With a plain .npz: the causal corner.")
@click.option("--scale", type=float, help="With a plain .npz: the scale; by default 1/sqrt(d_k).")
@click.option("--softcap", type=float, help="With a plain .npz: the softcap.")
@click.option(
    "--variant", help="The operator, or path/file.py:NAME; a file of save_problem names its own. " + OPERATORS
)
@click.option("--gradients", "dout_file", help="A .npy file with the gradient arriving at out: also write dq, dk, dv.")
@click.option("--rows", "rows", help="START:STOP: only these query rows; with --gradients out, lse and dq of them.")
@click.option("--n-jobs", type=click.IntRange(1), help="Processes; by default one, with a thread for each core.")
@click.option("--checkpoint", help="A folder for finished parts: the same command goes on from there.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1 ...")
def exact(
    source: str,
    rounding: str,
    target: str,
    causal: str | None,
    scale: float | None,
    softcap: float | None,
    variant: str | None,
    dout_file: str | None,
    rows: str | None,
    n_jobs: int | None,
    checkpoint: str | None,
    device: str,
) -> None:
    """Write the correctly rounded answer of the call in INPUT.npz.

    INPUT.npz is a file of refattn.save_problem, or a plain .npz with the arrays query, key, value and, where wanted,
    others of a Problem's (bias, allowed, sink, cu_seqlens_q, ...); what is none is refused. refattn.files.load_arrays
    reads what is written.
    """
    check_folders(target)
    if rounding not in FORMATS:
        raise no_format("rounding", rounding)
    own = None if variant is None else load(variant)
    options = {"causal": causal, "scale": scale, "softcap": softcap, "variant": own}
    problem = _read(source, {n: x for n, x in options.items() if x is not None})
    dout = None if dout_file is None else _array(dout_file)
    if rows is not None:
        start, stop = _ends(rows)
        problem, dout = query_rows(problem, start, stop), _part(problem, dout, start, stop)
    elif dout is not None and device == "cpu":
        _warn(problem, dout, rounding)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("parts", total=None)
        told = (lambda done, total: bar.update(task, completed=done, total=total)) if device == "cpu" else None
        answer = evaluate(
            problem,
            rounding=rounding,
            gradients=dout,
            n_jobs=n_jobs,
            checkpoint=checkpoint,
            progress=told,
            device=device,
        )
    values = {n: x for n, x in answer.values.items() if rows is None or n in OF_ROWS}
    undecided = {n: x for n, x in answer.undecided.items() if n in values}
    save_arrays(values, target, problem=repr(problem), rounding=rounding, undecided=undecided)
    table = Table("level", "decided", "seconds", title=repr(problem))
    for level, s in answer.stats.items():
        table.add_row(level, f"{s['decided']:.0f}", f"{s['seconds']:.3f}")
    Console(highlight=False).print(table)
    for name, count in undecided.items():
        click.echo(f"{name}: {values[name].size} elements, {count} undecided")


def _ends(rows: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", rows)
    if found is None:
        raise InvalidInput(f"rows: got {rows!r}, expected START:STOP, such as 0:1024")
    return int(found[1]), int(found[2])


def _part(problem: Problem, dout: Any, start: int, stop: int) -> Any:
    """Return the gradient that arrives at some rows, of one for the whole call."""
    if dout is not None and tuple(dout.shape) != tuple(problem.out_shape):
        raise InvalidInput(f"gradients: got shape {tuple(dout.shape)}, expected {tuple(problem.out_shape)}, out's")
    return None if dout is None else dout[:, :, start:stop]


def _warn(problem: Problem, dout: Any, rounding: str) -> None:
    """Say how long gradients of a large call take here, by some of its rows, and what takes less."""
    rows = problem.batch * problem.heads * problem.n_q
    if rows * problem.n_k < LARGE or tuple(dout.shape) != tuple(problem.out_shape):
        return
    try:
        took = min(_seconds(problem, dout, rounding, n) * problem.n_q / n for n in (1, PROBED))  # the first compiles
    except UnsupportedProblem:
        return
    if took > PATIENCE:
        click.echo(
            f"gradients of {rows} rows on {problem.n_k} keys take about {took:.0f} s here; --rows 0:{PROBED} gives "
            f"out, lse and dq of some of them in {took * PROBED / problem.n_q:.1f} s",
            err=True,
        )


def _seconds(problem: Problem, dout: Any, rounding: str, rows: int) -> float:
    start = time.perf_counter()
    evaluate(query_rows(problem, 0, rows), rounding=rounding, gradients=dout[:, :, :rows])
    return time.perf_counter() - start


def _read(source: str, options: dict[str, Any]) -> Problem:
    try:
        with open(source, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            plain = "refattn" not in file
            arrays = {n: file[n] for n in file} if plain else {}
    except FileNotFoundError as e:
        raise InvalidInput(f"{source}: there is no such file") from e
    except BAD_FILE as e:
        raise InvalidInput(f"{source}: is no .npz file that can be read") from e
    if plain:
        _check_names(source, set(arrays))
        return Problem(**arrays, **options)
    variant = options.pop("variant", None)
    if options:
        raise InvalidInput(f"{source}: carries its own options; leave out --{next(iter(options))}")
    problem = load_problem(source)
    if variant not in (None, problem.variant):
        raise InvalidInput(f"{source}: is a call of {problem.variant}, and --variant says {variant}")
    return problem


def _check_names(source: str, names: set[str]) -> None:
    """Refuse a plain .npz file with other arrays than a call has: none is dropped in silence."""
    more = (*TENSORS[3:], *OFFSETS, *LENGTHS, *SCALES, *PLACED)
    known = f"query, key, value and, where wanted, {', '.join(more)}"
    if missing := [n for n in TENSORS[:3] if n not in names]:
        found = ", ".join(sorted(names)) or "nothing"
        raise InvalidInput(f"{source}: has no {missing[0]} but {found}; expected {known}")
    if unknown := sorted(names - {*TENSORS[:3], *more}):
        hint = f"; {HINTS[unknown[0]]}" if unknown[0] in HINTS else ""
        raise InvalidInput(f"{source}: has {', '.join(unknown)}, which no array of a call is{hint}; expected {known}")


def _array(path: str) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError as e:
        raise InvalidInput(f"{path}: there is no such file") from e
    except BAD_FILE as e:
        raise InvalidInput(f"{path}: is no .npy file that can be read") from e
