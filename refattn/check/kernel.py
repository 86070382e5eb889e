"""What is judged: a callable and what is said of it, resolved once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ..errors import InvalidInput, expect, printable
from .call import Function
from .model import UNDECLARED, Capabilities, Model, ModelFor, flash
from .native import native

__all__ = ["Kernel", "name_of"]


@dataclass(frozen=True)
class Kernel:
    """A kernel as the checker sees it.

    Attributes
    ----------
    call : callable
        ``call(problem) -> out`` or ``(out, lse)``, of NumPy arrays; with an attribute ``gradients`` where it has some.
    capabilities : Capabilities
        What it can do.
    model : callable
        From a format's name to how it rounds.
    name, version : str
        What to call it.
    """

    call: Function
    capabilities: Capabilities
    model: ModelFor
    name: str
    version: str = ""

    @property
    def declared(self) -> bool:
        """Tell whether somebody said what it can do."""
        return self.capabilities is not UNDECLARED

    @property
    def serial(self) -> bool:
        """Tell whether it takes one call at a time, because it runs in a process of its own."""
        return bool(getattr(self.call, "serial", False))

    @classmethod
    def of(
        cls,
        kernel: Any,
        *,
        model: Model | ModelFor | None = None,
        capabilities: Capabilities | None = None,
        name: str | None = None,
        version: str = "",
    ) -> Kernel:
        """Return a kernel's record; what is not given here is taken from its attributes, then from the defaults.

        Parameters
        ----------
        kernel : callable or Kernel
            Of the arrays that its capabilities name.
        model : Model, or a function from a format's name to one
            By default its attribute ``model``, else a flash kernel's.
        capabilities : Capabilities
            By default its attribute ``capabilities``, else float32 with every feature.
        name, version : str
            By default its ``__name__``.
        """
        expect(
            isinstance(model, Model | None) or callable(model), "model", model, "a Model, or a function that makes one"
        )
        expect(isinstance(capabilities, Capabilities | None), "capabilities", capabilities, "Capabilities")
        if isinstance(kernel, Kernel):
            chosen = kernel.model if model is None else _by_format(model)
            able = capabilities or kernel.capabilities
            return replace(kernel, capabilities=able, model=chosen, name=name or kernel.name)
        expect(
            callable(kernel), "kernel", kernel, "a function of a Problem; check_problem and the command line take names"
        )
        able = capabilities or getattr(kernel, "capabilities", None) or UNDECLARED
        expect(isinstance(able, Capabilities), "capabilities", able, "Capabilities")
        chosen = _by_format(model or getattr(kernel, "model", None) or flash)
        return cls(native(kernel, able), able, chosen, name or name_of(kernel), version)


def name_of(kernel: Any) -> str:
    """Return what to call a kernel that was given no name."""
    return str(getattr(kernel, "__name__", type(kernel).__name__))


def _by_format(model: Model | ModelFor) -> ModelFor:
    if isinstance(model, Model):
        return lambda dtype: model

    @cache  # a plan asks for it with each case
    def made(dtype: str) -> Model:
        try:
            found = model(dtype)
        except Exception as e:
            raise InvalidInput(f"model: of {dtype} it raised {type(e).__name__}: {printable(str(e))}") from e
        expect(isinstance(found, Model), "model", found, f"a Model of {dtype}")
        return found

    return made
