"""Chains of attention from an answer back through a response, and the confidence that is summed over such a chain.

UQAC (uncertainty quantification with attention chains): the released code, Yinghao-Li/UQAC at 610e9a4, was read; of the
paper nothing was.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import array_api_compat as api
import numpy as np
from numpy.typing import NDArray

from ..arrays import to_numpy
from ..errors import InvalidInput, expect
from .arguments import axes, function, namespace, whole, within
from .maps import attention_entropy, nonnegative

__all__ = ["RATIOS", "Chain", "Marginal", "attention_chain", "chain_marginal", "low_entropy_heads"]

RATIOS = (
    0.16644488,
    0.20938152,
    0.32959151,
    0.46061748,
    0.59304059,
    0.67549127,
    0.73914525,
    0.81274293,
    0.87378443,
    0.93925344,
)
"""What the attention to the 10 tokens before a row's own is multiplied by, the nearest first: the release's numbers."""
LEAST = 1e-12
"""What a row's sum is raised by, so that an empty row stays 0."""


@dataclass(frozen=True)
class Chain:
    """Positions of a response that its answer was traced back to.

    Attributes
    ----------
    positions : tuple of int
        Rising. A position is the row that predicted a token, so that the token is the next one; -1 is the last token of
        the instruction.
    scores : tuple of float
        The attention that chose each; 0 for the answer's own.
    """

    positions: tuple[int, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Marginal:
    """A confidence in an answer, and what it is the sum of.

    Attributes
    ----------
    confidence : float
        sum of chain·answer.
    sequences : (n, tokens) int array
        The response first, then with one token of the chain replaced.
    chain, answer : (n,) float64 arrays
        The product of the probabilities of the chain's tokens, and of the answer's, in each.
    """

    confidence: float
    sequences: NDArray[np.int64]
    chain: NDArray[np.float64]
    answer: NDArray[np.float64]


def low_entropy_heads(attention: Any, *, keep: int = 16, reduce: str = "max") -> tuple[Any, Any]:
    """Return one matrix of attention from those heads whose attention is the least spread, chosen for each row.

    Column 0 and the row's own column are set to 0, the 10 columns before that are multiplied by `RATIOS`; rows are
    divided by their sum + 1e-12; of each row the heads with the lowest entropy -sum p·log p are kept (among equals the
    first) and their maximum or mean taken.

    Parameters
    ----------
    attention : (layers, heads, response, tokens) array
        The rows of the response; a row's own column is tokens - response + row. The instruction before it must have at
        least 10 tokens.
    keep : int
        How many heads.
    reduce : {"max", "mean"}

    Returns
    -------
    reduced : (response, tokens) array
    kept : (layers, heads, response) bool array

    Raises
    ------
    InvalidInput
        Other axes, weights below 0 or that are not finite, more heads than there are, an instruction that is too short.

    Notes
    -----
    With an instruction below 10 tokens the release's column numbers become negative and damp the last columns instead.
    A head whose attention is wholly on column 0 and itself has nothing left: its entropy is 0, so that it is kept. The
    release's entropy is -sum p·log(p + 1e-12), which moves it by at most 1e-12 a token; its functions' own defaults are
    8 heads and the mean, its command line's 16 and the maximum.
    """
    xp = namespace(attention=attention)
    axes("attention", attention, "layers", "heads", "response", "tokens")
    layers, heads, response, tokens = attention.shape
    nonnegative(xp, "attention", attention)
    if float(xp.finfo(attention.dtype).smallest_normal) > LEAST:
        raise InvalidInput(f"attention: type is {attention.dtype}, which does not hold {LEAST}; pass float32")
    keep = whole("keep", keep, 1, layers * heads)
    expect(reduce in ("max", "mean"), "reduce", reduce, "'max' or 'mean'")
    first = tokens - response
    if first < len(RATIOS):
        raise InvalidInput(
            f"attention: the instruction has {first} tokens (tokens - response), expected at least {len(RATIOS)}; "
            "pass all columns of the prompt, its template included"
        )
    rows = np.arange(response)
    factor = np.ones((response, tokens))
    for distance, ratio in enumerate(RATIOS, 1):
        factor[rows, first + rows - distance] = ratio
    factor[:, 0] = factor[rows, first + rows] = 0
    p = attention * xp.asarray(factor, dtype=attention.dtype, device=api.device(attention))
    p = xp.reshape(p / (xp.sum(p, axis=-1, keepdims=True) + LEAST), (layers * heads, response, tokens))
    order = xp.argsort(attention_entropy(p), axis=0, stable=True)
    kept = xp.argsort(order, axis=0, stable=True) < keep
    chosen = xp.where(kept[..., None], p, 0.0)
    reduced = xp.max(chosen, axis=0) if reduce == "max" else xp.sum(chosen, axis=0) / keep
    return reduced, xp.reshape(kept, (layers, heads, response))


def attention_chain(
    attention: Any,
    sources: Sequence[int] | NDArray[Any],
    *,
    skip: Any = None,
    width: int = 3,
    threshold: float = 0.5,
    least: int = 5,
    looked: int = 5,
    steps: int = 1000,
    mode: str = "exact",
) -> Chain:
    """Return the positions that an answer is traced back to, by what attends to what.

    A step looks at the `looked` most attended tokens of each source (at the further ones only while nothing was found
    and the chain is short), leaves out the source itself, tokens of the instruction, those to skip and those whose
    position was a source before, and adds their attention over the sources. The `width` tokens with the largest sums
    are added to the chain; from one below the threshold on none is, once the chain has `least` positions and the
    answer's. The positions before them are the next step's sources. Among equals the first counts as larger.

    Parameters
    ----------
    attention : (response, tokens) array
        E.g. from `low_entropy_heads`; tokens before the response are the instruction's, at least one.
    sources : (n,) ints
        The positions that predicted the answer's tokens, each one before its token: from -1 to response - 1.
    skip : (response,) bool array, optional
        Tokens of the response that say nothing (stop words, punctuation).
    width, least, looked, steps : int
        At most so many tokens a step; so many positions beyond the answer's; ranks; steps.
    threshold : float
        A sum of attention, from 0 on.
    mode : {"exact", "released"}
        "released" counts the tokens added in a step twice while it compares the chain with `least`, so that it adds
        fewer of them in the step that reaches it.

    Returns
    -------
    Chain

    Raises
    ------
    InvalidInput
        Other axes, weights below 0 or that are not finite, positions outside or repeated.
    """
    xp = namespace(attention=attention)
    axes("attention", attention, "response", "tokens")
    nonnegative(xp, "attention", attention)
    a = np.asarray(to_numpy(attention, "attention"), np.float64)
    response, n = a.shape
    first = n - response
    expect(first >= 1, "attention", f"{response} rows and {n} columns", "at least one token before the response")
    start = _positions("sources", sources, -1, response - 1)
    expect(mode in ("exact", "released"), "mode", mode, "'exact' or 'released'")
    width, least, looked = whole("width", width, 1), whole("least", least, 0), whole("looked", looked, 1)
    threshold, steps = within("threshold", threshold, 0, np.finfo(float).max), whole("steps", steps, 0)
    barred = np.ones(n, bool)
    barred[first:] = False if skip is None else _flags(skip, response)
    square = np.concatenate([np.zeros((first, n)), a])  # rows of the instruction attend to nothing
    chain = [first + s for s in start]
    scores = [0.0] * len(chain)
    enough, current, used = least + len(chain), list(chain), set[int]()
    for _ in range(steps):
        used.update(current)
        found = _attended(square, current, barred, used, looked, len(chain) >= enough)
        current = []
        for t in np.argsort(-found, kind="stable")[:width]:
            counted = len(chain) + (len(current) if mode == "released" else 0)
            if found[t] == 0 or (found[t] < threshold and counted >= enough):
                break
            current.append(int(t) - 1)
            chain.append(int(t) - 1)
            scores.append(float(found[t]))
        if not current:
            break
    order = np.argsort(chain, kind="stable")
    return Chain(tuple(chain[i] - first for i in order), tuple(scores[i] for i in order))


def _attended(
    square: NDArray[Any], current: list[int], barred: NDArray[Any], used: set[int], looked: int, long: bool
) -> NDArray[np.float64]:
    """Return for each token the attention that the sources pay to it, 0 where it is not looked at or left out."""
    found = np.zeros(len(square))
    for s in current:
        for rank, t in enumerate(np.argsort(-square[s], kind="stable")):
            if rank >= looked and (long or found.any()):
                break
            if t != s and int(t) - 1 not in used and not barred[t]:
                found[t] += square[s, t]
    return found


def chain_marginal(
    conditional: Callable[[NDArray[np.int64]], Any],
    tokens: Sequence[int] | NDArray[Any],
    chain: Sequence[int] | NDArray[Any],
    answer: Sequence[int] | NDArray[Any],
    *,
    candidates: int = 5,
    least: float = 0.01,
    most: int = 10,
) -> Marginal:
    """Return a confidence in an answer: sum over sequences c of P(answer | c)·P(chain of c).

    The sequences are the response and those with one token of the chain replaced: by one of the `candidates` most
    probable tokens there whose probability is above `least`, over all positions the `most` most probable ones.

    Parameters
    ----------
    conditional : callable
        Takes a (n,) int64 array of tokens and returns a (n, vocabulary) array: row i is the distribution of token i
        given the tokens before it.
    tokens : (n,) ints
        The response.
    chain, answer : (c,) and (a,) ints
        Positions of tokens in it, none twice. Those of `attention_chain` predict: the token's is one more, and the
        answer's own are not part of the chain.
    candidates, most : int
    least : float

    Returns
    -------
    Marginal

    Raises
    ------
    InvalidInput
        Positions outside or repeated, probabilities that are none or have another shape.

    Notes
    -----
    Where the chain is all tokens but the answer's, the terms are probabilities of distinct sequences with that answer:
    their sum is at most the answer's marginal probability, and grows with the candidates. With a shorter chain the
    factors of the other tokens are left out, and the sum may be larger. Where the response's token is not among the
    candidates, the release leaves out the most probable one; here none is.
    """
    x = np.asarray(tokens)
    expect(x.ndim == 1 and len(x) > 0 and x.dtype.kind in "iu", "tokens", tokens, "one axis of whole numbers")
    x = x.astype(np.int64)
    at, ends = _positions("chain", chain, 0, len(x) - 1), _positions("answer", answer, 0, len(x) - 1)
    if both := sorted(set(at) & set(ends)):
        raise InvalidInput(f"chain: holds {both}, which answer holds too; leave its positions out of the chain")
    function("conditional", conditional)
    candidates, most = whole("candidates", candidates, 1), whole("most", most, 0)
    least = within("least", least, 0, 1)
    p = _distribution(conditional, x)
    options = []
    for i in at:
        for token in np.argsort(-p[i], kind="stable")[:candidates]:
            if token != x[i] and p[i, token] > least:
                options.append((float(p[i, token]), i, int(token)))
    options.sort(key=lambda o: -o[0])
    sequences = np.repeat(x[None], 1 + min(most, len(options)), 0)
    for row, (_, i, token) in zip(sequences[1:], options, strict=False):
        row[i] = token
    both_of = [(p if not k else _distribution(conditional, row), row) for k, row in enumerate(sequences)]
    of_chain, of_answer = (np.array([q[w, row[w]].prod() for q, row in both_of]) for w in (at, ends))
    return Marginal(float(of_chain @ of_answer), sequences, of_chain, of_answer)


def _distribution(conditional: Callable[[NDArray[np.int64]], Any], x: NDArray[np.int64]) -> NDArray[np.float64]:
    p = np.asarray(to_numpy(conditional(x.copy()), "conditional"), np.float64)
    if p.ndim != 2 or len(p) != len(x) or not ((p >= 0) & (p <= 1)).all():
        raise InvalidInput(
            f"conditional: returned an array of shape {p.shape}, expected ({len(x)}, vocabulary) of numbers from 0 to "
            "1; apply the softmax, and give a row for each token"
        )
    if x.min() < 0 or x.max() >= p.shape[1]:
        raise InvalidInput(
            f"tokens: hold {x.min()} to {x.max()}, expected 0 to {p.shape[1] - 1}, conditional's columns"
        )
    return p


def _positions(name: str, given: Any, low: int, high: int) -> list[int]:
    try:
        found = [operator.index(i) for i in given]
    except TypeError as e:
        raise InvalidInput(f"{name}: got {given!r}, expected whole numbers") from e
    if not found or min(found) < low or max(found) > high or len(set(found)) < len(found):
        raise InvalidInput(f"{name}: got {found}, expected one or more different positions from {low} to {high}")
    return found


def _flags(skip: Any, response: int) -> NDArray[np.bool_]:
    namespace(skip=skip)
    axes("skip", skip, response)
    flags = to_numpy(skip, "skip")
    expect(flags.dtype == bool, "skip", flags.dtype.name, "booleans, True where a token is left out")
    return flags
