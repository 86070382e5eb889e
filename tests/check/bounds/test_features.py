"""Turned columns in the arithmetic of losses; what else holds of them is in tests/test_positions.py."""

from dataclasses import replace

import numpy as np

from refattn import Problem, check_problem, evaluate
from refattn.check.bounds.forward import bounds
from refattn.check.kernels.tiled import tiled
from refattn.check.model import flash


def test_columns_that_are_not_turned_are_written_in_the_narrower_type_too():
    """Inputs of float32, out in bfloat16: a kernel that writes turned queries in bfloat16 writes whole rows so."""
    x = np.float32([[[[0, 0, 1 + 2**-9], [0, 0, 1 - 2**-10]]]])
    turns = {"rotary": "interleaved", "rotary_cos": np.float32([[1]] * 2), "rotary_sin": np.float32([[0]] * 2)}
    p = Problem(x, x, x, out_dtype="bfloat16", **turns)
    assert check_problem("refattn-tiled", p, "partial", model=flash).passed
    exact, (_, lse) = evaluate(p), tiled(p)
    lost = np.abs(lse - exact.lse)
    narrow, wide = (bounds(exact, replace(flash("bfloat16"), rotated=n))["lse"] for n in ("bfloat16", "float32"))
    assert (lost > wide).any()
    assert (lost <= narrow).all()
    fits = p.replace(query=np.float32([[[[0, 0, 1], [0, 0, 0.5]]]]), key=np.float32([[[[0, 0, 1], [0, 0, 2]]]]))
    same = [bounds(evaluate(fits), replace(flash("bfloat16"), rotated=n))["lse"] for n in ("bfloat16", "float32")]
    assert np.array_equal(*same)  # these columns are bfloat16 numbers: writing them loses nothing
