"""What stands in the place of an attention term and does less must not pass for it."""

import pytest

from refattn.theory.crate import _scaled, _uniform, heads


@pytest.mark.parametrize(
    ("term", "wrong"),
    [
        (heads, 0),
        (_uniform, 12),  # nothing is added
        (lambda z, bases: z / 100, 12),  # scaled away
        (lambda z, bases: -heads(z, bases), 12),
    ],
    ids=["attention", "equal weights", "the tokens", "its sign turned"],
)
def test_only_attention_moves_the_coding_rate_at_unit_norm(term, wrong):
    assert _scaled(term, (3,), True, "").measured == wrong


def test_pairs_are_a_condition_and_not_a_habit():
    assert _scaled(heads, tuple(range(12)), False, "").measured > 0
