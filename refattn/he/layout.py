"""Where features, keys and queries lie in the slots of a ciphertext.

A slot is (g, j, column): j a key, column a query of a head, g a group of features; the column runs fastest. A slot
holds two features, as a complex number. With R ciphertexts and G groups, ciphertext r holds in row J = g·L + j the pair
of features f(J + r), f(J) = (J // L)·R + J mod R (J modulo G·L): so rotations by whole rows bring the right features to
the right keys wherever they wrap around, and nothing has to be masked out.

Keys that do not fit beside all queries come in spans of L. What adds up keys is done for all spans at once, and so is
the division: few columns in many blocks take more of both, but blocks can be computed apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedProblem

__all__ = ["BatchLayout", "Layout", "layouts_for", "token_layouts"]

Float = NDArray[np.float64]
Complex = NDArray[np.complex128]


@dataclass(frozen=True)
class Layout:
    """A layout.

    Attributes
    ----------
    slots : int
        Slots of a ciphertext.
    keys : int
        Keys, filled up to a power of 2.
    columns : int
        Columns of a block: queries of one head, or all queries of several heads.
    groups, parts : int
        G groups in a ciphertext times R ciphertexts: pairs of features.
    queries : int
        Queries of a head, filled up to a power of 2.
    heads : int
        Heads in all.
    compact : bool
        The queries come once, and the server turns them: half the upload for more rotations.
    spans : int
        How many spans the keys come in.
    """

    slots: int
    keys: int
    columns: int
    groups: int
    parts: int
    queries: int
    heads: int
    compact: bool = False
    spans: int = 1

    @property
    def rows(self) -> int:
        """L: keys in a ciphertext."""
        return self.keys // self.spans

    @property
    def pairs(self) -> int:
        """Pairs of features, or of outputs, that are carried."""
        return self.groups * self.parts

    @property
    def query_parts(self) -> int:
        """Ciphertexts of a block's queries."""
        return 1 if self.compact else self.parts

    @property
    def shared_parts(self) -> int:
        """Ciphertexts of keys, and as many of values, that the blocks of the same heads share: span by span."""
        return self.spans * self.parts

    @property
    def outs(self) -> int:
        """Ciphertexts of a block's result."""
        return 1

    @property
    def baby(self) -> int:
        """Ciphertexts to a giant step of the product with the values.

        Every span takes the baby steps; a giant step is of all spans, and takes about 1.7 key switches for its rotation
        and its sum's relinearisation.
        """
        every = _powers(1, 2 * self.parts)
        return min(every, key=lambda b: self.spans * (b - 1) + 1.7 * self.parts / b + len(_powers(b, self.rows)))

    @property
    def blocks_per_head(self) -> int:
        """Blocks that a head's queries take; 1 where a block holds several heads."""
        return max(1, self.queries // self.columns)

    @property
    def heads_per_block(self) -> int:
        """Heads in a block."""
        return max(1, self.columns // self.queries)

    def blocks(self) -> list[tuple[int, int]]:
        """Return (first head, first query) of each block."""
        firsts = range(0, self.heads, self.heads_per_block)
        return [(h, i * self.columns) for h in firsts for i in range(self.blocks_per_head)]

    def group_steps(self) -> list[int]:
        """Return the rotations that add up groups of features."""
        return [g * self.rows * self.columns for g in _powers(1, self.groups)]

    def key_steps(self) -> list[int]:
        """Return the rotations that add up all keys, of sums over the neighbours that baby steps bring."""
        return [j * self.columns for j in _powers(self.baby, self.rows)]

    def value_steps(self) -> list[int]:
        """Return the rotations that add up every `parts`-th key."""
        return [j * self.columns for j in _powers(self.parts, self.rows)]

    def _pairs(self, shift: int) -> NDArray[np.int64]:
        """Return f(J + shift) for every row J."""
        rows = self.groups * self.rows
        j = (np.arange(rows) + shift) % rows
        return j // self.rows * self.parts + j % self.parts

    def _columns(self, block: tuple[int, int]) -> list[tuple[int, int]]:
        """Return (head, query) of each column of a block; heads past the last repeat it."""
        head, query = block
        if self.heads_per_block == 1:
            return [(head, query + c) for c in range(self.columns)]
        return [(min(head + c // self.queries, self.heads - 1), c % self.queries) for c in range(self.columns)]

    def _tiled(self, x: Any) -> Complex:
        """Return rows and columns as slots, repeated until they are full: rotations then stay cyclic."""
        return np.tile(x.ravel(), self.slots // x.size)

    def query_slots(self, q: Float, seen: NDArray[np.bool_], block: tuple[int, int]) -> list[Complex]:
        """Return the ciphertexts' slots of a block's queries.

        Parameters
        ----------
        q : (heads, queries, pairs·2) array
            Filled up with zeros.
        seen : (heads, queries, keys) bool array
            Where a head's queries need several blocks, which share the keys, a query is 0 at the keys that it does not
            see: the mask costs nothing. Else the keys are.
        block : (head, query)
            Its first ones.
        """
        z = (q[..., 0::2] + 1j * q[..., 1::2]) / 2
        heads, rows = (np.array(x) for x in zip(*self._columns(block), strict=True))
        mask = 1 if self.compact or self.blocks_per_head == 1 else self._mask(seen, block, 0)
        return [self._tiled(z[heads, rows][:, self._pairs(r)].T * mask) for r in range(self.query_parts)]

    def _mask(self, seen: NDArray[np.bool_], block: tuple[int, int], span: int) -> NDArray[np.bool_]:
        heads, rows = (np.array(x) for x in zip(*self._columns(block), strict=True))
        of_span = slice(span * self.rows, (span + 1) * self.rows)
        return np.tile(seen[heads, rows, of_span].T, (self.groups, 1))

    def key_slots(
        self, k: Float, seen: NDArray[np.bool_], block: tuple[int, int], spans: Iterable[int] | None = None
    ) -> list[Complex]:
        """Return the slots of the keys of a block's heads, of all spans or some; k is (heads, keys, pairs·2).

        Where the queries come once, the keys are turned ahead by their giant steps.

        Raises
        ------
        UnsupportedProblem
            The queries come once, a key is hidden, and a head's queries need several blocks, which share the keys.
        """
        z = k[..., 0::2] - 1j * k[..., 1::2]
        masked = self.blocks_per_head == 1
        if self.compact and not masked and not seen.all():
            raise UnsupportedProblem("he: upload='compact' takes no masks where a head's queries need several blocks")
        found = []
        for span in range(self.spans) if spans is None else spans:
            mask = self._tiled(self._mask(seen, block, span) + 0j) if masked else 1
            for r in range(self.parts):
                turn = r // self.baby * self.baby * self.columns if self.compact else 0
                found.append(np.roll(self._of_keys(z, r, block, span) * mask, turn))
        return found

    def value_slots(
        self, v: Float, block: tuple[int, int], spans: Iterable[int] | None = None,
        seen: NDArray[np.bool_] | None = None,
    ) -> list[Complex]:  # fmt: skip
        """Return the slots of the values, of all spans or some, turned ahead by their baby steps.

        With `seen`, where a block has whole heads, a value that a query does not see is 0 for that query.
        """
        z = v[..., 0::2] + 1j * v[..., 1::2]
        turns = [r % self.baby * self.columns for r in range(self.parts)]
        found = []
        for span in range(self.spans) if spans is None else spans:
            mask = 1 if seen is None else self._tiled(self._mask(seen, block, span) + 0j)
            found += [np.roll(self._of_keys(z, r, block, span) * mask, turn) for r, turn in enumerate(turns)]
        return found

    def _of_keys(self, z: Complex, r: int, block: tuple[int, int], span: int) -> Complex:
        heads = np.array([h for h, _ in self._columns(block)])
        j = span * self.rows + np.arange(self.groups * self.rows) % self.rows
        return self._tiled(z[heads[None, :], j[:, None], self._pairs(r)[:, None]])

    def read(self, slots: list[Complex], out: Complex, block: tuple[int, int]) -> None:
        """Put a block's result into out, (heads, queries, pairs) complex: two outputs a number."""
        rows = slots[0][: self.groups * self.rows * self.columns].reshape(-1, self.columns)
        pairs = np.arange(self.groups * self.parts)
        found = rows[pairs // self.parts * self.rows + pairs % self.parts]
        for c, (head, query) in enumerate(self._columns(block)):
            out[head, query] = found[:, c]


@dataclass(frozen=True)
class BatchLayout:
    """A slot is a head of an input: every pair of features of every row is a ciphertext of its own, a block a query.

    Attributes
    ----------
    slots, heads : int
        Slots of a ciphertext, and how many of them are used.
    queries, keys, pairs : int
        Rows, and pairs of features.
    """

    slots: int
    heads: int
    queries: int
    keys: int
    pairs: int

    @property
    def query_parts(self) -> int:
        """Ciphertexts of a query."""
        return self.pairs

    @property
    def shared_parts(self) -> int:
        """Ciphertexts of the keys, and as many of the values."""
        return self.keys * self.pairs

    @property
    def outs(self) -> int:
        """Ciphertexts of a query's result."""
        return self.pairs

    def blocks(self) -> list[tuple[int, int]]:
        """Return (0, query) of each query."""
        return [(0, i) for i in range(self.queries)]

    def _slots(self, x: Complex) -> Complex:
        return np.pad(x, (0, self.slots - len(x)))

    def query_slots(self, q: Float, seen: NDArray[np.bool_], block: tuple[int, int]) -> list[Complex]:
        """Return the ciphertexts' slots of a query; q is (heads, queries, pairs·2)."""
        row = q[:, block[1]]
        return [self._slots(z / 2) for z in (row[:, 0::2] + 1j * row[:, 1::2]).T]

    def key_slots(self, k: Float, seen: NDArray[np.bool_], block: tuple[int, int]) -> list[Complex]:
        """Return the slots of all keys, (keys, pairs) flattened; one that an input's queries do not see is 0.

        Raises
        ------
        UnsupportedProblem
            Some queries of an input see a key and others do not: here a key is one ciphertext for all of them.
        """
        if not (seen == seen[:, :1]).all():
            raise UnsupportedProblem("he: mode='throughput' takes masks that hide a key from all queries of an input")
        k = k * seen[:, 0, :, None]
        return [self._slots(z) for rows in (k[..., 0::2] - 1j * k[..., 1::2]).transpose(1, 2, 0) for z in rows]

    def value_slots(self, v: Float, block: tuple[int, int]) -> list[Complex]:
        """Return the slots of all values, (keys, pairs) flattened."""
        return [self._slots(z) for rows in (v[..., 0::2] + 1j * v[..., 1::2]).transpose(1, 2, 0) for z in rows]

    def read(self, slots: list[Complex], out: Complex, block: tuple[int, int]) -> None:
        """Put a query's result into out, (heads, queries, pairs) complex."""
        out[:, block[1]] = np.stack(slots, 1)[: self.heads]


def _powers(first: int, end: int) -> list[int]:
    return [first << i for i in range(max(0, (end // first).bit_length() - 1))]


def layouts_for(
    slots: int, n_q: int, n_k: int, d_k: int, d_v: int, heads: int, mode: str = "latency", upload: str = "full"
) -> Sequence[Layout | BatchLayout]:
    """Return the layouts that a call may have: with all keys in a ciphertext, and with more columns and keys in spans.

    Raises
    ------
    UnsupportedProblem
        The keys and features do not fit.
    """
    if mode == "throughput":
        if heads > slots:
            raise UnsupportedProblem(f"he: {heads} heads of inputs do not fit {slots} slots")
        return [BatchLayout(slots, heads, n_q, n_k, -(-max(d_k, d_v) // 2))]
    keys, queries, pairs = (1 << (n - 1).bit_length() for n in (n_k, n_q, -(-max(d_k, d_v) // 2)))
    most = queries * (1 << (heads - 1).bit_length())
    first = min(most, max(1, slots // max(keys, pairs)))
    found = []
    for columns in (first * x for x in _powers(1, 2 * most // first)):
        rows = min(keys, slots // columns)
        groups = max(1, min(pairs, slots // max(1, rows * columns)))
        parts, whole_heads = pairs // groups, columns >= queries
        if parts <= rows and (rows == keys or whole_heads):
            compact = upload == "compact"
            found.append(Layout(slots, keys, columns, groups, parts, queries, heads, compact, keys // rows))
    if not found:
        raise UnsupportedProblem(
            f"he: n_k = {n_k}, d = {max(d_k, d_v)} and {heads} heads of {n_q} queries do not fit {slots} slots"
        )
    return found


def token_layouts(slots: int, n_k: int, d: int, heads: int) -> list[Layout]:
    """Return the layouts of one query a head: from all keys in a ciphertext to as few as leave its features together.

    Few keys in a ciphertext leave room for more features: a token is then in fewer ciphertexts, and its products with
    all keys take more of them.

    Raises
    ------
    UnsupportedProblem
        The keys and features do not fit.
    """
    keys, pairs, most = (1 << (n - 1).bit_length() for n in (n_k, -(-d // 2), heads))
    for columns in reversed(_powers(1, 2 * min(most, slots))):
        if columns > 1 and keys * columns > 8 * slots:
            continue  # heads in several blocks rather than keys in very many spans: the same work
        found = []
        for rows in reversed(_powers(1, 2 * min(keys, slots // columns))[-4:]):  # spans soon cost more than parts
            for groups in reversed(_powers(1, 2 * min(pairs, slots // (rows * columns)))[-4:]):
                parts, spans = pairs // groups, keys // rows
                if parts <= rows:
                    found.append(Layout(slots, keys, columns, groups, parts, 1, heads, spans=spans))
        if found:
            return found
    raise UnsupportedProblem(f"he: n_k = {n_k} and d = {d} do not fit {slots} slots")
