"""Multiplications and additions of attention, exact and approximate, of one head, and their energy."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ...errors import InvalidInput
from ..arguments import flag, real, whole

__all__ = [
    "ADD",
    "MULTIPLY",
    "Operations",
    "combiner_axial",
    "combiner_fixed",
    "combiner_logsparse",
    "ecoformer_operations",
    "moba_operations",
    "routing_operations",
    "softmax_operations",
    "window_operations",
]

MULTIPLY, ADD = Fraction(37, 10), Fraction(9, 10)
"""Picojoules of a float32 operation at 45 nm, as EcoFormer quotes them (recalled)."""


@dataclass(frozen=True)
class Operations:
    """Operations of a head's products. Exponentials, sums of weights and divisions are left out.

    Attributes
    ----------
    multiplies, adds : int
        How many of each; a subtraction is an addition.
    """

    multiplies: int
    adds: int

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.multiplies + other.multiplies, self.adds + other.adds)

    def energy(self, multiply: Any = MULTIPLY, add: Any = ADD) -> Any:
        """Return the energy, in the unit of the prices; exact for fractions, which the default picojoules are.

        Parameters
        ----------
        multiply, add : number
            What one operation takes.

        Raises
        ------
        InvalidInput
            A price below 0.
        """
        return self.multiplies * real("multiply", multiply, 0) + self.adds * real("add", add, 0)


def _dots(count: int, length: int) -> Operations:
    """Return the operations of so many products of two vectors."""
    return Operations(count * length, count * (length - 1))


def _attended(weights: int, rows: int, d: int) -> Operations:
    """Return the operations of so many scores of d features, and of their rows' weighted sums of values."""
    return _dots(weights, d) + Operations(weights * d, (weights - rows) * d)


def softmax_operations(n: int, d: int) -> Operations:
    """Return the operations of QKᵀ and PV: 2n²d multiplications.

    Parameters
    ----------
    n, d : int
        Tokens (as many queries as keys), features.

    Raises
    ------
    InvalidInput
        A size below 1.
    """
    n, d = whole("n", n, 1), whole("d", d, 1)
    return _attended(n * n, n, d)


def ecoformer_operations(n: int, d: int, bits: int, *, anchors: int | None = 25, shared: bool = True) -> Operations:
    """Return the operations of EcoFormer's attention with codes of ±1, hashing included.

    Hashing: per token exp(-‖x - a‖²/2σ²) for each of m anchors less its mean, then b products with m weights. Then
    products with codes are additions: sums over tokens of code × value, value and code, and each row's code times them.
    The bias b + 1 is multiplied with d sums once. Normalising q and k, the rows' denominators' bias and all divisions
    are left out.

    Parameters
    ----------
    n, d : int
        Tokens (as many queries as keys), features.
    bits : int
        b, of a code.
    anchors : int, optional
        m. None: a bit is the sign of a product of the token itself with d weights.
    shared : bool
        Whether q and k are one and hashed once, as in the paper.

    Raises
    ------
    InvalidInput
        A size below 1.

    Source: Liu et al., EcoFormer (arXiv 2209.09004); its public code was read.
    """
    n, d, bits = whole("n", n, 1), whole("d", d, 1), whole("bits", bits, 1)
    tokens = n if flag("shared", shared) else 2 * n
    if anchors is None:
        hashing = _dots(tokens * bits, d)
    else:
        m = whole("anchors", anchors, 1)
        # d differences and their squares' sum, its factor, less the mean
        kernel = _dots(tokens * m, d) + Operations(tokens * m, tokens * m * (d + 1))
        hashing = kernel + _dots(tokens * bits, m)
    sums = (n - 1) * (bits * d + d + bits)
    rows = n * (bits * d + bits)
    return hashing + Operations(d, sums + rows)


