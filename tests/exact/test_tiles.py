import pickle
import tracemalloc
from contextlib import nullcontext

import numpy as np
import pytest

from refattn import (
    InvalidInput,
    InvalidProblem,
    Problem,
    check_problem,
    evaluate,
    load_problem,
    masks,
    rules,
    save_problem,
)
from refattn.check.bounds import expected
from refattn.check.inputs.sample import sample_of
from refattn.check.model import flash
from refattn.exact import choosing, firsts, lowering, tiles
from refattn.exact.arithmetics import Balls
from refattn.exact.heads import heads
from refattn.exact.levels import Level
from refattn.exact.parts import fingerprint
from refattn.exact.run import Work
from refattn.rules.atoms import changed
from refattn.rules.lists import listed
from refattn.rules.view import View


@pytest.fixture
def views(monkeypatch):
    """Keep every mask of a rule unwritten, however short it is."""
    monkeypatch.setattr(masks, "WRITTEN", 0)
    monkeypatch.setattr(lowering, "WRITTEN", 0)


def call(n_q, n_k, seed=0, heads=(2, 1), **more):
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.standard_normal((1, h, n, 8)).astype(np.float32)
        for h, n in zip((heads[0], heads[1], heads[1]), (n_q, n_k, n_k), strict=True)
    )
    return Problem(q, k, v, **more)


RULES = {
    "window and first keys": rules.causal() & (rules.window(70, 0) | rules.sinks(3)),
    "some rows see none": rules.causal() & ~rules.prefix(150),
    "dilated": rules.dilated(5) & rules.window(400, 0),
    "blocks by head": rules.blocks(np.random.default_rng(1).random((2, 5, 4)) < 0.4, 64, 80),
    "single keys": rules.array(np.random.default_rng(2).random((300, 310)) < 0.01),
    "narrow blocks": rules.blocks(np.random.default_rng(3).random((30, 62)) < 0.3, 10, 5),
    "nothing": rules.prefix(0),
    "all": rules.window(None, None),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("more", [{}, {"sink": np.float32([0.5, -1.0])}, {"causal": "bottom_right", "softcap": 3.0}])
def test_a_rule_gives_what_its_array_gives(views, name, more):
    p = call(300, 310, allowed=RULES[name], **more)
    # dk of a key that no row sees, or only rows with one key, is 0, which balls must find
    dout = None if more or "single" in name or "none" in name else np.random.default_rng(5).standard_normal(p.out_shape)
    got, want = (evaluate(x, rounding="float32", gradients=dout) for x in (p, p.written_out()))
    assert isinstance(next(heads(p)).allowed, View)
    assert got.values.keys() == want.values.keys()
    for n in want.values:
        np.testing.assert_array_equal(got.values[n], want.values[n], n)


def test_lost_numbers_and_packed_sequences(views):
    p = call(40, 300, allowed=rules.window(150, 20), bias=np.float32(np.arange(300) % 7)[None, None, None])
    key, value, bias = (np.array(x) for x in (p.key, p.value, p.bias))
    key[..., 20, 0], value[..., 250, 1], bias[..., 3], bias[..., 200] = np.nan, np.inf, -np.inf, np.nan
    lost = p.replace(key=key, value=value, bias=bias)
    offsets = np.array([0, 30, 330])
    rule = rules.chunk(70) | rules.dilated(9)
    packed = call(330, 330, causal="bottom_right", allowed=rule, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    weighed = p.replace(weight=np.float32(np.arange(300) % 3)[None, None, None], bias=None)
    for x in (lost, packed, weighed):
        got, want = (evaluate(y, rounding="float32") for y in (x, x.written_out()))
        for n in want.values:
            np.testing.assert_array_equal(got.values[n], want.values[n])


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("moba", {"block_size": 16, "topk": 3}),
        ("moba", {"block_size": 100, "topk": 2}),
        ("nsa_selected", {"block_size": 8, "topk": 4, "forced": "first_previous_own"}),
        ("topk", {"block_size": 40, "topk": 3, "by_group": True}),
        ("topk", {"block_size": 64, "topk": 2}),
        ("topk", {"topk": 5, "local": 3}),
        ("power_blocks", {"block_size": 8, "window_blocks": 2}),
        ("titans_mac", {"persistent": 3, "segment": 50}),
        ("block_sparse", {"blocks": tuple(tuple((a + b) % 3 == 0 for b in range(4)) for a in range(4)),
                          "block_q": 80, "block_k": 80}),
        ("neighborhood", {"shape": (15, 20), "window": (4, 3), "dilation": (2, 1)}),
    ],
)  # fmt: skip
def test_operators_choose_the_same_without_their_masks(monkeypatch, variant, options):
    p = call(300, 310 if "shape" not in options else 303, variant=variant, options=options)
    if variant in ("moba", "nsa_selected", "topk"):
        p = p.replace(causal="bottom_right")
    if variant in ("moba", "topk"):
        key = np.array(p.key)
        key[:, :, 256:272] = key[:, :, 32:48]  # equal blocks: ties
        p = p.replace(key=key)
    want = evaluate(p, rounding="float32")
    monkeypatch.setattr(masks, "WRITTEN", 0)
    monkeypatch.setattr(lowering, "WRITTEN", 0)
    monkeypatch.setattr(choosing, "SCORES", 900)
    got = evaluate(p, rounding="float32")
    assert isinstance(got.core.allowed, rules.Rule)
    found = got.core.written_out().allowed
    np.testing.assert_array_equal(np.broadcast_to(found, np.shape(want.core.allowed)), want.core.allowed)
    for n in want.values:
        np.testing.assert_array_equal(got.values[n], want.values[n])
    if want.margins is not None:
        np.testing.assert_array_equal(got.margins == 0, want.margins == 0)
        np.testing.assert_array_equal(np.float32(got.margins), np.float32(want.margins))


