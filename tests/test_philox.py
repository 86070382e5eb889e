"""Dropout whose mask a call names by a seed, or has in bits: the same answers as with the mask, wherever calls go."""

import re

import numpy as np
import pytest
import torch

from refattn import (
    Capabilities,
    InvalidProblem,
    Problem,
    UnsupportedProblem,
    check_kernel,
    check_problem,
    dropout_mask,
    evaluate,
    load_problem,
    query_rows,
    save_problem,
)
from refattn.check.bugs.dropped import SEED_BUGS
from refattn.check.bugs.planted import planted
from refattn.check.diagnose.shrink import program, shrink
from refattn.check.inputs.families import calls, cases
from refattn.check.kernels.tiled import tiled
from refattn.check.model import FEATURES, FURTHER
from refattn.dropout import drawn
from refattn.scores import score_mod

SEED, OFFSET = 2**63 + 12345, 2**32 - 20
ABLE = Capabilities({"float32"}, FEATURES | FURTHER, lse=True, gradients={"dq", "dk", "dv"})


def small(n_q=21, n_k=37, layout="flash", b=2, **more):
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((b, h, n, 8)).astype(np.float32) for h, n in ((4, n_q), (2, n_k), (2, n_k)))
    more = {"philox_layout": layout, "philox_seed": SEED, "philox_offset": OFFSET, "dropout_p": 0.25} | more
    return Problem(q, k, v, **more)


def masked(p, mask):
    return p.replace(philox_layout=None, philox_seed=None, philox_offset=None, dropout_mask=mask)


def same(a, b):
    return all((np.asarray(a.values[n]) == np.asarray(b.values[n])).all() for n in a.values)


@pytest.mark.parametrize("layout", ["flash", "efficient"])
def test_a_seed_is_its_mask(layout):
    p = small(layout=layout)
    mask = dropout_mask(SEED, OFFSET, (2, 4, 21, 37), 0.25, layout)
    assert (drawn(p).dropout_mask == mask).all()
    dout = np.ones(p.out_shape, np.float32)
    wanted = evaluate(masked(p, mask), rounding="float64", gradients=dout)
    assert same(evaluate(p, rounding="float64", gradients=dout), wanted)
    assert not same(evaluate(p.replace(philox_offset=OFFSET + 32), rounding="float64", gradients=dout), wanted)
    assert (drawn(p.replace(philox_offset=None)).dropout_mask == dropout_mask(SEED, 0, mask.shape, 0.25, layout)).all()
    assert drawn(p.to("torch")).dropout_mask.tolist() == mask.tolist()


def test_bits_are_their_mask():
    mask = np.random.default_rng(3).random((2, 4, 21, 37)) < 0.7
    bits = np.zeros((2, 4, 21, 5), np.uint8)
    for *at, j in np.argwhere(mask):
        bits[*at, j // 8] |= 1 << (j % 8)
    p = masked(small(), bits)
    assert p.features() == masked(small(), mask).features() - {"dropout_mask"} | {"dropout_bits"}
    wanted = evaluate(masked(p, mask), rounding="float64")
    assert same(evaluate(p, rounding="float64"), wanted)
    bits[..., 4] |= 0b11100000  # past the last key
    assert same(evaluate(masked(p, bits), rounding="float64"), wanted)
    assert (drawn(masked(p, bits[:1, :, :1])).dropout_mask == mask[:1, :, :1]).all()


def test_packed_sequences_draw_as_many_items():
    """Rows and keys count from each sequence's first, in heads that count on from sequence to sequence."""
    ends = np.array([0, 5, 5, 21]), np.array([0, 20, 30, 37])
    p = small(b=1, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], lengths_k=np.array([20, 10, 3]))
    mask, whole = dropout_mask(SEED, OFFSET, (3, 4, 16, 20), 0.25), np.zeros((1, 4, 21, 37), bool)
    for t in range(3):
        (a, b), (c, d) = (e[t : t + 2] for e in ends)
        whole[0, :, a:b, c:d] = mask[t, :, : b - a, : d - c]
    assert (drawn(p).dropout_mask == whole).all()
    assert same(evaluate(p, rounding="float64"), evaluate(masked(p, whole), rounding="float64"))
    assert check_problem(tiled, p, "x", model=tiled.model).passed


def test_calls_carry_their_seed(tmp_path):
    p = small(philox_seed=np.uint64(SEED))
    assert isinstance(p.philox_seed, int)
    save_problem(p, tmp_path / "p.npz")
    again = load_problem(tmp_path / "p.npz")
    assert again.settings() == p.settings()
    assert again.philox_seed == SEED
    assert again.dropout_mask is None
    text = program("refattn-tiled", small(2, 3))
    assert f"philox_seed={SEED}" in text
    said = []
    exec(text, {"print": lambda *x: said.append(x)})  # it judges the kernel
    assert said == [()]
    rows = query_rows(p, 3, 7)
    assert (rows.dropout_mask == drawn(p).dropout_mask[:, :, 3:7]).all()
    parts = evaluate(p, rounding="float64", progress=lambda *_: None)
    assert same(parts, evaluate(p, rounding="float64"))
    found = shrink(p, None, lambda q, dout: q.philox_seed is not None)[0]
    assert found.philox_seed == SEED
    assert found.n_q * found.n_k == 1


