"""The kernel of operators with weights of their own computes what the operators' definitions say."""

import inspect
import types

import numpy as np
import pytest

from refattn import Problem, UnsupportedProblem, check_kernel
from refattn.check.inputs.families import cases
from refattn.check.kernels import KERNELS, found, weighed
from refattn.variants import VARIANTS

from ...conftest import NIGHTLY

ENTRY = KERNELS["refattn-weighed"]


def judge(variant, dtype, only):
    return check_kernel(ENTRY.kernel().call, variant, capabilities=ENTRY.capabilities, dtypes=[dtype], only=only)


def asked(variant, dtype):
    """Return which checks: nightly all of normal numbers, else one call and the operator's own, in bfloat16 one of
    them: it has two more roundings, of weights and of out."""
    own = [f"gaussian/{n}" for n in VARIANTS[variant].cases]
    if dtype == "bfloat16" and not NIGHTLY:
        return [cases(variant)[0].name, own[0]]
    edges = [f"{f}/*" for f in ("empty", "poison") if f in VARIANTS[variant].families]
    return [*(["gaussian/*"] if NIGHTLY else [cases(variant)[0].name, *own]), *edges]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", sorted(ENTRY.variants))
def test_it_is_right(variant, dtype):
    for only in asked(variant, dtype):
        report = judge(variant, dtype, only)
        assert report.passed, report.describe(report.failures[0])
        assert report.count("passed")


EDITS = {
    "relu": lambda s, keys, o: (np.maximum(s, 0), np.float32(len(keys) + 1), 0),
    "ecoformer": lambda s, keys, o: (s + np.float32(o["bits"]), (s + np.float32(o["bits"])).sum(), 0),
    "urpe": lambda s, keys, o: (np.exp(s - s.max()), np.float32(len(keys)), 0),
}


@pytest.mark.parametrize("variant", sorted(EDITS))
def test_a_wrong_edit_fails(variant, monkeypatch):
    monkeypatch.setitem(weighed.WEIGHTS, variant, EDITS[variant])
    assert not judge(variant, "float32", f"gaussian/{list(VARIANTS[variant].cases)[-1]}").passed


ORDER = """            w = form.round_array(w.astype(np.float64)).astype(np.float32)
            if options.get("gain"):  # after the rounding: that of a gain alone would be the same in every row
                w = w * _gain(options["gain"][h % len(options["gain"])], ahead)
"""


def rounded_after_the_gain(factor):
    """Return the kernel with its gain before the rounding, of weights times a factor."""
    text = inspect.getsource(weighed)
    assert text.count(ORDER) == 1
    gain, rounds = "".join(ORDER.splitlines(True)[1:]), ORDER.splitlines(True)[0].replace("w.as", f"({factor} * w).as")
    module = types.ModuleType("refattn.check.kernels.other")
    module.__package__ = "refattn.check.kernels"
    exec(text.replace(ORDER, gain + rounds), module.__dict__)
    return module.weighed


@pytest.mark.parametrize(("factor", "verdict"), [(1, "passed"), (1 - 2**-9, "failed")])
def test_a_gain_that_is_rounded_is_the_same_error_in_every_row(factor, verdict):
    """The errors of a right kernel lean as the gain's rounding does, by 0.186; those of one that leans more fail."""
    kernel, only = rounded_after_the_gain(factor), "gaussian/gain-not-of-two-and-all"
    (check,) = check_kernel(
        kernel, "urpe", capabilities=ENTRY.capabilities, dtypes=["bfloat16"], only=f"{only}[bfloat16]"
    ).checks
    assert check.verdict == verdict
    assert ("errors lean to smaller values" in check.message) == (verdict == "failed")
    bias = check.arrays[0].figures.bias
    assert 0.18 < bias < 0.19 if factor == 1 else bias < 0


def test_it_is_found_for_its_operators():
    assert set(EDITS) == ENTRY.variants == set(weighed.WEIGHTS)
    assert all(ENTRY in found(v) for v in EDITS)
    assert ENTRY not in found()


def test_another_operator_is_refused():
    q = np.ones((1, 1, 2, 2), np.float32)
    with pytest.raises(UnsupportedProblem, match="refattn-weighed: takes relu, ecoformer, urpe, got softmax"):
        weighed.weighed(Problem(q, q, q))
