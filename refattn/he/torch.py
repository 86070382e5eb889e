"""PyTorch modules that are trained in the clear and computed on ciphertexts: attention, stand-ins, block, classifier.

Every module with a range (denominators, mean squares, inputs of an activation) computes the exact function while it is
trained and notes how far its inputs leave the range, as a penalty to be added to the loss; ``polynomial(module)``
switches all of them to the polynomials that the encrypted layer uses.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import InvalidInput, UnsupportedProblem
from .arithmetic import Numbers
from .inverse import choose
from .polynomials import Polynomial, activation, inverse_sqrt
from .weights import Feedforward, Weights

__all__ = [
    "Block", "Classifier", "PolynomialActivation", "PolynomialLayerNorm", "PolynomialRMSNorm", "PowerSoftmaxAttention",
    "polynomial", "range_penalty", "weights_of",
]  # fmt: skip


class _Ranged(nn.Module):  # type: ignore[misc]
    """Something with a range: exact, or by its polynomial; the penalty of the last forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.polynomial = False
        self.penalty: Any = 0.0
        self.seen: tuple[float, float] = (math.inf, -math.inf)  # the least and largest input so far

    def note(self, x: Any, low: float, high: float) -> None:
        """Keep how far x leaves [low, high], by squares over the range's, and the range that was seen."""
        outside = torch.relu(low - x) + torch.relu(x - high)
        self.penalty = (outside / (high - low)).square().mean()
        least, largest = (float(y) for y in torch.aminmax(x.detach()))
        self.seen = (min(self.seen[0], least), max(self.seen[1], largest))


def polynomial(module: nn.Module, on: bool = True) -> nn.Module:
    """Switch all parts of a module to their polynomials, or back; forget the ranges that were seen."""
    for part in module.modules():
        if isinstance(part, _Ranged):
            part.polynomial, part.seen = on, (math.inf, -math.inf)
    return module


def range_penalty(module: nn.Module) -> Any:
    """Return the sum of all parts' penalties of the last forward pass, to be added to a loss."""
    return sum((p.penalty for p in module.modules() if isinstance(p, _Ranged)), torch.zeros(()))


class PowerSoftmaxAttention(_Ranged):
    """Self-attention by an even power in place of the exponential, with projections.

    Parameters
    ----------
    d, heads : int
        Features of a token, and heads, which divide d.
    p : int
        The even power.
    epsilon : float
        Added to every denominator.
    denominator : (low, high)
        The range of denominators, epsilon included, that the polynomial for 1/D is for.
    tolerance : float
        The largest relative error of that polynomial.
    causal : bool
        Whether a token sees itself and those before it only.
    """

    def __init__(
        self, d: int, heads: int, p: int = 2, *, epsilon: float = 1.0, denominator: tuple[float, float] = (1.0, 50.0),
        tolerance: float = 1e-2, causal: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if d % heads:
            raise InvalidInput(f"heads: got {heads}, expected a divisor of d = {d}")
        self.heads, self.p, self.epsilon, self.causal = heads, p, float(epsilon), causal
        self.set_range(denominator, tolerance)
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))

    def set_range(self, denominator: tuple[float, float], tolerance: float) -> None:
        """Choose the polynomial for 1/D for another range, e.g. the one that was ``seen``."""
        if not 0 < self.epsilon <= denominator[0]:
            raise InvalidInput(f"epsilon: got {self.epsilon}, expected above 0 and at most {denominator[0]}")
        self.denominator, self.tolerance = denominator, tolerance
        found = choose(*denominator, tolerance)
        if not found:
            raise UnsupportedProblem(f"he: no polynomial is within {tolerance:.3g} of 1/D on {denominator}; narrow it")
        self.inverse = found[0]

    def forward(self, x: Any) -> Any:
        """Return (batch, n, d) of (batch, n, d)."""
        q, k, v = (self._split(f(x)) for f in (self.query, self.key, self.value))
        s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.causal:
            s = s * torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
        d = s.pow(self.p).sum(-1, keepdim=True) + self.epsilon
        self.note(d, *self.denominator)
        if self.polynomial:
            factor = self.inverse.input_factor
            w = s.pow(self.p) * factor
            scaled = w.sum(-1, keepdim=True)
            o = self.inverse.apply(Numbers(), w @ v, scaled, self.epsilon) * self.inverse.output_factor
        else:  # divided by the row's largest, so that nothing overflows
            c = s.detach().abs().amax(-1, keepdim=True) + 1e-6
            w = (s / c).pow(self.p)
            o = w @ v / (w.sum(-1, keepdim=True) + self.epsilon / c.pow(self.p))
        return self.out(o.transpose(1, 2).flatten(2))

    def _split(self, x: Any) -> Any:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PolynomialActivation(_Ranged):
    """GELU (by erf) or SiLU, and the polynomial near it on [-most, most]; see ``refattn.he.polynomials``."""

    def __init__(self, name: str = "gelu", most: float = 4.0, tolerance: float = 2e-2) -> None:
        super().__init__()
        self.stand_in = activation(name, most, tolerance)

    def forward(self, u: Any) -> Any:
        """Return the activation of every element."""
        most = self.stand_in.most
        self.note(u, -most, most)
        if not self.polynomial:
            return getattr(nn.functional, self.stand_in.name)(u)
        return u / 2 + _value(self.stand_in.even, (u / most).square())


