"""A kernel in a process of its own: one that hangs or crashes is a named failure, and the run goes on."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

from numpy.typing import NDArray

from ...errors import InvalidInput, KernelError, UnsupportedProblem
from ...pages import append
from ...problem import Problem
from ...variants.own import know, named
from ..call import call_gradients, call_kernel
from ..native import lost
from ..reading import note, plain
from . import find

__all__ = ["Isolated", "check_limit"]

START = 120.0
"""Seconds for the process to start and import the kernel."""
LONGEST = 1e6
"""Seconds that a call may be given: what the system's clocks take everywhere."""


def check_limit(seconds: float) -> None:
    """Refuse a time limit for a call that clocks cannot hold."""
    if not 0 < seconds <= LONGEST:
        raise InvalidInput(f"time-limit: got {seconds} seconds, expected more than 0 and at most {LONGEST:g}")


class Isolated:
    """A kernel by name, called in a child process that is started again when it has ended.

    Parameters
    ----------
    name : str
        As ``refattn check`` takes it; it must name one kernel.
    seconds : float
        The time limit of one call.

    Raises
    ------
    InvalidInput
        The name means no kernel, or several; a limit that is not above 0.
    """

    native = True  # the other process puts the arrays where the kernel wants them
    serial = True

    def __init__(self, name: str, seconds: float = 60.0) -> None:
        check_limit(seconds)
        entries = find(name)
        if len(entries) > 1:
            raise InvalidInput(
                f"kernel: {name} means {len(entries)} kernels; name one of {', '.join(e.name for e in entries)}"
            )
        self.name, self.seconds, entry = name, seconds, entries[0]
        self.__name__ = entry.name
        self.capabilities, self.model = entry.capabilities, entry.model
        self._process: Any = None
        self._pipe: Connection | None = None

    def __call__(self, problem: Problem) -> Any:
        """Return out and lse, or out alone."""
        result = self._ask(problem, None)
        if problem.new_key is not None:
            append(problem)  # the other process has looked at what was written there
        return result.out if result.lse is None else (result.out, result.lse)

    def gradients(self, problem: Problem, dout: NDArray[Any]) -> Any:
        """Return the gradients by name."""
        return self._ask(problem, dout)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None

    def _ask(self, problem: Problem, dout: Any) -> Any:
        if self._process is None or not self._process.is_alive():
            self._start(problem.variant)
        assert self._pipe is not None
        try:
            bare = plain(problem)
            self._pipe.send((bare.arrays(), bare.settings() | {"variant": bare.variant}, dout))
            if not self._pipe.poll(self.seconds):
                self.close()
                raise KernelError(f"the kernel gave no answer within {self.seconds:g} s; its process was ended")
            kind, answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as e:
            raise KernelError(self._death()) from e
        if kind == "unsupported":
            raise UnsupportedProblem(answer)
        if kind == "lost":
            self.close()
        if kind in ("error", "lost"):
            raise KernelError(answer)
        note(problem, answer[1])
        return answer[0]

    def _start(self, variant: str) -> None:
        # not fork: the libraries that kernels use do not survive it
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(self.name, named(variant), other), daemon=True)
        self._process.start()
        other.close()
        if not self._pipe.poll(START) or self._pipe.recv() != "ready":
            raise KernelError(f"the kernel's process did not start within {START:g} s")

    def _death(self) -> str:
        process, self._process = self._process, None
        process.join()
        code = process.exitcode
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return f"the kernel ended its process {how}"


def _serve(name: str, variant: str, pipe: Connection) -> None:
    """Answer calls until the other end closes."""
    kernel = find(name)[0].kernel()
    know(variant if ":" in variant else None)
    pipe.send("ready")
    while True:
        try:
            arrays, settings, dout = pipe.recv()
        except EOFError:
            return
        try:
            problem = Problem(**arrays, **settings)
            if dout is None:
                result = call_kernel(kernel.call, problem)
                answer: Any = result, result.read
            else:
                answer = call_gradients(kernel.call, problem, dout)
            pipe.send(("answer", answer))
        except UnsupportedProblem as e:
            pipe.send(("unsupported", str(e)))
        except KernelError as e:
            pipe.send(("lost" if lost(kernel.capabilities) else "error", str(e)))
