"""The plan of decoding with sigmoid attention.

A token's key is zero in all rows but its own. The polynomial of such a score is not zero, but the value there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from .arguments import plans
from .decoding_plan import DecodingPlan, appending, tokens_of
from .layout import Layout, token_layouts
from .polynomials import Polynomial
from .sigmoid_parts import Sigmoid, arguments, fastest

__all__ = ["SigmoidDecodingPlan", "plan_sigmoid_decoding"]

Float = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SigmoidDecodingPlan(Sigmoid, DecodingPlan):
    """Decoding with sigmoid attention, planned; p, denominator, epsilon and inverse mean nothing here.

    Attributes
    ----------
    scores : (float, float)
        The range of scale·q·k + offset over a token and all that it sees: the client refuses tokens outside it.
    offset : float
        Added to every score, of every step.
    polynomial : Polynomial
        What stands for the sigmoid on that range.
    """

    scores: tuple[float, float]
    offset: float
    polynomial: Polynomial

    @property
    def token_factors(self) -> tuple[float, float]:
        """What a token's query, and its value, are multiplied with before they are encrypted."""
        return self.scale * self.slope, self.polynomial.factors()[0]

    def check_token(self, q: Float, keys: Float, number: int, whole: bool) -> None:
        """Refuse a token with a score outside the range."""
        self.check_scores(q[:, None], keys, np.ones((self.heads, 1, keys.shape[1]), bool), number)


@plans("sigmoid", "call he.plan_decoding")
def plan_sigmoid_decoding(
    longest: int,
    d: int,
    d_v: int | None = None,
    heads: int = 1,
    *,
    context: int = 0,
    scores: tuple[float, float],
    offset: float | None = None,
    scale: float | None = None,
    norms: tuple[float, float],
    value_most: float,
    tolerance: float = 1e-2,
    upload: str = "full",
) -> SigmoidDecodingPlan:
    """Return a plan for decoding with sigmoid attention: o_i = sum_{j <= i} sigmoid(scale·q_i·k_j + offset) v_j.

    Of the plans within the tolerance it is the one that :func:`refattn.he.plan_decoding` would take. Source: Ramapuram
    et al., arXiv 2409.04431, section 2 (the operator).

    Parameters
    ----------
    longest, d, d_v, heads, context
        As :func:`refattn.he.plan_decoding` takes them.
    scores : (low, high)
        The range of scale·q·k + offset over each token and all that it sees; the offset itself is in it.
    offset, scale : float
        By default -log(longest + context), of all steps, and 1/sqrt(d).
    norms, value_most, tolerance
        As :func:`refattn.he.plan_decoding` takes them. ``he.ranges`` of a call of variant "sigmoid" with
        ``causal="bottom_right"`` has them, and the scores.
    upload : {"full", "whole"}
        As :func:`refattn.he.plan` takes it.

    Raises
    ------
    InvalidInput
        A size, range or name that has no meaning.
    UnsupportedProblem
        No ring at 128 bits of security does it; or arguments of power-softmax attention.
    """
    n_k = tokens_of(longest, context, upload)
    sizes = (1, n_k, d, d_v, heads)
    given = arguments(sizes, scores, offset, scale, norms, value_most, tolerance, upload, "latency")

    def layouts(slots: int) -> list[Layout]:
        return token_layouts(slots, n_k, max(d, given["d_v"]), heads)

    return appending(fastest(SigmoidDecodingPlan, given | {"context": context}, layouts))


ARGUMENTS = ("context", "scores", "offset", "scale", "norms", "value_most", "tolerance", "upload")


def plan_of(what: dict[str, Any]) -> SigmoidDecodingPlan:
    """Return the plan of what JSON holds of it; errors as of `plan_sigmoid_decoding`."""
    sizes = [what.pop(n) for n in ("longest", "d_k", "d_v", "heads")]
    if what.keys() != set(ARGUMENTS):
        raise InvalidInput(f"he: the plan has {', '.join(sorted(what))}, expected {', '.join(sorted(ARGUMENTS))}")
    rest: dict[str, Any] = {n: tuple(x) if isinstance(x, list) else x for n, x in what.items()}
    return plan_sigmoid_decoding(*sizes, **rest)


def arguments_of(plan: SigmoidDecodingPlan) -> dict[str, Any]:
    """Return what JSON holds of a plan: what it was made of."""
    names: Sequence[str] = ("longest", "d_k", "d_v", "heads", *ARGUMENTS)
    return {n: getattr(plan, n) for n in names}
