"""Laws of scales, positions, slopes and corners: what breaks each, and what they ask of a kernel."""

import pytest

from refattn import VARIANTS, Capabilities, check_kernel
from refattn.check.bugs.planted import planted
from refattn.check.call_laws import CALL_LAWS
from refattn.check.kernels.tiled import tiled
from refattn.check.model import FEATURES, FURTHER
from refattn.dtypes import ELEMENTS

ABLE = Capabilities({"float32"}, FEATURES | FURTHER, lse=True, elements=ELEMENTS)
BROKEN = {
    "scale_clamped": ("scales_moved", "powers of two moved between scales and elements change the output"),
    "rotary_own_tables": ("rotary_none", "rotary positions whose angles are all 0 change the output"),
    "positions_in_bfloat16": ("positions_moved", "a number added to all positions changes the output"),
    "alibi_of_zero_made": ("alibi_none", "slopes of 0 change the output"),
    "offset_of_causal_alone": ("corner_of_window", "with an offset to the other corner is not one at the bottom right"),
}
LAW_BUGS = set(BROKEN)
"""Planted bugs that these tests have."""


@pytest.mark.parametrize("bug", BROKEN)
def test_a_law_fails(bug):
    law, text = BROKEN[bug]
    (check,) = check_kernel(planted(bug), capabilities=ABLE, only=f"law/{law}", budget="quick").checks
    assert check.verdict == "failed"
    assert text in check.message


def test_every_law_here_is_softmax_s_and_has_a_bug():
    names = {law.name for law in CALL_LAWS}
    assert names <= set(VARIANTS["softmax"].laws)
    assert {law for law, _ in BROKEN.values()} == names
    assert set(VARIANTS["softmax"].bugs) >= LAW_BUGS


def without(*names):
    return Capabilities({"float32"}, (FEATURES | FURTHER) - set(names), lse=True)


@pytest.mark.parametrize(
    ("law", "able", "text"),
    [
        ("scales_moved", without(), "float8_e4m3fn"),
        ("rotary_none", without("rotary_half", "rotary_interleaved"), "rotary_half"),
        ("positions_moved", without("positions"), "positions"),
        ("alibi_none", without("alibi_slopes"), "alibi_slopes"),
        ("corner_of_window", without("alignment"), "alignment"),
    ],
)
def test_a_kernel_without_the_option_is_not_asked(law, able, text):
    (check,) = check_kernel(tiled, capabilities=able, only=f"law/{law}").checks
    assert check.verdict == "unsupported"
    assert text in check.message


def test_pairs_are_those_that_a_kernel_turns():
    (check,) = check_kernel(tiled, capabilities=without("rotary_half"), only="law/positions_moved").checks
    assert check.verdict == "passed"
