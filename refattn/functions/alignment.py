"""SSA: full and sparse attention trained side by side, each drawn towards the other."""

from __future__ import annotations

from typing import Any

from ..arrays import kind_of
from ..errors import InvalidInput
from .arguments import axes, namespace
from .probabilities import attended, causal_mask, probabilities

__all__ = ["ssa_alignment_loss", "ssa_step", "ssa_streams"]


def ssa_streams(
    query: Any, key: Any, value: Any, gate: Any, selected: Any, *, scale: float | None = None
) -> tuple[Any, Any]:
    """Return gated causal attention to all keys, and to the selected ones.

    ``full_i = g_i sum_{j <= i} p_ij v_j`` and ``sparse_i = g_i sum_{j <= i, selected} p'_ij v_j``, each with its own
    softmax.

    Parameters
    ----------
    query, key, value : (b, h_q, n_q, d), (b, h_kv, n_k, d), (b, h_kv, n_k, d_v) PyTorch tensors
    gate : (b, h_q, n_q, 1)
        A sigmoid's values, say.
    selected : (b, h_kv, n_q, n_k) bool
        A selection written out to keys, one for a group of heads; no gradient passes it. A row without keys gives 0.
    scale : float, optional
        None is 1/sqrt(d).

    Returns
    -------
    full, sparse : (b, h_q, n_q, d_v)

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: SSA, `zhenyi4/ssa`, whose `modeling_llama_nsa.py` was read: of NSA's three gates it uses the selection's.
    """
    import torch

    xp = attended(query, key, value)
    _torch(query=query, value=value, gate=gate, selected=selected)
    b, heads, n_q, _ = query.shape
    axes("gate", gate, b, heads, n_q, 1)
    axes("selected", selected, b, key.shape[1], n_q, key.shape[2])
    if selected.dtype != torch.bool:
        raise InvalidInput(f"selected: has type {selected.dtype}, expected torch.bool; compare it with something")
    seen = causal_mask(xp, n_q, key.shape[2], query)
    parts = (probabilities(xp, query, key, scale, x) for x in (seen, seen & selected[:, :, None]))
    full, sparse = (gate * (p @ value[:, :, None]).flatten(1, 2) for p in parts)
    return full, sparse


def ssa_alignment_loss(full: Any, sparse: Any) -> Any:
    """Return ``SmoothL1(full, sg(sparse)) + SmoothL1(sg(full), sparse)``, where sg stops the gradient.

    SmoothL1 is the mean of ``x^2 / 2`` for ``|x| < 1`` and ``|x| - 1/2`` beyond, x the difference.

    Parameters
    ----------
    full, sparse : PyTorch tensors of one shape

    Returns
    -------
    scalar tensor
        Twice SmoothL1(full, sparse) in value. Its gradients are ``clip(full - sparse, -1, 1) / size`` for `full`, and
        minus that for `sparse`. Keys that the selection drops have theirs by `full` alone.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: as :func:`ssa_streams`. The release averages over layers and adds ten times that to the task's loss.
    """
    from torch.nn.functional import smooth_l1_loss

    _torch(full=full, sparse=sparse)
    if full.shape != sparse.shape:
        raise InvalidInput(f"sparse: shape is {tuple(sparse.shape)}, expected full's {tuple(full.shape)}")
    return smooth_l1_loss(full, sparse.detach()) + smooth_l1_loss(sparse, full.detach())


def ssa_step(
    query: Any, key: Any, value: Any, gate: Any, selected: Any, *, stream: str, scale: float | None = None
) -> tuple[Any, Any]:
    """Return the stream that a layer hands on in a training step, and the layer's alignment loss.

    Parameters
    ----------
    query, key, value, gate, selected, scale
        As in :func:`ssa_streams`.
    stream : {"full", "sparse"}
        By a fair coin for each step, the same for all layers. The loss has both streams in any case.

    Returns
    -------
    out : (b, h_q, n_q, d_v)
    loss : scalar tensor
        Of :func:`ssa_alignment_loss`.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: as :func:`ssa_streams`.
    """
    if stream not in ("full", "sparse"):
        raise InvalidInput(f"stream: got {stream!r}, expected 'full' or 'sparse'")
    full, sparse = ssa_streams(query, key, value, gate, selected, scale=scale)
    return full if stream == "full" else sparse, ssa_alignment_loss(full, sparse)


def _torch(**arrays: Any) -> None:
    namespace(**arrays)
    name, x = next(iter(arrays.items()))
    if (kind := kind_of(x)) != "torch":
        raise InvalidInput(f"{name}: is an array of {kind}, expected a PyTorch tensor; use torch.from_numpy(x)")
