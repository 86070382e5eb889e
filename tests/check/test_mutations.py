"""The checker, checked: every edit of it in mutations.toml fails a trial of the battery that it passes as it stands."""

import importlib
import sys
import tomllib
import types
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.util import spec_from_loader
from pathlib import Path

import pytest

import refattn.check

from . import battery, battery_bounds

ROOM = "refattn.check"
TRIALS = {t.__name__: t for t in (*battery.TRIALS, *battery_bounds.TRIALS)}
FOLDER = Path(refattn.__file__).parent / "check"
MUTATIONS = tomllib.loads(Path(__file__).with_name("mutations.toml").read_text(encoding="utf-8"))


class Edited(MetaPathFinder, Loader):
    """Gives one module another text."""

    def __init__(self, file, text):
        self.name, self.code = (
            f"{ROOM}.{file.removesuffix('.py').replace('/', '.')}",
            compile(text, f"<edited {file}>", "exec"),
        )

    def find_spec(self, name, path, target=None):
        return spec_from_loader(name, self) if name == self.name else None

    def exec_module(self, module):
        exec(self.code, module.__dict__)


def _ours():
    return {n: m for n, m in sys.modules.items() if n == ROOM or n.startswith(f"{ROOM}.")}


@contextmanager
def checker(file=None, text=None):
    """Import the checker anew, one file of it with another text; put back what was imported before."""
    before, finders = _ours(), [] if file is None else [Edited(file, text)]
    for name in before:
        del sys.modules[name]
    sys.meta_path[:0] = finders
    try:
        yield battery.checker()
    finally:
        for f in finders:
            sys.meta_path.remove(f)
        for name in _ours():
            del sys.modules[name]
        sys.modules.update(before)
        refattn.check = before[ROOM]


def test_the_checker_passes_its_battery():
    with checker() as c:
        for trial in TRIALS.values():
            trial(c)


@pytest.mark.parametrize("name", MUTATIONS)
def test_an_edit_of_the_checker_is_noticed(name):
    m = MUTATIONS[name]
    source = (FOLDER / m["file"]).read_text(encoding="utf-8")
    assert source.count(m["old"]) == 1, "the text has moved on: edit mutations.toml"
    with checker(m["file"], source.replace(m["old"], m["new"])) as c, pytest.raises(AssertionError):
        TRIALS[m["by"]](c)


def test_the_table():
    assert len(MUTATIONS) >= 25
    assert all(
        set(m) == {"file", "old", "new", "why", "by"} and m["old"] != m["new"] and m["why"] for m in MUTATIONS.values()
    )


def test_what_was_imported_is_put_back():
    before = _ours()
    with checker(
        "report/report.py", "VERDICTS = Report = Check = junit = machine = summary = versions = element = None"
    ) as c:
        assert importlib.import_module("refattn.check.report.report").Report is None
        assert c.runner is not before[f"{ROOM}.runner"]
    assert _ours() == before
    assert isinstance(refattn.check, types.ModuleType)
    assert refattn.check is before[ROOM]
