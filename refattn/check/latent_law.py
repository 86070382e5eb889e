"""Latent attention written two ways, as a law: over the latent, and over the keys and values that are made of it.

With W_uk and W_uv what makes a head's keys and values of the latent c, q·(W_uk c) = (W_uk^T q)·c and sum_j p_j W_uv c_j
= W_uv sum_j p_j c_j (DeepSeek-V2, arXiv 2405.04434, section 2.1). Numbers are small integers, of which every product of
matrices is exact in every format, so what differs is the kernel's own rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import FORMATS
from ..problem import Problem
from .bounds.expected import expected
from .compare import Worst
from .inputs.draw import Draw
from .trial import Trial, agree

__all__ = ["Latent", "latent_case", "latent_expanded"]

Float = NDArray[np.float64]
NEEDED = frozenset({"dq", "dk", "dv"})


@dataclass(frozen=True)
class Latent:
    """What both calls are made of, in float64: b items, h heads, widths d and r of keys, d_v of values, c of latents.

    Attributes
    ----------
    query, query_rope : (b, h, n_q, d) and (b, h, n_q, r) arrays
        Queries; the second part stands for one that is turned by its position.
    latent, key_rope : (b, n_k, c) and (b, n_k, r) arrays
        What is kept of each token, for all heads.
    w_uk, w_uv : (h, d, c) and (h, d_v, c) arrays
        What makes keys, and values, of latents.
    """

    query: Float
    query_rope: Float
    latent: Float
    key_rope: Float
    w_uk: Float
    w_uv: Float

    @classmethod
    def drawn(cls, b: int, h: int, n_q: int, n_k: int, widths: tuple[int, int, int, int]) -> Latent:
        """Return integers from -2 to 2; a row of a matrix has two numbers of 1 or -1, and zeros."""
        rng = np.random.default_rng(5)
        d, r, d_v, c = widths

        def sparse(rows: int) -> Float:
            found = np.zeros((h, rows, c))
            for at in np.ndindex(h, rows):
                found[(*at, rng.choice(c, 2, replace=False))] = rng.choice([-1.0, 1.0], 2)
            return found

        def whole(most: int, *shape: int) -> Float:
            return rng.integers(-most, most + 1, shape).astype(float)

        query, query_rope = whole(1, b, h, n_q, d), whole(1, b, h, n_q, r)
        latent, key_rope = whole(2, b, n_k, c), whole(2, b, n_k, r)
        return cls(query, query_rope, latent, key_rope, sparse(d), sparse(d_v))

    def absorbed(self) -> tuple[Float, Float, Float]:
        """Return query, key and value of the call over the latent, of one key head."""
        inside = np.einsum("bhnd,hdc->bhnc", self.query, self.w_uk)
        key = np.concatenate([self.latent, self.key_rope], -1)[:, None]
        return np.concatenate([inside, self.query_rope], -1), key, self.latent[:, None]

    def expanded(self) -> tuple[Float, Float, Float]:
        """Return query, key and value of the call over each head's own keys and values."""
        made, value = (np.einsum("bnc,hdc->bhnd", self.latent, w) for w in (self.w_uk, self.w_uv))
        shared = np.broadcast_to(self.key_rope[:, None], (*made.shape[:3], self.key_rope.shape[2]))
        return np.concatenate([self.query, self.query_rope], -1), np.concatenate([made, shared], -1), value

    def of_absorbed(self, dq: Any, dk: Any, dv: Any, size: bool = False) -> tuple[Any, Any]:
        """Return the gradients of all of the queries and of all that is kept of tokens, from those over the latent.

        With `size` every number of the matrices counts by its size: of bounds.
        """
        w_uk = np.abs(self.w_uk) if size else self.w_uk
        c = w_uk.shape[2]
        query = np.concatenate([_times("bhnc,hdc->bhnd", dq[..., :c], w_uk), dq[..., c:]], -1)
        return query, np.concatenate([dk[:, 0, :, :c] + dv[:, 0], dk[:, 0, :, c:]], -1)

    def of_expanded(self, dq: Any, dk: Any, dv: Any, size: bool = False) -> tuple[Any, Any]:
        """Return the same from the gradients of the other call."""
        w_uk, w_uv = (np.abs(w) if size else w for w in (self.w_uk, self.w_uv))
        d = w_uk.shape[1]
        latent = _times("bhnd,hdc->bnc", dk[..., :d], w_uk) + _times("bhnd,hdc->bnc", dv, w_uv)
        return dq, np.concatenate([latent, dk[..., d:].sum(1)], -1)

    def projected(self, out: Any, size: bool = False) -> Any:
        """Return each head's output from the one over the latent."""
        return _times("bhnc,hdc->bhnd", out, np.abs(self.w_uv) if size else self.w_uv)

    def arriving(self, dout: Any) -> Any:
        """Return the gradient that arrives at the output over the latent."""
        return _times("bhnd,hdc->bhnc", dout, self.w_uv)


def _times(axes: str, x: Any, w: Float) -> Any:
    """Multiply, numbers of any kind by a matrix."""
    return np.einsum(axes, x, w.astype(int).astype(object) if x.dtype == object else w)


WIDTHS = (128, 64, 128, 512)
"""Those of DeepSeek-V2 and V3: d, r, d_v and c."""


def _made() -> Latent:
    return Latent.drawn(1, 2, 3, 20, WIDTHS)


def _call(d: Draw, tensors: tuple[Float, Float, Float]) -> Problem:
    q, k, v = map(d.tensor, tensors)
    return Problem(q, k, v, scale=(WIDTHS[0] + WIDTHS[1]) ** -0.5, variant=d.variant)


def latent_case(d: Draw) -> Problem:
    """Return the call over the latent, 576 columns of keys and 512 of values."""
    return _call(d, _made().absorbed())


def latent_expanded(ask: Trial, p: Problem) -> Worst:
    """Compare with the call over each head's own keys and values: the kernel's own if it takes that, else the exact."""
    d, made = Draw(FORMATS[p.dtype], np.random.default_rng(2), p.variant), _made()
    whole = _call(d, made.expanded())
    own = not ask.able.missing(whole)
    text = "the call over a latent differs from that over each head's own keys and values"
    known = expected(whole, ask.model)
    other = ask.out(whole) if own else known.answer.enclosures["out"].mid
    limit = made.projected(ask.allowed(p)["out"], size=True) + known.allowed["out"]
    found = [agree(made.projected(ask.out(p)), other, limit, text)]
    if not ask.has_gradients or not ask.able.gradients >= NEEDED:
        return found[0]
    dout = d.rng.integers(-1, 2, whole.out_shape).astype(float)
    at_latent, at_heads = d.tensor(made.arriving(dout)), d.tensor(dout)
    known = expected(whole, ask.model, at_heads)
    exact = {n: known.answer.enclosures[n].mid for n in NEEDED}
    theirs = made.of_expanded(*_three(ask.gradients(whole, at_heads) if own else exact))
    mine = made.of_absorbed(*_three(ask.gradients(p, at_latent)))
    limits = made.of_absorbed(*_three(ask.allowed(p, at_latent)), size=True)
    more = made.of_expanded(*_three(known.allowed), size=True)
    for name, x, y, a, b in zip(("dq", "dk"), mine, theirs, limits, more, strict=True):
        found.append(agree(x, y, a + b, f"{text}, in what becomes of {name}", name))
    return max(found, key=lambda w: w.ratio)


def _three(found: Any) -> tuple[Any, Any, Any]:
    return found["dq"], found["dk"], found["dv"]
