"""Contrast, fusion, regions and entropy of attention maps, against exact arithmetic, loops and a planted box."""

import importlib
import math
import re
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.arrays import kind_of
from refattn.functions.maps import attention_entropy, contrastive_attention, fuse_maps, top_regions

KINDS = {"numpy": np.asarray, "torch": torch.asarray, "jax": jnp.asarray}
U = Fraction(1, 2**53)


def maps_of(seed, shape, width=20):
    """Return positive maps whose numbers have few bits, so that A_G + 2**-20 is exact."""
    rng = np.random.default_rng(seed)
    return rng.integers(1, 2**width, shape) / 2**width


def objective(a, q, g, penalty):
    return (a * g - q) ** 2 + penalty * a**2 * g


@pytest.mark.parametrize("penalty", [2.0**-20, 2.0**-4])
def test_contrast_is_the_minimiser(penalty):
    """In exact arithmetic the formula's gradient is 0 and a step to either side is worse; the float is it rounded."""
    query, general = maps_of(0, (6, 7)), maps_of(1, (6, 7))
    found = contrastive_attention(query, general, penalty=penalty)
    lam, step = Fraction(penalty), Fraction(1, 10**6)
    for a, q, g in zip(found.ravel(), query.ravel(), general.ravel(), strict=True):
        q, g = Fraction(q), Fraction(g)
        exact = q / (g + lam)
        assert 2 * g * (exact * g - q) + 2 * lam * exact * g == 0
        assert objective(exact, q, g, lam) < min(objective(exact + s, q, g, lam) for s in (step, -step))
        assert a == float(exact)  # the sum is exact, so that the quotient is rounded once


def test_contrast_is_stationary_within_its_two_roundings():
    """One rounding of the sum, 1 + d1, one of the quotient: a·(g + lam) is q·(1 + d), |d| <= 2u + 3u**2."""
    rng = np.random.default_rng(2)
    query, general = rng.random((9, 9)), rng.random((9, 9))
    for lam in (1e-8, 1e-4, 1e-1):
        for a, q, g in zip(
            *(x.ravel() for x in (contrastive_attention(query, general, penalty=lam), query, general)), strict=True
        ):
            a, q, g = map(Fraction, (a, q, g))
            residual = g * (a * (g + Fraction(lam)) - q)
            assert abs(residual) <= g * q * (2 * U + 3 * U**2)


