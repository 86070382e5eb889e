"""Profile the Hopper kernels by Nsight Compute: python -m benchmarks._profile_gpu RESULTS.json (needs ncu, a GPU).

One process makes all calls; of each the kernels that it is about are profiled. The clocks are left as they are. With a
second argument, "latent", calls of latent attention alone.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refattn.bench import gpu_torch
from refattn.check.report.machine import machine, versions

METRICS = {
    "gpu__time_duration.sum": "time, ns",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor cores busy, %",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "special functions busy, %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "instructions issued, %",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "device memory's rate, %",
    "dram__bytes_read.sum": "read from device memory, bytes",
    "dram__bytes_write.sum": "written to device memory, bytes",
    "sm__cycles_elapsed.avg.per_second": "clock, Hz",
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_([a-z_]+?)_per_issue_active\.ratio")
"""What a warp waits for: in warps, on average, for each instruction that is issued."""
REPAIR = re.compile(r"\((?!384,)\d+,.*")
"""The blocks of simt_backward.cu, whose kernel has the name of Hopper's."""


def square(torch: Any, d: int, n: int, d_v: int | None = None, heads: int | None = None) -> list[Any]:
    """Return query, key, value and dout of 16384 tokens, of 2048 features or so many heads."""
    shape = 16384 // n, heads or 2048 // d, n
    return [torch.randn(*shape, x, device="cuda", dtype=torch.bfloat16) for x in (d, d, d_v or d, d_v or d)]


def forward(torch: Any, d: int, n: int, *, d_v: int | None = None, heads: int | None = None, **options: Any) -> Any:
    """Return a forward call."""
    from refattn.gpu import attention

    q, k, v, _ = square(torch, d, n, d_v, heads)
    return lambda: attention(q, k, v, **options)


def backward(torch: Any, d: int, n: int, causal: bool, deterministic: bool) -> Any:
    """Return a backward call."""
    from refattn.gpu import attention, attention_backward

    *given, dout = square(torch, d, n)
    more = {"causal": "bottom_right" if causal else None}
    out, lse = attention(*given, return_lse=True, **more)
    return lambda: attention_backward(*given, out, lse, dout, deterministic=deterministic, **more)


