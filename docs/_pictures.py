"""The pictures that the documentation's build draws, from the definitions."""

import functools
import re
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

import refattn
from refattn import masks
from refattn.check.inputs.families import cases
from refattn.check.kernels.example import no_rescale
from refattn.check.kernels.tiled import tiled
from refattn.exact.lowering import lower
from refattn.variants import Lowered, Selected

HERE = Path(__file__).parent
MOST_KEYS = 140
"""Of a case that is drawn."""
plt.rcParams.update({"svg.fonttype": "none", "savefig.transparent": True})


def keep(fig, name):
    fig.savefig(HERE / name)
    plt.close(fig)


def small(name):
    """Return an operator's own cases that are small enough to be drawn, or its plain one."""
    variant = refattn.VARIANTS[name]
    labels = variant.cases or ["plain"]
    shown = {c.label: c.problem("float32") for c in cases(name) if c.label in labels}
    return {n: p for n, p in shown.items() if p.n_k <= MOST_KEYS}


def seen(p):
    """Return which keys the rows of the first head see."""
    allowed = np.broadcast_to(lower(p).problem.allowed, (*p.out_shape[:3], p.n_k))[0, 0]
    return allowed & (True if p.causal is None else masks.causal(p.n_q, p.n_k, p.causal))


def show(axis, grid, colours, low, high):
    """Draw a matrix, with the first and the last index along each side: all ticks would take longer than the rest."""
    axis.imshow(grid, cmap=colours, vmin=low, vmax=high, interpolation="nearest", aspect="auto")
    axis.set_xticks([0, grid.shape[1] - 1])
    axis.set_yticks([0, grid.shape[0] - 1])
    axis.tick_params(labelsize=6)


def mask(axis, grid):
    show(axis, grid, "Blues", 0, 1.4)


def of_variant(v):
    """Draw which keys an operator's rows see in its own cases; return these, none where it is not written over keys."""
    if not isinstance(v.shape, Lowered | Selected):
        return {}
    shown = small(v.name)
    rows = -(-len(shown) // 5)
    fig, axes = plt.subplots(rows, 5, figsize=(10, 2.3 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, (label, p) in zip(axes.flat, shown.items(), strict=False):
        mask(axis, seen(p))
        axis.set_title(label, fontsize=8)
    fig.supxlabel("key", fontsize=8)
    fig.supylabel("query", fontsize=8)
    keep(fig, f"variants/{v.name}.svg")
    return shown


@functools.cache
def plain(n=24, d=8):
    """Return query and key of the pictures of weights."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 1, 1, n, d)).astype(np.float32)


PACKED = np.array([0, 5, 14, 24], dtype=np.int32)
MASKS = {
    "causal": {"causal": "bottom_right"},
    "causal, fewer queries": {"causal": "bottom_right", "n_q": 12},
    "top_left, fewer queries": {"causal": "top_left", "n_q": 12},
    "window (6, 0)": {"window": (6, 0)},
    "window (3, 3)": {"window": (3, 3)},
    "packed sequences": {"cu_seqlens_q": PACKED, "cu_seqlens_k": PACKED},
    "packed, causal": {"cu_seqlens_q": PACKED, "cu_seqlens_k": PACKED, "causal": "bottom_right"},
}
"""Masks that Problem has, by their name in the gallery."""


def weights(p):
    """Return what each key's value counts for in each row of the first head: out for values that tell keys apart."""
    value = np.broadcast_to(np.eye(p.n_k, dtype=np.float32), (*p.key.shape[:2], p.n_k, p.n_k))
    return refattn.evaluate(p.replace(value=value), rounding="float32").out[0, 0]


def of_masks():
    """Draw the masks of softmax attention; return their names and files."""
    query, key = plain()
    for i, more in enumerate(MASKS.values()):
        rows = query[:, :, : more.get("n_q", 24)]
        p = refattn.Problem(rows, key, key, **{n: x for n, x in more.items() if n != "n_q"})
        fig, axis = plt.subplots(figsize=(2, 2), layout="constrained")
        mask(axis, weights(p) > 0)
        keep(fig, f"variants/mask-{i}.svg")
    return {name: f"mask-{i}.svg" for i, name in enumerate(MASKS)}


def of_weights(v):
    """Draw the weights that an operator gives to keys in a small case of its own, over the largest of each row."""
    p = min(small(v.name).values(), key=lambda p: abs(p.n_k - 32))
    found = weights(p)
    found = found / np.maximum(np.abs(found).max(1, keepdims=True), np.finfo(np.float32).tiny)
    fig, axis = plt.subplots(figsize=(2, 2), layout="constrained")
    show(axis, found, "RdBu", -1, 1)
    keep(fig, f"variants/weights-{v.name}.svg")


def of_fields():
    """Draw the call of each snippet of fields.md, whose values tell keys apart: out over its largest number."""
    space = {}
    for section in (HERE / "fields.md").read_text().split("\n## "):
        exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], space)
        if "p" not in space:  # what they all begin with
            continue
        found = refattn.evaluate(space["p"], rounding="float32").out[0, 0].astype(np.float64)
        fig, axis = plt.subplots(figsize=(2, 2), layout="constrained")
        show(axis, found / np.abs(found).max(), "RdBu", -1, 1)
        keep(fig, f"variants/field-{section.split(',')[0].split()[0]}.svg")


def of_terms():
    """Draw the terms that a snippet of rules.md makes, for 8 queries and keys: white is 0, red below it."""
    space = {"np": np}
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "rules.md").read_text(), re.DOTALL)
    (code,) = (x for x in snippets if "drawn =" in x)
    exec("from refattn import rules\nfrom refattn.rules import terms\n" + code, space)
    fig, axes = plt.subplots(1, len(space["drawn"]), figsize=(10, 2), layout="constrained")
    for axis, (label, term) in zip(axes, space["drawn"].items(), strict=True):
        grid = term.dense(8, 8)
        show(axis, grid / np.abs(grid).max(), "RdBu", -1, 1)
        axis.set_title(label, fontsize=8)
    keep(fig, "variants/terms.svg")


def of_training():
    """Draw the curves that the snippets of gates.md find, by step of training: of a gate, and of SSA."""
    space = {}
    for code in re.findall(r"```python\n(.*?)```", (HERE / "functions" / "gates.md").read_text(), re.DOTALL):
        exec(code, space)
    drawn = {"gate_curves": ("the gate's loss", "gate-training"), "curves": ("loss of alignment", "gates")}
    for curves, (label, file) in drawn.items():
        fig, axis = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
        for name, found in space[curves].items():
            axis.semilogy(found, label=name)
        axis.set(xlabel="step", ylabel=label)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
        keep(fig, f"functions/{file}.svg")


def landing():
    """Draw each row's largest error over the allowed one, of a right kernel and of one that does not rescale."""
    rng = np.random.default_rng(3)
    p = refattn.Problem(*rng.standard_normal((3, 1, 1, 256, 64)).astype(np.float32))
    exact, allowed = refattn.evaluate(p, bits=64).out, refattn.allowed_error(p)["out"]
    fig, axis = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
    for label, out, mark in (("does not rescale", no_rescale(p), "C3."), ("ours", tiled(p)[0], "C0.")):
        ratio = np.abs(out.astype(np.float64) - exact) / allowed
        axis.semilogy(ratio.max(3)[0, 0], mark, label=label)
    axis.axhline(1, color="C7", linewidth=1, label="allowed")
    axis.set(xlabel="row", ylabel="error / allowed")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    keep(fig, "landing.svg")
