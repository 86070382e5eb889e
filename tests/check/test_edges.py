"""Verdicts have two levels: wrong, and different at an edge."""

from dataclasses import replace

import numpy as np
import pytest

from refattn import Capabilities, check_kernel
from refattn.check import EDGES, FEATURES, FURTHER
from refattn.check.kernels.tiled import tiled
from refattn.dtypes import ELEMENTS

from ..conftest import SMALL

ABLE = Capabilities(frozenset({"float32"}), FEATURES | FURTHER, lse=True, elements=ELEMENTS)


def changed(change):
    def kernel(p):
        out, lse = tiled(p)
        with np.errstate(all="ignore"):
            return change(p, out.copy(), lse.copy())

    return kernel


def nan_in_empty_rows(p, out, lse):
    out[np.isneginf(lse)] = np.nan
    return out, lse


def finite_lse(p, out, lse):
    lse[np.isneginf(lse)] = 0
    return out, lse


def nan_from_behind(p, out, lse):
    out[:, :, :, np.isnan(p.value).any((0, 1, 2))] = np.nan
    return out, lse


def nan_hidden(p, out, lse):
    return np.nan_to_num(out, posinf=0, neginf=0), lse


def flushed(p, out, lse):
    out[np.abs(out) < np.finfo(np.float32).tiny] = 0
    return out, lse


def overflows(p, out, lse):
    finite = np.abs(p.value[np.isfinite(p.value)])
    # in the output's own type: the edge is the overflow, not a type that changes
    return out * out.dtype.type(np.inf if finite.max(initial=0) > 1e38 else 1), lse


def scale_dropped(p, out, lse):
    return tiled(p) if p.scale is None or p.scale > 0 else tiled(p.replace(scale=None))


@pytest.mark.parametrize(
    ("change", "edge"),
    [
        (nan_in_empty_rows, "empty-row"),
        (finite_lse, "empty-lse"),
        (nan_from_behind, "nan-behind-mask"),
        (nan_hidden, "nan-in-sight"),
        (flushed, "subnormal"),
        (overflows, "overflow"),
        (scale_dropped, "scale"),
    ],
)
def test_a_kernel_that_differs_at_one_edge_is_right(change, edge):
    report = check_kernel(changed(change), capabilities=ABLE, only=SMALL)
    assert set(report.broken) == {edge}, [report.describe(c) for c in report.failures]
    assert report.right
    assert not report.passed
    assert report.verdict == "right · 1 edge differs"
    declared = replace(ABLE, edges=frozenset({edge}))
    one = next(c.name for c in report.checks if c.verdict == "edge")
    assert not check_kernel(changed(change), capabilities=ABLE, only=one).passed
    assert check_kernel(changed(change), capabilities=declared, only=one).passed


def test_a_declared_edge_that_is_kept_is_reported():
    report = check_kernel(tiled, capabilities=ABLE, only="gaussian/*")
    assert report.passed
    whole = replace(report, edges=frozenset({"scale"}), whole=True)
    assert whole.kept == ["scale"]
    assert whole.right
    assert not whole.passed


def test_a_wrong_number_beside_an_edge_is_wrong():
    def kernel(p, out, lse):
        out[..., -1, :] *= 1.01
        return nan_in_empty_rows(p, out, lse)

    report = check_kernel(changed(kernel), capabilities=ABLE, only="empty/*")
    assert report.verdict == "WRONG"
    assert not report.right
    assert all(np.isfinite(c.worst.got) for c in report.checks if c.verdict == "failed")  # what is wrong comes first


def test_scores_of_a_few_hundred_are_no_edge():
    def no_shift(p):
        s = np.einsum("bhid,bhjd->bhij", p.query, p.key) / np.sqrt(p.query.shape[-1])
        with np.errstate(all="ignore"):
            w = np.exp(s)
            return (np.einsum("bhij,bhjd->bhid", w, p.value) / w.sum(-1, keepdims=True)).astype(p.query.dtype)

    report = check_kernel(no_shift, only="shifted/*")
    assert {c.name for c in report.checks if c.verdict == "failed"} >= {
        "shifted/large[float32]",
        "shifted/small[float32]",
    }


def test_every_edge_has_its_section():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "edges.md").read_text()
    for name in EDGES:
        assert f"\n## {name}\n" in text
