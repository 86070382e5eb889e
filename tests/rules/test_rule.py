import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from refattn import InvalidInput, rules
from refattn.rules import terms
from refattn.rules.spans import UNSURE
from refattn.rules.view import View, edges

from ..snippets import run
from .drawn import atoms, by_loops, drawn

SIZES = [(1, 1), (7, 7), (5, 12), (12, 5), (1, 9), (9, 1)]


@pytest.mark.parametrize(("n_q", "n_k"), SIZES)
def test_every_rule_says_what_its_loop_says(n_q, n_k):
    rng = np.random.default_rng([n_q, n_k])
    for _ in range(3):
        for rule, seen in atoms(rng, n_q, n_k):
            for b, h in np.ndindex(rule.batches, rule.heads):
                np.testing.assert_array_equal(rule.dense(n_q, n_k, b, h), by_loops(seen, b, h, n_q, n_k), str(rule))


def kinds(mask, tile_q, tile_k):
    """Return what the tiles of a mask are, by looking at their pairs."""
    cut = [[mask[i : i + tile_q, j : j + tile_k] for j in range(0, mask.shape[1], tile_k)]
           for i in range(0, mask.shape[0], tile_q)]  # fmt: skip
    return [[2 if x.all() else int(x.any()) for x in row] for row in cut]


