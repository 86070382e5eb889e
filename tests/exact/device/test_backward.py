"""Gradients on a device: the CPU's bits, enclosures that hold, errors that are planted, memory that is asked before."""

import re

import numpy as np
import pytest

import refattn
from refattn import Problem, UnsupportedProblem, masks, rules
from refattn.exact import backward as finishing
from refattn.exact import driver, lowering
from refattn.exact.device import backward, card
from refattn.exact.device.card import Card, card_of
from refattn.exact.heads import Head, heads
from refattn.exact.levels import Level
from refattn.exact.run import Work
from tests.conftest import NIGHTLY
from tests.exact.device.drawn import backward as drawn_backward
from tests.exact.device.drawn import compare, drawn_rows
from tests.exact.device.gate import enclosures, same_bits
from tests.gpu.compiled import NVCC, check_compiles
from tests.he.device.emulated import GXX

GRADIENTS = ("dq", "dk", "dv")


def call(n=40, m=300, d=8, seed=0, heads=1, **more):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, h, x, d)) for h, x in ((heads, n), (1, m), (1, m)))
    p = Problem(q, k, v, **more)
    return p, rng.standard_normal(p.out_shape)


def same(p, dout, rounding="float32"):
    mine = refattn.evaluate(p, rounding=rounding, gradients=dout, device="cuda")
    assert compare(mine, refattn.evaluate(p, rounding=rounding, gradients=dout)) == 0
    return mine


@GXX
def test_bits_are_the_cpus_over_all_options(trusted):
    wrong, levels = same_bits("cuda", 4, seed=5, most=(30, 60), gradients=True)
    assert wrong == 0
    assert {f"float64 enclosures, L = {i}" for i in range(1, 4)} <= set(levels)
    assert set(backward.KERNELS) <= {name for name, _ in trusted.seen.launched}


@GXX
def test_what_arb_rounds_to_zero_keeps_its_sign(trusted):
    """Numbers far below 2**-1074 of both signs are told to be 0 by Arb, one by one; CuPy writes a plain 0 as +0."""
    p, dout = call(n=3, m=5, d=2)
    p = p.replace(bias=np.where(np.arange(5) < 3, 0.0, -2000.0) * np.ones((1, 1, 3, 1)))
    tiny = same(p, dout, "float64").values["dbias"][..., 3:]
    assert not tiny.any()
    assert 0 < np.signbit(tiny).sum() < tiny.size


@GXX
def test_enclosures_hold_at_every_level(trusted):
    count, violations, worst = enclosures(5000, seed=3)
    assert violations == 0
    assert {(n, level) for n in GRADIENTS for level in range(4)} <= set(worst)
    assert {n for n, _ in worst} >= {"dbias", "dsink"}
    assert count >= 5000


@GXX
@pytest.mark.parametrize(
    "options",
    [
        {"causal": "bottom_right"},
        {"sink": np.array([0.5, -3.0]), "scale": 0.3, "out_scale": np.full((1, 2, 1, 1), 3.0)},
    ],
)
def test_tiles_and_parts_of_rows_meet(trusted, monkeypatch, options):
    """Two tiles of 80 rows in two parts each, four tiles of keys, two heads that share theirs; keys end in parts."""
    monkeypatch.setattr(backward, "ROWS", 80)
    monkeypatch.setattr(finishing, "AT_A_TIME", 100)
    card_of(0).keys = 48
    same(*call(n=150, m=170, heads=2, **options))
    blocks = {n for name, n in trusted.seen.launched if name == "slope"}
    assert max(blocks) == 80


@GXX
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 1.5},
        {"softcap": 0.25, "bias": np.linspace(-3, 3, 90).reshape(1, 1, 1, 90), "sink": np.array([0.5, -3.0])},
    ],
)
def test_gradients_of_a_softcap(trusted, options):
    """Two tiles of keys; scores near 0 and far beyond the cap, and a bias that is added behind it."""
    card_of(0).keys = 48
    p, dout = call(n=70, m=90, heads=2, **options)
    same(p.replace(query=p.query * 2.0 ** np.linspace(-4, 1, 70)[:, None]), dout)
    assert "damp" in {name for name, _ in trusted.seen.launched}