def test_kernels_are_called_with_seeds():
    """In models' calls, as every two options meet; kernels without have the calls that they had."""
    found = {c.build.dropout for c in calls("softmax", ABLE, seed=3)}
    assert found == {"", "mask", "bits", "flash", "efficient"}
    one = next(c for c in calls("softmax", ABLE, seed=3) if c.build.dropout == "efficient").problem("float32")
    assert one.philox_layout == "efficient"
    without = Capabilities({"float32"}, ABLE.features - {"dropout_mask", "dropout_bits"} - {f"philox_{x}" for x in
        ("flash", "efficient")})  # fmt: skip
    assert {c.build.dropout for c in calls("softmax", without, seed=3)} == {""}


@pytest.mark.parametrize("name", SEED_BUGS)
def test_a_seed_that_is_off_is_caught_in_quick(name):
    able = Capabilities({"float32"}, ABLE.features, lse=True)
    report = check_kernel(planted(name), capabilities=able, only="dropout/*", budget="quick", model=tiled.model)
    wrong = {c.name for c in report.failures}
    assert wrong == {"dropout/bits[float32]" if "bits" in name else "dropout/philox[float32]"}


@pytest.mark.parametrize("layout", ["flash", "efficient"])
def test_the_law_of_offsets(layout):
    """Of a kernel that draws, and of one whose heads all draw the same."""
    able = Capabilities({"float32"}, FEATURES | {f"philox_{layout}"}, lse=True)

    def alike(p):
        q = drawn(p)
        if q is p:
            return tiled(p)
        return tiled(q.replace(dropout_mask=np.broadcast_to(q.dropout_mask[:, :1], q.dropout_mask.shape)))

    none = check_kernel(tiled, capabilities=Capabilities({"float32"}, lse=True), only="law/philox_moved")
    assert [c.verdict for c in none.checks] == ["unsupported"]
    for kernel, good in ((tiled, True), (alike, False)):
        report = check_kernel(kernel, capabilities=able, only="law/philox_moved", model=tiled.model)
        assert len(report.checks) == 1
        assert report.passed is good


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dropout_p": None}, "philox_layout: got a seed's without dropout_p"),
        ({"philox_layout": None}, "philox_layout: is missing beside philox_seed"),
        ({"philox_seed": None}, "philox_seed: is missing beside philox_layout"),
        ({"philox_layout": "cudnn"}, "philox_layout: got 'cudnn', expected one of flash, efficient; cuDNN's layout is "
            "not public; let it write its mask"),
        ({"philox_layout": "fa3"}, "philox_layout: got 'fa3', expected one of flash, efficient"),
        ({"philox_layout": ["flash"]}, "philox_layout: got ['flash']"),
        ({"philox_seed": 2**64}, "philox_seed: got 18446744073709551616, expected an integer of at least 0 and below "
            "2**64"),
        ({"philox_seed": True}, "philox_seed: got True"),
        ({"philox_offset": -1}, "philox_offset: got -1"),
        ({"philox_offset": 1.0}, "philox_offset: got 1.0"),
        ({"dropout_mask": np.ones((1, 1, 1, 1), bool)}, "philox_layout: got a seed's beside dropout_mask"),
        ({"philox_layout": "efficient", "lengths_k": np.array([3, 4])}, "philox_layout: got 'efficient' beside "
            "lengths_k; it counts the weights of whole arrays alone"),
    ],
)  # fmt: skip
def test_bad_seeds_are_refused(change, text):
    with pytest.raises(InvalidProblem, match=f"^{re.escape(text)}"):
        small(**change)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (np.zeros((2, 4, 21, 37), np.uint8), "dropout_mask: got shape (2, 4, 21, 37), expected (2, 4, 21, 5) (8 keys "
            "to a byte) or 1 in place of another axis"),
        (np.zeros((2, 4, 21, 1), np.uint8), "dropout_mask: got shape (2, 4, 21, 1)"),
        (np.zeros((2, 4, 21, 5), np.int8), "dropout_mask: got dtype int8, expected bool, True where a weight is kept, "
            "or bits in uint8"),
    ],
)  # fmt: skip
def test_bad_bits_are_refused(mask, text):
    with pytest.raises(InvalidProblem, match=f"^{re.escape(text)}"):
        masked(small(), mask)


def test_what_has_no_seeds_says_so():
    p = small()
    with pytest.raises((InvalidProblem, UnsupportedProblem), match=r"philox_layout|dropout"):
        evaluate(p.replace(variant="sigmoid"))
    with pytest.raises(UnsupportedProblem, match="philox_flash"):
        Capabilities({"float32"}, FEATURES | {"philox_efficient"}).require(p)
    with pytest.raises(UnsupportedProblem, match="philox_layout"):
        score_mod(p)
    empty = small(0, 5)
    assert evaluate(empty).out.shape == (2, 4, 0, 8)
    assert evaluate(masked(small(3, 0), np.zeros((2, 4, 3, 0), np.uint8))).out.shape == (2, 4, 3, 8)
    assert torch.equal(drawn(p.to("torch")).query, p.to("torch").query)
    assert next(c for c in cases("softmax") if c.name == "dropout/philox").backward
