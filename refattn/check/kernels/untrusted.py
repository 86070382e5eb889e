"""A kernel that nobody vouches for: in a process without refattn, with limits on time and memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import FORMATS
from ...errors import InvalidInput, KernelError, UnsupportedProblem
from ...problem import VARIANT, Problem
from ..model import UNDECLARED, Capabilities
from ..reading import note, plain
from .alone import receive, send
from .isolated import check_limit

__all__ = ["Untrusted"]

START = 120.0
"""Seconds for the process to start and import the kernel."""
MOST = 2.0**33
"""GiB, which no address space has."""
PROGRAM = Path(__file__).with_name("alone.py")
HIDDEN = ("REFATTN", "PYTEST", "PYTHONPATH")
"""How names of the environment begin that the kernel's process does not see."""


class Untrusted:
    """A function of a file, called where it sees its call and nothing of what judges it.

    Its process imports nothing of refattn, and a plain ``import refattn`` finds a module of a few names; no name of a
    check is sent to it. It is a guard against code that looks for its judge, and not a prison: what the file system
    and the processes of the same user hold, it can read.

    Parameters
    ----------
    name : str
        ``path/file.py:function``.
    seconds : float
        The time limit of one call.
    memory : float
        The limit of its address space in GiB; 0 means none (a GPU's memory is mapped there, too).

    Raises
    ------
    InvalidInput
        No such file or function, limits that are none, or whatever importing the file raises.
    """

    native = True  # its process puts the arrays where it wants them
    serial = True

    def __init__(self, name: str, seconds: float = 60.0, memory: float = 16.0) -> None:
        path, _, function = name.rpartition(":")
        if not path.endswith(".py") or not Path(path).is_file():
            raise InvalidInput(
                f"kernel: got {name!r}; an untrusted kernel is a function of a file, path/file.py:function"
            )
        check_limit(seconds)
        if not 0 <= memory < MOST:
            raise InvalidInput(f"memory-limit: got {memory} GiB, expected at least 0 and less than {MOST:g}")
        self.name, self.seconds, self.memory = name, seconds, memory
        self.__name__ = function
        self._file = str(Path(path).resolve())
        self._process: Any = None
        self._pipe: Any = None
        said = self._start()
        self.capabilities = _capabilities(said.get("capabilities"))
        if said.get("gradients"):
            self.gradients = self._gradients

    def __call__(self, problem: Problem) -> Any:
        """Return out and lse, or out alone."""
        found = self._ask(problem, None)
        for name in ("key", "value") if problem.new_key is not None else ():
            cache, x = getattr(problem, name), found.pop(f"cache_{name}", None)
            if x is None or x.shape != cache.shape or x.dtype != cache.dtype:
                raise KernelError(f"the kernel's process sent no {name}")
            cache[...] = x
        if "out" not in found:
            raise KernelError("the kernel returned no array; expected out or (out, lse)")
        return (found["out"], found["lse"]) if "lse" in found else found["out"]

    def _gradients(self, problem: Problem, dout: NDArray[Any]) -> Mapping[str, Any]:
        return self._ask(problem, dout)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._kill()
            self._process.wait()
            self._pipe.close()
        self._process = self._pipe = None

    def _ask(self, problem: Problem, dout: Any) -> dict[str, Any]:
        bare = plain(problem)
        if bare.variant != VARIANT:
            raise UnsupportedProblem(f"variant: an untrusted kernel computes {VARIANT} attention, not {bare.variant}")
        if self._process is None or self._process.poll() is not None:
            self._start()
        settings = bare.settings() | {"variant": bare.variant}
        sent = bare.arrays() | ({} if dout is None else {"dout": np.asarray(dout)})
        header, arrays = self._exchange(
            {"settings": settings, "lacks": self.capabilities.missing(bare)}, sent, self.seconds
        )
        if header["kind"] == "unsupported":
            raise UnsupportedProblem(str(header["text"]))
        if header["kind"] != "answer":
            raise KernelError(str(header.get("text", "the kernel's process gave no answer")))
        if header["changed"]:
            raise KernelError(
                f"the kernel changed its input {header['changed'][0]}; it must leave its inputs as they are"
            )
        unknown = [n for n, x in arrays.items() if x.dtype.name not in FORMATS and not n.startswith("cache_")]
        if unknown:
            raise KernelError(f"{unknown[0]}: got dtype {arrays[unknown[0]].dtype.name}, expected a float of the table")
        note(problem, frozenset(map(str, header["read"])))
        return arrays

    def _exchange(self, header: Any, arrays: dict[str, Any], seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """Send a call and return its answer; the process ends with the time."""
        process, pipe = self._process, self._pipe
        over = threading.Event()

        def end() -> None:
            over.set()
            self._kill()

        clock = threading.Timer(seconds, end)
        clock.start()
        try:
            if header is not None:
                send(pipe, header, arrays)
            return receive(pipe)
        except (EOFError, OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            code: Any = None
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(5.0 if isinstance(e, EOFError | OSError) else 0.0)
            self.close()
            if over.is_set():
                raise KernelError(f"the kernel gave no answer within {seconds:g} s; its process was ended") from e
            if code is not None:
                raise KernelError(f"the kernel ended its process (exit code {code})") from e
            raise KernelError("the kernel's process sent what is no answer") from e
        finally:
            clock.cancel()

    def _kill(self) -> None:
        """End the process and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _start(self) -> dict[str, Any]:
        self._pipe, other = Pipe()
        seen = {n: x for n, x in os.environ.items() if not n.startswith(HIDDEN)}
        number = other.fileno()
        function = self.__name__
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM), str(number), self._file, function, str(self.memory)],
            pass_fds=(number,),
            start_new_session=True,  # what it starts ends with it
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # what it prints could hold anything, and any amount of it
            stderr=subprocess.DEVNULL,
            cwd=tempfile.gettempdir(),
            env=seen,
        )
        other.close()
        try:
            said, _ = self._exchange(None, {}, START)
        except KernelError as e:
            raise InvalidInput(f"kernel: importing {self.name}: {e}") from e
        if said.get("kind") != "ready":
            self.close()
            raise InvalidInput(f"kernel: {self.name} raised {said.get('text', 'no answer')}")
        return said


def _capabilities(said: Any) -> Capabilities:
    """Return what a kernel's file declares; it comes as JSON, so that nothing of it runs here."""
    if said is None:
        return UNDECLARED
    try:
        known: dict[str, Any] = {n: frozenset(x) if isinstance(x, list) else x for n, x in said.items()}
        return Capabilities(**known)
    except (TypeError, ValueError, AttributeError) as e:
        raise InvalidInput(f"kernel: capabilities {json.dumps(said)[:200]}: {e}") from e
