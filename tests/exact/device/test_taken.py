"""Rows of a long call on a device: their diagonal, their keys taken there in their own type, memory asked before."""

import ml_dtypes
import numpy as np
import pytest

import refattn
from refattn import Problem, UnsupportedProblem, masks, query_rows, rules
from refattn.arrays import from_float64
from refattn.dtypes import HELD, format_of
from refattn.exact.device import taken
from refattn.exact.device.card import card_of
from refattn.exact.device.forward import FEWEST, bytes_needed
from tests.exact.device.drawn import compare
from tests.he.device.emulated import GXX

pytestmark = GXX


def call(n=90, m=300, d=8, dtype=np.float32, **more):
    rng = np.random.default_rng(n)
    return Problem(*(rng.standard_normal((1, 2, x, d)).astype(dtype) for x in (n, m, m)), **more)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": "bottom_right"},
        {"causal": "top_left", "window": (20, None)},
        {"causal": "bottom_right", "allowed": rules.document([0] * 40 + [1] * 50, [0] * 100 + [1] * 200)},
    ],
)
def test_rows_keep_their_diagonal(trusted, monkeypatch, options):
    """Rows on a device, by ranges as a long call has them, are those of the whole call on the CPU."""
    monkeypatch.setattr(masks, "WRITTEN", 0)
    p = call(**options)
    whole = refattn.evaluate(p, rounding="float32")
    mine = refattn.evaluate(query_rows(p, 35, 60), rounding="float32", device="cuda")
    assert (mine.out == whole.out[:, :, 35:60]).all()
    assert (mine.lse == whole.lse[:, :, 35:60]).all()
    wrong = p.replace(query=p.query[:, :, 35:60], allowed=None)  # the diagonal of another row
    assert (refattn.evaluate(wrong, rounding="float32").out != whole.out[:, :, 35:60]).any()


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
def test_large_arrays_go_there_in_pieces(trusted, monkeypatch, size):
    """Of 64 bytes through three rooms, which are made once; a room is filled again when it has been read."""
    monkeypatch.setattr(taken, "MANY", 1)
    monkeypatch.setattr(taken, "PIECE", 64)
    monkeypatch.setattr(taken, "ROOMS", 3)
    x = np.arange(2 * size, dtype=np.uint16).reshape(2, size)
    for y in (x, x[:, ::-1]):
        there = taken.sent(card_of(0), y).get()
        assert (there.dtype, there.shape) == (y.dtype, y.shape)
        assert (there == y).all()
    assert trusted.seen.pinned == 3 * 64


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_numbers_taken_are_the_same(trusted, name):
    bits = np.arange(2**16, dtype=np.uint16)
    few = np.array([0.1, -0.0, 2.0**-149, -(2.0**-126 - 2.0**-149), 2.0**-126, 1e30, np.inf, np.nan], np.float32)
    x = {
        "float64": few.astype(np.float64),
        "float32": few,
        "float16": bits.view(np.float16),
        "bfloat16": bits.view(ml_dtypes.bfloat16),
        "float8_e4m3fn": np.arange(256, dtype=np.uint8).view(HELD["float8_e4m3fn"]),
    }[name]
    with np.errstate(invalid="ignore"):
        there, expected = taken.taken(card_of(0), x[::-1][::-1]).get(), x.astype(np.float64)
    assert there.dtype == np.float64
    assert (np.isnan(there) == np.isnan(expected)).all()
    known = ~np.isnan(expected)
    assert (there[known].view(np.int64) == expected[known].view(np.int64)).all()
    back = taken.returned(card_of(0), card_of(0).xp.asarray(expected), format_of(name))
    assert back.dtype == x.dtype
    assert (np.isnan(back.astype(np.float64)) == ~known).all()
    kind = f"u{x.dtype.itemsize}"
    assert (back[known].view(kind) == x[known].view(kind)).all()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_answers_below_the_normal_numbers_are_kept(trusted, name):
    """Values, a bias and a score that are subnormal, and answers of which all are; float32 steps there lose them."""
    rng, least = np.random.default_rng(3), format_of(name).smallest_normal
    cast = lambda x: from_float64(format_of(name).round_array(x), name)  # noqa: E731
    q, v = (rng.uniform(-1, 1, s) for s in ((1, 1, 40, 1), (1, 1, 60, 3)))
    p = Problem(cast(q), cast(np.full((1, 1, 60, 1), 0.5)), cast(v * least))
    one = np.full((1, 1, 1, 1), np.sqrt(least))  # a power of two
    alone = Problem(cast(one * q / 2), cast(one), cast(v[:, :, :1]), scale=1.0)
    for call, which in ((p, "out"), (alone, "lse")):
        theirs = refattn.evaluate(call, rounding=name)
        size = np.abs(theirs.values[which].astype(np.float64))
        assert ((size > 0) & (size < least)).all()
        assert compare(refattn.evaluate(call, rounding=name, device="cuda"), theirs) == 0


def test_what_stands_for_cupy_loses_them_in_float32(trusted):
    x = np.array([2.0**-140, -(2.0**-127), 2.0**-126])
    expected = [0.0, -0.0, 2.0**-126]
    there = card_of(0).xp.asarray
    for found in (there(x).astype(np.float32).view(np.uint32), (there(x.astype(np.float32)) * 1).view(np.uint32)):
        assert (found.get() == np.array(expected, np.float32).view(np.uint32)).all()
    assert (there(x.astype(np.float32)).astype(np.float64).get() == expected).all()


def test_keys_stay_on_the_host_where_they_are_too_many(trusted, monkeypatch):
    p = call(n=5, m=40, dtype=ml_dtypes.bfloat16)
    theirs = refattn.evaluate(p, rounding="float32")
    for part, none in ((taken.PART, False), (0, True)):
        monkeypatch.setattr(taken, "PART", part)
        assert (taken.heads_on(card_of(0), p) is None) == none
        assert compare(refattn.evaluate(p, rounding="float32", device="cuda"), theirs) == 0


def test_few_rows_on_many_keys_ask_for_memory_before(stand_in, monkeypatch):
    from refattn.exact.device import canaries

    monkeypatch.setattr(canaries, "check", lambda card: None)
    module = stand_in(free=2**20)
    p = call(n=4, m=3000)
    need = bytes_needed(4, 3000, 8, 8, 1, FEWEST)
    assert need > 8 * 3000 * 16 * 6  # what is cut of the keys, and the copies that are made on the way
    with pytest.raises(UnsupportedProblem, match=rf"4 queries and 3000 keys, d = 8 and 8, needs {need / 1e9:.3g} GB"):
        refattn.evaluate(p, rounding="float32", device="cuda")
    assert not module.seen.launched
