"""Titans' memory, which learns while it reads: a matrix or an MLP taught by keys and values, and its three blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import array_api_compat as api
import numpy as np

from ..errors import InvalidInput
from .arguments import axes, instance, namespace, numbers, whole
from .dense import as_index, masked_softmax

__all__ = [
    "Memory", "memory_as_context", "memory_as_gate", "memory_as_layer", "memory_gradient", "memory_loss",
    "neural_memory", "read_memory", "start_memory",
]  # fmt: skip

Gate = Callable[[Any, Any], Any]


class Memory(NamedTuple):
    """What a memory knows: layers' matrices, and how fast each moves."""

    weights: tuple[Any, ...]
    """(d_0, d_1), (d_1, d_2), ...: one is a linear memory, more are an MLP."""
    momentum: tuple[Any, ...]
    """Of their shapes."""


def start_memory(*weights: Any) -> Memory:
    """Return a memory of these matrices that is at rest."""
    _check(weights)
    return Memory(tuple(weights), tuple(0 * w for w in weights))


def _check(weights: Sequence[Any]) -> Any:
    if not isinstance(weights, tuple | list) or not weights:
        got = "none" if weights == () else type(weights).__name__
        raise InvalidInput(f"weights: got {got}, expected a tuple with a matrix for each layer")
    xp = namespace(**{f"weights[{i}]": w for i, w in enumerate(weights)})
    axes("weights[0]", weights[0], "d_k", "width")
    for i, w in enumerate(weights[1:], 1):
        axes(f"weights[{i}]", w, weights[i - 1].shape[1], "width")
    return xp


def _check_memory(memory: Any) -> None:
    instance("memory", memory, Memory, "start_memory makes one")
    _check(memory.weights)
    if not isinstance(memory.momentum, tuple | list):
        raise InvalidInput(f"memory: its momentum is {memory.momentum!r}, expected a matrix for each layer")
    namespace(
        **{"weights[0]": memory.weights[0]}, **{f"memory's momentum[{i}]": m for i, m in enumerate(memory.momentum)}
    )


def _check_start(memory: Any) -> None:
    """Check what a call starts from: its numbers, too, which later ones inside of a call may lose."""
    _check_memory(memory)
    for what, parts in (("weights", memory.weights), ("momentum", memory.momentum)):
        for i, x in enumerate(parts):
            numbers(f"memory's {what}[{i}]", x)


def _check_pairs(weights: Sequence[Any], key: Any, value: Any) -> None:
    _check(weights)
    namespace(**{"weights[0]": weights[0], "key": key, "value": value})
    axes("key", key, "n", weights[0].shape[0])
    axes("value", value, key.shape[0], weights[-1].shape[1])


def _sigmoid(xp: Any, x: Any) -> Any:
    e = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, 1 / (1 + e), e / (1 + e))


def _forward(weights: Sequence[Any], x: Any) -> tuple[list[Any], list[Any]]:
    """Return each layer's input and result: SiLU between layers."""
    inputs, results = [x], [x @ weights[0]]
    for w in weights[1:]:
        z = results[-1]
        inputs.append(z * _sigmoid(api.array_namespace(z), z))
        results.append(inputs[-1] @ w)
    return inputs, results


def read_memory(weights: Sequence[Any], query: Any) -> Any:
    """Return what a memory says of queries: ``query W`` of one matrix, ``silu(silu(query W_1) W_2) ..`` of more.

    Parameters
    ----------
    weights : sequence of (d_i, d_(i+1)) arrays
    query : (n, d_0) array

    Returns
    -------
    (n, d_last) array

    Raises
    ------
    InvalidInput
        Matrices that do not fit together or the queries.
    """
    _check(weights)
    namespace(**{"weights[0]": weights[0], "query": query})
    axes("query", query, "n", weights[0].shape[0])
    return _forward(weights, query)[1][-1]


def memory_loss(weights: Sequence[Any], key: Any, value: Any) -> Any:
    """Return ``|M(k) - v|²`` of each token, (n,): the sum over features (titans-pytorch takes the mean).

    Raises
    ------
    InvalidInput
        Shapes that do not fit together.
    """
    _check_pairs(weights, key, value)
    off = read_memory(weights, key) - value
    return (off * off).sum(-1)


def memory_gradient(weights: Sequence[Any], key: Any, value: Any) -> list[Any]:
    """Return the gradient of :func:`memory_loss` by each matrix, for each token apart: (n, d_i, d_(i+1)).

    Of one matrix W it is ``2 kᵀ (k W - v)``.

    Raises
    ------
    InvalidInput
        Shapes that do not fit together.
    """
    _check_pairs(weights, key, value)
    inputs, results = _forward(weights, key)
    back = 2 * (results[-1] - value)
    found = []
    for i in range(len(weights) - 1, -1, -1):
        found.append(inputs[i][:, :, None] * back[:, None, :])
        if i:
            z = results[i - 1]
            s = _sigmoid(api.array_namespace(z), z)
            back = (back @ weights[i].T) * (s * (1 + z * (1 - s)))
    return found[::-1]


