"""Every test and file that the page on security names is there."""

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "security.md"


def test_what_the_page_names_is_there():
    text = PAGE.read_text()
    tests = "".join(p.read_text() for p in HERE.glob("*.py"))
    names = re.findall(r"`(test_\w+)`", text)
    assert len(names) > 15
    assert [n for n in names if f"def {n}(" not in tests] == []
    files = re.findall(r"`(\w+\.py)`", text)
    assert [
        n for n in files if not (HERE / n).is_file() and not (HERE.parents[1] / "refattn" / "he" / n).is_file()
    ] == []