def test_long_choices_of_single_keys_need_no_booleans_of_pairs(monkeypatch):
    n = 2800
    assert n * n > masks.WRITTEN
    p = call(n, n, heads=(1, 1), variant="topk", causal="bottom_right", options={"topk": 3})
    monkeypatch.setattr(firsts, "TALL", 20)
    evaluate(p.replace(query=p.query[:, :, :9]), rounding="bfloat16")
    tracemalloc.start()
    evaluate(p, rounding="bfloat16", n_jobs=1)  # each thread has tiles of its own
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < n * n


OPTIONS = {"topk": 5, "local": 3, "sink_keys": 2}
CHOICES = {
    "single keys": ("topk", OPTIONS),
    "none": ("topk", OPTIONS | {"topk": 0}),
    "short blocks": ("topk", OPTIONS | {"block_size": 7}),
    "blocks of 40": ("moba", {"block_size": 40, "topk": 2}),
}


@pytest.mark.parametrize("name", [*CHOICES, "blocks of 64"])
def test_gradients_of_what_is_chosen_are_those_of_its_mask(views, name):
    variant, options = CHOICES.get(name, ("moba", {"block_size": 64, "topk": 2}))
    p = call(250, 270, causal="bottom_right", variant=variant, options=options, sink=np.float32([0.5, -1.0]))
    core = lowering.lower(p).problem
    dout = np.random.default_rng(5).standard_normal(p.out_shape)
    got, want = (evaluate(x, rounding="float32", gradients=dout) for x in (core, core.written_out()))
    assert {"dq", "dk", "dv", "dsink"} < want.values.keys()
    for n in want.values:
        np.testing.assert_array_equal(got.values[n], want.values[n], n)
        assert got.undecided[n] == 0


@pytest.mark.parametrize("sink", [None, np.float32([0.5])])
def test_gathered_gradients_enclose_the_exact_ones(views, monkeypatch, sink):
    """Two groups of rows, pieces of tiles, two threads: a sum that is lost, or added twice, is seen at once."""
    monkeypatch.setattr(tiles, "GROUPS", (100, 200))
    p = call(300, 310, heads=(1, 1), allowed=RULES["window and first keys"], sink=sink)
    dout = np.random.default_rng(5).standard_normal(p.out_shape)
    want = evaluate(p, bits=200, gradients=dout).enclosures
    for level in range(4):
        work = Work(p, dout, 2)
        assert work.backward == [True]
        for n, x in work.run(Level(level)).items():
            # a tail holds the exact number to 2u² of it; differences of near numbers round by u of what is small
            off = np.abs((x[..., 0] - want[n].mid) + (x[..., 1] - want[n].tail))
            assert (off <= x[..., 2] * (1 + 2.0**-50) + 2.0**-103 * np.abs(want[n].mid) + want[n].radius).all(), n


@pytest.mark.parametrize("name", CHOICES)
def test_balls_run_over_what_a_row_chose(views, monkeypatch, name):
    variant, options = CHOICES[name]
    p = call(90, 300, heads=(2, 1), causal="bottom_right", variant=variant, options=options)
    core, widest, product = lowering.lower(p).problem, [], Balls.matmul
    monkeypatch.setattr(Balls, "matmul", lambda f, a, b: widest.append(max(b.shape)) or product(f, a, b))
    dout = np.random.default_rng(5).standard_normal(p.out_shape)
    got = evaluate(core, bits=80, gradients=dout)
    most = int(np.asarray(core.written_out().allowed).sum(-1).max())
    assert max(widest) <= max(most, 8)  # 8 features
    want = evaluate(core, rounding="float64", gradients=dout)
    for n in want.values:
        assert (got.enclosures[n].error(want.values[n]) < np.inf).all()
        np.testing.assert_array_equal(np.float32(got.values[n]), np.float32(want.values[n]), n)


