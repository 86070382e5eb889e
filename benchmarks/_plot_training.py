"""Draw what ``refattn bench gpu_training`` found: python benchmarks/_plot_training.py RESULTS.json docs/training.svg"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

LINES = {"refattn": "C0-", "flash": "C2--", "cuDNN": "C1:", "flash, nudged": "0.5"}


def main(source: str, target: str) -> None:
    """Write the plot: losses by step, and how far each is from flash's."""
    whole = json.loads(Path(source).read_text(encoding="utf-8"))
    losses: dict[str, dict[int, float]] = {n: {} for n in LINES}
    for row in whole["rows"]:
        if found := re.fullmatch(r"step (\d+): (.+)", row["name"]):
            losses[found[2]][int(found[1])] = row["value"]
    plt.rcParams |= {"svg.hashsalt": "refattn", "svg.fonttype": "none", "font.size": 9}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, style in LINES.items():
        steps = list(losses[name])
        left.plot(steps, list(losses[name].values()), style, label=name)
        if name != "flash":
            far = [abs(losses[name][i] - losses["flash"][i]) for i in steps]
            right.semilogy(steps, [max(x, 1e-9) for x in far], style, label=name)
    left.set_ylabel("loss, nats")
    right.set_ylabel("distance to flash, nats")
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(f"Two layers, bfloat16, torch.compile, {whole['machine']['gpu'].split(',')[0]}")
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
