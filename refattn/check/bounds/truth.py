"""Where exact answers are made: on the CPU, or those of large calls on the GPU that a kernel runs on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...arrays import cupy_with_gpu
from ...errors import BuildError, UnsupportedProblem
from ...exact.answer import Answer
from ...exact.driver import enclose
from ...problem import Problem
from ..model import Capabilities

__all__ = ["Truth", "device_of", "made_by", "on_a_gpu", "on_device", "on_the_gpu", "pays", "takes_long"]

SCORE = 2.5e-10
"""Seconds of a CPU for a score and a number of its key and value (docs/exactness.md: 67 ms at n = 1,024, d = 128)."""
BACKWARD = 3.5
"""How much more gradients take, counted in products."""
MANY = 2**22
"""Numbers of bounds whose making takes the CPU longer than a GPU's copies and starts."""
BYTES, START = 4e9, 0.03
"""Bytes a second to a GPU and back, and the seconds of its kernels' starts."""


@dataclass
class Truth:
    """What a run's exact answers were made on.

    Attributes
    ----------
    device : str
        "cpu", or the GPU that is asked for those of large calls.
    there, here : int
        How many of these it made, and how many the CPU did instead.
    why : str
        Why the last of these was not made there, or why none is.
    """

    device: str = "cpu"
    there: int = 0
    here: int = 0
    why: str = ""

    def __str__(self) -> str:
        if not self.there and not self.here:
            return self.why and f"exact answers were made on the CPU: {self.why}"
        text = f"exact answers of large calls: {self.there} made on {self.device}"
        return text + (f", {self.here} on the CPU, the last because of this: {self.why}" if self.here else "")


_NOW: ContextVar[Truth | None] = ContextVar("truth", default=None)


def device_of(able: Capabilities) -> str:
    """Return the GPU that a kernel's arrays are on, as ``evaluate`` names it; "cpu" where they are on none."""
    if able.arrays == "cupy":
        return f"cuda:{able.device}" if able.device.isdigit() else "cuda"
    return able.device if re.fullmatch(r"cuda(:\d+)?", able.device) else "cpu"


@contextmanager
def on_device(device: str) -> Iterator[Truth]:
    """Have exact answers of large calls made on a device, where it can; yields what is counted of them."""
    found = Truth(device)
    if device != "cpu":
        one = np.ones((1, 1, 1, 1))
        try:
            enclose(Problem(one, one, one), device=device)
        except (UnsupportedProblem, BuildError) as e:
            found = Truth(why=str(e))
    token = _NOW.set(found)
    try:
        yield found
    finally:
        _NOW.reset(token)


def on_a_gpu() -> bool:
    """Tell whether a GPU is asked for."""
    now = _NOW.get()
    return now is not None and now.device != "cpu"


def on_the_gpu(numbers: int) -> Callable[[Any], Any]:
    """Return what puts an array where so many numbers are best made: on the GPU that is asked for, or NumPy's."""
    now = _NOW.get()
    if now is None or not on_a_gpu() or numbers < MANY:
        return np.asarray
    cupy = cupy_with_gpu()
    here = now.device in ("cuda", f"cuda:{cupy.cuda.Device().id}")  # what follows goes to the current one
    return cupy.asarray if here else np.asarray


def pays(problem: Problem, backward: bool) -> bool:
    """Tell whether the CPU takes longer for a call than the copy to a GPU and back."""
    p, rows = problem, problem.heads * problem.n_q
    return takes_long(p.batch * rows * p.n_k, p.batch * (p.heads_kv * p.n_k + 4 * rows), p.d_k + p.d_v, backward)


def takes_long(scores: int, lines: int, width: int, backward: bool) -> bool:
    """Tell whether so many scores take the CPU longer than so many lines, of keys and results, take to be copied.

    Parameters
    ----------
    scores, lines : int
        Of all heads.
    width : int
        Numbers of a key and a value.
    backward : bool
        Whether gradients are asked for.
    """
    factor = BACKWARD if backward else 1.0
    return factor * SCORE * scores * width > factor * 8 * lines * width / BYTES + START


def made_by(make: Callable[..., Answer], problem: Problem, dout: Any = None, **more: Any) -> Answer:
    """Return what ``evaluate`` or ``enclose`` makes of a call, on the GPU where that is asked for and pays.

    Parameters
    ----------
    make : callable
        One of the two.
    problem : Problem
        The call.
    dout : array, optional
        The gradient arriving at out.
    **more
        Further arguments.
    """
    now = _NOW.get()
    if now is None or not on_a_gpu() or not pays(problem, dout is not None):
        return make(problem, gradients=dout, **more)
    try:
        found = make(problem, gradients=dout, device=now.device, **more)
        now.there += 1
    except (UnsupportedProblem, BuildError) as e:
        found = make(problem, gradients=dout, **more)  # what is wrong with the call itself is raised here again
        now.here, now.why = now.here + 1, str(e)
    return found
