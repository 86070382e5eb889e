"""The pairwise forms on a GPU; not run without one."""

import numpy as np
import pytest

from refattn import UnsupportedProblem, tensor
from refattn.check.kernels import KERNELS
from refattn.tensor import device

from .test_tensor import MASKS, arrays

GPU = pytest.mark.skipif(not KERNELS["refattn-gpu"].here, reason="needs an NVIDIA GPU and CuPy")


@GPU
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", ["tree", "rank_one"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_pairwise_forms_are_the_definition(form, mask, dtype):
    torch = pytest.importorskip("torch")
    given = [
        torch.tensor(x, device="cuda").to(getattr(torch, dtype))
        for x in arrays(2, 4, 2, 70, 90, 130, 64, 64, "float32")
    ]
    options = {"form": form, **MASKS[mask]}
    out, lse = device.attention(*given, **options, accuracy="high")
    wide = [x.double().cpu().numpy() for x in given]
    expected, terms = tensor.attention(*wide, **options, return_lse=True)
    # roundings of v1 times the inner result, of the result, and of products of two results
    unit = 2.0**-8 if dtype == "bfloat16" else 2.0**-20
    assert np.abs(out.double().cpu().numpy() - expected).max() <= 6 * unit * np.abs(expected).max()
    empty = np.isneginf(terms)
    found = lse.double().cpu().numpy()
    assert np.array_equal(np.isneginf(found), empty)
    assert np.abs(np.where(empty, 0, found) - np.where(empty, 0, terms)).max() < 1e-3


def test_forms_without_a_kernel_are_named():
    with pytest.raises(
        UnsupportedProblem, match="the form 'trilinear' is not there on a GPU; 'tree' and 'rank_one' are"
    ):
        device.attention(*arrays(), form="trilinear")
