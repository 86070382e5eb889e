"""A file system that fails: the k-th of a writer's writes, syncs and renames raises, or is the last before a crash.

As SQLite's crash tests do it (https://www.sqlite.org/testing.html, sections 3.2 and 3.3), for every k:

- "error": the call raises OSError and the program goes on;
- "kill": the process ends there, half of a write done, and its files are as it left them;
- "power": the process ends there, and every byte that was not synced is lost. A rename may last or not: both are tried.
"""

import errno
import io
import json
import os
from pathlib import Path

MODES = ("error", "kill", "power")
ENDED = 86
"""Exit code of a process that the shim has ended."""


class Shim:
    """Counts a process's calls, and fails the k-th; what was synced and renamed is written to a log.

    Parameters
    ----------
    k : int
        The call that fails, from 0; -1 for none.
    mode : str
        One of ``MODES``.
    log : Path
        Where the calls are kept for :func:`lose`.
    """

    def __init__(self, k, mode, log):
        self.k, self.mode, self.count = k, mode, 0
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.real = {n: getattr(os, n) for n in ("write", "fsync", "replace", "rename", "fdopen")}
        os.fsync, os.replace, os.rename, os.fdopen = self.fsync, self.replace, self.replace, self.fdopen

    def fails(self):
        """Count a call; tell whether it is the one, and end there or raise."""
        self.count += 1
        return self.count - 1 == self.k

    def end(self):
        if self.mode == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os._exit(ENDED)

    def say(self, *what):
        self.real["write"](self.log, (json.dumps(what) + "\n").encode())

    def write(self, fd, data):
        self.say("write", path_of(fd))
        if self.fails():
            self.real["write"](fd, bytes(data)[: len(data) // 2])
            self.end()
        return self.real["write"](fd, data)

    def fsync(self, fd):
        if self.fails():
            self.end()
        self.real["fsync"](fd)
        self.say("sync", path_of(fd), os.fstat(fd).st_size)

    def replace(self, old, new, **more):
        if self.fails():
            self.end()
        self.real["replace"](old, new, **more)
        self.say("rename", os.path.abspath(old), os.path.abspath(new))

    def fdopen(self, fd, mode="r", buffering=-1, **more):
        if mode != "wb":
            return self.real["fdopen"](fd, mode, buffering, **more)
        raw = Raw(fd, mode, self)
        return raw if buffering == 0 else io.BufferedWriter(raw, 1024)


class Raw(io.FileIO):
    """A file whose writes the shim counts."""

    def __init__(self, fd, mode, shim):
        super().__init__(fd, mode)
        self.shim = shim

    def write(self, data):
        return self.shim.write(self.fileno(), data)


def path_of(fd):
    return os.readlink(f"/proc/self/fd/{fd}")


def lost(log):
    """Return what a loss of power may take: sizes that files are cut to, by path, and the names that may go."""
    synced, renamed = {}, []
    for what, path, *more in map(json.loads, log.read_text().splitlines()):
        if what == "write":
            synced.setdefault(path, 0)
        elif what == "sync" and os.path.isdir(path):
            renamed = [name for name in renamed if str(Path(name).parent) != path]
        elif what == "sync":
            synced[path] = more[0]
        else:
            renamed.append(more[0])
            if path in synced:
                synced[more[0]] = synced.pop(path)
    cut = {path: size for path, size in synced.items() if os.path.exists(path) and os.path.getsize(path) > size}
    return cut, renamed
