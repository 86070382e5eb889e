"""A kernel's arguments, read from its CUDA text: the struct that the kernel reads is the one that the host packs."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import itemgetter
from typing import Any

from .build import text_of

__all__ = ["Arguments", "Record", "arguments_of"]

SCALARS = {"long long": "q", "int": "i", "unsigned": "I", "float": "f", "double": "d"}
POINTER, TENSOR_MAP = "Q", "128s"
TENSOR_MAP_ALIGNMENT = 64
"""Bytes: CUDA's CUtensorMap is declared with alignas(64)."""


@dataclass(frozen=True)
class Record:
    """A struct of C, as its members lie in memory.

    Attributes
    ----------
    name : str
        The struct's name, for messages.
    members : mapping of str to (str or Record)
        By name, in their order: a format of Python's struct module, or a struct.
    """

    name: str
    members: Mapping[str, str | Record]

    @property
    def alignment(self) -> int:
        """Bytes."""
        return max(_alignment(x) for x in self.members.values())

    def layout(self) -> Iterator[tuple[int, str, int]]:
        """Yield where each member lies, its format, and its size in bytes."""
        at = 0
        for x in self.members.values():
            text, size = x.format() if isinstance(x, Record) else (x, struct.calcsize("<" + x))
            at += -at % _alignment(x)
            yield at, text, size
            at += size

    def format(self) -> tuple[str, int]:
        """Return the members with explicit padding, for Python's struct module without its alignment; and the size."""
        found, end = "", 0
        for at, text, size in self.layout():
            found, end = f"{found}{at - end}x{text}", at + size
        gap = -end % self.alignment
        return f"{found}{gap}x", end + gap

    @cached_property
    def _plan(self) -> tuple[Callable[[Mapping[str, Any]], Any], tuple[tuple[int, Record], ...], int]:
        """How values by name are put in order, which of them are structs, and how many there are: made once."""
        inner = tuple((i, x) for i, x in enumerate(self.members.values()) if isinstance(x, Record))
        names = tuple(self.members)
        return (itemgetter(*names) if len(names) > 1 else lambda v: (v[names[0]],)), inner, len(names)

    def flat(self, values: Mapping[str, Any] | Sequence[Any]) -> Sequence[Any]:
        """Return the numbers of the members, given by name, or in their order for a struct inside another."""
        ordered, inner, count = self._plan
        if isinstance(values, dict):
            if len(values) != count or values.keys() != self.members.keys():
                missing, extra = self.members.keys() - values.keys(), values.keys() - self.members.keys()
                raise TypeError(f"struct {self.name}: missing {sorted(missing)}, unknown {sorted(extra)}")
            values = ordered(values)
        elif len(values) != count:
            raise TypeError(f"struct {self.name}: got {len(values)} values, has {count} members")
        if not inner:
            return values  # type: ignore[return-value]
        found: list[Any] = []
        at = 0
        for i, x in inner:
            found += values[at:i]  # type: ignore[index]
            found += x.flat(values[i])  # type: ignore[index]
            at = i + 1
        return found + list(values[at:])  # type: ignore[index]


@dataclass(frozen=True)
class Arguments:
    """What a kernel takes.

    Attributes
    ----------
    parameters : Record
        By name.
    offsets : tuple of int
        Where each lies in what `pack` returns, in bytes.
    """

    parameters: Record
    offsets: tuple[int, ...]
    _packer: struct.Struct

    @classmethod
    def of(cls, parameters: Record) -> Arguments:
        """Return the arguments for a list of parameters."""
        offsets = tuple(at for at, _, _ in parameters.layout())
        return cls(parameters, offsets, struct.Struct("<" + parameters.format()[0]))

    def __len__(self) -> int:
        return self._packer.size

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each number lies, in bytes, members of a struct as ``parameter.member``."""
        return dict(_places(self.parameters, "", 0))

    def pack(self, **values: Any) -> bytes:
        """Return the parameters' bytes: a number, bytes, or for a struct a mapping by member or a sequence in order.

        Raises
        ------
        TypeError
            A member without a value, or a value without a member.
        """
        return self._packer.pack(*self.parameters.flat(values))

    def unpack(self, packed: bytes) -> dict[str, Any]:
        """Return the parameters' numbers by name, members of a struct as ``parameter.member``."""
        return dict(zip(_names(self.parameters), self._packer.unpack(packed), strict=True))


@lru_cache(maxsize=64)
def arguments_of(file: str, entry: str) -> Arguments:
    """Return what a kernel takes, from the file that defines it.

    Raises
    ------
    ValueError
        No such kernel, or a type that is none of a pointer, a number, a tensor map or a struct of these.
    """
    text = re.sub(r"//[^\n]*", "", text_of(file, {}))
    found = re.search(rf"__global__[^;{{]*?\b{entry}\(([^)]*)\)", text)
    if not found:
        raise ValueError(f"{file}: defines no kernel {entry!r}")
    records: dict[str, Record] = {}
    for name, body in re.findall(r"^struct (\w+) \{([^{}()]*)\};", text, re.MULTILINE):
        lines = [x for x in body.split(";") if x.strip()]
        members = [m for x in lines if (m := _members(x, records)) is not None]
        if len(members) == len(lines):  # else it is one that no kernel is given
            records[name] = Record(name, {n: x for m in members for n, x in m.items()})
    parameters: dict[str, str | Record] = {}
    for declared in found[1].split(","):
        member = _members(declared.replace("__grid_constant__", ""), records)
        if member is None:
            raise ValueError(f"{file}: the kernel {entry!r} takes {declared.strip()!r}, which the host cannot pack")
        parameters |= member
    return Arguments.of(Record(entry, parameters))


def _members(declared: str, records: Mapping[str, Record]) -> dict[str, str | Record] | None:
    """Return what one declaration declares, by name; None where its type is unknown."""
    words = re.sub(r"\bconst\b", "", declared)
    found = re.fullmatch(r"\s*(\w+(?: \w+)*?)\s*(\*?\s*\w+(?:\s*,\s*\*?\s*\w+)*)\s*", words)
    if not found:
        return None
    kind = TENSOR_MAP if found[1] == "TensorMap" else records.get(found[1]) or SCALARS.get(found[1])
    members: dict[str, str | Record] = {}
    for name in found[2].split(","):
        pointer = "*" in name
        if kind is None and not pointer:
            return None
        members[name.replace("*", "").strip()] = POINTER if pointer or kind is None else kind
    return members


def _alignment(x: str | Record) -> int:
    if isinstance(x, Record):
        return x.alignment
    return TENSOR_MAP_ALIGNMENT if x == TENSOR_MAP else struct.calcsize("<" + x)


def _places(record: Record, before: str, start: int) -> Iterator[tuple[str, int]]:
    for (name, x), (at, _, _) in zip(record.members.items(), record.layout(), strict=True):
        if isinstance(x, Record):
            yield from _places(x, f"{before}{name}.", start + at)
        else:
            yield before + name, start + at


def _names(record: Record) -> list[str]:
    return [
        f"{n}.{inner}" if inner else n
        for n, x in record.members.items()
        for inner in (_names(x) if isinstance(x, Record) else [""])
    ]
