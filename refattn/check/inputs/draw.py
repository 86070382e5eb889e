"""Random tensors of one format: what the builders of problems draw from."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import from_float64
from ...dtypes import Format
from ...gates import RECURRENT
from ...norms import NORMS
from ...problem import Problem
from ...variants import variant_of
from ..model import Capabilities
from .tied import tied

__all__ = ["Draw", "Float"]

Float = NDArray[np.float64]
OPTIONS = frozenset({"window", "softcap", "sink", "bias", "allowed", "weight", "scale", "lengths_q", "lengths_k"})
OPTIONS |= {"offset", "alignment", "alibi_slopes", *NORMS}
"""Arguments of a call that are features of the same name."""
CORNERS = ("bottom_right", "top_left")


class Draw:
    """Random tensors of one format; with a kernel's capabilities, calls without the options that it does not have."""

    def __init__(self, form: Format, rng: np.random.Generator, variant: str, able: Capabilities | None = None) -> None:
        self.form, self.rng, self.variant, self.able = form, rng, variant, able

    def has(self, feature: str) -> bool:
        """Tell whether a call may have a feature."""
        return self.able is None or feature in self.able.features

    def width(self, d: int) -> int:
        """Return a width of queries and keys that a call may have: this one, or the narrowest that there is."""
        widths = frozenset() if self.able is None else self.able.head_dims
        return d if not widths or d in widths else min(widths)

    def one_of(self, name: str, *others: str, of: str) -> str:
        """Return the first of several names whose feature, `of` and the name, a call may have; else the first."""
        return next((n for n in (name, *others) if self.has(f"{of}_{n.lower()}")), name)

    def fitted(self, more: dict[str, Any]) -> dict[str, Any]:
        """Return options without those that a call may not have."""
        if self.able is None:
            return more
        found = {n: x for n, x in more.items() if n not in OPTIONS or x is None or self.has(n)}
        corner = found.get("causal")
        if corner is not None and not self.has(f"causal_{corner}"):
            found["causal"] = next((c for c in CORNERS if self.has(f"causal_{c}")), None)
        for c in CORNERS:
            if f"causal_{c}" in self.able.always:
                found["causal"] = c
        if found.get("causal") is None and found.get("window") is None:
            found.pop("offset", None)
        if not any(found.get(n) is not None for n in NORMS):
            found.pop("norm_eps", None)
        if more.get("dropout_mask") is not None:
            feature = "dropout_bits" if more["dropout_mask"].dtype == np.uint8 else "dropout_mask"
            found |= {} if self.has(feature) else {"dropout_mask": None}
        layout = found.get("philox_layout")
        if layout is not None and not self.has(f"philox_{layout}"):
            found = {n: x for n, x in found.items() if not n.startswith("philox")}
        if found.get("dropout_mask") is None and found.get("philox_layout") is None:
            found.pop("dropout_p", None)
        placed = found.get("rotary") is not None or found.get("alibi_slopes") is not None
        if not placed or not self.has("positions"):
            found = {n: x for n, x in found.items() if n not in ("positions_q", "positions_k")}
        return found

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
        mask[..., :1] = True
        return mask

    def options(self, h: int, n_q: int, n_k: int, d: int, d_v: int | None = None, sequences: int = 1) -> dict[str, Any]:
        """Draw every option of Problem that an operator may have, a state for each of so many packed sequences."""
        return {
            "causal": "bottom_right",
            "window": (n_k // 2, 5),
            "softcap": 5.0,
            "sink": self.normal(h),
            "bias": self.normal(1, h, n_q, n_k),
            "allowed": self.mask(1, 1, n_q, n_k),
            "weight": np.exp(self.normal(1, 1, 1, n_k)),
            **self.recurrent(1, h, n_k, d, d if d_v is None else d_v, sequences=sequences),
        }

    def recurrent(
        self,
        b: int,
        h: int,
        n: int,
        d: int,
        d_v: int,
        channels: bool = False,
        strong: bool = False,
        sequences: int | None = None,
    ) -> dict[str, Float]:
        """Draw a state and gates; beta is so small that keys of normal numbers, of length sqrt(d), make nothing grow.

        There is a state for each batch item, or each of so many packed sequences, of an operator with momentum with
        that below it. With `channels` alpha is drawn for
        each channel; if `strong`, some tokens forget nearly all, and some all: an alpha of exactly 0.
        """
        gates = np.random.default_rng((b, h, n, d))  # another, so that other operators' numbers stay what they are
        fade = gates.random((b, h, n, d if channels else 1))
        parts = 2 if "eta" in variant_of(self.variant).uses else 1
        little = np.where(fade < 1 / 32, 0.0, fade * 2.0**-16)
        return {
            "state": self.normal(b if sequences is None else sequences, h, d * parts, d_v),
            "alpha": np.where(fade < 1 / 8, little, 1 - fade**3 / 2) if strong else 1 - fade**3 / 2,
            "beta": gates.random((b, h, n, 1)) / d,
            "eta": 1 - gates.random((b, h, n, 1)) ** 2,
        }

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
        codes: bool = False,
        ties: str | None = None,
        **more: Any,
    ) -> Problem:
        """Build a problem of normal tensors, or of those given; with `codes` queries and keys are -1, 0 and 1.

        With `ties`, one of ``TIES``, queries and keys are those whose scores tie.

        A state or a gate that is True is drawn, and an alpha of "channels", "strong" or both. A beta that is "large"
        goes up to 2, where a step turns what the state says of its key round; keys then have length 1, so that nothing
        grows.
        """
        more, d = self.fitted(more), self.width(d)
        large = isinstance(more.get("beta"), str)
        h_kv = h if h_kv is None or not self.has("grouped_heads") else h_kv
        d_v = d if d_v is None or not self.has("d_v_differs") else self.width(d_v)
        if asked := [n for n in RECURRENT if isinstance(more.get(n), bool | str)]:
            kind = more["alpha"] if isinstance(more.get("alpha"), str) else ""
            many = None if more.get("cu_seqlens_q") is None else len(more["cu_seqlens_q"]) - 1
            found = self.recurrent(b, h, n_k, d, d_v, "channels" in kind, "strong" in kind, many)
            found["beta"] = found["beta"] * (2 * d if large else 1)
            more |= {n: found[n] if more[n] else None for n in asked}
        if ties is not None:
            q, k = tied(self.rng, self.form, ties, (b, h, n_q, d), (b, h_kv, n_k, d))
        q = self.normal(b, h, n_q, d) if q is None else q
        k = self.normal(b, h_kv, n_k, d) if k is None else k
        k = k / np.sqrt((k * k).sum(-1, keepdims=True)) if large else k
        q, k = (np.sign(x) * (np.abs(x) > 1 / 16) for x in (q, k)) if codes else (q, k)
        v = self.normal(b, h_kv, n_k, d_v) if v is None else v
        wide = np.float64 if self.form.precision == 53 else np.float32
        for name in ("bias", "sink", "weight", *RECURRENT):
            if more.get(name) is not None:
                more[name] = np.asarray(more[name], wide)
        if more.get("weight") is not None:
            more["weight"] = from_float64(self.form.round_array(more["weight"].astype(np.float64)), self.form.name)
        if more.get("bias") is not None and self.form.infinities:  # a format without -inf has float32 biases
            more["bias"] = from_float64(self.form.round_array(more["bias"].astype(np.float64)), self.form.name)
        return Problem(self.tensor(q), self.tensor(k), self.tensor(v), variant=self.variant, **more)
