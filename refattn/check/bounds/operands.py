r"""What query, key and value lose before they are multiplied: narrower types, in parts or scaled (``Model.operands``).

An element x that is multiplied by its tensor's or block's scale 1/s, rounded to the operands' type and multiplied back
is off by at most ``(u_o + 2 u) |x| + s eta / 2``, eta the type's smallest subnormal number: two roundings by the
scale, one to the type, one below its normal numbers. In three passes x is the sum of two numbers of the type and a
rest; the products of both rests are left out: ``3 u_o^2 |x y|`` a product, half of it for each factor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import to_float64
from ...exact.heads import Head
from ..model import SCALED, C, Model, inside_type, relative
from .smoothed import mean_size

__all__ = ["Operands", "lost", "of_values", "scale_of", "variance"]

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Operands:
    """By operand of one head, of its shape: the largest error of each element and its variance, 0 where none is."""

    q: Float
    k: Float
    v: Float
    var_q: Float
    var_k: Float
    var_v: Float

    @classmethod
    def of(cls, one: Head, model: Model) -> Operands:
        """Return what one head's operands lose."""
        p = one.problem
        pairs = ((one.q, p.query), (one.k, p.key), (one.v, p.value))
        models = (model, model, of_values(model))
        found = [of(x, t, m) for of in (lost, variance) for (x, t), m in zip(pairs, models, strict=True)]
        if model.smoothed:  # the mean is rounded, and what is left of a key
            more = inside_type(model.accumulator).unit_roundoff * (np.abs(one.k) + 2 * mean_size(one))
            found[1], found[4] = found[1] + more, found[4] + C * more**2
        u = inside_type(model.accumulator).unit_roundoff
        if model.smoothed_queries:  # the mean is rounded, what is left of a query, and the mean's product with keys
            whole = np.nan_to_num(to_float64(p.query)[one.batch, one.head, one.rows], posinf=0, neginf=0)
            more = u * np.abs(one.q) + (one.q.shape[1] + 6) * u * np.abs(whole - one.q)
            found[0], found[3] = found[0] + more, found[3] + C * more**2
        for i, name in enumerate(("query_scale", "key_scale", "value_scale")):
            if getattr(p, name) is not None:  # the element times its scale, or their product times it, is rounded
                size = np.abs(pairs[i][0])
                found[i], found[i + 3] = found[i] + u * size, found[i + 3] + C * (u * size) ** 2
        return cls(*found)


def of_values(model: Model) -> Model:
    """Return a model whose operands' type is that of its values."""
    if not model.values:
        return model
    if model.values == "input":
        return replace(model, operands="", scales="", passes=1, values="", smoothed=False, smoothed_queries=False)
    scales = model.scales if model.values in SCALED else ""
    return replace(
        model, operands=model.values, scales=scales, passes=1, values="", smoothed=False, smoothed_queries=False
    )


def lost(x: Float, tensor: Any, model: Model) -> Float:
    """Return the largest error of each element of an operand.

    Parameters
    ----------
    x : (n, d) float64 array
        One head of it.
    tensor : array
        All of it: what its scale is made from where there is one scale.
    model : Model
        The kernel's rounding model.
    """
    size = np.abs(x)
    if not model.operands:
        return np.zeros_like(size)
    form, inside = inside_type(model.operands), inside_type(model.accumulator)
    if model.passes == 3:
        return np.asarray(1.5 * form.unit_roundoff**2 * size + 0.5 * form.smallest_subnormal)
    s = scale_of(size, tensor, model)
    known = (model.times * relative(form) + (2 * inside.unit_roundoff if model.scales else 0.0)) * size
    known = known + 0.5 * model.times * form.smallest_subnormal * s
    return np.where(size > form.largest * s * (1 + inside.unit_roundoff), np.inf, known)


def variance(x: Float, tensor: Any, model: Model) -> Float:
    """Return the variance of the error of each element of an operand: that of its place among the type's numbers."""
    if not model.operands:
        return np.zeros_like(x)
    form = inside_type(model.operands)
    if model.passes == 3:  # the rests' product, and their roundings
        return np.asarray(C * (1 + C / 2) * form.unit_roundoff**4 * x * x + form.smallest_subnormal**2 / 12)
    s = np.maximum(scale_of(np.abs(x), tensor, model), np.finfo(np.float64).tiny)
    return np.asarray(model.times * (form.ulp_array(x / s) * s) ** 2 / 12)


def scale_of(size: Float, tensor: Any, model: Model) -> Any:
    """Return what stands for 1 in an operand: a number, or one for each row."""
    largest = inside_type(model.operands).largest
    if not model.scales:
        return 1.0
    if model.scales == "tensor":
        whole = np.abs(to_float64(tensor))
        return float(whole[np.isfinite(whole)].max(initial=0.0)) / largest
    starts = np.arange(0, len(size), model.block)
    top = np.maximum.reduceat(size.max(1, initial=0.0), starts) if len(size) else size.max(1, initial=0.0)
    return np.asarray(top[np.arange(len(size)) // model.block, None] / largest)
