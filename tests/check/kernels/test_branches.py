"""The kernel of operators that add up several softmaxes computes what the operators' definitions say."""

import numpy as np
import pytest

from refattn import Problem, UnsupportedProblem, check_kernel
from refattn.check.kernels import KERNELS, branches, found
from refattn.variants import VARIANTS

ENTRY = KERNELS["refattn-branches"]
OWN = [(v, n) for v in sorted(ENTRY.variants) for n in VARIANTS[v].cases]


def judge(variant, dtype, only):
    return check_kernel(ENTRY.kernel().call, variant, capabilities=ENTRY.capabilities, dtypes=[dtype], only=only)


@pytest.mark.parametrize(("variant", "label"), OWN)
def test_it_is_right(variant, label):
    """In bfloat16 on one case: it has two more roundings, of weights and of out."""
    first = label == next(iter(VARIANTS[variant].cases))
    for dtype in ("float32", "bfloat16") if first else ("float32",):
        report = judge(variant, dtype, f"gaussian/{label}[*")
        assert report.passed, report.describe(report.failures[0])
        assert report.count("passed")


def without_the_last_branch(q, k, v, o, mean):
    q = q.copy()
    q[:, -1] = 0
    return branches._nsa(q, k, v, o, mean)


EDITS = {"nsa": without_the_last_branch}


@pytest.mark.parametrize("variant", sorted(EDITS))
def test_a_wrong_edit_fails(variant, monkeypatch):
    monkeypatch.setitem(branches.HEADS, variant, EDITS[variant])
    assert not judge(variant, "float32", f"gaussian/{list(VARIANTS[variant].cases)[-1]}[*").passed


def test_it_is_found_for_its_operators():
    assert set(EDITS) == ENTRY.variants == set(branches.HEADS)
    assert all(ENTRY in found(v) for v in EDITS)
    assert ENTRY not in found()


def test_another_operator_is_refused():
    q = np.ones((1, 1, 2, 2), np.float32)
    with pytest.raises(UnsupportedProblem, match=r"^refattn-branches: takes nsa, got softmax$"):
        branches.branches(Problem(q, q, q))