RNG = np.random.default_rng(7)
TERMS = {
    "dropout": {"dropout_p": 0.3, "dropout_mask": RNG.random((1, 2, 90, 300)) >= 0.3},
    "dropout, the same for all rows": {"dropout_p": 0.5, "dropout_mask": RNG.random((1, 1, 1, 300)) >= 0.5},
    "bias": {"bias": RNG.standard_normal((1, 2, 90, 300)).astype(np.float32)},
    "bias, the same for all rows": {"bias": RNG.standard_normal((1, 1, 1, 300)).astype(np.float32)},
}


@pytest.mark.parametrize("name", TERMS)
def test_what_goes_by_pairs_is_cut_with_a_heads_rows_and_keys(views, name):
    """Levels take rows some at a time, balls one by one; the mask written out, levels take the head whole."""
    variant, options = CHOICES["short blocks"]
    p = call(90, 300, causal="bottom_right", variant=variant, options=options)
    core = lowering.lower(p).problem.replace(**TERMS[name])
    dout = np.random.default_rng(5).standard_normal(p.out_shape)
    want = evaluate(core.written_out(), rounding="float32", gradients=dout)
    got = evaluate(core, rounding="float32", gradients=dout, n_jobs=2)
    balls = evaluate(core, bits=80, gradients=dout)
    assert got.values.keys() == want.values.keys()
    for n in want.values:
        np.testing.assert_array_equal(got.values[n], want.values[n], n)
        np.testing.assert_array_equal(np.float32(balls.values[n]), want.values[n], n)


def test_few_open_keys_ask_the_rows_that_see_them(views):
    p = lowering.lower(call(90, 300, heads=(2, 1), causal="bottom_right", variant="topk", options=OPTIONS)).problem
    dout = np.random.default_rng(5).standard_normal(p.out_shape)
    keys = np.zeros((1, 1, 300), bool)
    keys[..., [0, 7, 250, 299]] = True
    none = np.zeros(p.out_shape[:3], bool)
    whole = evaluate(p, rounding="float64", gradients=dout)
    for f in (Level(2), Balls(120)):
        with f.working() if isinstance(f, Balls) else nullcontext():
            raw = Work(p, dout).run(f, none, keys)
        for n in ("dk", "dv"):
            found = raw[n][..., 0] if isinstance(f, Level) else np.vectorize(float)(raw[n])
            np.testing.assert_array_equal(np.float32(found[keys]), np.float32(whole.values[n][keys]))


