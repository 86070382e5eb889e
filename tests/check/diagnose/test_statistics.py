"""What the errors of an array say as a whole: too large, or leaning one way."""

import numpy as np
import pytest

from refattn import Capabilities, Problem, check_kernel, check_problem
from refattn.arrays import from_float64, to_float64
from refattn.check.kernels.tiled import tiled
from refattn.check.model import GRADIENTS
from refattn.dtypes import FORMATS

ONLY = "gaussian/*"


def inside(p):
    """Return out before it is rounded to the call's type."""
    wide = {n: to_float64(x).astype(np.float32) for n, x in p.arrays().items() if x.dtype.name == p.dtype}
    out, lse = tiled(p.replace(**wide))
    return out.astype(np.float64), lse


def rounded(change):
    def kernel(p):
        form = FORMATS[p.dtype]
        out, lse = inside(p)
        with np.errstate(all="ignore"):
            return from_float64(form.round_array(change(out, form)), p.dtype), lse

    return kernel


def toward_zero(x, form):
    step = form.ulp_array(np.where(np.isfinite(x), x, 1.0))
    return np.where(np.isfinite(x), np.trunc(x / step) * step, x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda x, form: x * (1 + 0.5 * form.unit_roundoff), "larger"),
        (lambda x, form: x * (1 - 0.25 * form.unit_roundoff), "smaller"),
        (toward_zero, "smaller"),
    ],
)
def test_errors_that_lean_fail_although_every_element_is_within_its_bound(change, where, dtype):
    able = Capabilities({dtype}, lse=True)
    report = check_kernel(rounded(change), capabilities=able, dtypes=[dtype], only=ONLY)
    said = [c.message for c in report.failures]
    assert any(f"errors lean to {where} values: their mean is" in m for m in said)
    assert all(c.worst.failures == 0 for c in report.failures)
    assert check_kernel(rounded(lambda x, form: x), capabilities=able, dtypes=[dtype], only=ONLY).passed


def test_gradients_that_lean_fail():
    def kernel(p):
        return tiled(p)

    def larger(p, dout):
        found = tiled.gradients(p, dout)
        dv, form = to_float64(found["dv"]), FORMATS["bfloat16"]
        found["dv"] = from_float64(form.round_array(dv * (1 + 1.5 * form.unit_roundoff)), "bfloat16")
        return found

    kernel.gradients = larger
    able = Capabilities({"bfloat16"}, lse=True, gradients=GRADIENTS)
    report = check_kernel(kernel, capabilities=able, dtypes=["bfloat16"], only="gaussian/*/gradients*")
    assert any("dv: errors " in c.message for c in report.failures)
    kernel.gradients = tiled.gradients
    assert check_kernel(kernel, capabilities=able, dtypes=["bfloat16"], only="gaussian/*/gradients*").passed


def test_results_that_lie_beside_each_other_are_one_rounding():
    """Rows that are nearly alike round alike: their errors may go one way in a right kernel."""
    able = Capabilities({"bfloat16"}, lse=True)
    for name in ("drift/similar-rows", "drift/all-positive", "sparse/scale-zero"):
        kernel = rounded(lambda x, form: x)
        assert check_kernel(kernel, capabilities=able, dtypes=["bfloat16"], only=name).passed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("n_q", "n_k"), [(0, 1), (0, 40), (1, 0), (0, 0)])
def test_arrays_without_rows_or_keys_have_nothing_that_leans(n_q, n_k, dtype):
    q, k = (from_float64(np.ones((1, 1, n, 4)), dtype) for n in (n_q, n_k))
    assert check_problem(tiled, Problem(q, k, k), "empty", gradients=q).passed
