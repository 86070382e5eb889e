"""Triple-wise attention on a GPU: trilinear by kernels of its own, tree and rank-one by `refattn.gpu.attention`."""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from ..arrays import dtype_name
from ..errors import InvalidProblem, UnsupportedProblem
from ..gpu import attention as pairwise
from ..gpu import trilinear
from .forms import check, scale_of

__all__ = ["attention", "backward"]


def attention(
    query: Any, k1: Any, k2: Any, v1: Any, v2: Any, *, form: str, scale: float | None = None,
    causal: str | None = None, window: Any = None, accuracy: str = "fast",
) -> tuple[Any, Any]:  # fmt: skip
    """Return out and lse, on the GPU that the arrays are on.

    Parameters
    ----------
    query, k1, k2, v1, v2, scale, causal, window
        As in :func:`refattn.tensor.attention`; arrays of PyTorch or CuPy. The tree and the rank-one form take any type
        that `refattn.gpu` takes; in the tree form v1 times the inner result is rounded to that type. The trilinear
        form takes bfloat16, head dims equal and multiples of 8 up to 128, on a Hopper GPU: q times k1 and P are rounded
        to bfloat16, all sums are float32, v1 is multiplied in float32. Values at hidden keys near a row's own must be
        finite: they meet weights of 0.
    form : str
        "trilinear", "tree" or "rank_one".
    accuracy : str
        As in :func:`refattn.gpu.attention`; "fast" for the trilinear form.

    Raises
    ------
    UnsupportedProblem
        Another form, type, size or GPU; raised before any launch.
    """
    shape = check(query, (k1, k2), (v1, v2), form, causal, window)
    if accuracy not in ("fast", "high"):
        raise InvalidProblem(f"accuracy: got {accuracy!r}, expected 'fast' or 'high'")
    given: dict[str, Any] = {"scale": scale_of(scale, shape.d), "causal": causal}
    if form == "trilinear" and accuracy == "fast":
        return trilinear.forward(query, k1, k2, v1, v2, window=shape.window, **given)
    if form not in ("tree", "rank_one"):
        raise UnsupportedProblem(
            f"tensor: the form {form!r} with accuracy {accuracy!r} is not there on a GPU; 'tree' and 'rank_one' are, "
            "and 'trilinear' with 'fast'"
        )
    windows = [None if w is None else (w - 1, 0) for w in shape.window]
    given |= {"accuracy": accuracy, "return_lse": True}
    if form == "rank_one":
        a, lse_a = pairwise(query, k1, v1, window=windows[0], **given)
        b, lse_b = pairwise(query, k2, v2, window=windows[1], **given)
        return a * b, lse_a + lse_b
    inner, terms = pairwise(k1, k2, v2, window=windows[1], **given)
    # a term for each key, the same for all rows and for the heads that share the keys
    bias = array_namespace(terms).repeat(terms, shape.heads // shape.heads_kv, axis=1)[:, :, None, :]
    out, lse = pairwise(query, k1, v1 * inner, window=windows[0], bias=bias, **given)
    return out, lse


def backward(
    query: Any, k1: Any, k2: Any, v1: Any, v2: Any, out: Any, lse: Any, d_out: Any, *, scale: float | None = None,
    causal: str | None = None, window: Any = None,
) -> tuple[Any, Any, Any, Any, Any]:  # fmt: skip
    """Return the gradients of query, k1, k2, v1 and v2 in the trilinear form, on the GPU that the arrays are on.

    The same bits each time: nothing is added in an order that changes. lse and the sums of d_out times out stay
    float32; P, dS, and query and d_out times one row of k1 and v1 are rounded to bfloat16.

    Parameters
    ----------
    query, k1, k2, v1, v2, scale, causal, window
        As in `attention`.
    out, lse : (b, h, n_q, d) and (b, h, n_q) arrays
        What `attention` returned.
    d_out : (b, h, n_q, d) array
        out's gradient, bfloat16.

    Raises
    ------
    InvalidProblem
        Shapes or types that do not fit together.
    UnsupportedProblem
        As in `attention`.
    """
    shape = check(query, (k1, k2), (v1, v2), "trilinear", causal, window)
    rows = (shape.batch, shape.heads, shape.n_q)
    wanted = {"out": (out, (*rows, shape.d_v), dtype_name(query)), "lse": (lse, rows, "float32")}
    wanted["d_out"] = (d_out, *wanted["out"][1:])
    for name, (x, size, dtype) in wanted.items():
        if tuple(x.shape) != size or dtype_name(x) != dtype:
            raise InvalidProblem(f"{name}: got shape {tuple(x.shape)} of {dtype_name(x)}, expected {size} of {dtype}")
    given: dict[str, Any] = {"scale": scale_of(scale, shape.d), "causal": causal, "window": shape.window}
    return trilinear.backward(query, k1, k2, v1, v2, out, lse, d_out, **given)
