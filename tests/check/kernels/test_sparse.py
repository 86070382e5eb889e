"""The kernel that gathers keys computes what the operators' definitions say, by rules of its own."""

import numpy as np
import pytest

from refattn import Problem, UnsupportedProblem, check_kernel
from refattn.check.inputs.families import cases
from refattn.check.kernels import KERNELS, found
from refattn.check.kernels.sparse import PICKS, sparse
from refattn.variants import VARIANTS, Lowered, Selected

from ...conftest import NIGHTLY

ENTRY = KERNELS["refattn-sparse"]


def test_it_computes_every_operator_that_attends_to_some_keys():
    sums = KERNELS["refattn-branches"].variants
    assert ENTRY.variants == {v.name for v in VARIANTS.values() if isinstance(v.shape, Lowered | Selected)} - sums
    assert ENTRY in found("moba")
    assert ENTRY not in found()


def asked(variant, dtype):
    """Return which checks: in bfloat16 nightly all data, else one call. It has no more of its own than two roundings,
    of weights and of out; rows are picked and weighed in float32 in both."""
    if dtype == "float32":
        return "!ragged/*"
    return "gaussian/*" if NIGHTLY else cases(variant)[0].name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", sorted(ENTRY.variants))
def test_it_is_right(variant, dtype):
    report = check_kernel(
        ENTRY.kernel().call,
        variant,
        capabilities=ENTRY.capabilities,
        dtypes=[dtype],
        only=asked(variant, dtype),
    )
    assert report.passed, report.describe(report.failures[0])


def moba_by_a_threshold(q, k, o):
    """Take every block whose score is at least that of the last to be chosen."""
    size = o["block_size"]
    means = np.array([k[a : a + size].mean(0, dtype=np.float32) for a in range(0, len(k), size)])
    for i in range(len(q)):
        own = (i + len(k) - len(q)) // size
        s, count = means[:own] @ q[i], min(o["topk"] - 1, own)
        best = np.flatnonzero(s >= np.sort(s)[-count]).tolist() if count else []
        yield [j for b in [*best, own] for j in range(b * size, min(b * size + size, len(k)))]


def test_blocks_taken_by_a_threshold_fail_where_scores_tie(monkeypatch):
    def checked(only):
        return check_kernel(sparse, "moba", capabilities=ENTRY.capabilities, dtypes=["float32"], only=only)

    monkeypatch.setitem(PICKS, "moba", moba_by_a_threshold)
    assert checked("gaussian/ragged[*").passed
    assert [c.name for c in checked("gaussian/*ties[*").failures] == [
        "gaussian/ties[float32]",
        "gaussian/near-ties[float32]",
    ]


def test_another_operator_is_refused():
    q = np.ones((1, 1, 2, 2), np.float32)
    with pytest.raises(
        UnsupportedProblem, match=r"refattn-sparse: takes block_sparse, power_blocks, neighborhood, .*, got softmax"
    ):
        sparse(Problem(q, q, q))


@pytest.mark.parametrize("variant", ["dsa", "moba", "nsa_selected", "topk"])
def test_a_choice_made_from_the_first_item_fails(variant, monkeypatch):
    pick = PICKS[variant]

    def first(p):
        order, kept = [], []

        def picked(q, k, o):
            order.append(len(order))
            if len(order) <= p.heads:  # heads of the first item come first
                kept.append(list(pick(q, k, o)))
            yield from kept[order[-1] % p.heads]

        with monkeypatch.context() as m:
            m.setitem(PICKS, variant, picked)
            return sparse(p)

    for kernel, right in ((sparse, True), (first, False)):
        report = check_kernel(
            kernel, variant, capabilities=ENTRY.capabilities, dtypes=["float32"], only="gaussian/items[*"
        )
        assert report.passed is right, (variant, right)
