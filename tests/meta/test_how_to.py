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


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def test_an_operator_of_ones_own_works_as_the_page_says(tmp_path):
    """The file, the commands, and the lines of Python, as they stand there."""
    mine, use = blocks("how-to/operator.md", "python")
    (tmp_path / "mine.py").write_text(mine)
    refattn = f"{shlex.quote(sys.executable)} -m refattn"
    script = re.sub(r"^refattn", refattn, block("how-to/operator.md", "sh"), flags=re.MULTILINE)
    run = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "cauchy attention" in run.stdout
    assert re.search(r"golden-cauchy: \d+ files", run.stdout)
    done = subprocess.run([sys.executable, "-c", use], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_readmes_operator_can_be_registered(tmp_path):
    text = (DOCS.parent / "README.md").read_text()
    code = re.search(r"```python\n(def attention\(q, k, v, o\):.*?)```", text, re.DOTALL)[1]
    check = "import refattn\nfrom refattn.check.bugs.planted import plain\n" + code
    check += "assert refattn.check_kernel(plain, 'cauchy', only='gaussian/plain[float32]').passed\n"
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
