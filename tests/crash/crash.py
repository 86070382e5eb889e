"""Let every writer crash at each of its calls, and look at what is left: old or new, never torn."""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from refattn import InvalidInput
from refattn.files import load_arrays

from .shim import ENDED, Shim, lost
from .writers import ALL

NAMED = 7
"""Exit code of a process whose writer raised refattn's own error."""


def in_child(work):
    """Run something in a process of its own; return its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except InvalidInput:
            code = NAMED
        except BaseException as e:
            print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(path):
    """Return what a file says: of a checkpoint all but how long it took, of another file its bytes."""
    if path.suffix == ".npz":
        with contextlib.suppress(InvalidInput):
            return {n: x.tobytes() for n, x in load_arrays(path).items() if not n.startswith("stats ")}
    return path.read_bytes()


def contents(folder):
    """Return what a folder's files say, and the temporary ones' names."""
    files = {p.name: content(p) for p in folder.iterdir()}
    whole = {n: x for n, x in files.items() if not n.startswith(".")}
    return whole, sorted(files.keys() - whole.keys())


class Crashes:
    """All crashes of one writer in one mode."""

    def __init__(self, name, mode, place):
        self.writer, self.mode, self.place = ALL[name], mode, Path(place)
        self.folder, self.log, self.copy = self.place / "folder", self.place / "log", self.place / "copy"
        self.copy.mkdir()
        assert in_child(lambda: self.writer.before(self.copy)) == 0
        self.old = contents(self.copy)[0]
        self.calls = -1
        code = self.run(-1)
        self.new, rest = contents(self.folder)
        assert (code, rest, lost(self.log)) == (0, [], ({}, [])), "what is done is not on the disk"
        self.calls = len((self.place / "count").read_bytes())

    def run(self, k):
        """Write with the shim into the folder as it was; return the exit code."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.copy, self.folder)
        self.log.unlink(missing_ok=True)

        def work():
            shim = Shim(k, self.mode, self.log)
            self.writer.write(self.folder)
            (self.place / "count").write_bytes(bytes(shim.count))

        return in_child(work)

    def wrong(self, k):
        """Return what is wrong after a crash at the k-th call; empty where nothing is."""
        code = self.run(k)
        found = [] if code == (NAMED if self.mode == "error" else ENDED) else [f"ended with exit code {code}"]
        worlds = [()]
        if self.mode == "power":
            cut, names = lost(self.log)
            for path, size in cut.items():
                os.truncate(path, size)
            worlds = [(), names]
        for gone in worlds:
            for path in map(Path, gone):  # the rename has not lasted: the name is what it was
                before = self.copy / path.name
                shutil.copy(before, path) if before.exists() else path.unlink()
            whole, rest = contents(self.folder)
            found += [f"{n} is torn" for n, x in whole.items() if x not in (self.old.get(n), self.new.get(n))]
            found += [f"{n} is lost" for n in self.old.keys() - whole.keys()]
            found += [f"{n} is left" for n in rest if self.mode == "error"]
        return found + self.afterwards()

    def afterwards(self):
        """Write once more, without a fault: all must be new, and nothing may lie about."""
        if not self.writer.again:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        code = in_child(lambda: self.writer.write(self.folder))
        return (
            []
            if (code, contents(self.folder)) == (0, (self.new, []))
            else ["the next write differs from one without a crash"]
        )


def crash(name, mode):
    """Try all crashes of a writer; return how many, and what was wrong."""
    with tempfile.TemporaryDirectory() as place:
        all_of = Crashes(name, mode, place)
        return all_of.calls, [f"{name}, {mode}, call {k}: {x}" for k in range(all_of.calls) for x in all_of.wrong(k)]