@GXX
@pytest.mark.parametrize(
    "options", [{}, {"sink": np.array([0.5, -3.0]), "softcap": 1.5, "causal": "bottom_right", "out_scale": 3.0}]
)
def test_gradients_that_arrive_at_lse(trusted, options):
    """Beside those at out and alone; rows that see one key, or none and the sink, pass them on, too."""
    p, dout = call(n=70, m=66, heads=2, **options)
    dlse = np.random.default_rng(3).standard_normal(dout.shape[:3])
    dlse[0, 0, 3] = dout[0, 0, 5] = 0.0
    for more in ({"gradients": dout, "dlse": dlse}, {"dlse": dlse}):
        mine = refattn.evaluate(p, rounding="float32", device="cuda", **more)
        assert compare(mine, refattn.evaluate(p, rounding="float32", **more)) == 0
        assert mine.dk.any()


@GXX
def test_a_long_mask_by_rules_and_rows_that_see_nothing(trusted, monkeypatch):
    monkeypatch.setattr(masks, "WRITTEN", 0)
    card_of(0).keys = 64
    ids = [1] * 10 + [0] * 25 + [7] * 5, [0] * 130 + [1] * 70
    same(*call(m=200, allowed=rules.document(*ids)))


@GXX
def test_a_head_whose_keys_are_listed_is_taken_whole(trusted, monkeypatch):
    monkeypatch.setattr(masks, "WRITTEN", 0)
    monkeypatch.setattr(lowering, "WRITTEN", 0)
    p, dout = call(n=60, m=80, causal="bottom_right", variant="topk", options={"topk": 4, "local": 1})
    core, cut, part = lowering.lower(p).problem, [], Head.part
    assert next(heads(core)).allowed.lists
    monkeypatch.setattr(Head, "part", lambda one, *some: cut.append(type(one.q)) or part(one, *some))
    same(core, dout, "float64")
    assert "slope" in {name for name, _ in trusted.seen.launched}
    assert set(cut) == {np.ndarray}


@GXX
def test_a_bias_has_a_gradient(trusted):
    """Of its own for each score, exactly 0 where it is -inf, and summed over what it is spread along."""
    card_of(0).keys = 64
    rng = np.random.default_rng(1)
    bias = rng.standard_normal((1, 1, 12, 90))
    bias[rng.random(bias.shape) < 0.2] = -np.inf
    p, dout = call(n=12, m=90, bias=bias)
    mine = same(p, dout)
    assert not mine.dbias[np.isneginf(bias)].any()
    raw = Work(p, dout, device=card_of(0)).run(Level(1, card_of(0)))["dbias"].get()
    assert not raw[np.isneginf(bias)].any()  # exactly: what is -inf has no radius
    assert (raw[np.isfinite(bias)][:, 2] > 0).all()
    for shape in ((1, 1, 1, 90), (1, 1, 12, 1), (1, 1, 1, 1)):  # over keys, gradients sum to 0
        assert honest(p.replace(bias=rng.standard_normal(shape)), dout, ("dbias",)) == [True]


@GXX
def test_a_biass_gradient_where_some_rows_see_no_key_of_a_tile(trusted, monkeypatch):
    monkeypatch.setattr(masks, "WRITTEN", 0)
    card_of(0).keys = 48
    p, dout = call(n=70, m=90, bias=np.random.default_rng(2).standard_normal((1, 1, 70, 90)), causal="top_left")
    assert honest(p, dout, ("dbias", "dq")) == [True, True]
    assert {n for name, n in trusted.seen.launched if name == "slope"} == {70, 25}  # two tiles of 45 keys


@GXX
def test_keys_that_stay_open_go_on_alone_on_the_device(trusted, monkeypatch):
    monkeypatch.setattr(driver, "FEW_KEYS", 2)
    monkeypatch.setattr(driver, "START_BACK", {24: 0})
    p, dout = call(n=20, m=130)
    asked = []
    run = Work.run
    monkeypatch.setattr(Work, "run", lambda self, f, *some: asked.append((f.name, f.device)) or run(self, f, *some))
    mine = refattn.evaluate(p, rounding="float32", gradients=dout, device="cuda")
    levels = [name[-1] for name, device in asked if device is card_of(0)]
    assert levels[:2] == ["0", "1"]  # all, then some keys one level up
    monkeypatch.undo()
    assert compare(mine, refattn.evaluate(p, rounding="float32", gradients=dout)) == 0


