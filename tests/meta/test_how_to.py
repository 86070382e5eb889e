"""The pages for other projects run as they stand."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def block(page, language):
    return re.search(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)[1]


@pytest.mark.parametrize(("page", "package", "passed"), [("pytorch", "torch", 16), ("jax", "jax", 10)])
def test_a_test_file_passes(page, package, passed, tmp_path):
    pytest.importorskip(package)
    (tmp_path / "test_attention.py").write_text(block(f"how-to/{page}.md", "python"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_attention.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= passed


@pytest.mark.parametrize("page", ["triton", "cupy"])
def test_a_test_file_for_a_gpu_is_python(page):
    compile(block(f"how-to/{page}.md", "python"), page, "exec")


def test_a_binary_is_judged_through_files(tmp_path):
    (tmp_path / "attention.cpp").write_text(block("golden.md", "cpp"))
    refattn = f"{shlex.quote(sys.executable)} -m refattn"
    script = re.sub(r"^refattn", refattn, block("how-to/cpp.md", "sh"), flags=re.MULTILINE)
    run = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"float32 +│ +1 +│ +0 +│ +0 ", run.stdout)
