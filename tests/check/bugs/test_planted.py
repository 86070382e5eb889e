"""The checker's own test: every kernel known to be wrong fails."""

import numpy as np
import pytest

from refattn import VARIANTS, Capabilities, check_kernel
from refattn.check.bugs.dropped import DROPOUT_BUGS
from refattn.check.bugs.paged import PAGED_BUGS
from refattn.check.bugs.planted import PLANTED, mistaken, plain, planted
from refattn.check.bugs.typed import TYPE_BUGS
from refattn.check.model import FEATURES, FURTHER
from refattn.check.runner import matches, plan
from refattn.dtypes import ELEMENTS

from ...conftest import NIGHTLY, SMALL
from ..test_call_laws import LAW_BUGS

OWN = ("types/", "pages/", "positions/", "dropout/")
"""Families of further options, in which any bug may show."""
SINKS = {"poison/sink-nan", "poison/sink-inf"}
ELSEWHERE = {*PAGED_BUGS, *DROPOUT_BUGS, "dropout_in_lse", *TYPE_BUGS, *LAW_BUGS}
"""Bugs that test_pages.py, test_dropout.py, test_scales.py and check/test_call_laws.py of tests/ have."""
WRONG = [(v, b, "float32") for v in VARIANTS for b in VARIANTS[v].bugs if b not in ELSEWHERE]
WRONG += [
    ("softmax", b, "bfloat16") for b in VARIANTS["softmax"].bugs if b not in {"out_scale_ignored", *ELSEWHERE}
]  # out is float8 there


WHERE = {
    "rotary_ignored": "positions/rotary-half*",
    "rotary_pairs_swapped": "positions/rotary-half*",
    "rotary_other_way": "positions/rotary-half*",
    "rotary_rest_dropped": "positions/rotary-given*",
    "rotary_before_scale": "types/rotary-by-channel*",
    "query_at_next_position": "positions/rotary-half*",
    "positions_ignored": "positions/rotary-given*",
    "alibi_ignored": "positions/alibi-by-batch*",
    "alibi_of_next_head": "positions/alibi-by-batch*",
    "tree_sibling_seen": "models/tree*",
    "document_boundary_off_by_one": "ragged/packed-ends*",
    "window_side_clamped": "gaussian/window-before*",
    **dict.fromkeys(("norm_ignored", "norm_unweighted", "norm_after_rotary"), "positions/norm-rotary*"),
    **dict.fromkeys(("norm_over_all_heads", "norm_of_keys_over_all_heads"), "positions/norm-rotary*"),
    **dict.fromkeys(("norm_over_a_group", "norm_over_all_heads_by_one_width"), "positions/norm-rotary*"),
    **dict.fromkeys(("t5_one_way_for_both", "t5_query_less_key"), "positions/t5[*"),
    **dict.fromkeys(("t5_both_ways_for_one", "t5_other_base", "t5_last_unreached"), "positions/t5-causal*"),
    **{f"temperature_{n}": "positions/tempered*" for n in ("ignored", "of_next_position", "of_last_query", "on_keys")},
    "scale_of_latent_width": "models/deepseek-decode*",
}
"""Bugs that calls of the quick budget expose which come late: only these are run."""

FIRST = {
    "sequences_joined": "*/packed[*",
    "corner_of_unused": "ragged/lengths-of-keys[*",
    "empty_row_nan": "empty/*",
    "all_of_a_tie": "gaussian/*ties[*",
    "lengths_ignored": "empty/lengths-of-none[*",
    "lengths_one_more": "empty/lengths-of-none[*",
    "masked_value_read": "poison/value-behind-mask[*",
    "heads_tiled": "gaussian/grouped-heads[*",
    "scores_clamped": "shifted/large[*",
    "allowed_ignored": "gaussian/allowed[*",
    "bias_ignored": "gaussian/bias[*",
    "sink_ignored": "gaussian/sink[*",
    "softcap_ignored": "gaussian/softcap[*",
    "softcap_after_bias": "gaussian/softcap-bias[*",
    "out_scale_ignored": "types/out-float8[*",
    "scale_of_next_channel": "types/int8-by-token-and-channel[*",
    "scale_of_next_token": "types/int8-by-token-and-channel[*",
    "scale_of_next_head": "types/float8-by-head[*",
    "key_scale_ignored": "types/float8-by-tensor[*",
    "value_scale_ignored": "types/float8-by-tensor[*",
    **dict.fromkeys(("dropout_bits_turned", "philox_seed_halved", "philox_offset_by_warp"), "dropout/*"),
}
"""Calls that show a bug, where an operator has them: they run before all others."""


def first(items, bug):
    """Return the checks in the order in which they run."""
    return sorted(items, key=lambda i: not matches(i.name, FIRST.get(bug, "")))


def has(variant):
    """Return what a kernel can do that leaves nothing of an operator out."""
    return FEATURES | (FURTHER & VARIANTS[variant].uses)


