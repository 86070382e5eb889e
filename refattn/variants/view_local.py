"""View-aware local attention: a voxel sees the patches of an image that lie near its place in a pinhole's view."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import expect
from ..masks import both
from ..problem import Problem
from ..rules import Rule
from ..rules.lists import listed
from .option import Option, at_least_zero, finite, one_of, whole
from .pinhole import project_pinhole
from .shapes import Lowered
from .variant import COMMON_BUGS, COMMON_LAWS, Variant, packed

__all__ = ["VIEW_LOCAL", "project_pinhole", "view_local_mask", "voxel_centres"]

Array = NDArray[Any]
Mask = NDArray[np.bool_]
SLACK = Fraction(1, 10**6)
"""What the release takes off the radius."""
LISTED = 4
"""Bytes of a listed patch, which are more than the booleans of all where more than one of so many is near."""


def _whole(name: str, x: Any, least: int) -> None:
    fits = isinstance(x, int | np.integer) and not isinstance(x, bool) and bool(x >= least)
    expect(fits, name, x, f"a whole number from {least} on")


def voxel_centres(resolution: int) -> Array:
    """Return the centres of the voxels of [-1, 1]^3 as fractions, (resolution^3, 3), x slowest and z fastest.

    The i-th along an axis is (2 i + 1 - resolution) / resolution.

    Parameters
    ----------
    resolution : int
        Voxels along each axis.
    """
    _whole("resolution", resolution, 0)
    along = [Fraction(2 * i + 1 - resolution, resolution) for i in range(resolution)]
    return np.array(list(product(along, repeat=3)), object).reshape(-1, 3)


def places(projection: Any, points: Array, image: int, mode: str) -> Array:
    """Return each voxel's row and column in the image, (n, 2), in pixels from its upper left corner.

    The release goes to the centre of a pixel: rounded, half to even, held to the image, columns from right to left.
    """
    found: Array = project_pinhole(projection, points)[0]
    if mode == "paper":
        return found[:, ::-1]
    pixels = np.array([[min(max(round(x), 0), image - 1) for x in row] for row in found], object).reshape(-1, 2)
    return np.asarray(np.stack([pixels[:, 1], image - 1 - pixels[:, 0]], 1) + Fraction(1, 2))


def view_local_mask(
    projection: Any,
    resolution: int,
    patches: int,
    radius: float,
    image: int = 224,
    mode: str = "paper",
    *,
    centres: Any = voxel_centres,
    places: Any = places,
    short: Fraction | None = None,
) -> Mask:
    """Return which patches a voxel sees, (resolution^3, patches^2): ``|place - patch| <= radius``, decided exactly.

    The place of (row, column) in pixels is patches / image times it, less 1/2: so patch (i, j) lies at (i, j).

    Parameters
    ----------
    projection : (3, 4) numbers
        As for :func:`project_pinhole`; u counts pixels from the left edge, v from the upper one.
    resolution : int
        Voxels along each axis.
    patches, image : int
        Patches, and pixels, along each side of the image.
    radius : float
        In patches.
    mode : {"paper", "released"}
        "released" rounds places to pixels, holds them to the image, mirrors columns, and takes 1e-6 off the radius.
    centres, places, short
        For mistakes: other functions, and what is taken off the radius.

    Raises
    ------
    InvalidInput
        An argument is not what it says here, a voxel has depth 0, or no array holds the mask.
    """
    _whole("resolution", resolution, 0)
    _whole("patches", patches, 1)
    _whole("image", image, 1)
    expect(at_least_zero(radius, 1) is None, "radius", radius, "a finite number of at least 0")
    expect(isinstance(mode, str) and mode in ("paper", "released"), "mode", mode, "'paper' or 'released'")
    most = int(resolution) ** 3 * int(patches) ** 2
    expect(most <= sys.maxsize, "resolution^3 times patches^2", most, f"at most {sys.maxsize}, the length of an array")
    seen = np.zeros((resolution**3, patches**2), bool)
    for voxel, first, end in near(projection, resolution, patches, radius, image, mode, centres, places, short):
        seen[voxel, first:end] = True
    return seen


def near(
    projection: Any,
    resolution: int,
    patches: int,
    radius: float,
    image: int,
    mode: str,
    centres: Any = voxel_centres,
    places: Any = places,
    short: Fraction | None = None,
) -> Iterator[tuple[int, int, int]]:
    """Yield a voxel, the first patch that it sees of a row of patches, and the one behind the last."""
    at = places(projection, centres(resolution), image, mode) * Fraction(patches, image) - Fraction(1, 2)
    reach = Fraction(radius) - ((SLACK if mode == "released" else Fraction(0)) if short is None else short)
    for voxel, place in enumerate(at if reach >= 0 else ()):
        # integers over one denominator
        unit = math.lcm(reach.denominator, *(x.denominator for x in place))
        row, column, limit = (int(x * unit) for x in (*place, reach))
        for i in range(max(-((limit - row) // unit), 0), min((row + limit) // unit + 1, patches)):
            along = math.isqrt(limit**2 - (row - unit * i) ** 2)
            first, end = max(-((along - column) // unit), 0), min((column + along) // unit + 1, patches)
            if first < end:
                yield voxel, i * patches + first, i * patches + end


def near_rule(p: Problem, o: Any, **change: Any) -> Rule | None:
    """Return the view as lists of patches; None where most patches are near."""
    spans = np.array([*near(o.projection, edge(p.n_q), o.patches, o.radius, o.image, o.mode, **change)], np.int64)
    voxel, first, end = spans.reshape(-1, 3).T
    many, before = np.bincount(voxel, end - first, p.n_q).astype(np.int64), p.n_k - o.patches**2
    width = int(many.max(initial=0)) + 1
    if LISTED * width > o.patches**2:
        return None
    lists = np.full((1, 1, p.n_q, width), -1, np.int32)
    lists[..., 0] = 0  # the keys before the patches
    place = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
    start = np.cumsum(end - first) - (end - first)
    which = np.arange(many.sum()) + np.repeat(first - start, end - first)
    lists[0, 0, np.repeat(np.arange(p.n_q), many), place + 1] = which + 1
    starts = np.append(0, before + np.arange(o.patches**2))
    return listed(lists, starts, np.append(before, starts[1:] + 1), p.n_k)


def lower(p: Problem, o: Any, first: bool = True, blocked: bool = False, fill: bool = False, **change: Any) -> Problem:
    """Write the view out as a mask; keys before those of the patches are seen by all.

    The rest is for mistakes: whether these keys stand first, whether near patches are the blocked ones, whether a voxel
    without a patch sees all.
    """
    if o.projection is None:
        return p.replace(variant="softmax", options={})
    if first and not blocked and not fill and (rule := near_rule(p, o, **change)) is not None:
        return p.replace(variant="softmax", options={}, allowed=both(p.allowed, rule))
    seen = view_local_mask(o.projection, edge(p.n_q), o.patches, o.radius, o.image, o.mode, **change)
    seen = ~seen if blocked else seen
    seen = seen | ~seen.any(1, keepdims=True) if fill else seen
    others = np.ones((p.n_q, p.n_k - seen.shape[1]), bool)
    mask = np.concatenate([others, seen] if first else [seen, others], 1)[None, None]
    return p.replace(variant="softmax", options={}, allowed=both(p.allowed, mask))


def by_loops(p: Problem, o: Any) -> Problem:
    """Write the same mask by loops, in which no place is divided by its depth and the release's are odd half pixels."""
    r, s, w = edge(p.n_q), o.patches, o.image
    seen = np.ones((1, 1, p.n_q, p.n_k), bool)
    for i in range(p.n_q if o.projection else 0):
        point: list[Any] = [*(Fraction(2 * x + 1 - r, r) for x in (i // r**2, i // r % r, i % r)), 1]
        a, b, d = (sum(Fraction(c) * x for c, x in zip(row, point, strict=True)) for row in o.projection)
        reach = Fraction(o.radius) * w * d
        if o.mode == "released":
            a, b = (2 * min(max(nearest(x / d), 0), w - 1) + 1 for x in (a, b))
            a, d, reach = 2 * w - a, 2, (Fraction(o.radius) - SLACK) * w * 2
        for j, (y, x) in enumerate(product(range(s), repeat=2), p.n_k - s * s):
            off = (2 * s * a - (2 * x + 1) * w * d) ** 2 + (2 * s * b - (2 * y + 1) * w * d) ** 2
            seen[..., i, j] = off <= 4 * reach**2 and reach * d >= 0
    return p.replace(variant="softmax", options={}, allowed=both(p.allowed, seen))


def nearest(x: Fraction) -> int:
    """Return the nearest integer, of two the even one."""
    below, rest = x // 1, x % 1
    return int(below) + int(rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1))


def edge(n: int) -> int:
    """Return the cube root of a number of voxels, rounded."""
    return round(math.pow(n, 1 / 3))


def camera(value: Any, heads: int) -> str | None:
    """Check for None or three rows of four finite numbers."""
    rows = value if isinstance(value, tuple) and len(value) == 3 else ()
    ok = value is None or (rows and all(isinstance(row, tuple) and len(row) == 4 for row in rows))
    ok = ok and all(x is not None and finite(x, heads) is None for row in rows for x in row)
    return None if ok else "None or a 3 by 4 matrix: a tuple of three tuples of four finite numbers"


def fits(p: Problem) -> str | None:
    """Refuse calls whose queries are no cube of voxels in front of the camera, or that lack keys for the patches."""
    o = {n: p.options.get(n, x.default) for n, x in OPTIONS.items()}
    named = [n for n, x in OPTIONS.items() if o[n] != x.default]
    if o["projection"] is None:
        return packed(p, "views") or (
            f"{named[0]}: needs projection; without one a voxel sees all patches" if named else None
        )
    if edge(p.n_q) ** 3 != p.n_q or p.cu_seqlens_q is not None:
        return packed(p, "views") or f"query: axis seq is {p.n_q}, expected a cube such as 64: one for each voxel"
    if p.n_k < o["patches"] ** 2:
        return f"key: axis seq is {p.n_k}, expected at least patches^2, {o['patches'] ** 2}"
    r = edge(p.n_q)
    corners: list[Any] = [[Fraction(x * (r - 1), max(r, 1)) for x in corner] for corner in product((-1, 1), repeat=3)]
    depths = [sum(Fraction(c) * x for c, x in zip(o["projection"][2], (*at, 1), strict=True)) for at in corners]
    if min(depths) <= 0 <= max(depths):
        ends = f"{float(min(depths)):g} to {float(max(depths)):g}"
        return f"projection: depths go from {ends} over the voxels, expected one sign; move the camera out of them"
    return None


def view(image: int, rotation: float, elevation: float = 20.0, away: float = 2.5, ahead: bool = False) -> Any:
    """Return the matrix of a camera as the release places it: at a distance, looking at the origin, 60 degrees wide.

    Its cameras look against their third axis: depths are below 0, and u runs from right to left; from left to right
    with `ahead`.
    """
    a, b = math.radians(rotation), math.radians(elevation)
    back = np.array([math.sin(a) * math.cos(b), math.sin(b), math.cos(a) * math.cos(b)])
    right = np.array([math.cos(a), 0.0, -math.sin(a)])
    axes = np.stack([right, np.cross(back, right), back])
    half = image / 2
    lens = np.array([[half / math.tan(math.pi / 6), 0, half], [0, half / math.tan(math.pi / 6), half], [0, 0, 1]])
    found = lens @ np.concatenate([axes, -axes @ (away * back)[:, None]], 1)
    if ahead:
        found[0] = image * found[2] - found[0]
    return tuple(tuple(map(float, row)) for row in found)


FLAT = ((4.0, 0.0, 0.0, 4.0), (0.0, 4.0, 0.0, 4.0), (0.0, 0.0, 0.0, 1.0))
"""Straight along the third axis: 4 voxels along an axis of 8 pixels lie on the centres of 4 patches."""


def tries(n_q: int, n_k: int) -> list[dict[str, Any]]:
    """Return options for a call of some size: views, where its queries are a cube and it has keys for patches."""
    found: list[dict[str, Any]] = [{}]
    if n_q and n_k and edge(n_q) ** 3 == n_q:
        patches = math.isqrt(n_k)
        own: dict[str, Any] = {"projection": FLAT, "image": 8, "patches": patches}
        near = own | {"projection": view(8, 45.0, ahead=True), "radius": 0.7}
        found += [own | {"radius": 1.0}, near, near | {"mode": "released", "projection": view(8, 30.0)}]
    return found


def mirrored(projection: Any, points: Array, image: int, mode: str) -> Array:
    """Mirror columns where the definition does not, and the other way round."""
    found: Array = places(projection, points, image, mode)
    return np.stack([found[:, 0], image - found[:, 1]], 1)


def swapped(projection: Any, points: Array, image: int, mode: str) -> Array:
    """Take u for the row."""
    return places(projection, points, image, mode)[:, ::-1]


def pixels(projection: Any, points: Array, image: int, mode: str) -> Array:
    """Take u and v for numbers of pixels, whose centres lie half a pixel further."""
    found: Array = places(projection, points, image, mode)
    return np.asarray(found + Fraction(1, 2)) if mode == "paper" else found


def unclipped(projection: Any, points: Array, image: int, mode: str) -> Array:
    """Leave places outside the image where they are, in the released mode."""
    found: Array = project_pinhole(projection, points)[0]
    ends = np.array([[round(x) for x in row] for row in found], object).reshape(-1, 2) + Fraction(1, 2)
    return np.stack([ends[:, 1], image - ends[:, 0]], 1) if mode == "released" else found[:, ::-1]


def to_the_border(resolution: int) -> Array:
    """Put the outer voxels' centres on the border."""
    return np.asarray(voxel_centres(resolution) * Fraction(resolution, max(resolution - 1, 1)))


def by_default(default: Any, meaning: str, check: Any, *samples: Any) -> Option:
    """Return an option with one value for all heads."""
    return Option(default, meaning, check, (default, *samples), by_head=False)


OPTIONS = {
    "projection": by_default(None, "a pinhole's 3 by 4 matrix; None is no view: a voxel sees all", camera, FLAT),
    "patches": by_default(16, "patches along each side of the image", whole(1), 4, 1),
    "radius": by_default(4.0, "how far the patches lie that a voxel sees, in patches", at_least_zero, 1.0, 0.0),
    "image": by_default(224, "pixels along each side of the image", whole(1), 56),
    "mode": by_default(
        "paper", "paper, or released: its pixels, mirrored columns", one_of("paper", "released"), "released"
    ),
}
AHEAD = {"projection": view(56, 30.0, ahead=True), "patches": 4, "image": 56, "radius": 1.25}
RELEASED = {"projection": view(56, 110.0), "patches": 4, "image": 56, "radius": 1.25, "mode": "released"}
ON = {"projection": FLAT, "patches": 4, "image": 8, "radius": 1.0}
DEFINE = Lowered(lower)
VIEW_LOCAL = Variant(
    name="view_local",
    define=DEFINE,
    forms={"by_loops": Lowered(by_loops)},
    formula="softmax attention of a voxel to the patches (i, j) with |place - (i, j)| <= radius,  place = "
    "(p_1, p_0) / p_2 · patches / image - 1/2,  p = P (x, y, z, 1);  and to the keys before the patches'",
    unit="u · sum_j p_ij |v_jc|",
    source="Zheng et al., LAS-Diffusion, arXiv 2305.04461: the abstract was read; CrossAttention.get_attn_mask, "
    "clamp_pixel and get_voxel_coordinates of the release at a7eb304 were. The plain rule is ours: no pixels.",
    compared="get_attn_mask of the release at a7eb304, with what it calls, on a CPU: 21 views, 4 radii, 64 and 512 "
    "voxels, all 12386304 elements of the masks the same",
    uses=frozenset({"softcap", "sink", "bias", "allowed", "weight"}),
    options=OPTIONS,
    laws=tuple(n for n in COMMON_LAWS if n not in ("key_permutation", "past_31_bits", "row_invariance")),
    bugs=tuple(n for n in COMMON_BUGS if not {"causal", "window", "own", "sequences"} & set(n.split("_"))),
    contract=(
        "Queries are the voxels of a cube, x slowest and z fastest.",
        "The last patches^2 keys are the patches, row by row; keys before them are seen by all.",
        "u counts pixels from the left edge and v from the upper one: pixel 0 is from 0 to 1.",
        "Which patches are near is decided exactly; one at just the radius is seen.",
        "A voxel without a patch within the radius sees none: without other keys its out is 0 and its lse -inf.",
        "Released: u and v are rounded to pixels, half to even, and held to the image; columns run from right to left; "
        "1e-6 is taken off the radius. The release's own float32 roundings are not copied.",
    ),
    has_lse=True,
    positive=True,
    cases={
        "view": {"n_q": 64, "n_k": 16, "options": AHEAD},
        "view-released": {"n_q": 64, "n_k": 16, "options": RELEASED},
        "global-keys": {"n_q": 64, "n_k": 19, "h": 4, "h_kv": 2, "options": AHEAD | {"radius": 0.5}},
        "on-the-radius": {"n_q": 64, "n_k": 16, "options": ON},
        "at-the-border": {
            "n_q": 27,
            "n_k": 16,
            "options": RELEASED | {"projection": view(56, 10.0, 5.0, 1.75), "radius": 0.75},
        },
        "some-see-none": {"n_q": 64, "n_k": 16, "options": AHEAD | {"radius": 0.375}},
        "many-patches": {"n_q": 27, "n_k": 257, "options": {"projection": view(224, 80.0, ahead=True)}},
    },
    wrong={
        "columns_mirrored": ("columns run the other way", DEFINE.changed(places=mirrored)),
        "axes_swapped": ("u is taken for the row and v for the column", DEFINE.changed(places=swapped)),
        "half_a_pixel_further": ("u and v are taken for numbers of pixels", DEFINE.changed(places=pixels)),
        "not_held_to_the_image": (
            "places outside the image are not clipped, released",
            DEFINE.changed(places=unclipped),
        ),
        "voxels_to_the_border": ("the outer voxels' centres lie on the border", DEFINE.changed(centres=to_the_border)),
        "voxels_turned": (
            "z is the slowest axis of the voxels",
            DEFINE.changed(centres=lambda r: voxel_centres(r)[:, ::-1]),
        ),
        "radius_left_out": ("a patch at just the radius is not seen", DEFINE.changed(short=Fraction(1, 10**9))),
        "near_ones_blocked": (
            "the mask of blocked keys is taken for one of allowed keys",
            DEFINE.changed(blocked=True),
        ),
        "global_keys_last": ("the keys that all see come after the patches", DEFINE.changed(first=False)),
        "none_in_sight_sees_all": ("a voxel without a patch sees all", DEFINE.changed(fill=True)),
    },
    fits=fits,
    tries=tries,
    never=frozenset({"variable_lengths", "causal_bottom_right", "causal_top_left", "window"}),
)
