"""Of a large call every row is looked at."""

import numpy as np
import pytest

from refattn import Capabilities, check_kernel
from refattn.check.call import Result
from refattn.check.inputs.families import Case
from refattn.check.inputs.models import MODELS
from refattn.check.kernels.tiled import tiled
from refattn.check.suspects import suspects
from refattn.exact.arithmetics import Floats
from refattn.exact.run import run

ABLE = Capabilities({"float32", "bfloat16"}, lse=True)
LARGE = "models/llama-prefill"


def wrong_in(rows, heads=slice(None), change=lambda x: x * 0):
    def kernel(p):
        out, lse = tiled(p)
        out[:, heads, rows] = change(out[:, heads, rows])
        return out, lse

    return kernel


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("row", range(20, 240, 37))
def test_one_wrong_row_of_one_head_is_found(row, dtype):
    kernel = wrong_in(slice(row, row + 1), slice(1, 2))
    check = check_kernel(kernel, capabilities=ABLE, dtypes=[dtype], only=LARGE).checks[0]
    assert check.verdict == "failed"
    assert any(w.place[1:3] == (1, row) for w in check.arrays), check.message
    assert check_kernel(tiled, capabilities=ABLE, dtypes=[dtype], only=LARGE).passed


def test_a_row_that_is_no_number_is_found():
    kernel = wrong_in(slice(101, 102), slice(2, 3), lambda x: x * np.float32("nan"))
    assert not check_kernel(kernel, capabilities=ABLE, dtypes=["float32"], only=LARGE).passed


def test_exactly_what_float64_gives_has_no_suspects():
    call, _ = MODELS["llama-prefill"]
    p = Case("models", "llama-prefill", "softmax", call, sampled=True).problem("float32")
    plain = run(p, Floats(np.float64))
    assert suspects(p, Result(plain["out"], plain["lse"])) is None
    near = plain["out"].copy()
    near[1, 3, 7] += 1e-3
    found = suspects(p, Result(near, plain["lse"]))
    assert (found.batch, found.heads, found.groups, 7 in found.rows) == (1, (3,), (0,), True)
