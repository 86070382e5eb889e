"""Operators that choose keys: where scores tie, or nearly, and at the ends of blocks and budgets; two forms agree."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from refattn import VARIANTS, InvalidProblem, Problem, evaluate
from refattn.exact import agree
from refattn.exact.agree import differing_form, under
from refattn.exact.lowering import lower
from refattn.functions.native import indexer_scores, indexer_select
from refattn.variants import Lowered, dsa, loops

CHOOSE = {
    "moba": {"block_size": 3, "topk": 2},
    "nsa_selected": {"block_size": 3, "topk": 2},
    "topk": {"block_size": 2, "topk": 2, "sink_keys": 1, "local": 2},
    "dsa": {"topk": 4},
}
RAGGED = {"moba": {"block_size": 5}, "nsa_selected": {"block_size": 5}, "topk": {"block_size": 5}, "dsa": {"topk": 19}}


def call(variant, n=14, options=None, h=4, h_kv=2, d=4, dtype=np.float32):
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((1, x, n, d)).astype(dtype) for x in (h, h_kv, h_kv))
    return Problem(
        q, k, v, causal="bottom_right", variant=variant, options=CHOOSE[variant] if options is None else options
    )


def seen(p, row=-1, head=0):
    return np.flatnonzero(lower(p).problem.allowed[0, head, row]).tolist()


def repeated(p, many=3):
    return p.replace(
        key=np.ascontiguousarray(p.key[:, :, np.arange(p.n_k) // many % 2 * many + np.arange(p.n_k) % many])
    )


def test_every_operator_that_chooses_is_here():
    """Those over another core than softmax have files of their own."""
    there = {n: v.shape.core for n, v in VARIANTS.items() if hasattr(v.shape, "choices")}
    assert set(CHOOSE) == {n for n, core in there.items() if core == "softmax"}


@pytest.mark.parametrize("variant", CHOOSE)
def test_forms_agree_where_scores_tie_and_nearly(variant):
    """Blocks of the same keys, all keys the same, and one number of one key an ulp larger or smaller."""
    p = repeated(call(variant))
    same = p.replace(key=np.broadcast_to(p.key[:, :, :1], p.key.shape).copy())
    for x in (p, same):
        assert differing_form(x) == ""
        for to in (np.inf, -np.inf):
            key = x.key.copy()
            key[:, :, 4] = np.nextafter(key[:, :, 4], np.float32(to))
            assert differing_form(x.replace(key=key)) == ""
    assert (lower(same).margins[0, :, -1] == 0).all()
    first = {"moba": [0, 1, 2, 12, 13], "topk": [0, 1, 2, 3, 4, 11, 12, 13], "dsa": [0, 1, 2, 3]}
    assert seen(same) == first.get(variant, first["moba"])


@pytest.mark.parametrize("variant", CHOOSE)
def test_an_ulp_decides(variant):
    """All keys are one, and the query, too: a key a little longer brings its block to the front."""
    one = {"topk": 1} if variant in ("topk", "dsa") else {}
    p = call(variant, options=CHOOSE[variant] | one, h=1, h_kv=1)
    key = np.ones_like(p.key)
    key[:, :, 7, 0] = np.nextafter(np.float32(1), np.float32(2))
    p = p.replace(query=np.ones_like(p.query), key=key)
    assert 7 in seen(p)
    assert 0 < lower(p).margins[0, 0, -1] < 2.0**-22
    assert differing_form(p) == ""


@pytest.mark.parametrize("variant", CHOOSE)
@pytest.mark.parametrize("n", [1, 5, 13])
def test_forms_agree_at_one_block_and_at_ragged_ends(variant, n):
    for more in (RAGGED[variant], {"block_size": n} if "block_size" in CHOOSE[variant] else {"topk": n}):
        p = call(variant, n, CHOOSE[variant] | more)
        weight = np.ones((1, 4, n, n), np.float32)
        weight[..., n // 3] = 0
        assert differing_form(p) == ""
        assert differing_form(p.replace(weight=weight)) == ""


@pytest.mark.parametrize("variant", CHOOSE)
def test_forms_agree_in_the_field_and_in_balls(monkeypatch, variant):
    """Not only in which keys rows see: what they compute is compared, too."""
    monkeypatch.setattr(agree, "_same_call", lambda a, b: False)
    assert differing_form(call(variant, 7)) == ""


@pytest.mark.parametrize("variant", CHOOSE)
def test_a_form_whose_ties_go_to_the_higher_candidate_differs(monkeypatch, variant):
    def last(scores, count, ties):
        return sorted(scores, key=lambda x: (-scores[x], -x))[: max(count, 0)]

    def last_weights(exponents, unit, among, count, ties):
        return sorted(among, key=lambda x: -x)[: max(count, 0)]

    module = __import__(f"refattn.variants.{variant}", fromlist=["first"])
    name, other = ("first_weights", last_weights) if variant == "nsa_selected" else ("first", last)
    monkeypatch.setattr(module, name, other)
    p = call(variant)
    p = p.replace(key=np.broadcast_to(p.key[:, :, :1], p.key.shape).copy())
    assert differing_form(p).startswith("form 'by_rows' differs in out at (0, ")


@pytest.mark.parametrize("variant", CHOOSE)
def test_a_budget_of_all_is_dense_and_a_long_block_is_one(variant):
    p = call(variant)
    dense = evaluate(p.replace(variant="softmax", options={}), rounding="float64").out
    every = [{"topk": 14} | ({"block_size": 1} if variant != "dsa" else {})]
    every += [{"topk": 1, "block_size": x} for x in (14, 15, 2**40)] if variant in ("moba", "nsa_selected") else []
    for options in every:
        assert (evaluate(p.replace(options=options), rounding="float64").out == dense).all()
    assert not (evaluate(p, rounding="float64").out == dense).all()


@pytest.mark.parametrize("variant", CHOOSE)
def test_no_budget_is_refused_but_where_other_keys_are_taken(variant):
    p = call(variant, options={"topk": 0})
    if variant == "topk":
        assert seen(p) == [0, 1, 2, 3, *range(6, 14)]
        assert seen(p.replace(options={"block_size": 2**40, "sink_keys": 1, "local": 2})) == list(range(14))
        return
    with pytest.raises(InvalidProblem, match=r"^topk: got 0, expected an integer of at least 1$"):
        evaluate(p)


def test_weights_that_tie_across_heads_go_to_the_lower_block():
    """One head weighs blocks 0 and 1 as the other weighs 1 and 0: products differ, the sums of weights do not."""
    k = np.zeros((1, 1, 8, 2), np.float32)
    k[0, 0, 0:2, 0], k[0, 0, 2:4, 1] = 1, 1
    q = np.zeros((1, 2, 8, 2), np.float32)
    q[0, 0], q[0, 1] = (3, 1), (1, 3)
    p = Problem(q, k, k, causal="bottom_right", variant="nsa_selected", options={"block_size": 2, "topk": 2})
    assert lower(p).margins[0, 0, -1] == 0
    assert seen(p) == [0, 1, 6, 7]
    assert differing_form(p) == ""
    q[0, 1, :, 1] = np.nextafter(np.float32(3), np.float32(4))
    assert seen(p.replace(query=q)) == [2, 3, 6, 7]
    assert differing_form(p.replace(query=q)) == ""


def test_sums_too_close_for_decimals_are_refused():
    one = loops.Decimal(10) ** -50
    with pytest.raises(loops.UnsupportedProblem, match=r"^scores: candidates 1 and 0 differ by less than 1E-40$"):
        loops.first_weights([[0, 1]], one, [0, 1], 1)
    assert loops.first_weights([[1, 1]], one, [0, 1], 1) == [0]
    assert loops.first_weights([[0, 1]], 0 * one, [0, 1], 1) == [0]


def test_a_layers_indexer_is_heads_beside_the_others():
    """(q, 0, 0), (0, q_index, w) and (k, k_index, 0): the other heads' rows are attention to what the indexer chose."""
    rng = np.random.default_rng(0)
    n, h, d, h_index, d_index = 17, 3, 4, 2, 5
    q, k, v = (rng.standard_normal((1, x, n, d)).astype(np.float32) for x in (h, 1, 1))
    index_q, index_k, w = (
        rng.integers(-3, 4, s).astype(np.float32)
        for s in ((1, h_index, n, d_index), (1, 1, n, d_index), (1, n, h_index))
    )
    query = np.zeros((1, h + h_index, n, d + d_index + 1), np.float32)
    query[:, :h, :, :d], query[:, h:, :, d:-1], query[:, h:, :, -1] = q, index_q, w.swapaxes(1, 2)
    key = np.concatenate([k, index_k, np.zeros((1, 1, n, 1), np.float32)], -1)
    p = Problem(query, key, v, causal="bottom_right", scale=0.5, variant="dsa", options={"topk": 4})
    answer = evaluate(p, rounding="float64", gradients=np.ones((1, 5, n, d)))
    read = indexer_select(indexer_scores(index_q, index_k[:, 0], w), topk=4)
    np.testing.assert_array_equal(answer.core.allowed[0], np.broadcast_to(read, (5, n, n)))
    layer = Problem(q, k, v, causal="bottom_right", scale=0.5, allowed=read[:, None])
    np.testing.assert_array_equal(answer.out[:, :h], evaluate(layer, rounding="float64").out)
    held = evaluate(answer.core, rounding="float64", gradients=np.ones((1, 5, n, d)))
    for name in ("dq", "dk", "dv"):
        np.testing.assert_array_equal(answer.values[name], held.values[name])
    assert (answer.values["dq"][:, :h, :, d:-1] != 0).any()  # of what the others do not read


