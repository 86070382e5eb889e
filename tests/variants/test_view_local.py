"""View-local attention: places and masks by hand, by the release's formulas in float64, and what a patch reaches."""

import math
from fractions import Fraction

import numpy as np
import pytest

from refattn import InvalidInput, InvalidProblem, evaluate, masks
from refattn.exact import lowering
from refattn.exact.lowering import lower
from refattn.variants.view_local import FLAT, project_pinhole, view, view_local_mask, voxel_centres


def test_places_by_hand():
    """Two pixels a unit at depth 1, the middle at (4, 3); a point twice as far away moves half as far from it."""
    projection = ((2.0, 0, 4.0, 0), (0, 2.0, 3.0, 0), (0, 0, 1.0, 0))
    places, depths = project_pinhole(projection, np.array([[1.0, 1.0, 1.0], [1.0, -1.0, 2.0], [0.0, 0.0, -5.0]]))
    assert places.tolist() == [[6, 5], [5, 2], [4, 3]]
    assert depths.tolist() == [1, 2, -5]
    thirds, _ = project_pinhole(projection, np.array([[Fraction(1, 3), 0, 1]], object))
    assert thirds[0].tolist() == [Fraction(14, 3), 3]


def test_voxels_fill_a_cube():
    centres = voxel_centres(4)
    assert centres.shape == (64, 3)
    assert [str(x) for x in centres[:5, 2]] == ["-3/4", "-1/4", "1/4", "3/4", "-3/4"]
    assert centres[4].tolist() == [Fraction(-3, 4), Fraction(-1, 4), Fraction(-3, 4)]
    for r in (1, 3, 8):  # the release's way: the ends and what lies between, drawn in by half a voxel; off by roundings
        along = voxel_centres(r)[:: r * r, 0].astype(float)
        given = (np.linspace(-1, 1, r) if r > 1 else np.zeros(1)) * (r - 1) / r
        assert (np.abs(along - given) <= 2.0**-51).all()


def test_a_mask_by_hand():
    """Column x and row y of 4 by 4: the patch itself, and those beside it at a radius of just 1."""
    seen = view_local_mask(FLAT, 4, 4, 1.0, 8).reshape(4, 4, 4, 4, 4)
    for x, y, z in np.ndindex(4, 4, 4):
        near = {(y + a, x + b) for a, b in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))}
        assert {tuple(at) for at in np.argwhere(seen[x, y, z]).tolist()} == near & set(np.ndindex(4, 4))
    below = view_local_mask(FLAT, 4, 4, math.nextafter(1.0, 0.0), 8)
    assert (below.sum(1) == 1).all()


@pytest.mark.parametrize("resolution", [3, 4, 8])
def test_the_release_by_its_formulas(resolution):
    """In float64: distances are roots of sums of two odd squares over 28, which come no nearer to 4 than 3e-4."""
    for turn, up in ((0, 20), (45, 20), (135, 0), (77, 33)):
        p = np.array(view(224, turn, up))
        points = voxel_centres(resolution).astype(float)
        pixels = points @ p[:, :3].T + p[:, 3]
        assert (pixels[:, 2] < 0).all()
        u, v = np.clip(np.round(pixels[:, :2] / pixels[:, 2:]), 0, 223).T
        row, column = (2 * v + 1) / 224 * 8 - 0.5, (2 * (223 - u) + 1) / 224 * 8 - 0.5
        i, j = np.divmod(np.arange(256), 16)
        blocked = np.hypot(row[:, None] - i, column[:, None] - j) > 4 - 1e-6
        assert (view_local_mask(view(224, turn, up), resolution, 16, 4.0, 224, "released") == ~blocked).all()


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_a_long_call_lists_the_patches(make, monkeypatch, mode):
    camera = view(56, 30.0, ahead=mode == "paper")
    own = {"projection": camera, "patches": 5, "image": 56, "radius": 0.75, "mode": mode}
    p = make(64, 28, h=1, variant="view_local", options=own)
    want = evaluate(p, rounding="float32")
    for room in (masks, lowering):
        monkeypatch.setattr(room, "WRITTEN", 0)
    got = evaluate(p, rounding="float32")
    assert repr(got.core.allowed).startswith("listed(")
    seen = np.concatenate([np.ones((64, 3), bool), view_local_mask(camera, 4, 5, 0.75, 56, mode)], 1)
    assert seen[:, 3:].any(1).any()
    np.testing.assert_array_equal(got.core.written_out().allowed[0, 0], seen)
    np.testing.assert_array_equal(want.core.allowed[0, 0], seen)
    np.testing.assert_array_equal(got.out, want.out)
    np.testing.assert_array_equal(got.lse, want.lse)


