"""Problems as files, and files that are never torn."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .arrays import native, to_numpy
from .dtypes import HELD
from .errors import InvalidInput, expect
from .problem import TENSORS, Problem

try:  # Windows has no such locks: there a crash's temporary file stays
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "check_folders",
    "load_arrays",
    "load_problem",
    "plain",
    "save_arrays",
    "save_problem",
    "sync",
    "write_text",
    "write_whole",
]

MOST_LINKS = 40
BAD_FILE = (KeyError, TypeError, ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, struct.error)
MARK = "refattn problem 1"
MARK_ARRAYS = "refattn arrays 1"


def check_folders(*targets: str | None) -> None:
    """Refuse files that could not be written later: folders, those without one, one named twice; None is no file."""
    seen: set[str] = set()
    for target in filter(None, targets):
        _check_name(target)
        path = os.path.realpath(target)
        if path in seen and not stat.S_ISCHR(os.stat(path).st_mode if os.path.exists(path) else 0):
            raise InvalidInput(f"{target}: is named twice, and would hold the last alone; name another file")
        if os.path.islink(path):
            raise InvalidInput(f"{target}: its links lead back to it; choose another file")
        if os.path.isdir(path):
            raise InvalidInput(f"{target}: is a folder; name a file")
        if not os.path.isdir(os.path.dirname(path)):
            raise InvalidInput(f"{target}: its folder does not exist; make it first")
        seen.add(path)


def write_whole(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under a temporary name beside its target, then rename it: a reader never sees half of it.

    A link is followed, a file keeps its mode and, where the system allows it, its owner. What is no regular file (a
    device, a pipe, a process's own output) is written into: it is never replaced.

    Raises
    ------
    InvalidInput
        The folder does not exist or cannot be written, or the disk is full; a regular target is as it was, unless
        the text says that it is written and may not last.
    """
    target = Path(path)
    _check_name(target)
    try:
        own, real = _followed(target)
        found = None if own is not None else _status(real)
        if own is not None or (found is not None and not stat.S_ISREG(found.st_mode)):
            whole = BytesIO()  # all of it is made before the first byte is written
            write(whole)
            _write_into(os.dup(own) if own is not None else os.open(real, os.O_WRONLY), whole.getvalue())
            return
    except OSError as e:
        raise InvalidInput(f"{target}: cannot write it ({e.strerror}); choose another file") from e
    if found is not None and not os.access(real, os.W_OK):
        raise InvalidInput(f"{target}: cannot write it (it is read-only); choose another file, or make it writable")
    _replace(target, Path(real), found, write)


def _replace(target: Path, real: Path, found: os.stat_result | None, write: Callable[[BinaryIO], Any]) -> None:
    try:
        _sweep(real)
        name, fd = _begun(real, 0o666 if found is None else 0o600)
    except OSError as e:
        raise InvalidInput(f"{target}: cannot write there ({e.strerror}); choose another folder") from e
    try:
        with contextlib.ExitStack() as held:
            if fcntl is not None:
                held.callback(os.close, os.dup(fd))  # the lock holds until the file has its name
            with os.fdopen(fd, "wb") as f:
                write(f)
                f.flush()
                if found is not None:
                    _alike(name, found)
                os.fsync(f.fileno())
            os.replace(name, real)
    except OSError as e:
        name.unlink(missing_ok=True)
        raise InvalidInput(f"{target}: cannot write it ({e.strerror}); the file is as it was") from e
    except BaseException:
        name.unlink(missing_ok=True)
        raise
    try:
        sync(real.parent)
    except OSError as e:
        raise InvalidInput(f"{target}: written, but the disk may not keep it ({e.strerror}); look at the disk") from e


def _begun(real: Path, mode: int) -> tuple[Path, int]:
    """Open a new file beside a target, locked while its writer lives.

    Its name is its own and not longer than the system allows; a private file's successor is private from its first
    byte. The system takes the umask away itself: asking for it would change it for every thread meanwhile.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        name = real.with_name(f".{real.name[:32]}.{secrets.token_hex(8)}")
        fd = os.open(name, flags, mode)
        if fcntl is None:
            return name, fd
        with contextlib.suppress(OSError):  # some network's file systems have no locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return name, fd
        os.close(fd)  # another writer swept it between its making and its lock


def _sweep(real: Path) -> None:
    """Remove what writers of a file that were killed have left beside it; what a live one writes is locked."""
    stale = re.compile(re.escape(f".{real.name[:32]}.") + "[0-9a-f]{16}")
    for name in os.listdir(real.parent) if fcntl is not None else ():
        if stale.fullmatch(name) is None:
            continue
        with contextlib.suppress(OSError):  # locked, gone, or not ours
            fd = os.open(real.with_name(name), os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(real.with_name(name))
            finally:
                os.close(fd)


def _followed(target: Path) -> tuple[int | None, str]:
    """Return the number of this process's own file where a path names one, and the path with its links followed."""
    path = os.path.abspath(target)
    for _ in range(MOST_LINKS):
        # of the last name only: /proc/self/fd/1 and /dev/stdout are links, too, and lead on to what is open there
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        folder, name = os.path.split(path)
        if name.isascii() and name.isdecimal() and folder in ("/dev/fd", f"/proc/{os.getpid()}/fd"):
            try:
                os.fstat(int(name))  # is it open?
            except OverflowError as e:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from e
            return int(name), path
        if not os.path.islink(path):
            return None, path
        if _status(path) is not None and folder.startswith("/proc/"):
            return None, path  # another process's: the link is followed when it is opened
        path = os.path.join(folder, os.readlink(path))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _write_into(fd: int, data: bytes) -> None:
    with os.fdopen(fd, "wb", buffering=0) as f:
        rest = memoryview(data)
        while len(rest):
            rest = rest[f.write(rest) or 0 :]