def test_a_floor_keeps_an_empty_cell_from_outweighing_all():
    general = np.array([0.0, 0.25, 0.25, 0.5])
    query = np.array([0.125, 0.25, 0.5, 0.125])
    assert contrastive_attention(query, general).argmax() == 0
    assert contrastive_attention(query, general)[0] == 0.125 / 1e-8
    floored = contrastive_attention(query, general, floor=0.125)
    assert floored.argmax() == 2
    assert floored[0] == 0.125 / (0.125 + 1e-8)
    np.testing.assert_array_equal(floored[1:], contrastive_attention(query, general)[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_array(kind):
    """Powers of 2 and a penalty of one: each library rounds the same quotient."""
    make = KINDS[kind]
    query, general = (maps_of(s, (2, 3, 4, 5), 10).astype(np.float32) for s in (3, 4))
    contrast = contrastive_attention(make(query), make(general), penalty=2.0**-10, floor=2.0**-5)
    assert kind_of(contrast) == kind
    want = query / (np.maximum(general, np.float32(2.0**-5)) + np.float32(2.0**-10))
    np.testing.assert_array_equal(np.asarray(contrast), want)
    fused = fuse_maps(make(query))
    assert kind_of(fused) == kind
    found = top_regions(fused)
    assert kind_of(found.mask) == kind
    assert found.box == top_regions(np.asarray(fused)).box
    assert kind_of(attention_entropy(make(query))) == kind


@pytest.mark.parametrize("kind", KINDS)
def test_fusion_is_the_loop(kind):
    """Sums of at most 4·3·4 numbers of 10 bits are exact in float32 in any order."""
    maps = maps_of(5, (4, 3, 5, 6), 10).astype(np.float32)
    want = np.zeros((5, 6))
    for t in range(4):
        for layer in range(3):
            for i in range(5):
                for j in range(6):
                    want[i, j] += (t + 1) * float(maps[t, layer, i, j])
    np.testing.assert_array_equal(np.asarray(fuse_maps(KINDS[kind](maps))), want)


def flood(s, share):
    """Return the regions of top cells, each a set of cells: a search from every cell that none has reached."""
    order = np.sort(s.ravel())
    place = Fraction(len(order) - 1) * (1 - Fraction(share))
    low = int(place)
    threshold = Fraction(order[low]) + (place - low) * (
        Fraction(order[min(low + 1, len(order) - 1)]) - Fraction(order[low])
    )
    top = {(i, j) for i in range(s.shape[0]) for j in range(s.shape[1]) if s[i, j] >= threshold}
    regions, seen = [], set()
    for start in sorted(top):
        if start in seen:
            continue
        region, heap = set(), [start]
        while heap:
            i, j = heap.pop()
            if (i, j) in top and (i, j) not in region:
                region.add((i, j))
                heap += [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
        seen |= region
        regions.append(region)
    return regions


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_regions_are_those_of_a_search(share, mode):
    """Shares are powers of 2 and scores have few bits: thresholds and sums are exact. Many scores are equal."""
    for seed in range(40):
        s = np.random.default_rng(seed).integers(0, 9, (7, 33)) / 8
        want = flood(s, share)
        total = [sum(s[c] for c in r) for r in want]
        count = 2 if mode == "paper" else max(2, int(share * len(want)))
        best = sorted(range(len(want)), key=lambda i: (-total[i], i))[:count]
        cells = set().union(*(want[i] for i in best))
        found = top_regions(s, share=share, regions=2, mode=mode)
        assert {(int(i), int(j)) for i, j in np.argwhere(found.mask)} == cells
        assert found.scores == tuple(total[i] for i in best)
        rows, columns = zip(*cells, strict=True)
        assert found.box == (min(rows), min(columns), max(rows) + 1, max(columns) + 1)


def test_corners_do_not_touch_and_a_tie_with_the_threshold_counts():
    s = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert top_regions(s, share=0.125, regions=1).scores == (1.0,)
    assert top_regions(s, share=0.125).scores == (1.0, 1.0)
    assert top_regions(np.ones((3, 3)), share=0.125).mask.all()


def test_modes_differ_where_there_are_many_regions():
    """64 cells that do not touch: a share of 0.25 of them is 16 regions, the paper's K is 3."""
    s = np.zeros((16, 16))
    s[::2, ::2] = 1
    assert len(top_regions(s, share=0.25).scores) == 3
    assert len(top_regions(s, share=0.25, mode="released").scores) == 16


def overlap(mask, box):
    return (mask & box).sum() / (mask | box).sum()


def test_contrast_finds_a_planted_box_that_the_raw_map_does_not():
    """The noise is a factor of both maps, so that the contrast is 3 in the box and 1 outside, up to scale."""
    contrast, raw = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        general = rng.lognormal(0, 1.5, (24, 24))
        box = np.zeros((24, 24), bool)
        top, left = rng.integers(0, 19), rng.integers(0, 17)
        box[top : top + 6, left : left + 8] = True
        query = general * np.where(box, 3, 1)
        query, general = query / query.sum(), general / general.sum()
        share = box.sum() / box.size
        contrast.append(overlap(top_regions(contrastive_attention(query, general), share=share).mask, box))
        raw.append(overlap(top_regions(query, share=share).mask, box))
    assert min(contrast) == 1
    assert np.mean(raw) < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_of_uniform_rows_and_of_one_key(kind):
    """For 2**k keys: k·log 2 with weights and logarithms exact up to u each, sums of equal terms exact."""
    for k in range(1, 6):
        h = attention_entropy(KINDS[kind](np.full((2, 2**k), 2.0**-k, np.float32)))
        u = 2.0**-24
        assert abs(np.asarray(h, np.float64) - k * math.log(2)).max() <= 4 * u * k * math.log(2)
    assert float(attention_entropy(KINDS[kind](np.array([0, 1, 0], np.float32)))) == 0


def test_entropy_is_the_loop_and_rises_with_blur():
    rng = np.random.default_rng(6)
    w = rng.dirichlet(np.ones(9), (3, 4))
    h = attention_entropy(w)
    for i in np.ndindex(3, 4):
        terms = [-x * math.log(x) for x in w[i]]
        # each term has 2 roundings and a logarithm within an ulp, twice; a sum of 9 has 8 on either side
        assert abs(h[i] - math.fsum(terms)) <= 16 * float(U) * math.fsum(map(abs, terms))
    assert (attention_entropy(w / 2 + 1 / 18) > h).all()


def test_entropy_has_finite_gradients_at_zero():
    w = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64, requires_grad=True)
    attention_entropy(w).backward()
    assert torch.isfinite(w.grad).all()
    w = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention_entropy, w)


def test_bad_maps_are_refused(monkeypatch):
    good = np.ones((2, 2)) / 4
    half = good.astype(np.float16)
    for call, text in [
        (
            lambda: contrastive_attention(good, good[:1]),
            "general_map: shape is (1, 2), expected query_map's (2, 2)",
        ),
        (lambda: contrastive_attention(-good, good), "query_map: expected an array of finite weights from 0 on; pass"),
        (lambda: contrastive_attention(good, good * np.nan), "general_map: expected an array of finite weights from 0"),
        (
            lambda: contrastive_attention(good, good, penalty=0),
            "penalty: got 0, expected a number in [2.225",
        ),
        (
            lambda: contrastive_attention(half, half),
            "penalty: got 1e-08, expected a number in [6.103",
        ),
        (lambda: contrastive_attention(good, good, floor=-1), "floor: got -1, expected a number in [0, 1]"),
        (
            lambda: contrastive_attention(np.eye(2, dtype=int), good),
            "query_map: type is int64, expected a floating type",
        ),
        (lambda: fuse_maps(good), "maps: shape is (2, 2), expected (steps, layers, height, width), each at least 1"),
        (lambda: fuse_maps(np.ones((1, 1, 2, 2), int)), "maps: type is int64, expected a floating type"),
        (lambda: top_regions(good[0]), "scores: shape is (2,), expected (height, width)"),
        (lambda: top_regions(good / 0.0), "scores: holds NaN or infinity, expected finite numbers; put a floor"),
        (lambda: top_regions(good, share=0), "share: got 0, expected a number in (0, 1]"),
        (lambda: top_regions(good, regions=0), "regions: got 0, expected a whole number from 1 on"),
        (lambda: top_regions(good, mode="code"), "mode: got 'code', expected 'paper' or 'released'"),
        (lambda: attention_entropy(0.5), "weights: got float, expected an array"),
        (lambda: attention_entropy(-good), "weights: expected an array of finite weights from 0 on"),
    ]:
        with np.errstate(divide="ignore"), pytest.raises(InvalidInput, match=re.escape(text)):
            call()

    def missing(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InvalidInput, match="top_regions: needs SciPy to label regions; pip install scipy"):
        top_regions(good)
