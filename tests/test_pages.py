"""Keys and values in pages: the answer is that of the keys that the table names, and new keys go where it says."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from refattn import (
    Capabilities,
    InvalidInput,
    InvalidProblem,
    Problem,
    UnsupportedProblem,
    assert_close,
    check_kernel,
    check_problem,
    evaluate,
    load_problem,
    save_problem,
)
from refattn.check.bugs.paged import PAGED_BUGS
from refattn.check.bugs.planted import planted
from refattn.check.diagnose.shrink import program, shrink
from refattn.check.inputs.draw import Draw
from refattn.check.inputs.families import BESIDE, cases, fitted
from refattn.check.inputs.paged import PAGED, paged
from refattn.check.kernel import Kernel
from refattn.check.kernels.tiled import gradients, tiled
from refattn.check.kernels.untrusted import Untrusted
from refattn.check.laws import LAWS, law_problem
from refattn.check.model import FEATURES, FURTHER, flash
from refattn.check.probe import CALLS, tried
from refattn.check.runner import failing
from refattn.check.trial import Trial
from refattn.dtypes import ELEMENTS, FORMATS
from refattn.pages import append, appended, gathered, in_pages, slots
from refattn.scales import quantised

ABLE = Capabilities({"float32"}, FEATURES | FURTHER, lse=True, elements=frozenset(ELEMENTS))
LAYOUTS = ("NHD", "HND")
LENGTHS = np.array([24, 7, 13])


def call(make, **more):
    return make(5, 24, b=3, h=4, h_kv=2, d_v=6, causal="bottom_right", lengths_k=LENGTHS, **more)


def drawn(label):
    return PAGED[label][0](Draw(FORMATS["float32"], np.random.default_rng(3), "softmax"))


def element(cache, layout, page, place, head):
    return cache[page, place, head] if layout == "NHD" else cache[page, head, place]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 3, 8, 24])
def test_a_key_lies_where_the_table_says(layout, size, make):
    p = call(make)
    x = in_pages(p, size, layout, np.random.default_rng(0))
    flat = gathered(x)
    assert (x.page_size, x.room, x.n_k, x.heads_kv, x.d_v) == (size, 24, 24, 2, 6)
    for b, h, j in np.ndindex(3, 2, 24):
        for name in ("key", "value"):
            got = getattr(flat, name)[b, h, j]
            if j < LENGTHS[b]:
                page = x.block_table[b, j // size]
                assert (got == element(getattr(x, name), layout, page, j % size, h)).all()
                assert (got == getattr(p, name)[b, h, j]).all()
            else:
                assert not got.any()
    assert flat.block_table is flat.page_layout is None
    assert gathered(flat) is flat


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("new", [0, 4])
def test_the_answer_is_that_of_the_keys(layout, new, make):
    p = call(make)
    x = in_pages(p, 3, layout, np.random.default_rng(1), new=new)
    assert np.isnan(x.key).any()
    x = x.replace(block_table=np.where(np.arange(8) < -(-LENGTHS[:, None] // 3), x.block_table, -7))
    for rounding in (None, "float32"):
        one, two = evaluate(p, rounding=rounding), evaluate(x, rounding=rounding)
        assert one.out.tobytes() == two.out.tobytes()
        assert one.lse.tobytes() == two.lse.tobytes()
    pytest.importorskip("jax")
    for kind in ("torch", "jax"):
        assert evaluate(x.to(kind), rounding="float32").out.tobytes() == two.out.tobytes()
    with pytest.raises(UnsupportedProblem, match=r"gradients: keys in pages have none; ask for those of refattn.pages"):
        evaluate(x, gradients=np.ones(x.out_shape))
    with pytest.raises(UnsupportedProblem, match="block_table: the tiled kernel has no gradients"):
        gradients(x, np.ones(x.out_shape))


def test_without_lengths_every_page_is_full(make):
    p = call(make).replace(lengths_k=None)
    x = in_pages(p, 8, "NHD", np.random.default_rng(1), spare=0)
    assert x.features() == p.features() | {"paged_nhd"}
    assert evaluate(x).out.tobytes() == evaluate(p).out.tobytes()


def test_items_may_share_pages():
    p = drawn("shared")
    assert (p.block_table[2, :3] == p.block_table[0, :3]).all()
    flat = gathered(p)
    assert (flat.key[2, :, :24] == flat.key[0, :, :24]).all()
    assert check_problem(tiled, p, "shared").passed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_keys_go_behind_the_others_and_nowhere_else(layout, make):
    p = call(make)
    x = in_pages(p, 3, layout, np.random.default_rng(2), new=5)
    want = {n: getattr(x, n).copy() for n in ("key", "value")}
    for b, i, h in np.ndindex(3, 5, 2):
        slot = slots(x)[b, i]
        assert slot == x.block_table[b, (LENGTHS[b] - 5 + i) // 3] * 3 + (LENGTHS[b] - 5 + i) % 3
        for name in want:
            element(want[name], layout, slot // 3, slot % 3, h)[:] = getattr(x, f"new_{name}")[b, h, i]
    before = x.key.tobytes()
    got = appended(x)
    assert x.key.tobytes() == before
    append(x)
    for name in want:
        assert want[name].tobytes() == got[name].tobytes() == getattr(x, name).tobytes()


def test_packed_sequences_have_a_row_of_the_table_each():
    p = drawn("appended-packed")
    ends, used = p.cu_seqlens_q, p.lengths_k
    assert p.segments() == [
        (slice(0, 9), slice(0, 9)), (slice(9, 13), slice(80, 110)), (slice(13, 14), slice(160, 224))
    ]  # fmt: skip
    whole, caches = evaluate(p, rounding="float32"), appended(p)
    for i in range(3):
        rows = slice(ends[i], ends[i + 1])
        one = Problem(
            p.query[:, :, rows], **caches, block_table=p.block_table[i : i + 1], page_layout="NHD",
            lengths_k=used[i : i + 1], causal="bottom_right",
        )  # fmt: skip
        assert evaluate(one, rounding="float32").out.tobytes() == whole.out[:, :, rows].tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_lie_as_the_cache_does(layout, make):
    p = call(make, d=8)
    dense, cache = p.key.astype(float), in_pages(p, 4, layout, np.random.default_rng(5), fill=1.0)
    by_head, by_token = (1, 2, 1, 1), (*cache.key.shape[:1], 1, cache.key.shape[2], 1)
    key, scale = quantised(dense, "float8_e4m3fn", by_head)
    flat = p.replace(key=key, key_scale=scale, out_dtype="float32")
    x = in_pages(flat, 4, layout, np.random.default_rng(5))
    assert evaluate(x).out.tobytes() == evaluate(flat).out.tobytes()
    if layout == "HND":  # a scale for each slot of each page
        key, scale = quantised(cache.key.astype(float), "float8_e4m3fn", by_token)
        x = cache.replace(key=key, key_scale=scale, out_dtype="float32")
        rows = gathered(x)
        for b, j in ((0, 23), (1, 6), (2, 5)):
            assert rows.key_scale[b, 0, j, 0] == scale[x.block_table[b, j // 4], 0, j % 4, 0]
        assert check_problem(tiled, x, "scales").passed


def test_files_words_and_programs(tmp_path, make):
    x = in_pages(call(make, d=2), 12, "HND", np.random.default_rng(0), new=2)
    save_problem(x, tmp_path / "p.npz")
    again = load_problem(tmp_path / "p.npz")
    assert again.settings() == x.settings() == {"causal": "bottom_right", "page_layout": "HND"}
    assert {n: a.tobytes() for n, a in again.arrays().items()} == {n: a.tobytes() for n, a in x.arrays().items()}
    assert " pages=7x12 " in repr(x)
    assert repr(x).endswith("page_layout='HND' lengths_k block_table new_key new_value)")
    text = program("refattn-tiled", x).split("print(")[0]
    space = {}
    exec(text, space)
    assert space["p"].arrays().keys() == x.arrays().keys()
    assert evaluate(space["p"]).out.tobytes() == evaluate(x).out.tobytes()


def test_what_in_pages_refuses(make):
    p, rng = call(make), np.random.default_rng(0)
    x = in_pages(p, 8, "NHD", rng)
    one = p.replace(key_scale=np.ones((1, 1, 24, 1), np.float32))
    whole = p.replace(**{n: getattr(p, n).astype(np.int8) for n in ("key", "value")}, out_dtype="float32")
    size, new = (
        "page_size: got {}, expected an integer of at least 1 that divides 24 keys",
        "new: got {}, expected an in",
    )
    for change, text in (
        ({"page_size": 5}, size.format(5)),
        ({"page_size": True}, size.format(True)),
        ({"page_size": 4.0}, size.format("4.0")),
        ({"layout": "NDH"}, "layout: got 'NDH', expected 'NHD' or 'HND'"),
        ({"layout": ["NHD"]}, r"layout: got \['NHD'\], expected 'NHD' or 'HND'"),
        ({"problem": x}, "problem: is packed or in pages already"),
        ({"problem": 3}, "problem: got 3, expected a Problem"),
        ({"problem": p.to("torch")}, r"problem: is of torch, expected arrays of NumPy; pass problem.to\('numpy'\)"),
        ({"problem": one}, "key_scale: is by batch or token"),
        ({"problem": whole, "fill": 300}, "key: fill: got 300, expected an int8, -128 to 127"),
        ({"rng": 3}, r"rng: got 3, expected a Generator, numpy.random.default_rng\(0\)"),
        ({"rng": None}, "rng: got None, expected a Generator"),
        ({"new": 8}, new.format(8) + "teger from 0 to 7, the keys that every item has"),
        ({"new": 1.0}, new.format("1.0")),
        ({"new": "a"}, new.format("'a'")),
        ({"new": -1}, new.format(-1)),
        ({"spare": -1}, "spare: got -1, expected an integer of at least 0"),
        ({"spare": 1.5}, "spare: got 1.5, expected an integer of at least 0"),
        ({"fill": "a"}, "fill: got 'a', expected a number, NaN or an infinity"),
        ({"fill": None}, "fill: got None, expected a number"),
    ):
        given = {"problem": p, "page_size": 8, "layout": "NHD", "rng": rng} | change
        with pytest.raises(InvalidInput, match=f"^{text}"):
            in_pages(**given)
    for wrong, text in (
        (lambda: slots(3), "problem: got 3, expected a Problem"),
        (lambda: slots(p), "problem: has no new_key, expected a call in pages that appends"),
        (lambda: slots(x), "problem: has no new_key, expected a call in pages that appends"),
        (lambda: gathered(None), "problem: got None, expected a Problem"),
    ):
        with pytest.raises(InvalidInput, match=f"^{text}"):
            wrong()
    assert (in_pages(whole, 8, "NHD", rng, fill=-7).key == -7).any()


def latents(first=0, width=6, new=(0, 0), kind="numpy", step=1):
    """One array of caches, key and value in columns of it, and what is new in them."""
    both = np.arange(4 * 2 * 1 * 16, dtype=np.float32).reshape(4, 2, 1, 16)
    fresh = np.arange(16, dtype=np.float32)[::step].reshape(1, 1, 1, -1) * np.ones((2, 1, 1, 1), np.float32)
    key, value = both[..., 4 * step : 12 * step : step], both[..., 4 * step + first :: step][..., :width]
    new_key, new_value = (
        fresh[..., 4:12] + np.float32(new[0]),
        fresh[..., 4 + first :][..., :width] + np.float32(new[1]),
    )
    given = {"query": np.ones((2, 2, 1, 8), np.float32), "key": key, "value": value}
    given |= {
        "new_key": new_key,
        "new_value": new_value,
        "block_table": np.array([[0, 1], [2, 3]]),
        "lengths_k": LATENT,
    }
    if kind == "torch":
        whole = torch.from_numpy(both)
        given = {n: torch.from_numpy(x.copy()) for n, x in given.items()}
        given |= {"key": whole[..., 4:12], "value": whole[..., 4 + first : 4 + first + width]}
    return Problem(**given, page_layout="NHD")


LATENT = np.array([3, 2])


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("first", [0, 2, -2, 4])
def test_a_value_may_be_columns_of_the_key(first, kind):
    """As a latent's: written once or twice, the caches are the same. Where the new rows differ they are not."""
    p = latents(first, kind=kind)
    if kind == "numpy":
        want = appended(p)
        append(p)
        assert (want["key"] == p.key).all()
        assert (want["value"] == p.value).all()
    a, b = max(0, first), min(8, first + 6)
    text = f"^new_value: differs from new_key in columns {a} to {b - 1} of key, which value shares; give both the same"
    with pytest.raises(InvalidProblem, match=text):
        latents(first, new=(0, 1), kind=kind)
    assert latents(8, 4, new=(0, 1), kind=kind).d_v == 4  # beside the key, and none of its columns