def test_a_query_of_a_weight_alone_is_refused():
    with pytest.raises(
        InvalidProblem, match=r"^query: axis dim is 1, expected at least 2: the last number is the weight"
    ):
        evaluate(call("dsa", d=1))


def test_mistakes_of_the_indexer_are_none_of_its_form():
    wrong = {
        n: replace(VARIANTS["dsa"], name="other", define=d, forms={"rows": Lowered(dsa.by_rows)})
        for n, (_, d) in VARIANTS["dsa"].wrong.items()
    }
    weight = np.where(np.arange(14) % 3 == 1, 0, 1)[None, None, None].astype(np.float32)
    changes = {"unseen_keys_compete": {"weight": weight}, "signed_scale": {"scale": -0.5}}
    for name, variant in wrong.items():
        with under(variant):
            assert differing_form(call("dsa").replace(variant="other", **changes.get(name, {}))), name


@pytest.mark.parametrize("variant", ["nsa_selected", "topk", "dsa"])
def test_heads_that_choose_together_see_the_same_keys(variant):
    p = call(variant, options=CHOOSE[variant] | ({"by_group": True} if variant == "topk" else {}))
    weight = np.ones((1, 4, 1, 14), np.float32)
    weight[0, 2:, 0, 5] = 0  # from both heads of the second key head
    weight[0, 1, 0, 3] = 0.5  # no 0
    assert differing_form(p.replace(weight=weight)) == ""
    weight = weight.copy()
    weight[0, 3, 0, 4] = 0
    text = "weight: query heads 2 and 3 choose the same keys, expected none that one of them sees and the other does"
    p, v = p.replace(weight=weight), VARIANTS[variant]
    with pytest.raises(InvalidProblem, match=text):
        evaluate(p)
    with pytest.raises(InvalidProblem, match=text):
        v.forms["by_rows"].lower(p, SimpleNamespace(**v.settings(p)))
    assert differing_form(p.replace(key=p.key[:, [0, 0, 1, 1]], value=p.value[:, [0, 0, 1, 1]])) == ""
