"""A right kernel is right on every call of moderate size: the judge raises no false alarm, forward or backward."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refattn import check_problem
from refattn.check.inputs.values import VALUES
from refattn.check.kernels.tiled import tiled
from refattn.check.model import FEATURES, FURTHER, flash
from refattn.drawn_options import PAGED
from refattn.gates import GATES
from refattn.strategies import problems

from ..conftest import tensor

FAMILIES = [f for f in VALUES if f not in ("extreme", "poison")]  # there dout·v leaves the type, or NaN has no gradient

KEPT = (FEATURES | FURTHER) - {"out_dtype", "types_differ", "state", *GATES, *PAGED}
"""All options but types of their own, which ask for a model of their own (the family `types` has those), and pages,
which have no gradients."""


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_false_alarm(dtype, data):
    size = {"max_rows": 67, "max_keys": 67, "max_dim": 8}
    problem = data.draw(problems(dtypes=(dtype,), features=KEPT, families=FAMILIES, **size))
    dout = tensor(np.random.default_rng(data.draw(st.integers(0, 99))), problem.out_shape, dtype)
    model = replace(flash(dtype), split=64)
    report = check_problem(tiled, problem, "any", gradients=dout, model=model)
    assert report.count("failed") == 0, [report.describe(c) for c in report.failures]
