"""The snippets of docs/functions run as they stand, a page from its first to its last."""

from pathlib import Path

import pytest

from ..snippets import run

DOCS = Path(__file__).parents[2] / "docs" / "functions"
PAGES = sorted(p for p in DOCS.glob("*.md") if "```python" in p.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_snippets_run(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run(page)
