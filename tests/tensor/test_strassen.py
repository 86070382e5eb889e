"""The Strassen form by products of matrices: as by tiles, also where it underflows."""

import numpy as np
import pytest

from refattn import tensor

from .test_tensor import MASKS, arrays


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1.0, 8.0])
@pytest.mark.parametrize("mask", MASKS)
def test_strassen_by_matrices_is_strassen_by_tiles(mask, size, dtype, monkeypatch):
    given = arrays(1, 2, 1, 140, 130, 150, 16, 5, dtype, size=size)
    done = []

    def counted(some, bounds):
        done.append(len(some[0]))
        return by_tiles(some, bounds)

    fast = tensor.strassen.forward

    def spied(inner, scale, bounds, tiles):
        nonlocal by_tiles
        by_tiles = tiles
        return fast(inner, scale, bounds, counted)

    by_tiles = None
    monkeypatch.setattr(tensor.strassen, "forward", spied)
    options = {"form": "strassen", "scale": 0.25, "return_lse": True, **MASKS[mask]}
    out, lse = tensor.attention(*given, **options)
    monkeypatch.setattr(tensor.strassen, "forward", lambda inner, scale, bounds, tiles: tiles(inner, bounds))
    expected, terms = tensor.attention(*given, **options)
    unit = np.finfo(dtype).eps
    logits_ = 0.25 * 3 * 16 * (4.5 * size) ** 2  # larger than any score: its rounding is that of the weights
    assert np.abs(out - expected).max() <= 8 * unit * logits_ * np.abs(given[3]).max() * np.abs(given[4]).max()
    assert np.array_equal(np.isneginf(lse), np.isneginf(terms))
    here = np.isfinite(terms)
    assert np.abs(lse[here] - terms[here]).max() <= 8 * unit * logits_
    if size > 1 and dtype == "float32":
        assert sum(done) > 0  # logits of some hundreds: float32 underflows in some rows, which are left to the tiles