def test_rounding_goes_to_the_even_pixel():
    """Along a row of 4 voxels u is -1/2, 1/2, 3/2 and 5/2: pixels 0, 0, 2 and 2, from the right of 4."""
    projection = ((2.0, 0, 0, 1.0), (0, 0, 0, 0.0), (0, 0, 0, 1.0))
    seen = view_local_mask(projection, 4, 4, 0.5, 4, "released")
    assert np.nonzero(seen[::16])[1].tolist() == [3, 3, 1, 1]


def test_the_two_modes_differ_by_a_pixel():
    """Rounding moves a place by half a pixel, and to the pixel's centre by another half, along both axes."""
    camera = view(224, 45, away=4.0)  # so far off that all voxels appear within the image
    ahead = view(224, 45, away=4.0, ahead=True)
    released = view_local_mask(camera, 4, 16, 4.0, 224, "released")
    least, most = (view_local_mask(ahead, 4, 16, 4.0 + a * math.sqrt(2) * 16 / 224) for a in (-1.0001, 1.0001))
    assert (least <= released).all()
    assert (released <= most).all()
    assert (view_local_mask(ahead, 4, 16, 4.0) != released).any()


def test_a_matrix_stands_for_its_multiples():
    camera = view(56, 30, ahead=True)
    for factor in (-1.0, 8.0):
        other = tuple(tuple(factor * x for x in row) for row in camera)
        assert (view_local_mask(other, 3, 4, 1.25, 56) == view_local_mask(camera, 3, 4, 1.25, 56)).all()


OPTIONS = {"projection": view(56, 30, ahead=True), "patches": 4, "image": 56, "radius": 1.25}


def test_a_patch_moves_the_voxels_that_see_it_and_no_other(make):
    p = make(27, 17, variant="view_local", options=OPTIONS)
    seen = view_local_mask(OPTIONS["projection"], 3, 4, 1.25, 56)
    before = evaluate(p).out
    for j in range(17):
        key, value = p.key.copy(), p.value.copy()
        key[:, :, j] += 1
        value[:, :, j] += 1
        moved = (evaluate(p.replace(key=key, value=value)).out != before).any(-1)
        assert (moved == (seen[:, j - 1] if j else True)).all()  # key 0 is no patch: all see it
    assert not seen.all()


def test_within_the_image_a_voxel_sees_a_patch_at_half_a_diagonal_and_may_see_none_below(make):
    options = OPTIONS | {"mode": "released", "projection": view(56, 10, 5, 1.75)}
    wide = lower(make(64, 16, variant="view_local", options=options | {"radius": math.sqrt(0.5) + 1e-5}))
    assert wide.problem.allowed.any(-1).all()
    p = make(64, 16, variant="view_local", options=options | {"radius": 0.5})
    none = ~lower(p).problem.allowed.any(-1)[0, 0]
    assert none.any()
    answer = evaluate(p, rounding="float32")
    assert (answer.out[:, :, none] == 0).all()
    assert np.isneginf(answer.lse[:, :, none]).all()
    assert np.isfinite(answer.lse[:, :, ~none]).all()


def test_a_radius_below_what_is_taken_off_it_sees_nothing():
    assert not view_local_mask(FLAT, 4, 8, 1e-7, 8, "released").any()  # where places are patches
    assert (view_local_mask(FLAT, 4, 8, 2e-6, 8, "released").sum(1) == 1).all()
    assert (view_local_mask(FLAT, 4, 4, 0.0, 8).sum(1) == 1).all()


