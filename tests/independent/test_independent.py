"""Every bit of small calls agrees with a computation that shares no code with refattn."""

import ast
from pathlib import Path

import mpmath
import numpy as np
import pytest

from refattn.dtypes import FORMATS

from . import attention
from .calls import differences, draw

BATCHES = 10


@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_bit_agrees(batch):
    compared = 0
    for seed in range(batch * 10, batch * 10 + 10):
        count, found = differences(seed)
        compared += count
        assert found == [], (seed, draw(seed)[0])
    assert compared > 100


def test_every_option_is_drawn():
    calls = [draw(seed) for seed in range(10 * BATCHES)]
    names = ("scale", "causal", "window", "softcap", "sink", "allowed", "bias", "weight", "cu_seqlens_q")
    for name in (*names, "lengths_q", "lengths_k", "offset", "alignment"):
        assert sum(getattr(p, name) is not None for p, _ in calls) >= 5, name
    assert {p.variant for p, _ in calls} == {"softmax", *attention.WEIGHTS}
    assert {p.dtype for p, _ in calls} == set(attention.FORMATS)
    assert sum(dout is not None for _, dout in calls) > 20


def test_it_leaves_everybody_elses_precision():
    assert attention.mp is not mpmath.mp
    assert mpmath.mp.prec < attention.mp.prec == 2400


def test_it_shares_no_code():
    tree = ast.parse(Path(attention.__file__).read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert names == ["mpmath"]


@pytest.mark.parametrize("dtype", attention.FORMATS)
def test_its_rounding(dtype):
    form, rng = FORMATS[dtype], np.random.default_rng(0)
    spread = rng.standard_normal(300) * 2.0 ** rng.integers(form.emin - form.precision - 2, form.emax + 2, 300)
    middles = form.round_array(spread) + form.ulp_array(spread) / 2
    for x in (*spread, *middles[np.isfinite(middles)], 0.0, form.largest):
        assert attention.nearest(attention.mpf(float(x)), dtype) == float(form.round_array(np.array(x)))


@pytest.mark.parametrize("change", ["visible", "dot"])
def test_a_difference_shows(change, monkeypatch):
    right = getattr(attention, change)
    wrong = {
        "visible": lambda call, b, h, i, j: right(call, b, h, i, j) and not (i == j == 3),
        "dot": lambda x, y: right(x, y) * (1 + attention.mpf(2) ** -7),
    }
    monkeypatch.setattr(attention, change, wrong[change])
    assert sum(len(differences(seed)[1]) for seed in range(20)) > 0
