"""The four shapes of definition: lowered, selected and stepped operators against what they are made of."""

from types import SimpleNamespace

import numpy as np
import pytest

from refattn import VARIANTS, InvalidProblem, Problem, UnsupportedProblem, check_kernel, evaluate
from refattn.check.bugs.planted import plain
from refattn.exact.agree import differing_form
from refattn.exact.arithmetics import Balls
from refattn.exact.lowering import lower
from refattn.variants.neighborhood import grid_mask
from refattn.variants.power_blocks import block_mask
from refattn.variants.titans_mac import segment_mask


def test_blocks_lie_a_power_of_two_behind():
    seen = block_mask(12, 12, 1, 0, 0)
    assert np.nonzero(seen[11])[0].tolist() == [3, 7, 9, 10, 11]  # 8, 4, 2, 1 and 0 behind
    assert np.nonzero(block_mask(12, 12, 1, 3, 2)[11])[0].tolist() == [0, 1, 3, 7, 9, 10, 11]
    assert block_mask(2, 12, 4, 0, 0)[1].tolist() == [True] * 12  # 0, 1 and 2 blocks behind
    assert (block_mask(5, 7, 100, 0, 0)).all()


def test_a_lowered_call_is_the_call_with_its_mask(make):
    p = make(9, 12, variant="power_blocks", options={"block_size": 2, "window_blocks": 0, "sink_blocks": 0})
    answer = evaluate(p, rounding="float32")
    mask = block_mask(9, 12, 2, 0, 0)[None, None]
    plain = evaluate(p.replace(variant="softmax", options={}, allowed=mask), rounding="float32")
    assert (answer.out == plain.out).all()
    assert (answer.lse == plain.lse).all()
    assert answer.problem is p
    assert answer.core is not None
    assert answer.call is answer.core
    assert plain.core is None
    allowed = np.arange(12) % 3 > 0
    assert (lower(p.replace(allowed=allowed[None, None, None])).problem.allowed == (mask & allowed)).all()


def test_a_neighborhood_by_hand():
    grid = neighborhood_mask(window=(3,), shape=(6,))
    assert [np.nonzero(r)[0].tolist() for r in grid] == [[0, 1, 2]] * 2 + [[1, 2, 3], [2, 3, 4]] + [[3, 4, 5]] * 2
    even = neighborhood_mask(window=(4,), shape=(6,))
    assert np.nonzero(even[3])[0].tolist() == [1, 2, 3, 4]  # two before it, itself, one after it
    apart = neighborhood_mask(window=(2,), dilation=(3,), shape=(7,))
    assert np.nonzero(apart[4])[0].tolist() == [1, 4]
    assert np.nonzero(apart[6])[0].tolist() == [3, 6]
    led = neighborhood_mask(window=(3,), stride=(3,), shape=(9,))
    assert [np.nonzero(r)[0].tolist() for r in led[3:6]] == [[3, 4, 5]] * 3
    late = neighborhood_mask(window=(3,), is_causal=(True,), shape=(5,))
    assert [np.nonzero(r)[0].tolist() for r in late] == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    image = neighborhood_mask(window=(1, 2), shape=(2, 3))
    assert np.nonzero(image[4])[0].tolist() == [3, 4]


def neighborhood_mask(shape, window, stride=None, dilation=None, is_causal=None):
    return grid_mask(shape, SimpleNamespace(window=window, stride=stride, dilation=dilation, is_causal=is_causal))


def test_blocks_by_hand(make):
    blocks = ((True, False), (False, False), (True, True))
    p = make(5, 7, variant="block_sparse", options={"blocks": blocks, "block_q": 2, "block_k": 4})
    seen = lower(p).problem.allowed[0, 0]
    assert [np.nonzero(r)[0].tolist() for r in seen] == [[0, 1, 2, 3]] * 2 + [[]] * 2 + [[*range(7)]]
    answer = evaluate(p, rounding="float32")
    assert (answer.out[:, :, 2:4] == 0).all()
    assert np.isneginf(answer.lse[:, :, 2:4]).all()
    other = (blocks, ((False, True), (True, False), (True, False)))
    seen = lower(p.replace(options=dict(p.options) | {"blocks": other})).problem.allowed[0, 1]
    assert [np.nonzero(r)[0].tolist() for r in seen] == [[4, 5, 6]] * 2 + [[0, 1, 2, 3]] * 3