def _alike(name: Path, found: os.stat_result) -> None:
    """Give a new file the owner and the mode of the one that it replaces."""
    if hasattr(os, "chown"):
        with contextlib.suppress(PermissionError):
            os.chown(name, found.st_uid, found.st_gid)
    os.chmod(name, stat.S_IMODE(found.st_mode))


def sync(folder: Path) -> None:
    """Make a folder's new names last. Where the system cannot be asked for it, nothing is done."""
    try:
        fd = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def _check_name(path: str | Path) -> None:
    if "\0" in str(path):
        raise InvalidInput(f"{str(path)!r}: holds a NUL, as no file's name does")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole, in UTF-8; what is no character (half of a surrogate pair) as "?"."""
    write_whole(path, lambda f: f.write(text.encode(errors="replace")))


def save_problem(problem: Problem, path: str | Path) -> None:
    """Write a Problem to an .npz file; formats that NumPy lacks are kept as bits beside their names."""
    expect(isinstance(problem, Problem), "problem", problem, "a Problem; save_problem(problem, path)")
    expect(isinstance(path, str | Path), "path", path, "a path")
    problem = problem.written_out()
    _save(path, MARK, problem.arrays(), settings=problem.settings())


def _save(path: str | Path, mark: str, arrays: Mapping[str, Any], **more: Any) -> None:
    arrays = {n: to_numpy(x, n) for n, x in arrays.items()}
    # 2 is a type from outside NumPy; of its own types it is 1, or 0 where the array came from another process
    stored = {n: x.view(f"u{x.dtype.itemsize}") if x.dtype.isbuiltin == 2 else x for n, x in arrays.items()}
    head = {"mark": mark, "types": {n: x.dtype.name for n, x in arrays.items()}, **more}
    parts: dict[str, Any] = {"refattn": np.array(json.dumps(head, default=plain)), **stored}
    write_whole(path, lambda f: np.savez(f, **parts))


def plain(x: Any) -> Any:
    """Return what JSON can hold of a number or an array of NumPy, all of it; for ``json.dumps(default=)``."""
    if isinstance(x, np.generic | np.ndarray):
        return x.tolist()
    raise InvalidInput(f"{type(x).__name__}: cannot be kept in a file; pass numbers, names and tuples of them")


def load_problem(path: str | Path) -> Problem:
    """Read a Problem that :func:`save_problem` wrote.

    Raises
    ------
    InvalidInput
        There is no such file, or it is not one of ours.
    """
    head, arrays = _load(path, MARK, "a problem file of refattn; make one with refattn.save_problem")
    settings, names = head.get("settings"), {f.name for f in fields(Problem)}
    if not isinstance(settings, dict) or not isinstance(settings.get("options", {}), dict):
        raise InvalidInput(f"{path}: its settings are no mapping of names to values; write it with save_problem again")
    if unknown := sorted(str(n)[:40] for n in {*arrays, *settings} - names):
        raise InvalidInput(f"{path}: has {', '.join(unknown)}, which Problem does not know; another version wrote it")
    if missing := [n for n in TENSORS[:3] if n not in arrays]:
        raise InvalidInput(f"{path}: has no {', '.join(missing)}; write it with save_problem again")
    if isinstance(settings.get("window"), list):
        settings["window"] = tuple(settings["window"])
    options = settings.get("options", {})
    settings["options"] = {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}
    for name in arrays.keys() & settings.keys():
        raise InvalidInput(f"{path}: has {name} twice; write it with save_problem again")
    tensors: dict[str, Any] = arrays
    return Problem(**tensors, **settings)


def save_arrays(arrays: Mapping[str, Any], path: str | Path, **about: Any) -> None:
    """Write named arrays to an .npz file, whole; formats that NumPy lacks are kept as bits beside their names."""
    _save(path, MARK_ARRAYS, arrays, about=about)


def load_arrays(path: str | Path) -> dict[str, NDArray[Any]]:
    """Read arrays that :func:`save_arrays` wrote.

    Raises
    ------
    InvalidInput
        There is no such file, or it is not one of ours.
    """
    return _load(path, MARK_ARRAYS, "an array file of refattn")[1]


def _load(path: str | Path, mark: str, kind: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    _check_name(path)
    try:
        opened = open(path, "rb")  # noqa: SIM115 (what is wrong with opening is told apart from what is in it)
    except FileNotFoundError as e:
        raise InvalidInput(f"{path}: there is no such file") from e
    except OSError as e:
        raise InvalidInput(f"{path}: cannot be read ({e.strerror})") from e
    try:
        with opened, np.load(opened, allow_pickle=False) as file:
            head: dict[str, Any] = json.loads(str(file["refattn"]))
            if head["mark"] != mark:
                raise KeyError("mark")
            return head, {n: _typed(file[n], t) for n, t in head["types"].items()}
    except Exception as e:  # a broken archive breaks its readers in many ways: zlib's, struct's, memory's, ...
        raise InvalidInput(f"{path}: is not {kind}") from e


def _typed(x: NDArray[Any], name: str) -> NDArray[Any]:
    x = native(x)
    x = x.view(HELD[name]) if name in HELD and x.dtype.kind == "u" else x
    if x.dtype.name != name:
        raise ValueError("another type than the head says")
    return x
