"""What other projects' acceptance rules say of an output, beside ours: each as its project states it.

Sources, as read in those projects' tests: flash-attention ``tests/test_flash_attn.py`` (error at most twice that of
eager attention in the same type), ``torch.testing.assert_close`` (its defaults by type), xformers
``attn_bias_utils.py`` (absolute tolerance by type), flashinfer (1e-2 relative and absolute, its most common pair),
NATTEN ``tests/utils.py`` (absolute tolerance by type), and a cosine of at least 0.99. Each compares with the exact
answer rounded to the output's type.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ...dtypes import FORMATS
from ...problem import Problem
from ...variants import variant_of
from ..bounds.rounded import simulate
from ..model import materialised

__all__ = ["RULES", "verdicts"]

Float = NDArray[np.float64]

TORCH = {"float64": (1e-7, 1e-7), "float32": (1.3e-6, 1e-5), "float16": (1e-3, 1e-5), "bfloat16": (1.6e-2, 1e-5)}
XFORMERS = {"float32": 3e-4, "float16": 4e-3, "bfloat16": 2e-2}
NATTEN = {"float16": 1e-2, "bfloat16": 5e-2}
RULES = ("flash-attention 2x", "torch.testing", "xformers", "flashinfer", "NATTEN", "cosine 0.99")
"""The rules' names."""


def verdicts(problem: Problem, got: NDArray[Any], exact: Float) -> dict[str, bool | None]:
    """Return which rules accept an output: True, False, or None where a rule says nothing of the type.

    Parameters
    ----------
    problem : Problem
        A call of NumPy arrays.
    got : (b, h_q, n_q, d_v) array
        What the kernel returned.
    exact : float64 array
        The exact output.
    """
    dtype, known = problem.out_type, variant_of(problem.variant).rows is not None and problem.out_scale is None
    x, want = np.asarray(got).astype(np.float64), FORMATS[dtype].round_array(exact)
    with np.errstate(all="ignore"):
        gap = np.abs(x - want)
        eager = np.abs(_eager(problem) - want) if known else gap

        def close(relative: float, absolute: float) -> bool:
            return bool(((gap <= absolute + relative * np.abs(want)) | (x == want)).all())

        worst, limit = (float(a.max(initial=0.0)) for a in (gap, eager))  # NaN compares as their tests do: it fails
        size = float(np.sqrt((x * x).sum() * (want * want).sum()))
        return {
            "flash-attention 2x": worst <= 2 * limit if known and dtype in XFORMERS else None,
            "torch.testing": close(*TORCH[dtype]) if dtype in TORCH else None,
            "xformers": close(0.0, XFORMERS[dtype]) if dtype in XFORMERS else None,
            "flashinfer": close(1e-2, 1e-2),
            "NATTEN": close(0.0, NATTEN[dtype]) if dtype in NATTEN else None,
            "cosine 0.99": bool((x * want).sum() >= 0.99 * size),
        }


def _eager(problem: Problem) -> Float:
    """Return attention as eager mode computes it: scores and weights stored in the input's type, sums in float32."""
    if problem not in _EAGER:
        form = FORMATS[problem.out_type]
        _EAGER[problem] = form.round_array(simulate(problem, materialised(problem.out_type))["out"])
    return _EAGER[problem]


_EAGER: WeakKeyDictionary[Problem, Float] = WeakKeyDictionary()
"""What eager mode gives of calls that are still there: several kernels may be judged by one."""
