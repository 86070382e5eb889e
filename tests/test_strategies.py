from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from refattn import VARIANTS, InvalidInput, check_problem, evaluate
from refattn.arrays import from_float64
from refattn.check import FEATURES, FURTHER
from refattn.check.inputs.values import BUILDERS
from refattn.check.kernels.tiled import tiled
from refattn.dtypes import FORMATS
from refattn.masks import visible
from refattn.problem import MEANINGS
from refattn.strategies import VALUES, _features, arrays, gradients, layouts, problems

SEARCH = settings(max_examples=3000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
REACH = settings(SEARCH, phases=[Phase.generate])


def reach(strategy, condition):
    """Return some example that fulfils the condition, not shrunk."""
    return find(strategy, condition, settings=REACH)


def missed(strategy, conditions):
    """Return the names of the conditions that no example fulfils: one search for all of them."""
    left = dict(conditions)

    def found(example):
        for name in [n for n, fulfils in left.items() if fulfils(example)]:
            del left[name]
        return not left

    with suppress(NoSuchExample):
        reach(strategy, found)
    return sorted(left)


def smallest(strategy, condition):
    return find(strategy, condition, settings=SEARCH)


def sequences(p):
    return [(r.stop - r.start, k.stop - k.start) for r, k in p.segments()]


def empty(p):
    return any(not visible(p, 0, h, r, k).any(1).all() for h in range(p.heads) for r, k in p.segments())


def neg_inf(x):
    return x is not None and bool(np.isneginf(x.astype(np.float64)).any())


EDGES = {
    "h_q / h_kv differs from h_kv": lambda p: p.heads != p.heads_kv**2 and 1 < p.heads_kv < p.heads,
    "8 heads on 2": lambda p: (p.heads, p.heads_kv) == (8, 2),
    "d_k above d_v": lambda p: p.d_k > p.d_v,
    "d_v above d_k": lambda p: p.d_v > p.d_k,
    "more queries": lambda p: p.n_q > p.n_k > 0,
    "more keys": lambda p: p.n_k > p.n_q > 0,
    "two batches": lambda p: p.batch == 2,
    "window without right": lambda p: p.window is not None and p.window[0] is not None and p.window[1] is None,
    "window both sides": lambda p: p.window is not None and None not in p.window and 0 not in p.window,
    "window with causal": lambda p: p.window is not None and p.causal is not None,
    "scale below 0": lambda p: p.scale is not None and p.scale < 0,
    "scale 0": lambda p: p.scale == 0,
    "scale above 0": lambda p: p.scale is not None and p.scale > 0,
    "bias of -inf": lambda p: neg_inf(p.bias),
    "bias far below": lambda p: p.bias is not None and bool((p.bias == -200).any()),
    "bias of one row": lambda p: p.bias is not None and p.bias.shape[2] == 1 < p.n_q,
    "bias of one head": lambda p: p.bias is not None and p.bias.shape[1] == 1 < p.heads,
    "bias of every axis": lambda p: p.bias is not None and p.bias.shape == (p.batch, p.heads, p.n_q, p.n_k),
    "large sink": lambda p: p.sink is not None and np.abs(p.sink[np.isfinite(p.sink)]).max(initial=0) > 50,
    "sink of -inf": lambda p: neg_inf(p.sink),
    "empty rows by allowed": lambda p: p.allowed is not None and p.causal is None and p.window is None and empty(p),
    "empty rows by causal": lambda p: p.causal is not None and p.allowed is None and p.bias is None and empty(p),
    "an item without keys": lambda p: p.lengths_k is not None and p.cu_seqlens_k is None and 0 in p.lengths_k,
    "gaps between sequences": lambda p: p.lengths_k is not None and p.cu_seqlens_k is not None and p.n_k > 5,
    "an offset for each item": lambda p: p.offset is not None and not isinstance(p.offset, int),
    "an offset below 0": lambda p: isinstance(p.offset, int) and p.offset < 0,
    "three sequences": lambda p: len(p.segments()) > 2,
    "sequence of no rows": lambda p: p.cu_seqlens_q is not None and any(q == 0 < k for q, k in sequences(p)),
    "sequence of no keys": lambda p: p.cu_seqlens_q is not None and any(k == 0 < q for q, k in sequences(p)),
    "first sequence empty": lambda p: p.cu_seqlens_q is not None and sequences(p)[0] == (0, 0) and p.n_q > 0,
    "no queries": lambda p: p.n_q == 0,
    "no keys": lambda p: p.n_k == 0 < p.n_q,
    **{f"{n} queries": lambda p, n=n: p.n_q == n for n in (1, 13, 37, 63, 64, 65, 127, 128, 129)},
    **{f"{n} keys": lambda p, n=n: p.n_k == n for n in (1, 13, 37, 63, 64, 65, 127, 128, 129)},
}  # fmt: skip


def test_every_edge_is_reached():
    assert missed(problems(max_dim=8), EDGES) == []
    assert missed(st.booleans(), {"yes": lambda x: x, "neither": lambda x: x is None}) == ["neither"]


def first_with(feature):
    """Return the first operator that has a feature."""
    return next(v for v in VARIANTS if feature in _features(VARIANTS[v]))


def test_every_feature_is_reached():
    for variant in {first_with(f) for f in FEATURES | FURTHER}:
        some = [f for f in FEATURES | FURTHER if first_with(f) == variant]
        assert missed(problems(variant), {f: lambda p, f=f: f in p.features() for f in some}) == [], variant


@pytest.mark.parametrize("feature", sorted(FEATURES | FURTHER))
def test_every_feature_can_be_asked_for_alone(feature):
    variant = first_with(feature)
    others = {"lengths_differ"} - VARIANTS[variant].never | VARIANTS[variant].always
    others |= {"negative_window": {"window"}, "d_k_zero": {"d_v_differs"}}.get(feature, set())
    others |= {"positions": {"alibi_slopes"}, "rotary_partial": {"rotary_half"}}.get(feature, set())
    others |= {"scales"} if feature.startswith("scales_by") else set()
    others |= {"paged_nhd"} if feature == "appending" else set()
    alone = problems(variant, features={feature, *others}, families=["integers"], max_rows=13, max_keys=13)
    assert reach(alone, lambda p: feature in p.features()).features() <= {feature, *others}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_of_an_operator_is_reached(variant):
    v = VARIANTS[variant]
    wanted = {f"option {n}": lambda p, n=n: n in p.options for n in v.options}
    wanted |= {n: lambda p, n=n: getattr(p, n) is not None for n in v.uses}
    assert missed(problems(variant), wanted) == []


@given(st.data(), st.sampled_from(list(VARIANTS)), st.sampled_from(list(FORMATS)))
def test_problems_are_valid_and_within_their_limits(data, variant, dtype):
    v = VARIANTS[variant]
    some = {"lengths_differ", "grouped_heads", "window", "scale", "allowed"} - v.never
    asked = data.draw(st.sets(st.sampled_from(sorted(x for x in some if x not in MEANINGS or x in v.uses)))) | v.always
    p = data.draw(problems(variant, dtypes=[dtype], features=asked, max_rows=9, max_keys=70, max_dim=6))
    assert p.dtype == dtype
    assert p.variant == variant
    assert p.features() <= asked
    assert 1 <= p.n_q <= 9
    assert 1 <= p.n_k <= 70
    assert max(p.d_k, p.d_v) <= 6
    v.settings(p)


@given(st.data(), st.sampled_from(list(FORMATS)))
def test_numbers_stay_in_the_format(data, dtype):
    p = data.draw(problems(dtypes=[dtype], families=[n for n in VALUES if n != "poison"]))
    for x in (p.query, p.key, p.value):
        assert np.isfinite(x.astype(np.float64)).all()
    for x in (p.bias, p.sink):
        assert x is None or not np.isnan(x.astype(np.float64)).any()


@given(problems(dtypes=["float32", "bfloat16", "float16", "float64"], max_rows=5, max_keys=9, max_dim=4))
@settings(max_examples=25)
def test_the_right_kernel_passes_on_whatever_is_drawn(p):
    report = check_problem(tiled, p, "drawn")
    assert report.passed, report.describe(report.checks[0])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "softmax"])
