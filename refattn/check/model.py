"""How a kernel rounds, and what it says it can do."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..arrays import KINDS, dtype_name
from ..dtypes import ELEMENTS, FORMATS, Format, format_of
from ..errors import InvalidInput, UnsupportedProblem
from ..problem import Problem

__all__ = [
    "EDGES",
    "FEATURES",
    "FURTHER",
    "GRADIENTS",
    "MODELS",
    "UNDECLARED",
    "C",
    "Capabilities",
    "Model",
    "flash",
    "inside_type",
    "materialised",
    "model_named",
    "narrowed",
]

C = 3 / (8 * math.log(2)) / 3
"""The variance of a rounding to nearest over u^2 of the number's square, mantissas spread as they are."""
TF32 = Format("tf32", np.dtype(np.float32), 11, -126, 127, float((2 - 2.0**-10) * 2.0**127))
"""The matrix units' type for float32 operands: never an array's own."""


INSIDE = (*FORMATS, "tf32")


def inside_type(name: str) -> Format:
    """Return a type that a kernel computes in: a format, or tf32."""
    return TF32 if name == "tf32" else format_of(name)


FEATURES = frozenset(
    {
        "causal_bottom_right",
        "causal_top_left",
        "window",
        "softcap",
        "sink",
        "bias",
        "allowed",
        "variable_lengths",
        "grouped_heads",
        "d_v_differs",
        "lengths_differ",
        "scale",
        "no_rows_or_keys",
    }
)
"""What a call may ask of a kernel beyond plain attention: what a kernel is taken to have that does not say."""
FURTHER = frozenset(
    {"weight", "state", "alpha", "beta", "lengths_q", "lengths_k", "offset", "alignment", "negative_window", "d_k_zero"}
    | {"types_differ", "out_dtype", "out_scale", "paged_nhd", "paged_hnd", "appending"}
    | {"scales", "scales_by_head", "scales_by_token", "scales_by_channel", "scales_by_block"}
    | {"rotary_half", "rotary_interleaved", "rotary_partial", "alibi_slopes", "positions"}
)
"""What a kernel has only where it says so."""


GRADIENTS = frozenset({"dq", "dk", "dv", "dbias", "dsink", "dalpha", "dbeta"})
"""The gradients of a call, each of its input's shape and type."""


MOST = 2**31
"""More keys than any call has."""


