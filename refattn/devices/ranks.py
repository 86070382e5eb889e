"""Processes with a process group of torch.distributed, each of which runs a function on its shard."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, get_context, parent_process
from typing import Any

from ..arrays import kind_of, to_kind, to_numpy
from ..errors import InvalidInput, KernelError, UnsupportedProblem, expect, printable
from ..functions.arguments import whole, within

__all__ = ["BACKENDS", "Ranks", "Shard", "function_of"]

BACKENDS = ("gloo", "nccl")
MOST = 64
"""Processes on one machine."""
LONGEST = 1e6
WANTED = "expected a mapping of names, such as 'out', to tensors"
GRACE = 1.0
"""Seconds in which other ranks may tell why the first that failed did."""


@dataclass(frozen=True)
class Shard:
    """What one rank has of a call: PyTorch's tensors, on the CPU, with NCCL on the rank's own GPU.

    Attributes
    ----------
    rank, world_size : int
        Which rank this is, of how many; they are those of torch.distributed's default group, too.
    layout : str
        One of ``refattn.devices.shards.LAYOUTS``.
    query, key, value : (b, h, n / world_size, d) tensors
        Its rows and its keys.
    dout : (b, h_q, n_q / world_size, d_v) tensor
        The gradient that arrives at its rows of out.
    rows, keys : int64 tensors of one axis
        Which rows, and which keys, of the whole call these are.
    n_q, n_k : int
        Rows and keys of the whole call.
    options : dict
        The call's ``causal``, ``scale``, ``window``, ``softcap``, ``offset`` and ``alignment``, those that are set.
    """

    rank: int
    world_size: int
    layout: str
    query: Any
    key: Any
    value: Any
    dout: Any
    rows: Any
    keys: Any
    n_q: int
    n_k: int
    options: Mapping[str, Any]


def function_of(function: Any) -> tuple[str, bytes]:
    """Return a function's name, and what another process makes it from.

    Raises
    ------
    InvalidInput
        It is neither a function nor a name, or another process could not import it.
    """
    if isinstance(function, str):
        expect(":" in function, "function", function, "package.module:function or path/file.py:function")
        return function, pickle.dumps(function)
    expect(callable(function), "function", function, "a function of a Shard, or a name such as path/file.py:function")
    try:
        return str(getattr(function, "__name__", type(function).__name__)), pickle.dumps(function)
    except Exception as e:
        raise InvalidInput(
            f"function: cannot be sent to other processes ({printable(str(e))}); define it at the top level of a "
            "module, or name it as path/file.py:function"
        ) from e


class Ranks:
    """Processes of one group, started when they are first needed, and ended together.

    Parameters
    ----------
    world_size : int
        How many, 1 to 64.
    backend : {"gloo", "nccl"}
        What carries their messages: gloo between CPUs, NCCL between NVIDIA GPUs, of which each rank has one.
    seconds : float
        The time limit of one run, the start of the processes included.

    Raises
    ------
    InvalidInput
        A number, a backend or a limit that cannot be used; NCCL with fewer GPUs than ranks.
    """

    def __init__(self, world_size: int, backend: str = "gloo", seconds: float = 60.0) -> None:
        self.world_size = whole("world_size", world_size, 1, MOST)
        expect(backend in BACKENDS, "backend", backend, f"one of {', '.join(BACKENDS)}")
        if backend == "nccl" and (there := _gpus()) < self.world_size:
            raise InvalidInput(
                f"backend: got 'nccl' with {self.world_size} ranks and {there} NVIDIA GPUs, expected one for each "
                "rank; take fewer, or gloo"
            )
        self.backend, self.seconds = backend, within("seconds", seconds, 0, LONGEST, open_low=True)
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: bytes, shards: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return what the function gives on each rank, as NumPy's arrays by name.

        Parameters
        ----------
        function : bytes
            From :func:`function_of`.
        shards : sequence of mappings
            The fields of each rank's :class:`Shard`, NumPy's arrays.

        Raises
        ------
        KernelError
            A rank raised, ended its process, or gave no answer in time. All processes are ended then.
        UnsupportedProblem
            The function raised it.
        """
        try:
            if not self._processes:
                self._start()
            for pipe, shard in zip(self._pipes, shards, strict=True):
                with suppress(BrokenPipeError, ConnectionResetError):  # told below, as the death that it is
                    pipe.send((function, dict(shard)))
            return self._collect()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all processes, and what they started."""
        for process in self._processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # its own group, once it runs
            process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
        self._folder = None

    def _start(self) -> None:
        # not fork: the libraries that kernels use do not survive it
        context = get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="refattn-ranks-")
        store = os.path.join(self._folder.name, "store")
        for rank in range(self.world_size):
            mine, other = context.Pipe()
            given = (rank, self.world_size, self.backend, store, self.seconds, other)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            other.close()
            self._processes.append(process)
            self._pipes.append(mine)

    def _collect(self) -> list[dict[str, Any]]:
        end, answers = time.monotonic() + self.seconds, dict[int, tuple[str, Any]]()
        while len(answers) < self.world_size:
            waiting = {p: r for r, p in enumerate(self._pipes) if r not in answers}
            ready = connection.wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                answers[rank] = self._answer(rank)
                if answers[rank][0] != "answer":
                    end = min(end, time.monotonic() + GRACE)
        for kind in ("died", "error", "unsupported"):
            for rank, (said, text) in sorted(answers.items()):
                if said == kind:
                    raise (UnsupportedProblem if kind == "unsupported" else KernelError)(f"rank {rank}: {text}")
        if len(answers) < self.world_size:
            late = [r for r in range(self.world_size) if r not in answers]
            who = f"rank{'s' if len(late) > 1 else ''} {', '.join(map(str, late))}"
            raise KernelError(
                f"{who} of {self.world_size} gave no answer within {self.seconds:g} s, as where a message is waited "
                "for that nobody sends; all processes were ended"
            )
        return [answers[r][1] for r in range(self.world_size)]

    def _answer(self, rank: int) -> tuple[str, Any]:
        try:
            found: tuple[str, Any] = self._pipes[rank].recv()
            return found
        except (EOFError, ConnectionResetError):
            self._processes[rank].join()
            code = self._processes[rank].exitcode
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            script = "; a script that starts ranks needs `if __name__ == '__main__':`" if code == 1 else ""
            return "died", f"its process ended {how}; all processes were ended{script}"


def _serve(rank: int, world_size: int, backend: str, store: str, seconds: float, pipe: connection.Connection) -> None:
    """Answer calls until the other end closes."""
    os.setsid()  # what it starts is ended with it, and Ctrl-C is the parent's
    threading.Thread(target=_with_parent, daemon=True).start()
    joined = False
    while True:
        try:
            function, fields = pipe.recv()
        except EOFError:
            return
        try:
            call = _loaded(function)
            if not joined:
                _join(rank, world_size, backend, store, seconds)
                joined = True
            on = f"cuda:{rank}" if backend == "nccl" else None
            pipe.send(("answer", _named(_told("raised", partial(call, _shard(fields, on))))))
        except UnsupportedProblem as e:
            pipe.send(("unsupported", str(e)))
        except (KernelError, InvalidInput) as e:
            pipe.send(("error", str(e)))


def _with_parent() -> None:
    """End this process, and what it started, when the one that started it has ended, however that came."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def _told(what: str, call: Callable[[], Any]) -> Any:
    """Return what a call gives; what it raises is a KernelError that says so."""
    try:
        return call()
    except (UnsupportedProblem, KernelError):
        raise
    except BaseException as e:  # SystemExit, too: it would end the rank without a word
        first = (printable(str(e).strip().partition("\n")[0]))[:300]
        raise KernelError(f"the function {what} {type(e).__name__}: {first}") from e


