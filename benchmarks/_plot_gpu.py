"""Draw what ``refattn bench gpu`` found: python benchmarks/_plot_gpu.py RESULTS.json docs/gpu.svg"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LINES = {
    "fast": ("refattn, fast", "C0-o"),
    "high": ("refattn, high", "C0--o"),
    "cuDNN": ("cuDNN", "C1-s"),
    "flash": ("PyTorch flash", "C2-^"),
    "triton": ("Triton", "C4-v"),
    "efficient": ("memory-efficient", "C5-x"),
}


def main(source: str, target: str) -> None:
    """Write the plot: TFLOP/s by length, a panel a head dim and mask, bfloat16."""
    whole = json.loads(Path(source).read_text(encoding="utf-8"))
    values = {r["name"]: r["value"] for r in whole["rows"]}
    ceiling = values["matrix product 8192 x 8192 x 8192, bfloat16"]
    plt.rcParams |= {"svg.hashsalt": "refattn", "svg.fonttype": "none", "font.size": 9}
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharex=True, sharey=True, layout="constrained")
    for row, mask in zip(axes, ("", " causal"), strict=True):
        for axis, d in zip(row, (64, 128, 256), strict=True):
            for name, (label, style) in LINES.items():
                speed = [values[f"bfloat16 d={d} n={n}{mask} {name}"] for n in LENGTHS]
                axis.plot(LENGTHS, speed, style, label=label, markersize=4)
            axis.axhline(ceiling, color="gray", linestyle=":", label="matrix product")
            axis.set_xscale("log", base=2)
            axis.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
            axis.set_ylim(0)
            axis.set_title(f"d = {d}{', causal' if mask else ''}")
            axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s")
    for axis in axes[1]:
        axis.set_xlabel("n")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(f"Forward, bfloat16, 16384 tokens, h·d = 2048, {whole['machine']['gpu'].split(',')[0]}")
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
