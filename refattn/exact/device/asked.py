"""What ``device=`` of an evaluation names, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...arrays import cupy_with_gpu, kind_of
from ...errors import InvalidInput, InvalidProblem, UnsupportedProblem
from ...problem import Problem
from .card import Card, card_of

__all__ = ["asked", "on"]


def asked(device: Any, problem: Problem, rounding: str | None, **others: Any) -> Card | None:
    """Return the GPU that a device names, None for the CPU.

    Parameters
    ----------
    device : str
        "cpu", "cuda" (CuPy's current GPU) or "cuda:0" and so on.
    problem : Problem
        The call; its arrays that are on a GPU, scales and tables of pages too, must be on this one, others are copied.
    rounding : str or None
        As in :func:`refattn.evaluate`.
    **others
        Arguments that a GPU does not take, by name; None where they are not given.

    Raises
    ------
    InvalidInput
        It names no device, or `rounding` is not given.
    InvalidProblem
        An array is on another GPU.
    UnsupportedProblem
        What the GPU does not compute; no CuPy, no GPU, or one that is not trusted.
    """
    if device == "cpu":
        return None
    named = re.fullmatch(r"cuda(?::(\d+))?", device) if isinstance(device, str) else None
    if named is None:
        raise InvalidInput(f"device: got {device!r}, expected 'cpu', 'cuda', or 'cuda:0' and so on")
    if rounding is None:
        raise InvalidInput("device: a GPU gives correctly rounded answers; pass rounding='float64' or another format")
    for name, x in others.items():
        if x is not None:
            raise UnsupportedProblem(f"device: {name} is for the CPU; leave it out, or use device='cpu'")
    number = int(named[1]) if named[1] else int(cupy_with_gpu().cuda.Device().id)
    for name, x in [*problem.arrays().items(), *problem.options.items()]:
        place = _gpu_of(x)
        if place not in (None, number):
            raise InvalidProblem(
                f"{name}: is on GPU {place}, device={device!r} is GPU {number}; move it, or use device='cuda:{place}'"
            )
    return card_of(number)


def _gpu_of(x: Any) -> int | None:
    """Return the number of the GPU that an array is on, None where it is on none."""
    kind = kind_of(x)
    if kind == "cupy":
        return int(x.device.id)
    if kind == "torch":
        return int(x.device.index or 0) if x.is_cuda else None
    if kind == "jax":
        places = [p for p in x.devices() if p.platform in ("gpu", "cuda")]
        return int(places[0].local_hardware_id or 0) if places else None
    return None


@contextmanager
def on(card: Card | None) -> Iterator[None]:
    """Work on a GPU, if there is one.

    Raises
    ------
    UnsupportedProblem
        Its memory is full.
    """
    if card is None:
        yield
        return
    try:
        with card.current():
            yield
    except MemoryError as e:
        raise UnsupportedProblem(
            f"device: the memory of 'cuda:{card.number}' is full ({e}); free some, evaluate fewer rows at a time, or "
            "use device='cpu'"
        ) from e
