"""A GPU through CuPy: its arrays, matrix products and kernels, trusted once they have passed their checks."""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...arrays import cupy_with_gpu
from ...errors import BuildError, UnsupportedProblem
from ..doubledouble import table

__all__ = ["KERNELS", "KEYS", "OPTIONS", "ROWS", "Card", "card_of", "text_of"]

THREADS, PER = 256, 8
"""Threads of a block, which has one row, and the keys that each holds in registers."""
KEYS = THREADS * PER
"""Keys of a tile: what a block holds, and what leaves the heads of a weight 20 bits at every level."""
ROWS = 2**15
"""Query rows of a tile, over the parts that a number of the level has, where there is memory for them."""
KERNELS = ("cut", "weigh", "collect", "trusted")
OPTIONS = ("-std=c++17", "--fmad=false")
SCORES, ALIVE = 2**22, 2**8
"""Scores that a definition's text takes at a time where there is memory, and how many matrices of them may be alive."""
LARGE = 2**25
"""Bytes of an array from which waiting for the GPU to free memory costs little beside the work on it."""
LEAST = 80
"""The first compute capability whose matrix unit has float64: 8.0."""


def text_of(level: int) -> str:
    """Return the kernels' whole text for a level."""
    defined = f"#define LEVEL {level}\n#define THREADS {THREADS}\n#define PER {PER}\n"
    return defined + (Path(__file__).parent / "kernels.cu").read_text(encoding="utf-8")


@lru_cache(maxsize=8)
def card_of(number: int) -> Card:
    """Return a GPU by its number; its arithmetic is checked at first use.

    Raises
    ------
    UnsupportedProblem
        There is no such GPU, it is too old, or a check of its arithmetic fails; with the name of what failed.
    BuildError
        The kernels do not compile.
    """
    from .canaries import check  # it calls a card

    cupy = cupy_with_gpu()
    count = cupy.cuda.runtime.getDeviceCount()
    if number >= count:
        raise UnsupportedProblem(f"device: got 'cuda:{number}', this machine has {count} GPU(s), counted from 0")
    capability = str(cupy.cuda.Device(number).compute_capability)
    if int(capability) < LEAST:
        raise UnsupportedProblem(
            f"device: 'cuda:{number}' has compute capability {capability[:-1]}.{capability[-1]}, expected 8.0 or more: "
            "what is assumed of float64 products was checked on those; use device='cpu'"
        )
    card = Card(cupy, number)
    with card.current():
        check(card)
    return card


