"""Which options of a call a kernel reads: one that it never reads it does not have."""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import Any

from ..arrays import kind_of
from ..problem import Problem
from ..validation import SCALES
from ..variants import variant_of

__all__ = ["FIELDS", "SOURCE", "note", "plain", "unread", "watched"]

FIELDS = frozenset(f.name for f in fields(Problem)) - {"query", "key", "value", "variant"}
"""The arguments of a call that are options."""
SOURCE = {
    "causal_bottom_right": "causal",
    "causal_top_left": "causal",
    "variable_lengths": "cu_seqlens_q",
    "negative_window": "window",
    "paged_nhd": "block_table",
    "paged_hnd": "block_table",
    "appending": "new_key",
    "dropout_bits": "dropout_mask",
    "philox_flash": "philox_seed",
    "philox_efficient": "philox_seed",
    "rotary_half": "rotary",
    "rotary_interleaved": "rotary",
    "rotary_partial": "rotary_cos",
    "positions": "positions_q",
}
"""The argument that a feature stands for, where it has another name."""


class _Watched(Problem):
    """A call that notes which options are read, or told by features(); moving it to another library reads none."""

    _seen: set[str]

    def to(self, kind: str, device: Any = None) -> Problem:
        return _copied(plain(self).to(kind, device), self._seen)

    def replace(self, **changes: Any) -> Problem:
        return _copied(plain(self).replace(**changes), self._seen)

    def features(self) -> frozenset[str]:
        found = plain(self).features()
        self._seen.update(SOURCE.get(n, n) for n in found)
        return found

    def __reduce__(self) -> Any:
        self._seen.update(FIELDS)  # what is done with a copy elsewhere is not seen
        return plain(self).__reduce__()

    def __repr__(self) -> str:
        return repr(plain(self))


def _option(name: str) -> property:
    """Return a property that notes that an option is read."""

    def read(self: Any) -> Any:
        values = vars(self)
        values["_seen"].add(name)
        return values[name]

    return property(read)


for _name in FIELDS:
    setattr(_Watched, _name, _option(_name))


@lru_cache(maxsize=1)
def _of_torch() -> type[Problem]:
    """Return the class of a watched call of tensors: torch.compile can trace what reads it, and notes nothing."""
    import torch

    def option(name: str) -> property:
        def read(self: Any) -> Any:
            values = vars(self)
            if not torch.compiler.is_compiling():
                values["_seen"].add(name)
            return values[name]

        return property(read)

    return type("_WatchedTensors", (_Watched,), {n: option(n) for n in FIELDS})


def watched(problem: Problem) -> tuple[Problem, set[str]]:
    """Return the same call, and the set of its options that have been read from it so far."""
    seen: set[str] = set()
    return _copied(problem, seen), seen


def unread(problem: Problem, seen: set[str] | frozenset[str]) -> list[str]:
    """Return the options that a call has and that were not read, but those that every call of the operator has.

    Parameters
    ----------
    problem : Problem
        The call.
    seen : set of str
        From :func:`watched`.
    """
    asked = {SOURCE.get(name, name) for name in plain(problem).features() - variant_of(problem.variant).always} & FIELDS
    if problem.typed:
        asked |= {n for n in SCALES if getattr(problem, n) is not None} | {"out_dtype"}
    if problem.options:
        asked.add("options")
    return sorted(asked - seen)


def _copied(problem: Problem, seen: set[str]) -> Problem:
    copy = object.__new__(_of_torch() if kind_of(problem.query) == "torch" else _Watched)
    vars(copy).update(vars(problem))
    vars(copy)["_seen"] = seen
    return copy


def plain(problem: Problem) -> Problem:
    """Return the same call without a watch on it."""
    bare = object.__new__(Problem)
    vars(bare).update({n: x for n, x in vars(problem).items() if n != "_seen"})
    return bare


def note(problem: Problem, seen: frozenset[str]) -> None:
    """Say what another process, which a watched call was sent to, has read of it."""
    if "_seen" in vars(problem):
        vars(problem)["_seen"].update(seen)
