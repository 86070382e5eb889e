"""sortLSH as it runs: Gray's order, blocks, and how many heavy entries it finds."""

from refattn.theory.hyper import BLOCK, _head, hashed, hashed_apart, sort_lsh


def test_blocks_are_of_sorted_queries_and_keys():
    q, k, _, planes = _head(0)
    mask = sort_lsh(q, k, planes, BLOCK)
    assert (mask.sum(0) == BLOCK).all()
    assert (mask.sum(1) == BLOCK).all()
    assert sort_lsh(k, k, planes, BLOCK).diagonal().all()  # equal tokens share their block


def test_recall_is_measured_and_is_what_the_error_depends_on():
    found, apart = hashed(), hashed_apart()
    assert min(found.detail["recall"]) > max(apart.detail["recall"])
    assert max(found.detail["recall"]) < 1  # a real run misses some
    assert found.holds
    assert apart.fails