def decode(torch: Any, b: int, n: int, *, narrow: bool = False) -> Any:
    """Return a call of one query of 32 heads on 8 key heads."""
    from refattn.gpu import attention, attention_with_cache

    q = torch.randn(b, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(b, 8, n, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    if not narrow:
        return lambda: attention(q, k, v)
    few = [x.to(torch.float8_e4m3fn) for x in (k, v)]
    lengths = torch.full((b,), n, device="cuda")
    return lambda: attention_with_cache(q, *few, lengths=lengths)


def latent(torch: Any, n_q: int, b: int, n: int, shared: bool = True, **options: Any) -> Any:
    """Return a call of 128 heads on one latent, whose values are its first columns, or apart."""
    from refattn.gpu import attention

    q, k = (torch.randn(b, h, m, 576, device="cuda", dtype=torch.bfloat16) for h, m in ((128, n_q), (1, n)))
    v = k[..., :512] if shared else k[..., :512].clone()
    return lambda: attention(q, k, v, **options)


def latents(torch: Any) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Yield calls of latent attention, as `calls` does."""
    one = ("attention_latent",)
    yield "latent n=4096", one, latent(torch, 4096, 1, 4096)
    yield "latent n=4096 causal", one, latent(torch, 4096, 1, 4096, causal="bottom_right")
    yield "latent n=4096 apart", one, latent(torch, 4096, 1, 4096, shared=False)
    yield "latent decode 64 x 8192", one, latent(torch, 1, 64, 8192)


def calls(torch: Any, which: str) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Yield a call's name, its kernels that are profiled, and the call."""
    yield from latents(torch)
    if which == "latent":
        return
    causal, one = {"causal": "bottom_right"}, ("attention_forward",)
    for d in (64, 128, 256):
        yield f"d={d} n=4096", one, forward(torch, d, 4096)
    for d, d_v, heads in ((80, 80, 16), (96, 96, 16), (128, 128, 16), (192, 128, 10)):
        yield f"d={d}, {d_v} n=4096 causal", one, forward(torch, d, 4096, d_v=d_v, heads=heads, **causal)
    yield "d=128 n=8192 causal softcap", one, forward(torch, 128, 8192, softcap=30.0, **causal)
    yield "d=128 n=8192 causal", one, forward(torch, 128, 8192, **causal)
    yield "d=128 n=8192 window 1024", one, forward(torch, 128, 8192, window=(1023, 0), **causal)
    for d, n, options in ((64, 512, causal), (64, 1024, causal), (128, 512, {}), (256, 512, causal)):
        yield f"d={d} n={n}{' causal' * bool(options)}", one, forward(torch, d, n, **options)
    passes = ((64, 2048, False), (64, 2048, True), (128, 4096, False), (128, 16384, True), (256, 2048, True))
    for d, n, masked in (*passes, (256, 4096, False)):
        for ordered in (False, True):
            at = f"backward d={d} n={n}{' causal' * masked}, {'one' if ordered else 'any'} order"
            yield at, ("backward",), backward(torch, d, n, masked, ordered)
    for b, n in ((8, 65536), (1, 131072), (64, 8192)):
        yield f"decode {b} x {n}", ("decode", "merge"), decode(torch, b, n)
    yield "decode 8 x 65536 float8", ("decode_cache", "merge_cache"), decode(torch, 8, 65536, narrow=True)


def child(which: str) -> None:
    """Make all calls twice, and a third time for the profiler."""
    torch = gpu_torch()
    torch.manual_seed(0)
    for name, kernels, call in calls(torch, which):
        call(), call()
        torch.cuda.synchronize()
        print("call", json.dumps([name, kernels]), flush=True)
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        del call


def figures(row: dict[str, str]) -> dict[str, Any]:
    """Return a kernel's metrics, and the shares of the time that its warps wait, by what they wait for."""
    number = {n: float(row[n].replace(",", "")) for n in row if n in METRICS or STALL.fullmatch(n)}
    waits = {STALL.fullmatch(n)[1]: x for n, x in number.items() if n not in METRICS}  # type: ignore[index]
    if missing := sorted(set(METRICS) - set(number)) or ["what warps wait for"] * (not waits):
        raise RuntimeError(f"ncu: got no {', '.join(missing)}")
    whole = sum(waits.values()) or 1.0
    largest = sorted(waits, key=lambda n: -waits[n])[:6]
    return {
        **{label: number[n] for n, label in METRICS.items()},
        "waits, %": {n: 100 * waits[n] / whole for n in largest},
    }


def profiled(lines: list[str]) -> dict[str, dict[str, Any]]:
    """Return what ncu printed, by call and kernel."""
    made = [json.loads(x.split(" ", 1)[1]) for x in lines if x.startswith("call ")]
    names, _, *rows = csv.reader(x for x in lines if x.startswith('"'))
    found = [dict(zip(names, values, strict=True)) for values in rows]
    for x in found:
        x["Kernel Name"] = x["Kernel Name"].split("(")[0]
    kept = iter([x for x in found if not (x["Kernel Name"] == "backward" and REPAIR.match(x["Block Size"]))])
    answer: dict[str, dict[str, Any]] = {}
    for name, kernels in made:
        own = answer[f"bfloat16 {name}"] = {}
        for kernel in kernels:
            row = next(kept)
            if row["Kernel Name"] != kernel:
                raise RuntimeError(f"ncu: got {row['Kernel Name']}, expected {kernel} of {name}")
            own[kernel] = figures(row)
    return answer


def main(target: str, which: str = "") -> None:
    """Profile all calls, or those of latent attention."""
    if target == "-":
        child(which)
        return
    kernels = "attention_forward|attention_latent|backward|decode|merge|decode_cache|merge_cache"
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    command += ["--profile-from-start", "off", "--section", "WarpStateStats", "--metrics", ",".join(METRICS)]
    command += ["-k", f"regex:^({kernels})$", sys.executable, "-m", "benchmarks._profile_gpu", "-", which]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    Path(f"{target}.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"ncu: exit code {done.returncode}: {done.stdout[-500:]} {done.stderr[-500:]}")
    whole = {"machine": machine(), "versions": versions(), "calls": profiled(done.stdout.splitlines())}
    Path(target).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
