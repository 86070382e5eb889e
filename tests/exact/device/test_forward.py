"""The streaming path on a device: the CPU's bits, enclosures that hold, and errors that are planted."""

import math
import time

import mpmath
import numpy as np
import pytest
from joblib import parallel_config

import refattn
from refattn import Problem, UnsupportedProblem, masks, rules
from refattn.arrays import from_float64, to_float64
from refattn.dtypes import format_of
from refattn.errors import InvalidInput
from refattn.exact import elementwise
from refattn.exact.anywhere import narrowed
from refattn.exact.device import card, finish, forward
from refattn.exact.device.card import KEYS, card_of
from refattn.exact.device.forward import bytes_needed
from refattn.exact.enclosure import Enclosure
from refattn.exact.levels import Level, head_bits
from refattn.exact.run import Work
from refattn.exact.stream import Forward
from tests.exact.device import gate
from tests.exact.device.drawn import compare, draw, drawn_rows
from tests.exact.device.gate import against, enclosures, same_bits
from tests.he.device.emulated import GXX

pytestmark = GXX


def head(rng, n=40, m=300, d=16, **more):
    q, k, v = (rng.standard_normal((1, 1, x, d)) for x in (n, m, m))
    return Problem(q, k, v, **more)


def test_bits_are_the_cpus_over_all_options(trusted):
    wrong, levels = same_bits("cuda", 14, seed=3, most=(60, 200))
    assert wrong == 0
    assert {f"float64 enclosures, L = {i}" for i in range(3)} <= set(levels)
    launched = {name for name, _ in trusted.seen.launched}
    assert launched == {"cut", "weigh", "collect", *finish.KERNELS}


def test_blocks_of_the_size_that_a_gpu_has(stand_in, monkeypatch):
    from refattn.exact.device import canaries

    monkeypatch.setattr(canaries, "check", lambda card: None)
    stand_in(threads=256)
    p = head(np.random.default_rng(0), n=3, m=2500, d=4, softcap=3.0, sink=np.ones(1))
    mine = refattn.evaluate(p, rounding="float64", device="cuda")
    assert compare(mine, refattn.evaluate(p, rounding="float64")) == 0


def test_enclosures_hold_at_every_level(trusted):
    count, violations, _ = enclosures(1500, seed=1)
    assert count >= 1500
    assert violations == 0


def test_the_gate_sees_what_is_outside():
    exact = Enclosure(np.array([1.0, 1.0, 1.0, -np.inf, np.nan]), np.array([2.0**-60, 0, 0, 0, 0]), np.zeros(5))
    got = np.array([[1, 2.0**-60, 2.0**-90], [1, 3 * 2.0**-80, 2.0**-80], [1, 0, 0], [-np.inf, 0, 0], [0.0, 0, 1]])
    assert against(exact, got).tolist() == [0.0, 3 * (1 - 2.0**-40), 0.0, 0.0, np.inf]
    assert against(exact, np.full((5, 3), np.inf)).tolist() == [np.inf, np.inf]  # what is no number proves nothing


