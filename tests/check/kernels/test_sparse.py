"""The kernel that gathers keys computes what the operators' definitions say, by rules of its own."""

import numpy as np
import pytest

from refattn import Problem, UnsupportedProblem, check_kernel
from refattn.check.inputs.families import cases
from refattn.check.kernels import KERNELS, found
from refattn.check.kernels.sparse import sparse
from refattn.variants import VARIANTS, Lowered, Selected

from ...conftest import NIGHTLY

ENTRY = KERNELS["refattn-sparse"]


def test_it_computes_every_operator_that_attends_to_some_keys():
    assert ENTRY.variants == {v.name for v in VARIANTS.values() if isinstance(v.shape, Lowered | Selected)}
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


def test_another_operator_is_refused():
    q = np.ones((1, 1, 2, 2), np.float32)
    with pytest.raises(
        UnsupportedProblem, match=r"refattn-sparse: takes block_sparse, power_blocks, neighborhood, .*, got softmax"
    ):
        sparse(Problem(q, q, q))
