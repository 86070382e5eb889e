"""Approximations whose error is measured: the measure is the error."""

import math

import numpy as np
import pytest

from refattn import InvalidInput, UnsupportedProblem, tensor

from .test_tensor import arrays


def test_centroids_of_clusters_and_what_is_measured_of_them():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((2, 12, 8))
    k1, k2 = (c[rng.integers(12, size=200)] + 0.05 * rng.standard_normal((200, 8)) for c in centers)
    q, v1, v2 = rng.standard_normal((60, 8)), *(x @ rng.standard_normal((8, 4)) for x in (k1, k2))
    given = [x[None, None] for x in (q, k1, k2, v1, v2)]
    exact = tensor.attention(*given, scale=8**-0.5)
    relative = []
    for first_order in (False, True):
        found = tensor.centroids(*given, clusters=12, scale=8**-0.5, first_order=first_order, sample=60)
        relative.append(found.relative)
        assert math.isclose(found.error, np.abs(found.out - exact).max(), rel_tol=1e-9)
        assert len(found.rows) == 60
    assert relative[1] < relative[0]
    whole = tensor.centroids(*given, clusters=200, scale=8**-0.5)
    assert whole.relative < 1e-12  # every key its own cluster
    with pytest.raises(InvalidInput, match="clusters: got 0, expected from 1 to 200"):
        tensor.centroids(*given, clusters=0)


@pytest.mark.parametrize("form", ["trilinear", "strassen", "rank_one"])
def test_the_error_of_a_window_is_measured(form):
    given = arrays(1, 2, 1, 50, 50, 50, 6, 3)
    found = tensor.windowed(*given, window=(8, 16), form=form, sample=50)
    exact = tensor.attention(*given, causal="bottom_right", form=form)
    assert math.isclose(found.error, np.abs(found.out - exact).max(), rel_tol=1e-9)
    assert tensor.windowed(*given, window=(50, 50), form=form).error < 1e-12
    with pytest.raises(InvalidInput, match="sample: got 0, expected at least 1"):
        tensor.windowed(*given, window=(8, 16), sample=0)
    with pytest.raises(UnsupportedProblem, match="its error is not measured by rows"):
        tensor.windowed(*given, window=(8, 16), form="tree")