def cache(*shape):
    return np.ones(shape or (4, 2, 1, 8), np.float32)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda k: {"key": k, "value": k, "new_value": 2 * k[:2, :1]},
            "new_value: differs from new_key in columns 0 to 7",
        ),
        (
            lambda k: {"key": k[:3], "value": k[1:]},
            "value: shares memory with key's other rows, and new keys are written",
        ),
        (lambda k: {"key": k, "value": k[::-1]}, "value: shares memory with key's other rows"),
        (
            lambda k: {"key": k[:, :1], "value": k.reshape(-1)[4:60].reshape(7, 1, 1, 8)[:4]},
            "value: shares memory with key's",
        ),
        (
            lambda k: {"key": k, "new_key": k[:2, :1]},
            "new_key: shares memory with key, where new keys are written; pass a",
        ),
        (lambda k: {"value": k, "query": k[:2, :1]}, "query: shares memory with value, where new keys are written"),
        (
            lambda k: {"key": np.lib.stride_tricks.as_strided(k, k.shape, (0, 32, 32, 4))},
            "key: its elements share memory, and new_key is written there",
        ),
        (
            lambda k: {"value": np.lib.stride_tricks.as_strided(k, k.shape, (32, 32, 32, 4))},
            "value: its elements share memory, and new_value is written there; pass a copy",
        ),
    ],
)
def test_nothing_may_lie_where_new_keys_are_written(change, text, kind):
    given = {"query": cache(2, 1, 1, 8), "key": cache(), "value": cache(), "block_table": np.array([[0], [2]])}
    given |= {"new_key": cache(2, 1, 1, 8), "new_value": cache(2, 1, 1, 8), "lengths_k": np.array([1, 1])}
    given |= change(cache())
    if kind == "torch":
        if any(s < 0 for x in given.values() for s in x.strides):
            return  # a tensor has none
        given = {n: torch.from_numpy(x) for n, x in given.items()}
    with pytest.raises(InvalidProblem, match=f"^{text}"):
        Problem(**given, page_layout="NHD")
    assert Problem(**{n: x for n, x in given.items() if not n.startswith("new")}, page_layout="NHD").page_size