@GXX
def test_sums_over_rows_for_a_keys_radius(trusted):
    """Of small whole numbers they are exact: 300 rows in three parts, 70 keys in two blocks, three planes."""
    card, rng = card_of(0), np.random.default_rng(0)
    planes, slopes, omega, relative = (
        rng.integers(-9, 9, s) * 1.0 for s in ((300, 3, 70), (300, 3, 70), (300, 4), 300)
    )
    out, there = card.xp.empty((3, 5, 70)), [card.xp.asarray(x) for x in (planes, slopes, omega, relative)]
    sizes = (np.int32(300), np.int32(70), np.int32(2), np.int32(backward.EACH))
    card.launch(2, "by_key", 6, (*there[:2], *sizes, *there[2:], out), backward.text_back)
    found = out.get().sum(0)
    assert (found[:4] == (planes[:, 0].T @ omega).T).all()
    assert (found[4] == np.abs(slopes[:, 0]).T @ relative).all()


@GXX
def test_some_rows_take_their_part_of_a_forward_pass(trusted, monkeypatch):
    """A long mask by rules: what rows are to each tile goes with them."""
    monkeypatch.setattr(masks, "WRITTEN", 0)
    card_of(0).keys = 64
    p, dout = call(m=200, allowed=rules.document([0] * 10 + [1] * 30, [0] * 130 + [1] * 70))
    need, keys = np.zeros(p.out_shape[:3], bool), np.ones((1, 1, 200), bool)
    need[0, 0, [3, 12, 31]] = True
    work, f = Work(p, dout, device=card_of(0)), Level(2, card_of(0))
    raw, good = work.run(f, need, keys, {}), Work(p, dout).run(Level(3))
    for name in GRADIENTS:
        x, y = raw[name].get(), good[name]
        x, y = (x[need], y[need]) if name == "dq" else (x, y)
        assert (np.abs((x[..., 0] - y[..., 0]) + (x[..., 1] - y[..., 1])) <= x[..., 2] + y[..., 2]).all()
        assert np.isfinite(x).all()


def honest(p, dout, names=GRADIENTS, level=1):
    """Return whether enclosures of a level on the device hold, by those of the last level on the CPU."""
    raw, good = Work(p, dout, device=card_of(0)).run(Level(level, card_of(0))), Work(p, dout).run(Level(3))
    holds = []
    for name in names:
        x, y = raw[name].get(), good[name]
        off = np.abs((x[..., 0] - y[..., 0]) + (x[..., 1] - y[..., 1]))
        holds.append(bool((off <= x[..., 2] + y[..., 2]).all()))
    return holds


PLANTED = {
    "none": [True, True, True],
    "radius of rows": [False, True, True],
    "radius of keys": [True, False, False],
    "slice": [False, True, True],
    "part of rows": [True, False, True],
    "rounded level": [True, True, False],
    "mask": [False, False, False],
    "rows moved": [False, False, False],
    "not damped": [False, False, True],
    "radius of slopes": [False, False, True],
}


@GXX
@pytest.mark.parametrize("where", PLANTED)
def test_planted_errors_are_caught(trusted, monkeypatch, where):
    """Radii that forget what weights lose, slices that are off, a mask that is not read, rows that are mistaken."""
    p, dout = call(n=30, m=130, causal="bottom_right", seed=5)
    if where in ("not damped", "radius of slopes"):
        p = p.replace(softcap=1.0)
    card_of(0).keys = 48
    matmul, launch = Card.matmul, Card.launch

    def product(self, a, b, out):
        matmul(self, a, b, out)
        to = {"slice": (30, 8), "part of rows": (8, 48), "rounded level": (8, 48)}.get(where)
        if to == out.shape and where != "slice":
            which = self.seen_parts = getattr(self, "seen_parts", -1) + 1
            # of a tile: two products of dk, then two of dv
            if which != {"part of rows": 0, "rounded level": 3}[where]:
                return
        elif to != out.shape or a.shape[1] % 48:
            return
        out[0, 0] = float(out[0, 0]) * (1 + 2.0**-20)

    def planted(self, level, name, blocks, given, *more):
        given = list(given)
        if name == "slope" and where == "mask":
            given[19] = np.uint64(0)
        if name == "slope" and where == "rows moved":
            given[21] = self.xp.asarray(np.roll(given[21].get(), 1))
        if name == "damp" and where == "not damped":
            return
        if name == "damp" and where == "radius of slopes":
            given[3] = given[3] * (1 + 2.0**-20)
        launch(self, level, name, blocks, tuple(given), *more)

    monkeypatch.setattr(Card, "matmul", product)
    monkeypatch.setattr(Card, "launch", planted)
    if where == "radius of rows":
        dq = backward.Row.dq
        monkeypatch.setattr(backward.Row, "dq", lambda self, *some: _narrow(dq(self, *some)))
    if where == "radius of keys":
        monkeypatch.setattr(backward.OnDevice, "_radii", lambda self, n, some, planes, slopes, row, tile, sums: None)
        monkeypatch.setattr(backward.OnDevice, "loses", lambda self, *some: None)
    assert honest(p, dout) == PLANTED[where]


