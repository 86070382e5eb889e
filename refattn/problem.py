"""One attention call: tensors and options, frozen. This is the only place that validates them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from .arrays import KINDS, dtype_name, kind_of, native, to_kind, to_numpy, why_unusable
from .dtypes import FORMATS
from .errors import InvalidProblem
from .gates import RECURRENT, check_shape

__all__ = ["ALIGNMENTS", "MEANINGS", "VARIANT", "Problem", "check_offsets", "shown"]

ALIGNMENTS = ("bottom_right", "top_left")
TENSORS = ("query", "key", "value", "bias", "allowed", "sink", "weight", *RECURRENT)
OFFSETS = ("cu_seqlens_q", "cu_seqlens_k")
MEANINGS = ("causal", "window", "softcap", "sink", "bias", "allowed", "weight", *RECURRENT)
"""The options that mean something for some operators only."""
VARIANT = "softmax"
"""The operator of a call that names none."""
WIDEST = 2**62
"""The widest side of a window: sums with it are still integers of 64 bits."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One attention call: its tensors, its options and the operator they are for.

    Parameters
    ----------
    query : (b, h_q, n_q, d_k) float array
        Of NumPy, PyTorch, CuPy or JAX, in one of the formats of ``refattn.dtypes.FORMATS``.
    key : (b, h_kv, n_k, d_k) array
        Of query's kind and type; h_kv divides h_q, and query head h uses key head h // (h_q / h_kv).
    value : (b, h_kv, n_k, d_v) array
        Of query's kind and type.
    scale : float, optional
        Multiplies the products query·key; None is the exact real number 1/sqrt(d_k) (1 for linear attention).
    causal : {None, "bottom_right", "top_left"}
        Which corner the diagonal of the causal mask meets: "bottom_right" lets the last query see every key.
    window : (left, right), optional
        Query i sees keys from i' - left to i' + right, both included, where i' is the query's place on the diagonal
        (aligned as `causal` says, bottom right where it is None); None on a side means no limit there.
    softcap : float > 0, optional
        Scores become softcap · tanh(score / softcap), before bias and mask.
    sink : (h_q,) float array, optional
        One more logit for each head, with no value.
    bias : (b or 1, h_q or 1, n_q or 1, n_k or 1) float array, optional
        Added to the scores; -inf removes a key.
    allowed : boolean array of a shape as bias, optional
        True where the query may attend to the key.
    cu_seqlens_q, cu_seqlens_k : (m + 1,) integer arrays, optional
        Offsets of m sequences packed along the sequence axes (batch must be 1): sequence t holds queries
        cu_seqlens_q[t] to cu_seqlens_q[t+1] - 1 and sees only its own keys; causal and window hold in each.
    variant : str
        The operator's name in ``refattn.VARIANTS``.
    options : mapping
        The operator's own options; ``refattn show VARIANT`` lists them.
    weight : (b or 1, h_q or 1, n_q or 1, n_k or 1) float array, optional
        Of at least 0: how often each key counts. Its logarithm is added to the scores, exactly; 0 removes a key.
    state : (b, h_q, d_k, d_v) float array, optional
        The state that a recurrence starts from; None is 0.
    alpha, beta : (b, h_q, n_k, 1 or d_k) and (b, h_q, n_k, 1) float arrays, optional
        A recurrence's gates: what a token keeps of the state, 0 to 1 (None is 1), and how far it moves it, 0 to 2.

    Raises
    ------
    InvalidProblem
        What is wrong with which argument, what was expected, what to change.

    Notes
    -----
    A row without any key gives out 0 and lse -inf. A key that is not allowed is never read. lse is the natural log.
    """

    query: Any
    key: Any
    value: Any
    scale: float | None = None
    causal: str | None = None
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    sink: Any = None
    bias: Any = None
    allowed: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    variant: str = VARIANT
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: Any = None
    state: Any = None
    alpha: Any = None
    beta: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.options, Mapping) or any(not isinstance(n, str) for n in self.options):
            raise InvalidProblem(f"options: got {shown(self.options)}, expected a mapping of names to values")
        if not isinstance(self.variant, str):
            raise InvalidProblem(f"variant: got {shown(self.variant)}, expected the name of an operator")
        object.__setattr__(self, "options", MappingProxyType({n: _python(x) for n, x in self.options.items()}))
        for name, x in self._arrays():  # numbers are what they are, in whatever order their bytes come
            if kind_of(x) == "numpy" and not x.dtype.isnative:
                object.__setattr__(self, name, native(x))
        self._check_tensors()
        self._check_options()
        self._check_masks()
        self._check_lengths()

    def __reduce__(self) -> Any:
        return _made, (vars(self) | {"options": dict(self.options)},)

    # shapes, in the words of the docs -------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """b, the number of batches."""
        return int(self.query.shape[0])

    @property
    def heads(self) -> int:
        """h_q, the number of query heads."""
        return int(self.query.shape[1])

    @property
    def heads_kv(self) -> int:
        """h_kv, the number of key and value heads."""
        return int(self.key.shape[1])

    @property
    def n_q(self) -> int:
        """The number of queries."""
        return int(self.query.shape[2])

    @property
    def n_k(self) -> int:
        """The number of keys."""
        return int(self.key.shape[2])

    @property
    def d_k(self) -> int:
        """The width of queries and keys."""
        return int(self.query.shape[3])

    @property
    def d_v(self) -> int:
        """The width of values and outputs."""
        return int(self.value.shape[3])

    @property
    def dtype(self) -> str:
        """The name of the element type, e.g. ``"bfloat16"``."""
        return dtype_name(self.query)

    @property
    def kind(self) -> str:
        """The library of the arrays: one of ``KINDS``."""
        return str(kind_of(self.query))

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The shape of the output: (b, h_q, n_q, d_v)."""
        return (self.batch, self.heads, self.n_q, self.d_v)

    def segments(self) -> list[tuple[slice, slice]]:
        """Return the query rows and key rows of each packed sequence (one of all rows where nothing is packed)."""
        if self.cu_seqlens_q is None:
            return [(slice(0, self.n_q), slice(0, self.n_k))]
        q, k = (to_numpy(getattr(self, n)).tolist() for n in OFFSETS)
        return [(slice(a, b), slice(c, d)) for a, b, c, d in zip(q, q[1:], k, k[1:], strict=False)]

    def features(self) -> frozenset[str]:
        """Return what a kernel must be able to do for this call, as names of ``Capabilities``."""
        found = {name for name in MEANINGS[1:] if getattr(self, name) is not None}
        if self.causal is not None:
            found.add(f"causal_{self.causal}")
        if self.cu_seqlens_q is not None:
            found.add("variable_lengths")
        if self.heads != self.heads_kv:
            found.add("grouped_heads")
        if self.d_k != self.d_v:
            found.add("d_v_differs")
        if self.n_q != self.n_k:
            found.add("lengths_differ")
        if self.scale is not None:
            found.add("scale")
        if 0 in (self.batch, self.n_q, self.n_k):
            found.add("no_rows_or_keys")
        return frozenset(found)

    def to(self, kind: str, device: Any = None) -> Problem:
        """Return the same call with every array of another kind (``"numpy"``, ``"torch"``, ``"jax"``, ``"cupy"``)."""
        if kind == self.kind and device is None:
            return self
        changed: dict[str, Any] = {n: x if x is None else to_kind(to_numpy(x), kind, device) for n, x in self._arrays()}
        return replace(self, **changed)

    def replace(self, **changes: Any) -> Problem:
        """Return a copy with the given arguments changed, validated anew."""
        return replace(self, **changes)

    def arrays(self) -> dict[str, Any]:
        """Return the arrays that are present, by argument name."""
        return {n: x for n, x in self._arrays() if x is not None}

    def settings(self) -> dict[str, Any]:
        """Return every argument that is no array and differs from its default, by name."""
        names = [f.name for f in fields(self) if f.name not in TENSORS + OFFSETS + ("options",)]
        plain = {n: getattr(self, n) for n in names if getattr(self, n) not in (None, VARIANT)}
        return plain | ({"options": dict(self.options)} if self.options else {})

    def __repr__(self) -> str:
        shape = f"b={self.batch} h_q={self.heads} h_kv={self.heads_kv} n_q={self.n_q} n_k={self.n_k} d_k={self.d_k}"
        more = "".join(f" {n}={v!r}" for n, v in self.settings().items() if n != "variant")
        given = "".join(f" {n}" for n in self.arrays() if n not in ("query", "key", "value"))
        return f"Problem({self.variant} {self.dtype} {self.kind} {shape} d_v={self.d_v}{more}{given})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # IPython and Hypothesis would print every array of a dataclass in full
        printer.text(repr(self))

    # validation -----------------------------------------------------------------------------------------------

    def _arrays(self) -> Iterator[tuple[str, Any]]:
        for name in TENSORS + OFFSETS:
            yield name, getattr(self, name)

    def _check_tensors(self) -> None:
        for name in ("query", "key", "value"):
            x = getattr(self, name)
            _expect_array(name, x)
            if len(x.shape) != 4:
                raise InvalidProblem(
                    f"{name}: got {len(x.shape)} axes {tuple(x.shape)}, expected 4 (batch, heads, seq, dim); "
                    "add or split axes"
                )
            if dtype_name(x) not in FORMATS:
                raise InvalidProblem(
                    f"{name}: got dtype {dtype_name(x)}, expected one of {', '.join(FORMATS)}; cast it"
                )
        q, k, v = self.query, self.key, self.value
        for name, x in (("key", k), ("value", v)):
            if kind_of(x) != kind_of(q):
                raise InvalidProblem(
                    f"{name}: is of {kind_of(x)} and query of {kind_of(q)}; pass arrays of one library"
                )
            if dtype_name(x) != dtype_name(q):
                raise InvalidProblem(
                    f"{name}: got dtype {dtype_name(x)}, expected query's {dtype_name(q)}; cast one of them"
                )
            if x.shape[0] != q.shape[0]:
                raise InvalidProblem(
                    f"{name}: axis batch is {x.shape[0]}, expected query's {q.shape[0]}; repeat or slice it"
                )
        for axis, i in (("heads", 1), ("seq", 2)):
            if v.shape[i] != k.shape[i]:
                raise InvalidProblem(
                    f"value: axis {axis} is {v.shape[i]}, expected key's {k.shape[i]}; every key needs its value"
                )
        if k.shape[3] != q.shape[3]:
            raise InvalidProblem(f"key: axis dim is {k.shape[3]}, expected query's {q.shape[3]}; project one of them")
        for name, x, i, axis in (
            ("query", q, 1, "heads"),
            ("key", k, 1, "heads"),
            ("query", q, 3, "dim"),
            ("value", v, 3, "dim"),
        ):
            if x.shape[i] < 1:
                raise InvalidProblem(f"{name}: axis {axis} is 0 and must be at least 1")
        if q.shape[1] % k.shape[1]:
            raise InvalidProblem(
                f"key: axis heads is {k.shape[1]} and must divide query's {q.shape[1]} "
                "(grouped-query attention); repeat or slice the key heads"
            )

    def _check_options(self) -> None:
        if self.causal is not None and not (isinstance(self.causal, str) and self.causal in ALIGNMENTS):
            raise InvalidProblem(
                f"causal: got {shown(self.causal)}, expected None, 'bottom_right' or 'top_left'; "
                "name the corner that the diagonal meets"
            )
        if self.window is not None:
            ok = isinstance(self.window, tuple | list) and len(self.window) == 2
            if not ok or any(not _is_int(w) and w is not None for w in self.window):
                raise InvalidProblem(f"window: got {shown(self.window)}, expected (left, right) of integers or None")
            if any(w is not None and not 0 <= w <= WIDEST for w in self.window):
                raise InvalidProblem(
                    f"window: got {shown(tuple(self.window))}, expected sides of at least 0 and at most 2**62; "
                    "None lifts a limit"
                )
            object.__setattr__(self, "window", tuple(None if w is None else int(w) for w in self.window))
        for name, positive in (("scale", False), ("softcap", True)):
            x = getattr(self, name)
            if x is None:
                continue
            if isinstance(x, bool) or not isinstance(x, int | float | np.integer | np.floating):
                raise InvalidProblem(f"{name}: got {shown(x)}, expected a real number or None")
            if not _is_finite(x) or (positive and x <= 0):
                want = "a finite number above 0" if positive else "a finite number"
                raise InvalidProblem(f"{name}: got {shown(x)}, expected {want}; None turns it off")
            object.__setattr__(self, name, float(x))

    def _check_masks(self) -> None:
        full = (self.batch, self.heads, self.n_q, self.n_k)
        for name in ("bias", "allowed", "sink", "weight", *RECURRENT):
            x = getattr(self, name)
            if x is None:
                continue
            _expect_array(name, x)
            if kind_of(x) != self.kind:
                raise InvalidProblem(f"{name}: is of {kind_of(x)} and query of {self.kind}; pass arrays of one library")
            if name == "allowed" and dtype_name(x) != "bool":
                raise InvalidProblem(f"allowed: got dtype {dtype_name(x)}, expected bool; numbers to add go into bias")
            if name != "allowed" and dtype_name(x) not in FORMATS:
                raise InvalidProblem(
                    f"{name}: got dtype {dtype_name(x)}, expected one of {', '.join(FORMATS)}; "
                    "a boolean mask goes into allowed"
                )
            if name == "sink":
                if tuple(x.shape) != (self.heads,):
                    raise InvalidProblem(
                        f"sink: got shape {tuple(x.shape)}, expected ({self.heads},), a logit for each head"
                    )
            elif name in RECURRENT:
                check_shape(self, name, tuple(x.shape))
            elif len(x.shape) != 4 or any(a not in (1, b) for a, b in zip(x.shape, full, strict=True)):
                raise InvalidProblem(
                    f"{name}: got shape {tuple(x.shape)}, expected {full} or 1 in place of an axis; "
                    "add axes of length 1"
                )

    def _check_lengths(self) -> None:
        if self.cu_seqlens_q is None and self.cu_seqlens_k is None:
            return
        check_offsets(self, self.cu_seqlens_q, self.cu_seqlens_k)
        for name, end in zip(OFFSETS, (self.n_q, self.n_k), strict=True):
            x = to_numpy(getattr(self, name), name)
            if x[0] != 0 or x[-1] != end or (np.diff(x.astype(np.int64)) < 0).any():
                raise InvalidProblem(
                    f"{name}: got {x.tolist()}, expected offsets that start at 0, never fall and end at {end}"
                )


