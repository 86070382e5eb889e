import json

import pytest
from rich.console import Console

import refattn.bench
from refattn import bench


def test_what_was_measured_before_an_error_is_kept(tmp_path, monkeypatch):
    rows = "def rows():\n    yield Row('a', 2.0, 'ms', at_most=1.0)\n    raise OSError('gone')\n"
    text = f"from refattn.bench import Row\n{rows}"
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.setattr(refattn.bench, "_folder", lambda: tmp_path)
    with pytest.raises(OSError, match="gone"):
        bench.run("broken", Console(quiet=True), str(tmp_path / "x.json"))
    (row,) = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert (row["name"], row["value"], row["holds"]) == ("a", 2.0, False)
