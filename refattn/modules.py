"""A user's Python file as a module: run once in a process, its folder importable, whatever it raises a clear error."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .errors import InvalidInput, RefattnError

__all__ = ["module_of"]

_RUN: dict[tuple[Path, int, int], ModuleType] = {}


def module_of(path: str, what: str) -> ModuleType:
    """Return the module that a file defines; a file that was not changed since is not run again.

    Parameters
    ----------
    path : str
        The file, ending in ``.py``.
    what : str
        "kernel" or "variant", for messages.

    Raises
    ------
    InvalidInput
        There is no such file, or running it raised something.
    """
    file = Path(path)
    if not file.is_file() or file.suffix != ".py":
        raise InvalidInput(f"{what}: there is no Python file {path}; name yours as path/file.py:NAME")
    state = file.stat()
    key = (file.resolve(), state.st_mtime_ns, state.st_size)
    if key in _RUN:
        return _RUN[key]
    name = f"_refattn_{file.stem}" if file.stem in sys.modules else file.stem
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # its neighbours can be imported, as when it is run
    try:
        spec.loader.exec_module(module)
    except (RefattnError, KeyboardInterrupt):
        del sys.modules[name]
        raise
    except BaseException as e:
        del sys.modules[name]
        raise InvalidInput(f"{what}: importing {path} raised {type(e).__name__}: {e}") from e
    _RUN[key] = module
    return module
