"""What a law is tried on: a kernel, its model, and what it reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import Problem
from .bounds.expected import expected
from .call import Function, Result, call_gradients, call_kernel
from .compare import Worst
from .model import Capabilities, Model

__all__ = ["Trial", "agree", "other", "same_out"]

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Trial:
    """A kernel that a law is tried on: what it answers and reads, and what its arithmetic may lose."""

    kernel: Function
    model: Model
    able: Capabilities
    seen: set[str] = field(default_factory=set)

    @property
    def has_gradients(self) -> bool:
        """Whether the kernel gives gradients, and says so."""
        return bool(self.able.gradients) and hasattr(self.kernel, "gradients")

    def result(self, p: Problem) -> Result:
        """Return out and lse, and note what was read."""
        found = call_kernel(self.kernel, p)
        self.seen.update(found.read, {"query"})
        return found

    def everything(self, p: Problem, dout: NDArray[Any]) -> dict[str, Float]:
        """Return out, lse or state, and the gradients where the kernel has some."""
        found = {n: x.astype(np.float64) for n, x in self.result(p).arrays().items()}
        return found | (self.gradients(p, dout) if self.has_gradients else {})

    def out(self, p: Problem) -> Float:
        """Return out as float64."""
        return self.result(p).out.astype(np.float64)

    def gradients(self, p: Problem, dout: NDArray[Any], dlse: NDArray[Any] | None = None) -> dict[str, Float]:
        """Return the gradients as float64."""
        found, read = call_gradients(self.kernel, p, dout, dlse)
        self.seen.update(read, {"query"})
        return {n: x.astype(np.float64) for n, x in found.items()}

    def allowed(self, p: Problem, dout: NDArray[Any] | None = None) -> dict[str, Float]:
        """Return the bounds of out and lse, or with `dout` of the gradients."""
        return expected(p, self.model, dout).allowed


def agree(x: Float, y: Float, allowed: Float | float, text: str, array: str = "out") -> Worst:
    """Compare two answers; NaN agrees with NaN."""
    with np.errstate(all="ignore"):
        gap = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
        ratio = np.where(gap == 0, 0.0, gap / allowed)
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    place = tuple(int(i) for i in np.unravel_index(int(np.argmax(ratio)), ratio.shape))
    failures = int((ratio > 1).sum())
    at = np.broadcast_to(np.asarray(allowed, np.float64), x.shape)[place]
    return Worst(
        array,
        float(ratio[place]),
        place,
        float(x[place]),
        float(y[place]),
        float(at),
        failures,
        int(ratio.size),
        (f"{text} ({failures} of {ratio.size})",) if failures else (),
    )


def same_out(ask: Trial, p: Problem, alike: Problem, text: str) -> Worst:
    """Compare the out of two calls that mean the same: each may lose what its own bound allows."""
    return agree(ask.out(p), ask.out(alike), ask.allowed(p)["out"] + ask.allowed(alike)["out"], text)


def other(p: Problem) -> Problem:
    """Return a call of the same shapes with other numbers."""
    names = ("query", "key", "value")
    return p.replace(**{n: np.ascontiguousarray(getattr(p, n)[:, :, ::-1]) for n in names})