def test_every_operator_answers_whatever_is_drawn(variant):
    wide = max(3, VARIANTS[variant].narrowest)

    @given(problems(variant, max_rows=3, max_keys=5, max_dim=wide, dtypes=["float32", "bfloat16"]))
    @settings(max_examples=25)
    def run(p):
        assert evaluate(p).out.shape == p.out_shape

    run()


def test_a_width_below_an_operators_least_is_refused():
    with pytest.raises(InvalidInput, match=r"^max_dim: got 3, expected an integer of at least 4$"):
        problems("nsa", max_dim=3)


# shrinking --------------------------------------------------------------------------------------------------------


def axes(p):
    return p.batch, p.heads, p.heads_kv, p.n_q, p.n_k, p.d_k, p.d_v


def test_the_simplest_problem_is_plain():
    p = smallest(problems(), lambda p: True)
    assert axes(p) == (1,) * 7
    assert not p.features()
    assert set(p.arrays()) == {"query", "key", "value"}
    assert {float(x) for t in (p.query, p.key, p.value) for x in t.ravel()} <= {-3, -2, -1, 0, 1, 2, 3}


@pytest.mark.parametrize(
    ("condition", "features", "size"),
    [
        (lambda p: p.causal is not None and p.n_q != p.n_k, {"causal_bottom_right", "lengths_differ"}, 2),
        (lambda p: p.sink is not None and p.heads > p.heads_kv, {"sink", "grouped_heads"}, 2),
        (lambda p: p.cu_seqlens_q is not None and len(p.cu_seqlens_q) > 2, {"variable_lengths"}, 1),
        (lambda p: p.bias is not None and p.bias.size > 1, {"bias"}, 2),
        (lambda p: p.allowed is not None and not p.allowed.all(), {"allowed"}, 3),
        (lambda p: p.d_v > 2, frozenset(), 3),
        (lambda p: p.n_k == 65 and p.scale is not None, {"scale"}, 65),
    ],
)
def test_problems_shrink_to_what_matters(condition, features, size):
    p = smallest(problems(), condition)
    assert p.features() == features
    assert max(axes(p)) <= size
    assert sorted(axes(p))[3] == 1


