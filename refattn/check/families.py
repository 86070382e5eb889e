"""The input families: small problems, each named by the bug that it exposes."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import from_float64
from ..dtypes import FORMATS, Format
from ..problem import Problem
from ..variants import variant_of

__all__ = ["FAMILIES", "Case", "cases"]

Float = NDArray[np.float64]
Build = Callable[["Draw"], Problem]

FAMILIES = {
    "gaussian": "plain random data through every option: a flag that is ignored, a head that is mapped wrongly",
    "ragged": "lengths at tile edges, one query, one key, none at all, packed sequences: off-by-one and tail bugs",
    "peaked": "one key holds nearly all the weight: a key that is dropped or added shows",
    "probe": "values that reveal P: one-hot columns, heads of different size, one large value",
    "shifted": "scores far from 0 or nearly tied: sentinels such as -1e4, missing shift, lost digits",
    "sparse": "small integers, equal scores, zero scale: answers that are exact ties or known by hand",
    "empty": "rows without keys: NaN, garbage, the mean of all values, an lse that is not -inf",
    "extreme": "the largest and smallest values, products that leave float32's range",
    "poison": "NaN and inf behind the mask, and in sight of some rows only",
}
"""Family names, and what they expose."""


@dataclass(frozen=True)
class Case:
    """One problem of a family.

    Attributes
    ----------
    family, label : str
        Its name is ``family/label``.
    variant : str
        The operator.
    build : callable
        ``build(draw) -> Problem``.
    dtypes : tuple of str
        The formats that it makes sense in; empty means all.
    """

    family: str
    label: str
    variant: str
    build: Build
    dtypes: tuple[str, ...] = ()

    @property
    def backward(self) -> bool:
        """Tell whether its gradient can be asked for: finite in sight of every query, and dout·v within the type."""
        return self.variant == "softmax" and self.name not in ("poison/value-seen-by-some", "extreme/huge-values")

    def arriving(self, dtype: str) -> NDArray[Any]:
        """Return a gradient arriving at out, (b, h_q, n_q, d_v); the same every time."""
        draw = Draw(FORMATS[dtype], np.random.default_rng(zlib.crc32(f"dout {self.name}".encode())), self.variant)
        return draw.tensor(draw.normal(*self.problem(dtype).out_shape))

    @property
    def name(self) -> str:
        """family/label."""
        return f"{self.family}/{self.label}"

    def problem(self, dtype: str) -> Problem:
        """Return the problem in a format; the same every time."""
        seed = zlib.crc32(f"{self.variant} {self.name}".encode())
        return self.build(Draw(FORMATS[dtype], np.random.default_rng(seed), self.variant))


class Draw:
    """Random tensors of one format."""

    def __init__(self, form: Format, rng: np.random.Generator, variant: str) -> None:
        self.form, self.rng, self.variant = form, rng, variant

    def tensor(self, x: Float) -> NDArray[Any]:
        """Round float64 numbers to the format, held to its finite range."""
        top = self.form.largest
        return from_float64(self.form.round_array(np.clip(x, -top, top)), self.form.name)

    def normal(self, *shape: int) -> Float:
        """Draw standard normal numbers."""
        return self.rng.standard_normal(shape)

    def mask(self, *shape: int) -> NDArray[np.bool_]:
        """Draw a mask that is True for about two keys in three, and for the first one."""
        mask = self.rng.random(shape) < 2 / 3
        mask[..., 0] = True
        return mask

    def problem(
        self,
        n_q: int = 37,
        n_k: int = 67,
        *,
        b: int = 1,
        h: int = 2,
        h_kv: int | None = None,
        d: int = 32,
        d_v: int | None = None,
        q: Float | None = None,
        k: Float | None = None,
        v: Float | None = None,
        **more: Any,
    ) -> Problem:
        """Build a problem of normal tensors, or of those given."""
        h_kv = h if h_kv is None else h_kv
        q = self.normal(b, h, n_q, d) if q is None else q
        k = self.normal(b, h_kv, n_k, d) if k is None else k
        v = self.normal(b, h_kv, n_k, d if d_v is None else d_v) if v is None else v
        for name in ("bias", "sink"):
            if name in more:
                more[name] = np.asarray(more[name], np.float32) if self.form.precision < 53 else np.asarray(more[name])
                if name == "bias":
                    more[name] = from_float64(self.form.round_array(more[name].astype(np.float64)), self.form.name)
        return Problem(self.tensor(q), self.tensor(k), self.tensor(v), variant=self.variant, **more)


def cases(variant: str) -> list[Case]:
    """Return the cases of an operator, family by family."""
    v = variant_of(variant)
    found: list[Case] = []
    for family in v.families:
        for label, (build, needs, dtypes) in BUILDERS[family].items():
            if needs <= v.uses:
                found.append(Case(family, label, variant, build, dtypes))
    if variant == "linear":
        found += [
            Case("gaussian", f"feature-{f}", variant, _with(feature=f, normalize=f != "identity"))
            for f in ("identity", "relu", "exp")
        ]
        found.append(
            Case(
                "gaussian",
                "decay",
                variant,
                _with(causal="bottom_right", feature="identity", normalize=False, decay=(0.03, 0.4)),
            )
        )
    if variant == "power":
        found += [Case("gaussian", f"form-{f}", variant, _with(form=f, p=p)) for f, p in (("stable", 6), ("mean", 2))]
    if variant == "sigmoid":
        found.append(Case("gaussian", "offset", variant, _with(offset=-1.5)))
    return found


def _with(causal: str | None = None, **options: Any) -> Build:
    return lambda draw: draw.problem(causal=causal, options=options)


# the builders: label -> (build, options of Problem needed, formats) -----------------------------------------------

Entry = tuple[Build, frozenset[str], tuple[str, ...]]


def _entry(build: Build, *needs: str, dtypes: tuple[str, ...] = ()) -> Entry:
    return build, frozenset(needs), dtypes


def _everything(d: Draw) -> Problem:
    return d.problem(
        b=2,
        h=6,
        h_kv=2,
        d_v=24,
        causal="bottom_right",
        softcap=5.0,
        bias=d.normal(1, 6, 37, 67),
        sink=d.normal(6),
        allowed=d.mask(2, 1, 1, 67),
    )


def _empty_rows(d: Draw) -> Problem:
    allowed = d.mask(1, 1, 37, 67)
    allowed[..., 3, :] = False
    allowed[..., 20:23, :] = False
    return d.problem(allowed=allowed)


def _empty_rows_bias(d: Draw) -> Problem:
    bias = d.normal(1, 1, 37, 67)
    bias[..., 5, :] = -np.inf
    bias[..., 30, :40] = -np.inf
    return d.problem(bias=bias)


def _needle(d: Draw, own: bool) -> Problem:
    q = d.normal(1, 2, 67, 32)
    k = (
        3 * q
        if own
        else 3 * np.repeat(q[..., -1:, :], 67, axis=2) * (np.arange(67) == 66)[:, None] + d.normal(1, 2, 67, 32) / 4
    )
    return d.problem(q=q, k=k, causal="bottom_right")


def _one_hot(d: Draw) -> Problem:
    eye = np.eye(67) * 128.0
    return d.problem(v=np.broadcast_to(eye, (1, 2, 67, 67)), causal="bottom_right")


def _head_scales(d: Draw) -> Problem:
    v = d.normal(1, 4, 67, 32) * 2.0 ** np.array([0, -6, 3, 6])[None, :, None, None]
    return d.problem(h=4, v=v)


def _own_value(d: Draw) -> Problem:
    v = d.normal(1, 2, 67, 32)
    v[..., -1, :] = 256.0
    return d.problem(67, 67, v=v, causal="bottom_right")


def _offset(d: Draw, size: float) -> Problem:
    """Scores near sign(size)·size² (times two axes and the scale), differing by normal numbers."""
    q, k = d.normal(1, 2, 37, 32), d.normal(1, 2, 67, 32)
    q[..., :2], k[..., :2] = abs(size), size
    return d.problem(q=q, k=k)


def _near_tie(d: Draw) -> Problem:
    base = d.normal(1, 2, 1, 32)
    q = base * 100 + d.normal(1, 2, 37, 32) / 10
    return d.problem(q=q, k=base * 25 + d.normal(1, 2, 67, 32) / 200)


def _integers(d: Draw, **more: Any) -> Problem:
    q, k = (d.rng.integers(-1, 2, (1, 2, n, 16)).astype(float) for n in (37, 67))
    return d.problem(q=q, k=k, v=d.rng.integers(-3, 4, (1, 2, 67, 16)).astype(float), **more)


def _huge_values(d: Draw) -> Problem:
    top = 2.0**d.form.emax * 1.75
    signs = np.where(np.arange(32) % 2, 1.0, -1.0)
    return d.problem(q=d.normal(1, 2, 37, 32) / 64, v=np.broadcast_to(signs * top, (1, 2, 67, 32)))


def _tiny_values(d: Draw) -> Problem:
    return d.problem(v=d.normal(1, 2, 67, 32) * d.form.smallest_normal / 4)


def _huge_products(d: Draw) -> Problem:
    q, k = d.normal(1, 2, 37, 32) * 2.0**63, d.normal(1, 2, 67, 32) * 2.0**67
    return d.problem(q=q, k=k, scale=2.0**-132)


def _poison(d: Draw, where: str) -> Problem:
    p = d.problem(allowed=np.broadcast_to(np.arange(67) % 9 != 7, (1, 1, 37, 67)).copy())
    hidden = np.arange(67) % 9 == 7
    k, v = p.key.copy(), p.value.copy()
    if where == "key":
        k[..., hidden, 3] = np.nan
    elif d.form.infinities and where == "inf":
        v[..., hidden, 5] = np.inf
    else:
        v[..., hidden, 5] = np.nan
    return p.replace(key=k, value=v)


def _poison_causal(d: Draw) -> Problem:
    p = d.problem(37, 37, causal="bottom_right")
    v = p.value.copy()
    v[..., 25, 5] = np.nan  # rows from 25 on see it, in one column
    return p.replace(value=v)


def _packed(d: Draw) -> Problem:
    return d.problem(
        60,
        70,
        causal="bottom_right",
        cu_seqlens_q=np.array([0, 17, 17, 40, 60], np.int32),
        cu_seqlens_k=np.array([0, 17, 20, 50, 70], np.int32),
    )


BUILDERS: dict[str, dict[str, Entry]] = {
    "gaussian": {
        "plain": _entry(lambda d: d.problem(b=2)),
        "causal-bottom-right": _entry(lambda d: d.problem(causal="bottom_right"), "causal"),
        "causal-top-left": _entry(lambda d: d.problem(causal="top_left"), "causal"),
        "causal-square": _entry(lambda d: d.problem(67, 67, causal="top_left"), "causal"),
        "window": _entry(lambda d: d.problem(67, 67, window=(9, 4)), "window"),
        "window-causal": _entry(lambda d: d.problem(causal="bottom_right", window=(11, 0)), "window"),
        "allowed": _entry(lambda d: d.problem(b=2, allowed=d.mask(2, 1, 37, 67)), "allowed"),
        "bias": _entry(lambda d: d.problem(bias=d.normal(1, 2, 37, 67)), "bias"),
        "softcap": _entry(lambda d: d.problem(q=3 * d.normal(1, 2, 37, 32), softcap=4.0), "softcap"),
        "softcap-bias": _entry(lambda d: d.problem(softcap=2.0, bias=3 * d.normal(1, 1, 37, 67)), "softcap", "bias"),
        "sink": _entry(lambda d: d.problem(sink=3 * d.normal(2)), "sink"),
        "grouped-heads": _entry(lambda d: d.problem(h=6, h_kv=2)),
        "narrow-values": _entry(lambda d: d.problem(d=64, d_v=24)),
        "dim-128": _entry(lambda d: d.problem(d=128)),
        "negative-scale": _entry(lambda d: d.problem(scale=-0.25)),
        "everything": _entry(_everything, "causal", "softcap", "bias", "sink", "allowed"),
    },
    "ragged": {
        "one-query": _entry(lambda d: d.problem(1, 129)),
        "one-key": _entry(lambda d: d.problem(5, 1)),
        "tile-plus-one": _entry(lambda d: d.problem(65, 65, causal="top_left"), "causal"),
        "tile-minus-one": _entry(lambda d: d.problem(63, 127)),
        "no-keys": _entry(lambda d: d.problem(5, 0)),
        "no-queries": _entry(lambda d: d.problem(0, 5)),
        "packed": _entry(_packed, "causal"),
    },
    "peaked": {
        "needle-own-key": _entry(lambda d: _needle(d, True), "causal"),
        "needle-last-key": _entry(lambda d: _needle(d, False), "causal"),
    },
    "probe": {
        "one-hot-values": _entry(_one_hot, "causal"),
        "head-scales": _entry(_head_scales),
        "own-value": _entry(_own_value, "causal"),
    },
    "shifted": {
        "large": _entry(lambda d: _offset(d, 420.0)),
        "small": _entry(lambda d: _offset(d, -420.0)),
        "below-minus-100": _entry(lambda d: _offset(d, -20.0)),
        "near-tie": _entry(_near_tie),
    },
    "sparse": {
        "integers": _entry(_integers),
        "scale-zero": _entry(lambda d: _integers(d, scale=0.0)),
    },
    "empty": {
        "rows-allowed": _entry(_empty_rows, "allowed"),
        "rows-bias": _entry(_empty_rows_bias, "bias"),
        "rows-causal": _entry(lambda d: d.problem(67, 37, causal="bottom_right"), "causal"),
    },
    "extreme": {
        "huge-values": _entry(_huge_values),
        "tiny-values": _entry(_tiny_values),
        "huge-products": _entry(_huge_products, dtypes=("float32", "bfloat16", "float64")),
    },
    "poison": {
        "key-behind-mask": _entry(lambda d: _poison(d, "key"), "allowed"),
        "value-behind-mask": _entry(lambda d: _poison(d, "value"), "allowed"),
        "inf-behind-mask": _entry(lambda d: _poison(d, "inf"), "allowed"),
        "value-seen-by-some": _entry(_poison_causal, "causal"),
    },
}