@pytest.mark.parametrize(
    ("size", "options", "text"),
    [
        (
            (27, 16),
            {"projection": ((1.0,) * 4,) * 2},
            "projection: got .*, expected None or a 3 by 4 matrix: a tuple .*",
        ),
        ((27, 16), {"projection": ((1.0, 0.0, 0.0, None),) * 3}, "projection: got .*, expected None or a 3 by 4 .*"),
        ((27, 16), {"projection": [[1.0] * 4] * 3}, "projection: got .*, expected None or a 3 by 4 matrix: .*"),
        ((27, 16), {"radius": 1.0}, "radius: needs projection; without one a voxel sees all patches"),
        ((27, 16), OPTIONS | {"radius": -1.0}, r"radius: got -1\.0, expected a finite number of at least 0"),
        ((27, 16), OPTIONS | {"patches": 0}, "patches: got 0, expected an integer of at least 1"),
        ((27, 16), OPTIONS | {"mode": "plain"}, "mode: got 'plain', expected one of paper, released"),
        ((26, 16), OPTIONS, "query: axis seq is 26, expected a cube such as 64: one for each voxel"),
        ((28, 16), OPTIONS, "query: axis seq is 28, expected a cube such as 64: one for each voxel"),
        ((27, 15), OPTIONS, r"key: axis seq is 15, expected at least patches\^2, 16"),
        (
            (27, 16),
            OPTIONS | {"projection": view(56, 30, away=0.5)},
            "projection: depths go from .* to .* over the voxels, expected one sign; move the camera out of them",
        ),
        (
            (27, 16),
            OPTIONS | {"projection": (*FLAT[:2], (0.0, 0.0, 0.0, 0.0))},
            "projection: depths go from 0 to 0 over the voxels, expected one sign; move the camera out of them",
        ),
    ],
)
def test_a_call_that_does_not_fit_is_named(make, size, options, text):
    with pytest.raises(InvalidProblem, match=f"^{text}$"):
        evaluate(make(*size, variant="view_local", options=options))


def test_packed_sequences_are_refused(make):
    ends = {n: np.array([0, 8, 27], np.int32) for n in ("cu_seqlens_q", "cu_seqlens_k")}
    for options in ({}, OPTIONS):
        with pytest.raises(InvalidProblem, match="cu_seqlens_q: views of packed sequences are not defined"):
            evaluate(make(27, 27, variant="view_local", options=options, **ends))


INSIDE = ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0))


def test_fractions_of_any_size_have_a_place():
    places, depths = project_pinhole(INSIDE, np.array([[10**400, 1, Fraction(1, 10**400)]], object))
    assert places.tolist() == [[10**800, 10**400]]
    assert depths.tolist() == [Fraction(1, 10**400)]


@pytest.mark.parametrize(
    ("function", "given", "text"),
    [
        (project_pinhole, (FLAT, [["1", "2", "3"]]), "points: got .*, expected finite numbers"),
        (project_pinhole, (FLAT, [[0, 0, math.inf]]), "points: got .*, expected finite numbers"),
        (project_pinhole, (FLAT, [[1, 2], [3]]), r"points: got \(\), expected an array of shape \(n, 3\)"),
        (
            project_pinhole,
            (((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)), [[0, 0, 1], [1, 2, 0]]),
            "projection: point 1 has",
        ),
        (project_pinhole, (["1234"] * 3, [[0, 0, 1]]), "projection: got .*, expected a matrix of three rows"),
        (project_pinhole, (((10**400, 0, 0, 0), *INSIDE[1:]), [[1.0, 1, 1]]), "projection: a point has no place in fl"),
        (project_pinhole, (INSIDE, [[0.0, 0, 1], [1, 1, 5e-324]]), "projection: point 1 has no place in float64; pass"),
        (view_local_mask, (INSIDE, 3, 2, 1.0), "projection: point 1 has depth 0"),
        (
            view_local_mask,
            (FLAT, 2, 2, 1.0, 8, np.array(["paper"] * 2)),
            "mode: got .*, expected 'paper' or 'released'",
        ),
        (view_local_mask, (FLAT, 2**40, 2, 1.0), r"resolution\^3 times patches\^2: got \d+, expected at most"),
    ],
)
def test_nonsense_is_named(function, given, text):
    with pytest.raises(InvalidInput, match=f"^{text}"):
        function(*given)
