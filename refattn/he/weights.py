"""A transformer layer's weights, as the server that computes it on ciphertexts takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from .arguments import POWERS
from .polynomials import Activation, Polynomial

__all__ = ["EncoderWeights", "Feedforward", "Weights", "check", "check_encoder"]

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
        Each token is divided by the root of its mean square and this, before the projections: by the client, exactly.
    first : Polynomial, optional
        Near 1/sqrt(x) of the mean square, first_epsilon added: the server divides, in an encoder's later blocks.
    centred : bool
        Whether the client first takes each token's mean over features from it.
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
    first: Polynomial | None = None
    centred: bool = False


@dataclass(frozen=True, eq=False)
class EncoderWeights:
    """Blocks one after another, and perhaps a linear map of the mean over tokens.

    Attributes
    ----------
    blocks : tuple of Weights
        Each with a feed-forward part, of the same n, d and heads. The client normalises the first one's input, if it
        has a ``first_epsilon``; the others have polynomials (``first``) for it.
    head, head_bias : (d, classes) and (classes,) arrays, optional
        The scores; without them the result is (n, d).
    """

    blocks: tuple[Weights, ...]
    head: Float | None = None
    head_bias: Float | None = None


def check_encoder(w: EncoderWeights) -> None:
    """Refuse blocks that do not fit together."""
    if not w.blocks:
        raise InvalidInput("blocks: got none, expected at least one")
    sizes = [x.query.shape + x.value.shape[2:] + x.query_bias.shape[1:2] for x in w.blocks]
    for i, block in enumerate(w.blocks):
        check(block)
        if not isinstance(block.then, Feedforward):
            raise InvalidInput(f"blocks: number {i} has no feed-forward part")
        if sizes[i] != sizes[0]:
            raise InvalidInput(f"blocks: number {i} has sizes {sizes[i]}, the first {sizes[0]}; they must be alike")
        if i and (block.first is None or block.first_epsilon is None):
            raise InvalidInput(f"blocks: number {i} has no polynomial for its first normalisation (first)")
    if w.blocks[0].first is not None:
        raise InvalidInput("blocks: the first one's input is the client's, who normalises exactly; got a polynomial")
    d = sizes[0][1]
    if (w.head is None) != (w.head_bias is None):
        raise InvalidInput("head: got one of head and head_bias, expected both or neither")
    if w.head is not None and w.head_bias is not None:
        if w.head.ndim != 2 or w.head.shape[0] != d:
            raise InvalidInput(f"head: got shape {w.head.shape}, expected ({d}, classes)")
        if w.head_bias.shape != w.head.shape[1:]:
            raise InvalidInput(f"head_bias: got shape {w.head_bias.shape}, expected {w.head.shape[1:]}")
        if not np.isfinite(w.head).all() or not np.isfinite(w.head_bias).all():
            raise InvalidInput("head: has numbers that are not finite; training left them there")


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
        "query": (w.query, (heads, d, d_k)), "key": (w.key, (heads, d, d_k)), "value": (w.value, (heads, d, d_v)),
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
        if not np.isfinite(x).all():
            raise InvalidInput(f"{name}: has numbers that are not finite; training left them there")
    if w.p not in POWERS:
        raise InvalidInput(f"p: got {w.p!r}, expected one of {', '.join(map(str, POWERS))}")
    if not 0 <= w.epsilon <= w.denominator[0]:
        raise InvalidInput(f"epsilon: got {w.epsilon}, expected from 0 to the least denominator {w.denominator[0]}")
