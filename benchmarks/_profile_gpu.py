"""Profile the Hopper kernels by Nsight Compute: python benchmarks/_profile_gpu.py RESULTS.json (needs ncu, a GPU)."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from refattn.check.report.machine import machine, versions

METRICS = {
    "gpu__time_duration.sum": "time",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor cores busy",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "special functions busy",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "instructions issued",
    "dram__bytes_read.sum": "read from device memory",
    "dram__bytes_write.sum": "written to device memory",
    "sm__cycles_elapsed.avg.per_second": "clock",
}
SETUP = """
import torch
from refattn.gpu import attention, attention_backward, attention_with_cache
def new(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
{made}
for _ in range(2):
    {call}
torch.cuda.synchronize()
"""
BACKWARD = "; out, lse = attention(q, k, v, return_lse=True); dout = new(*q.shape)"
NARROW = "; k, v = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn); n = torch.full((8,), 65536, device='cuda')"


def square(d: int, n: int) -> str:
    """Return the making of 16384 tokens of 2048 features."""
    return f"q, k, v = (new({16384 // n}, {2048 // d}, {n}, {d}) for _ in range(3))"


CACHE = "q = new(8, 32, 1, 128); k, v = (new(8, 8, 65536, 128) for _ in range(2))"
CALLS = {
    "d=64 n=4096": ("attention_forward", square(64, 4096), "attention(q, k, v)"),
    "d=128 n=4096": ("attention_forward", square(128, 4096), "attention(q, k, v)"),
    "d=128 n=4096 causal": ("attention_forward", square(128, 4096), "attention(q, k, v, causal='bottom_right')"),
    "d=256 n=4096": ("attention_forward", square(256, 4096), "attention(q, k, v)"),
    "d=128 n=8192 causal softcap": (
        "attention_forward",
        square(128, 8192),
        "attention(q, k, v, causal='bottom_right', softcap=30.0)",
    ),
    "d=128 n=8192 window 1024": (
        "attention_forward",
        square(128, 8192),
        "attention(q, k, v, causal='bottom_right', window=(1024, 0))",
    ),
    "d=64 n=512 causal": ("attention_forward", square(64, 512), "attention(q, k, v, causal='bottom_right')"),
    "backward d=64 n=2048": (
        "backward",
        square(64, 2048) + BACKWARD,
        "attention_backward(q, k, v, out, lse, dout, deterministic=False)",
    ),
    "backward d=128 n=4096": (
        "backward",
        square(128, 4096) + BACKWARD,
        "attention_backward(q, k, v, out, lse, dout, deterministic=False)",
    ),
    "decode 8 x 65536": ("decode", CACHE, "attention(q, k, v)"),
    "decode 8 x 65536 float8": ("decode_cache", CACHE + NARROW, "attention_with_cache(q, k, v, lengths=n)"),
}
"""The kernel that is profiled, what is made, and the call."""


def profiled(kernel: str, made: str, call: str) -> dict[str, str]:
    """Return the metrics of the second launch of a kernel, with their units."""
    command = ["ncu", "--csv", "--page", "raw", "--metrics", ",".join(METRICS), "-k", f"regex:^{kernel}$"]
    command += ["--launch-skip", "1", "-c", "1", sys.executable, "-c", SETUP.format(made=made, call=call)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names, units, values = csv.reader(line for line in done.stdout.splitlines() if line.startswith('"'))
    found = dict(zip(names, zip(values, units, strict=True), strict=True))
    return {label: " ".join(found[name]) for name, label in METRICS.items()}


def main(target: str) -> None:
    """Profile all calls, and write after each what there is."""
    whole: dict[str, Any] = {"machine": machine(), "versions": versions(), "calls": {}}
    for name, call in CALLS.items():
        whole["calls"][f"bfloat16 {name}"] = profiled(*call)
        Path(target).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
