"""By syntax tree: no claim compares with a number that somebody picked, and none says for itself that it holds."""

import ast
from pathlib import Path

import pytest

import refattn.theory

FILES = sorted(p for p in Path(refattn.theory.__file__).parent.glob("*.py") if p.stem not in ("claim", "plots"))
# what a comparison or a bound may be as it stands: nothing, and the whole of a bound
EXACT = (0, 1)
TINY = 2.0**-20
"""Smaller numbers are tolerances wherever they stand, but in defaults of arguments: those are a claim's own inputs."""


def numbers(node):
    return [n for n in ast.walk(node) if isinstance(n, ast.Constant) and type(n.value) in (int, float)]


def picked(tree):
    """Return the lines of numbers that a claim is held to: bare ones, and any that is not whole."""
    hypotheses = {id(n) for call in ast.walk(tree) if called(call, "needs") for n in ast.walk(call)}
    found = []
    for node in ast.walk(tree):
        if called(node, "Evidence"):
            measured, bound = node.args[:2]
            found += [n for n in numbers(bound) if not isinstance(n.value, int)]
            found += [bound] if isinstance(bound, ast.Constant) and bound.value not in EXACT else []
            found += [measured] if isinstance(measured, ast.Constant) else []
        elif isinstance(node, ast.Compare) and id(node) not in hypotheses:
            found += [n for n in numbers(node) if not isinstance(n.value, int)]
        elif isinstance(node, (ast.FunctionDef, ast.Lambda)):
            body = node.body if isinstance(node.body, list) else [node.body]
            found += [n for part in body for n in numbers(part) if 0 < abs(n.value) < TINY]
    return sorted({n.lineno for n in found})


def called(node, name):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_tolerance_is_picked(path):
    assert picked(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Evidence(x, 1e-9, what)", [1]),
        ("Evidence(x, 1.5 * y, what)", [1]),
        ("Evidence(x, 3, what)", [1]),
        ("Evidence(0, 1, what)", [1]),
        ("ok = error < 0.25", [1]),
        ("def f():\n    return x / 1e-12", [2]),
        ("Evidence(x, 0, what)", []),
        ("Evidence(x, 2 * y, what)", []),
        ("needs(0 < x < 0.5, text)", []),
        ("def f(error=1e-12):\n    return x <= 1", []),
    ],
)
def test_picked_numbers_are_found(text, found):
    assert picked(ast.parse(text)) == found


def functions_of(path):
    return {n.name: n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_functions_are_short(path):
    long = {name: n.end_lineno - n.lineno + 1 for name, n in functions_of(path).items()}
    assert not {name: lines for name, lines in long.items() if lines > 60}
