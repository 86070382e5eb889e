"""PyTorch modules that are trained in the clear and computed on ciphertexts: block, encoder, classifier; weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import InvalidInput, UnsupportedProblem
from ..validation import shown
from .arguments import MOST_SIZE, is_count
from .modules import PolynomialActivation, PolynomialRMSNorm, PowerSoftmaxAttention
from .weights import EncoderWeights, Feedforward, Weights

__all__ = ["Block", "Classifier", "Encoder", "weights_of"]


def _alone(module: nn.Module, masks: Any, more: Any) -> None:
    """Refuse what a layer that was converted may be called with, beside tokens."""
    given = ["a mask" for x in masks if x is not None] + [
        n for n, x in more.items() if x is not None and x is not False
    ]
    if given:
        raise UnsupportedProblem(
            f"he: a converted {type(module).__name__} takes tokens alone, got {given[0]}; convert(..., causal=True) "
            "hides later tokens"
        )


class Block(nn.Module):  # type: ignore[misc]
    """y = x + attention(norm(x)); y + down(activation(up(norm(y)))): a transformer's block, computable on ciphertexts.

    Parameters
    ----------
    attention : PowerSoftmaxAttention
        The attention.
    norm : PolynomialRMSNorm
        The normalisation before the feed-forward part. The first one, of the input, is exact: the client computes it.
    hidden : int
        Features between.
    activation : PolynomialActivation
        What stands there.
    first : PolynomialRMSNorm, optional
        The normalisation of the input where the client does not compute it: in an Encoder's later blocks.
    centred : bool
        Whether the mean over features is taken from the input, by the client where it is encrypted.
    """

    def __init__(
        self, attention: PowerSoftmaxAttention, norm: PolynomialRMSNorm, hidden: int,
        activation: PolynomialActivation, first: PolynomialRMSNorm | None = None, centred: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        d = attention.query.in_features
        self.first, self.centred = first, centred
        self.attention, self.norm, self.activation = attention, norm, activation
        self.first_gain = nn.Parameter(torch.ones(d))
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x: Any, *masks: Any, **more: Any) -> Any:
        """Return (batch, n, d) of (batch, n, d)."""
        _alone(self, masks, more)
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        if self.first is None:
            root = (x.square().mean(-1, keepdim=True) + self.norm.eps).rsqrt()
            y = x + self.attention(x * root * self.first_gain)
        else:
            y = x + self.attention(self.first(x) * self.first_gain)
        return y + self.down(self.activation(self.up(self.norm(y))))


class Encoder(nn.Module):  # type: ignore[misc]
    """Blocks one after another, and scores of the mean over tokens where there is a head.

    Parameters
    ----------
    blocks : sequence of Block
        The first one's input is normalised by the client, exactly; the others have a ``first``.
    head : nn.Linear, optional
        From features to scores.
    """

    def __init__(self, blocks: Sequence[Block], head: nn.Linear | None = None) -> None:
        super().__init__()
        for k, block in enumerate(blocks):
            if (block.first is None) != (k == 0):
                raise InvalidInput(
                    f"blocks: number {k} has {'no' if k else 'a'} first normalisation; the client computes that of the "
                    "first block, the server those of the others (first=)"
                )
        if head is not None and not isinstance(head, nn.Linear):
            raise InvalidInput(f"head: got {type(head).__name__}, expected nn.Linear or None")
        self.blocks, self.head = nn.ModuleList(blocks), head

    def forward(self, x: Any, *masks: Any, **more: Any) -> Any:
        """Return (batch, classes), or (batch, n, d) without a head, of (batch, n, d)."""
        _alone(self, masks, more)
        for block in self.blocks:
            x = block(x)
        return x if self.head is None else self.head(x.mean(1))


class Classifier(nn.Module):  # type: ignore[misc]
    """Tokens to scores: an embedding, positions, attention, the mean over tokens, a linear map.

    Parameters
    ----------
    n, features, classes : int
        Tokens, features of each, classes.
    attention : module
        PowerSoftmaxAttention; or another one that maps (batch, n, d), as a control.
    d : int
        Features of an embedded token.
    """

    def __init__(self, n: int, features: int, classes: int, attention: nn.Module, d: int) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(features, d), attention, nn.Linear(d, classes)
        self.positions = nn.Parameter(torch.randn(n, d) * 0.5)

    def forward(self, x: Any) -> Any:
        """Return (batch, classes) of (batch, n, features)."""
        return self.head(self.attention(self.embed(x) + self.positions).mean(1))


def weights_of(module: Block | Classifier | Encoder, n: int | None = None) -> Any:
    """Return a module's weights as the server takes them: linear maps after one another are multiplied out.

    Parameters
    ----------
    module : Block, Classifier or Encoder
        Trained; its attention is a PowerSoftmaxAttention.
    n : int, optional
        Tokens; a Classifier knows it.

    Returns
    -------
    Weights, or EncoderWeights of an Encoder

    Raises
    ------
    UnsupportedProblem
        Another module, or other parts.
    """
    if isinstance(module, Encoder):
        head = module.head
        scores = (None, None) if head is None else (_array(head.weight).T, _bias(head))
        return EncoderWeights(tuple(weights_of(block, n) for block in module.blocks), *scores)
    return _layer_of(module, n)


def _layer_of(module: Block | Classifier, n: int | None) -> Weights:
    attention = getattr(module, "attention", None)
    if not isinstance(module, Block | Classifier) or not isinstance(attention, PowerSoftmaxAttention):
        raise UnsupportedProblem(
            f"he: got {type(module).__name__} with {type(attention).__name__}, expected Block or Classifier with "
            "PowerSoftmaxAttention"
        )
    _annealed(attention)
    heads, (d, _) = attention.heads, attention.query.weight.shape
    if isinstance(module, Classifier):
        into, added = _array(module.embed.weight).T, _array(module.embed.bias) + _array(module.positions)
        n = len(added)
    else:
        if n is None or not is_count(n, 1, MOST_SIZE):
            raise InvalidInput(f"n: got {shown(n)}, expected a number of tokens from 1 to {MOST_SIZE}")
        gain, added = _array(module.first_gain), np.zeros((n, d))
        if module.first is not None:
            gain = gain * _array(module.first.gain)
            added = added + (0 if module.first.bias is None else _array(module.first.bias) * _array(module.first_gain))
        into = np.diag(gain)
    maps, biases = [], []
    for linear in (attention.query, attention.key, attention.value):
        weight, bias = _array(linear.weight).T, _array(linear.bias)
        maps.append((into @ weight).reshape(-1, heads, d // heads).transpose(1, 0, 2))
        biases.append((added @ weight + bias).reshape(n, heads, -1).transpose(1, 0, 2))
    out, out_bias = _array(attention.out.weight).T.reshape(heads, d // heads, d), _array(attention.out.bias)
    then: Any
    if isinstance(module, Classifier):
        head = _array(module.head.weight).T
        maps[2], biases[2] = maps[2] @ (out @ head), biases[2] @ (out @ head)
        then = out_bias @ head + _bias(module.head)
    else:
        if module.norm.centred or (module.first is not None and module.first.centred):
            raise UnsupportedProblem("he: a Block takes PolynomialRMSNorm, got PolynomialLayerNorm")
        then = Feedforward(
            out, out_bias, module.norm.stand_in, module.norm.eps,
            _array(module.norm.gain)[:, None] * _array(module.up.weight).T, _up_bias(module),
            module.activation.stand_in, _array(module.down.weight).T, _array(module.down.bias),
        )  # fmt: skip
    scale = 1 / math.sqrt(d // heads)
    first, stand_in = module.norm.eps if isinstance(module, Block) else None, None
    if isinstance(module, Block) and module.first is not None:
        first, stand_in = module.first.eps, module.first.stand_in
    return Weights(
        maps[0],
        maps[1],
        maps[2],
        biases[0],
        biases[1],
        biases[2],
        attention.p,
        attention.epsilon,
        scale,
        attention.denominator,
        attention.causal,
        then,
        first,
        stand_in,
        isinstance(module, Block) and module.first is None and module.centred,
    )


def _annealed(attention: PowerSoftmaxAttention) -> None:
    if attention.share != 1:
        raise InvalidInput(
            f"module: its attention is softmax still, by a share of {1 - attention.share:.3g}; end with "
            "he.torch.anneal(model, 1.0) and train on"
        )


def _up_bias(module: Block) -> Any:
    bias = _array(module.up.bias)
    return bias if module.norm.bias is None else bias + _array(module.up.weight) @ _array(module.norm.bias)


def _bias(linear: Any) -> Any:
    return np.zeros(linear.out_features) if linear.bias is None else _array(linear.bias)


def _array(x: Any) -> Any:
    return x.detach().cpu().double().numpy()
