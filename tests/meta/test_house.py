"""The house rules, as tests."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import refattn

ROOT = Path(refattn.__file__).parent
TREE = Path(__file__).parents[2]
# a module may import from its own room and from those before it
ROOMS = [
    "errors",
    "dtypes",
    "arrays",
    "problem",
    "masks",
    "files",
    "variants",
    "exact",
    "gpu",
    "he",
    "tensor",
    "theory",
    "check",
    "strategies",
    "golden_file",
    "golden",
    "bench",
    "cli_exact",
    "cli_golden",
    "cli_doctor",
    "cli_he",
    "cli_theory",
    "cli",
]
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
]
SOURCES = sorted(ROOT.rglob("*.py"))
PUBLIC = {
    "VARIANTS", "Answer", "Capabilities", "InvalidInput", "InvalidProblem", "KernelError", "Law", "MismatchError",
    "Model", "Problem", "RefattnError", "Report", "UnsupportedProblem", "Variant", "__version__", "check_kernel",
    "check_problem", "compare", "evaluate", "linear_attention", "load_problem", "masks", "parametrize_with_checks",
    "power_attention", "reference", "save_problem", "sigmoid_attention", "softmax_attention",
}  # fmt: skip


def room(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_rooms(path, tree=None):
    tree = ast.parse(path.read_text()) if tree is None else tree
    depth = len(path.relative_to(ROOT).parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            parts = (node.module or "").split(".")
            yield from [parts[0]] if parts[0] else [a.name for a in node.names]


def wrong_imports(path, tree=None):
    mine = room(path)
    if mine not in ROOMS:
        return []
    return [r for r in imported_rooms(path, tree) if r in ROOMS and ROOMS.index(r) > ROOMS.index(mine)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    assert wrong_imports(path) == []


def test_the_import_rule_can_fail():
    assert wrong_imports(ROOT / "exact" / "matrix.py", ast.parse("from ..check import report")) == ["check"]
    assert wrong_imports(ROOT / "masks.py", ast.parse("from .exact import evaluate")) == ["exact"]


def modules_after(code):
    script = f"import sys\n{code}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_importing_refattn_is_light():
    assert modules_after("import refattn, refattn.cli, refattn.check.bugs.planted").isdisjoint(HEAVY)


def test_the_light_import_test_can_fail():
    assert not modules_after("import torch").isdisjoint(HEAVY)


def test_public_names_are_these():
    assert set(refattn.__all__) == PUBLIC
    assert all(hasattr(refattn, n) for n in PUBLIC)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


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
    assert softmaxes == {f"variants/{v}.py" for v in refattn.VARIANTS}


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=lambda c: " ".join(c)
)
def test_lint_and_types(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=TREE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