def routing_operations(n: int, d: int, clusters: int, window: int | None = None, *, shared: bool = False) -> Operations:
    """Return the operations of routing attention: of order nkd + n²d/k, least near k = sqrt(n) clusters.

    Every query and every key times every cluster's mean, 2nkd; then attention of w queries and w keys in each cluster,
    2kw²d. The average over memberships is left out. Without a causal mask.

    Parameters
    ----------
    n, d : int
        Tokens (as many queries as keys), features.
    clusters : int
        k.
    window : int, optional
        w, the queries and keys that a cluster takes; ceil(n/k) by default.
    shared : bool
        Whether q and k are one, and assigned once.

    Raises
    ------
    InvalidInput
        A size below 1, a window of more than n.

    Source: Roy et al., Routing Transformer; the public code of the package `routing_transformer` was read.
    """
    n, d, clusters = whole("n", n, 1), whole("d", d, 1), whole("clusters", clusters, 1)
    window = -(-n // clusters) if window is None else whole("window", window, 1, n)
    assigned = _dots((n if flag("shared", shared) else 2 * n) * clusters, d)
    return assigned + _attended(clusters * window**2, clusters * window, d)


def combiner_fixed(n: int, d: int, block: int) -> Operations:
    """Return the operations of causal Combiner-fixed: d·(n(b + n/b) + 2(n - b)) multiplications.

    A token weighs (b + 1)/2 tokens of its own block and (n/b - 1)/2 earlier blocks on average; all blocks but the last
    are summarised by b weights.

    Parameters
    ----------
    n, d : int
        Tokens, features.
    block : int
        b, which divides n.

    Raises
    ------
    InvalidInput
        A size below 1, a block that does not divide n.

    Source: Ren et al., Combiner (arXiv 2107.05768); the released JAX code was read.
    """
    n, d, block = whole("n", n, 1), whole("d", d, 1), whole("block", block, 1)
    if n % block:
        raise InvalidInput(f"block: got {block}, which must divide n, {n}; pad n or take another block")
    blocks = n // block
    return _attended(n * (block + blocks) // 2, n, d) + _attended(n - block, blocks - 1, d)


def combiner_logsparse(n: int, d: int) -> Operations:
    """Return the operations of causal Combiner-logsparse: n + (sum of ones in binary of i < n) weights, and summaries.

    Token i weighs itself and the spans of [0, i) of 2ˡ tokens for each bit l of i: n·log₂(n)/2 spans where n is a
    power of two. Spans of two and more tokens that some token weighs are summarised by 2ˡ weights each.

    Parameters
    ----------
    n, d : int
        Tokens, features.

    Raises
    ------
    InvalidInput
        A size below 1.

    Source: Ren et al., Combiner (arXiv 2107.05768); the released JAX code was read.
    """
    n, d = whole("n", n, 1), whole("d", d, 1)
    weights = n + sum(i.bit_count() for i in range(n))
    # at level l the spans are every other one, and the last begins one before a token n - 1 at most
    spans = {2**level: ((n - 1 >> level) + 1) // 2 for level in range(1, n.bit_length())}
    summed = sum(size * count for size, count in spans.items())
    return _attended(weights, n, d) + _attended(summed, sum(spans.values()), d)


def combiner_axial(rows: int, columns: int, d: int) -> Operations:
    """Return the operations of causal Combiner-axial, the mixture, on a grid of tokens row by row.

    Token (r, c) weighs the r above it and the c + 1 of its row up to itself. It weighs summaries besides: for r > 0 one
    of each other column's tokens above; of each row above one of the tokens on the left, for c > 0, and one of those on
    the right, for c < C - 1. A summary is attention by the largest features so far, down a column, along a row to the
    right or to the left; those that no token weighs are left out. The released code computes masked weights as well.

    Parameters
    ----------
    rows, columns : int
        R and C, of n = R·C tokens.
    d : int
        Features.

    Raises
    ------
    InvalidInput
        A size below 1.

    Source: Ren et al., Combiner (arXiv 2107.05768); the released JAX code was read.
    """
    r, c, d = whole("rows", rows, 1), whole("columns", columns, 1), whole("d", d, 1)
    above, along = r * (r - 1) // 2, c * (c - 1) // 2
    weights = c * above + r * (along + c) + (r - 1) * c * (c - 1) + 2 * (c - 1) * above
    down = _attended(c * above, c * (r - 1), d) if c > 1 else Operations(0, 0)
    side = _attended((r - 1) * along, (r - 1) * (c - 1), d)
    return _attended(weights, r * c, d) + down + side + side


def window_operations(n: int, d: int, left: int, right: int = 0) -> Operations:
    """Return the operations of a sliding window: token i sees the keys from i - left to i + right.

    Parameters
    ----------
    n, d : int
        Tokens (as many queries as keys), features.
    left, right : int
        Keys before and after a token's own; 0 on the right is causal.

    Raises
    ------
    InvalidInput
        A size below 1, a window below 0.
    """
    n, d = whole("n", n, 1), whole("d", d, 1)
    sides = [min(whole(name, x, 0), n - 1) for name, x in (("left", left), ("right", right))]
    weights = n + sum(n * side - side * (side + 1) // 2 for side in sides)
    return _attended(weights, n, d)


def moba_operations(n: int, d: int, block: int, chosen: int) -> Operations:
    """Return the operations of causal MoBA: a product with each earlier block's mean, attention to the chosen blocks.

    Token i of block r = floor(i/b) has r gates and weighs i - rb + 1 tokens of its own block and b in each of
    min(k - 1, r) others. The means are additions of whole blocks that are earlier for a token; their division by b is
    left out.

    Parameters
    ----------
    n, d : int
        Tokens (as many queries as keys), features.
    block : int
        b, tokens of a block; the last may have fewer.
    chosen : int
        k, how many blocks are read, the own one among them.

    Raises
    ------
    InvalidInput
        A size below 1.

    Source: Lu et al., MoBA (`moba_naive.py` of the released code was read).
    """
    sizes_of = {"n": n, "d": d, "block": block, "chosen": chosen}
    n, d, block, chosen = (whole(name, x, 1) for name, x in sizes_of.items())
    sizes = [min(block, n - start) for start in range(0, n, block)]
    gates = sum(r * size for r, size in enumerate(sizes))
    own = sum(size * (size + 1) // 2 for size in sizes)
    others = sum(min(chosen - 1, r) * size * block for r, size in enumerate(sizes))
    means = Operations(0, (len(sizes) - 1) * (block - 1) * d)
    return means + _dots(gates, d) + _attended(own + others, n, d)
