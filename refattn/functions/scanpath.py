"""Scanpaths over objects on a grid: encodings of position, object tokens, a pointer over objects, decoding.

OAT (Object-level Attention Transformer for scanpath prediction): the released code, HKUST-NISL/oat_eccv24 at bf532ef,
was read in part: its model, the fit of its encoding and the trainer for mixed sets; of the paper nothing was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import array_api_compat as api
import numpy as np
from numpy.typing import NDArray

from ..arrays import to_numpy
from ..errors import InvalidInput, expect
from .arguments import axes, function, instance, namespace, whole, within

__all__ = [
    "Scanpath",
    "decode_scanpath",
    "fit_similarity_encoding",
    "gaussian_similarity_encoding",
    "object_tokens",
    "pointer_logits",
    "similarity_loss",
    "step_mask",
]


@dataclass(frozen=True)
class Scanpath:
    """Objects in the order in which they are looked at.

    Attributes
    ----------
    objects : tuple of int
    ended : bool
        Whether END was chosen after them; otherwise the number of steps was used up.
    log_probability : float
        The sum of the logarithms of the choices' probabilities, END's included, each among what its step allows.
    """

    objects: tuple[int, ...]
    ended: bool
    log_probability: float


def gaussian_similarity_encoding(n: int, sigma: float = 2.0, *, width: int | None = None) -> NDArray[np.float64]:
    """Return unit rows whose cosines are exp(-(i - j)**2 / (2 sigma**2)): the Cholesky factor, in closed form.

    With p = exp(-1/sigma**2) and (p)_k = (1 - p)(1 - p**2)...(1 - p**k), L_ik is
    exp(-(i - k)**2 / (2 sigma**2)) · (p)_i / ((p)_(i-k) (p)_k) · sqrt((p)_k) for k <= i. The quotient is a Gaussian
    binomial, summed by its recurrence. Nothing is subtracted, so that each number has a small relative error at any
    condition of the matrix of cosines; a numerical factorisation loses the small cosines, or fails.

    Parameters
    ----------
    n : int
        Rows, 1 to 1000.
    sigma : float
        In positions.
    width : int, optional
        Columns, n by default; further ones are 0.

    Returns
    -------
    (n, width) float64 array

    Raises
    ------
    InvalidInput
        A number outside its range, fewer columns than rows.

    Notes
    -----
    The release fits such rows by gradient descent (`fit_similarity_encoding`), 14 of 86 numbers with sigma = 2. The
    closed form is ours, from the q-binomial theorem.
    """
    n = whole("n", n, 1, 1000)
    sigma = within("sigma", sigma, 1e-3, 1e6)
    width = n if width is None else whole("width", width, n)
    h = 1 / sigma**2
    k = np.arange(n)
    power = np.exp(-h * k)  # p**k
    roots = np.sqrt(np.cumprod(np.concatenate([[1.0], -np.expm1(-h * k[1:])])))
    out = np.zeros((n, width))
    binomials = np.zeros(n)
    binomials[0] = 1
    for i in range(n):
        if i:
            binomials[1:] = binomials[:-1] + power[1:] * binomials[1:]
        out[i, : i + 1] = np.exp(-((i - k[: i + 1]) ** 2) * (h / 2)) * binomials[: i + 1] * roots[: i + 1]
    return out


def similarity_loss(encoding: Any, sigma: float = 2.0) -> Any:
    """Return how far rows are from unit cosines exp(-(i - j)**2 / (2 sigma**2)) and from equal norms.

    (sum_ij (cos_ij - target_ij)**2 + mean_i (norm_i - mean norm)**2) / (n(n - 1))

    Parameters
    ----------
    encoding : (n, width) PyTorch tensor
        At least two rows, none of them 0.
    sigma : float
        In positions.

    Returns
    -------
    () tensor

    Raises
    ------
    InvalidInput
        No floating tensor of that shape, or a sigma outside [0.001, 1e6].
    """
    import torch

    expect(isinstance(encoding, torch.Tensor), "encoding", type(encoding).__name__, "a PyTorch tensor")
    axes("encoding", encoding, "rows", "width")
    expect(encoding.is_floating_point(), "encoding", str(encoding.dtype), "a floating type")
    n = len(encoding)
    expect(n >= 2, "encoding", f"{n} row", "at least 2 rows")
    sigma = within("sigma", sigma, 1e-3, 1e6)
    norms = torch.linalg.vector_norm(encoding, dim=1)
    unit = encoding / norms[:, None]
    at = torch.arange(n, dtype=encoding.dtype, device=encoding.device)
    target = torch.exp(-((at[:, None] - at) ** 2) / (2 * sigma**2))
    return (((unit @ unit.T - target) ** 2).sum() + ((norms - norms.mean()) ** 2).mean()) / (n * (n - 1))


def fit_similarity_encoding(
    n: int, sigma: float = 2.0, *, width: int = 86, steps: int = 10_000, rate: float = 0.01, generator: Any = None
) -> Any:
    """Return rows fitted to `similarity_loss` by Adam from normal random numbers, as the release makes its table.

    `gaussian_similarity_encoding` needs no fit; this is for comparing with tables that were made so.

    Parameters
    ----------
    n, width : int
        Rows, at least 2, and columns.
    sigma : float
        In positions.
    steps : int
    rate : float
        Adam's learning rate.
    generator : torch.Generator, optional
        Where the random numbers come from.

    Returns
    -------
    (n, width) float64 PyTorch tensor

    Raises
    ------
    InvalidInput
        A number outside its range.
    """
    import torch

    n, width, steps = whole("n", n, 2), whole("width", width, 1), whole("steps", steps, 0)
    rate = within("rate", rate, 0, 1, open_low=True)
    if generator is not None:
        instance("generator", generator, torch.Generator, "use torch.Generator().manual_seed(seed)")
    encoding = torch.randn(n, width, dtype=torch.float64, generator=generator).requires_grad_()
    adam = torch.optim.Adam([encoding], lr=rate)
    for _ in range(steps):
        adam.zero_grad()
        similarity_loss(encoding, sigma).backward()
        adam.step()
    return encoding.detach()


def object_tokens(features: Any, rows: Any, columns: Any, targets: Any, table: Any, *, width: int | None = None) -> Any:
    """Return tokens of objects: features beside the encodings of row, column and whether it is the target.

    token_i = [features_i | table[rows_i] | table[columns_i] | table[targets_i]], what follows the features cut to
    `width`.

    Parameters
    ----------
    features : (n, d) array
        What a network makes of each object's picture.
    rows, columns, targets : (n,) int arrays
        From 0 on; targets are 0 or 1.
    table : (positions, w) array
        E.g. from `gaussian_similarity_encoding`, of features' kind and type.
    width : int, optional
        1 to 3w, 3w by default.

    Returns
    -------
    (n, d + width) array

    Raises
    ------
    InvalidInput
        Arrays of different kinds or shapes, a place that the table does not have.

    Notes
    -----
    The release has w = 86 and a width of 256, so that the last two numbers of the target's encoding are missing.
    """
    xp = namespace(features=features, rows=rows, columns=columns, targets=targets, table=table)
    axes("features", features, "objects", "d")
    axes("table", table, "positions", "w")
    n, (positions, w) = len(features), table.shape
    width = 3 * w if width is None else whole("width", width, 1, 3 * w)
    for name, x in (("rows", rows), ("columns", columns), ("targets", targets)):
        axes(name, x, n)
        expect(xp.isdtype(x.dtype, "integral"), name, str(x.dtype), "whole numbers")
        most = min(1, positions - 1) if name == "targets" else positions - 1
        low, high = int(xp.min(x)), int(xp.max(x))
        expect(low >= 0 and high <= most, name, f"{low} to {high}", f"0 to {most}")
    if features.dtype != table.dtype:
        raise InvalidInput(f"table: type is {table.dtype}, expected features' {features.dtype}; cast it")
    places = xp.concat([xp.take(table, x, axis=0) for x in (rows, columns, targets)], axis=1)
    return xp.concat([features, places[:, :width]], axis=1)


def pointer_logits(query: Any, key: Any, mix: Any, *, bias: float = 0.0) -> Any:
    """Return logits over objects and padding: sum_h mix_h [q_h k_h^T / sqrt(d) | 0] + bias.

    Parameters
    ----------
    query : (heads, steps, d) array
        What the decoder gives, projected for each head.
    key : (heads, slots, d) array
        What the encoder gives for each object, projected likewise; the last slot is the target's copy, which stands for
        END.
    mix : (heads,) array
        The weights that join the heads; ones for a single head.
    bias : float

    Returns
    -------
    (steps, slots + 1) array
        The last column is padding's: its logit is 0 in each head, and so the bias.

    Raises
    ------
    InvalidInput
        Arrays of different kinds, shapes or types.

    Notes
    -----
    The release has 2 heads, d = 512, and leaves the mix out for a single head.
    """
    xp = namespace(query=query, key=key, mix=mix)
    axes("query", query, "heads", "steps", "d")
    heads, steps, d = query.shape
    axes("key", key, heads, "slots", d)
    axes("mix", mix, heads)
    for name, x in (("query", query), ("key", key), ("mix", mix)):
        if not xp.isdtype(x.dtype, "real floating") or x.dtype != query.dtype:
            raise InvalidInput(f"{name}: type is {x.dtype}, expected one floating type for query, key and mix")
    bias = within("bias", bias, -np.finfo(float).max, np.finfo(float).max)
    scores = xp.matmul(query, xp.matrix_transpose(key)) / math.sqrt(d)
    none = xp.zeros((heads, steps, 1), dtype=query.dtype, device=api.device(query))
    return xp.sum(xp.reshape(mix, (-1, 1, 1)) * xp.concat([scores, none], axis=2), axis=0) + bias


def step_mask(steps: int, slots: int) -> NDArray[np.bool_]:
    """Return which slots each step may choose: objects always, END from the second step on, padding never.

    Parameters
    ----------
    steps : int
    slots : int
        The objects, END and padding, in that order: at least 3.

    Returns
    -------
    (steps, slots) bool array
        True = may be chosen.

    Raises
    ------
    InvalidInput
        A number below its least.
    """
    steps, slots = whole("steps", steps, 1), whole("slots", slots, 3)
    allowed = np.ones((steps, slots), bool)
    allowed[0, -2] = allowed[:, -1] = False
    return allowed


def decode_scanpath(
    logits: Callable[[tuple[int, ...]], Any], *, steps: int, rng: np.random.Generator | None = None
) -> Scanpath:
    """Return a scanpath, chosen slot by slot until END or for a number of steps.

    Parameters
    ----------
    logits : callable
        Takes the objects chosen so far and returns a (slots,) array for the next: objects, END, padding. E.g. the last
        row of `pointer_logits`.
    steps : int
        The most objects.
    rng : numpy.random.Generator, optional
        Draws each slot by the softmax of the logits that its step allows. Without it the largest one is taken, the
        first among equals.

    Returns
    -------
    Scanpath

    Raises
    ------
    InvalidInput
        Logits of another shape, NaN or infinite upwards, or none that a step may choose.
    """
    function("logits", logits)
    steps = whole("steps", steps, 1)
    chosen: list[int] = []
    total = 0.0
    if rng is not None and not isinstance(rng, np.random.Generator):
        raise InvalidInput(f"rng: got {type(rng).__name__}, expected a numpy.random.Generator; use default_rng(seed)")
    for step in range(steps):
        given = logits(tuple(chosen))
        namespace(logits=given)
        axes("logits", given, "slots")
        x = np.asarray(to_numpy(given, "logits"), np.float64)
        x = np.where(step_mask(2, len(x))[min(step, 1)], x, -np.inf)
        expect(bool((x < np.inf).all() and x.max() > -np.inf), "logits", x, "numbers, not all of them -inf")
        log_p = x - x.max()
        log_p -= math.log(np.exp(log_p).sum())
        slot = int(x.argmax()) if rng is None else int(rng.choice(len(x), p=np.exp(log_p)))
        total += float(log_p[slot])
        if slot == len(x) - 2:
            return Scanpath(tuple(chosen), True, total)
        chosen.append(slot)
    return Scanpath(tuple(chosen), False, total)