class PolynomialRMSNorm(_Ranged):
    """x / sqrt(mean(x**2) + eps) · gain, and the polynomial near 1/sqrt for mean squares in a range.

    Parameters
    ----------
    d : int
        Features of a token.
    low, high : float
        The range of mean squares, eps included.
    tolerance : float
        The largest relative error of the polynomial.
    eps : float
        Added to the mean square.
    """

    centred = False

    def __init__(
        self, d: int, low: float = 0.25, high: float = 4.0, tolerance: float = 2e-2, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.stand_in, self.eps = inverse_sqrt(low, high, tolerance), eps
        self.gain = nn.Parameter(torch.ones(d))

    def forward(self, x: Any) -> Any:
        """Return (..., d) of (..., d)."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        square = x.square().mean(-1, keepdim=True) + self.eps
        self.note(square, self.stand_in.low, self.stand_in.high)
        return x * self.gain * (_value(self.stand_in, square) if self.polynomial else square.rsqrt())


class PolynomialLayerNorm(PolynomialRMSNorm):
    """Layer normalisation, without a bias: the mean over features is taken away first."""

    centred = True


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
    """

    def __init__(
        self, attention: PowerSoftmaxAttention, norm: PolynomialRMSNorm, hidden: int, activation: PolynomialActivation
    ) -> None:
        super().__init__()
        d = attention.query.in_features
        self.attention, self.norm, self.activation = attention, norm, activation
        self.first_gain = nn.Parameter(torch.ones(d))
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x: Any) -> Any:
        """Return (batch, n, d) of (batch, n, d)."""
        root = (x.square().mean(-1, keepdim=True) + self.norm.eps).rsqrt()
        y = x + self.attention(x * root * self.first_gain)
        return y + self.down(self.activation(self.up(self.norm(y))))


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


def weights_of(module: Block | Classifier, n: int | None = None) -> Weights:
    """Return a module's weights as the server takes them: linear maps after one another are multiplied out.

    Parameters
    ----------
    module : Block or Classifier
        Trained; its attention is a PowerSoftmaxAttention.
    n : int, optional
        Tokens; a Classifier knows it.

    Raises
    ------
    UnsupportedProblem
        Another module, or other parts.
    """
    attention = getattr(module, "attention", None)
    if not isinstance(module, Block | Classifier) or not isinstance(attention, PowerSoftmaxAttention):
        raise UnsupportedProblem(
            f"he: got {type(module).__name__} with {type(attention).__name__}, expected Block or Classifier with "
            "PowerSoftmaxAttention"
        )
    heads, (d, _) = attention.heads, attention.query.weight.shape
    if isinstance(module, Classifier):
        into, added = _array(module.embed.weight).T, _array(module.embed.bias) + _array(module.positions)
        n = len(added)
    else:
        if n is None:
            raise InvalidInput("n: a Block's tokens must be told")
        into, added = np.diag(_array(module.first_gain)), np.zeros((n, d))
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
        then = out_bias @ head + _array(module.head.bias)
    else:
        if module.norm.centred:
            raise UnsupportedProblem("he: a Block takes PolynomialRMSNorm, got PolynomialLayerNorm")
        then = Feedforward(
            out, out_bias, module.norm.stand_in, module.norm.eps,
            _array(module.norm.gain)[:, None] * _array(module.up.weight).T, _array(module.up.bias),
            module.activation.stand_in, _array(module.down.weight).T, _array(module.down.bias),
        )  # fmt: skip
    scale = 1 / math.sqrt(d // heads)
    first = module.norm.eps if isinstance(module, Block) else None
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
    )


def _array(x: Any) -> Any:
    return x.detach().cpu().double().numpy()


def _value(p: Polynomial, x: Any) -> Any:
    """Return a polynomial's value by Clenshaw's rule."""
    w = (2 * x - p.low - p.high) / (p.high - p.low)
    a = b = torch.zeros_like(w)
    for c in reversed(p.coefficients[1:]):
        a, b = c + 2 * w * a - b, a
    return p.coefficients[0] + w * a - b
