"""Binary codes of tokens by learned hashing, and attention that they make linear, as EcoFormer has them."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import InvalidInput
from .arguments import axes, instance, namespace, ordered, whole, within
from .clusters import normalised

__all__ = [
    "Hash",
    "code_attention",
    "code_weights",
    "hash_codes",
    "hash_loss",
    "kernel_features",
    "learn_hash",
    "linear_sums",
    "similarity_targets",
    "straight_through_sign",
]


class Hash(NamedTuple):
    """What makes a token's code."""

    anchors: Any
    """(h, m, d): tokens that others are compared with."""
    center: Any
    """(h, m): the mean of :func:`kernel_features` over the tokens that it was learned from."""
    planes: Any
    """(h, bits, m): a bit is the sign of a product with one."""


def code_weights(h: Any, g: Any) -> Any:
    """Return ``w_ij = h_i·g_j + bits + 1`` of codes (..., n, bits): at least 1 for codes of -1, 0 and 1."""
    _codes(h, g)
    return h @ g.mT + (h.shape[-1] + 1)


def linear_sums(h: Any, g: Any, value: Any, of_bias: Any) -> Any:
    """Return ``(h_i·(sum_j g_j v_j^T) + (bits + 1)·of_bias) / (h_i·(sum_j g_j) + n·(bits + 1))``, linear in n.

    With ``of_bias = sum_j v_j`` these are the means of values by :func:`code_weights`. Any numbers with a sum and a
    product will do, fractions too.
    """
    _codes(h, g)
    namespace(g=g, value=value, of_bias=of_bias)
    if value.ndim != g.ndim or tuple(value.shape[:-1]) != tuple(g.shape[:-1]):
        raise InvalidInput(
            f"value: shape is {tuple(value.shape)}, expected {tuple(g.shape[:-1])} before features, as g"
        )
    wanted = (*h.shape[:-1], value.shape[-1])
    if of_bias.ndim > len(wanted) or any(
        a not in (1, n) for a, n in zip(of_bias.shape[::-1], wanted[::-1], strict=False)
    ):
        raise InvalidInput(f"of_bias: shape is {tuple(of_bias.shape)}, expected one that spreads to {wanted}")
    bias = h.shape[-1] + 1
    return (h @ (g.mT @ value) + bias * of_bias) / (h @ g.sum(-2)[..., None] + bias * g.shape[-2])


def _codes(h: Any, g: Any) -> None:
    namespace(h=h, g=g)
    if h.ndim < 2 or g.ndim != h.ndim or tuple(g.shape[:-2]) != tuple(h.shape[:-2]) or g.shape[-1] != h.shape[-1]:
        raise InvalidInput(f"g: shape is {tuple(g.shape)}, expected that of h, {tuple(h.shape)}, but for the tokens")


def code_attention(query: Any, key: Any, value: Any, *, mode: str = "paper") -> Any:
    """Return attention with weights ``h_i·g_j + bits + 1`` of codes, by sums over j: linear in n.

    Parameters
    ----------
    query, key : (..., n_q, bits), (..., n, bits) float arrays of -1, 0 and 1
        The codes.
    value : (..., n, d_v) array
        Of the same type.
    mode : {"paper", "released"}
        The release adds ``(bits + 1)·v_i`` to the numerator in place of ``(bits + 1)·sum_j v_j``, so that its weights
        no longer sum to 1. It needs as many queries as keys.

    Returns
    -------
    (..., n_q, d_v) array

    Raises
    ------
    InvalidInput
        Which argument is wrong: codes of other numbers, other shapes.

    Notes
    -----
    Not causal. Error: that of sums of n terms in value's type. Source: Liu et al., EcoFormer (arXiv 2209.09004;
    recalled); public code was read.
    """
    xp = namespace(query=query, key=key, value=value)
    if mode not in ("paper", "released"):
        raise InvalidInput(f"mode: got {mode!r}, expected 'paper' or 'released'")
    if query.ndim < 2 or key.ndim != query.ndim or value.ndim != key.ndim:
        raise InvalidInput("query, key, value: expected as many axes each, (..., tokens, features)")
    lead = query.shape[:-2]
    axes("key", key, *lead, "tokens", query.shape[-1])
    axes("value", value, *key.shape[:-1], "features")
    for name, x in (("query", query), ("key", key)):
        if not xp.all((x == 0) | (abs(x) == 1)):
            raise InvalidInput(f"{name}: expected codes of -1, 0 and 1; else a weight may be below 1")
    if mode == "released":
        axes("query", query, *key.shape)
        return linear_sums(query, key, value, value)
    return linear_sums(query, key, value, xp.sum(value, axis=-2, keepdims=True))


