"""Problems as files, and files that are never torn."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .arrays import to_numpy
from .dtypes import FORMATS
from .errors import InvalidInput
from .problem import OFFSETS, TENSORS, Problem

__all__ = [
    "check_folders",
    "load_arrays",
    "load_problem",
    "save_arrays",
    "save_problem",
    "write_text",
    "write_whole",
]

MARK = "refattn problem 1"
MARK_ARRAYS = "refattn arrays 1"
BAD_FILE = (KeyError, TypeError, ValueError, EOFError, OSError, zipfile.BadZipFile)


def check_folders(*targets: str | None) -> None:
    """Refuse files that could not be written later because their folder does not exist; None is no file."""
    for target in targets:
        if target is not None and not Path(target).resolve().parent.is_dir():
            raise InvalidInput(f"{target}: its folder does not exist; make it first")


def write_whole(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under a temporary name beside its target, then rename it: a reader never sees half of it.

    Raises
    ------
    InvalidInput
        The folder does not exist or cannot be written, or the disk is full; the target is as it was.
    """
    target = Path(path)
    try:
        fd, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent or ".")
    except OSError as e:
        raise InvalidInput(f"{target}: cannot write there ({e.strerror}); choose another folder") from e
    try:
        with os.fdopen(fd, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except OSError as e:
        os.unlink(name)
        raise InvalidInput(f"{target}: cannot write it ({e.strerror}); the file is as it was") from e
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole, in UTF-8."""
    write_whole(path, lambda f: f.write(text.encode()))


def save_problem(problem: Problem, path: str | Path) -> None:
    """Write a Problem to an .npz file; formats that NumPy lacks are kept as bits beside their names."""
    arrays = {n: to_numpy(x) for n, x in problem.arrays().items()}
    _save(path, MARK, arrays, settings=problem.settings())


def _save(path: str | Path, mark: str, arrays: Mapping[str, Any], **more: Any) -> None:
    stored = {n: x if x.dtype.isbuiltin == 1 else x.view(f"u{x.dtype.itemsize}") for n, x in arrays.items()}
    head = {"mark": mark, "types": {n: x.dtype.name for n, x in arrays.items()}, **more}
    parts: dict[str, Any] = {"refattn": np.array(json.dumps(head)), **stored}
    write_whole(path, lambda f: np.savez(f, **parts))


def load_problem(path: str | Path) -> Problem:
    """Read a Problem that :func:`save_problem` wrote.

    Raises
    ------
    InvalidInput
        There is no such file, or it is not one of ours.
    """
    head, arrays = _load(path, MARK, "a problem file of refattn; make one with refattn.save_problem")
    settings: dict[str, Any] = head["settings"]
    if "window" in settings:
        settings["window"] = tuple(settings["window"])
    options = settings.get("options", {})
    settings["options"] = {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}
    tensors: dict[str, Any] = {n: x for n, x in arrays.items() if n in (*TENSORS, *OFFSETS)}
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
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            head: dict[str, Any] = json.loads(str(file["refattn"]))
            if head["mark"] != mark:
                raise KeyError("mark")
            return head, {n: _typed(file[n], t) for n, t in head["types"].items()}
    except FileNotFoundError as e:
        raise InvalidInput(f"{path}: there is no such file") from e
    except BAD_FILE as e:
        raise InvalidInput(f"{path}: is not {kind}") from e


def _typed(x: Any, name: str) -> Any:
    return x.view(FORMATS[name].dtype) if name in FORMATS and x.dtype.kind == "u" else x
