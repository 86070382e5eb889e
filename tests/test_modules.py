"""Files of users as modules."""

import sys

import pytest

from refattn import InvalidInput
from refattn.modules import module_of


def test_a_file_runs_once_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "neighbour_of_mine.py").write_text("x = 3\n")
    file = tmp_path / "some_kernel.py"
    file.write_text("from neighbour_of_mine import x\nfound = []\n")
    first = module_of(str(file), "kernel")
    first.found.append(1)
    assert module_of(str(file), "variant").found == [1]
    file.write_text("found = [1, 2, 3]\n")
    assert module_of(str(file), "kernel").found == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 / 0", "kernel: importing .*bad.py raised ZeroDivisionError: division by zero"),
        ("raise SystemExit(0)", "kernel: importing .*bad.py raised SystemExit: 0"),
        ("import no_module_of_this_name", "kernel: importing .*bad.py raised ModuleNotFoundError"),
        ("import refattn; raise refattn.InvalidInput('its own words')", "^its own words$"),
    ],
)
def test_whatever_a_file_raises_is_a_clear_error(tmp_path, text, expected):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(InvalidInput, match=expected):
        module_of(str(tmp_path / "bad.py"), "kernel")


def test_what_is_no_python_file(tmp_path):
    for name in ("nothing.py", "."):
        with pytest.raises(InvalidInput, match=r"variant: there is no Python file .*; name yours as path/file.py:NAME"):
            module_of(str(tmp_path / name), "variant")
