"""The pages for other projects run as they stand."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refattn import Capabilities
from refattn.check.kernels.tiled import tiled

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


def test_a_first_kernel_is_judged_as_the_page_says(tmp_path):
    """The commands of start.md, the second in a tenth of its time."""
    (tmp_path / "my_kernel.py").write_text(blocks("start.md", "python")[1])
    init, check = (x[2:] for x in blocks("start.md", "console")[1].splitlines())
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(init)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Capabilities(" in done.stdout
    command = [sys.executable, "-m", *shlex.split(check), "--budget", "quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "right" in done.stdout
    assert "WRONG" not in done.stdout


README = (DOCS.parent / "README.md").read_text()
KERNEL, USE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readmes_kernel_is_told_what_it_says(tmp_path):
    """The command is the one that stands there, and so are the lines that it prints."""
    (tmp_path / "kernel.py").write_text(KERNEL)
    command = shlex.split(re.search(r"`refattn (check kernel.py:attention .*?)` says", README)[1])
    run = subprocess.run(
        [sys.executable, "-m", "refattn", *command], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 1
    told = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1].splitlines()
    assert len(told) == 3
    for line in told:
        assert line in run.stdout


def test_the_readmes_lines_of_python_run():
    rng = np.random.default_rng(0)
    query, key, value, dout = (rng.standard_normal((1, 2, 8, 16)).astype(np.float32) for _ in range(4))

    def kernel(problem):
        return tiled(problem)[0]

    kernel.capabilities = Capabilities({"bfloat16"})
    names = {"query": query, "key": key, "value": value, "dout": dout, "kernel": kernel}
    code = USE.replace('dtypes=["bfloat16"]', 'dtypes=["bfloat16"], only="gaussian/dim-4*"')
    exec(compile(code, "README.md", "exec"), names)
    assert names["report"].right
    assert {"out", "lse", "dq", "dk", "dv"} <= set(names["answer"].values)