def test_a_label_and_an_ability_that_say_nothing(make):
    p = call(make)
    for label in (3, None, ""):
        with pytest.raises(InvalidInput, match=f"label: got {label!r}, expected a string, what to call the check"):
            check_problem(tiled, p, label)
    with pytest.raises(InvalidInput, match="capabilities: features has 'appending' alone, expected a layout"):
        Capabilities({"float32"}, features={"appending"})
    assert Capabilities({"float32"}, features={"appending", "paged_hnd"}).features


@pytest.mark.parametrize("bug", PAGED_BUGS)
def test_a_bug_is_caught_in_quick(bug):
    for dtype in ("float32", "bfloat16"):
        calls = (c.problem(dtype) for c in cases("softmax", "quick") if c.family == "pages")
        assert any(check_problem(planted(bug), p, "quick").count("failed") for p in calls), dtype


def caught(change, features):
    """Which cases, as a kernel with these features gets them, fail a kernel that answers another call."""
    able = Capabilities({"float32"}, features)
    asked = [c for c in (fitted(c, able) for c in cases("softmax") if c.family == "pages") if c is not None]
    calls = [(c.label, c.problem("float32")) for c in asked]
    calls = [(n, p) for n, p in calls if not able.missing(p)]
    assert all(check_problem(tiled, p, "right").passed for _, p in calls)
    return [n for n, p in calls if check_problem(lambda p: tiled(change(p)), p, "wrong").count("failed")]


