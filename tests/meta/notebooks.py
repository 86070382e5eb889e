"""Execute notebooks and keep what they print and draw: ``python -m tests.meta.notebooks [NAME ...]``, or all."""

import hashlib
import json
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def digest(notebook):
    """Return what changes where a cell's text does."""
    text = json.dumps([[cell.cell_type, cell.source] for cell in notebook.cells])
    return hashlib.sha256(text.encode()).hexdigest()


def execute(path, slow=True):
    """Return the notebook with its outputs; whatever its cells raise is raised. Without the cells tagged "slow" where
    those are not asked for."""
    notebook = nbformat.read(path, 4)
    if not slow:
        notebook.cells = [c for c in notebook.cells if "slow" not in c.metadata.get("tags", ())]
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
    """Write the outputs of these notebooks, or of all."""
    for path in NOTEBOOKS:
        if not names or path.stem in names:
            notebook = execute(path)
            if found := complaints(notebook):
                raise SystemExit(f"{path.stem}: {found[0]}")
            nbformat.write(notebook, path)
            print(path.stem, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