@pytest.mark.parametrize(("variant", "bug", "dtype"), WRONG)
def test_a_planted_bug_is_caught(variant, bug, dtype):
    able = Capabilities({dtype}, FEATURES | FURTHER, lse=variant == "softmax", elements=ELEMENTS)
    asked = {"budget": "quick", "only": WHERE[bug]} if bug in WHERE else {"only": SMALL}
    items = plan(planted(bug), variant, capabilities=able, dtypes=[dtype], **asked)
    found = next((c for c in (i.run() for i in first(items, bug)) if c.verdict in ("failed", "edge")), None)
    assert found is not None, f"no check of {variant} fails"
    assert found.message


AT_AN_EDGE = {("dsa", "signed_scale"), ("seer", "at_the_threshold")}
"""Mistakes that show at a scale below 0 alone, or in rows that are empty: a gate ties with a threshold only where all
gates of its row do. These are edges, which a report without ``edges`` counts as failures."""
MISTAKES = [(v, n, d) for v in VARIANTS for n in VARIANTS[v].wrong for d in ("bfloat16", "float32")[: 1 + NIGHTLY]]
"""In bfloat16, whose bounds leave more room; nightly in float32 too."""


@pytest.mark.parametrize(("variant", "name", "dtype"), MISTAKES)
def test_what_implementers_get_wrong_is_caught(variant, name, dtype):
    """By the operator's own cases, in quick."""
    checks = plan(
        mistaken(variant, name),
        variant,
        capabilities=Capabilities({dtype}, features=has(variant)),
        dtypes=[dtype],
        budget="quick",
        only="gaussian/*",
    )
    says = "edge" if (variant, name) in AT_AN_EDGE else "failed"
    assert any(i.run().verdict == says for i in first(checks, name)), VARIANTS[variant].wrong[name][0]


def test_every_planted_bug_belongs_to_an_operator():
    assert set(PLANTED) == {b for v in VARIANTS.values() for b in v.bugs}


@pytest.mark.parametrize(
    ("bug", "where"),
    [
        (
            "heads_tiled",
            {f"gaussian/grouped-heads{x}" for x in ("", "-6-on-3", "-8-on-2")}
            | {"gaussian/everything", "empty/rows-with-everything", "law/grouped_heads"},
        ),
        ("sequences_joined", {"ragged/packed", "ragged/packed-ends", "ragged/packed-no-keys", "law/options_between"}),
        (
            "sink_ignored",
            {
                "gaussian/sink",
                "gaussian/everything",
                "probe/head-scales-sink",
                "shifted/large-sink",
                "poison/sink-nan",
                "poison/sink-inf",
                "law/options_between",
                "law/changed_in_place",
            },
        ),
        (
            "window_off_by_one",
            {
                f"gaussian/window{x}"
                for x in ("", "-causal", "-lengths-differ", "-both-sides-causal", "-both-sides-top-left")
            }
            | {"gaussian/offset-window", "gaussian/window-before", "gaussian/window-after", "gaussian/window-top-left"}
            | {"law/options_between", "shifted/below-sentinels-window"},
        ),
        ("softcap_after_bias", {"gaussian/softcap-bias", "gaussian/everything", "empty/rows-with-everything"}),
        ("causal_corner_swapped", None),
    ],
)
def test_a_bug_shows_only_where_it_can(bug, where):
    report = check_kernel(planted(bug), capabilities=Capabilities(lse=True), dtypes=["float32"], only=SMALL)
    assert not report.passed
    assert all(c.message for c in report.failures)
    names = {n for c in report.failures if not (n := c.name.split("[")[0]).startswith(OWN)}
    if where is None:
        assert "gaussian/causal-square" not in names
        assert "gaussian/causal-bottom-right" in names
    else:
        assert names == where


def test_the_zeroed_head_is_caught_where_other_rules_pass_it():
    """A head whose values are 64 times smaller, zeroed: within 1e-2 of the truth, and far outside its bound."""

    def kernel(p):
        out, lse = plain(p)
        out = out.copy()
        out[:, 1] = 0
        return out, lse

    report = check_kernel(kernel, only="probe/head-scales[bfloat16]", capabilities=Capabilities({"bfloat16"}))
    (check,) = report.checks
    assert check.verdict == "failed"
    assert check.worst.place[1] == 1
    assert check.worst.failures > 0.95 * 37 * 32
    assert abs(check.worst.got - check.worst.exact) < 2e-2


def test_the_dropped_own_key_is_caught_at_length_1024():
    """The last causal row drops its own key: Gaussian data hides it in bfloat16, probe values do not."""
    from refattn import Problem, check_problem
    from refattn.arrays import from_float64
    from refattn.dtypes import FORMATS

    rng = np.random.default_rng(0)
    n, form = 1024, FORMATS["bfloat16"]

    def problem(v):
        rows = rng.standard_normal((1, 1, n, 64)), rng.standard_normal((1, 1, n, 64)), v
        return Problem(*(from_float64(form.round_array(x), form.name) for x in rows), causal="top_left")

    v = rng.standard_normal((1, 1, n, 64))
    v[..., -1, :] = 256
    report = check_problem(planted("own_key_dropped"), _tail(problem(v)), "probe")
    assert report.count("failed") == 1
    assert report.failures[0].worst.place[2] == 7
    assert check_problem(plain, _tail(problem(v)), "probe").passed


def _tail(p):
    """The last 8 rows of a causal square: the rows before them do not matter here."""
    return p.replace(query=p.query[:, :, -8:].copy(), causal="bottom_right")
