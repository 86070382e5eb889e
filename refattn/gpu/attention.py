"""Softmax attention on a GPU: arrays of CuPy or PyTorch in, the same kind out, on the caller's stream."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import InvalidProblem
from . import sm90
from .plan import plan
from .views import View, current_stream, empty, view

__all__ = ["attention"]


def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    scale: float | None = None,
    causal: str | None = None,
    accuracy: str = "fast",
    impl: str | None = None,
    return_lse: bool = False,
) -> Any:
    """Return softmax attention, computed on the GPU that the arrays are on.

    Nothing is copied and nothing is waited for: the kernel is queued on the caller's current stream.

    Parameters
    ----------
    query : (b, h_q, n_q, d) array of CuPy or PyTorch
        float16 or bfloat16, d a multiple of 8 up to 256; any strides with a contiguous last axis and rows that begin at
        multiples of 16 bytes.
    key, value : (b, h_kv, n_k, d) arrays
        Of query's type and device; h_kv divides h_q.
    scale : float, optional
        By default 1/sqrt(d).
    causal : str, optional
        "bottom_right" (the last query sees every key) or "top_left".
    accuracy : str
        "fast" rounds P to the input's type; "high" keeps it in two parts, so that the error is the output's rounding.
    impl : str, optional
        A kernel out of ``IMPLS``; by default the one that :func:`refattn.gpu.plan` chooses.
    return_lse : bool
        Also return the log-sum-exp, (b, h_q, n_q) float32: -inf for a row without keys, whose out is 0.

    Raises
    ------
    InvalidProblem
        Shapes, types or devices that do not fit together.
    UnsupportedProblem
        No kernel computes it; raised before any launch.

    Notes
    -----
    A value of NaN or inf that only some rows of a causal call see may show in up to 191 rows before them.
    """
    q, k, v = (view(x, n) for n, x in (("query", query), ("key", key), ("value", value)))
    _check(q, k, v, scale, causal)
    with current_stream(query):
        chosen = plan(
            (q.shape, k.shape, v.shape),
            q.dtype,
            scale=scale,
            causal=causal,
            accuracy=accuracy,
            impl=impl,
            capability=_capability(),
        )
        out, lse = empty(query, (*q.shape[:3], v.shape[3]), q.dtype), empty(query, q.shape[:3], "float32")
        if not (k.shape[2] and math.prod(out.shape)):
            out[...], lse[...] = 0, -math.inf
        else:
            by = 1 / math.sqrt(q.shape[3]) if scale is None else float(scale)
            sm90.launch(chosen.macros, q, k, v, view(out, "out"), view(lse, "lse"), by)
    return (out, lse) if return_lse else out


def _capability() -> tuple[int, int]:
    import cupy  # type: ignore[import-not-found,unused-ignore]

    text = str(cupy.cuda.Device().compute_capability)
    return int(text[:-1]), int(text[-1])


def _check(q: View, k: View, v: View, scale: float | None, causal: str | None) -> None:
    """Refuse what has no meaning."""
    for name, x in (("query", q), ("key", k), ("value", v)):
        if len(x.shape) != 4:
            raise InvalidProblem(f"{name}: got shape {x.shape}, expected (batch, heads, n, d)")
        if (x.dtype, x.device) != (q.dtype, q.device):
            raise InvalidProblem(
                f"{name}: got {x.dtype} on GPU {x.device}, expected query's {q.dtype} on GPU {q.device}"
            )
    b, h, _, d = q.shape
    if k.shape[0] != b or k.shape[3] != d or v.shape[:3] != k.shape[:3]:
        raise InvalidProblem(f"key, value: got shapes {k.shape} and {v.shape}, which do not fit query's {q.shape}")
    if not k.shape[1] or h % k.shape[1]:
        raise InvalidProblem(f"key: got {k.shape[1]} heads, expected a divisor of query's {h}")
    if scale is not None and not np.isfinite(scale):
        raise InvalidProblem(f"scale: got {scale}, expected a finite number")
    if causal not in (None, "bottom_right", "top_left"):
        raise InvalidProblem(f"causal: got {causal!r}, expected None, 'bottom_right' or 'top_left'")
