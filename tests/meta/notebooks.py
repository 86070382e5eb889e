"""Execute notebooks and keep what they print and draw: ``python -m tests.meta.notebooks [NAME ...]``, or all.

With ``--play`` they run as plain Python, each in a fork of a process that has imported what they need, and nothing is
kept: that takes half the time of a kernel of Jupyter for each.
"""

import ast
import hashlib
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def digest(notebook):
    """Return what changes where a cell's text does."""
    text = json.dumps([[cell.cell_type, cell.source] for cell in notebook.cells])
    return hashlib.sha256(text.encode()).hexdigest()


def without_slow(notebook):
    """Leave out the cells tagged "slow"."""
    notebook.cells = [c for c in notebook.cells if "slow" not in c.metadata.get("tags", ())]


def run_cell(source, name, space):
    """Run a cell; a value that it ends with is written as Jupyter does."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), space)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), name, "eval"), space)
        repr(value)
        if hasattr(value, "_repr_html_"):
            value._repr_html_()


def play(path, slow=True):
    """Run a notebook's cells here, and draw its figures."""
    import matplotlib.pyplot as plt

    def draw(*_, **__):
        for n in plt.get_fignums():
            plt.figure(n).canvas.draw()
        plt.close("all")

    plt.show = draw
    notebook, space = nbformat.read(path, 4), {"__name__": "__main__"}
    if not slow:
        without_slow(notebook)
    os.chdir(path.parent)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            run_cell(cell.source, path.name, space)
            draw()


def play_all(paths, slow):
    """Run notebooks as plain Python, each in a fork: what one takes of memory is given back. Return which fail."""
    for package in ("matplotlib.pyplot", "sklearn.datasets", "torch", "refattn.he.torch", "refattn.functions.mixtures"):
        importlib.import_module(package)
    failed = []
    for path in paths:
        child = os.fork()
        if child == 0:
            try:
                play(path, slow)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            failed.append(path.stem)
    return failed


def execute(path, slow=True):
    """Return the notebook with its outputs; whatever its cells raise is raised. Without the cells tagged "slow" where
    those are not asked for."""
    notebook = nbformat.read(path, 4)
    if not slow:
        without_slow(notebook)
    NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": path.parent}}).execute()
    notebook.metadata["executed"] = digest(notebook)
    return notebook


def complaints(notebook):
    """Return what the cells wrote to stderr, where warnings go."""
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    return [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]


def unshown(notebook):
    """Return why the outputs in a notebook are not those of its cells, or None."""
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    if counts != list(range(1, len(counts) + 1)):
        return "not executed from the first cell to the last"
    return None if notebook.metadata.get("executed") == digest(notebook) else "cells changed after it was executed"


def main(names):
    """Write the outputs of these notebooks, or of all; --play only runs them, --play-fast all but slow cells."""
    if names and names[0].startswith("--play"):
        found = [p for p in NOTEBOOKS if len(names) == 1 or p.stem in names]
        raise SystemExit(", ".join(play_all(found, names[0] == "--play")) or 0)
    for path in NOTEBOOKS:
        if not names or path.stem in names:
            notebook = execute(path)
            if found := complaints(notebook):
                raise SystemExit(f"{path.stem}: {found[0]}")
            nbformat.write(notebook, path)
            print(path.stem, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
