"""The command line's entry: ``refattn check`` runs in a process of its own, and says at its end that it came there.

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

__all__ = ["child", "guarded"]

CHILD = "from refattn.cli.guard import child; child()"


def guarded() -> None:
    """Run the command line; `check` in a child whose exit code counts only where it reached its end."""
    if sys.argv[1:2] != ["check"]:
        _main(sys.argv[1:])
        return
    here = sys.path[:1] in ([""], [os.getcwd()])  # as under python -m, which finds modules in the working folder
    with tempfile.TemporaryDirectory(prefix="refattn-") as folder:
        place = Path(folder) / "ended"
        command = [sys.executable, *([] if here else ["-P"]), "-c", CHILD, str(place), *sys.argv[1:]]
        code = _wait(subprocess.Popen(command))
        ended = place.is_file() and place.read_text() == f"ended {code}"
    if not ended:
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        sys.stderr.write(
            f"error: the run ended {how} before its report: a kernel left the process or crashed it; "
            "--time-limit SECONDS runs each kernel in a process of its own and says which\n"
        )
    sys.exit(code if ended else 1)


def _wait(process: subprocess.Popen[Any]) -> int:
    """Return a process's exit code; what asks us to end is passed on to it."""
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal has told the child, too
            continue


def child() -> None:
    """Run the command line, and write to the file named first how it ended."""
    place, *arguments = sys.argv[1:]
    sys.argv = ["refattn", *arguments]
    try:
        _main(arguments)
        code: Any = 0
    except SystemExit as e:
        code = e.code
    sys.stdout.flush()
    code = code if isinstance(code, int) else int(code is not None)
    Path(place).write_text(f"ended {code}")
    sys.exit(code)


def _main(arguments: list[str]) -> None:
    from .main import main

    main(arguments, prog_name="refattn")
