"""A kernel by name: the package that it needs, what it can do, how it rounds."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ...errors import install
from ...problem import VARIANT, Problem
from ...version import VERSION
from ..call import Function
from ..kernel import Kernel
from ..model import Capabilities, ModelFor

__all__ = ["Entry", "able", "declared", "load"]


@dataclass(frozen=True)
class Entry:
    """A kernel by name.

    Attributes
    ----------
    name : str
        What the command line calls it.
    package : str
        The package that must be importable; "" for our own.
    load : callable
        Returns the kernel.
    capabilities : Capabilities
        What it can do.
    model : callable
        From a format's name to its rounding model.
    named_only : str
        Why it runs only when it is named, "" where it always runs.
    gpu : bool
        Whether it needs an NVIDIA GPU.
    variants : frozenset of str
        The operators that it computes.
    how : str
        How its package is installed, "" where it is an extra of ours.
    distribution : str
        What its package is called where it is installed, "" where that is what is imported.
    """

    name: str
    package: str
    load: Callable[[], Function]
    capabilities: Capabilities
    model: ModelFor
    named_only: str = ""
    gpu: bool = False
    variants: frozenset[str] = frozenset({VARIANT})
    how: str = ""
    distribution: str = ""

    def kernel(self) -> Kernel:
        """Return the kernel; one that we call by an adapter of ours raises outside its capabilities."""
        loaded = self.load()
        call = loaded if ":" in self.name else declared(loaded, self.capabilities)
        return Kernel.of(call, model=self.model, capabilities=self.capabilities, name=self.name, version=self.version)

    @property
    def here(self) -> bool:
        """Tell whether its package can be imported, and its GPU is there."""
        if self.gpu and not Path("/dev/nvidia0").exists():
            return False
        if not self.package:
            return True
        try:
            return importlib.util.find_spec(self.package) is not None
        except ModuleNotFoundError:  # of a.b, where there is no a
            return False

    @property
    def version(self) -> str:
        """The version of its package: for our own kernels, refattn's."""
        package = "refattn" if self.name.startswith("refattn") else self.package or "refattn"
        return f"{package} {VERSION if package == 'refattn' else metadata.version(self.distribution or package)}"

    @property
    def needs(self) -> str:
        """What must be there for it, and how it is installed."""
        if not self.gpu:
            return f"needs the package {self.package}; {self.how or install(self.package)}"
        return f"needs an NVIDIA GPU and the package {self.package}{f'; {self.how}' if self.how else ''}"


def load(module: str, name: str) -> Callable[[], Function]:
    """Return a function that imports a module of ours and returns its kernel."""
    return lambda: getattr(importlib.import_module(f"{__package__}.{module}"), name)


def declared(kernel: Function, able: Capabilities) -> Function:
    """Return a kernel that raises outside its capabilities: our adapters leave such options out."""

    def call(problem: Problem) -> Any:
        able.require(problem)
        return kernel(problem)

    call.__name__ = getattr(kernel, "__name__", "kernel")
    call.serial = getattr(kernel, "serial", False)  # type: ignore[attr-defined]
    if hasattr(kernel, "gradients"):

        def gradients(problem: Problem, *arriving: Any) -> Any:
            able.require(problem)
            return kernel.gradients(problem, *arriving)

        call.gradients = gradients  # type: ignore[attr-defined]
    return call


def able(dtypes: str, features: str, *, lse: bool = False, gradients: str = "", refuses: bool = False) -> Capabilities:
    """Return capabilities from names in a row; calls may have fewer keys than queries, or more."""
    given = frozenset(features.split()) | {"lengths_differ"}
    back = frozenset(gradients.split())
    return Capabilities(frozenset(dtypes.split()), given, lse=lse, gradients=back, refuses=refuses)
