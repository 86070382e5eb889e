"""What a user would write with TenSEAL's public types, CKKSTensor and CKKSVector: the baselines of the benchmark.

The same inverse polynomial, by the same text; one head, the server divides. TenSEAL relinearises and rescales itself.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedProblem, install
from ..problem import Problem
from .arithmetic import Numbers
from .inverse import Inverse
from .ranges import ranges

__all__ = ["ckks_tensor", "ckks_vector", "edge_call", "random_call", "random_sigmoid"]

Float = NDArray[np.float64]


class _Public(Numbers):
    """The arithmetic of TenSEAL's types: theirs is written as that of numbers."""

    def square(self, a: Any) -> Any:
        return a.square()


def _context(levels: int, rotations: bool, threads: int) -> Any:
    try:
        ts = importlib.import_module("tenseal")
    except ModuleNotFoundError as e:
        raise UnsupportedProblem(f"he: needs the package tenseal; {install('he')}") from e
    bits = [54, *[40] * levels, 54]
    made = ts.context(ts.SCHEME_TYPE.CKKS, 16384, coeff_mod_bit_sizes=bits, n_threads=threads)
    made.global_scale = 2.0**40
    if rotations:
        made.generate_galois_keys()
    return ts, made


def ckks_tensor(
    q: Float, k: Float, v: Float, inverse: Inverse, scale: float, epsilon: float = 0.0, threads: int = 1
) -> tuple[Float, float]:
    """Return out (n_q, d_v) of power-softmax attention with p = 2 by CKKSTensor, and the server's seconds.

    Parameters
    ----------
    q, k, v : (n_q, d), (n_k, d), (n_k, d_v) arrays
        One head, in clear; encrypted here.
    inverse : Inverse
        The polynomial for 1/D.
    scale : float
        Multiplies the scores.
    epsilon : float
        Added to the denominator.
    threads : int
        TenSEAL's.
    """
    ts, made = _context(inverse.levels + 2, False, threads)
    factor = scale * np.sqrt(inverse.input_factor)
    a, b, c = (ts.ckks_tensor(made, ts.plain_tensor(x)) for x in (q * factor, k.T.copy(), v))
    start = time.perf_counter()
    w = a.mm(b).square()
    d = w.sum(axis=1)
    n = w.mm(c)
    out = n
    for y in inverse.factors(_Public(), d, epsilon):
        out = out * y.reshape([len(q), 1]).broadcast([len(q), v.shape[1]])
    seconds = time.perf_counter() - start
    return np.array(out.decrypt().tolist()).reshape(len(q), -1) * inverse.output_factor, seconds


def ckks_vector(
    q: Float, k: Float, v: Float, inverse: Inverse, scale: float, epsilon: float = 0.0, threads: int = 1
) -> tuple[Float, float]:
    """Return the same by CKKSVector, a vector a row: see :func:`ckks_tensor`."""
    ts, made = _context(inverse.levels + 3, True, threads)
    factor = scale * np.sqrt(inverse.input_factor)
    a, b, c = ([ts.ckks_vector(made, x) for x in rows] for rows in (q * factor, k, v))
    start = time.perf_counter()
    out = []
    for row in a:
        weights = [row.dot(x).square() for x in b]
        d = weights[0]
        for w in weights[1:]:
            d = d + w
        n = c[0] * weights[0]
        for x, w in zip(c[1:], weights[1:], strict=True):
            n = n + x * w
        out.append(inverse.apply(_Public(), n, d, epsilon))
    seconds = time.perf_counter() - start
    return np.array([x.decrypt() for x in out]) * inverse.output_factor, seconds


def random_call(n: int, d: int, heads: int, p: int, seed: int = 0) -> tuple[Problem, dict[str, Any]]:
    """Return a call of normal numbers, epsilon a tenth of the mean denominator, and its ranges as a plan wants them."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, heads, n, d)) for _ in range(3))
    sums = ((q @ k.swapaxes(2, 3) / np.sqrt(d)) ** p).sum(3)
    epsilon = 0.1 * float(sums.mean())
    given = {
        "denominator": (epsilon + 0.5 * float(sums.min()), epsilon + 1.05 * float(sums.max())),
        "epsilon": epsilon,
        "norms": (float(np.linalg.norm(q, axis=3).max()), float(np.linalg.norm(k, axis=3).max())),
        "value_most": float(np.abs(v).max()),
    }
    return Problem(q, k, v, variant="power", options={"p": p, "epsilon": epsilon}), given


def random_sigmoid(n: int, d: int, heads: int, seed: int = 0) -> tuple[Problem, dict[str, Any]]:
    """Return a call of sigmoid attention of normal numbers, and its ranges as a plan wants them."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, heads, n, d)) for _ in range(3))
    x = Problem(q, k, v, variant="sigmoid")
    return x, ranges(x, margin=0.02)


def edge_call(x: Problem, given: dict[str, Any]) -> Problem:
    """Return a call at the ends of a plan's ranges, where errors are largest: see :func:`random_call`.

    Each query is a multiple of a key, which then has nearly all of the denominator; the denominators go from the least
    to the largest; values are the largest, of one sign in half of the columns.
    """
    (low, high), (most_q, _), p = given["denominator"], given["norms"], x.options["p"]
    k, epsilon, d_k = np.asarray(x.key), x.options["epsilon"], x.d_k
    sums = ((k @ k.swapaxes(2, 3) / np.sqrt(d_k)) ** p).sum(3)
    wanted = np.geomspace(low * (1 + 1e-9), high * (1 - 1e-9), x.n_k) - epsilon
    most = most_q * (1 - 1e-9) / np.linalg.norm(k, axis=3)
    q = k * np.minimum((wanted / sums) ** (1 / p), most)[..., None]
    signs = np.random.default_rng(1).choice((-1.0, 1.0), np.shape(x.value))
    signs[..., : x.d_v // 2] = 1
    return Problem(q, k, given["value_most"] * signs, variant="power", options=x.options)