def test_a_wrong_kernel_shrinks_to_a_small_call():
    """A kernel that takes the causal corner for the top left one."""

    def kernel(p):
        return tiled(p.replace(causal="top_left") if p.causal else p)

    def wrong(p):
        return not check_problem(kernel, p, "corner").passed

    features = [*FEATURES, "lengths_q", "lengths_k"]
    p = smallest(problems(max_rows=8, max_keys=8, max_dim=4, features=features), wrong)
    # The corners differ where lengths do: the call's, a packed sequence's, or a batch's own. Which of them is found
    # first depends on the modules that are loaded: Hypothesis draws from the constants in their source.
    ways = {"lengths_differ", "variable_lengths", "lengths_q", "lengths_k"}
    assert p.features() - ways == {"causal_bottom_right"}
    assert len(p.features() & ways) == 1
    assert max(axes(p)) <= 3


def test_the_same_draw_gives_the_same_numbers():
    a, b = (reach(problems(), lambda p: p.n_k > 4 and p.bias is not None) for _ in range(2))
    assert {n: x.tobytes() for n, x in a.arrays().items()} == {n: x.tobytes() for n, x in b.arrays().items()}


# families ---------------------------------------------------------------------------------------------------------


def of(family, condition=lambda p: True, **more):
    return reach(problems(families=[family], **more), lambda p: p.n_q > 4 and p.n_k > 4 and p.d_v > 4 and condition(p))


