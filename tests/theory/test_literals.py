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


# calls whose arguments are still what is compared; those of others are inputs
THROUGH = frozenset({"worst", "max", "min", "abs", "sum", "float", "int", "total", "over", "fsum", "sqrt"})
GATHERED = frozenset({"pairs", "found"})
"""Names of lists whose pairs are compared, in whichever function."""


HARDWARE = frozenset({"CACHE"})
"""Numbers of a machine, which a statement names."""


def numbers(node):
    return [n for n in ast.walk(node) if isinstance(n, ast.Constant) and type(n.value) in (int, float)]


def called(node, *names):
    name = getattr(node, "func", None)
    return isinstance(node, ast.Call) and getattr(name, "id", getattr(name, "attr", None)) in names


def constants(tree):
    """Return the names that a module or a function gives to a number as it stands, with a number of its value."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and all(
            isinstance(n, (ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop))
            for n in ast.walk(node.value)
        ):
            picked = [n for n in numbers(node.value) if n.value not in EXACT]
            found |= {n.id: picked[0] for n in node.targets if isinstance(n, ast.Name) and picked}
    return {name: n for name, n in found.items() if name not in HARDWARE}


def given(node, names):
    """Yield the numbers that a bound or what is measured is given: bare, as a factor or a summand, or by a name."""
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute):  # what a method is asked of
            yield from given(node.func.value, names)
        if called(node, *THROUGH):
            for part in node.args:
                yield from given(part, names)
    elif isinstance(node, ast.Constant):
        if type(node.value) in (int, float) and node.value not in EXACT:
            yield node
    elif isinstance(node, ast.Name):
        if node.id in names:
            yield names[node.id]
    elif isinstance(node, ast.Subscript):
        yield from given(node.value, names)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        yield from given(node.left, names)
    elif isinstance(node, (ast.GeneratorExp, ast.ListComp)):
        yield from given(node.elt, names)
    else:
        for part in ast.iter_child_nodes(node):
            yield from given(part, names)


def gathered(part):
    """Return the names of lists of pairs in a function: those that `worst` or `judged` is given, and `GATHERED`."""
    asked = [call for call in ast.walk(part) if called(call, "worst", "judged")]
    return GATHERED | {n.id for call in asked for x in call.args for n in ast.walk(x) if isinstance(n, ast.Name)}


def pairs_in(value):
    """Yield the pairs of a list, but not those that it is made over."""
    looped = {id(n) for c in ast.walk(value) if isinstance(c, ast.comprehension) for n in ast.walk(c)}
    yield from (x for x in ast.walk(value) if isinstance(x, ast.Tuple) and len(x.elts) == 2 and id(x) not in looped)


def compared(part):
    """Yield what a function holds a claim to: arguments of Evidence, worst and judged, and pairs that are gathered."""
    into = gathered(part)
    for node in ast.walk(part):
        if called(node, "Evidence"):
            yield from node.args[:2]
        elif called(node, "worst", "judged"):
            yield from node.args[:1]
        elif called(node, "append", "extend") and getattr(node.func.value, "id", None) in into:
            yield from node.args
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(getattr(n, "id", None) in into for n in targets):
                yield from pairs_in(node.value)
        elif isinstance(node, ast.Return) and isinstance(node.value, (ast.List, ast.ListComp)):
            yield from pairs_in(node.value)


def picked(tree):
    """Return the lines of numbers that a claim is held to: bare ones, factors, and any that is not whole."""
    hypotheses = {id(n) for call in ast.walk(tree) if called(call, "needs") for n in ast.walk(call)}
    names, found = constants(tree), []
    for node in ast.walk(tree):
        if called(node, "Evidence"):
            measured, bound = node.args[:2]
            found += [n for n in numbers(bound) if not isinstance(n.value, int)]
            found += [measured] if isinstance(measured, ast.Constant) else []
        elif called(node, "round"):  # what is rounded agrees with much
            found.append(node)
        elif isinstance(node, ast.Compare) and id(node) not in hypotheses:
            found += [n for n in numbers(node) if not isinstance(n.value, int)]
            named = [names[n.id] for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in names]
            found += [n for n in named if not isinstance(n.value, int)]
        elif isinstance(node, (ast.FunctionDef, ast.Lambda)):
            body = node.body if isinstance(node.body, list) else [node.body]
            found += [n for part in body for n in numbers(part) if 0 < abs(n.value) < TINY]
            found += [n for x in compared(node) for n in given(x, names)]
    if not isinstance(tree, ast.Module) or not any(isinstance(n, ast.FunctionDef) for n in tree.body):
        found += [n for x in compared(tree) for n in given(x, names)]
    return sorted({n.lineno for n in found})


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
        ("Evidence(error / 0.25, 1, what)", [1]),
        ("Evidence(x, 7 * y, what)", [1]),
        ("Evidence(abs(x) / 2, 1, what)", [1]),
        ("Evidence((x / 2).max(), 1, what)", [1]),
        ("Evidence(worst([(x, 2 * y)]), 1, what)", [1]),
        ("judged([(x, 2 * y)], what)", [1]),
        ("worst((x, 2 * y) for x in z)", [1]),
        ("pairs.append((error, 0.5))", [1]),
        ("pairs += [(error, 2 * bound) for error in errors]", [1]),
        ("def f():\n    all = [(x, 3 + y)]\n    return worst([*all, z])", [2]),
        ("def f():\n    return [(error, 3 * bound) for error in errors]", [2]),
        ("ok = error < 0.25", [1]),
        ("TOL = 0.25\nok = x < TOL", [1]),
        ("TOL = 1 / 4\nEvidence(x, TOL, what)", [1]),
        ("def f():\n    tol = 0.25\n    return x < tol", [2]),
        ("same(round(x), y)", [1]),
        ("def f():\n    return x / 1e-12", [2]),
        ("Evidence(x, 0, what)", []),
        ("Evidence(x, y, what)", []),
        ("Evidence(x[2], bound(2, y), what)", []),
        ("Evidence(x**2, y, what)", []),
        ("pairs.append((x, bound(64, y)))", []),
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
