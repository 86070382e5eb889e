"""What a caller asks for: arrays as views, options, and the properties that the choice of a kernel depends on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..arrays import dtype_name, kind_of
from ..errors import InvalidProblem
from ..problem import Problem
from ..rules import Term
from ..validation import check_offsets
from .kernel import Call
from .latent import shared
from .plan import check_block_mask
from .views import View, cast, check_devices, layout, view

__all__ = ["CU_SEQLENS", "Kept", "Request", "parts_of", "read", "refuse_term"]

CU_SEQLENS = ("cu_seqlens_q", "cu_seqlens_k")
TENSORS = ("query", "key", "value", "out", "lse", "dout")


T = TypeVar("T")


class Kept(dict[Any, T]):
    """What was found for calls that were checked before, by all that the checks and the choice depend on."""

    def find(self, kind: Any) -> T | None:
        """Return what is kept for a kind of call; None where nothing is."""
        if len(self) > 4096:
            self.clear()
        try:
            return self.get(kind)
        except TypeError:  # an option that cannot be hashed: Problem says what is wrong with it
            return None


@dataclass(frozen=True)
class Request:
    """A call before it is checked.

    Attributes
    ----------
    given : dict of str to array
        The arrays, sinks and offsets in the kernels' types.
    arrays : dict of str to View
        Their places.
    options : dict
        scale, causal, window, softcap.
    sink, offsets, block_mask
        As they were given.
    shared : bool
        Whether values are the first columns of keys in memory.
    signature : tuple
        All that the checks and the choice of a kernel depend on.
    """

    given: dict[str, Any]
    arrays: dict[str, View]
    options: dict[str, Any]
    sink: Any
    offsets: tuple[Any, ...] | None
    block_mask: Any
    shared: bool
    signature: tuple[Any, ...]

    def problem(self) -> Problem:
        """Return the call as a Problem, its arrays and options checked but for the values of offsets."""
        names = ("query", "key", "value", "bias", "allowed")
        tensors = {n: self.given[n] for n in names if n in self.given}
        problem = Problem(**tensors, sink=self.sink, **self.options)
        if self.offsets is not None:
            check_offsets(problem, *self.offsets)
        check_devices(self.arrays)
        return problem

    def call(self, accuracy: str = "fast", batch_invariant: bool = False) -> Call:
        """Return what the choice of a kernel depends on.

        Raises
        ------
        InvalidProblem, UnsupportedProblem
            What does not fit together; layouts that no kernel takes.
        """
        problem = self.problem()
        blocks = None if self.block_mask is None else check_block_mask(problem, self.block_mask)
        aligned, mapped = layout([self.arrays[n] for n in TENSORS if n in self.arrays and n != "lse"])
        aligned = aligned and not (problem.d_k % 8 or problem.d_v % 8)  # so are rows of results, which are contiguous
        packed = self.offsets is not None
        tiles = "bits" in self.arrays
        if tiles and not all(_contiguous(self.arrays[n]) for n in ("blocks", "bits")):
            raise InvalidProblem("block_mask: blocks and their bits must be contiguous; pass copies that are")
        found = Call.of(problem, accuracy, blocks, packed=packed, tiles=tiles, aligned=aligned, mapped=mapped)
        return replace(found, batch_invariant=batch_invariant, shared=self.shared)


def _contiguous(x: View) -> bool:
    sizes = [math.prod(x.shape[i + 1 :]) for i in range(len(x.shape))]
    return all(n == 1 or s == size for n, s, size in zip(x.shape, x.strides, sizes, strict=True))


def read(
    tensors: Mapping[str, Any], sink: Any, block_mask: Any, cu_seqlens: Any, options: dict[str, Any], *more: Any
) -> Request:
    """Return what a caller asks for; `more` is what else the choice of a kernel depends on.

    Raises
    ------
    InvalidProblem
        Something that is no array on a GPU, or no tuple where one is expected.
    UnsupportedProblem
        An array of a library that has none on a GPU.
    """
    given = {n: x for n, x in tensors.items() if x is not None}
    sizes: Any = None
    offsets: tuple[Any, ...] | None = None
    if sink is not None:
        given["sink"] = cast(sink, "float64" if dtype_name(given["query"]) == "float64" else "float32", "sink")
    if block_mask is not None:
        bits = isinstance(block_mask, tuple | list) and len(block_mask) == 4
        parts = parts_of(block_mask, "block_mask", ("blocks", "block_q", "block_k", *["bits"] * bits))
        given["blocks"], *sizes = parts[:3]
        given |= dict(zip(["bits"] * bits, parts[3:], strict=True))
    if cu_seqlens is not None:
        offsets = parts_of(cu_seqlens, "cu_seqlens", CU_SEQLENS)
        for n, x in zip(("cu_q", "cu_k"), offsets, strict=True):
            given[n] = cast(x, "int32", f"{n[:2]}_seqlens{n[2:]}")
    arrays = {n: view(x, n) for n, x in given.items()}
    if isinstance(options.get("window"), list):
        options = options | {"window": tuple(options["window"])}
    cast_from = tuple([dtype_name(x) for x in (sink, *(offsets or ())) if x is not None])
    types = type(options["scale"]), type(options["softcap"])
    one = shared(arrays["key"], arrays["value"])
    asked = (*options.values(), *types, *more, None if sizes is None else tuple(sizes), cast_from, one)
    places = tuple(
        [(n, kind_of(given[n]), x.shape, x.strides, x.dtype, x.device, x.pointer % 16 == 0) for n, x in arrays.items()]
    )
    return Request(given, arrays, options, sink, offsets, block_mask, one, (asked, places))


def parts_of(given: Any, name: str, parts: tuple[str, ...]) -> tuple[Any, ...]:
    """Return an option of several parts as a tuple, after checking that it has as many."""
    if not isinstance(given, tuple | list) or len(given) != len(parts):
        raise InvalidProblem(f"{name}: got {type(given).__name__}, expected a tuple ({', '.join(parts)})")
    return tuple(given)


def refuse_term(bias: Any) -> None:
    """Refuse a formula in place of a bias: kernels read arrays."""
    if isinstance(bias, Term):
        raise InvalidProblem(
            "bias: got a term of refattn.rules, expected an array; pass term.written(batch, heads, n_q, n_k), "
            "brought to query's library and device"
        )
