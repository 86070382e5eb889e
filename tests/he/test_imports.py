"""No module of refattn.he needs one that needs it, neither for its types nor inside a function."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from refattn import he

FOLDER = Path(he.__file__).parent


def imported(path):
    """Return the modules of the package that a file imports from, wherever in it."""
    nodes = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level == 1)
    return {n.module for n in nodes}


def test_imports_go_one_way():
    found = {p.stem: imported(p) for p in FOLDER.glob("*.py")}
    assert {"circuit", "inverse"} <= set(found)
    assert found["circuit"]
    TopologicalSorter(found).prepare()  # raises CycleError, which names the circle
