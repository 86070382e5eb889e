"""The house rules, as tests."""

import ast
import fnmatch
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import refattn

from ..conftest import LONGEST

ROOT = Path(refattn.__file__).parent
TREE = Path(__file__).parents[2]
BASE = {
    "errors", "dtypes", "arrays", "gates", "rules", "pages", "validation", "positions", "problem", "scales", "masks",
    "dropout", "norms", "features", "scores", "files", "modules", "version", "elsewhere",
}  # fmt: skip
CORE = BASE | {"variants", "exact"}
# what each room may import; check.kernels and check.bugs stand above the checker's core
EDGES = {
    "errors": set(),
    "version": set(),
    "papers": set(),
    "elsewhere": set(),
    "modules": {"errors"},
    "dtypes": {"errors"},
    "arrays": {"errors", "dtypes"},
    "rules": {"errors"},
    "gates": {"errors"},
    "pages": {"errors", "dtypes", "arrays"},
    "validation": {"errors", "dtypes", "arrays", "gates", "rules", "pages"},
    "positions": {"errors", "dtypes", "arrays", "validation"},
    "norms": {"errors", "dtypes", "arrays", "positions", "validation"},
    "dropout": {"errors", "arrays", "validation"},
    "features": {"arrays", "validation"},
    "problem": {
        "elsewhere",
        "errors",
        "arrays",
        "dropout",
        "features",
        "gates",
        "norms",
        "pages",
        "positions",
        "rules",
        "validation",
    },
    "scores": {"errors", "arrays", "masks", "positions", "problem", "rules", "validation"},
    "masks": {"errors", "positions", "problem", "rules", "validation"},
    "files": BASE - {"files", "modules", "version", "scales"},
    "variants": BASE,
    "exact": BASE | {"variants"},
    "check": CORE,
    "check.kernels": CORE | {"check", "gpu"},
    "check.bugs": CORE | {"check", "check.kernels"},
    "gpu": CORE,
    "he": CORE,
    "tensor": CORE | {"gpu"},
    "functions": CORE,
    "theory": CORE | {"check", "functions", "gpu", "he", "tensor"},
    "scales": {"errors", "dtypes", "arrays", "pages", "problem"},
    "drawn_options": BASE,
    "devices": CORE | {"check", "check.kernels", "functions"},
    "strategies": CORE | {"check", "drawn_options"},
    "operators": CORE | {"check", "check.bugs"},
    "golden": CORE | {"check"},
    "bench": CORE | {"check"},
    "cli": CORE | {"check", "check.kernels", "operators", "golden", "he", "theory", "bench", "functions", "papers"},
}
HEAVY = [
    "torch",
    "jax",
    "cupy",
    "tenseal",
    "starlette",
    "uvicorn",
    "httpx",
    "pytest",
    "hypothesis",
    "onnxruntime",
    "openvino",
    "keras",
    "numba",
    "matplotlib",
    "scipy",
    "sklearn",
    "networkx",
    "faiss",
]
SOURCES = sorted(ROOT.rglob("*.py"))
PUBLIC = {
    "VARIANTS", "Answer", "Capabilities", "InvalidInput", "InvalidProblem", "KernelError", "Law", "MismatchError",
    "Model", "Problem", "RefattnError", "Report", "UnsupportedProblem", "Variant", "__version__",
    "allowed_error", "assert_close", "check_context_parallel", "check_kernel",
    "check_problem", "compare", "dropout_mask", "evaluate", "linear_attention", "load_problem", "masks",
    "parametrize_with_checks",
    "power_attention", "query_rows", "reference", "register", "rules", "save_problem", "sigmoid_attention", "simulate",
    "softmax_attention",
}  # fmt: skip


def room(parts):
    return f"check.{parts[1]}" if parts[0] == "check" and parts[1:2] in (["kernels"], ["bugs"]) else parts[0]


def imported_rooms(path, tree=None):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text()) if tree is None else tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level]
            targets = [base + node.module.split(".")] if node.module else [[*base, a.name] for a in node.names]
            yield from (room(x) for x in targets)


def wrong_imports(path, tree=None):
    name = path.relative_to(ROOT)
    mine = room(list(name.with_suffix("").parts))
    if mine.startswith("__"):
        return []
    wrong = {r for r in imported_rooms(path, tree) if r not in EDGES[mine] | {mine}}
    return sorted(wrong)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_are_in_the_table(path):
    assert wrong_imports(path) == []


