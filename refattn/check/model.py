"""How a kernel rounds, and what it says it can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ..arrays import KINDS, dtype_name
from ..dtypes import ELEMENTS, FORMATS
from ..errors import InvalidInput, UnsupportedProblem
from ..problem import Problem
from .rounding import INTEGERS, SCALED, TF32, C, Model, inside_type, relative, typed

__all__ = [
    "EDGES",
    "FEATURES",
    "FURTHER",
    "GRADIENTS",
    "INTEGERS",
    "MODELS",
    "SCALED",
    "TF32",
    "UNDECLARED",
    "C",
    "Capabilities",
    "Model",
    "flash",
    "inside_type",
    "materialised",
    "model_named",
    "narrowed",
    "relative",
]

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
    {
        "weight",
        "state",
        "alpha",
        "beta",
        "eta",
        "lengths_q",
        "lengths_k",
        "offset",
        "alignment",
        "negative_window",
        "d_k_zero",
    }
    | {"dropout_mask", "dropout_bits", "philox_flash", "philox_efficient"}
    | {"types_differ", "out_dtype", "out_scale", "paged_nhd", "paged_hnd", "appending"}
    | {"scales", "scales_by_head", "scales_by_token", "scales_by_channel", "scales_by_block"}
    | {"rotary_half", "rotary_interleaved", "rotary_partial", "alibi_slopes", "positions"}
    | {"query_norm", "key_norm"}
)
"""What a kernel has only where it says so."""


GRADIENTS = frozenset({"dq", "dk", "dv", "dbias", "dsink", "dalpha", "dbeta", "deta", "dstate"})
GRADIENTS |= {"dquery_norm", "dkey_norm", "dalibi_slopes"}
"""The gradients of a call, each of its input's shape and type."""


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


def matrix_unit(dtype: str, bits: int, fused: int) -> Model:
    """Return the model of a flash kernel on a matrix unit that aligns its products and cuts off what is below."""
    if dtype == "float64":
        return flash(dtype)  # these multiply and add one after another
    plain = flash(dtype) if dtype != "float32" else narrowed(dtype, "tf32", "")
    return replace(plain, aligned_bits=bits, fused=fused // 2 if dtype == "float32" else fused)


def hopper_float8(dtype: str, promoted: int = 0) -> Model:
    """Return the model of a float8 kernel on Hopper: 13 bits below the largest of 32 products are kept."""
    wide = narrowed(dtype)
    if wide.accumulator != "float32":
        return wide
    return replace(wide, weights_scale="static", aligned_bits=13, fused=32, promoted=promoted, tile=64)


def sage(dtype: str, weights: str = "float16", values: str = "float16", **more: Any) -> Model:
    """Return the model of a kernel that smooths keys and multiplies queries and keys as int8, by blocks of rows."""
    plain = flash(dtype)
    if plain.accumulator != "float32":
        more = {n: x for n, x in more.items() if n not in ("aligned_bits", "promoted")}
    return replace(
        plain, weights=weights, values=values, operands="int8", scales="block", smoothed=True, rotated=dtype, **more
    )


ModelFor = Callable[[str], Model]

MODELS: dict[str, ModelFor] = {
    "flash": flash,
    "math": materialised,
    "tf32": lambda dtype: narrowed(dtype, "tf32", ""),
    "tf32x3": lambda dtype: narrowed(dtype, "tf32", "", 3),
    "float8": narrowed,
    "float8-block": lambda dtype: narrowed(dtype, scales="block"),
    "volta": lambda dtype: matrix_unit(dtype, 23, 4),
    "ampere": lambda dtype: matrix_unit(dtype, 24, 8),
    "hopper": lambda dtype: matrix_unit(dtype, 25, 16),
    "hopper-float8": hopper_float8,
    "hopper-float8-promoted": lambda dtype: hopper_float8(dtype, 128),
    "sage": sage,
    "sage-int8": lambda dtype: sage(dtype, "int8", "int8", weights_scale="static"),
    "sage-half": lambda dtype: sage(dtype, value_sums="float16" if FORMATS[dtype].precision < 24 else ""),
    "sage2-smooth": lambda dtype: sage(
        dtype, "float8_e4m3fn", "float8_e4m3fn", weights_scale="static", smoothed_queries=True, tile=64
    ),
    "float4-weights": lambda dtype: replace(flash(dtype), weights="float4_e2m1fn", weights_scale="micro"),
    "sage2": lambda dtype: sage(
        dtype, "float8_e4m3fn", "float8_e4m3fn", weights_scale="static", aligned_bits=13, fused=32, promoted=64, tile=64
    ),
    "flash-ratios": lambda dtype: replace(flash(dtype), cumulated=64),
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
    page_multiple : int
        What the number of keys of a page must be a multiple of.
    always : frozenset of str
        Features that every call must have, e.g. {"causal_bottom_right"}.
    last_axis_contiguous : bool
        Whether it demands that the elements of query, key and value lie side by side along the last axis.
    dlse : bool
        Whether its attribute ``gradients`` takes the gradient arriving at lse as a third argument.
    dstate_out : bool
        Whether, of a recurrence, it takes the gradient arriving at the last state as a third argument.
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
    dstate_out: bool = False
    elements: frozenset[str] = frozenset()
    page_multiple: int = 1

    def __post_init__(self) -> None:
        typed("capabilities", self)
        if min(self.seq_multiple, self.page_multiple, self.d_max, *self.head_dims) < 1:
            raise InvalidInput(
                f"capabilities: got seq_multiple={self.seq_multiple!r}, page_multiple={self.page_multiple!r}, "
                f"d_max={self.d_max} and head_dims={set(self.head_dims)}, expected integers of at least 1"
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
        if problem.block_table is not None and problem.page_size % self.page_multiple:
            lacks.append(f"pages of {problem.page_size} keys, which are no multiple of {self.page_multiple}")
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
