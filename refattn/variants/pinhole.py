"""Where a pinhole camera puts points of space."""

from __future__ import annotations

import math
from fractions import Fraction
from numbers import Rational, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput, expect

__all__ = ["project_pinhole"]

Array = NDArray[Any]


def project_pinhole(projection: Any, points: Array) -> tuple[Array, Array]:
    """Return where points of space appear in an image, and their depths: ``(u, v) = (p_0, p_1) / p_2, p = P (x, 1)``.

    Parameters
    ----------
    projection : (3, 4) numbers
        The matrix P.
    points : (n, 3) array
        Points of space. Fractions are projected exactly.

    Returns
    -------
    places : (n, 2)
        u and v, in pixels where P counts pixels.
    depths : (n,)
        p_2; points in front of a camera and behind it have depths of different signs.

    Raises
    ------
    InvalidInput
        The matrix or the points are not finite numbers in these shapes, a point has depth 0, or its place is larger
        than all of float64 and it is not given as fractions.
    """
    try:
        rows = [list(row) for row in projection]
        if not all(isinstance(x, Real) for row in rows for x in row):  # a fraction may be written in a string
            raise TypeError
        matrix = np.array([[Fraction(x) for x in row] for row in rows], object)
    except (TypeError, ValueError, OverflowError):
        matrix = np.array(None)
    expect(matrix.shape == (3, 4), "projection", projection, "a matrix of three rows of four finite numbers")
    try:
        points = np.asarray(points)
    except ValueError:
        points = np.array(None)  # rows of different lengths
    expect(points.ndim == 2 and points.shape[1] == 3, "points", points.shape, "an array of shape (n, 3)")
    numbers = all(map(_finite, points.ravel().tolist()))
    expect(numbers, "points", points, "finite numbers")
    beyond = "projection: {} has no place in float64; pass points as fractions, which are projected exactly"
    try:
        p = points @ matrix[:, :3].T + matrix[:, 3]
    except OverflowError as e:
        raise InvalidInput(beyond.format("a point")) from e
    flat = np.flatnonzero(p[:, 2] == 0)
    if flat.size:
        raise InvalidInput(f"projection: point {flat[0]} has depth 0 and no place in the image; move the camera or it")
    try:
        with np.errstate(over="ignore"):
            places = p[:, :2] / p[:, 2:]
    except OverflowError as e:
        raise InvalidInput(beyond.format("a point")) from e
    lost = [i for i, row in enumerate(places) if not all(map(_finite, row))]
    if lost:
        raise InvalidInput(beyond.format(f"point {lost[0]}"))
    return places, p[:, 2]


def _finite(x: Any) -> bool:
    return isinstance(x, Rational) or (isinstance(x, Real) and math.isfinite(x))
