"""Profile the Hopper kernel by Nsight Compute: python benchmarks/_profile_gpu.py RESULTS.json (needs ncu and a GPU)."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

from refattn.check.report.report import machine, versions

METRICS = {
    "gpu__time_duration.sum": "time",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor cores busy",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "special functions busy",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "instructions issued",
    "dram__bytes_read.sum": "read from device memory",
    "dram__bytes_write.sum": "written to device memory",
    "sm__cycles_elapsed.avg.per_second": "clock",
}
CALLS = ((64, 4096, False), (128, 4096, False), (128, 4096, True), (256, 4096, False))
RUN = """
import torch
from refattn.gpu import attention
q, k, v = (torch.randn({b}, {h}, {n}, {d}, device="cuda", dtype=torch.bfloat16) for _ in range(3))
for _ in range(2):
    attention(q, k, v, causal={causal!r}, impl="sm90")
torch.cuda.synchronize()
"""


def profiled(d: int, n: int, causal: bool) -> dict[str, str]:
    """Return the metrics of one launch with their units."""
    text = RUN.format(b=16384 // n, h=2048 // d, n=n, d=d, causal="bottom_right" if causal else None)
    command = ["ncu", "--csv", "--page", "raw", "--metrics", ",".join(METRICS)]
    command += ["-k", "regex:attention_forward", "--launch-skip", "1", "-c", "1", sys.executable, "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names, units, values = csv.reader(line for line in done.stdout.splitlines() if line.startswith('"'))
    found = dict(zip(names, zip(values, units, strict=True), strict=True))
    return {label: " ".join(found[name]) for name, label in METRICS.items()}


def main(target: str) -> None:
    """Profile all calls and write them."""
    calls = {f"bfloat16 d={d} n={n}{' causal' if c else ''}": profiled(d, n, c) for d, n, c in CALLS}
    whole = {"machine": machine(), "versions": versions(), "calls": calls}
    Path(target).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