def _typed(what: str, record: Any) -> None:
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

    def __post_init__(self) -> None:
        _typed("model", self)
        for part, known in (
            *((n, FORMATS) for n in ("accumulator", "scores", "lse")),
            *((n, INSIDE) for n in ("weights", "group_sum", "operands", "denominator", "rotated")),
        ):
            name = getattr(self, part)
            if name not in known and not (name == "" and part in ("group_sum", "operands", "denominator", "rotated")):
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

    def loss(self, name: str) -> float:
        """Return what a value loses by passing through a type: 0 where that is as wide as the accumulator."""
        form = inside_type(name or self.accumulator)
        if self.passes == 3 and name == self.operands:
            return 1.5 * form.unit_roundoff**2
        return form.unit_roundoff if form.precision < inside_type(self.accumulator).precision else 0.0

    def merges(self, n: int, sink: bool) -> int:
        """Return how many parts n keys, and a sink as one more, are merged from."""
        return -(-n // self.split) + sink if self.split else 0

    def depth(self, n: Any) -> Any:
        """Return how many additions a number passes through in a sum of n (a number or an array)."""
        return np.minimum(n, self.chain + np.ceil(n / self.chain))


def flash(dtype: str) -> Model:
    """Return the model of a flash kernel: float32 inside (float64 for float64), P rounded to the input's type."""
    inside = dtype if FORMATS[dtype].precision >= 24 else "float32"
    return Model(inside, dtype, inside, lse=inside, rotated=dtype)


def materialised(dtype: str) -> Model:
    """Return the model of a kernel that stores S and P in the input's type and sums in float32."""
    inside = dtype if FORMATS[dtype].precision >= 24 else "float32"
    return Model(inside, dtype, dtype, lse=inside, rotated=dtype)


def narrowed(dtype: str, operands: str = "float8_e4m3fn", scales: str = "tensor", passes: int = 1) -> Model:
    """Return the model of a flash kernel that multiplies in a narrower type: query, key, value and P rounded to it."""
    inside = dtype if FORMATS[dtype].precision >= 24 else "float32"
    return Model(inside, operands, inside, lse=inside, operands=operands, scales=scales, passes=passes, rotated=dtype)


ModelFor = Callable[[str], Model]

MODELS: dict[str, ModelFor] = {
    "flash": flash,
    "math": materialised,
    "tf32": lambda dtype: narrowed(dtype, "tf32", ""),
    "tf32x3": lambda dtype: narrowed(dtype, "tf32", "", 3),
    "float8": narrowed,
    "float8-block": lambda dtype: narrowed(dtype, scales="block"),
}
"""The named models: by name, from a format to its model. "flash" and "math" of float64 compute in float64."""


def model_named(name: str) -> ModelFor:
    """Return a named model, or raise InvalidInput."""
    if name not in MODELS:
        raise InvalidInput(f"model: got {name!r}, expected one of {', '.join(MODELS)}")
    return MODELS[name]


EDGES = {
    "nan-behind-mask": "NaN or inf that no row may see changes nothing",
    "nan-in-sight": "NaN or inf that a row sees shows in that row's results",
    "empty-row": "a row without keys gives 0, and its gradients are 0",
    "empty-lse": "the lse of a row without keys is -inf",
    "overflow": "numbers next to the largest of their type do not turn into inf or NaN",
    "subnormal": "results below the smallest normal number are not taken for zero",
    "scale": "a scale of zero or below is taken as it is",
    "threads": "it may be called from two threads at once",
    "outside": "an option outside the capabilities raises, or is right",
}
"""The contracts at the edge of what attention is for: by name, what is asked."""
NAMES = (
    ("dtypes", frozenset(FORMATS)),
    ("features", FEATURES | FURTHER),
    ("always", FEATURES),
    ("gradients", GRADIENTS),
    ("edges", frozenset(EDGES)),
    ("elements", frozenset(ELEMENTS)),
)
"""What each set of names of ``Capabilities`` is out of."""


def _strided(x: Any) -> bool:
    """Tell whether the elements of an array's last axis do not lie side by side; JAX's arrays have no strides."""
    if 0 in x.shape or x.shape[-1] == 1 or (not hasattr(x, "stride") and not hasattr(x, "strides")):
        return False
    return bool(x.stride(-1) != 1 if hasattr(x, "stride") else x.strides[-1] != x.dtype.itemsize)


@dataclass(frozen=True)
class Capabilities:
    """What a kernel says it can do; a case outside it is reported as unsupported and not run.

    Attributes
    ----------
    dtypes : frozenset of str
        Names of formats.
    features : frozenset of str
        Out of ``FEATURES`` (the default) and ``FURTHER``.
    d_max : int
        The largest d_k and d_v.
    lse : bool
        Whether it returns the log-sum-exp.
    gradients : frozenset of str
        Those that its attribute ``gradients`` returns, out of ``GRADIENTS``.
    batch_invariant : bool
        Whether a batch gives the same bits alone and among others.
    arrays : str
        The library of the arrays that it takes and returns: "numpy", "torch", "cupy" or "jax".
    device : str
        Where the library is to put them, e.g. "cuda"; "" is the library's default.
    row_invariant : bool
        Whether a row gives the same bits whatever else is in the call: a prefill, chunks of it, or the row alone.
    edges : frozenset of str
        Out of ``EDGES``: contracts that the kernel is known to differ from. It is strict: one that it keeps is
        reported, too.
    refuses : bool
        Whether it may raise UnsupportedProblem for calls that its features cover, because of sizes, say; otherwise
        that is a failure.
    deterministic : bool
        Whether the same call gives the same bits. Where not, two runs must agree within their bounds.
    head_dims : frozenset of int
        The widths d_k and d_v that it takes; empty means all up to d_max.
    seq_multiple : int
        What n_q and n_k must be multiples of.
    always : frozenset of str
        Features that every call must have, e.g. {"causal_bottom_right"}.
    last_axis_contiguous : bool
        Whether it demands that the elements of query, key and value lie side by side along the last axis.
    dlse : bool
        Whether its attribute ``gradients`` takes the gradient arriving at lse as a third argument.
    elements : frozenset of str
        Further types of query, key, value and out, beside one of `dtypes`: out of ``refattn.dtypes.ELEMENTS``.
    """

    dtypes: frozenset[str] = frozenset({"float32"})
    features: frozenset[str] = field(default=FEATURES)
    d_max: int = 2**31
    lse: bool = False
    gradients: frozenset[str] = frozenset()
    batch_invariant: bool = False
    arrays: str = "numpy"
    device: str = ""
    edges: frozenset[str] = frozenset()
    refuses: bool = False
    deterministic: bool = True
    head_dims: frozenset[int] = frozenset()
    seq_multiple: int = 1
    always: frozenset[str] = frozenset()
    last_axis_contiguous: bool = False
    row_invariant: bool = False
    dlse: bool = False
    elements: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _typed("capabilities", self)
        if min(self.seq_multiple, self.d_max, *self.head_dims) < 1:
            raise InvalidInput(
                f"capabilities: got seq_multiple={self.seq_multiple!r}, d_max={self.d_max} and "
                f"head_dims={set(self.head_dims)}, expected integers of at least 1"
            )
        if self.arrays not in KINDS or (self.arrays == "numpy" and self.device):
            raise InvalidInput(
                f"capabilities: got arrays={self.arrays!r} and device={self.device!r}, expected one of "
                f"{', '.join(KINDS)}, and no device for numpy"
            )
        for name, known in NAMES:
            unknown = sorted(getattr(self, name) - known)
            if unknown:
                raise InvalidInput(
                    f"capabilities: {name} has {unknown[0]!r}, expected some of {', '.join(sorted(known))}"
                )
        if "appending" in self.features and not self.features & {"paged_nhd", "paged_hnd"}:
            raise InvalidInput("capabilities: features has 'appending' alone, expected a layout, 'paged_nhd', beside")

    def missing(self, problem: Problem) -> list[str]:
        """Return what a call needs and the kernel does not have."""
        lacks = sorted(problem.features() - self.features)
        types = dict.fromkeys((*map(dtype_name, (problem.query, problem.key, problem.value)), problem.out_type))
        lacks += [n for n in types if n not in self.dtypes | self.elements]
        if max(problem.d_k, problem.d_v) > self.d_max:
            lacks.append(f"dim {max(problem.d_k, problem.d_v)}")
        elif self.head_dims and not {problem.d_k, problem.d_v} <= self.head_dims:
            lacks.append(f"dim {', '.join(str(d) for d in sorted({problem.d_k, problem.d_v} - self.head_dims))}")
        if problem.n_q % self.seq_multiple or problem.n_k % self.seq_multiple:
            lacks.append(f"lengths that are no multiples of {self.seq_multiple}")
        lacks += [f"calls without {n}" for n in sorted(self.always - problem.features())]
        if self.last_axis_contiguous and any(_strided(x) for x in (problem.query, problem.key, problem.value)):
            lacks.append("a last axis whose elements do not lie side by side")
        return lacks

    def require(self, problem: Problem) -> None:
        """Raise UnsupportedProblem where a call needs what the kernel does not have: its first line."""
        lacks = self.missing(problem)
        if lacks:
            raise UnsupportedProblem(f"not in its capabilities: {', '.join(lacks)}")


UNDECLARED = Capabilities()
"""What is assumed of a kernel that declares nothing: an option that it does not read is no failure."""
