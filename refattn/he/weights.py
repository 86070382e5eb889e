"""A transformer layer's weights, as the server that computes it on ciphertexts takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from .arguments import POWERS
from .polynomials import Activation, Polynomial

__all__ = ["Feedforward", "Weights", "check"]

Float = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Feedforward:
    """What follows attention: a residual, a root-mean-square normalisation, two linear maps, a residual.

    Attributes
    ----------
    out, out_bias : (heads, d_v, d) and (d,) arrays
        The projection of attention's output.
    norm : Polynomial
        Near 1/sqrt(x) of the mean square, norm_epsilon added.
    norm_epsilon : float
        What is added.
    up, up_bias : (d, hidden) and (hidden,) arrays
        The first map, the normalisation's gains in it.
    activation : Activation
        The polynomial between.
    down, down_bias : (hidden, d) and (d,) arrays
        The second map.
    """

    out: Float
    out_bias: Float
    norm: Polynomial
    norm_epsilon: float
    up: Float
    up_bias: Float
    activation: Activation
    down: Float
    down_bias: Float


@dataclass(frozen=True, eq=False)
class Weights:
    """A layer: power-softmax attention of projections, then a feed-forward part, or the mean over all tokens.

    Attributes
    ----------
    query, key, value : (heads, d, d_k), (heads, d, d_k) and (heads, d, d_v) arrays
        The projections.
    query_bias, key_bias, value_bias : (heads, n, d_k), (heads, n, d_k), (heads, n, d_v) arrays
        What is added to them, by token.
    p, epsilon, scale : int, float, float
        As in :func:`refattn.power_attention`.
    denominator : (float, float)
        The range of denominators, epsilon included, of all tokens and heads. It is not checked on encrypted inputs.
    causal : bool
        Whether a token sees itself and those before it only.
    then : Feedforward or (d_v,) array
        The feed-forward part; or what is added to the mean over tokens of the sum over heads: the classes' scores.
    first_epsilon : float, optional
        The client divides each token by the root of its mean square and this, before the projections.
    """

    query: Float
    key: Float
    value: Float
    query_bias: Float
    key_bias: Float
    value_bias: Float
    p: int
    epsilon: float
    scale: float
    denominator: tuple[float, float]
    causal: bool
    then: Feedforward | Float
    first_epsilon: float | None = None


def check(w: Weights) -> None:
    """Refuse weights whose shapes or ranges do not fit together."""
    axes: dict[str, tuple[Any, int]] = {n: (getattr(w, n), 3) for n in ("query", "value", "query_bias")}
    axes |= {"up": (w.then.up, 2)} if isinstance(w.then, Feedforward) else {"then": (w.then, 1)}
    for name, (x, wanted) in axes.items():
        if np.ndim(x) != wanted:
            raise InvalidInput(f"{name}: got {np.ndim(x)} axes, expected {wanted}")
    heads, d, d_k = w.query.shape
    n, d_v = w.query_bias.shape[1], w.value.shape[2]
    shapes: dict[str, tuple[Float, tuple[int, ...]]] = {
        "key": (w.key, (heads, d, d_k)), "value": (w.value, (heads, d, d_v)),
        "query_bias": (w.query_bias, (heads, n, d_k)), "key_bias": (w.key_bias, (heads, n, d_k)),
        "value_bias": (w.value_bias, (heads, n, d_v)),
    }  # fmt: skip
    if isinstance(w.then, Feedforward):
        t, hidden = w.then, w.then.up.shape[1]
        shapes |= {
            "out": (t.out, (heads, d_v, d)), "out_bias": (t.out_bias, (d,)), "up": (t.up, (d, hidden)),
            "up_bias": (t.up_bias, (hidden,)), "down": (t.down, (hidden, d)), "down_bias": (t.down_bias, (d,)),
        }  # fmt: skip
    else:
        shapes["then"] = (w.then, (d_v,))
    for name, (x, shape) in shapes.items():
        if x.shape != shape:
            raise InvalidInput(f"{name}: got shape {x.shape}, expected {shape}")
    if w.p not in POWERS:
        raise InvalidInput(f"p: got {w.p!r}, expected one of {', '.join(map(str, POWERS))}")
    if not 0 <= w.epsilon <= w.denominator[0]:
        raise InvalidInput(f"epsilon: got {w.epsilon}, expected from 0 to the least denominator {w.denominator[0]}")
