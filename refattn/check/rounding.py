"""How a kernel rounds: the types that it computes in, how it adds, and how it stores P."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..dtypes import FLOAT4, FORMATS, Format, format_of
from ..errors import InvalidInput

__all__ = ["INTEGERS", "MICRO", "SCALED", "TF32", "C", "Model", "inside_type", "relative", "typed"]

C = 3 / (8 * math.log(2)) / 3
"""The variance of a rounding to nearest over u^2 of the number's square, mantissas spread as they are."""
TF32 = Format("tf32", np.dtype(np.float32), 11, -126, 127, float((2 - 2.0**-10) * 2.0**127))
"""The matrix units' type for float32 operands: never an array's own."""


INTEGERS = {
    n: Format(n, np.dtype(np.int8), bits, bits - 1, bits - 1, 2.0 ** (bits - 1) - 1)
    for n, bits in (("int8", 8), ("int4", 4))
}
"""Integers as a format knows them: all of them are subnormal, a step of 1 apart, up to 127 and 7."""
INSIDE = (*FORMATS, "tf32")
SCALED = ("float8_e4m3fn", "float8_e5m2", *INTEGERS)
"""What P may be stored as under a scale."""
MICRO = 16
"""Keys that share a scale in float8_e4m3fn where P is in float4_e2m1fn."""


def inside_type(name: str) -> Format:
    """Return a type that a kernel computes in: a format, tf32, or integers of 8 and 4 bits, or P's float4."""
    if name in INTEGERS:
        return INTEGERS[name]
    if name == FLOAT4.name:
        return FLOAT4
    return TF32 if name == "tf32" else format_of(name)


def relative(form: Format) -> float:
    """Return the largest relative error of a rounding to nearest; integers have an absolute one only."""
    return 0.0 if form.name in INTEGERS else form.unit_roundoff


OPEN = ("group_sum", "operands", "denominator", "rotated", "values", "value_sums")
"""Types of a Model that need not be named."""
MOST = 2**31
"""More keys than any call has."""


def typed(what: str, record: Any) -> None:
    """Refuse a field of another type than the class says; what is to be a set may be any collection."""
    for f in fields(record):
        kind, x = str(f.type), getattr(record, f.name)
        if kind.startswith("frozenset"):
            each = Integral if "int" in kind else str
            good = isinstance(x, Collection) and not isinstance(x, str)
            good = good and all(isinstance(i, each) and not isinstance(i, bool) for i in x)
            if good:
                object.__setattr__(record, f.name, frozenset(x))
        else:
            number = {"int": Integral, "float": Real}.get(kind)
            good = type(x).__name__ == kind or (
                number is not None and isinstance(x, number) and not isinstance(x, bool)
            )
        if not good:
            kind = kind.replace("frozenset[", "a set of ").rstrip("]")
            raise InvalidInput(f"{what}: got {f.name}={x!r}, expected {kind}")