def test_families_are_what_they_say():
    assert list(VALUES) == list(BUILDERS)
    numbers = {n: of(n, features=()) for n in VALUES}
    assert (numbers["integers"].value % 1 == 0).all()
    assert evaluate(of("peaked", features=())).lse.max() > 30
    assert np.unique(numbers["probe"].value).tolist() == [0, 128]
    for e in (-6, 6):
        two = of("head_scales", lambda p, e=e: p.heads_kv > 1 and 2.0**e / 4 < p.value[0, 1].std() < 2.0**e * 4)
        assert two.heads_kv > 1
    assert min(x.min() for x in (numbers["positive"].query, numbers["positive"].value)) >= 0.5
    assert np.ptp(numbers["similar_rows"].query, axis=2).max() < 0.2
    for sign in (-1, 1):
        far = of("shifted", lambda p, s=sign: s * p.key[0, 0, 0, 0] > 400 and p.d_k < 9, features=())
        assert sign * evaluate(far).lse.min() > 5e4
    lse = evaluate(numbers["near_tie"]).lse
    assert np.abs(lse).max() > 1000 or numbers["near_tie"].d_k < 9
    top = FORMATS["float32"].largest
    of("extreme", lambda p: np.abs(p.value).min() > top / 4)
    of("extreme", lambda p: np.abs(p.value).max() < FORMATS["float32"].smallest_normal * 2)


@given(problems(families=["poison"], max_rows=8, max_keys=8, max_dim=3))
def test_poison_stands_behind_the_mask(p):
    exact = evaluate(p)
    assert not np.isnan(exact.out).any()


def test_poison_is_there():
    p = of("poison", lambda p: np.isnan(p.key).any() and np.isinf(p.value).any() and not np.isnan(p.key).all())
    assert "allowed" in p.arrays()


# gradients, arrays, layouts ---------------------------------------------------------------------------------------


@given(st.data(), st.sampled_from(list(FORMATS)))
def test_arrays_are_finite_and_of_their_type(data, dtype):
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=4)))
    x = data.draw(arrays(dtype, shape))
    assert x.shape == shape
    assert x.dtype == FORMATS[dtype].dtype
    assert np.isfinite(x.astype(np.float64)).all()


def test_arrays_reach_the_ends_of_the_format():
    for dtype, form in FORMATS.items():
        reach(arrays(form, (5,)), lambda x, f=form: x.astype(np.float64).max() == f.largest)
        reach(arrays(dtype, (5,)), lambda x, f=form: (x.astype(np.float64) == f.smallest_subnormal).any())
    one = reach(arrays(np.float32, (2, 3)), lambda x: (x == 1).sum() == 1 and (x == 0).sum() == 5)
    assert one.sum() == 1


@given(st.data())
def test_gradients_are_of_the_outs_shape_and_type(data):
    p = data.draw(problems(dtypes=["bfloat16", "float32"]))
    dout = data.draw(gradients(p))
    assert dout.shape == p.out_shape
    assert dout.dtype == p.query.dtype


def test_gradients_are_of_the_problems_kind(make):
    torch = pytest.importorskip("torch")
    assert isinstance(smallest(gradients(make().to("torch")), lambda x: True), torch.Tensor)


def numbered(dtype, shape=(2, 3, 4, 5)):
    return from_float64((np.arange(np.prod(shape)).reshape(shape) % 7) - 3.0, dtype)


@given(st.data(), st.sampled_from([*FORMATS, "bool", "int32"]))
def test_layouts_hold_the_same_numbers(data, dtype):
    x = numbered(dtype) if dtype in FORMATS else (numbered("float32") > 0).astype(dtype)
    y = data.draw(layouts(x))
    assert y.dtype == x.dtype
    assert np.ascontiguousarray(y).tobytes() == x.tobytes()