def test_segments_by_hand():
    seen = segment_mask(5, 7, 2, 2, False)
    assert [np.nonzero(r)[0].tolist() for r in seen] == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [0, 1, 6]]
    slides = segment_mask(2, 7, 2, 2, True)
    assert [np.nonzero(r)[0].tolist() for r in slides] == [[0, 1, 3, 4, 5], [0, 1, 4, 5, 6]]


@pytest.mark.parametrize(
    ("topk", "sink", "local", "size"),
    [(2, 1, 2, 1), (0, 0, 1, 1), (30, 4, 8, 1), (2, 1, 2, 3), (1, 0, 1, 2), (3, 5, 9, 2)],
)
def test_topk_chooses_what_a_loop_chooses(make, topk, sink, local, size):
    options = {"topk": topk, "sink_keys": sink, "local": local, "block_size": size}
    p = make(9, 13, h=4, h_kv=2, causal="bottom_right", variant="topk", options=options)
    seen = np.zeros((1, 4, 9, 13), bool)
    for _, h, i in np.ndindex(1, 4, 9):
        at = i + 4
        scores = p.query[0, h, i].astype(float) @ p.key[0, h // 2].astype(float).T
        kept, blocks = set(range(min(sink, at + 1))), []
        for first in range(sink, at + 1, size):
            block = [j for j in range(first, first + size) if j <= at]
            if block[-1] <= at - local and len(block) == size:
                blocks.append(block)
            else:
                kept |= set(block)
        best = sorted(blocks, key=lambda b: (-round(sum(scores[j] for j in b) / size, 10), b))[:topk]
        seen[0, h, i, [*kept, *(j for b in best for j in b)]] = True
    assert (lower(p).problem.allowed == seen).all()


def chosen(p, n_blocks, size, topk):
    """Return MoBA's mask as its released loop makes it, scores as fractions of integers, the lower block at a tie."""
    b, h, n_q, _ = p.query.shape
    seen = np.zeros((b, h, n_q, p.n_k), bool)
    for at in np.ndindex(b, h, n_q):
        i = at[2] + p.n_k - n_q
        own = i // size
        q, k = p.query[at].astype(float), p.key[at[0], at[1] // (h // p.heads_kv)].astype(float)
        scores = [float((q * k[s * size : (s + 1) * size].mean(0)).sum()) for s in range(own)]
        best = sorted(range(own), key=lambda s: (-round(scores[s], 10), s))[: topk - 1]
        for s in [*best, own]:
            seen[at][s * size : (s + 1) * size] = True
    return seen


@pytest.mark.parametrize(("size", "topk"), [(4, 3), (5, 2), (7, 1), (1, 4), (64, 3)])
def test_moba_chooses_what_its_loop_chooses(make, size, topk):
    p = make(21, 23, h=4, h_kv=2, causal="bottom_right", variant="moba", options={"block_size": size, "topk": topk})
    assert (lower(p).problem.allowed == chosen(p, -(-23 // size), size, topk)).all()


def test_exact_ties_go_to_the_lower_block_with_a_margin_of_zero(make):
    """Two blocks with the same keys in another order have the same mean; thirds keep their sums from being floats."""
    p = make(9, 9, causal="bottom_right", variant="moba", options={"block_size": 3, "topk": 2})
    key = p.key.copy()
    key[:, :, 3:6] = key[:, :, 2::-1]
    answer = evaluate(p.replace(key=key), rounding="float32")
    tied = answer.margins == 0
    assert tied[:, :, 6:].all()  # the last block's rows choose between the two
    assert not tied[:, :, :6].any()
    assert answer.core.allowed[:, :, 6:, :3].all()
    assert not answer.core.allowed[:, :, 6:, 3:6].any()
    assert np.isinf(answer.margins[:, :, :6]).all()


def test_scores_that_differ_by_less_than_enclosures_tell_are_told_apart(make):
    """2**-70 of a score between two blocks: beyond double precision, not beyond the definition."""
    p = make(3, 3, 2, h=1, dtype="float64", causal="bottom_right", variant="moba", options={"block_size": 1, "topk": 2})
    q, k = np.zeros_like(p.query), np.zeros_like(p.key)
    q[..., :] = 1.0, 2.0**-70
    k[0, 0, 0], k[0, 0, 1] = (1.0, 0.0), (1.0, 1.0)
    seen = lower(p.replace(query=q, key=k))
    assert seen.problem.allowed[0, 0, 2].tolist() == [False, True, True]
    assert 0 < seen.margins[0, 0, 2] < 2.0**-69


def test_a_margin_is_the_difference_of_two_scores():
    """A query of 1 scores the means of its blocks: 2 and 7."""
    key = np.array([1.0, 3.0, 6.0, 8.0, 0.0, 0.0]).reshape(1, 1, 6, 1)
    p = Problem(
        np.ones_like(key), key, key, causal="bottom_right", variant="moba", options={"block_size": 2, "topk": 2}
    )
    assert lower(p).margins[0, 0].tolist() == [np.inf] * 4 + [5.0] * 2


def test_the_whole_budget_is_dense(make):
    p = make(21, 21, causal="bottom_right", variant="moba", options={"block_size": 4, "topk": 6})
    dense = evaluate(p.replace(variant="softmax", options={}), rounding="float64")
    assert (evaluate(p, rounding="float64").out == dense.out).all()
    less = evaluate(p.replace(options={"block_size": 4, "topk": 2}), rounding="float64")
    assert not (less.out == dense.out).all()


def test_gradients_hold_the_choice_fixed(make):
    p = make(9, 9, causal="bottom_right", variant="moba", options={"block_size": 2, "topk": 2})
    dout = np.ones(p.out_shape, np.float32)
    answer = evaluate(p, gradients=dout)
    core = evaluate(answer.core, gradients=dout)
    assert all((answer.values[n] == core.values[n]).all() for n in ("dq", "dk", "dv"))


def test_a_recurrence_goes_on_from_its_state(make):
    p = make(11, 11, dtype="float64", causal="bottom_right", variant="lightning", options={"decay": (0.25, 1.5)})
    first, rest = (
        p.replace(**{n: getattr(p, n)[:, :, s] for n in ("query", "key", "value")}) for s in (slice(4), slice(4, None))
    )
    whole, before = evaluate(p), evaluate(first)
    after = evaluate(rest.replace(state=before.state))
    # the state is rounded to float64 once: the rest may differ by what that moves it
    slack = np.abs(rest.query).sum(-1, keepdims=True) * 2.0**-52 * np.abs(before.state).max()
    assert (np.abs(after.out - whole.out[:, :, 4:]) <= slack).all()
    assert (np.abs(after.state - whole.state) <= 2.0**-51 * np.abs(before.state).max()).all()
    again = evaluate(rest)
    assert not (np.abs(again.out - whole.out[:, :, 4:]) <= slack).all()


def test_lightning_by_hand():
    """Two tokens of width 1, decay log 2: the state halves, then gains k v."""
    one = np.ones((1, 1, 2, 1))
    value = np.array([3.0, 5.0]).reshape(1, 1, 2, 1)
    p = Problem(one, one, value, causal="bottom_right", variant="lightning", options={"decay": (float(np.log(2)),)})
    answer = evaluate(p)
    assert answer.out[0, 0, 0, 0] == 3.0
    assert abs(answer.out[0, 0, 1, 0] - 6.5) < 2.0**-50
    assert answer.state.shape == (1, 1, 1, 1)
    assert abs(answer.state.item() - 6.5) < 2.0**-50
    started = evaluate(p.replace(state=np.full((1, 1, 1, 1), 4.0)))
    assert abs(started.out[0, 0, 1, 0] - 7.5) < 2.0**-50
    scaled = p.replace(scale=0.5, state=np.full((1, 1, 1, 1), 4.0))
    assert (evaluate(scaled).out == started.out / 2).all()
    assert differing_form(scaled) == ""


def test_gradients_through_time_are_those_of_the_dense_form(make):
    p = make(6, 6, 4, causal="bottom_right", variant="lightning", options={"decay": (0.1, 0.7)})
    dout = np.random.default_rng(0).standard_normal(p.out_shape)
    stepped = evaluate(p, gradients=dout)
    options = {"feature": "identity", "normalize": False, "decay": (0.1, 0.7)}
    dense = evaluate(p.replace(variant="linear", options=options), gradients=dout)
    for name in ("out", "dq", "dk", "dv"):
        with Balls(128).working():
            pairs = zip(stepped.balls[name].ravel(), dense.balls[name].ravel(), strict=True)
            assert all(x.overlaps(y) for x, y in pairs), name


def test_a_weight_is_the_exponential_of_a_bias(make):
    p = make(4, 6)
    weight = np.random.default_rng(1).integers(0, 4, (1, 2, 4, 6)).astype(np.float32)
    weight[..., 0] = 1
    with np.errstate(divide="ignore"):
        bias = np.log(weight.astype(np.float64))
    a, b = evaluate(p.replace(weight=weight)), evaluate(p.replace(bias=bias))
    # the bias is a rounded logarithm
    assert (np.abs(a.out - b.out) <= 2.0**-50 * np.abs(p.value).max()).all()
    assert (np.abs(a.lse - b.lse) <= 2.0**-50 * (1 + np.abs(a.lse))).all()


def test_a_weight_of_two_is_a_key_that_stands_twice(make):
    p = make(4, 6)
    weight = np.ones((1, 1, 1, 6), np.float32)
    weight[..., 2], weight[..., 4] = 2, 0
    order = [0, 1, 2, 2, 3, 5]
    twice = evaluate(p.replace(key=p.key[:, :, order], value=p.value[:, :, order]), rounding="float64")
    once = evaluate(p.replace(weight=weight), rounding="float64")
    assert (once.out == twice.out).all()
    assert (once.lse == twice.lse).all()
    poisoned = p.value.copy()
    poisoned[:, :, 4] = np.nan
    assert (evaluate(p.replace(weight=weight, value=poisoned), rounding="float64").out == once.out).all()


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_weights_survive_being_cut_into_parts(make, n_jobs, tmp_path):
    p = make(5, 7, b=2, weight=np.exp(np.random.default_rng(0).standard_normal((2, 2, 5, 7))).astype(np.float32))
    whole = evaluate(p, rounding="float32")
    parts = evaluate(p, rounding="float32", n_jobs=n_jobs, checkpoint=tmp_path)
    assert (whole.out == parts.out).all()


NEAR = {"causal": None}
NO_BLOCKS = "cu_seqlens_q: blocks of packed sequences are not defined; pass one sequence at a time"
TOO_MANY = "query: axis seq is 9, expected at most key's 7: each query stands at a key"


@pytest.mark.parametrize(
    ("variant", "options", "more", "text"),
    [
        ("moba", {"block_size": 0}, {}, "block_size: got 0, expected an integer of at least 1"),
        ("moba", {"topk": 0}, {}, "topk: got 0, expected an integer of at least 1"),
        ("moba", {"topk": 2.0}, {}, "topk: got 2.0, expected an integer of at least 1"),
        ("moba", {}, {"causal": None}, "causal: blocks are chosen among earlier ones; set causal='bottom_right'"),
        ("moba", {}, {"n_q": 9}, TOO_MANY),
        ("moba", {}, {"packed": True}, NO_BLOCKS),
        (
            "block_sparse",
            {"blocks": ((1, 0),)},
            NEAR,
            "blocks: got .*, expected None, a tuple of rows of True and False, .*",
        ),
        (
            "block_sparse",
            {"blocks": ((True,), (True, False))},
            NEAR,
            "blocks: got .*, expected None, a tuple of rows .*",
        ),
        ("block_sparse", {"blocks": (((True,),),) * 3}, NEAR, "blocks: got .*, expected None, a tuple of rows of .*"),
        (
            "block_sparse",
            {"blocks": ((True, False),), "block_q": 4},
            NEAR,
            r"blocks: got 1 by 2 blocks of 4 queries and 128 keys, expected \(2, 1\)",
        ),
        (
            "block_sparse",
            {"blocks": [((True,),)]},
            NEAR,
            "blocks: got .*, expected None, a tuple of rows of True and .*",
        ),
        ("block_sparse", {"block_k": 0}, NEAR, "block_k: got 0, expected an integer of at least 1"),
        ("block_sparse", {}, NEAR | {"packed": True}, NO_BLOCKS),
        ("neighborhood", {"window": 3}, NEAR, r"window: got 3, expected None or a tuple of integers of at least 1, .*"),
        ("neighborhood", {"window": (0,)}, NEAR, r"window: got \(0,\), expected None or a tuple of integers .*"),
        (
            "neighborhood",
            {"window": (8,)},
            NEAR,
            "window: got 8 with dilation 1 along axis 0 of 7 .*, expected at most 7",
        ),
        (
            "neighborhood",
            {"window": (3,), "dilation": (3,)},
            NEAR,
            "window: got 3 with dilation 3 along axis 0 of 7 tokens, expected at most 2",
        ),
        ("neighborhood", {"window": (3,), "dilation": (8,)}, NEAR, ".* with dilation 8 along axis 0 of 7 tokens, .* 0"),
        (
            "neighborhood",
            {"window": (3,), "stride": (4,)},
            NEAR,
            "stride: got 4 along axis 0, expected at most window's 3",
        ),
        ("neighborhood", {"stride": (2,)}, NEAR, "stride: needs window; without one a query sees all"),
        ("neighborhood", {"window": (3, 3)}, NEAR, r"window: got \(3, 3\), expected one for each of 1 axes"),
        ("neighborhood", {"shape": (2, 3)}, NEAR, r"shape: got \(2, 3\) of 6 tokens, expected as many as queries, 7"),
        ("neighborhood", {"is_causal": (1,)}, NEAR, r"is_causal: got \(1,\), expected None or a tuple of True and .*"),
        ("neighborhood", {}, NEAR | {"n_q": 9}, TOO_MANY),
        ("neighborhood", {}, NEAR | {"packed": True}, "cu_seqlens_q: grids of packed sequences are not defined; .*"),
        ("titans_mac", {"segment": 0}, NEAR, "segment: got 0, expected an integer of at least 1"),
        (
            "titans_mac",
            {"persistent": 3},
            NEAR,
            "key: axis seq is 7, expected at least 10: 3 persistent keys, and one for each of 7 queries",
        ),
        ("titans_mac", {}, NEAR | {"packed": True}, "cu_seqlens_q: segments of packed sequences are not defined; .*"),
        ("topk", {"topk": -1}, {}, "topk: got -1, expected an integer of at least 0"),
        ("topk", {"local": 0}, {}, "local: got 0, expected an integer of at least 1"),
        ("topk", {}, {"causal": None}, "causal: keys are chosen among earlier ones; set causal='bottom_right'"),
        ("topk", {}, {"n_q": 9}, TOO_MANY),
        ("power_blocks", {"sink_blocks": -1}, {}, "sink_blocks: got -1, expected an integer of at least 0"),
        (
            "power_blocks",
            {},
            {"causal": "top_left", "n_k": 9},
            "causal: blocks count from the bottom right; set causal='bottom_right'",
        ),
        ("power_blocks", {}, {"n_q": 9}, TOO_MANY),
        ("power_blocks", {}, {"packed": True}, NO_BLOCKS),
        ("lightning", {"decay": (0.1,)}, {}, "decay: got .* expected a tuple of 2 finite numbers of at least 0.*"),
        ("lightning", {"decay": (0.1, -0.1)}, {}, "decay: got .* expected a tuple of 2 finite numbers of at least 0.*"),
        ("lightning", {"decay": (0.1, 0.1)}, {"causal": None}, "causal: a recurrence sees no later token.*"),
        ("lightning", {"decay": (0.1, 0.1)}, {"n_k": 8}, "key: axis seq is 8, expected query's 7.*"),
    ],
)
def test_a_call_that_does_not_fit_is_named(make, variant, options, more, text):
    given = {"n_q": 7, "n_k": 7, "causal": "bottom_right"} | more
    if given.pop("packed", False):
        given |= {n: np.array([0, 3, 7], np.int32) for n in ("cu_seqlens_q", "cu_seqlens_k")}
    p = make(given.pop("n_q"), given.pop("n_k"), variant=variant, options=options, **given)
    with pytest.raises(InvalidProblem, match=f"^{text}$"):
        evaluate(p)


def test_weights_and_states_that_cannot_be_are_named(make):
    p = make()
    for x in (-1.0, np.nan, np.inf):
        with pytest.raises(InvalidProblem, match="weight: has a number below 0, NaN or inf; it says how often"):
            evaluate(p.replace(weight=np.full((1, 1, 1, 7), x, np.float32)))
    with pytest.raises(InvalidProblem, match=r"weight: got shape \(2, 7\), expected \(1, 2, 5, 7\) or 1"):
        p.replace(weight=np.ones((2, 7), np.float32))
    with pytest.raises(InvalidProblem, match=r"state: got shape \(1, 8, 8\), expected \(b, h_q, d_k, d_v\) = \(1"):
        p.replace(state=np.ones((1, 8, 8), np.float32))
    with pytest.raises(UnsupportedProblem, match="state: softmax attention does not have it"):
        evaluate(p.replace(state=np.ones((1, 2, 8, 8), np.float32)))
    with pytest.raises(UnsupportedProblem, match="weight: sigmoid attention does not have it"):
        evaluate(p.replace(variant="sigmoid", weight=np.ones((1, 1, 1, 7), np.float32)))


@pytest.mark.parametrize("rounding", [None, "float32"])
def test_a_recurrence_over_no_tokens_keeps_its_state(rounding):
    none = np.zeros((1, 1, 0, 4), np.float32)
    state = np.arange(16.0).reshape(1, 1, 4, 4)
    p = Problem(none, none, none, causal="bottom_right", variant="lightning", options={"decay": (0.1,)}, state=state)
    answer = evaluate(p, rounding=rounding)
    assert answer.out.shape == (1, 1, 0, 4)
    assert (answer.state == state).all()
    assert evaluate(p, gradients=none, rounding=rounding).values["dv"].shape == (1, 1, 0, 4)


@pytest.mark.parametrize("change", [{"window": 1}, {"window": -1}, {"most": 128}])
def test_kernels_with_other_blocks_fail(change):
    def kernel(p):
        o = {n: p.options.get(n, x.default) for n, x in VARIANTS["power_blocks"].options.items()}
        window = max(o["window_blocks"] + change.get("window", 0), 0)
        mask = block_mask(p.n_q, p.n_k, o["block_size"], window, o["sink_blocks"])
        behind = (np.arange(p.n_q) + p.n_k - p.n_q)[:, None] // o["block_size"] - np.arange(p.n_k) // o["block_size"]
        mask = (mask & (behind < change.get("most", p.n_k)))[None, None]
        allowed = mask if p.allowed is None else mask & p.allowed
        return plain(p.replace(variant="softmax", options={}, allowed=allowed))

    report = check_kernel(kernel, "power_blocks", only="gaussian/*-blocks?float32?")
    assert [c.name for c in report.failures] == [f"gaussian/{'far' if 'most' in change else 'near'}-blocks[float32]"]


def test_a_group_chooses_by_the_sum_of_its_heads_weights():
    """Two heads of opposite taste: the first weighs block 0 at nearly 1, the second prefers block 1 less strongly."""
    k = np.zeros((1, 1, 8, 2), np.float32)
    k[0, 0, 0:2, 0], k[0, 0, 2:4, 1] = 1, 1
    q = np.zeros((1, 2, 8, 2), np.float32)
    q[0, 0, :, 0], q[0, 1, :, 1] = 9, 2
    options = {"block_size": 2, "topk": 2}
    p = Problem(q, k, k, causal="bottom_right", variant="nsa_selected", scale=1.0, options=options)
    seen = lower(p).problem.allowed[0]
    assert (seen[0] == seen[1]).all()
    # e^9 / (e^9 + 2) + 1 / (e^2 + 2) against e^2 / (e^2 + 2) + 1 / (e^9 + 2)
    assert np.nonzero(seen[0, 7])[0].tolist() == [0, 1, 6, 7]
    alone = lower(p.replace(query=q[:, 1:])).problem.allowed[0, 0]
    assert np.nonzero(alone[7])[0].tolist() == [2, 3, 6, 7]
    three = p.replace(options=options | {"forced": "first_previous_own", "topk": 3})
    assert np.nonzero(lower(three).problem.allowed[0, 0, 7])[0].tolist() == [0, 1, 4, 5, 6, 7]
    with pytest.raises(InvalidProblem, match="topk: got 2, expected at least 3, the blocks that forced"):
        evaluate(p.replace(options=options | {"forced": "first_previous_own"}))
    with pytest.raises(InvalidProblem, match=r"forced: got array\(.*, expected one of own, first_previous_own"):
        evaluate(p.replace(options=options | {"forced": np.array(["own"] * 2)}))


def test_a_group_may_choose_top_keys_together():
    k = np.array([[1, 0], [0, 1], [0.9, 0.9], [0, 0]], np.float32).reshape(1, 1, 4, 2)
    q = np.zeros((1, 2, 4, 2), np.float32)
    q[0, 0, :, 0], q[0, 1, :, 1] = 1, 1
    options = {"topk": 1, "sink_keys": 0, "local": 1}
    p = Problem(q, k, k, causal="bottom_right", variant="topk", options=options)
    assert [np.nonzero(r)[0].tolist() for r in lower(p).problem.allowed[0, :, 3]] == [[0, 3], [1, 3]]
    p = p.replace(options=options | {"by_group": True})
    assert [np.nonzero(r)[0].tolist() for r in lower(p).problem.allowed[0, :, 3]] == [[2, 3], [2, 3]]


@pytest.mark.parametrize("lost", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("variant", "options"),
    [("moba", {"block_size": 3, "topk": 2}), ("nsa_selected", {"block_size": 3, "topk": 2}), ("topk", {"topk": 2})],
)
def test_a_lost_number_counts_as_0_in_scores(make, variant, options, lost):
    p = make(30, 30, causal="bottom_right", variant=variant, options=options)
    key = np.array(p.key)
    key[0, 0, 7, 2] = 0
    chosen = lower(p.replace(key=key)).problem.allowed
    key[0, 0, 7, 2] = lost
    q = p.replace(key=key)
    np.testing.assert_array_equal(lower(q).problem.allowed, chosen)
    spoilt = np.isnan(evaluate(q, rounding="float32").out).all(-1)
    seen = chosen[..., 7] & (np.arange(30) >= 7)
    seen[:, p.heads // p.heads_kv :] = False
    np.testing.assert_array_equal(spoilt, seen)
    assert spoilt.any()
    assert not spoilt[..., 7:].all()