def neural_memory(
    query: Any,
    key: Any,
    value: Any,
    memory: Memory,
    *,
    theta: Any,
    eta: Any,
    alpha: Any,
    chunk: int = 1,
    grad_at: str = "current",
) -> tuple[Any, Memory]:
    """Return what each query reads of a memory that has learnt its own token, and the memory after the last one.

    ``S_t = eta_t S_(t-1) - theta_t ∇loss(M; k_t, v_t)``, ``M_t = (1 - alpha_t) M_(t-1) + S_t``, ``out_t = M_t(q_t)``

    Parameters
    ----------
    query, key : (n, d_k) arrays
    value : (n, d_v) array
    memory : Memory
        Where it starts: :func:`start_memory`, or what an earlier call returned.
    theta, eta, alpha : (n,) arrays
        The step, what stays of the momentum, what is forgotten.
    chunk : int
        Tokens whose gradients are taken at one memory.
    grad_at : {"current", "initial"}
        "current" takes them at the memory before the chunk; with chunk = 1 that is the formula. "initial" takes all
        at the memory that came in, as titans-pytorch does where no batch size is set.

    Returns
    -------
    out : (n, d_v) array
    memory : Memory

    Raises
    ------
    InvalidInput
        Shapes that do not fit together, a memory that holds NaN, a chunk below 1, another `grad_at`.

    Notes
    -----
    Source: Behrouz et al., Titans, arXiv 2501.00663, eqs. 9-13 (a summary was read, and titans-pytorch 0.5.5, whose
    memory is compared with this one in `tests/peers`; `docs/peers.md` says what it means otherwise). The
    released GELU, norms and residual inside the memory are not here: pass keys and values as your block makes them.
    """
    _check_start(memory)
    return _taught(query, key, value, memory, theta=theta, eta=eta, alpha=alpha, chunk=chunk, grad_at=grad_at)


def _taught(
    query: Any,
    key: Any,
    value: Any,
    memory: Memory,
    *,
    theta: Any,
    eta: Any,
    alpha: Any,
    chunk: int = 1,
    grad_at: str = "current",
) -> tuple[Any, Memory]:
    """Return what :func:`neural_memory` does, of a memory whose numbers are not looked at."""
    _check_memory(memory)
    namespace(query=query, key=key, value=value, theta=theta, eta=eta, alpha=alpha, memory=memory.weights[0])
    if (speeds := [m.shape for m in memory.momentum]) != [w.shape for w in memory.weights]:
        shapes = ", ".join(str(tuple(w.shape)) for w in memory.weights)
        raise InvalidInput(f"memory: its momentum is {', '.join(map(str, map(tuple, speeds)))}, expected {shapes}")
    axes("key", key, "n", memory.weights[0].shape[0])
    axes("query", query, *key.shape)
    axes("value", value, key.shape[0], memory.weights[-1].shape[1])
    for name, x in (("theta", theta), ("eta", eta), ("alpha", alpha)):
        axes(name, x, key.shape[0])
    chunk = whole("chunk", chunk, 1)
    if grad_at not in ("current", "initial"):
        raise InvalidInput(f"grad_at: got {grad_at!r}, expected 'current' or 'initial'")
    weights, moving, out = list(memory.weights), list(memory.momentum), []
    for start in range(0, key.shape[0], chunk):
        here = slice(start, min(start + chunk, key.shape[0]))
        slopes = memory_gradient(memory.weights if grad_at == "initial" else weights, key[here], value[here])
        for i, t in enumerate(range(here.start, here.stop)):
            moving = [eta[t] * s - theta[t] * g[i] for s, g in zip(moving, slopes, strict=True)]
            weights = [(1 - alpha[t]) * w + s for w, s in zip(weights, moving, strict=True)]
            out.append(_forward(weights, query[t : t + 1])[1][-1])
    xp = api.array_namespace(key)
    return xp.concat(out, axis=0), Memory(tuple(weights), tuple(moving))


def _product(x: Any, m: Any) -> Any:
    """Return x times sigmoid of the memory's answer."""
    return x * _sigmoid(api.array_namespace(m), m)


def _attend(x: Any, before: int, window: int | None) -> Any:
    """Return causal softmax attention of tokens on themselves, whose first ones every token sees."""
    n = x.shape[0]
    i, j = np.arange(n)[:, None], np.arange(n)
    seen = (j <= i) & ((j < before) | (window is None) | (i - j < (window or 0)))
    p, _ = masked_softmax((x @ x.T) / x.shape[1] ** 0.5, as_index(seen, x))
    return p @ x


