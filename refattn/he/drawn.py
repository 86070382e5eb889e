"""What noise may do to the result of some tokens, from draws: for layers and encoders, which have no proven bound."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from ..validation import shown
from .arguments import is_count
from .noise import quantile

__all__ = ["noise_bound"]

LEAST_DRAWS, MOST_DRAWS = 16, 2**16
SLACK = 2.0
"""Sixteen draws show less than half of a normal noise's deviation with a chance of 1e-3 (chi-square below 4)."""
CHANCE = 2.0**-20


class _Simulated(Protocol):
    """A layer or an encoder."""

    def simulate(self, x: Any, seed: int | None = None) -> NDArray[np.float64]:
        """Return what the program computes, with noise drawn by a seed."""


def noise_bound(program: _Simulated, x: Any, draws: int = LEAST_DRAWS) -> float:
    """Return what noise adds to an element of a layer's or an encoder's result at most, by drawn noise.

    2·t·s, where s is the largest root mean square over the draws that an element's error has, and t the deviations
    that the largest of all elements passes with a chance of 2**-20 (as the planner has it of attention; there it is
    2**-40). It is for these tokens, and of draws: what is proven of an attention's plan is not proven of a layer's.

    Parameters
    ----------
    program : Layer or Encoder
        What is computed. The refreshes of an encoder are drawn as fresh encryptions, which is all but
        ``EncoderPlan.refresh_error`` of them.
    x : (n, d) array
        The tokens.
    draws : int
        How often noise is drawn, at least 16.

    Raises
    ------
    InvalidInput
        Too few draws.
    InvalidProblem
        Tokens that do not fit the plan.
    """
    if not is_count(draws, LEAST_DRAWS, MOST_DRAWS):
        raise InvalidInput(f"draws: got {shown(draws)}, expected an integer from {LEAST_DRAWS} to {MOST_DRAWS}")
    plain = program.simulate(x)
    # an encoder draws its k-th block by seed + k: seeds far apart share none
    errors = np.stack([program.simulate(x, seed=1000 * i) - plain for i in range(draws)])
    deviation = float(np.sqrt((errors**2).mean(0)).max())
    return SLACK * quantile(plain.size, CHANCE) * deviation
