"""Exact answers made beside the kernel's own process, ahead of the checks that need them.

The checks are cut into blocks. In each the workers go from the last check to the first and meet the run, which goes
from the first and makes itself what is not there yet: nobody waits, and few answers are held.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import cast

from ..variants.own import FILES, know, portable
from .bounds.expected import Expected, Key, keep, kept, made
from .bounds.truth import on_a_gpu, takes_long
from .inputs.calls import Call
from .inputs.families import Case, cases
from .inputs.sample import LINES
from .model import Capabilities

__all__ = ["Ahead", "for_the_gpu", "serve"]

BLOCK, EACH = 24, 4
"""Answers to a block, at least and for each process: the run's block and the next are held, each of at most some ten
megabytes. Where workers are many, fewer are made while the run waits for a long one."""
FEWEST = 12
"""Fewer answers take less time than a process to start."""
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
CHILD = "from refattn.check.ahead import serve; serve()"


class Ahead:
    """Workers for the answers of a run.

    Parameters
    ----------
    keys : list of Key
        The answers that the run needs, in its order.
    jobs : int
        Processes, the run's own among them; with 1 there are no workers.
    """

    def __init__(self, keys: Iterable[Key], jobs: int) -> None:
        own = [k for k in dict.fromkeys(keys) if _travels(k) and not (kept(k) or for_the_gpu(k))]
        wanted = own if jobs > 1 else []
        self._left = wanted if len(wanted) > FEWEST else []
        self._made: dict[Key, Future[Expected]] = {}
        self._block: list[Key] = []
        self._size = max(BLOCK, EACH * jobs)
        self._workers = _Workers()
        self._pool = ThreadPoolExecutor(max(1, jobs - 1), initializer=self._workers.start) if self._left else None
        self._next()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._made.values():
            future.cancel()
        self._workers.stop()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._workers.stop()  # one that was only starting

    def prepare(self, key: Key | None) -> None:
        """Have an answer at hand if a worker has it or is at it; else the check makes it."""
        if key is None or key not in self._made:
            return
        if key in self._block:  # the run has come to the block that was sent last: send another
            self._next()
        future = self._made.pop(key)
        if not future.cancel():
            try:
                keep(key, future.result())
            except (OSError, EOFError, pickle.PickleError) as e:
                warnings.warn(f"a process for exact answers ended ({e}); the run makes its own", stacklevel=2)

    def _next(self) -> None:
        self._block, self._left = self._left[: self._size], self._left[self._size :]
        for key in reversed(self._block):
            assert self._pool is not None
            self._made[key] = self._pool.submit(self._workers.ask, key)


def _travels(key: Key) -> bool:
    """Tell whether another process can find the operator: the package's own, or one of a file."""
    return portable(key[0].variant) is None or key[0].variant in FILES


def for_the_gpu(key: Key) -> bool:
    """Tell whether the run has an answer made on a GPU: that of a call whose compared rows see many keys."""
    case, call = key[0], key[0].build
    if not (on_a_gpu() and case.sampled and isinstance(call, Call)):
        return False
    keys = sum(n for _, n in call.lengths)
    return takes_long(LINES * keys, call.h_kv * keys, call.d + call.d_v, key[3])


class _Workers:
    """One process for each thread of a pool."""

    def __init__(self) -> None:
        self._mine = threading.local()
        self._all: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        path = os.pathsep.join(x or os.getcwd() for x in sys.path)
        self._mine.process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | dict.fromkeys(THREADS, "1") | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the run, which ends them
        )
        self._all.append(self._mine.process)

    def ask(self, key: Key) -> Expected:
        case, *rest = key
        process = self._mine.process
        # a case's function does not travel: the other process finds the case by its name
        asked = case if isinstance(case.build, Call) else (case.variant, case.name, case.able)
        pickle.dump((portable(case.variant), asked, rest), process.stdin)
        process.stdin.flush()
        return cast(Expected, pickle.load(process.stdout))

    def stop(self) -> None:
        while self._all:
            process = self._all.pop()
            process.kill()
            process.communicate()


def serve() -> None:
    """Answer on standard output, as long as there is standard input; what else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            own, asked, rest = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        know(own)
        answer = made(asked if isinstance(asked, Case) else _named(*asked), *rest)
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except BrokenPipeError:  # the run has ended and waits for no answer
            os._exit(0)


def _named(variant: str, name: str, able: Capabilities | None) -> Case:
    return replace(next(c for c in cases(variant, "nightly") if c.name == name), able=able)
