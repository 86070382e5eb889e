"""The examples of docs/he.md run as they stand there, one after another; those that do not say what they need."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "he.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NEEDS = "# needs "


def test_the_examples_run(capsys):
    for package in ("tenseal", "torch", "httpx", "starlette", "uvicorn"):
        pytest.importorskip(package)
    space = {"__name__": "page"}
    for code in BLOCKS:
        made = compile(code, "he.md", "exec")  # also of those that are not run
        if not code.startswith(NEEDS):
            exec(made, space)
    told = capsys.readouterr().out
    # what the page says beside the calls
    for text in (
        "0.18 s on one core",
        "a token: 0.15 s on one core",
        "0.12 s on one core",
        "on a GPU 1.1 ms of computing",
    ):
        assert text in told
        assert f"# {text}" in PAGE


def test_few_examples_need_more_than_they_have():
    rest = [code for code in BLOCKS if code.startswith(NEEDS)]
    assert len(rest) == 3
    assert all(re.match(r"# needs (a minute|files)[^\n]*\n", code) for code in rest)
