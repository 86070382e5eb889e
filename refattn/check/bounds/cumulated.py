"""What a recurrence's decays lose where a kernel multiplies them up in chunks and takes ratios of the products.

With c_t the product of alpha from a chunk's start up to token t, such a kernel has the decay from token s to token t as
c_t / c_s, or as exp(G_t - G_s) with G = log c. Its gradient by log alpha_r is the sum of the gradients by log c_t from
t = r on. That by the pair (t, s) comes in twice, from t and with the other sign from s; where both are behind r the two
cancel but for their roundings. So the gradient by the first alpha, which without a state changes nothing, is not 0 but
what these roundings leave.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import format_of
from ...exact.heads import Head
from ...variants import variant_of
from ..model import Model

__all__ = ["decays_met", "ratios_lost", "steps_lost"]

Float = NDArray[np.float64]


def _each(one: Head, model: Model) -> Float:
    """Return what each alpha loses on its way into c, relative to it: (2 + e + (C + 2) |log alpha|) u.

    A logarithm and its place in a sum of C lose (C + 2) u of it, an exponential e u, a product or a quotient u each:
    the sum is what either way loses at most, counted at every alpha.
    """
    alpha = one.gates["alpha"]
    logs = np.abs(np.log(np.where(alpha > 0, alpha, 1.0)))
    return np.asarray(format_of(model.accumulator).unit_roundoff * (2 + model.exp_ulps + (model.cumulated + 2) * logs))


def ratios_lost(one: Head, model: Model) -> Float:
    """Return what a ratio c_t / c_s may be off by, relative to it: what both lost since their chunk's start."""
    each, size = _each(one, model), model.cumulated
    return 2 * np.concatenate([each[:0], *(each[i : i + size].cumsum(0) for i in range(0, len(each), size))])


def steps_lost(one: Head, model: Model) -> Float:
    """Return the error that the step to each token counts for alpha, (n_k, 1 or d_k).

    Where an operator has no form by chunks its bound goes token by token: the step to t counts all that ratios from t
    back are off by, so that every s before t has its share. A form by chunks has each ratio's own error
    (:func:`ratios_lost`): in a chunk of C tokens C / 2 times less.
    """
    return ratios_lost(one, model) * one.gates["alpha"]


def decays_met(one: Head, model: Model, dout: Float, of_state: Float | None = None) -> Any:
    """Return what roundings leave of terms that cancel in the gradient by alpha, (n_k, 1 or d_k); 0 without ratios.

    A term is a product over d_v numbers times one over d_k: (d_v + d_k + 4) u of the sizes of its products. Both of its
    places take the same c, u and gradients; but each may multiply anew, make the exponential or the quotient anew,
    (e + 2) u, store with the weights, and add to the others of C tokens and then of the tokens behind, 2 C u at most.
    """
    sizes = variant_of(one.problem.variant).cumulated
    if not model.cumulated or sizes is None:
        return 0.0
    alpha, u = one.gates["alpha"], format_of(model.accumulator).unit_roundoff
    products, sums = sizes(one, dout, model.cumulated, of_state)
    adds = 2 * min(model.cumulated, len(alpha)) + model.exp_ulps + 2
    met = (dout.shape[1] + one.k.shape[1] + 4) * u * products + (adds * u + model.loss(model.weights)) * sums
    return np.divide(met, alpha, out=np.zeros_like(met), where=alpha > 0)