def kernel_features(x: Any, anchors: Any) -> Any:
    """Return how near tokens are to anchors: ``kappa_a = exp(-|x - a|² / (2 s))``, s the mean squared distance.

    The mean runs over the tokens and anchors of a batch and head.

    Parameters
    ----------
    x : (b, h, n, d) array
        Tokens, of length 1 in the release.
    anchors : (h, m, d) array

    Returns
    -------
    (b, h, n, m) array
        All 1 where every token is every anchor.

    Raises
    ------
    InvalidInput
        Other shapes, or arrays of two libraries.

    Notes
    -----
    Source: EcoFormer's public code (read), which computes s anew for the tokens of every call.
    """
    xp = namespace(x=x, anchors=anchors)
    axes("x", x, "batch", "heads", "tokens", "features")
    axes("anchors", anchors, x.shape[1], "anchors", x.shape[3])
    square = xp.sum((x[..., None, :] - anchors[:, None]) ** 2, axis=-1)
    mean = xp.mean(square, axis=(-2, -1), keepdims=True)
    return xp.exp(-square / (2 * xp.where(mean == 0, xp.ones_like(mean), mean)))


def hash_codes(x: Any, learned: Hash) -> Any:
    """Return tokens' codes: the signs of ``planes·(kappa(x) - center)``; the sign of 0 is 0.

    Parameters
    ----------
    x : (b, h, n, d) array
    learned : Hash

    Returns
    -------
    (b, h, n, bits) array of -1, 0 and 1
    """
    return namespace(x=x).sign(_projected(x, learned))


def _projected(x: Any, learned: Hash) -> Any:
    instance("learned", learned, Hash, "learn_hash makes one")
    namespace(x=x, anchors=learned.anchors, center=learned.center, planes=learned.planes)
    features = kernel_features(x, learned.anchors)
    h, m = learned.anchors.shape[:2]
    axes("center", learned.center, h, m)
    axes("planes", learned.planes, h, "bits", m)
    return (features - learned.center[:, None]) @ learned.planes.mT


def straight_through_sign(x: Any) -> Any:
    """Return the sign of a PyTorch tensor, whose gradient is 1 where ``|x| < 1`` and else 0."""
    import torch

    _tensor("x", x)
    through = torch.where(x.abs() < 1, x, x.detach())
    return x.detach().sign() + (through - through.detach())


def _tensor(name: str, x: Any) -> None:
    import torch

    if not isinstance(x, torch.Tensor):
        raise InvalidInput(f"{name}: got {type(x).__name__}, expected a PyTorch tensor")
    if not x.is_floating_point():
        raise InvalidInput(f"{name}: holds {x.dtype}, expected floats; cast it")


