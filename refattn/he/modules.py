"""PyTorch modules that are trained in the clear and computed on ciphertexts: attention and stand-ins with ranges.

Every module with a range (denominators, mean squares, inputs of an activation) computes the exact function while it is
trained and notes how far its inputs leave the range, as a penalty to be added to the loss; ``polynomial(module)``
switches all of them to the polynomials that the encrypted layer uses.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..errors import InvalidInput, UnsupportedProblem
from .arguments import check_margin
from .arithmetic import Numbers
from .inverse import choose
from .polynomials import Polynomial, activation, inverse_sqrt

__all__ = [
    "PolynomialActivation", "PolynomialLayerNorm", "PolynomialRMSNorm",
    "PowerMultiheadAttention", "PowerSoftmaxAttention", "anneal", "measured", "polynomial", "range_penalty",
]  # fmt: skip


class _Ranged(nn.Module):  # type: ignore[misc]
    """Something with a range: exact, or by its polynomial; the penalty of the last forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.polynomial = False
        self.penalty: Any = 0.0
        self.seen: tuple[float, float] = (math.inf, -math.inf)  # the least and largest input so far

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies keep: the penalty is of a forward pass of this one."""
        return self.__dict__ | {"penalty": 0.0}

    def fit(self, low: float, high: float) -> tuple[float, float]:
        """Take the polynomial for a range of inputs, and return the range that it is for."""
        raise NotImplementedError

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


def measured(module: nn.Module, data: Any, margin: float = 0.2) -> dict[str, tuple[float, float]]:
    """Run a module on data, take the polynomials for what its parts saw, with room, and return the ranges by name.

    Parameters
    ----------
    module : module
        With parts of this file, as :func:`convert` puts them there.
    data : tensor
        What its forward takes.
    margin : float
        The room: a share of each end.

    Raises
    ------
    UnsupportedProblem
        A range that no polynomial holds within the part's tolerance; the text names the part.
    """
    check_margin(margin)
    if torch.is_tensor(data) and not bool(torch.isfinite(data).all()):
        raise InvalidInput("data: has numbers that are not finite")
    parts = {name: part for name, part in module.named_modules() if isinstance(part, _Ranged)}
    were = {name: part.polynomial for name, part in parts.items()}
    polynomial(module, False)
    with torch.no_grad():
        module(data)
    found = {}
    for name, part in parts.items():
        part.polynomial = were[name]
        if part.seen[0] > part.seen[1]:
            continue  # the data did not reach it
        if not all(map(math.isfinite, part.seen)):
            raise InvalidInput(f"data: {name} sees numbers that are not finite")
        try:
            found[name] = part.fit(*(x + way * margin * abs(x) for x, way in zip(part.seen, (-1, 1), strict=True)))
        except UnsupportedProblem as e:
            raise UnsupportedProblem(
                f"{name}: {e}; it sees {part.seen[0]:.3g} to {part.seen[1]:.3g}: train with range_penalty, or give "
                "that part a larger .tolerance and call he.ranges again"
            ) from e
    return found


def anneal(module: nn.Module, share: float) -> None:
    """Let all attention mix the softmax, 1 - share of it, with the even power: from 0 to 1 while it is fine-tuned."""
    if not 0 <= share <= 1:
        raise InvalidInput(f"share: got {share}, expected from 0 to 1")
    for part in module.modules():
        if isinstance(part, PowerSoftmaxAttention):
            part.share = float(share)


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
        self.share = 1.0
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

    def fit(self, low: float, high: float) -> tuple[float, float]:
        """Take the polynomial for a range of denominators."""
        low = max(low, self.epsilon)
        self.set_range((low, max(high, low * (1 + 1e-3))), self.tolerance)
        return self.denominator

    def forward(self, x: Any, hidden: Any = None) -> Any:
        """Return (batch, n, d) of (batch, n, d); hidden, where given, is True where a query does not see a key."""
        q, k, v = (self._split(f(x)) for f in (self.query, self.key, self.value))
        s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.causal:
            causal = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
            hidden = causal if hidden is None else hidden | causal
        soft = s
        if hidden is not None:
            s = s.masked_fill(hidden, 0.0)
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
        if self.share < 1 and not self.polynomial:
            soft = soft if hidden is None else soft.masked_fill(hidden, -math.inf)
            o = self.share * o + (1 - self.share) * (soft.softmax(-1) @ v)
        return self.out(o.transpose(1, 2).flatten(2))

    def _split(self, x: Any) -> Any:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PowerMultiheadAttention(nn.Module):  # type: ignore[misc]
    """What calls an ``nn.MultiheadAttention`` on itself calls this: power-softmax self-attention, its arguments.

    Parameters
    ----------
    attention : PowerSoftmaxAttention
        What computes.
    batch_first : bool
        Whether tensors are (batch, n, d), or (n, batch, d).
    """

    in_proj_bias, _qkv_same_embed_dim = None, False  # what keeps PyTorch's layers from their kernel for softmax

    def __init__(self, attention: PowerSoftmaxAttention, batch_first: bool) -> None:
        super().__init__()
        self.attention, self.batch_first = attention, batch_first

    def forward(
        self, query: Any, key: Any, value: Any, key_padding_mask: Any = None, need_weights: bool = False,
        attn_mask: Any = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Any, None]:  # fmt: skip
        """Return attention, and no weights.

        Raises
        ------
        UnsupportedProblem
            Attention to other tokens than the queries, weights that are asked for, or a mask that adds numbers.
        """
        if key is not query or value is not query:
            raise UnsupportedProblem("he: converted attention is to itself; got another key or value than the query")
        if need_weights:
            raise UnsupportedProblem("he: converted attention returns no weights; call it with need_weights=False")
        masks = [m for m in (attn_mask, key_padding_mask) if m is not None]
        if any(m.dtype != torch.bool and not ((m == 0) | (m == -math.inf)).all() for m in masks):
            raise UnsupportedProblem("he: converted attention takes masks that hide keys: True, or -inf among 0")
        attn_mask, key_padding_mask = (
            m if m is None or m.dtype == torch.bool else m < 0 for m in (attn_mask, key_padding_mask)
        )
        hidden = None
        if attn_mask is not None:
            hidden = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, self.attention.heads))
        if key_padding_mask is not None:
            of_keys = key_padding_mask[:, None, None, :]
            hidden = of_keys if hidden is None else hidden | of_keys
        x = query if self.batch_first else query.transpose(0, 1)
        out = self.attention(x, hidden)
        return (out if self.batch_first else out.transpose(0, 1)), None


class PolynomialActivation(_Ranged):
    """GELU (by erf) or SiLU, and the polynomial near it on [-most, most]; see ``refattn.he.polynomials``."""

    def __init__(self, name: str = "gelu", most: float = 4.0, tolerance: float = 2e-2) -> None:
        super().__init__()
        self.stand_in, self.tolerance = activation(name, most, tolerance), tolerance

    def fit(self, low: float, high: float) -> tuple[float, float]:
        """Take the polynomial for a range of inputs, made even."""
        most = max(abs(low), abs(high), 1e-3)
        self.stand_in = activation(self.stand_in.name, most, self.tolerance)
        return -most, most

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
    bias : bool
        Whether something is added to the result.
    """

    centred = False

    def __init__(
        self, d: int, low: float = 0.25, high: float = 4.0, tolerance: float = 2e-2, eps: float = 1e-5,
        bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stand_in, self.eps, self.tolerance = inverse_sqrt(low, high, tolerance), eps, tolerance
        self.gain = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d)) if bias else None

    def fit(self, low: float, high: float) -> tuple[float, float]:
        """Take the polynomial for a range of mean squares."""
        low = max(low, self.eps)
        high = max(high, low * (1 + 1e-3))
        self.stand_in = inverse_sqrt(low, high, self.tolerance)
        return low, high

    def forward(self, x: Any) -> Any:
        """Return (..., d) of (..., d)."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        square = x.square().mean(-1, keepdim=True) + self.eps
        self.note(square, self.stand_in.low, self.stand_in.high)
        y = x * self.gain * (_value(self.stand_in, square) if self.polynomial else square.rsqrt())
        return y if self.bias is None else y + self.bias


class PolynomialLayerNorm(PolynomialRMSNorm):
    """Layer normalisation: the mean over features is taken away first."""

    centred = True


def _value(p: Polynomial, x: Any) -> Any:
    """Return a polynomial's value by Clenshaw's rule."""
    w = (2 * x - p.low - p.high) / (p.high - p.low)
    a = b = torch.zeros_like(w)
    for c in reversed(p.coefficients[1:]):
        a, b = c + 2 * w * a - b, a
    return p.coefficients[0] + w * a - b