class Card:
    """A GPU: what ``Level`` and the streaming path ask of a device.

    Parameters
    ----------
    cupy : module
        CuPy.
    number : int
        The GPU's.

    Attributes
    ----------
    xp : module
        Where its arrays are made: CuPy.
    threads, keys : int
        Threads of a block, keys of a tile.
    """

    def __init__(self, cupy: Any, number: int) -> None:
        self.xp, self.number, self.threads, self.keys = cupy, number, THREADS, KEYS
        self._numbers = np.array([1.0, 0.0])  # as cuBLAS takes them: where they are
        self._one = self._numbers.ctypes.data
        self._zero = self._one + 8
        self._kernels: dict[tuple[int, str], Any] = {}
        self._rooms: list[Any] = []

    def current(self) -> Any:
        """Return a context in which this GPU is CuPy's current one."""
        return self.xp.cuda.Device(self.number)

    # the steps of a level -----------------------------------------------------------------------------------------

    def cut(self, x: Any, y: Any, sigma: Any, heads: Any, tails: Any) -> None:
        """Cut x + y along rows, as :func:`refattn.exact.elementwise.cut` does, wherever the parts lie."""
        steps = [tuple(s // 8 for s in a.strides) for a in (x, y, heads, tails)]
        size, by_rows = x.shape, (1, 0)
        if steps[0][1] > steps[0][0]:  # neighbours in memory are rows
            size, by_rows = size[::-1], (0, 1)
            steps = [(*s[:-2], s[-1], s[-2]) for s in steps]
        numbers = (*size, x.shape[0], *by_rows, *steps[0], *steps[1], *steps[2], *steps[3])
        blocks = -(-size[0] * size[1] // self.threads)
        if blocks:
            self.launch(len(heads), "cut", blocks, (x, y, sigma, heads, tails, *map(np.int64, numbers)))

    @staticmethod
    def row_sum_error(w: int) -> float:
        """Return the error of a sum over w keys, over the sum of absolute values: compensated, and rounded once."""
        return 2.0**-52

    def matmul(self, a: Any, b: Any, out: Any) -> None:
        """Write the product of two float64 matrices, by cuBLAS in float64; each has an axis of unit stride."""
        (m, k), n = a.shape, b.shape[1]
        if 0 in (m, n, k):
            out[...] = 0.0
            return
        cublas = self.xp.cuda.cublas
        (kind_a, step_a), (kind_b, step_b) = _laid_out(a), _laid_out(b)
        # cuBLAS counts by columns: it is asked for the transpose
        cublas.dgemm(
            self.xp.cuda.device.get_cublas_handle(), kind_b, kind_a, n, m, k,
            self._one, b.data.ptr, step_b, a.data.ptr, step_a,
            self._zero, out.data.ptr, _laid_out(out)[1],
        )  # fmt: skip

    def launch(self, level: int, name: str, blocks: int, given: tuple[Any, ...], text: Any = None) -> None:
        """Queue a kernel of a level, of this text or another."""
        if (level, name) not in self._kernels:
            module = self.xp.RawModule(code=(text or text_of)(level), options=OPTIONS, backend="nvrtc")
            try:
                self._kernels[level, name] = module.get_function(name)
            except Exception as e:
                raise BuildError(f"device: compiling {name} failed with {type(e).__name__}: {e}") from e
        self._kernels[level, name]((blocks,), (self.threads,), given)

    @cached_property
    def table(self) -> tuple[Any, float, float]:
        """2**(i / 4096) as pairs on the device, and log(2) / 4096 as two numbers."""
        high, low, log2 = table()
        return self.xp.asarray(np.stack([high, low], 1)), *log2

    def sizes(self, x: Any) -> Any:
        """Return what :func:`refattn.exact.right.sizes_of` does."""
        from .finish import sizes  # what ends a tile is built on the streaming path, which asks for this

        return sizes(self, x)

    def places(self, x: Any, b: int, level: int) -> Any:
        """Return what :func:`refattn.exact.elementwise.places` does."""
        from .finish import places

        return places(self, x, b, level)

    def enclosed(self, x: Any) -> Any:
        """Return a level's numbers as enclosures that are rounded here."""
        from .finish import OnCard

        return OnCard(self, x)

    def returned(self, x: Any, form: Any) -> Any:
        """Return numbers of a format that are here in the format's own type, as NumPy's: see ``taken.py``."""
        from .taken import returned

        return returned(self, x, form)

    def forward(self, one: Any, f: Any, rows: Any, unit: int, into: Any) -> Any:
        """Return one head's forward pass, done: see :func:`refattn.exact.stream.forward_pass`."""
        from .forward import OnDevice  # it is built on the streaming path, which asks for it here

        work = OnDevice(one, f, rows, unit, into)
        work.run()
        return work

    def heads(self, problem: Any) -> Any:
        """Return a call's heads with their numbers here; None where these are too many: see ``taken.py``."""
        from .taken import heads_on

        return heads_on(self, problem)

    def backward(self, *given: Any) -> Any:
        """Return the gradients of one head: see :func:`refattn.exact.backward.backward`."""
        from .backward import backward

        return backward(self, *given)

    def rooms(self, count: int, size: int) -> list[Any]:
        """Return parts of the host's memory, of so many bytes each, that stay in place; they are made once."""
        if len(self._rooms) != count:
            make = self.xp.cuda.alloc_pinned_memory
            self._rooms = [np.frombuffer(make(size), np.uint8, size) for _ in range(count)]
        return self._rooms

    # memory -------------------------------------------------------------------------------------------------------

    def trim(self, size: int) -> None:
        """Give back what CuPy keeps for itself, where arrays are of so many bytes that its pieces do not fit others."""
        if size >= LARGE:
            self.xp.get_default_memory_pool().free_all_blocks()

    def scores(self) -> int:
        """Return how many scores a definition's text takes at a time, where the streaming path does not know a call."""
        return max(1, min(SCORES, self.free() // (8 * ALIVE)))

    def free(self, enough: int | None = None) -> int:
        """Return how many bytes can be had: of the GPU, and of what CuPy keeps for itself.

        Where that alone is `enough`, the GPU is not asked, which takes as long as many small steps.
        """
        kept = int(self.xp.get_default_memory_pool().free_bytes())
        if enough is not None and kept >= enough:
            return kept
        return int(self.xp.cuda.runtime.memGetInfo()[0]) + kept


def _laid_out(x: Any) -> tuple[int, int]:
    """Return whether a matrix lies by columns (1), and the step from one row or column to the next, for cuBLAS."""
    (rows, columns), (down, right) = x.shape, x.strides
    if right == 8 or columns == 1:
        return 0, max(down // 8 if rows > 1 else columns, columns)
    if down == 8 or rows == 1:
        return 1, max(right // 8 if columns > 1 else rows, rows)
    raise UnsupportedProblem("device: a matrix of a product has no axis of unit stride")