def similarity_targets(x: Any, *, neighbours: int = 10) -> Any:
    """Return what codes shall say of pairs: 1 for a token's most similar tokens, -1 for its least, else 0.

    Parameters
    ----------
    x : (b, h, n, d) array
        Similar are tokens of a large product; a token is similar to itself. Equal ones: the lower index comes first.
    neighbours : int
        Of each kind, at most half of n.

    Returns
    -------
    (b, h, n, n) array
    """
    xp = namespace(x=x)
    axes("x", x, "batch", "heads", "tokens", "features")
    neighbours = whole("neighbours", neighbours, 1, max(x.shape[2] // 2, 1))
    ordered("x", x)
    products = x @ x.mT

    def rank(score: Any) -> Any:
        return xp.argsort(xp.argsort(score, axis=-1, stable=True), axis=-1)

    most, least = (xp.astype(rank(s) < neighbours, x.dtype) for s in (-products, products))
    return xp.where(most > 0, most, -least)


def hash_loss(y: Any, target: Any, *, bits: int) -> Any:
    """Return ``-y^T S y / (n·bits)``, its mean over batch and heads: small where a bit agrees with the target.

    Parameters
    ----------
    y : (b, h, n) array
        A bit of each token, or a smooth stand-in.
    target : (b, h, n, n) array
    bits : int
    """
    xp = namespace(y=y, target=target)
    axes("y", y, "batch", "heads", "tokens")
    axes("target", target, *y.shape, y.shape[2])
    products = xp.sum((target @ y[..., None])[..., 0] * y, axis=-1)
    return -xp.mean(products) / (y.shape[2] * whole("bits", bits, 1))


def learn_hash(
    x: Any,
    generator: Any,
    *,
    bits: int = 16,
    anchors: int = 25,
    neighbours: int = 10,
    steps: int = 100,
    rate: float = 5e-4,
    momentum: float = 0.9,
) -> Hash:
    """Return a hash learned from tokens, bit by bit, as EcoFormer's first forward pass learns it.

    Anchors are random tokens of the first batch item. The target is ``bits·S`` of :func:`similarity_targets`. For each
    bit, SGD with Nesterov's momentum lowers :func:`hash_loss` of ``y = 2·sigmoid(a·kappa) - 1`` from a random plane a.
    The new plane is kept where it lowers the loss of the hard bits, summed over all heads; else the random one is. Then
    ``y y^T`` of the kept hard bits is subtracted from the target.

    Parameters
    ----------
    x : (b, h, n, d) PyTorch tensor
        Tokens; they are brought to length 1.
    generator : torch.Generator
        Draws anchors and planes.
    bits, anchors, neighbours, steps : int
    rate, momentum : float
        Of the descent.

    Returns
    -------
    Hash
        Of x's type and device, without gradients.

    Raises
    ------
    InvalidInput
        Which argument is wrong.

    Notes
    -----
    Source: Liu et al., EcoFormer (arXiv 2209.09004; recalled); public code was read.
    """
    import torch

    _tensor("x", x)
    axes("x", x, "batch", "heads", "tokens", "features")
    instance("generator", generator, torch.Generator, "use torch.Generator().manual_seed(seed)")
    bits, steps = whole("bits", bits, 1), whole("steps", steps, 0)
    anchors = whole("anchors", anchors, 1, x.shape[2])
    x = normalised(x.detach())
    chosen = torch.randperm(x.shape[2], generator=generator, device=generator.device)[:anchors].to(x.device)
    fixed = x[0][:, chosen]
    features = kernel_features(x, fixed)
    center = features.mean((0, 2))
    features = features - center[:, None]
    target = similarity_targets(x, neighbours=neighbours) * bits
    shape = (x.shape[1], bits, anchors)
    planes = torch.randn(shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
    descent = {"lr": within("rate", rate, 0, float("inf")), "momentum": within("momentum", momentum, 0, 1)}
    for r in range(bits):
        new = planes[:, r].clone().requires_grad_()
        optimiser = torch.optim.SGD([new], **descent, nesterov=descent["momentum"] > 0)
        for _ in range(steps):
            optimiser.zero_grad()
            soft = 2 * torch.sigmoid((features @ new[..., None])[..., 0]) - 1
            hash_loss(soft, target, bits=bits).backward()
            optimiser.step()
        old, hard = ((features @ a.detach()[..., None])[..., 0] for a in (planes[:, r], new))
        old, hard = (torch.where(y > 0, 1.0, -1.0).to(x.dtype) for y in (old, hard))
        if hash_loss(hard, target, bits=bits) < hash_loss(old, target, bits=bits):
            planes[:, r], old = new.detach(), hard
        target = target - old[..., :, None] * old[..., None, :]
    return Hash(fixed, center, planes)