def _narrow(x):
    x[..., 2] = 0.0
    return x


@GXX
def test_too_little_memory_says_how_much_is_needed(stand_in, monkeypatch):
    from refattn.exact.device import canaries

    monkeypatch.setattr(canaries, "check", lambda card: None)
    module = stand_in(free=2**18)
    p, dout = call(n=600, m=70)
    need = backward.bytes_needed(600, 70, 8, 8, 1, (backward.FEWEST, 512))
    text = rf"gradients of a head of 600 queries and 70 keys, d = 8 and 8, need {need / 1e9:.3g} GB"
    with pytest.raises(UnsupportedProblem, match=text):
        refattn.evaluate(p, rounding="float32", gradients=dout, device="cuda")
    assert not module.seen.launched
    module.seen.free = need  # what it asks for is enough, in smaller tiles of rows
    raw = Work(p, dout, device=card_of(0)).run(Level(1, card_of(0)))
    assert np.isfinite(raw["dk"].get()).all()
    assert {n for name, n in module.seen.launched if name == "slope"} == {256, 88}


@GXX
def test_definitions_have_gradients_there_where_nothing_streams(trusted, monkeypatch):
    """Operators of rows, what softmax has beside scores, numbers beyond 2**200: in tiles of two rows."""
    monkeypatch.setattr(card, "SCORES", 2 * 5)
    for p in drawn_rows(np.random.default_rng(1), gradients=True):
        same(p, np.random.default_rng(2).standard_normal(p.out_shape))
    p, dout = call(n=3, m=5)
    same(p.replace(value=p.value * 2.0**300), dout)
    assert "slope" not in {name for name, _ in trusted.seen.launched}


@GXX
def test_a_tile_of_a_long_head_has_fewer_rows(trusted, monkeypatch):
    one, f = next(heads(call(n=2, m=70)[0])), Level(1, card_of(0))
    assert backward.rows_of_a_tile(one, f, 600) == backward.ROWS
    for rows in (512, backward.FEWEST, 1):
        monkeypatch.setattr(backward, "PAIRS", 70 * rows)
        assert backward.rows_of_a_tile(one, f, 600) == max(rows, backward.FEWEST)


@GXX
def test_what_has_no_gradients_there_is_refused(trusted):
    p, dout = call(n=3, m=5)
    with pytest.raises(UnsupportedProblem, match="device: gradients of values of 4096 numbers; bounds are proven"):
        refattn.evaluate(
            p.replace(value=np.ones((1, 1, 5, 4096))), rounding="float64", gradients=np.ones((1, 1, 3, 4096)),
            device="cuda",
        )  # fmt: skip
    key = p.key.copy()
    key[0, 0, 2] = np.nan
    with pytest.raises(UnsupportedProblem, match="gradients: NaN or inf in sight of a query"):
        refattn.evaluate(p.replace(key=key), rounding="float64", gradients=dout, device="cuda")


@GXX
def test_zeros_and_empty_axes(trusted):
    p, dout = call(n=4, m=30)
    for x in (dout[..., 0], dout[0, 0, 1], p.key[..., 2], p.value[..., 3]):
        x[...] = 0.0  # a sum of exact zeros is one
    assert not same(p, dout).dv[..., 0].any()
    for n, m in ((0, 3), (3, 0)):
        same(*call(n=n, m=m))


def test_gradients_are_drawn_with_every_option():
    rng, seen = np.random.default_rng(0), set()
    names = ("causal", "window", "softcap", "sink", "bias", "allowed", "cu_seqlens_q", "lengths_q")
    for _ in range(60):
        p, dout, dlse = drawn_backward(rng, 60)
        assert dout.shape == p.out_shape
        seen |= {n for n in names if getattr(p, n) is not None}
        seen |= set() if dlse is None else {"dlse"}
    assert len(seen) == 9


@NVCC
@pytest.mark.parametrize(
    ("level", "arch"), [(i, a) for i in range(4) for a in ("80", "90a")] if NIGHTLY else [(2, "80"), (3, "90a")]
)
def test_kernels_compile_without_spills(tmp_path, level, arch):
    check_compiles(tmp_path / "backward.cu", backward.text_back(level), arch=arch)


def test_kernels_have_the_names_that_are_launched():
    names = re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(", backward.text_back(0))
    assert tuple(names) == backward.KERNELS
