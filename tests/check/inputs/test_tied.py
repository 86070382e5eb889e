"""Scores tie exactly, in any order of summing, or differ by an ulp of one number."""

import numpy as np
import pytest

from refattn import InvalidInput
from refattn.check.inputs.families import cases
from refattn.check.inputs.tied import TIES, tied
from refattn.dtypes import FORMATS
from refattn.exact.lowering import lower
from refattn.variants import VARIANTS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_are_one_or_an_ulp_apart(dtype):
    form = FORMATS[dtype]
    for ties, most in zip(TIES, (0, 2 * form.ulp_array(np.ones(1))[0]), strict=True):
        q, k = tied(np.random.default_rng(0), form, ties, (1, 2, 3, 4), (1, 2, 9, 4))
        assert set(np.unique(q)) == {1, 2}
        assert (form.round_array(k) == k).all()
        assert (k[..., 1:] == k[:, :, :1, 1:]).all()
        apart = np.ptp(k[..., 0], axis=2)
        assert (apart <= most).all()
        assert (apart > 0).all() == (ties == "ulp")


@pytest.mark.parametrize("variant", [n for n, v in VARIANTS.items() if {"ties", "near-ties"} <= v.cases.keys()])
def test_the_choice_of_a_case_is_a_tie(variant):
    at = {c.label: c for c in cases(variant)}
    exact, near = (lower(at[n].problem("float32")).margins[..., -1] for n in ("ties", "near-ties"))
    assert (exact == 0).all()
    assert (near < 2.0**-18).all()


def test_another_kind_is_refused():
    with pytest.raises(InvalidInput, match=r"^ties: got 'near', expected one of equal, ulp$"):
        tied(np.random.default_rng(0), FORMATS["float32"], "near", (1, 1, 1, 1), (1, 1, 1, 1))