def _loaded(function: bytes) -> Any:
    found = _told("could not be imported:", lambda: pickle.loads(function))
    if not isinstance(found, str):
        return found
    from ..check.kernels import find  # it imports much, which a rank does not need else

    return find(found)[0].load()


def _join(rank: int, world_size: int, backend: str, store: str, seconds: float) -> None:
    """Join the process group. Its own time limit is later than the caller's, which says more."""
    from datetime import timedelta

    import torch
    from torch import distributed

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=seconds + 30),
    )


def _shard(fields: dict[str, Any], device: str | None = None) -> Shard:
    return Shard(**{n: x if kind_of(x) is None else to_kind(x, "torch", device) for n, x in fields.items()})


def _gpus() -> int:
    import torch

    return int(torch.cuda.device_count())


def _named(found: Any) -> dict[str, Any]:
    """Return a function's result as NumPy's arrays."""
    if not isinstance(found, Mapping):
        raise KernelError(f"the function returned {printable(type(found).__name__)}; {WANTED}")
    for name, x in found.items():
        if not isinstance(name, str) or kind_of(x) is None:
            raise KernelError(f"the function returned {printable(str(name))}: {printable(type(x).__name__)}; {WANTED}")
    return {n: _told("returned what cannot be read:", partial(to_numpy, x, n)) for n, x in found.items()}
