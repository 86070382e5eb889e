"""The kernel that solves for a chunk's changes computes the gated delta rule, forward and backward."""

import numpy as np
import pytest

from refattn import Problem, UnsupportedProblem, check_kernel
from refattn.check.kernels import KERNELS, found
from refattn.check.kernels.chunked import CHUNK, chunked
from refattn.variants import VARIANTS

pytest.importorskip("torch")
ENTRY = KERNELS["refattn-chunked"]
ONLY = {"float32": None, "bfloat16": "gaussian/*"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_right(dtype):
    report = check_kernel(
        ENTRY.kernel().call,
        "gated_delta",
        capabilities=ENTRY.capabilities,
        dtypes=[dtype],
        budget="quick",
        only=ONLY[dtype],
    )
    assert report.passed, report.describe(report.failures[0])
    assert report.count("passed") >= 5


NAMES = ["gaussian/chunks", "gaussian/nothing-forgotten/gradients", "gaussian/at-the-start-and-all/gradients"]
"""Of Titans' memory."""


@pytest.mark.parametrize("name", [*NAMES, "law/last_state_gradient"])
def test_it_is_right_for_titans(name):
    report = check_kernel(ENTRY.kernel().call, "titans", capabilities=ENTRY.capabilities, only=f"{name}[float32]")
    assert report.passed, report.describe(report.failures[0])
    assert report.count("passed") == 1


@pytest.mark.parametrize("name", ["gaussian/state", "gaussian/one-token-and-all/gradients", "law/state_gradient"])
def test_it_is_right_for_lightning(name):
    report = check_kernel(ENTRY.kernel().call, "lightning", capabilities=ENTRY.capabilities, only=f"{name}[float32]")
    assert report.passed, report.describe(report.failures[0])
    assert report.count("passed") == 1


def test_its_own_cases_pass_the_ends_of_its_chunks():
    assert max(c["n_q"] for c in VARIANTS["gated_delta"].cases.values()) > CHUNK


def test_it_is_found_for_its_operator():
    assert ENTRY in found("gated_delta")
    assert ENTRY in found("lightning")
    assert ENTRY in found("titans")
    assert ENTRY not in found()


def test_another_operator_is_refused():
    q = np.ones((1, 1, 2, 2), np.float32)
    with pytest.raises(UnsupportedProblem, match="refattn-chunked: takes gated_delta, lightning, titans, got softmax"):
        chunked(Problem(q, q, q))