@dataclass(frozen=True)
class Model:
    """A rounding model: the types that a kernel computes in. With a Problem it gives an error bound per element.

    Attributes
    ----------
    accumulator : str
        The type of products, sums, exponentials and running values.
    weights : str
        The type that the weights P are rounded to before they meet the values.
    scores : str
        The type that the scores S are stored in.
    exp_ulps : float
        The largest relative error of the exponential, in unit roundoffs of the accumulator.
    tile : int
        The fewest keys between two rescales of the running sums.
    lse : str
        The type that lse is returned in.
    subnormals : bool
        False where the kernel's machine takes subnormal numbers for zero.
    chain : int
        The most products that are added one after another before they join a running sum: a sum of n numbers then
        passes through chain + n / chain additions, not n.
    split : int
        The fewest keys to a part whose answer is merged with the others' through lse; 0 where there is one part.
    group_sum : str
        The type in which dk and dv of the query heads of a group are added; "" is the accumulator.
    operands : str
        The type that query, key and value (and dout) are rounded to before they are multiplied: a format or "tf32";
        "" where they go in as they are.
    passes : int
        1, or 3 where an operand is the sum of two numbers of that type, and all products but the smallest are added.
    scales : str
        "" where operands are cast as they are, "tensor" or "block" where each tensor, or each block of rows of a
        head, is scaled so that its largest element becomes the type's largest number.
    block : int
        Rows to a block of ``scales``.
    from_lse : bool
        Whether the weights are exp(s - lse) of a stored lse and are not divided again, as in backward passes.
    denominator : str
        The type that the weights are rounded to before they are added up to a row's denominator; "" where they are not
        rounded for it.
    rotated : str
        The type that queries and keys are written in once they are turned by rotary positions; "" is the accumulator's.
    values : str
        The type that values are rounded to where it is another one than ``operands``; "input" where they go in as they
        are.
    weights_scale : str
        "" where P is rounded as it is; "static" where it is scaled so that 1 becomes the largest number of the type of
        ``weights``, "row" or "block" where the largest of a row's ``tile`` keys, or of ``block`` rows of them, does;
        "micro" where the largest of each 16 keys of a row does, under a scale in float8_e4m3fn, of which the largest
        number is the row's largest in a tile.
    smoothed : bool
        Whether the mean of all keys is taken off each key before ``operands``, and put back into lse.
    smoothed_queries : bool
        Whether the mean of each ``block`` of queries is taken off these, too, and its product with the keys, made in
        the accumulator's type, added to their scores.
    value_sums : str
        The type in which weights times values are added, and rescaled; "" is the accumulator.
    aligned_bits : int
        Of matrix units that add ``fused`` products and the running sum at once: how many bits below the exponent of
        the largest of these are kept, the others cut off; 0 where each addition is rounded.
    fused : int
        How many products such a unit adds at once.
    promoted : int
        After how many products such a sum goes over to one in the accumulator's type; 0 where it never does.
    cumulated : int
        Tokens of a chunk in which a recurrence's decays are multiplied up, or their logarithms added, so that the decay
        between two tokens is a ratio; 0 where it is a product of the decays between.
    stochastic : bool
        Whether what goes to a narrower type than the accumulator goes up or down by chance, with the exact value as
        its mean.
    """

    accumulator: str = "float32"
    weights: str = "float32"
    scores: str = "float32"
    exp_ulps: float = 3.0
    tile: int = 16
    lse: str = "float32"
    subnormals: bool = True
    chain: int = 512
    split: int = 0
    group_sum: str = ""
    operands: str = ""
    passes: int = 1
    scales: str = ""
    block: int = 128
    from_lse: bool = False
    denominator: str = ""
    rotated: str = ""
    values: str = ""
    weights_scale: str = ""
    smoothed: bool = False
    aligned_bits: int = 0
    fused: int = 16
    promoted: int = 0
    stochastic: bool = False
    smoothed_queries: bool = False
    value_sums: str = ""
    cumulated: int = 0

    def __post_init__(self) -> None:
        typed("model", self)
        for part, known in (
            *((n, FORMATS) for n in ("accumulator", "scores", "lse")),
            *((n, INSIDE) for n in ("group_sum", "denominator", "rotated")),
            ("value_sums", FORMATS),
            ("weights", (*INSIDE, *INTEGERS, FLOAT4.name)),
            ("operands", (*INSIDE, *INTEGERS)),
            ("values", (*INSIDE, *INTEGERS, "input")),
        ):
            name = getattr(self, part)
            if name not in known and not (name == "" and part in OPEN):
                raise InvalidInput(f"model: got {part}={name!r}, expected one of {', '.join(known)}")
        if max(self.tile, self.chain, self.block, self.split) > MOST:
            raise InvalidInput(
                f"model: got tile={self.tile}, chain={self.chain}, block={self.block} and split={self.split}, expected "
                f"at most {MOST}"
            )
        if not (self.exp_ulps > 0 and min(self.tile, self.chain, self.block) >= 1 and self.split >= 0):
            raise InvalidInput(
                f"model: got exp_ulps={self.exp_ulps}, tile={self.tile}, chain={self.chain}, block={self.block} and "
                f"split={self.split}, expected more than 0, three times at least 1, and at least 0"
            )
        coarsest = FORMATS["float8_e4m3fn"].unit_roundoff
        if self.exp_ulps * format_of(self.accumulator).unit_roundoff > coarsest:
            raise InvalidInput(
                f"model: got exp_ulps={self.exp_ulps:g} of {self.accumulator}, a relative error above 2**-4, more than "
                "rounding P to float8 loses; nothing would fail"
            )
        if self.passes not in (1, 3) or self.scales not in ("", "tensor", "block"):
            raise InvalidInput(
                f"model: got passes={self.passes} and scales={self.scales!r}, expected 1 or 3, and '', 'tensor' or "
                "'block'"
            )
        if (self.passes == 3 or self.scales) and not self.operands:
            raise InvalidInput("model: passes and scales are of operands; name their type, e.g. operands='tf32'")
        if self.passes == 3 and self.scales:
            raise InvalidInput("model: operands in three passes are not scaled")
        if not 0 <= self.cumulated <= MOST:
            raise InvalidInput(f"model: got cumulated={self.cumulated}, expected 0 to {MOST} tokens")
        self._stored()
        self._adders()

    def _stored(self) -> None:
        """Refuse narrow types that do not go together."""
        if self.weights_scale not in ("", "static", "row", "block", "micro"):
            raise InvalidInput(
                f"model: got weights_scale={self.weights_scale!r}, expected '', 'static', 'row', 'block' or 'micro'"
            )
        if (self.weights == FLOAT4.name) != (self.weights_scale == "micro"):
            raise InvalidInput(f"model: P in {FLOAT4.name} and weights_scale='micro' go together; give both")
        if self.weights_scale == "micro" and (self.tile % MICRO or self.stochastic):
            raise InvalidInput(
                f"model: got tile={self.tile} and stochastic={self.stochastic} with weights_scale='micro', expected a "
                f"multiple of {MICRO}, and False"
            )
        if self.weights_scale not in ("", "micro") and self.weights not in SCALED:
            raise InvalidInput(f"model: weights={self.weights!r} is not scaled; {', '.join(SCALED)} may be")
        if self.weights in INTEGERS and not self.weights_scale:
            raise InvalidInput(f"model: P in {self.weights} is 0 or 1 without a scale; give weights_scale='static'")
        if (self.operands in INTEGERS or self.values in INTEGERS) and not self.scales:
            raise InvalidInput("model: operands that are integers need scales='tensor' or 'block'")
        if (self.values or self.smoothed) and not self.operands:
            raise InvalidInput("model: values and smoothed are of operands; name their type, e.g. operands='int8'")
        if self.smoothed and self.scales == "tensor":
            raise InvalidInput("model: smoothed keys are scaled by blocks of rows; give scales='block'")
        if self.smoothed_queries and not self.smoothed:
            raise InvalidInput("model: smoothed_queries goes with smoothed keys; give smoothed=True")
        if self.value_sums and self.aligned_bits:
            raise InvalidInput("model: value_sums is of sums that are rounded one by one; leave aligned_bits out")
        if self.stochastic and self.passes == 3:
            raise InvalidInput("model: operands in three passes are rounded to nearest")

    def _adders(self) -> None:
        """Refuse matrix units that there are not."""
        if not (self.aligned_bits == 0 or 8 <= self.aligned_bits <= 30) or not 1 <= self.fused <= 1024:
            raise InvalidInput(
                f"model: got aligned_bits={self.aligned_bits} and fused={self.fused}, expected 0, or 8 to 30, and 1 to "
                "1024"
            )
        if self.promoted % self.fused or not 0 <= self.promoted <= MOST or (self.promoted and not self.aligned_bits):
            raise InvalidInput(
                f"model: got promoted={self.promoted}, expected 0, or with aligned_bits a multiple of {self.fused}"
            )
        if self.aligned_bits and self.accumulator != "float32":
            raise InvalidInput(
                f"model: got accumulator={self.accumulator!r} with aligned_bits; such units hold their sums in float32"
            )

    @property
    def forward_only(self) -> tuple[str, ...]:
        """What the model has that no bound of gradients knows of."""
        names = ("values", "weights_scale", "smoothed", "aligned_bits", "stochastic", "value_sums")
        return tuple(n for n in names if getattr(self, n)) + (("operands",) if self.operands in INTEGERS else ())

    @property
    def times(self) -> int:
        """How many halves of a step a rounding to a narrower type is off by, at most."""
        return 2 if self.stochastic else 1

    def loss(self, name: str) -> float:
        """Return what a value loses by passing through a type: 0 where that is as wide as the accumulator."""
        form = inside_type(name or self.accumulator)
        if self.passes == 3 and name == self.operands:
            return 1.5 * form.unit_roundoff**2
        narrow = form.precision < inside_type(self.accumulator).precision
        return self.times * relative(form) if narrow else 0.0

    def scatter(self, name: str) -> float:
        """Return the variance of what :meth:`loss` bounds, over the value's square."""
        return C * self.loss(name) ** 2 / self.times  # by chance: twice that of rounding to nearest

    def merges(self, n: int, sink: bool) -> int:
        """Return how many parts n keys, and a sink as one more, are merged from."""
        return -(-n // self.split) + sink if self.split else 0

    def depth(self, n: Any) -> Any:
        """Return how many additions a number passes through in a sum of n (a number or an array)."""
        return np.minimum(n, self.chain + np.ceil(n / self.chain))
