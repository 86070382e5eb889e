"""The documentation builds without warnings, notebooks executed; the README's commands are those that CI runs."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import refattn

TREE = Path(__file__).parents[2]
README = (TREE / "README.md").read_text()


def test_documentation_builds_without_warnings_and_notebooks_run(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        "-d",
        tmp_path / "trees",
        "docs",
    ]
    environment = os.environ | {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    done = subprocess.run(
        [*map(str, command), str(tmp_path / "html")],
        cwd=TREE, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for page in (
        "index",
        "contract",
        "api",
        *(f"variants/{v}" for v in refattn.VARIANTS),
        "notebooks/01_check_a_kernel",
        "notebooks/02_encrypted_attention",
        "notebooks/03_encrypted_digits",
        "notebooks/04_encrypted_diagnosis",
        "notebooks/05_triple_wise",
        "notebooks/06_theory",
        "notebooks/07_operators",
        "notebooks/08_encrypted_model",
        "theory/index",
    ):
        assert (tmp_path / "html" / f"{page}.html").is_file(), page


def test_the_readme_has_the_two_commands():
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert blocks[0].endswith("/refattn check --dtype float32 --only 'gaussian/*'\n")
    assert "pip install -q -c constraints.txt '.[test]'" in blocks[-1]
    assert "pytest" in blocks[-1]
    script = (TREE / ".ci" / "run").read_text()
    assert "## Test it" in script
    assert os.access(TREE / ".ci" / "run", os.X_OK)


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 90
    assert max(map(len, lines)) <= 120
    for name in re.findall(r"\]\((docs/[^)#]*)\)", README):
        assert (TREE / name).is_file(), name


def test_the_readme_is_whole():
    assert "BENCH" not in README
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "constraints.txt"):
        assert (TREE / name).is_file()
    assert f"version: {refattn.__version__}" in (TREE / "CITATION.cff").read_text()


def test_names_in_the_documentation_exist():
    """Every refattn.name in README and docs is public, or a module."""
    text = README + "".join(p.read_text() for p in (TREE / "docs").glob("*.md"))
    names = set(re.findall(r"\brefattn\.([a-zA-Z_]+)\b", text))
    assert names
    assert not {n for n in names if not hasattr(refattn, n) and importlib.util.find_spec(f"refattn.{n}") is None}
