"""Real bugs, planted as small edits of a kernel's text; the checker must fail each of them.

Those of attention are edits of the tiled kernel (bugs.toml), those of norms' gradients (norms.toml) and of gradients
that arrive at lse (arriving.toml) as well, those of recurrences of the chunked one (recurrences.toml).

Classes: A alignment, B option ignored or composed wrongly, C rows without keys, D extreme scores, E tails, F poison
through 0 · NaN, G index width, H heads and layout, I lse and merging, J scale and type, K races and stale memory, L
backward only, M precision, N paths that a shape chooses, O two options that are right alone. An origin names the
thread in which a project met the bug; the edit shows the same symptom in this kernel.
"""

from __future__ import annotations

import importlib
import inspect
import tomllib
import types
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..call import Function

__all__ = ["BUGS", "LSE_BUGS", "NORM_BUGS", "RECURRENT_BUGS", "Bug", "broken"]

CLASSES = "ABCDEFGHIJKLMNO"


@dataclass(frozen=True)
class Bug:
    """One planted bug.

    Attributes
    ----------
    name : str
        What is wrong.
    kind : str
        Its class, a letter of ``CLASSES``.
    origin : str
        ``owner/project#number`` where such a bug was reported, "" where none was found.
    edits : tuple of pairs
        Old and new text; each old text stands once in the kernel's source.
    kernel : str
        The module and function of ``refattn.check.kernels`` that is edited.
    """

    name: str
    kind: str
    origin: str
    edits: tuple[tuple[str, str], ...]
    kernel: str = "tiled"


@lru_cache(maxsize=2)
def _source(kernel: str) -> str:
    return inspect.getsource(importlib.import_module(f"refattn.check.kernels.{kernel}"))


def broken(name: str) -> Function:
    """Return a kernel with one bug, a module of its own (what it keeps between calls is its own, too)."""
    bug = (BUGS | LSE_BUGS | NORM_BUGS | RECURRENT_BUGS)[name]
    text = _source(bug.kernel)
    for old, new in bug.edits:
        if text.count(old) != 1:
            raise ValueError(f"{name}: {old!r} stands {text.count(old)} times in the kernel, expected once")
        text = text.replace(old, new)
    module = types.ModuleType(f"refattn.check.kernels.{name}")
    module.__package__ = "refattn.check.kernels"
    exec(compile(text, f"<{name}>", "exec"), module.__dict__)
    kernel: Any = module.__dict__[bug.kernel]
    kernel.__name__ = name
    return kernel  # type: ignore[no-any-return]


def _table(file: str, kernel: str) -> dict[str, Bug]:
    found = tomllib.loads((Path(__file__).parent / file).read_text(encoding="utf-8"))
    return {n: Bug(n, x["class"], x["origin"], tuple((a, b) for a, b in x["edits"]), kernel) for n, x in found.items()}


BUGS = _table("bugs.toml", "tiled")
"""The planted bugs of attention by name."""
RECURRENT_BUGS = _table("recurrences.toml", "chunked")
"""Those of recurrences."""
NORM_BUGS = _table("norms.toml", "tiled")
"""Those of the gradients of norms."""
LSE_BUGS = _table("arriving.toml", "tiled")
"""Those of the gradient that arrives at lse."""
