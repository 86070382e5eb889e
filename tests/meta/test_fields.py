"""The page of every field: none is missing, each snippet has what it is about, and each is drawn."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from refattn import Problem

DOCS = Path(__file__).parents[2] / "docs"
FIRST, *SECTIONS = (DOCS / "fields.md").read_text(encoding="utf-8").split("\n## ")


def names(section):
    return section.split("\n")[0].split(", ")


def code(section):
    (found,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return found


def test_no_field_is_missing():
    assert sorted(n for s in SECTIONS for n in names(s)) == sorted(f.name for f in fields(Problem))


def test_each_snippet_has_its_fields_and_is_another_call():
    space = {}
    exec(code(FIRST), space)
    plain = space["plain"]
    default = {f.name: f.default for f in fields(Problem)}
    for section in SECTIONS:
        exec(code(section), space)
        p = space["p"]
        for name in names(section):
            x = getattr(p, name)
            assert x is not None, name
            assert hasattr(x, "shape") or name == "options" or x != default[name], name
        assert p is not plain or names(section)[0] == "query"


def test_each_is_drawn(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(DOCS)
    import _pictures

    drawn = []

    def keep(fig, name):
        drawn.append(name)
        _pictures.plt.close(fig)

    monkeypatch.setattr(_pictures, "keep", keep)
    _pictures.of_fields()
    shown = re.findall(r"\]\((variants/field-.*?svg)\)", "".join(SECTIONS))
    assert drawn == shown
    assert len(shown) == len(SECTIONS)