def check_offsets(p: Problem, q: Any, k: Any) -> None:
    """Refuse offsets of packed sequences that do not fit a call; their values are not looked at."""
    if q is None or k is None:
        raise InvalidProblem("cu_seqlens_q and cu_seqlens_k: got only one, expected both or none")
    if p.batch != 1:
        raise InvalidProblem(f"query: axis batch is {p.batch}, expected 1 with cu_seqlens; pack along the seq axis")
    for name, x in zip(OFFSETS, (q, k), strict=True):
        _expect_array(name, x)
        if len(x.shape) != 1 or x.shape[0] < 2 or not dtype_name(x).lstrip("u").startswith("int"):
            raise InvalidProblem(
                f"{name}: got {dtype_name(x)} of shape {tuple(x.shape)}, expected at least 2 integers on one axis"
            )
    if q.shape[0] != k.shape[0]:
        raise InvalidProblem(f"cu_seqlens_k: has {k.shape[0]} offsets, expected cu_seqlens_q's {q.shape[0]}")


def shown(x: Any) -> str:
    """Return a value as an error shows it: short, whatever it is; a huge integer or an odd object is named only."""
    try:
        text = str(x) if isinstance(x, np.generic) else repr(x)
    except Exception:  # of an integer of thousands of digits, and of whatever a foreign class does
        return f"a value of {type(x).__name__} that cannot be shown"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_finite(x: Any) -> bool:
    try:
        return math.isfinite(x)
    except OverflowError:  # an integer beyond float64
        return False


def _python(x: Any) -> Any:
    """Return an option's NumPy numbers as Python's: narrow ones would overflow in sums of them."""
    if isinstance(x, np.generic):
        return x.item()
    return tuple(map(_python, x)) if type(x) is tuple else x


def _is_int(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _expect_array(name: str, x: Any) -> None:
    if kind_of(x) is None:
        raise InvalidProblem(f"{name}: got {type(x).__name__}, expected an array of {', '.join(KINDS)}")
    if (why := why_unusable(x)) is not None:
        raise InvalidProblem(f"{name}: {why}")


def _made(values: dict[str, Any]) -> Problem:
    return Problem(**values)
