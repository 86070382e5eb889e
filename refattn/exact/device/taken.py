"""Queries, keys and values of a call on a GPU: copied there in their own type, made float64 there; values back.

No number is a float32 there: CuPy compiles all that it runs with ``-ftz=true``, which makes subnormal ones 0, where
they become float64 and where float64 becomes float32. ``widen`` and ``narrow`` of ``finish.cu`` work on their bits.
"""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import from_float64, to_float64
from ...dtypes import FORMATS, Format
from ...problem import Problem
from ..anywhere import on_host
from ..heads import Head, heads
from . import finish

__all__ = ["heads_on", "returned", "sent", "taken"]

KERNELS_KNOW = ("float32", "float16", "bfloat16")
"""Formats whose bits are a float64's but for the bias and the last ones; of the others, the host makes float64."""
MANY, PIECE, ROOMS = 2**25, 2**23, 8
"""Bytes of an array that is sent in pieces, of a piece, and how many are under way."""
PART = 1 / 8
"""Of the free memory: what queries, keys and values of all heads may take before a head is computed."""


def heads_on(card: Any, problem: Problem) -> list[Head] | None:
    """Return the heads of a call with their numbers on a GPU, where these take little of its memory, else None."""
    numbers = sum(x.size for x in (problem.query, problem.key, problem.value))
    if 8 * numbers > PART * card.free():
        return None
    return list(heads(problem, by_rules=True, take=partial(taken, card)))


def taken(card: Any, x: NDArray[Any]) -> Any:
    """Return an array of the host as float64 on a GPU, exactly.

    Parameters
    ----------
    card : Card
        The GPU.
    x : array
        Numbers of a format of ``refattn.dtypes``.
    """
    if x.dtype.name not in KERNELS_KNOW:
        return sent(card, to_float64(x))
    form = FORMATS[x.dtype.name]
    out = card.xp.empty(x.shape)
    _launch(card, "widen", sent(card, np.ascontiguousarray(x).view(_unsigned(form))), form, _bias(form), out)
    return out


def sent(card: Any, x: NDArray[Any]) -> Any:
    """Return a copy of an array on a GPU; of a large one by threads, piece by piece through memory that stays in place.

    What lies where the system may move it, the driver copies once more, by one thread: a third of the speed.
    """
    if x.nbytes < MANY:
        return card.xp.asarray(x)
    flat, out = np.ascontiguousarray(x).reshape(-1).view(np.uint8), card.xp.empty(x.nbytes, np.uint8)
    stream, filled = card.xp.cuda.get_current_stream(), deque[tuple[Any, Any, slice]]()
    left = deque(slice(i, min(i + PIECE, x.nbytes)) for i in range(0, x.nbytes, PIECE))
    with ThreadPoolExecutor(ROOMS) as pool:
        free: deque[tuple[Any, Any]] = deque((room, None) for room in card.rooms(ROOMS, PIECE))
        while left or filled:
            while left and free:
                (room, gone), at = free.popleft(), left.popleft()
                if gone is not None:
                    gone.synchronize()
                filled.append((pool.submit(np.copyto, room[: at.stop - at.start], flat[at]), room, at))
            done, room, at = filled.popleft()
            done.result()
            out[at].set(room[: at.stop - at.start], stream)
            free.append((room, stream.record()))
    stream.synchronize()  # before the next array comes there
    return out.view(x.dtype).reshape(x.shape)


def returned(card: Any, x: Any, form: Format) -> NDArray[Any]:
    """Return float64 numbers on a GPU, which a format has, in the format's own type on the host.

    Parameters
    ----------
    card : Card
        The GPU.
    x : float64 array
        Numbers of the format, infinities and NaN among them; it lies there without gaps.
    form : Format
        The format.
    """
    if form.name not in KERNELS_KNOW:
        return from_float64(on_host(x), form.name)
    out = card.xp.empty(x.shape, _unsigned(form))
    _launch(card, "narrow", x, form, -_bias(form), out)
    return np.asarray(on_host(out).view(form.dtype))


def _launch(card: Any, name: str, x: Any, form: Format, power: int, out: Any) -> None:
    bits, count = 8 * form.dtype.itemsize, math.prod(x.shape)
    numbers = np.int64(count), np.int32(bits), np.int32(form.precision - 1), np.float64(2.0**power)
    if count:
        card.launch(0, name, -(-count // card.threads), (x, *numbers, out), finish.text_finish)


def _unsigned(form: Format) -> Any:
    """Return the type of a format's bits."""
    return np.dtype(f"u{form.dtype.itemsize}")


def _bias(form: Format) -> int:
    """Return how much less a format's exponents are biased by than float64's."""
    return FORMATS["float64"].emax - form.emax
