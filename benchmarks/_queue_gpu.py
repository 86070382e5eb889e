"""What Python's queueing adds to measured times: python -m benchmarks._queue_gpu RESULTS.json (needs a GPU).

Times of calls that miss what they are held to, each by CUDA events as they are and with the GPU asleep until the calls
are queued (``gpu_medians(..., ahead=True)``): in fresh processes, with tensors at other addresses, and beside as many
busy processes as the machine has cores. The clock and the power are read before and after.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from typing import Any

from refattn.bench import gpu_medians, gpu_torch, load
from refattn.check.report.machine import machine, versions
from refattn.files import write_text

BACKWARD = ((64, 2048, True), (256, 2048, True), (128, 16384, True))
FORWARD = ((64, 1024, True), (128, 512, False), (256, 512, True))
AGAIN = BACKWARD[:1]
"""Calls that are measured at other addresses, too."""
STATES = (("idle", 0), ("cores busy", os.cpu_count() or 1), ("idle, another process", 0))
TOKENS, WIDTH = 16384, 2048


def card() -> str:
    """Return the clock of the multiprocessors, the power and the temperature."""
    asked = "--query-gpu=clocks.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", asked, "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def queueing(torch: Any, call: Any) -> float:
    """Return the milliseconds that Python takes to queue a call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return 100 * spent


def measured(torch: Any, calls: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return milliseconds of each call: as they are, with all queued ahead, and of Python."""
    plain, ahead = (gpu_medians(torch, calls, runs=7, ahead=x) for x in (False, True))
    return {n: {"ms": plain[n], "ahead, ms": ahead[n], "Python, ms": queueing(torch, calls[n])} for n in calls}


def child() -> dict[str, Any]:
    """Return the figures of one process."""
    torch = gpu_torch()
    torch.manual_seed(0)
    found: dict[str, Any] = {"before": card(), "calls": {}}
    backward, forward = load("gpu_backward"), load("gpu")
    kept = []
    for again in range(3):
        for d, n, causal in BACKWARD if not again else AGAIN:
            shape = TOKENS // n, WIDTH // d, n, d
            given = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
            name = f"backward d={d} n={n}{' causal' if causal else ''}{f', at other addresses {again}' * bool(again)}"
            calls = backward.contestants(torch, given, causal, backward.PEERS)
            found["calls"][name] = measured(torch, calls)
            del calls, given
        torch.cuda.empty_cache()
        kept.append(torch.empty((37 + again) << 21, device="cuda", dtype=torch.uint8))
    for d, n, causal in FORWARD:
        q, k, v = forward.random(torch, (TOKENS // n, WIDTH // d, n, d), "bfloat16")
        calls = forward.contestants(torch, q, k, v, causal)
        name = f"forward d={d} n={n}{' causal' if causal else ''}"
        found["calls"][name] = measured(torch, {x: calls[x] for x in ("fast", "flash", "cuDNN")})
    return found | {"after": card()}


def main(target: str) -> None:
    """Measure in each state, and write after each what there is."""
    if target == "-":
        print(json.dumps(child()))
        return
    whole: dict[str, Any] = {"machine": machine(), "versions": versions(), "states": {}}
    for name, busy in STATES:
        start = partial(subprocess.Popen, [sys.executable, "-c", "while True: pass"])
        others = [start() for _ in range(busy)]
        try:
            command = [sys.executable, "-m", "benchmarks._queue_gpu", "-"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        finally:
            for x in others:
                x.kill()
                x.wait()
        whole["states"][name] = json.loads(done.stdout.splitlines()[-1])
        write_text(target, json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
