"""Operators that are not the package's: where they come from, and how another process gets to know them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import CodeType
from typing import Any

from ..errors import InvalidInput
from ..modules import module_of
from . import VARIANTS
from .variant import Variant

__all__ = ["BUILT_IN", "FILES", "definition", "from_file", "know", "named", "portable"]

BUILT_IN = frozenset(VARIANTS)
"""The package's own operators."""
FILES: dict[str, str] = {}
"""Where an operator of one's own was taken from, as ``path/file.py:NAME``, by its name."""


def from_file(name: str) -> Variant:
    """Return the operator that ``path/file.py:NAME`` defines.

    Raises
    ------
    InvalidInput
        No such file, no such operator in it, or whatever running it raises.
    """
    path, _, attribute = name.rpartition(":")
    found = getattr(module_of(path, "variant"), attribute, None)
    if not isinstance(found, Variant):
        raise InvalidInput(f"variant: {path} has no Variant {attribute!r}")
    return found


def named(variant: str) -> str:
    """Return what ``--variant`` takes for an operator: its name, or the file that it came from."""
    return FILES.get(variant, variant)


def portable(variant: str) -> Variant | str | None:
    """Return what another process needs for an operator: its file, itself, or nothing for the package's own."""
    if variant in BUILT_IN:
        return None
    return FILES.get(variant, VARIANTS[variant])


def know(own: Variant | str | None) -> None:
    """Take over an operator from another process, which has checked it."""
    if own is not None:
        found = from_file(own) if isinstance(own, str) else own
        VARIANTS[found.name] = found


def definition(variant: str) -> str:
    """Return a digest of all that an operator's code says, "" for the package's own, whose version says it."""
    if variant in BUILT_IN:
        return ""
    digest = hashlib.sha256()
    for text in _said(VARIANTS[variant], set()):
        digest.update(text.encode())
    return digest.hexdigest()


def _said(x: Any, seen: set[int]) -> Iterator[str]:
    """Yield what a value says: fields, code, and what the code reads."""
    if id(x) in seen:
        return
    if isinstance(x, Mapping):
        for n, y in sorted(x.items(), key=lambda item: str(item[0])):
            yield str(n)
            yield from _said(y, seen)
    elif isinstance(x, list | tuple):
        for y in x:
            yield from _said(y, seen)
    elif is_dataclass(x) and not isinstance(x, type):
        seen.add(id(x))
        yield type(x).__name__
        for field in fields(x):
            yield field.name
            yield from _said(getattr(x, field.name), seen)
    elif hasattr(x, "__code__"):
        seen.add(id(x))
        yield from _code(x.__code__)
        cells = [c.cell_contents for c in x.__closure__ or ()]
        for y in (x.__defaults__, x.__kwdefaults__ or {}, cells):
            yield from _said(y, seen)
        for n in _names(x.__code__):
            y = x.__globals__.get(n)
            if hasattr(y, "__code__") or is_dataclass(y) or isinstance(y, int | float | str | tuple | list | Mapping):
                yield from _said(y, seen)
    else:
        yield repr(sorted(x, key=repr) if isinstance(x, set | frozenset) else x)


def _code(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr(code.co_names)
    for x in code.co_consts:
        if isinstance(x, CodeType):
            yield from _code(x)
        else:
            yield repr(x)


def _names(code: CodeType) -> set[str]:
    """Return the names that a function reads, those of functions inside it included."""
    inner = [x for x in code.co_consts if isinstance(x, CodeType)]
    return set(code.co_names).union(*(_names(x) for x in inner))
