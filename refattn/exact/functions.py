"""One call each: arrays in, correctly rounded arrays out."""

from __future__ import annotations

from typing import Any

from ..arrays import dtype_name, like
from ..dtypes import FORMATS, format_of
from ..elsewhere import answered
from ..errors import UnsupportedProblem
from ..problem import Problem
from .driver import evaluate

__all__ = ["linear_attention", "power_attention", "sigmoid_attention", "softmax_attention"]


@answered
def softmax_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    scale: float | None = None,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sink: Any = None,
    bias: Any = None,
    allowed: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    rounding: str | None = None,
    return_lse: bool = False,
) -> Any:
    """Return softmax attention, correctly rounded: ``out_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij)``.

    Parameters
    ----------
    query, key, value : (b, h_q, n_q, d_k), (b, h_kv, n_k, d_k), (b, h_kv, n_k, d_v) float arrays
        Of NumPy, PyTorch, CuPy or JAX.
    scale, causal, window, softcap, sink, bias, allowed, cu_seqlens_q, cu_seqlens_k
        As in :class:`refattn.Problem`.
    rounding : str, optional
        The format of the result; None is query's own.
    return_lse : bool
        Also return the log-sum-exp (natural log), in the result's format or float32, whichever is wider.

    Returns
    -------
    out : (b, h_q, n_q, d_v)
        Of query's kind and device.
    lse : (b, h_q, n_q)
        Only with `return_lse`.

    Raises
    ------
    InvalidProblem
        Which argument is wrong, what was expected, what to change.
    UnsupportedProblem
        A result that 262144 bits do not tell from a midpoint of two numbers, beside a key at a bias of -2e5, say.

    Notes
    -----
    Error: none beyond one rounding. A row without keys gives out 0 and lse -inf. Source: arXiv 1706.03762, eq. 1.
    """
    problem = Problem(
        query, key, value, scale, causal, window, softcap, sink, bias, allowed, cu_seqlens_q, cu_seqlens_k
    )
    return _call(problem, rounding, return_lse)


@answered
def linear_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    feature: str = "elu1",
    decay: tuple[float, ...] | None = None,
    normalize: bool = True,
    scale: float | None = None,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    allowed: Any = None,
    rounding: str | None = None,
) -> Any:
    """Return linear attention correctly rounded: ``out_i = sum_j w_ij v_j / sum_j w_ij``, ``w_ij = phi(q_i)·phi(k_j)``.

    Parameters
    ----------
    query, key, value, scale, causal, window, allowed
        As in :class:`refattn.Problem`; scale None is 1 here.
    feature : {"identity", "relu", "elu1", "exp"}
        The feature map phi.
    decay : tuple of h_q floats, optional
        Rate for each query head: weights carry ``exp(-decay·(i' - j))``; needs `causal`.
    normalize : bool
        Divide by the sum of the weights.
    rounding : str, optional
        The format of the result; None is query's own.

    Returns
    -------
    out : (b, h_q, n_q, d_v)

    Notes
    -----
    Source: arXiv 2006.16236, eq. 5; decay: arXiv 2401.04658.
    """
    options = {"feature": feature, "decay": decay, "normalize": normalize}
    problem = Problem(query, key, value, scale, causal, window, allowed=allowed, variant="linear", options=options)
    return _call(problem, rounding, False)


@answered
def power_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    p: int = 4,
    epsilon: float = 1e-3,
    form: str = "plain",
    delta: float = 1e-6,
    scale: float | None = None,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    allowed: Any = None,
    rounding: str | None = None,
) -> Any:
    """Return power-softmax attention, correctly rounded: ``out_i = sum_j x_ij^p v_j / (epsilon + sum_j x_ij^p)``.

    Parameters
    ----------
    query, key, value, scale, causal, window, allowed
        As in :class:`refattn.Problem`.
    p : int
        The power, even.
    epsilon : float
        Added to the denominator.
    form : {"plain", "stable", "mean"}
        As it stands; divided by the row's largest ``|x|`` plus `delta` first; or with means in place of sums.
    delta : float
        See `form`.
    rounding : str, optional
        The format of the result; None is query's own.

    Returns
    -------
    out : (b, h_q, n_q, d_v)

    Notes
    -----
    Source: arXiv 2410.09457.
    """
    options = {"p": p, "epsilon": epsilon, "form": form, "delta": delta}
    problem = Problem(query, key, value, scale, causal, window, allowed=allowed, variant="power", options=options)
    return _call(problem, rounding, False)


@answered
def sigmoid_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    offset: float | None = None,
    scale: float | None = None,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    bias: Any = None,
    allowed: Any = None,
    rounding: str | None = None,
) -> Any:
    """Return sigmoid attention, correctly rounded: ``out_i = sum_j sigmoid(s_ij + offset) v_j``.

    Parameters
    ----------
    query, key, value, scale, causal, window, bias, allowed
        As in :class:`refattn.Problem`.
    offset : float, optional
        Added to every score; None is the exact -log(n_k).
    rounding : str, optional
        The format of the result; None is query's own.

    Returns
    -------
    out : (b, h_q, n_q, d_v)

    Notes
    -----
    Source: arXiv 2409.04431, section 2.
    """
    problem = Problem(
        query,
        key,
        value,
        scale,
        causal,
        window,
        bias=bias,
        allowed=allowed,
        variant="sigmoid",
        options={"offset": offset},
    )
    return _call(problem, rounding, False)


def _call(problem: Problem, rounding: str | None, return_lse: bool) -> Any:
    form = format_of(rounding or dtype_name(problem.query))
    wide = form if form.precision >= 24 else FORMATS["float32"]
    answer = evaluate(problem, rounding=form.name, lse_rounding=wide.name)
    for name in ("out", "lse")[: 1 + return_lse]:
        if left := answer.undecided.get(name, 0):
            raise UnsupportedProblem(
                f"{name}: {left} of {answer.values[name].size} elements lie nearer to a midpoint of two {form.name} "
                "numbers than the most bits tell; refattn.evaluate returns them with their enclosures"
            )
    arrays = [like(x, problem.query) for x in (answer.out, answer.lse) if x is not None]
    return tuple(arrays) if return_lse else arrays[0]
