"""Every kernel compiles for sm_90a without spills; it runs where there is a GPU (refattn check refattn-gpu)."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from refattn.gpu.plan import ACCURACIES, WIDTHS, plan
from refattn.gpu.sm90 import shared_bytes, source

CALLS = [
    (d, dtype, c, a)
    for d in WIDTHS
    for dtype in ("float16", "bfloat16")
    for c in (None, "bottom_right")
    for a in ACCURACIES
]
MOST = 232448  # bytes of shared memory that a block of sm_90 may have


def macros(d, dtype, causal, accuracy):
    shape = (1, 1, 128, d)
    return plan((shape, shape, shape), dtype, causal=causal, accuracy=accuracy).macros


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_every_kernel_compiles_without_spills(tmp_path):
    def build(item):
        i, call = item
        path = tmp_path / f"{i}.cu"
        path.write_text(source(macros(*call)))
        target = ("-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas", "-v")
        command = ["nvcc", "-std=c++17", *target, "-o", f"{path}bin", str(path)]
        return call, subprocess.run(command, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(2) as pool:
        for call, done in pool.map(build, enumerate(CALLS)):
            assert done.returncode == 0, (call, done.stderr)
            assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr, call
            # products that wait for each other, or a register budget that is not respected
            assert not re.search(r"C75\d\d|warning", done.stderr), (call, done.stderr)


@pytest.mark.parametrize("call", CALLS)
def test_shared_memory_suffices(call):
    assert shared_bytes(macros(*call)) <= MOST