LOST = ["window", "softcap", "sink", "scale", "bias", "allowed", "weight", "lengths_q", "alibi_slopes", "causal"]
LOST = [(n,) for n in LOST] + [("positions_q",), ("rotary", "rotary_cos", "rotary_sin")]


@pytest.mark.parametrize("names", LOST)
def test_an_option_lost_in_pages_shows(names):
    calls = [c.problem("float32") for c in cases("softmax") if c.name in BESIDE and c.family == "pages"]
    calls = [p for p in calls if getattr(p, names[0]) is not None]
    wrong = planted_in(lambda p: p.replace(**dict.fromkeys(names)))
    assert any(check_problem(wrong, p, "wrong").count("failed") for p in calls)


def planted_in(change):
    return lambda p: tiled(change(p))


def longest(p):
    """The row stride of a table from the longest item."""
    if p.lengths_k is None:
        return p
    n, t = -(-int(p.lengths_k.max()) // p.page_size), p.block_table
    return p.replace(block_table=np.resize(t, len(t) * n).reshape(len(t), n))


def short(most):
    return lambda p: p if p.lengths_k is None else p.replace(lengths_k=np.minimum(p.lengths_k, most))


def slot_of_the_next_page(p):
    return p if p.value_scale is None else p.replace(value_scale=np.roll(p.value_scale, 1, 0))


@pytest.mark.parametrize(
    ("change", "label"),
    [
        (longest, "shared"),
        (short(512), "page-of-one"),
        (lambda p: p.replace(block_table=p.block_table.astype(np.uint8)), "page-of-one"),
        (
            lambda p: p if p.lengths_k is not None else p.replace(lengths_k=np.full(len(p.block_table), p.room - 1)),
            "in-one-array",
        ),
        (slot_of_the_next_page, "float8"),
    ],
)
def test_a_table_or_length_misread_shows(change, label):
    p = next(c for c in cases("softmax") if (c.family, c.label) == ("pages", label)).problem("float32")
    assert check_problem(tiled, p, "right").passed
    assert check_problem(lambda p: tiled(change(p)), p, "wrong").count("failed")


SERVER = {"causal_bottom_right", "lengths_differ", "lengths_k", "grouped_heads"}


@pytest.mark.parametrize(
    ("features", "change"),
    [
        (SERVER | {"paged_nhd", "appending"}, lambda p: p.replace(new_key=None, new_value=None)),
        ({"lengths_differ", "paged_hnd", "appending"}, lambda p: p.replace(new_key=None, new_value=None)),
        (
            FEATURES - {"grouped_heads"} | {"paged_nhd", "lengths_k"},
            lambda p: p.replace(block_table=p.block_table[::-1]),
        ),
        (FEATURES | {"paged_nhd", "paged_hnd"}, lambda p: p.replace(block_table=p.block_table[::-1])),
    ],
)
def test_cases_have_what_a_kernel_has(features, change):
    assert caught(change, frozenset(features))


def test_scales_are_named_by_the_layout(make):
    p = in_pages(call(make, d=8), 4, "NHD", np.random.default_rng(5), fill=1.0)
    pages = p.key.shape[0]
    for layout in LAYOUTS:
        key, value = (x if layout == "NHD" else x.swapaxes(1, 2) for x in (p.key, p.value))
        for one, name in (((1, 1, 2, 1), "head"), ((pages, 4, 1, 1), "token"), ((pages, 1, 1, 1), "block")):
            shape = one if layout == "NHD" else (one[0], one[2], one[1], 1)
            x, scale = quantised(key.astype(float), "float8_e4m3fn", shape)
            q = p.replace(key=x, value=value, key_scale=scale, out_dtype="float32", page_layout=layout)
            assert {n for n in q.features() if n.startswith("scales_by")} == {f"scales_by_{name}"}, (layout, shape)


def test_laws_have_the_layout_that_a_kernel_has():
    able = Capabilities({"float32"}, FEATURES | {"paged_hnd"})
    p = law_problem(LAWS["pages_moved"], "float32", "softmax", able)
    assert (p.page_layout, able.missing(p)) == ("HND", [])
    found = [LAWS["pages_moved"].test(Trial(k, flash("float32"), able), p) for k in (tiled, planted("table_ignored"))]
    assert [w.failures > 0 for w in found] == [False, True]


def test_nan_that_nobody_owns_is_told_from_wrong_numbers():
    p = paged(Draw(FORMATS["float32"], np.random.default_rng(3), "softmax"), 8, "NHD", fill=np.nan)
    (check,) = check_problem(planted("page_tail_read"), p, "nan").checks
    assert (check.verdict, check.edges) == ("edge", ("nan-behind-mask",))
    assert "NaN or inf that no item owns leaks: NaN where the exact value is finite" in check.message
    (check,) = check_problem(planted("page_tail_read"), drawn("shared"), "numbers").checks
    assert check.verdict == "failed"


@pytest.mark.parametrize(
    ("law", "bug"),
    [("pages_moved", "table_ignored"), ("unowned_unread", "page_tail_read"), ("unowned_unread", "table_off_by_one")],
)
def test_a_law_fails(law, bug):
    p = law_problem(LAWS[law], "float32", "softmax")
    found = [LAWS[law].test(Trial(k, flash("float32"), ABLE), p) for k in (tiled, planted(bug))]
    assert [w.failures > 0 for w in found] == [False, True]


def test_no_false_alarm_in_a_hundred_runs(make):
    for seed in range(100):
        rng = np.random.default_rng(seed)
        size, many = int(rng.integers(1, 7)), int(rng.integers(1, 5))
        b, n_q, heads = int(rng.integers(1, 4)), int(rng.integers(1, 5)), int(rng.integers(1, 3))
        new = int(rng.integers(0, size * many + 1))
        more = {
            "causal": [None, "bottom_right", "top_left"][rng.integers(3)],
            "window": [None, (3, 1)][rng.integers(2)],
            "lengths_k": rng.integers(new, size * many + 1, b),
        }
        dtype = ("float32", "bfloat16", "float16", "float64")[rng.integers(4)]
        p = make(n_q, size * many, 4, b=b, h=2 * heads, h_kv=heads, dtype=dtype, seed=seed, **more)
        x = in_pages(p, size, LAYOUTS[rng.integers(2)], rng, new=new)
        report = check_problem(tiled, x, "drawn")
        assert report.passed, (x, report.describe(report.checks[0]))


def kept(change):
    def kernel(p):
        found = tiled(p)
        change(p)
        return found

    return kernel


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda p: p.key.fill(0),
            "key: the cache is wrong in .* places after the call; page 0, place 0 is not as it was",
        ),
        (
            lambda p: p.value.__setitem__((1, 1, 0), 2),
            "value: the cache is wrong in 1 places .*; page 1, place 0 is not",
        ),
        (lambda p: p.block_table.fill(0), "the kernel changed its input block_table"),
        (lambda p: p.new_key.fill(0), "the kernel changed its input new_key"),
    ],
)
def test_nothing_else_may_change(change, text, make):
    x = in_pages(call(make), 3, "HND", np.random.default_rng(0), new=5, fill=1.0)
    report = check_problem(kept(change), x, "kept")
    assert report.count("failed") == 1
    (check,) = report.checks
    assert re.search(text, check.message), check.message
    assert check_problem(kept(lambda p: None), x, "kept").passed


