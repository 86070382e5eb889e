"""Edits of the backward kernels' CUDA text that the judge must call wrong, on a GPU; without one, that they fit."""

import numpy as np
import pytest

from refattn import Problem, check_problem
from refattn.check.kernels import KERNELS
from refattn.gpu import backward_launch, build, launch

from ..conftest import tensor

gpu = pytest.mark.skipif(not KERNELS["refattn-gpu"].here, reason="needs an NVIDIA GPU and CuPy")
EDITS = {
    # name: (file, old text, new text, kernel, entry)
    "simt: D not subtracted": (
        "simt_backward.cu", "weight * (x.ds[i][j] - delta) * (raw", "weight * x.ds[i][j] * (raw", "simt", "backward",
    ),
    "simt: no scale in dq": (
        "simt_backward.cu", "p.n_q, p.d_k, dq, (Acc)p.scale);", "p.n_q, p.d_k, dq, (Acc)1);", "simt", "backward",
    ),
    "simt: a row's last key is not seen": (
        "simt_backward.cu", "key >= keys.x && key <= keys.y;", "key >= keys.x && key < keys.y;", "simt", "backward",
    ),
    "mma: D not subtracted": (
        "mma_backward.cu", "grad = weight * (g - d);", "grad = weight * g;", "mma", "backward",
    ),
    "mma: no scale in dq": (
        "mma_backward.cu", "dx, (float)p.scale, smem_x);", "dx, QUERY ? 1.f : (float)p.scale, smem_x);", "mma",
        "backward",
    ),
    "mma: causal is off by one in dk": (
        "mma_backward.cu", "on = j >= seen.x && j <= seen.y;", "on = j >= seen.x && j <= seen.y - !QUERY;", "mma",
        "backward",
    ),
    "a sink's weight without lse": (
        "backward.cu", "-exponential(sink - lse), delta", "-exponential(sink), delta", "mma", "sinks",
    ),
    "no gradient of a sink": (
        "backward.cu", "put((SINK*)p.dsink + head, sums[0])", "put((SINK*)p.dsink + head, (Acc)0)", "simt", "sinks",
    ),
}  # fmt: skip


def judged(kernel):
    """Return whether a kernel's gradients of one call pass: causal, with a sink, more keys than rows."""
    e, rng = KERNELS[f"refattn-gpu-{kernel}"], np.random.default_rng(0)
    q, k, v, dout = (
        tensor(rng, s, "bfloat16") for s in ((1, 4, 70, 64), (1, 2, 90, 64), (1, 2, 90, 64), (1, 4, 70, 64))
    )
    p = Problem(q, k, v, causal="bottom_right", sink=np.linspace(-1, 1, 4, dtype=np.float32))
    return check_problem(e.kernel(), p, "planted", model=e.model, gradients=dout).passed


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_fits_once(name):
    file, old, new, _, entry = EDITS[name]
    text = (build.HERE / file).read_text()
    assert text.count(old) == 1
    assert new not in text
    assert f" {entry}(const __grid_constant__" in text


@pytest.fixture
def fresh():
    """Kernels are compiled anew, and what was compiled of an edit is not kept."""
    launch.kernel_of.cache_clear()
    yield
    launch.kernel_of.cache_clear()


@gpu
@pytest.mark.parametrize("name", EDITS)
def test_a_planted_bug_is_found(name, monkeypatch, fresh):
    _, old, new, kernel, entry = EDITS[name]
    assert judged(kernel)
    edited = []

    def compiled(text, wanted, *rest):
        if wanted == entry and old in text:
            edited.append(wanted)
            text = text.replace(old, new)
        return build.compiled(text, wanted, *rest)

    launch.kernel_of.cache_clear()
    for module in (launch, backward_launch):
        monkeypatch.setattr(module, "compiled", compiled)
    assert not judged(kernel)
    assert edited
