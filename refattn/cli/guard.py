"""The command line's entry: what runs kernels runs in a process of its own, and says at its end that it came there.

A kernel may leave its process by ``os._exit(0)`` or crash it. What the shell sees must then not be a passed check.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["at", "child", "guarded", "reached"]

CHILD = "from refattn.cli.guard import child; child()"
GUARDED = ("check", "init")
_PLACE: list[Path] = []
_REACHED: list[bool] = []
_TOLD: list[bool] = []


def guarded() -> None:
    """Run the command line; what runs kernels in a child whose exit code counts only where it reached its end."""
    if sys.argv[1:2] not in [[name] for name in GUARDED]:
        _main(sys.argv[1:])
        return
    here = sys.path[:1] in ([""], [os.getcwd()])  # as under python -m, which finds modules in the working folder
    with tempfile.TemporaryDirectory(prefix="refattn-") as folder:
        place = Path(folder) / "ended"
        command = [sys.executable, *([] if here else ["-P"]), "-c", CHILD, str(place), *sys.argv[1:]]
        code = _wait(subprocess.Popen(command))
        said = place.read_text() if place.is_file() else ""
        ended = said == f"ended {code}"
    if _TOLD:
        sys.stderr.write("error: the run was told to end by signal 15 (SIGTERM); it has no verdict\n")
    elif not ended:
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        where = f"at {said}" if said and not said.startswith("ended ") else "before its first check"
        more = (
            "; --time-limit SECONDS runs each kernel in a process of its own and goes on" if "check" in sys.argv else ""
        )
        sys.stderr.write(f"error: the run ended {how} {where}: the kernel left the process or crashed it{more}\n")
    sys.exit(code if ended and not _TOLD else 1)


def _wait(process: subprocess.Popen[Any]) -> int:
    """Return a process's exit code; what asks us to end is passed on to it."""

    def end(*_: Any) -> None:
        _TOLD.append(True)
        process.terminate()

    signal.signal(signal.SIGTERM, end)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal has told the child, too
            continue


def child() -> None:
    """Run the command line, and write to the file named first how it ended."""
    place, *arguments = sys.argv[1:]
    sys.argv = ["refattn", *arguments]
    _PLACE.append(Path(place))
    try:
        _main(arguments)
        code: Any = 0
    except SystemExit as e:
        code = e.code
    sys.stdout.flush()
    code = code if isinstance(code, int) else int(code is not None)
    if code or _REACHED or {"-h", "--help"} & set(arguments):
        Path(place).write_text(f"ended {code}")
    sys.exit(code)


def at(text: str) -> None:
    """Note what is begun, for the message if the process ends there."""
    for place in _PLACE:
        place.write_text(text, encoding="utf-8")


def reached() -> None:
    """Note that a command has come to its end: exit code 0 is believed only then."""
    _REACHED.append(True)


def _main(arguments: list[str]) -> None:
    from .main import main

    main(arguments, prog_name="refattn")
