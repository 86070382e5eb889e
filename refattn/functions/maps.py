"""Maps of attention over an image: contrast of two, fusion over layers and steps, top regions, entropy.

CARVE (contrastive attention for vision-language models): the paper and its released code, YuyaoGe/CARVE at a1f0442,
were read.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any

import array_api_compat as api
import numpy as np

from ..arrays import like, to_numpy
from ..errors import InvalidInput, expect
from .arguments import axes, namespace, whole, within

__all__ = ["Regions", "attention_entropy", "contrastive_attention", "fuse_maps", "top_regions"]


@dataclass(frozen=True)
class Regions:
    """The regions of a map that were kept.

    Attributes
    ----------
    mask : (height, width) bool array
        True in them; of the map's kind.
    box : (top, left, bottom, right)
        The smallest box around all of them, in cells; bottom and right are the first row and column behind it.
    scores : tuple of float
        The sum of the map over each, the largest first.
    """

    mask: Any
    box: tuple[int, int, int, int]
    scores: tuple[float, ...]


def contrastive_attention(query_map: Any, general_map: Any, *, penalty: float = 1e-8, floor: float = 0.0) -> Any:
    """Return what a question adds to the attention that any question gives: A = A_Q / (A_G + lambda).

    It is the minimiser of sum (A·A_G - A_Q)**2 + lambda·A**2·A_G. Where A_G is 0 the objective does not depend on A,
    and the formula gives A_Q / lambda, which outweighs everything else; a floor bounds it.

    Parameters
    ----------
    query_map, general_map : (...) arrays
        Attention with the question and with a general instruction, of one shape and a floating type.
    penalty : float
        lambda, above 0.
    floor : float
        What A_G counts as where it is smaller, from 0 to 1. The paper has none.

    Returns
    -------
    (...) array

    Raises
    ------
    InvalidInput
        Shapes that differ, weights below 0 or that are not finite, a penalty that the floating type cannot hold.

    Notes
    -----
    The formula and lambda = 1e-8 are the paper's and the release's; the release divides before it sums over layers
    (`fuse_maps`). float16 does not hold 1e-8.
    """
    xp = namespace(query_map=query_map, general_map=general_map)
    nonnegative(xp, "query_map", query_map)
    nonnegative(xp, "general_map", general_map)
    if query_map.shape != general_map.shape:
        raise InvalidInput(
            f"general_map: shape is {tuple(general_map.shape)}, expected query_map's {tuple(query_map.shape)}; "
            "cut both to the steps that both runs have"
        )
    least = float(xp.finfo(general_map.dtype).smallest_normal)
    penalty = within("penalty", penalty, least, sys.float_info.max)
    floor = within("floor", floor, 0, 1)
    return query_map / (xp.where(general_map < floor, floor, general_map) + penalty)


def fuse_maps(maps: Any) -> Any:
    """Return the sum of maps over layers and steps, later steps weighing more: S = sum_t (t + 1) sum_l maps[t, l].

    Parameters
    ----------
    maps : (steps, layers, height, width) array
        Step 0 first. Pass `maps[:1]` for the first step alone.

    Returns
    -------
    (height, width) array

    Raises
    ------
    InvalidInput
        Other axes.

    Notes
    -----
    The release resizes each map to the image before it adds; resizing bilinearly is linear, so that the fused map can
    be resized instead. Its layers are 20 to 25.
    """
    xp = namespace(maps=maps)
    axes("maps", maps, "steps", "layers", "height", "width")
    _floating(xp, "maps", maps)
    weights = xp.arange(1, maps.shape[0] + 1, dtype=maps.dtype, device=api.device(maps))
    return xp.sum(xp.sum(maps, axis=1) * xp.reshape(weights, (-1, 1, 1)), axis=0)


def top_regions(scores: Any, *, share: float = 0.2, regions: int = 3, mode: str = "paper") -> Regions:
    """Return the connected regions that have the largest sums among a map's top cells.

    Cells from the (1 - share) quantile on are top cells (linear interpolation between order statistics, and a cell
    equal to it counts). Those that touch by an edge are one region. Of regions with equal sums the one whose first
    cell comes first, row by row, ranks higher.

    Parameters
    ----------
    scores : (height, width) array
    share : float
        The share of cells that are top cells, in (0, 1].
    regions : int
        How many regions to keep at most.
    mode : {"paper", "released"}
        "released" keeps max(regions, whole part of share times the number of regions).

    Returns
    -------
    Regions

    Raises
    ------
    InvalidInput
        Other axes, numbers that are not finite, or SciPy, which labels the regions, is not installed.
    """
    xp = namespace(scores=scores)
    axes("scores", scores, "height", "width")
    _floating(xp, "scores", scores)
    share, regions = within("share", share, 0, 1, open_low=True), whole("regions", regions, 1)
    expect(mode in ("paper", "released"), "mode", mode, "'paper' or 'released'")
    s = np.asarray(to_numpy(scores, "scores"), np.float64)
    if not np.isfinite(s).all():
        raise InvalidInput("scores: holds NaN or infinity, expected finite numbers; put a floor under general_map")
    try:
        ndimage = importlib.import_module("scipy.ndimage")
    except ModuleNotFoundError as e:
        raise InvalidInput("top_regions: needs SciPy to label regions; pip install scipy") from e
    labels, count = ndimage.label(s >= np.percentile(s, (1.0 - share) * 100))
    sums = np.bincount(labels.ravel(), s.ravel(), count + 1)[1:]
    kept = max(regions, int(share * count)) if mode == "released" else regions
    best = np.argsort(-sums, kind="stable")[:kept]
    mask = np.isin(labels, best + 1)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
    return Regions(like(mask, scores), box, tuple(map(float, sums[best])))


def attention_entropy(weights: Any) -> Any:
    """Return the entropy of each row of attention, in nats: H = -sum_j a_j log a_j, where 0·log 0 is 0.

    Parameters
    ----------
    weights : (..., keys) array
        Rows need not sum to 1: attention to the tokens of an image is a part of a row.

    Returns
    -------
    (...) array

    Raises
    ------
    InvalidInput
        Weights below 0 or that are not finite.

    Notes
    -----
    The paper averages it over layers.
    """
    xp = namespace(weights=weights)
    nonnegative(xp, "weights", weights)
    # log of 1 where a weight is 0, so that a gradient through it is finite
    return -xp.sum(weights * xp.log(xp.where(weights > 0, weights, 1.0)), axis=-1)


def _floating(xp: Any, name: str, x: Any) -> None:
    if not xp.isdtype(x.dtype, "real floating"):
        raise InvalidInput(f"{name}: type is {x.dtype}, expected a floating type; use float32 or float64")


def nonnegative(xp: Any, name: str, x: Any) -> None:
    """Check that an array holds finite floating numbers from 0 on."""
    _floating(xp, name, x)
    if x.ndim < 1 or not bool(xp.all(xp.isfinite(x) & (x >= 0))):
        raise InvalidInput(f"{name}: expected an array of finite weights from 0 on; pass attention after its softmax")
