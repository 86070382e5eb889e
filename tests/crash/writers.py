"""Everything of refattn that writes files, on small examples: a folder before, and what is done to it."""

from dataclasses import dataclass

import numpy as np

from refattn import Problem, evaluate, save_problem
from refattn.check.report.report import Check, Report
from refattn.cli.baseline import Baseline
from refattn.exact import parts
from refattn.files import save_arrays, write_text, write_whole
from refattn.golden.make import make


@dataclass(frozen=True)
class Writer:
    """What writes into a folder.

    Attributes
    ----------
    before : callable
        Fills the folder with what was there.
    write : callable
        Writes; after a crash it is called again.
    again : bool
        Whether the second call goes on from what the first has left. If not, it refuses a folder with files in it, and
        is given a new one.
    """

    before: object
    write: object
    again: bool = True


def nothing(folder):
    pass


def call(seed):
    draw = np.random.default_rng(seed)
    q, k, v = (draw.standard_normal((1, 2, n, 2), np.float32) for n in (5, 4, 4))
    return Problem(q, k, v)


def checkpoint(folder):
    parts.ROWS = 5
    evaluate(call(1), rounding="float32", checkpoint=folder)


evaluate(call(0), rounding="float32")  # compiled once, not in every process that is to crash


def baseline(text):
    def write(folder):
        check = Check("gaussian/plain[float32]", "failed", text)
        file = Baseline(str(folder / "known.toml"), new=True)
        file.write([Report("kernel", "softmax", (check,))])

    return write


def report(n):
    return lambda folder: write_text(folder / "report.xml", f"<testsuite>{n * '<testcase/>'}</testsuite>\n" * n)


ALL = {
    "problem": Writer(lambda f: save_problem(call(0), f / "p.npz"), lambda f: save_problem(call(1), f / "p.npz")),
    "new problem": Writer(nothing, lambda f: save_problem(call(1), f / "p.npz")),
    "arrays": Writer(
        lambda f: save_arrays({"x": np.arange(300.0)}, f / "a.npz"),
        lambda f: save_arrays({"x": np.arange(400.0)}, f / "a.npz"),
    ),
    "array": Writer(nothing, lambda f: write_whole(f / "out.npy", lambda file: np.save(file, np.arange(900.0)))),
    "report": Writer(report(20), report(70)),
    "baseline": Writer(baseline("old"), baseline("new")),
    "checkpoint": Writer(nothing, checkpoint),
    "golden": Writer(nothing, lambda f: make(f, dtypes=["float32"], only="gaussian/plain*"), again=False),
}
