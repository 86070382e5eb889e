"""The kernel of pooled, sampled and gated softmax computes what the operators' definitions say."""

import numpy as np
import pytest

from refattn import Problem, UnsupportedProblem, check_kernel
from refattn.check.kernels import KERNELS, found, pooled
from refattn.variants import VARIANTS

ENTRY = KERNELS["refattn-pooled"]


def judge(kernel, variant, dtype, only):
    return check_kernel(kernel, variant, capabilities=ENTRY.capabilities, dtypes=[dtype], only=only)


@pytest.mark.parametrize("variant", sorted(ENTRY.variants))
def test_it_is_right(variant):
    """In bfloat16 one call: it has two more roundings, of weights and of out."""
    own = list(VARIANTS[variant].cases)
    asked = [("float32", f"gaussian/{n}[*") for n in own] + [("bfloat16", f"gaussian/{own[1]}[*")]
    asked += [("float32", f"{f}/*") for f in ("empty", "poison") if f in VARIANTS[variant].families]
    for dtype, only in asked:
        report = judge(ENTRY.kernel().call, variant, dtype, only)
        assert report.passed, report.describe(report.failures[0])
        assert report.count("passed")


def test_what_common_draws_round_alike_is_no_lean():
    """Keys that all rows drew are weighed with the same numbers, whose roundings are the same in every row."""
    report = judge(ENTRY.kernel().call, "hyper", "bfloat16", "gaussian/drawn-and-all*")
    assert report.passed, report.describe(report.failures[0])
    assert report.count("passed")


EDITS = {
    "codebook": lambda s, often, v, gate: (s, np.sqrt(often), v, gate),
    "spark": lambda s, often, v, gate: (s, often, v, np.maximum(gate, np.float32(0.5))),
    "hyper": lambda s, often, v, gate: (s, np.minimum(often, 2), v, gate),
}


@pytest.mark.parametrize("variant", sorted(EDITS))
def test_a_wrong_edit_fails(variant, monkeypatch):
    right, change = pooled.ROWS[variant], EDITS[variant]
    monkeypatch.setitem(pooled.ROWS, variant, lambda *given: change(*right(*given)))
    assert not judge(pooled.pooled, variant, "float32", f"gaussian/{list(VARIANTS[variant].cases)[1]}[*").passed


def test_it_is_found_for_its_operators():
    assert set(EDITS) == ENTRY.variants == set(pooled.ROWS)
    assert all(ENTRY in found(v) for v in EDITS)
    assert ENTRY not in found()


def test_another_operator_is_refused():
    q = np.ones((1, 1, 2, 2), np.float32)
    with pytest.raises(UnsupportedProblem, match="refattn-pooled: takes codebook, spark, hyper, got softmax"):
        pooled.pooled(Problem(q, q, q))
