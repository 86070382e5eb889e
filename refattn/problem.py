"""One attention call: tensors and options, frozen, and validated when it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np

from .arrays import dtype_name, kind_of, native, to_kind, to_numpy
from .dropout import check_dropout
from .elsewhere import hinted
from .errors import InvalidProblem
from .features import features_of
from .gates import RECURRENT
from .norms import NORMS, check_norms
from .pages import AXES, PAGES, check_layout, check_pages, check_read
from .positions import PLACED, check_positions
from .rules import Rule, Term
from .validation import (
    LENGTHS,
    OFFSETS,
    SCALES,
    check_lengths,
    check_masks,
    check_options,
    check_packing,
    check_scales,
    check_tensors,
    shown,
)

__all__ = ["MEANINGS", "VARIANT", "Problem"]

TENSORS = ("query", "key", "value", "bias", "allowed", "sink", "weight", "dropout_mask", *RECURRENT)
MEANINGS = (
    "causal", "window", "softcap", "sink", "bias", "allowed", "weight", *RECURRENT, "lengths_q", "lengths_k", "offset",
    "rotary", "alibi_slopes", *NORMS, "philox_layout", "dropout_mask", "alignment",
)  # fmt: skip
"""The options that mean something for some operators only."""
VARIANT = "softmax"
"""The operator of a call that names none."""


@hinted
@dataclass(frozen=True, eq=False)
class Problem:
    """One attention call: its tensors, its options and the operator they are for.

    Parameters
    ----------
    query : (b, h_q, n_q, d_k) array
        Of NumPy, PyTorch, CuPy or JAX, in one of the formats of ``refattn.dtypes.FORMATS``; with `out_dtype` also int8
        or float4_e2m1fn. Where d_k is 0 every product is an empty sum, 0, whatever the scale.
    key : (b, h_kv, n_k, d_k) array
        Of query's kind, and type unless `out_dtype` is given; h_kv divides h_q, and query head h uses key head
        h // (h_q / h_kv).
    value : (b, h_kv, n_k, d_v) array
        As key.
    scale : float, optional
        Multiplies the products query·key; None is the exact real number 1/sqrt(d_k) (1 for linear attention).
    causal : {None, "bottom_right", "top_left"}
        Which corner the diagonal of the causal mask meets: "bottom_right" lets the last query see every key.
    window : (left, right), optional
        Query i sees keys from i' - left to i' + right, both included, where i' is the query's place on the diagonal
        (aligned as `causal` or `alignment` says, bottom right where both are None); None on a side means no limit
        there. A side may be below 0: (None, -1) lets each query see what lies before its own place.
    softcap : float > 0, optional
        Scores become softcap · tanh(score / softcap), before bias and mask.
    sink : (h_q,) float array, optional
        One more logit for each head, with no value.
    bias : (b or 1, h_q or 1, n_q or 1, n_k or 1) float array, or a term, optional
        Added to the scores; -inf removes a key. Or a term of ``refattn.rules.terms``, whose numbers are rounded once to
        float32 (kept where queries are float64); it counts queries and keys as a rule does.
    allowed : boolean array of a shape as bias, or a rule of ``refattn.rules``, optional
        True where the query may attend to the key. A rule counts queries and keys from the first of the call, also
        where sequences are packed, and has its own diagonal.
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
        The state that a recurrence starts from; None is 0. With cu_seqlens it is (m, h_q, d_k, d_v).
    lengths_q, lengths_k : (b,) integer arrays, optional
        How many rows, and how many keys, of each batch item are used: the first ones. What lies behind them is never
        read, and what a kernel leaves in unused rows of its results is not looked at. With cu_seqlens they are (m,),
        one for each packed sequence, whose offsets say where it starts: gaps lie between.
    offset : int, or (b,) integer array, optional
        Keys by which the diagonal lies further right than in its corner: query i stands at key i + offset ("top_left"),
        or at i + offset + n_k - n_q ("bottom_right", n_k and n_q the used ones). With cu_seqlens an array is (m,).
    alignment : {None, "bottom_right", "top_left"}
        Which corner the diagonal of a window meets where `causal` is None.
    query_scale, key_scale, value_scale : float, or array of 4 axes, optional
        What the elements are multiplied with: each axis has one number, or as many as divide the tensor's axis, for
        equal blocks. One for all, (1, h, 1, 1) by head, (b, h, n, 1) by token, (1, h, 1, d) by channel, (b, h, n, d /
        32) by block; above 0, in any format or float8_e8m0fnu.
    out_scale : float, or (b or 1, h_q or 1, 1, 1) array, optional
        What out's elements are to be multiplied with: out holds the output divided by it.
    out_dtype : str, optional
        The format of out; None is query's.
    block_table : (b, pages of an item) integer array, optional
        Key j of item b lies in page block_table[b, j // page_size], at j % page_size; key and value are then caches in
        `page_layout`. Items may share pages. What nobody reads may hold anything: other pages, keys behind
        `lengths_k`, entries of the table there. With `cu_seqlens_q`, and no `cu_seqlens_k`, it is (m, pages).
    page_layout : {None, "NHD", "HND"}
        "NHD" is a cache (pages, page_size, h_kv, d), "HND" one (pages, h_kv, page_size, d).
    new_key, new_value : (b, h_kv, new keys, d_k) and (b, h_kv, new keys, d_v) arrays, optional
        What the call writes into the caches, in place, before it attends: the last of each item's `lengths_k` keys,
        which count them. With `cu_seqlens_q` they are as many as queries.
    rotary : {None, "half", "interleaved"}
        Rotary positions: which columns of queries and keys are turned together, c and c + r, or 2c and 2c + 1; those
        past 2r are not turned.
    rotary_cos, rotary_sin : (m, r) float arrays, optional
        The cosine and sine of each pair's angle at positions 0 to m - 1; ``refattn.functions.positions`` makes some.
    query_norm, key_norm : (d_k,) float arrays, optional
        Each row of queries, or keys, is divided by its root mean square and multiplied with these weights, before it is
        turned: w x / sqrt(mean(x^2) + norm_eps).
    norm_eps : float > 0, optional
        Comes with query_norm and key_norm.
    alibi_slopes : (h_q,) or (b, h_q) float array, optional
        The slope times the distance of query and key in positions is taken off a score, after softcap.
    positions_q, positions_k : (n,) or (b, n) integer arrays, optional
        Where queries and keys stand. None: key j of a sequence is at j, and a query at its key on the diagonal.
    dropout_p : float, optional
        The probability p that a weight is dropped, at least 0 and below 1: weights that are kept are divided by 1 - p,
        after the softmax. lse knows nothing of it.
    dropout_mask : (b or 1, h_q or 1, n_q or 1, n_k or 1) boolean array, optional
        True where a weight is kept; comes with dropout_p. As bits it is uint8, (b or 1, h_q or 1, n_q or 1, n_k / 8
        rounded up), key j at bit j mod 8 of byte j // 8, the lowest bit first.
    philox_layout : {None, "flash", "efficient"}
        Whose mask a seed draws, in place of dropout_mask: that of ``refattn.dropout_mask(drawn_as=)``.
    philox_seed, philox_offset : int, optional
        Of 64 bits; without an offset it is 0.
    alpha, beta, eta : (b, h_q, n_k, 1 or d_k), (b, h_q, n_k, 1) and (b, h_q, n_k, 1) float arrays, optional
        A recurrence's gates: what a token keeps of the state, 0 to 1 (None is 1), how far it moves it, 0 to 2, and what
        it keeps of the momentum, 0 to 1. With eta a state is (b, h_q, 2 d_k, d_v): the momentum below the memory.

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
    lengths_q: Any = None
    lengths_k: Any = None
    offset: Any = None
    alignment: str | None = None
    query_scale: Any = None
    key_scale: Any = None
    value_scale: Any = None
    out_scale: Any = None
    out_dtype: str | None = None
    block_table: Any = None
    page_layout: str | None = None
    new_key: Any = None
    new_value: Any = None
    alpha: Any = None
    beta: Any = None
    rotary: str | None = None
    rotary_cos: Any = None
    rotary_sin: Any = None
    alibi_slopes: Any = None
    positions_q: Any = None
    positions_k: Any = None
    dropout_p: float | None = None
    dropout_mask: Any = None
    philox_layout: str | None = None
    philox_seed: int | None = None
    philox_offset: int | None = None
    query_norm: Any = None
    key_norm: Any = None
    norm_eps: float | None = None
    eta: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.options, Mapping) or any(not isinstance(n, str) for n in self.options):
            raise InvalidProblem(f"options: got {shown(self.options)}, expected a mapping of names to values")
        if not isinstance(self.variant, str):
            raise InvalidProblem(f"variant: got {shown(self.variant)}, expected the name of an operator")
        object.__setattr__(self, "options", MappingProxyType({n: _python(x) for n, x in self.options.items()}))
        for name, x in self._arrays():  # numbers are what they are, in whatever order their bytes come
            if kind_of(x) == "numpy" and not x.dtype.isnative:
                object.__setattr__(self, name, native(x))
        check_layout(self)
        for check in (check_tensors, check_options, check_packing, check_pages, check_masks, check_lengths):
            check(self)
        for check in (check_scales, check_read, check_positions, check_norms, check_dropout):
            check(self)

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
        return int(self.key.shape[AXES[self.page_layout].index("heads")])

    @property
    def page_size(self) -> int:
        """The number of keys of a page; 0 where keys are in none."""
        return 0 if self.block_table is None else int(self.key.shape[AXES[self.page_layout].index("page")])

    @property
    def room(self) -> int:
        """The number of keys that an item's pages have room for."""
        return int(self.key.shape[2]) if self.block_table is None else int(self.block_table.shape[1]) * self.page_size

    @property
    def n_q(self) -> int:
        """The number of queries."""
        return int(self.query.shape[2])

    @property
    def n_k(self) -> int:
        """The number of keys; in pages, those that there is room for."""
        many = 1 if self.block_table is None or self.cu_seqlens_q is None else int(self.block_table.shape[0])
        return many * self.room

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
    def out_type(self) -> str:
        """The name of out's format."""
        return self.out_dtype or self.dtype

    @property
    def typed(self) -> bool:
        """Whether the call says more of its types than that all are query's."""
        return self.out_dtype is not None or any(getattr(self, n) is not None for n in SCALES)

    @property
    def kind(self) -> str:
        """The library of the arrays: one of ``KINDS``."""
        return str(kind_of(self.query))

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The shape of the output: (b, h_q, n_q, d_v)."""
        return (self.batch, self.heads, self.n_q, self.d_v)

    @property
    def corner(self) -> str:
        """The corner that the diagonal meets, one of ``ALIGNMENTS``."""
        return self.causal or self.alignment or "bottom_right"

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """The shape of a recurrence's state: (b, h_q, d_k, d_v), m for b where m are packed, 2 d_k with a momentum."""
        many = self.batch if self.cu_seqlens_q is None else int(self.cu_seqlens_q.shape[0]) - 1
        return (many, self.heads, self.d_k * self.state_parts, self.d_v)

    @property
    def state_parts(self) -> int:
        """How many matrices (d_k, d_v) a recurrence's state has, one below the other."""
        return 1 if self.eta is None else 2

    def segments(self, batch: int = 0) -> list[tuple[slice, slice]]:
        """Return the used query rows and key rows of each packed sequence of a batch item (one, if none is packed)."""
        q, starts = _spans(self.cu_seqlens_q, self.n_q, self.lengths_q, batch), self.cu_seqlens_k
        if self.block_table is not None and self.cu_seqlens_q is not None:
            starts = np.arange(self.block_table.shape[0] + 1) * self.room
        return list(zip(q, _spans(starts, self.n_k, self.lengths_k, batch), strict=True))

    def features(self) -> frozenset[str]:
        """Return what a kernel must be able to do for this call, as names of ``Capabilities``."""
        return features_of(self, MEANINGS)

    def to(self, kind: str, device: Any = None) -> Problem:
        """Return the same call with every array of another kind (``"numpy"``, ``"torch"``, ``"jax"``, ``"cupy"``)."""
        if kind == self.kind and device is None:
            return self
        changed: dict[str, Any] = {n: to_kind(to_numpy(x, n), kind, device) for n, x in self.arrays().items()}
        return replace(self, **changed)

    def replace(self, **changes: Any) -> Problem:
        """Return a copy with the given arguments changed, validated anew."""
        return replace(self, **changes)

    def arrays(self) -> dict[str, Any]:
        """Return the arrays that are present, by argument name."""
        return {n: x for n, x in self._arrays() if x is not None}

    def settings(self) -> dict[str, Any]:
        """Return every argument that is no array and differs from its default, by name."""
        arrays = self.arrays()
        names = [f.name for f in fields(self) if f.name not in (*arrays, "options")]
        plain = {n: getattr(self, n) for n in names if getattr(self, n) not in (None, VARIANT)}
        plain |= {n: x for n in ("bias", "allowed") if isinstance(x := getattr(self, n), Rule | Term)}
        return plain | ({"options": dict(self.options)} if self.options else {})

    def written_out(self) -> Problem:
        """Return the same call with arrays for a rule in `allowed` and a term in `bias`: what a kernel gets."""
        p = self.with_bias()
        if not isinstance(p.allowed, Rule):
            return p
        return p.replace(allowed=p._like(p.allowed.written(p.batch, p.heads, p.n_q, p.n_k)))

    def with_bias(self) -> Problem:
        """Return the same call with an array for a term in `bias`."""
        if not isinstance(self.bias, Term):
            return self
        wide = "float64" if self.dtype == "float64" else "float32"
        return self.replace(bias=self._like(self.bias.written(self.batch, self.heads, self.n_q, self.n_k, wide)))

    def _like(self, x: Any) -> Any:
        return to_kind(x, self.kind, getattr(self.query, "device", None) if self.kind == "torch" else None)

    def __repr__(self) -> str:
        shape = f"b={self.batch} h_q={self.heads} h_kv={self.heads_kv} n_q={self.n_q} n_k={self.n_k} d_k={self.d_k}"
        shape += f" pages={self.key.shape[0]}x{self.page_size}" if self.block_table is not None else ""
        more = "".join(f" {n}={v!r}" for n, v in self.settings().items() if n != "variant")
        given = "".join(f" {n}" for n in self.arrays() if n not in ("query", "key", "value"))
        return f"Problem({self.variant} {self.dtype} {self.kind} {shape} d_v={self.d_v}{more}{given})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # IPython and Hypothesis would print every array of a dataclass in full
        printer.text(repr(self))

    def _arrays(self) -> Iterator[tuple[str, Any]]:
        for name in TENSORS + OFFSETS + LENGTHS + SCALES + PAGES + PLACED + NORMS:
            x = getattr(self, name)
            if not isinstance(x, Rule | Term) and (name not in ("offset", *SCALES) or kind_of(x) is not None):
                yield name, x


def _python(x: Any) -> Any:
    """Return an option's NumPy numbers as Python's: narrow ones would overflow in sums of them."""
    if isinstance(x, np.generic):
        return x.item()
    return tuple(map(_python, x)) if type(x) is tuple else x


def _spans(starts: Any, n: int, lengths: Any, batch: int) -> list[slice]:
    ends = [0, n] if starts is None else to_numpy(starts).tolist()
    if lengths is None:
        return [slice(a, b) for a, b in pairwise(ends)]
    used = to_numpy(lengths).tolist()
    return [slice(a, a + m) for a, m in zip(ends, used if starts is not None else [used[batch]], strict=False)]


def _made(values: dict[str, Any]) -> Problem:
    return Problem(**values)