PLAIN = numbered("float32").strides
LAYOUTS = {
    "plain": lambda s: s == PLAIN,
    "room behind the rows": lambda s: s[-1] == 4 and s[-2] > PLAIN[-2] and s[0] == 3 * s[1],
    **{f"axis {a} apart": lambda s, a=a: s[a] == 2 * PLAIN[a] and s[a + 1 :] == PLAIN[a + 1 :] for a in range(4)},
    **{f"axis {a} backwards": lambda s, a=a: s[a] == -PLAIN[a] for a in range(4)},
    "heads after sequence": lambda s: s[1] < s[2],
    "keys after dim": lambda s: s[2] < s[3],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_differ_in_strides(layout):
    x = numbered("float32")
    y = reach(layouts(x), lambda y: LAYOUTS[layout](y.strides))
    assert y.strides == x.strides or y.base is not None


def test_an_axis_on_which_all_agree_gets_stride_zero():
    row = np.array([0.0, np.nan, -2.0, 1.0], np.float32)
    x = np.broadcast_to(row, (2, 3, 5, 4))
    y = reach(layouts(x), lambda y: y.strides[2] == 0)
    assert y.tobytes() == x.tobytes()
    with pytest.raises(NoSuchExample):  # 0 and -0 do not agree
        reach(layouts(np.array([[0.0, -0.0]])), lambda y: 0 in y.strides)


def test_layouts_of_what_has_one_layout():
    for x in (np.zeros(()), np.zeros((3, 0, 2)), np.ones((1,))):
        assert smallest(layouts(x), lambda y: True).shape == x.shape


def test_the_room_between_elements_is_nan():
    x = numbered("bfloat16", (1, 1, 2, 3))
    y = reach(layouts(x), lambda y: y.base is not None and y.base.size == 2 * (3 + 3))
    assert np.isnan(y.base.astype(np.float64)).sum() == 6


def test_layouts_go_into_a_problem(make):
    p = make()
    key = reach(layouts(p.key), lambda y: y.strides[-1] < 0)
    assert evaluate(p.replace(key=key)).out.tobytes() == evaluate(p).out.tobytes()


# errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: problems("flashy"), "variant: got 'flashy', expected one of softmax, linear, power, sigmoid"),
        (lambda: problems(dtypes=["int8"]), "dtypes: got 'int8', expected some of float64, float32"),
        (lambda: problems(dtypes="float32"), r"dtypes: got 'float32', expected a collection of names, e\.g\. \('float"),
        (lambda: problems(dtypes=[]), "dtypes: got none, expected at least one name"),
        (lambda: problems(families=[]), "families: got none, expected at least one name"),
        (lambda: problems(families=["odd"]), "families: got 'odd', expected some of integers, normal"),
        (lambda: problems(features={"rope"}), "features: got 'rope', expected some of alibi_slopes, alignment, allo"),
        (
            lambda: problems("linear", features={"sink"}),
            "features: got 'sink', expected what linear attention has: caus",
        ),
        (lambda: problems(max_rows=0), "max_rows: got 0, expected an integer of at least 1"),
        (lambda: problems(max_keys=2.5), r"max_keys: got 2\.5, expected an integer of at least 1"),
        (lambda: problems(max_dim=True), "max_dim: got True, expected an integer of at least 1"),
        (lambda: problems(tile=-1), "tile: got -1, expected an integer of at least 1"),
        (lambda: arrays("int8", (2,)), "dtype: got 'int8', expected one of float64"),
        (lambda: arrays("float32", (2, -1)), r"shape: got \(2, -1\), expected a tuple of integers of at least 0"),
        (lambda: arrays("float32", 3), "shape: got 3, expected a tuple of integers of at least 0"),
        (lambda: gradients(np.zeros(3)), "problem: got ndarray, expected a Problem"),
        (lambda: layouts([1, 2]), "array: got list, expected a NumPy array"),
    ],
)
def test_bad_arguments(call, text):
    with pytest.raises(InvalidInput, match=text):
        call()