def test_parts_that_ended_are_not_run_again(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(gate, "same_bits", lambda *some: asked.append(some) or (some[1] - 1, {"Arb": 2}))
    monkeypatch.setattr(gate, "enclosures", lambda *some, **_: asked.append(some) or (7, 0, {("out", 1): 0.5}))
    for _ in range(2):
        assert gate.gate("cuda", gate.CALLS + 2, 5, seed=1, folder=tmp_path / "kept") == 2 * gate.CALLS
        assert len(asked) == 5  # parts of 25 and 2 calls, the same with gradients, one of comparisons
    assert len({some[2] for some in asked[:2]}) == 2  # each has a seed of its own
    said = capsys.readouterr().out
    assert "27 calls on cuda, 25 differ from the CPU" in said
    assert "7 comparisons with Arb at 320 bits, 0 violations" in said


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_gate_ends_where_enough_is_found(monkeypatch, jobs):
    """A part finds 30 times as much as it is asked for: 4 of 100 are enough, and those that are under way end."""
    asked = []
    monkeypatch.setattr(gate, "ELEMENTS", 1)
    monkeypatch.setattr(gate, "enclosures", lambda *some, **_: asked.append(some) or time.sleep(0.02) or (30, 0, {}))
    with parallel_config("threading"):
        assert gate.gate("cuda", 0, 100, jobs=jobs) == 0
    assert 4 <= len(asked) < (5 if jobs == 1 else 50)  # a busy machine may count late


def test_a_threads_keys_and_tiles_of_rows_meet(trusted, monkeypatch):
    """Two tiles of keys wider than a block's threads, three of rows, a mask by a rule: a row begins in the second."""
    monkeypatch.setattr(forward, "ROWS", 64)  # at this level a fourth of them
    monkeypatch.setattr(forward, "FEWEST", 16)
    monkeypatch.setattr(masks, "WRITTEN", 0)
    card_of(0).keys = 400
    ids = [1] * 10 + [0] * 30, [0] * 500 + [1] * 200
    p = head(np.random.default_rng(0), m=700, allowed=rules.document(*ids), causal="bottom_right")
    mine = refattn.evaluate(p, rounding="float64", device="cuda")
    assert compare(mine, refattn.evaluate(p, rounding="float64")) == 0
    rows = [blocks for name, blocks in trusted.seen.launched if name == "weigh"]
    # the first ten rows see keys of the second tile only, the others of both
    assert sorted(rows) == [6, 8, 8, 16, 16, 16]


def test_a_tile_of_one_key(trusted):
    card_of(0).keys = 16
    p = head(np.random.default_rng(4), n=5, m=17, d=3)
    mine = refattn.evaluate(p, rounding="float64", device="cuda")
    assert compare(mine, refattn.evaluate(p, rounding="float64")) == 0


def test_a_row_that_stays_open_goes_up_a_level_and_to_the_cpu(trusted):
    rng = np.random.default_rng(2)
    p = head(rng, n=4, m=8, d=3)
    tied = Problem(p.query, p.key, np.full_like(p.value, 257.0))  # halfway between two numbers of bfloat16
    mine = refattn.evaluate(tied, rounding="bfloat16", lse_rounding="float64", device="cuda")
    assert compare(mine, refattn.evaluate(tied, rounding="bfloat16", lse_rounding="float64")) == 0
    assert [*mine.stats][:4] == [f"float64 enclosures, L = {i}" for i in range(4)]
    assert [*mine.stats][4].startswith("Arb")


@pytest.mark.parametrize("where", ["radius", "slice", "shift", "mask"])
def test_planted_errors_are_caught(trusted, monkeypatch, where):
    """A radius that forgets the weights, a slice taken one place too low, a shift off by one row, a mask not read."""
    from refattn.exact.device.card import Card

    if where == "radius":
        finish = forward.OnDevice._finish

        def broken(self, at, sums):
            self.most_v = self.most_v * 2.0**-60
            finish(self, at, sums)

        monkeypatch.setattr(forward.OnDevice, "_finish", broken)
    elif where == "slice":
        matmul, calls = Card.matmul, []

        def broken(self, a, b, out):
            matmul(self, a, b, out)
            calls.append(a.shape)
            if len(calls) == 1:
                out[0, 0] = float(out[0, 0]) * (1 + 2.0**-30)

        monkeypatch.setattr(Card, "matmul", broken)
    else:
        launch = Card.launch

        def broken(self, level, name, blocks, given, *text):
            given = list(given)
            if name == "weigh" and where == "mask":
                given[15] = np.uint64(0)
            if name == "collect" and where == "shift":
                given[4] = self.xp.asarray(np.roll(given[4].get(), 1))
            launch(self, level, name, blocks, tuple(given), *text)

        monkeypatch.setattr(Card, "launch", broken)
    p = head(np.random.default_rng(5), n=12, m=130, causal="bottom_right")
    card_of(0).keys = 48
    raw = Work(p, device=card_of(0)).run(Level(1, card_of(0)))
    good = Work(p).run(Level(3))
    off = np.abs((raw["out"].get()[..., 0] - good["out"][..., 0]) + (raw["out"].get()[..., 1] - good["out"][..., 1]))
    honest = (off <= raw["out"].get()[..., 2] + good["out"][..., 2]).all()
    assert not honest


def test_what_is_planted_is_what_fails(trusted):
    """The same comparison without an error holds."""
    p = head(np.random.default_rng(5), n=12, m=130, causal="bottom_right")
    card_of(0).keys = 48
    raw = Work(p, device=card_of(0)).run(Level(1, card_of(0)))["out"].get()
    good = Work(p).run(Level(3))["out"]
    off = np.abs((raw[..., 0] - good[..., 0]) + (raw[..., 1] - good[..., 1]))
    assert (off <= raw[..., 2] + good[..., 2]).all()


@pytest.mark.parametrize("sink", [None, np.array([3.0]), np.array([-40.0])])
def test_a_tile_ends_as_the_operators_end_it(trusted, monkeypatch, sink):
    """The finishing kernels beside the text of the CPU, over the same sums: the same numbers, the same radii."""
    ends, names = [], ("out", "shift", "sums", "relative", "lse")

    def both(work, at, sums):
        for end in (finish.finish, Forward._finish):
            end(work, at, sums)
            ends.append([getattr(work, n)[at].get() for n in names])

    monkeypatch.setattr(forward.OnDevice, "_finish", both)
    p = head(np.random.default_rng(6), n=70, m=40, d=5, sink=sink, causal="bottom_right")
    p.value[..., 2] = 0.0
    for level in range(4):
        ends.clear()
        Work(p, device=card_of(0)).run(Level(level, card_of(0)))
        for mine, theirs in zip(ends[::2], ends[1::2], strict=True):
            assert np.isfinite(mine[0]).all()
            assert not mine[0][:, 2].any()  # of a column of zeros all is 0, and known
            for x, y in zip(mine[:3], theirs[:3], strict=True):
                assert (x[..., :2] == y[..., :2]).all() if x.ndim > 1 else (x == y).all()
            radii = [(x[..., 2], y[..., 2]) for x, y in zip(mine, theirs, strict=True) if x.ndim > 1]
            for x, y in [*radii[:-1], (mine[3], theirs[3])]:  # each within UP of what is not rounded
                assert (np.abs(x - y) <= 2.0**-40 * y).all()
            (x, r), (y, s) = ((z[-1][:, :2], z[-1][:, 2]) for z in (mine, theirs))
            assert (np.abs((x[:, 0] - y[:, 0]) + (x[:, 1] - y[:, 1])) <= r + s).all()  # log2 may differ
            assert (r <= 2 * s).all()


@pytest.mark.parametrize("scale", [None, -3.0])
def test_what_scores_lose_is_what_the_operators_say(trusted, monkeypatch, scale):
    """Radii and cuts by kernels beside the text of the CPU, over the same arrays: the same bits."""
    seen, kernel = [], forward.OnDevice._radii

    def both(work, q, parts, keys, rc):
        x = [end(work, q, parts, keys, rc) for end in (kernel, Forward._radii)]
        seen.append([(a.get(), b.get()) for a, b in zip(*x, strict=True)])
        return x[0]

    monkeypatch.setattr(forward.OnDevice, "_radii", both)
    p = head(np.random.default_rng(8), n=70, m=40, d=5, scale=scale)
    p.query[0, 0, 3], p.query[0, 0, 4], p.key[..., 2] = 0.0, 2.0**-600, 0.0
    for level in range(4):
        Work(p, device=card_of(0)).run(Level(level, card_of(0)))
        x = np.concatenate([p.query[0, 0], np.full((1, 5), np.nan), np.full((1, 5), np.inf)])
        mine, theirs = card_of(0).places(trusted.asarray(x), 20, level).get(), elementwise.places(x, 20, level)
        assert mine.shape == theirs.shape
        assert (mine == theirs).all()
    assert len(seen) == 4
    for (radius, theirs), (size, their_size) in seen:
        assert (size == their_size).all()
        assert (radius == theirs).all()


def test_a_rows_sum_is_compensated(trusted):
    """A thread's weights are 1 and seven times 0.87u, which plain additions would lose: 6u, where 2u may be lost."""
    card = card_of(0)
    planes = np.full((1, 1, 512), -60.0)
    planes[0, 0, 64::64], planes[0, 0, 0] = -53.2, 0.0  # the keys of one thread
    there, (table, *ln2) = card.xp.asarray(planes), card.table
    m, den, low, fade, done = (card.xp.asarray(np.array([x])) for x in (0.0, 0.0, 0.0, 1.0, 3.0))
    number, none, none_of_it = np.float64(0.0), np.uint64(0), np.int32(0)
    given = (there, np.int32(512), np.float64(1.0), number, table, *map(np.float64, ln2), none_of_it, *[number] * 4)
    card.launch(0, "weigh", 1, (*given, none, number, number, none, none, *[number] * 3, m, den, low, fade, done))
    off = math.fsum([float(den[0]), float(low[0]), *(-there.get().ravel())])
    assert abs(off) <= card.row_sum_error(512) * float(den[0])
    assert (float(m[0]), float(done[0])) == (0.0, 4.0)


def test_a_weight_of_level_0_is_as_near_as_is_said(trusted):
    card, rng, w = card_of(0), np.random.default_rng(9), 512
    scores = np.concatenate([[0.0, -0.5 / 4096, -249.9], -rng.uniform(0, 4, w // 2), -rng.uniform(0, 249, w)])[:w]
    planes, (table, *ln2) = trusted.asarray(scores[None, None]), card.table
    m, den, low, fade, done = (trusted.asarray(np.array([x])) for x in (0.0, 0.0, 0.0, 1.0, 0.0))
    number, none, none_of_it = np.float64(0.0), np.uint64(0), np.int32(0)
    given = (planes, np.int32(w), np.float64(1.0), number, table, *map(np.float64, ln2), none_of_it, *[number] * 4)
    card.launch(0, "weigh", 1, (*given, none, number, number, none, none, *[number] * 3, m, den, low, fade, done))
    with mpmath.workprec(200):
        pairs = zip(planes.get().ravel(), scores, strict=True)
        off = max(abs(mpmath.mpf(x) / mpmath.mpf(2) ** mpmath.mpf(s) - 1) for x, s in pairs)
    assert finish.SHORT_ERROR / 4 < off <= finish.SHORT_ERROR


def test_tiles_leave_a_head_of_a_weight_its_bits():
    """The bounds of the streaming path take a head for at least 20 bits wide (docs/proofs/streaming.md, SLACK)."""
    assert all(head_bits(KEYS, level) >= 20 for level in range(4))
    assert KEYS <= 2048  # a block's threads hold so many


def test_what_a_device_does_not_take_is_refused_by_name(trusted):
    rng = np.random.default_rng(0)
    p = head(rng, n=3, m=3)
    steps = p.replace(variant="lightning", causal="bottom_right", options={"decay": (0.1,)})
    with pytest.raises(UnsupportedProblem, match="device: lightning attention goes token by token, which no GPU does"):
        refattn.evaluate(steps, rounding="float64", device="cuda")
    with pytest.raises(UnsupportedProblem, match="device: n_jobs is for the CPU"):
        refattn.evaluate(p, rounding="float64", n_jobs=2, device="cuda")
    with pytest.raises(InvalidInput, match="device: a GPU gives correctly rounded answers; pass rounding="):
        refattn.evaluate(p, device="cuda")
    for name in ("gpu", "CUDA", "cuda:", None, 0):
        with pytest.raises(InvalidInput, match=r"device: got .*, expected 'cpu', 'cuda', or 'cuda:0'"):
            refattn.evaluate(p, rounding="float64", device=name)


def test_definitions_run_there_where_nothing_streams(trusted, monkeypatch):
    """Operators of rows, and what softmax has beside scores, in tiles of two rows: the CPU's bits by their own text."""
    monkeypatch.setattr(card, "SCORES", 2 * 5)
    for p in drawn_rows(np.random.default_rng(0)):
        mine = refattn.evaluate(p, rounding="float32", device="cuda")
        assert compare(mine, refattn.evaluate(p, rounding="float32")) == 0
        assert next(iter(mine.stats)).startswith("float64 enclosures")
    assert "weigh" not in {name for name, _ in trusted.seen.launched}


def test_scores_of_a_definition_fit_into_memory(trusted):
    for free, most in ((2**36, card.SCORES), (8 * card.ALIVE * 100, 100), (0, 1)):
        trusted.seen.free = free
        assert card_of(0).scores() == most


def test_masks_go_there_once_and_signs_come_back(trusted):
    """A definition's masks are NumPy's: those that it is given, and those that it makes of signs."""
    f = Level(1, card_of(0))
    x, mask = f.array(np.array([[1.0, -1.0, 2.0]])), np.array([[True, True, False]])
    assert f.mask(mask) is f.mask(mask)
    assert f.mask(None) is None
    assert x.where(x.positive() & mask).h.get().tolist() == [[1.0, 0.0, 0.0]]
    assert x.columns(np.array([2, 0])).h.get().tolist() == [[2.0, 1.0]]


def test_operators_that_are_softmax_run(trusted):
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 1, 64, 8)) for _ in range(3))
    p = Problem(q, k, v, variant="moba", causal="bottom_right", options={"block_size": 8, "topk": 2})
    mine = refattn.evaluate(p, rounding="float32", device="cuda")
    assert compare(mine, refattn.evaluate(p, rounding="float32")) == 0


def test_too_little_memory_says_how_much_is_needed(stand_in, monkeypatch):
    from refattn.exact.device import canaries

    monkeypatch.setattr(canaries, "check", lambda card: None)
    module = stand_in(free=2**20)
    p = head(np.random.default_rng(0), n=600, m=700)
    need = bytes_needed(600, 700, 16, 16, 2, forward.FEWEST)
    with pytest.raises(UnsupportedProblem, match=f"needs {need / 1e9:.3g} GB of the GPU's memory, 0.00105 GB are free"):
        refattn.evaluate(p, rounding="float64", device="cuda")
    module.seen.free = need  # what it asks for is enough, in smaller tiles of rows
    mine = refattn.evaluate(p, rounding="float64", device="cuda")
    assert compare(mine, refattn.evaluate(p, rounding="float64")) == 0
    assert {n for name, n in module.seen.launched if name == "weigh"} == {256, 88}


def test_large_arrays_find_memory_that_small_ones_left(trusted, monkeypatch):
    p = head(np.random.default_rng(0))
    refattn.evaluate(p, rounding="bfloat16", device="cuda")
    assert not trusted.seen.freed
    monkeypatch.setattr(card, "LARGE", 1)
    refattn.evaluate(p, rounding="bfloat16", device="cuda")
    assert trusted.seen.freed


def test_enclosures_stay_there_until_they_are_read(trusted):
    answer = refattn.evaluate(head(np.random.default_rng(0)), rounding="float16", device="cuda")
    assert set(answer.enclosures) == {"out", "lse"}
    there = answer.enclosures._all["out"]
    assert hasattr(there.mid, "__cuda_array_interface__")
    here = answer.enclosures["out"]
    assert isinstance(here.mid, np.ndarray)
    assert answer.enclosures["out"] is here


@pytest.mark.parametrize("form", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_numbers_keep_their_bits_on_the_way_back(trusted, form):
    numbers = np.array([0.0, -0.0, 1.0, -1.5, 2.0**-9, -(2.0**-6), 448.0, np.inf, -np.inf, np.nan])
    x = from_float64(numbers, form)
    back = narrowed(trusted.asarray(to_float64(x)), format_of(form), card_of(0))
    assert back.dtype == x.dtype
    assert (to_float64(back).view(np.int64) == to_float64(x).view(np.int64)).all()


def test_what_no_bound_is_proven_for_is_refused(trusted):
    p = head(np.random.default_rng(0), n=1, m=2, d=4096)
    with pytest.raises(UnsupportedProblem, match="got 2 keys of 4096 numbers; bounds are proven for fewer than"):
        refattn.evaluate(p, rounding="float64", device="cuda")


def test_empty_axes(trusted):
    for n, m, d, d_v in ((0, 3, 2, 2), (3, 0, 2, 2), (2, 3, 0, 2)):
        p = Problem(np.ones((1, 1, n, d)), np.ones((1, 1, m, d)), np.ones((1, 1, m, d_v)))
        mine = refattn.evaluate(p, rounding="float64", device="cuda")
        assert compare(mine, refattn.evaluate(p, rounding="float64")) == 0


def test_drawn_calls_have_every_option():
    rng = np.random.default_rng(0)
    seen, forms, kinds = set(), set(), set()
    names = ("causal", "window", "softcap", "sink", "bias", "allowed", "scale", "cu_seqlens_q", "lengths_q")
    names += ("offset", "alignment", "query_scale", "key_scale", "value_scale", "out_scale", "block_table", "new_key")
    for _ in range(200):
        p, out, lse = draw(rng, 60)
        seen |= {n for n in names if getattr(p, n) is not None}
        sides = zip(("left", "right"), p.window or (0, 0), strict=True)
        seen |= {f"{side} below 0" for side, x in sides if (x or 0) < 0}
        seen |= {"width 0"} if p.d_k == 0 else set()
        seen |= {"pages and scales"} if p.block_table is not None and p.typed else set()
        forms |= {out, lse}
        kinds |= {x.dtype.name for x in (p.query, p.key, p.value, p.key_scale) if isinstance(x, np.ndarray)}
    assert seen == {*names, "left below 0", "right below 0", "width 0", "pages and scales"}
    assert forms == {"float64", "float32", "float16", "bfloat16"}
    assert kinds == forms | {"int8", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "float8_e8m0fnu"}