def test_tiles_end_where_blocks_do():
    def ends(size, n=1000):
        rule = rules.blocks(np.ones((1, -(-n // size)), bool), n, size) & rules.causal()
        found, kinds = tiles.tiles_of(View.of(rule, n, n), np.arange(n), n, 512)
        assert kinds.shape == (n, len(found))
        assert [t.start for t in found] == [0, *(t.stop for t in found[:-1])]
        return [t.stop for t in found]

    assert ends(512) == [512, 1000]
    assert ends(600) == [300, 600, 1000]
    assert ends(100) == [*range(100, 1000, 100), 1000]
    assert ends(30)[:3] == [90, 180, 270]
    rows = np.array([5, 6])
    found, kinds = tiles.tiles_of(View.of(rules.causal(), 1000, 1000), rows, 1000, 512)
    assert found == [slice(0, 512)]
    assert kinds.tolist() == [[rules.PARTIAL]] * 2


def test_long_rules_need_memory_for_numbers_of_tokens_only():
    n = 4096
    assert n * n > masks.WRITTEN
    p = call(n, n, heads=(1, 1), allowed=rules.causal() & rules.window(40, 0))
    evaluate(p.replace(query=p.query[:, :, :300]), rounding="bfloat16")
    tracemalloc.start()
    a = evaluate(p, rounding="bfloat16", n_jobs=1)  # each thread has tiles of its own
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < n * n
    some = [0, 1, 40, 41, 2222, n - 1]
    part = p.replace(query=p.query[:, :, some], allowed=p.allowed.block(some, np.arange(n), n, n)[None, None])
    np.testing.assert_array_equal(evaluate(part, rounding="bfloat16").out, a.out[:, :, some])


def test_the_checks_take_rules(views):
    rule = rules.causal() & rules.document(np.arange(300) // 90)
    p = call(300, 300, allowed=rule)
    plain = p.written_out()
    assert p.features() == plain.features()
    sample = sample_of(p, np.random.default_rng(0))
    assert (sample.of(p).allowed == sample.of(plain).allowed).all()
    got, want = (expected.expected(x, flash("float32")) for x in (p, plain))
    np.testing.assert_array_equal(got.allowed["out"], want.allowed["out"])
    seen = []

    def kernel(q):
        seen.append(q.allowed)
        return evaluate(q, rounding="float32").out

    assert not check_problem(kernel, p, "rules").failures
    assert all(isinstance(x, np.ndarray) for x in seen)
    assert check_problem(lambda q: kernel(q.replace(allowed=None)), p, "rules").failures


def test_files_parts_and_other_processes(views, tmp_path):
    rule = RULES["blocks by head"] | rules.tree([-1, 0, 1]) & ~rules.chunk(7)
    p = call(300, 310, allowed=rule)
    again = pickle.loads(pickle.dumps(p))
    assert repr(again.allowed) == repr(rule)
    np.testing.assert_array_equal(again.written_out().allowed, p.written_out().allowed)
    assert fingerprint(p) == fingerprint(again) != fingerprint(p.replace(allowed=RULES["all"]))
    save_problem(p, tmp_path / "p.npz")
    np.testing.assert_array_equal(load_problem(tmp_path / "p.npz").allowed, p.written_out().allowed)
    whole = evaluate(p, rounding="float32")
    parts = evaluate(p, rounding="float32", checkpoint=tmp_path / "c")
    np.testing.assert_array_equal(parts.out, whole.out)
    assert "allowed=causal()" in repr(p.replace(allowed=rules.causal()))


def test_other_masks_for_some_rows():
    rng, rule = np.random.default_rng(0), rules.causal()
    rows = {(0, 1, 3): rng.random(9) < 0.5, (1, 0, 6): rng.random(9) < 0.5}
    want = np.array(np.broadcast_to(rule.written(2, 2, 7, 9), (2, 2, 7, 9)))
    for at, mask in rows.items():
        want[at] = mask
    made = changed(rule, (2, 2, 7), rows)
    np.testing.assert_array_equal(made.written(2, 2, 7, 9), want)
    for b, h in np.ndindex(2, 2):
        cut = want[b, h].reshape(7, 3, 3)
        assert made.tiles(7, 9, 1, 3, b, h).tolist() == np.where(cut.all(2), 2, cut.any(2).astype(int)).tolist()


def test_a_rule_of_lists():
    rng = np.random.default_rng(0)
    starts, ends = np.array([1, 3, 4, 9]), np.array([3, 4, 8, 11])
    lists = np.where(rng.random((2, 1, 7, 3)) < 0.3, -1, np.argsort(rng.random((2, 1, 7, 4)), -1)[..., :3])
    want = np.zeros((2, 1, 7, 12), bool)
    for b, _, i, c in np.ndindex(lists.shape):
        if lists[b, 0, i, c] >= 0:
            want[b, 0, i, starts[lists[b, 0, i, c]] : ends[lists[b, 0, i, c]]] = True
    rule = listed(lists, starts, ends, 12)
    np.testing.assert_array_equal(rule.written(2, 3, 7, 12), want)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rule)).written(2, 3, 7, 12), want)
    cut = want[1, 0].reshape(7, 4, 3)
    assert rule.tiles(7, 12, 1, 3, 1).tolist() == np.where(cut.all(2), 2, cut.any(2).astype(int)).tolist()
    view = View.of(rule & rules.causal(), 7, 12, 1)
    seen = want[1, 0] & masks.causal(7, 12)
    for rows, keys in view.listed(np.arange(7)):
        others = np.setdiff1d(np.arange(12), keys)
        assert not seen[np.ix_(rows, others)].any()
        assert want[1, 0][rows].any(0)[keys].all()
    np.testing.assert_array_equal(view.any(1), seen.any(1))
    assert not View.of(rules.causal() | rule, 7, 12).lists
    with pytest.raises(InvalidInput, match="of 7 queries and 12 keys, and the call has 7 and 11"):
        rule.dense(7, 11)


def test_calls_that_a_rule_does_not_fit():
    with pytest.raises(InvalidProblem) as e:
        call(4, 5, allowed=rules.document([0, 1]))
    assert str(e.value) == "allowed: rule: document([0, 1]) has numbers of 2 queries, and the call has 4"
    with pytest.raises(InvalidProblem, match="made for 3 query heads, and the call has 2"):
        call(4, 4, allowed=rules.array(np.ones((3, 1, 1), bool)))
