"""Draw what ``refattn bench recurrence`` found: python benchmarks/_plot_recurrence.py RESULTS.json docs/drift.svg"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

TITLES = {"linear": "linear attention with a decay", "delta": "the delta rule with gates"}
LINES = {"float32": "C0o-", "bfloat16": "C1s-", "float16": "C2^-"}


def main(source: str, target: str) -> None:
    """Write the plot: the state's error after 10**5 tokens by decay, and what it may be at most."""
    whole = json.loads(Path(source).read_text(encoding="utf-8"))
    plt.rcParams |= {"svg.hashsalt": "refattn", "svg.fonttype": "none", "font.size": 9}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for axis, (rule, title) in zip(axes, TITLES.items(), strict=True):
        names: list[str] = []
        for kind, style in LINES.items():
            found = [r for r in whole["rows"] if re.fullmatch(rf"{rule}, {kind}, decay .*", r["name"])]
            names = [r["name"].rpartition(" ")[2] for r in found]
            axis.semilogy(range(len(found)), [r["value"] for r in found], style, label=kind)
            axis.semilogy(range(len(found)), [r["at_most"] for r in found], f"{style[:2]}:", lw=0.8, alpha=0.6)
        axis.set_xticks(range(len(names)), names)
        axis.set(xlabel="decay of a step", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error / (u · largest element)")
    axes[0].legend(fontsize=7)
    figure.suptitle("The state after 100,000 tokens; dotted: what it may be off by")
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