@pytest.mark.parametrize("seed", range(4))
def test_combinations_and_all_that_is_made_of_them(seed):
    rng = np.random.default_rng(seed)
    for _ in range(40):
        n_q, n_k, tile_q, tile_k = (int(x) for x in (*rng.integers(1, 20, 2), *rng.integers(1, 9, 2)))
        rule, seen = drawn(rng, n_q, n_k, int(rng.integers(4)))
        b, h = int(rng.integers(rule.batches)), int(rng.integers(rule.heads))
        want = by_loops(seen, b, h, n_q, n_k)
        np.testing.assert_array_equal(rule.dense(n_q, n_k, b, h), want, str(rule))
        assert rule.tiles(n_q, n_k, tile_q, tile_k, b, h).tolist() == kinds(want, tile_q, tile_k), str(rule)
        words = rule.bits(n_q, n_k, b, h)
        assert words.shape == (n_q, -(-n_k // 32))
        np.testing.assert_array_equal(words[:, np.arange(n_k) // 32] >> (np.arange(n_k) % 32).astype("u4") & 1, want)
        assert rule.written(rule.batches, rule.heads, n_q, n_k)[b, h].tolist() == want.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_a_view_is_indexed_as_its_array_is(seed):
    rng = np.random.default_rng(seed)
    for _ in range(40):
        n_q, n_k = (int(x) for x in rng.integers(1, 20, 2))
        rule, _ = drawn(rng, n_q, n_k, 2)
        view, want = View.of(rule, n_q, n_k), rule.dense(n_q, n_k)
        rows, keys = rng.integers(0, n_q, 4), rng.integers(0, n_k, 3)
        some = rng.random(n_k) < 0.5
        for index in (rows, 0, -1, slice(1, 3), (rows, slice(2, 5)), np.ix_(rows, keys), (slice(None), keys),
                      (slice(None), some), (0, keys)):  # fmt: skip
            np.testing.assert_array_equal(view[index], want[index])
        for axis in (None, 0, 1):
            np.testing.assert_array_equal(view.any(axis), want.any(axis))
        for axis in (0, 1):
            np.testing.assert_array_equal(view.sum(axis, keepdims=True), want.sum(axis, keepdims=True))
        assert view.all() is bool(want.all()) or not view.all()  # it may not know
        at = np.unique([0, *rng.integers(0, n_k + 1, 3), n_k])
        np.testing.assert_array_equal(view.touches(at), np.logical_or.reduceat(want, at[:-1], axis=1))


def test_what_ranges_say_is_true_before_a_tile_is_looked_at():
    rng, unsure = np.random.default_rng(0), 0
    for _ in range(200):
        n_q, n_k, size = (int(x) for x in rng.integers(1, 20, 3))
        rule, _ = drawn(rng, n_q, n_k, 2)
        view = View.of(rule, n_q, n_k)
        codes = view.states(edges(n_q, size), edges(n_k, size), settle=False)
        known = codes != UNSURE
        unsure += (~known).sum()
        assert (codes[known] == np.array(kinds(np.asarray(view), size, size))[known]).all(), str(rule)
    assert unsure  # else nothing was left to look at


def test_rules_write_themselves():
    a, b, c = rules.causal(), rules.window(3, None), rules.sinks(2)
    assert repr(a & (b | c)) == "causal() & (window(3, None) | sinks(2))"
    assert repr(~(a & b) | ~c) == "~(causal() & window(3, None)) | ~sinks(2)"
    assert repr(rules.causal("top_left")) == "causal(corner='top_left')"
    assert repr(rules.document([0, 0, 1])) == "document([0, 0, 1])"
    assert repr(rules.prefix([3, 5]) & rules.tree([-1, 0])) == "prefix([3, 5]) & tree([-1, 0])"
    assert repr(rules.blocks(np.eye(2, dtype=bool), 4, 8)) == "blocks(<booleans 2 by 2>, 4, 8)"
    assert repr(rules.document(np.arange(99))) == "document(<integers 99>)"


@pytest.mark.parametrize("seed", range(3))
def test_what_is_written_is_the_rule_again(seed):
    rng = np.random.default_rng(seed)
    for _ in range(30):
        rule, _ = drawn(rng, 6, 6, 3)
        if "<" not in repr(rule):
            again = eval(repr(rule), vars(rules))
            np.testing.assert_array_equal(again.dense(6, 6), rule.dense(6, 6))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_page_runs(capsys):
    page = Path(__file__).parents[2] / "docs" / "rules.md"
    run(page)
    assert "causal() & (window(3, 0) | sinks(1))\n#" in capsys.readouterr().out
    made = {str(rule).split("(")[0] for rule, _ in atoms(np.random.default_rng(0), 3, 3)}
    tables = page.read_text().split("\n## Terms of scores")
    assert made == set(re.findall(r"^\| `(\w+)\(", tables[0], re.MULTILINE))
    first = re.findall(r"^\| (`\w+\(.*?) \|", tables[1].split("## A whole call")[0], re.MULTILINE)
    named = {n for cell in first for n in re.findall(r"`(\w+)\(", cell)}
    assert named == set(terms.__all__) - {"bucket"}


def test_pictures():
    assert rules.causal().draw(3, 4).split() == ["##..", "###.", "####"]
    assert rules.causal().draw(4, 4, 2).split() == ["+.", "#+"]
    assert (rules.window(1, 0) & ~rules.sinks(1)).draw(3, 3).split() == ["...", ".#.", ".##"]


def test_long_calls_need_no_mask():
    n = 131072
    ids = np.sort(np.random.default_rng(0).integers(0, 60, n))
    rule = (rules.causal() & rules.document(ids) & rules.window(4096, 0)) | rules.sinks(4) & rules.causal()
    tracemalloc.start()
    found = rule.tiles(n, n)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120 * found.size  # some numbers for each of the (n / 128)^2 tiles; booleans would be 16384
    at = np.array([0, 1, 500, 1023])
    for i in at:
        rows = np.arange(i * 128, i * 128 + 128)
        seen = rule.block(rows, np.arange(n), n, n).reshape(128, -1, 128)
        want = np.where(seen.all((0, 2)), 2, seen.any((0, 2)).astype(int))
        np.testing.assert_array_equal(found[i], want)


def test_no_queries_and_no_keys():
    assert rules.causal().dense(0, 4).shape == (0, 4)
    assert rules.causal().tiles(3, 0).shape == (1, 0)
    assert rules.causal().bits(0, 3).shape == (0, 1)
    view = View.of(rules.sinks(2), 3, 0)
    assert view.any(1).tolist() == [False] * 3
    assert view.any() is False


def said(make):
    with pytest.raises((InvalidInput, TypeError)) as e:
        make()
    return str(e.value)


def test_places_outside_a_call():
    assert rules.causal().block([0, 3], [4], 4, 5).shape == (2, 1)
    for rows, keys, text in (([0, 4], [0], "rows: got places from 0 to 4, expected 0 to 3"),
                             ([0], [-1], "keys: got places from -1 to -1, expected 0 to 4")):  # fmt: skip
        with pytest.raises(InvalidInput, match=text):
            rules.causal().block(rows, keys, 4, 5)


def test_calls_that_a_rule_does_not_fit():
    eye = np.eye(2, dtype=bool)
    assert said(lambda: rules.document([0, 1]).dense(3, 2)) == (
        "rule: document([0, 1]) has numbers of 2 queries, and the call has 3"
    )
    assert said(lambda: (rules.causal() & ~rules.document([0, 1], [0])).dense(2, 3)) == (
        "rule: document([0, 1], [0]) has numbers of 1 keys, and the call has 3"
    )
    assert said(lambda: rules.prefix(5).dense(4, 4)) == "rule: prefix(5) needs 5 keys, and the call has 4"
    assert (
        said(lambda: rules.tree([-1, 0]).tiles(1, 4)) == "rule: tree([-1, 0]) has 2 nodes, and the call has 1 queries"
    )
    assert said(lambda: rules.blocks(eye, 4, 4).dense(9, 8)) == (
        "rule: blocks(<booleans 2 by 2>, 4, 4) has 2 by 2 blocks, and the call has 3 by 2"
    )
    assert said(lambda: rules.array(eye).bits(2, 3)) == (
        "rule: array(<booleans 2 by 2>) does not fit the call's 2 queries and 3 keys"
    )
    assert said(lambda: rules.prefix([1, 2]).written(3, 1, 4, 4)) == (
        "rule: prefix([1, 2]) is made for 2 batches, and the call has 3"
    )
    assert "made for 2 query heads, and the call has 3" in said(
        lambda: rules.array(np.ones((2, 1, 1), bool)).check(1, 3, 1, 1)
    )
    assert said(lambda: rules.prefix([1, 2]) & rules.prefix([1, 2, 3])) == (
        "rule: prefix([1, 2]) is made for 2 batches and prefix([1, 2, 3]) for 3; make them alike"
    )
    assert said(lambda: rules.causal().tiles(3, 3, 0)) == "tile_q: got 0, expected a whole number of at least 1"
    assert said(lambda: bool(rules.causal())) == "a rule is neither true nor false; combine rules by & | ~"
    assert "unsupported operand" in said(lambda: rules.causal() & eye)