def memory_as_context(
    x: Any, memory: Memory, persistent: Any, *, segment: int, gate: Gate = _product, **gates: Any
) -> tuple[Any, Memory]:
    """Return Titans' memory as context: each segment attends to what the memory says of it, and then teaches it.

    A segment s of tokens becomes ``y = attend([persistent | M(s) | s])``, its own rows; the memory learns y; the
    result is ``gate(y, M(y))`` with the memory after it.

    Parameters
    ----------
    x : (n, d) array
        Tokens.
    memory : Memory
        Of width d on both sides.
    persistent : (p, d) array
        Tokens that are there for every segment; p may be 0.
    segment : int
        Tokens of a segment.
    gate : callable
        Joins (n, d) and (n, d): by default ``y sigmoid(m)``. The paper writes a product after norms and a
        non-linearity that it leaves open.
    **gates
        ``theta``, ``eta``, ``alpha`` (n,), and ``chunk`` and ``grad_at``, of :func:`neural_memory`.

    Raises
    ------
    InvalidInput
        Shapes that do not fit together, a memory that holds NaN.

    Notes
    -----
    Queries, keys and values are the tokens themselves: projections belong to the caller. Source: as
    :func:`neural_memory`, its section 4.1 by a summary.
    """
    _block(x, memory, persistent)
    for name in ("theta", "eta", "alpha"):
        namespace(**{"x": x, name: gates.get(name)})
        axes(name, gates[name], x.shape[0])
    xp, out, p = api.array_namespace(x), [], persistent.shape[0]
    for start in range(0, x.shape[0], whole("segment", segment, 1)):
        s = x[start : start + segment]
        context = xp.concat([persistent, read_memory(memory.weights, s), s], axis=0)
        y = _attend(context, p + s.shape[0], None)[p + s.shape[0] :]
        cut = {n: g[start : start + segment] if n in ("theta", "eta", "alpha") else g for n, g in gates.items()}
        _, memory = _taught(y, y, y, memory, **cut)
        out.append(gate(y, read_memory(memory.weights, y)))
    return xp.concat(out, axis=0), memory


def memory_as_gate(
    x: Any, memory: Memory, persistent: Any, *, window: int, gate: Gate = _product, **gates: Any
) -> tuple[Any, Memory]:
    """Return Titans' memory as gate: ``gate(attend([persistent | x]), M(x))``, attention in a sliding window.

    Parameters
    ----------
    x, memory, persistent, gate, **gates
        As in :func:`memory_as_context`.
    window : int
        Keys that a token sees, itself included; it sees the persistent ones besides.

    Raises
    ------
    InvalidInput
        Shapes that do not fit together, a memory that holds NaN.
    """
    _block(x, memory, persistent)
    xp, p = api.array_namespace(x), persistent.shape[0]
    y = _attend(xp.concat([persistent, x], axis=0), p, whole("window", window, 1))[p:]
    said, memory = neural_memory(x, x, x, memory, **gates)
    return gate(y, said), memory


def memory_as_layer(x: Any, memory: Memory, persistent: Any, *, window: int, **gates: Any) -> tuple[Any, Memory]:
    """Return Titans' memory as layer: ``attend(M([persistent | x]))`` in a sliding window, the rows of x.

    Parameters
    ----------
    x, memory, persistent, **gates
        As in :func:`memory_as_context`, but the gates have p + n numbers: the memory reads the persistent tokens, too.
    window : int
        As in :func:`memory_as_gate`.

    Raises
    ------
    InvalidInput
        Shapes that do not fit together, a memory that holds NaN.
    """
    _block(x, memory, persistent)
    p, all_tokens = persistent.shape[0], api.array_namespace(x).concat([persistent, x], axis=0)
    said, memory = neural_memory(all_tokens, all_tokens, all_tokens, memory, **gates)
    return _attend(said, p, whole("window", window, 1))[p:], memory


def _block(x: Any, memory: Memory, persistent: Any) -> None:
    _check_start(memory)
    namespace(x=x, persistent=persistent, memory=memory.weights[0])
    axes("x", x, "n", "d")
    if persistent.ndim != 2 or persistent.shape[1] != x.shape[1]:
        raise InvalidInput(f"persistent: shape is {tuple(persistent.shape)}, expected (p, {x.shape[1]})")
    if memory.weights[0].shape[0] != x.shape[1] or memory.weights[-1].shape[1] != x.shape[1]:
        ends = memory.weights[0].shape[0], memory.weights[-1].shape[1]
        raise InvalidInput(
            f"memory: goes from {ends[0]} to {ends[1]} features, expected x's {x.shape[1]} on both sides"
        )
