import numpy as np
import pytest

from refattn import InvalidInput, rules


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: rules.causal("left"), "corner: got 'left', expected one of bottom_right, top_left"),
        (lambda: rules.window(-1, 0), "left: got -1, expected a whole number from 0 to 2**62"),
        (lambda: rules.window(0, 1.5), "right: got 1.5, expected a whole number from 0 to 2**62"),
        (lambda: rules.sinks(True), "count: got True, expected a whole number from 0 to 2**62"),
        (lambda: rules.chunk(0), "size: got 0, expected a whole number from 1 to 2**62"),
        (lambda: rules.dilated(2**63), f"step: got {2**63}, expected a whole number from 1 to 2**62"),
        (lambda: rules.prefix([2, -1]), "lengths: got -1, expected numbers of at least 0"),
        (lambda: rules.prefix(1.0), "lengths: got float64 of shape (1,), expected integers, at least one"),
        (
            lambda: rules.document([[0, 1], [2]]),
            "ids_q: got [[0, 1], [2]], expected integers, as many in each row",
        ),
        (lambda: rules.behind([2**61]), "distances: got 2305843009213693952, expected at most 67108864"),
        (lambda: rules.causal().dense(-1, 4), "n_q: got -1, expected a whole number, at least 0"),
        (lambda: rules.mask_mod("x", 4, 4), "rule: got 'x', expected a rule, such as refattn.rules.causal()"),
        (lambda: rules.document([]), "ids_q: got float64 of shape (0,), expected integers, at least one"),
        (lambda: rules.document([[1], [2]], [[1]] * 3), "ids_k: got 3 batches, expected ids_q's 2, or one for all"),
        (lambda: rules.behind([0, -1]), "distances: got -1, expected numbers of at least 0"),
        (lambda: rules.tree([-1, 2]), "parents: node 1 has parent 2, expected -1 or a node from 0 to 1"),
        (lambda: rules.tree([-2]), "parents: got -2, expected numbers of at least -1"),
        (
            lambda: rules.tree([-1, 2, 1, 2]),
            "parents: node 1 lies on a cycle or below one; a tree's nodes lead to a root (-1)",
        ),
        (
            lambda: rules.tree([0]),
            "parents: node 0 lies on a cycle or below one; a tree's nodes lead to a root (-1)",
        ),
        (lambda: rules.blocks([[1, 0]]), "mask: got int64 of shape (1, 2), expected booleans on 2 to 4 axes"),
        (lambda: rules.blocks([[True]], 0), "block_q: got 0, expected a whole number from 1 to 2**62"),
        (lambda: rules.array(np.ones(3, bool)), "mask: got bool of shape (3,), expected booleans on 2 to 4 axes"),
    ],
)
def test_bad_input(make, text):
    with pytest.raises(InvalidInput) as e:
        make()
    assert str(e.value) == text


def test_a_chain_is_causal_and_siblings_do_not_see_each_other():
    n = 5000  # deep: a walk by recursion would not end
    chain = rules.tree(np.arange(n) - 1)
    assert (chain.tiles(n, n, 500, 500) == rules.causal().tiles(n, n, 500, 500)).all()
    # two drafts of two tokens after three tokens of the past
    assert rules.tree([-1, 0, -1, 2]).draw(4, 7).split() == ["####...", "#####..", "###..#.", "###..##"]


def test_a_prefix_that_sees_itself():
    assert (rules.causal() | rules.prefix(2)).draw(4, 4).split() == ["##..", "##..", "###.", "####"]


def test_widths_beyond_the_call():
    assert rules.window(2**62, 2**62).dense(3, 5).all()
    assert rules.sinks(2**62).dense(3, 5).all()
    assert rules.window(2**62, 0).tiles(300, 300).tolist() == rules.causal().tiles(300, 300).tolist()
