import numpy as np

from refattn import Problem
from refattn.check.diagnose.repeats import independent_share


def share(rng, n_q=200, n_k=20, **options):
    q, k, v = (rng.standard_normal((2, h, n, 16)).astype(np.float32) for h, n in ((4, n_q), (2, n_k), (2, n_k)))
    return independent_share(Problem(q, k, v, **options), 8)


def test_weights_that_differ_are_nearly_all_independent():
    assert 0.5 < share(np.random.default_rng(0)) <= 1


def test_weights_of_a_saturated_cap_are_rounded_alike():
    assert share(np.random.default_rng(0), softcap=2.0, scale=10.0) < 0.05


def test_equal_weights_are_one_error_over_their_sum():
    assert share(np.random.default_rng(0), scale=0.0) < 0.01  # 1/20
    assert (
        share(np.random.default_rng(0), n_k=16, scale=0.0) < 0.01
    )  # 1/16 is exact, but over the sum so far 1/3 is not
    assert share(np.random.default_rng(0), n_k=2, scale=0.0) == 1


def test_sinks_change_no_weight_over_the_largest():
    rng = np.random.default_rng(0)
    q = np.repeat(rng.standard_normal((1, 1, 1, 16)), 8, 1)
    k, v = rng.standard_normal((2, 1, 1, 30, 16))
    assert independent_share(Problem(q, k, v, sink=np.arange(8.0)), 8) < 0.3
    assert independent_share(Problem(q[:, :1], k, v), 8) > 1 - 1e-12  # of a row by itself, but for sums' rounding


def test_a_call_with_many_keys_or_none():
    assert 0 < share(np.random.default_rng(0), n_q=3, n_k=5000) <= 1
    assert share(np.random.default_rng(0), n_k=0) == 1


def test_keys_of_the_same_values_in_several_batches_are_one():
    rng = np.random.default_rng(0)
    q, k, v = (np.repeat(rng.standard_normal((1, 1, n, 16)), 64, 0) for n in (1, 33, 33))
    k[:, :, -1] = rng.standard_normal((64, 1, 16))  # a prefix for all, and a key of each one's own
    alike = independent_share(Problem(q, k, v), 8)
    assert alike < 0.2
    assert independent_share(Problem(q, k, rng.standard_normal(v.shape)), 8) > 2 * alike


def test_rows_that_differ_in_the_last_key_only_are_rounded_alike_before_it():
    rng = np.random.default_rng(0)
    q = np.repeat(rng.standard_normal((1, 1, 1, 16)), 256, 2)
    q[..., 0] = np.linspace(2.5, 6, 256)
    k, v = rng.standard_normal((2, 1, 1, 33, 16))
    k[..., 0] = k[:, :, -1] = 0
    k[:, :, -1, 0] = 3  # the row's largest weight, of another size in each row
    for order in (slice(None), slice(None, None, -1)):
        assert independent_share(Problem(q, k[:, :, order], v[:, :, order]), 8) < 0.1