def test_the_import_rule_can_fail():
    assert wrong_imports(ROOT / "exact" / "matrix.py", ast.parse("from ..check import report")) == ["check"]
    assert wrong_imports(ROOT / "masks.py", ast.parse("from .exact import evaluate")) == ["exact"]
    assert wrong_imports(ROOT / "check" / "laws.py", ast.parse("from .kernels import find")) == ["check.kernels"]
    assert wrong_imports(ROOT / "he" / "plan.py", ast.parse("from ..gpu import attention")) == ["gpu"]


def test_no_room_imports_itself_through_others():
    """Following the table leads from no room back to it."""
    graph = EDGES
    done, path = set(), []

    def visit(r):
        assert r not in path, [*path, r]
        if r not in done:
            path.append(r)
            for x in graph[r]:
                visit(x)
            done.add(path.pop())

    for r in graph:
        visit(r)


# operators are named in variants/; where else, and why
NAMED = {
    "problem.py": "the operator of a call that names none",
    "exact/stream.py": "which definition it is a fast implementation of",
    "exact/functions.py": "the public functions, one an operator",
    "exact/arithmetics.py": "the sigmoid, a function of numbers",
    "exact/matrix.py": "the sigmoid, a function of numbers",
    "check/kernels/": "adapters that say which operators a kernel computes",
    "he/": "an implementation of one operator",
    "gpu/": "an implementation of one operator",
    "theory/": "claims about operators, under the names of their papers",
    "tensor/": "names of triple-wise forms and of fits",
    "papers.py": "what is here of each paper",
    "functions/positions.py": "linear scaling of rotary positions, which is also an operator's name",
    "functions/native.py": "an argument topk, which is also an operator's name",
}


def named_operators(tree):
    """Return the operators that a module names: as a string, or by the name of its row."""
    names = set(refattn.VARIANTS) | {n.upper() for n in refattn.VARIANTS}
    docs = {
        id(n.body[0].value)
        for n in ast.walk(tree)
        if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
        and n.body
        and isinstance(n.body[0], ast.Expr)
        and isinstance(n.body[0].value, ast.Constant)
    }
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docs]
    words = [set(re.findall(r"\w+", t)) for t in texts if isinstance(t, str)]
    found = {w for x in words if x <= names for w in x}  # a list of names in a string, too
    for n in ast.walk(tree):
        if isinstance(n, ast.Name | ast.Attribute):
            name = n.id if isinstance(n, ast.Name) else n.attr
            found |= {name} & names if name.isupper() else set()
        if isinstance(n, ast.ImportFrom) and "variants" in (n.module or "").split("."):
            found |= {*(n.module or "").split("."), *(a.name for a in n.names)} & names
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_operator_is_named_outside_variants(path):
    name = path.relative_to(ROOT).as_posix()
    if not name.startswith("variants/") and not any(name.startswith(n) for n in NAMED):
        assert named_operators(ast.parse(path.read_text())) == set()


def test_the_rule_of_names_can_fail():
    assert named_operators(ast.parse("def f(p):\n    return p.variant == 'power'")) == {"power"}
    assert named_operators(ast.parse("from ..variants import SOFTMAX\nx = SOFTMAX.laws")) == {"SOFTMAX"}
    assert named_operators(ast.parse('"""softmax"""\n\ndef f():\n    """linear"""')) == set()
    assert named_operators(ast.parse("'a softmax call'")) == set()
    assert named_operators(ast.parse("for x in 'softmax linear'.split(): pass")) == {"softmax", "linear"}
    assert named_operators(ast.parse("from ..variants.power import scores")) == {"power"}
    assert named_operators(ast.parse("from .. import variants\nvariants.MOBA")) == {"MOBA"}


def modules_after(code):
    script = f"import sys\n{code}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_importing_refattn_is_light():
    assert modules_after("import refattn, refattn.cli, refattn.check.bugs.planted").isdisjoint(HEAVY)


def test_the_light_import_test_can_fail():
    assert not modules_after("import torch").isdisjoint(HEAVY)


def test_a_plain_checkout_can_be_imported(tmp_path):
    """Without an installation there is no version to read: everything works all the same, in a folder of its own."""
    code = (
        "import importlib.metadata as m; real = m.version; "
        "m.version = lambda n: (_ for _ in ()).throw(m.PackageNotFoundError(n)) if n == 'refattn' else real(n); "
        "import numpy as np, refattn; x = np.ones((1, 1, 2, 2)); "
        "print(refattn.__version__, refattn.evaluate(refattn.Problem(x, x, x), rounding='float32').out.sum()); "
        "from refattn.check.kernels import KERNELS; print(KERNELS['refattn-tiled'].version)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0+unknown", "4.0", "refattn", "0+unknown"]


