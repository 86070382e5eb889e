"""Words that attention moves between a slow memory and a fast one of M words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from ...errors import InvalidInput
from ..arguments import axes, flag, namespace, real, whole

__all__ = [
    "Words",
    "block_sparse_io",
    "flash_io",
    "flash_tile",
    "hbm_bytes",
    "square_tiles_io",
    "standard_io",
    "triple_io",
    "triple_tile",
]

Rule = Literal["paper", "fits"]


@dataclass(frozen=True)
class Words:
    """Words of one head that are read from slow memory and written to it.

    Attributes
    ----------
    forward, backward : int
        Of the two passes. A density that is no whole number makes them fractions or floats; backward is None where only
        the forward pass's tile fits.
    """

    forward: Any
    backward: Any


def _enough(memory: int, least: int, holds: str) -> None:
    if memory < least:
        raise InvalidInput(f"memory: got {memory} words, expected at least {least}: {holds}; give more, or a smaller d")


def flash_tile(d: int, memory: int, *, rule: Rule = "paper", backward: bool = False) -> tuple[int, int]:
    """Return the rows and the keys of FlashAttention's tile.

    By the paper's rule they are min(ceil(M/4d), d) and ceil(M/4d), in both passes. Such a tile with its scores is
    larger than M. By the rule "fits" they are the most keys c with r = min(c, d) rows of which all fit:
    2rd + 2cd + rc + 4r <= M in the forward pass (q, out; k, v; scores; two numbers a row, old and new), and
    3rd + 4cd + 2rc + 2r <= M in the backward one (q, dout, dq; k, v, dk, dv; P and dS; lse and delta).

    Parameters
    ----------
    d : int
        Features of a query, a key and a value.
    memory : int
        M, words of fast memory.
    rule : "paper" or "fits"
        See above.
    backward : bool
        Of which pass the tile is.

    Raises
    ------
    InvalidInput
        A size below 1, or too little memory for a tile of one row and one key: below 4d by the paper's rule, 5d + 4
        or 7d + 4 where the tile has to fit.

    Source: Dao et al., FlashAttention (arXiv 2205.14135), algorithm 1. Recalled; the rule "fits" is derived here.
    """
    d, memory = whole("d", d, 1), whole("memory", memory, 1)
    flag("backward", backward)
    if rule not in ("paper", "fits"):
        raise InvalidInput(f"rule: got {rule!r}, expected 'paper' or 'fits'")
    if rule == "paper":
        _enough(memory, 4 * d, "a row each of q, k, v and out")
        columns = -(-memory // (4 * d))
    elif backward:
        _enough(memory, 7 * d + 4, "a row each of q, k, v, dout, dq, dk and dv, two weights, two numbers")
        # c rows: 7dc + 2c² + 2c; d of them: 6dc + 3d² + 2d
        small = memory < d * (9 * d + 2)
        root = math.isqrt((7 * d + 2) ** 2 + 8 * memory)
        columns = (root - 7 * d - 2) // 4 if small else (memory - 3 * d * d - 2 * d) // (6 * d)
    else:
        _enough(memory, 5 * d + 4, "a row each of q, k, v and out, a score, four numbers")
        # c rows: 4dc + c² + 4c; d of them: 3dc + 2d² + 4d
        small = memory < d * (5 * d + 4)
        root = math.isqrt((2 * d + 2) ** 2 + memory)
        columns = root - 2 * d - 2 if small else (memory - 2 * d * d - 4 * d) // (3 * d)
    return min(columns, d), columns


def _moved(n: int, d: int, keys: Any, rows: Any, rows_backward: Any) -> Words:
    """Return the words of tiles: of keys that are read at all, and of rows, counted once a tile of keys."""
    forward = 2 * d * keys + rows * (3 * d + 4)
    return Words(forward, 2 * n * d + n + 4 * d * keys + rows_backward * (4 * d + 2))


def flash_io(n: int, d: int, memory: int, *, rule: Rule = "paper", density: Any = 1) -> Words:
    """Return the words that FlashAttention moves, keys in the outer loop.

    Forward: k and v once, and for each of the T = ceil(n/c) tiles of keys q once, out, maximum and sum twice:
    2nd + T·n·(3d + 4), of order n²d²/M. Backward: delta = rowsum(dout·out) first, 2nd + n; then k, v, dk, dv once, and
    for each tile of keys q, dout, lse, delta once and dq twice: 6nd + n + T·n·(4d + 2). What is written to begin with
    (zeros) is not counted. With a block mask of density s the sums over tiles are s times as large; that is the count
    where row tiles divide n and every tile of keys is needed, and `block_sparse_io` counts any mask.

    Parameters
    ----------
    n, d : int
        Tokens (as many queries as keys), features.
    memory : int
        M, words of fast memory.
    rule : "paper" or "fits"
        Of `flash_tile`.
    density : number in [0, 1]
        s, the share of blocks that are computed.

    Raises
    ------
    InvalidInput
        A size below 1, a density outside [0, 1], too little memory for a tile.

    Source: Dao et al., FlashAttention (arXiv 2205.14135), algorithms 1 and 4, recalled; a pass of its own for delta is
    chosen here, and constants are derived here, from the loops.
    """
    n, density = whole("n", n, 1), real("density", density, 0, 1)
    rows = n * -(-n // flash_tile(d, memory, rule=rule)[1]) * density
    if rule == "fits" and memory < 7 * d + 4:
        return Words(_moved(n, d, n, rows, 0).forward, None)
    return _moved(n, d, n, rows, n * -(-n // flash_tile(d, memory, rule=rule, backward=True)[1]) * density)


def block_sparse_io(blocks: Any, n: int, d: int, tile: tuple[int, int] = (16, 256)) -> Words:
    """Return the words that block-sparse FlashAttention moves with a block mask, exactly.

    As `flash_io`, but only for computed blocks, and only for keys that one of them reads. The last tiles may be short.

    Parameters
    ----------
    blocks : (ceil(n / rows), ceil(n / keys)) bool array
        Which blocks are computed.
    n, d : int
        Tokens (as many queries as keys), features.
    tile : (int, int)
        Rows and keys of a block; the default is that of the first release.

    Raises
    ------
    InvalidInput
        A size below 1, an array that is not boolean or has another shape.

    Source: Dao et al., FlashAttention (arXiv 2205.14135), algorithm 5; recalled. The block size was read in the code.
    """
    n, d = whole("n", n, 1), whole("d", d, 1)
    if not isinstance(tile, tuple | list) or len(tile) != 2:
        raise InvalidInput(f"tile: got {tile!r}, expected rows and keys of a block, such as (16, 256)")
    rows, columns = (whole(f"tile[{i}]", x, 1) for i, x in enumerate(tile))
    xp = namespace(blocks=blocks)
    if not xp.isdtype(blocks.dtype, "bool"):
        raise InvalidInput(f"blocks: got {blocks.dtype}, expected bool; compare with 0")
    axes("blocks", blocks, -(-n // rows), -(-n // columns))
    read, visited = xp.any(blocks, axis=0), xp.sum(xp.astype(blocks, xp.int32), axis=1)
    keys = sum(min(columns, n - j * columns) for j in range(read.shape[0]) if bool(read[j]))
    lines = sum(min(rows, n - i * rows) * int(visited[i]) for i in range(visited.shape[0]))
    return _moved(n, d, keys, lines, lines)


def standard_io(n: int, d: int) -> Words:
    """Return the words that attention moves at least which writes its scores and weights.

    Forward: S = QKᵀ, P = softmax(S), out = PV, each step with its operands read once and its result written once:
    4nd + 4n². Backward: dV, dP, dS, dQ, dK in the same way: 8nd + 7n². Each step may hold all that it reads; with less
    memory its products move more, see `square_tiles_io`.

    Parameters
    ----------
    n, d : int
        Tokens (as many queries as keys), features.

    Raises
    ------
    InvalidInput
        A size below 1.

    Source: Dao et al., FlashAttention (arXiv 2205.14135), algorithms 0 and 3; recalled.
    """
    n, d = whole("n", n, 1), whole("d", d, 1)
    return Words(4 * n * d + 4 * n * n, 8 * n * d + 7 * n * n)


def square_tiles_io(n: int, d: int, memory: int) -> int:
    """Return the words of standard attention's forward pass with products in square tiles.

    A tile is of b × b numbers, 3b² + 2b <= M. QKᵀ reads 2nd·ceil(n/b) and writes n². A pass for the rows' maxima and
    sums reads n² and writes 2n. PV reads weights, n²·ceil(d/b), with two numbers a row each time, and values,
    nd·ceil(n/b), and writes nd.

    Parameters
    ----------
    n, d : int
        Tokens (as many queries as keys), features.
    memory : int
        M, words of fast memory.

    Raises
    ------
    InvalidInput
        A size below 1, less memory than 5 words.

    Source: derived here, from the loop; the product below d² is that of Saha and Ye (arXiv 2402.07443), recalled.
    """
    n, d, memory = whole("n", n, 1), whole("d", d, 1), whole("memory", memory, 1)
    _enough(memory, 5, "three numbers of a product, two of a row")
    b = (math.isqrt(1 + 3 * memory) - 1) // 3
    tiles, across = -(-n // b), -(-d // b)
    scores = 2 * n * d * tiles + n * n
    sums = n * n + 2 * n
    return scores + sums + n * n * across + 2 * n * across * tiles + n * d * tiles + n * d


def hbm_bytes(batch: int, heads: int, heads_kv: int, n_q: int, n_k: int, d: int, item: int = 2) -> int:
    """Return the bytes that an attention kernel moves which reads its inputs once: q, k, v, out and float32 lse.

    Parameters
    ----------
    batch, heads, heads_kv, n_q, n_k, d : int
        The call's shape.
    item : int
        Bytes of a number of q, k, v and out.

    Raises
    ------
    InvalidInput
        A size below 1.
    """
    sizes = {"batch": batch, "heads": heads, "heads_kv": heads_kv, "n_q": n_q, "n_k": n_k, "d": d, "item": item}
    batch, heads, heads_kv, n_q, n_k, d, item = (whole(name, x, 1) for name, x in sizes.items())
    return batch * (item * d * (2 * heads * n_q + 2 * heads_kv * n_k) + 4 * heads * n_q)


def triple_tile(d: int, memory: int) -> int:
    """Return the most rows and keys b of triple-wise attention's tile that fit: b² + (6d + 4)b + 2d <= M.

    Parameters
    ----------
    d : int
        Features.
    memory : int
        M, words of fast memory.

    Raises
    ------
    InvalidInput
        A size below 1, less memory than 8d + 5 words.
    """
    d, memory = whole("d", d, 1), whole("memory", memory, 1)
    _enough(memory, 8 * d + 5, "a row and a key k1 with its sums, a pair k2 and v2")
    return math.isqrt((3 * d + 2) ** 2 + memory - 2 * d) - 3 * d - 2


def triple_io(n: int, d: int, memory: int) -> int:
    """Return the words of triple-wise attention by tiles of b rows and b keys k1, k2 and v2 one by one.

    2nd(1 + T + T²) with T = ceil(n/b) and b of `triple_tile`: of order n³d/M for M above d², n³d³/M² below.

    Parameters
    ----------
    n, d : int
        Tokens (as many queries as keys of each kind), features.
    memory : int
        M, words of fast memory.

    Raises
    ------
    InvalidInput
        A size below 1, less memory than 8d + 5 words.

    Source: derived here, from the loop.
    """
    n, tile = whole("n", n, 1), triple_tile(d, memory)
    tiles = -(-n // tile)
    return 2 * n * d * (1 + tiles + tiles**2)
