"""sortLSH as it runs: Gray's order, blocks, and how many heavy entries it finds."""

import numpy as np

from refattn.functions.hyper import angular_hash
from refattn.theory.fields import Q
from refattn.theory.hyper import BLOCK, _head, hashed, hashed_apart, sort_lsh
from refattn.theory.hyper_spectral import _most, _steep, mean_square, spectral_without_kappa


def test_neighbours_of_grays_order_differ_by_one_side():
    signs = np.array([[1 if code >> bit & 1 else -1 for bit in range(4)] for code in range(16)])
    in_order = signs[np.argsort(angular_hash(signs, np.eye(4)))]
    assert ((in_order[1:] != in_order[:-1]).sum(1) == 1).all()


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


def test_the_error_of_sampled_row_sums_grows_with_kappa_and_alpha():
    found = spectral_without_kappa()
    assert found.fails
    assert min(found.detail["kappa of what is left"]) > 1000  # what the control leaves out
    errors = [mean_square(*_steep(6, kappa), (1, 1)) for kappa in (1, 2, 4, 8)]
    assert errors == sorted(set(errors))
    a, mask, v = _steep(6, 4)
    spread = (a + Q(1), mask, v)  # the same with a smaller alpha and kappa
    assert mean_square(*spread, (1, 1)) < mean_square(a, mask, v, (1, 1))
    assert _most(*spread, (1, 1)) < _most(a, mask, v, (1, 1))


def test_a_mean_over_draws_is_that_of_a_loop():
    a, mask, v = _steep(3, 2)
    sums, off = [2, 2, 1], []
    for product in range(3):
        for one in range(3):
            off += [sum((sums[i] / Q(max(3 * int(a[i, one]), 1)) * 3 * (i == product) - 1) ** 2 for i in range(3))]
    assert mean_square(a, mask, v, (1, 1)) == sum(off) / len(off)