def test_public_names_are_these():
    assert set(refattn.__all__) == PUBLIC
    assert all(hasattr(refattn, n) for n in PUBLIC)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


def long_functions(tree):
    """Return the functions with more than 60 lines, docstrings not counted."""
    for n in ast.walk(tree):
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(n, clean=False)
            length = n.end_lineno - n.lineno + 1 - (len(doc.splitlines()) + 1 if doc else 0)
            if length > 60:
                yield n.name, length


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short(path):
    assert list(long_functions(ast.parse(path.read_text()))) == []


def test_the_rule_of_short_functions_can_fail():
    assert list(long_functions(ast.parse("def f():\n" + "    x = 1\n" * 61))) == [("f", 62)]


GENERATED = ("variants", "theory", "notebooks")
"""Folders of docs/ that its build writes: .gitignore has them."""
PAGES = [p for p in (TREE / "docs").rglob("*.md") if p.relative_to(TREE / "docs").parts[0] not in GENERATED]
TEXTS = [*TREE.glob("*.md"), *PAGES, *ROOT.rglob("*.cu"), *ROOT.rglob("*.cuh")]


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_lines_of_text_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [i for i, x in enumerate(lines, 1) if len(x) > 120 and not x.lstrip().startswith("|")] == []


def where_tested():
    """Return the table of tests/README.md: patterns of modules and the files that test them."""
    lines = (TREE / "tests" / "README.md").read_text().splitlines()
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in lines if re.match(r"\| [\w*/]+\.py ", line)]
    return [(pattern, [f.strip() for f in files.split(",")]) for pattern, files in rows]


def untested(modules, table):
    """Return the modules that neither have a test file of their name nor stand in the table."""
    for path in modules:
        name = path.relative_to(ROOT)
        own = TREE / "tests" / name.parent / f"test_{name.name}"
        if not own.is_file() and not any(fnmatch.fnmatchcase(name.as_posix(), pattern) for pattern, _ in table):
            yield name.as_posix()


def test_slow_and_longest_tests_are_there():
    for name in [*(TREE / "tests" / "slow.txt").read_text().splitlines()[1:], *LONGEST]:
        file, _, function = name.partition("[")[0].partition("::")
        assert f"def {function}(" in (TREE / file).read_text(), name


def test_every_module_is_tested_somewhere():
    table = where_tested()
    assert len(table) > 30
    assert list(untested([p for p in SOURCES if not p.name.startswith("__")], table)) == []
    assert [f for _, files in table for f in files if not (TREE / "tests" / f).is_file()] == []
    assert list(untested([ROOT / "exact" / "matrix.py"], [])) == ["exact/matrix.py"]  # the rule can fail


def test_every_row_of_the_table_is_needed():
    names = [p.relative_to(ROOT).as_posix() for p in SOURCES]
    assert [pattern for pattern, _ in where_tested() if not fnmatch.filter(names, pattern)] == []


def test_every_module_has_its_names():
    for info in pkgutil.walk_packages(refattn.__path__, "refattn."):
        if info.name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(info.name)
        except ModuleNotFoundError as e:
            if e.name not in (*HEAVY, "triton"):  # a kernel's package that is not here
                raise
            continue
        assert module.__doc__, info.name
        if hasattr(module, "__all__"):
            assert all(hasattr(module, n) for n in module.__all__), info.name


def test_no_tolerance_is_picked_by_hand():
    for path in SOURCES:
        assert not re.search(r"\b(atol|rtol|allclose|isclose)\b", path.read_text()), path


def test_no_reference_says_again_what_attention_is():
    """Only variants/ defines; the tiled kernel and the planted ones are under test themselves."""
    softmaxes = {p.relative_to(ROOT).as_posix() for p in SOURCES if re.search(r"def .*attention\(q[,:]", p.read_text())}
    assert softmaxes == {
        f"variants/{v}.py"
        for v in ("softmax", "linear", "power", "sigmoid", "relu", "urpe", "ecoformer", "codebook", "spark", "hyper")
    }


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=lambda c: " ".join(c)
)
def test_lint_and_types(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=TREE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
