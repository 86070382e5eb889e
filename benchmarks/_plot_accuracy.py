"""Draw what ``refattn bench accuracy_long`` found: python benchmarks/_plot_accuracy.py RESULTS.json docs/accuracy.svg

It also prints the tables of docs/accuracy.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

LENGTHS = (1024, 16384, 65536)
LINES = {
    "refattn-gpu": "C0-o",
    "refattn-gpu-high": "C0--o",
    "FlashAttention-3": "C3-D",
    "cuda-flash": "C2-^",
    "cuda-cudnn": "C1-s",
    "cuda-efficient": "C5-x",
    "cuda-triton": "C4-v",
}
PANELS = (("bfloat16", "out"), ("float16", "out"), ("bfloat16", "dq"), ("float16", "dq"))
TABLES = (
    ("bfloat16, d = 128", "", ("out", "lse", "dq")),
    ("bfloat16, d = 128", ", causal", ("out", "lse", "dq")),
    ("bfloat16, d = 64", "", ("out", "lse", "dq")),
    ("float16, d = 128", "", ("out", "lse", "dq")),
)
RMS, RIGHT = "rms error ÷ predicted", "correctly rounded"
BIAS, WORST = "mean error toward larger values ÷ predicted", "largest error ÷ allowed error"


def main(source: str, target: str) -> None:
    """Write the plot: rms error over the predicted one by length, d = 128; print a table for each call and array."""
    whole = json.loads(Path(source).read_text(encoding="utf-8"))
    values = {r["name"]: r["value"] for r in whole["rows"]}
    plt.rcParams |= {"svg.hashsalt": "refattn", "svg.fonttype": "none", "font.size": 9}
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    for axis, (form, array) in zip(axes.ravel(), PANELS, strict=True):
        for name, style in LINES.items():
            found = [values.get(f"{name}, {form}, d = 128, n = {n}, {array}: {RMS}") for n in LENGTHS]
            if None not in found:
                axis.plot(LENGTHS, found, style, label=name, markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        axis.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
        axis.set_title(f"{array}, {form}")
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("keys")
    for axis in axes[:, 0]:
        axis.set_ylabel("rms error ÷ predicted")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(f"d = 128, no mask, {whole['machine']['gpu'].split(',')[0]}")
    figure.savefig(target, metadata={"Date": None})
    for call, mask, arrays in TABLES:
        for array in arrays:
            print(f"\n{call}{mask}, {array}\n\n| kernel | n = 1,024 | 16,384 | 65,536 |\n|---|---|---|---|")
            for name in LINES:
                cells = [_cell(values, f"{name}, {call}, n = {n}{mask}, {array}: ") for n in LENGTHS]
                if any(cells):
                    print(f"| {name} | {' | '.join(cells)} |")


def _cell(values: dict[str, float], at: str) -> str:
    if at + RMS not in values:
        return ""
    return f"{values[at + RMS]:.2f} / {values[at + BIAS]:+.2f} / {values[at + WORST]:.3f} / {values[at + RIGHT]:.2f}"


if __name__ == "__main__":
    main(*sys.argv[1:])