def test_one_cache_of_keys_and_values_stays_one(make):
    """Compressed keys, whose first columns are the values: a kernel writes once."""
    p = in_pages(call(make, d=8), 3, "NHD", np.random.default_rng(0), new=5)
    new = p.new_key[..., :6].copy()
    x = p.replace(value=p.key[..., :6], new_value=new)

    def kernel(p, times=1):
        at = slots(p)
        for _ in range(times):
            p.key[at // 3, at % 3] = p.new_key.swapaxes(1, 2)
        assert np.shares_memory(p.key, p.value)
        return tiled(p.replace(new_key=None, new_value=None))

    assert check_problem(kernel, x, "once").passed
    assert check_problem(tiled, x, "twice").passed
    lazy = check_problem(lambda p: kernel(p, 0), x, "never")
    assert "is not the new row" in lazy.checks[0].message
    apart = x.replace(value=x.value.copy())
    assert check_problem(tiled, apart, "two").passed
    assert not check_problem(kernel, apart, "two").passed


def test_gradients_that_cannot_be_judged_are_said(make):
    x = in_pages(call(make), 3, "NHD", np.random.default_rng(0))
    report = check_problem(tiled, x, "pages", gradients=np.ones(x.out_shape, np.float32))
    assert report.verdict == "right, gradients not judged"
    assert check_problem(tiled, x, "pages").verdict == "right"


def test_results_alone_say_nothing_of_caches(make):
    x = in_pages(call(make), 3, "NHD", np.random.default_rng(0), new=5)
    with pytest.raises(InvalidInput, match="problem: appends, and the caches that a kernel must leave behind are not"):
        assert_close(tiled(x)[0], x)
    flat = gathered(x)
    assert_close(tiled(x)[0], flat)


def test_a_torch_kernel_writes_into_its_tensors(make):
    x = in_pages(call(make), 3, "NHD", np.random.default_rng(0), new=5)

    def kernel(p, write=True):
        place = torch.as_tensor(slots(p))
        if write:
            p.key.view(-1, *p.key.shape[2:])[place] = p.new_key.transpose(1, 2)
            p.value.view(-1, *p.value.shape[2:])[place] = p.new_value.transpose(1, 2)
        out, lse = tiled(call(make))
        return torch.from_numpy(out), torch.from_numpy(lse)

    able = Capabilities({"float32"}, ABLE.features, lse=True, arrays="torch")
    assert check_problem(Kernel.of(kernel, capabilities=able), x, "torch").passed
    lazy = check_problem(Kernel.of(lambda p: kernel(p, False), capabilities=able), x, "torch")
    assert "is not the new row" in lazy.checks[0].message


UNTRUSTED = """
import numpy as np
from refattn import Capabilities

def kernel(p):
    out = np.zeros(p.out_shape, np.float32)
    for s, ((rows, keys), end) in enumerate(zip(p.segments(), p.lengths_k)):
        n = rows.stop - rows.start
        at = np.arange(end)
        page, place = p.block_table[s, at // p.page_size], at % p.page_size
        for x, new in ((p.key, p.new_key), (p.value, p.new_value)):
            x[page[-n:], place[-n:]] = new[0].swapaxes(0, 1)[rows]
        assert (keys.stop - keys.start, p.n_k) == (end, 3 * p.room)
        for h in range(p.heads):
            g = h // (p.heads // p.heads_kv)
            k, v = p.key[page, place, g], p.value[page, place, g]
            w = p.query[0, h, rows] @ k.T / np.sqrt(p.d_k)
            w = np.where(np.tri(n, end, end - n) > 0, w, -np.inf)
            w = np.exp(w - w.max(1, keepdims=True))
            out[0, h, rows] = w @ v / w.sum(1, keepdims=True)
    return out
"""


def test_an_untrusted_kernel_writes_in_its_process(tmp_path):
    file = tmp_path / "k.py"
    file.write_text(UNTRUSTED)
    kernel = Untrusted(f"{file}:kernel")
    try:
        report = check_problem(kernel, drawn("appended-packed"), "packed")
        assert report.passed, report.checks[0].message
    finally:
        kernel.close()


def test_a_kernel_that_knows_no_pages_is_not_called_wrong():
    def kernel(p):
        w = np.exp(p.query @ np.repeat(p.key, p.heads // p.key.shape[1], 1)[: p.batch].swapaxes(2, 3) / 8)
        return w @ np.repeat(p.value, p.heads // p.key.shape[1], 1)[: p.batch]

    report = check_kernel(kernel, only="pages/*")
    assert {c.verdict for c in report.checks} <= {"unread", "unsupported"}


def test_what_init_tries(make):
    found = {}
    for name in ("paged_nhd", "paged_hnd", "appending"):
        p = CALLS[name](Draw(FORMATS["float32"], np.random.default_rng(5), "softmax"))
        assert name in p.features()
        assert tried(Kernel.of(tiled), p) == "right"
        found[name] = tried(Kernel.of(lambda p: tiled(Problem(p.query, p.key[:2], p.value[:2]))), p)
    assert set(found.values()) <= {"unread", "raises"}


def test_a_failing_call_is_made_smaller():
    p = paged(Draw(FORMATS["float32"], np.random.default_rng(3), "softmax"), 4, "HND", new=3)
    small, _ = shrink(p, None, failing(planted("appended_one_late"), flash("float32"), frozenset()))
    assert (small.batch, small.d_k, small.new_key is not None) == (1, 1, True)
    wrong = failing(planted("zeroed_head"), flash("float32"), frozenset())
    assert shrink(p, None, wrong)[0].block_table is None


def test_kernels_that_take_pages_of_some_sizes_are_asked_for_these():
    able = replace(ABLE, page_multiple=256)
    found = check_kernel(tiled, capabilities=able, only="pages/*", model=tiled.model)
    assert found.passed, found.failures
    asked = [c for c in found.checks if c.verdict == "passed"]
    assert len(asked) >= 4
    sizes = set()

    def noted(p):
        sizes.add(p.page_size)
        return tiled(p)

    check_kernel(noted, capabilities=able, only="pages/shared", model=tiled.model)
    assert sizes == {256}
    p = next(c for c in cases("softmax") if c.name == "pages/shared").problem("float32")
    assert able.missing(p) == ["pages of 8 keys, which are no multiple of 256"]
    with pytest.raises(InvalidInput, match="page_multiple=0"):
        replace(ABLE, page_multiple=0)
