"""Whatever fails while a file is written, it is old or new: never torn, never lost; and a careless writer is found."""

import os
import subprocess
import sys

import pytest

from .shim import MODES

RUN = """
from tests.crash.crash import crash
from tests.crash.writers import ALL
{}
print([crash({!r}, mode) for mode in {!r}])
"""
WRITERS = ("problem", "new problem", "arrays", "array", "report", "baseline", "checkpoint", "golden")


def crashed(change, name, modes):
    command = [sys.executable, "-c", RUN.format(change, name, modes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr
    return eval(done.stdout)


@pytest.mark.parametrize("name", WRITERS)
def test_a_crash_anywhere_leaves_old_or_new(name):
    for count, wrong in crashed(f"assert tuple(ALL) == {WRITERS}", name, MODES):
        assert count >= 4
        assert wrong == []


BROKEN = {
    "written in place": "from refattn import files; files.os.replace = lambda a, b: None; "
    "files._begun = lambda real, mode: (real, files.os.open(real, 577, mode))",
    "not synced": "from tests.crash.shim import Shim; from os.path import isdir; true = Shim.fsync; "
    "Shim.fsync = lambda shim, fd: true(shim, fd) if isdir(f'/proc/self/fd/{fd}') else None",
    "names not synced": "from refattn import files; files.sync = lambda folder: None",
    "nothing swept": "from refattn import files; files._sweep = lambda real: None",
}


@pytest.mark.parametrize(
    ("kind", "mode", "text"),
    [
        ("written in place", "kill", "torn"),
        ("not synced", "power", "not on the disk"),
        ("names not synced", "power", "not on the disk"),
        ("nothing swept", "kill", "the next write differs"),
    ],
)
def test_what_is_written_carelessly_is_found(kind, mode, text):
    with pytest.raises(AssertionError, match=text):
        assert crashed(BROKEN[kind], "report", [mode]) == []
