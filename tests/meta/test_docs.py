"""The documentation builds without warnings, no link is dead, notebooks run; the README has the commands of CI."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

import refattn
from refattn.check.kernels import EXAMPLE, KERNELS

from ..conftest import NIGHTLY
from ..snippets import run
from .notebooks import NOTEBOOKS, complaints, execute, unshown

TREE = Path(__file__).parents[2]
README = (TREE / "README.md").read_text()
SNIPPETS = sorted((TREE / "docs" / "reference").glob("*.md"))
NAMES = ("start", "arithmetic", "checking", "contract", "golden", "recurrences")
MORE = [TREE / "docs" / f"{name}.md" for name in NAMES]
"""Other pages whose examples stand on their own."""


def test_a_page_lists_the_families_of_which_its_operator_has_cases(monkeypatch):
    """MoBA names the common ones, and takes no call of a family that has none with a bottom-right corner."""
    monkeypatch.syspath_prepend(str(TREE / "docs"))
    page = importlib.import_module("_pages")
    assert "drift" in refattn.VARIANTS["moba"].families
    assert re.findall(r"^- `(\w+)`:", page.families(refattn.VARIANTS["moba"]), re.MULTILINE) == [
        "gaussian",
        "peaked",
        "probe",
        "poison",
    ]
    assert "`drift`" in page.families(refattn.VARIANTS["softmax"])


def build(folder):
    """Build with notebooks as they are kept: that they run is tested one by one."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", folder / "trees", "docs"]
    environment = os.environ | {"REFATTN_DOCS_NOTEBOOKS": "0"}
    done = subprocess.run(
        [*map(str, command), str(folder / "html")],
        cwd=TREE, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "html"


def test_notebooks_run_without_warnings():
    """Nightly with their slow cells: where a served encoder is asked, which tests/he/test_encoder.py does; where a
    model is trained, with PyTorch alone or as tests/functions/test_mixture_model.py does."""
    command = [sys.executable, "-m", "tests.meta.notebooks", "--play" if NIGHTLY else "--play-fast"]
    done = subprocess.run(
        command, cwd=TREE, capture_output=True, text=True, check=False, env=os.environ | {"MPLBACKEND": "agg"}
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_kept_with_its_outputs(path):
    notebook = nbformat.read(path, 4)
    assert unshown(notebook) is None, f"run python -m tests.meta.notebooks {path.stem}"
    assert complaints(notebook) == []


def test_the_tests_of_notebooks_can_fail(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import warnings\nwarnings.warn('hot')")])
    path = tmp_path / "x.ipynb"
    nbformat.write(notebook, path)
    assert unshown(notebook) == "not executed from the first cell to the last"
    notebook.cells[0].metadata["tags"] = ["slow"]
    nbformat.write(notebook, path)
    assert execute(path, slow=False).cells == []
    done = execute(path)
    assert "hot" in complaints(done)[0]
    assert unshown(done) is None
    done.cells[0].source += "  # other"
    assert unshown(done) == "cells changed after it was executed"


class Page(HTMLParser):
    """The places that a page has, and those that it leads to."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[n] for n in ("id", "name") if found.get(n)}
        self.links += [found[n] for n in ("href", "src") if found.get(n)]


def dead(folder):
    """Return (page, link) for each link within a folder of pages whose file or anchor is not there."""
    pages = {p: Page(p) for p in folder.rglob("*.html")}
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            missing = anchor and target in pages and anchor not in pages[target].ids
            if not target.is_file() or missing:
                yield path.relative_to(folder).as_posix(), link


def untyped(folder):
    """Return the pages whose signatures have Any, all that annotations can say of arrays; docstrings say shapes."""
    pages = [*(folder / "reference").glob("*.html"), *(folder / "functions" / "reference").glob("*.html")]
    assert len(pages) > len(SNIPPETS)
    return [p.name for p in pages if re.search(r'class="pre">Any<', p.read_text(encoding="utf-8"))]


def kernels_of(folder, variant):
    """Return the kernels that an operator's page names, as the build has written it."""
    page = (folder / "variants" / f"{variant}.html").read_text(encoding="utf-8")
    section = page.split('<section id="kernels-judged-for-it">')[1].split("</section>")[0]
    names = re.findall(r'<span class="pre">([\w-]+)</span></code>', section.split("judges")[0])
    return {n for n in names if n in KERNELS}


def test_documentation_builds_without_warnings_and_links_lead_somewhere(tmp_path):
    """One test: with two, two processes would build."""
    built = build(tmp_path)
    for page in (
        "index",
        "contract",
        "api",
        *(f"variants/{v}" for v in (*refattn.VARIANTS, "gallery")),
        *(f"notebooks/{p.stem}" for p in NOTEBOOKS),
        *(f"reference/{p.stem}" for p in SNIPPETS),
        "theory/index",
    ):
        assert (built / f"{page}.html").is_file(), page
    for v in refattn.VARIANTS:
        assert kernels_of(built, v) == {n for n, e in KERNELS.items() if v in e.variants} - {EXAMPLE}, v
    assert "mirrored columns. The default is" in (built / "variants" / "view_local.html").read_text(encoding="utf-8")
    assert sorted(set(dead(built))) == []
    assert untyped(built) == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<p id="x"><a href="#x"></a><a href="b.html#y"></a><a href="https://c.d/e"></a>')
    (tmp_path / "b.html").write_text('<a href="a.html#x"></a><a href="c.html"></a><img src="d.svg">')
    assert set(dead(tmp_path)) == {("a.html", "b.html#y"), ("b.html", "c.html"), ("b.html", "d.svg")}


@pytest.mark.parametrize("page", [*SNIPPETS, *MORE], ids=lambda p: p.stem)
def test_examples_run(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run(page)


def test_the_readme_has_the_two_commands():
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert blocks[0].endswith("/refattn check --dtype float32 --only 'gaussian/*'\n")
    assert "pip install -q --no-compile -c constraints.txt '.[test]'" in blocks[-1]
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
    text = README + "".join(p.read_text() for p in [*(TREE / "docs").glob("*.md"), *SNIPPETS])
    names = set(re.findall(r"\brefattn\.([a-zA-Z_]+)\b", text))
    assert names
    assert not {n for n in names if not hasattr(refattn, n) and importlib.util.find_spec(f"refattn.{n}") is None}


def shown(text):
    """Return the names that a page of the reference has: what its directives document, and what is in backticks."""
    found = set(re.findall(r"`(\w+)`", text))
    for kind, target, options in re.findall(r"^\.\. auto(\w+):: ([\w.]+)\n((?: +.*\n)*)", text, re.MULTILINE):
        found.add(target.split(".")[-1])
        members = re.search(r":members:([^:]*)", options)
        if kind == "module" and members:
            found |= set(re.findall(r"\w+", members[1])) or set(importlib.import_module(target).__all__)
    return found


ROOMS = ("", ".check", ".exact", ".gpu", ".he", ".operators", ".rules", ".tensor", ".theory")


@pytest.mark.parametrize("room", ROOMS)
def test_the_reference_has_every_public_name(room):
    """The build finds what is named and is not there; this finds what is there and is not named."""
    found = {n for page in (*SNIPPETS, TREE / "docs" / "devices.md") for n in shown(page.read_text())}
    public = importlib.import_module(f"refattn{room}").__all__
    assert sorted(set(public) - found - {"__version__"}) == []


def test_a_name_that_no_page_has_is_found():
    page = (
        ".. automodule:: refattn.gpu\n   :members: plan,\n     Plan\n.. autofunction:: refattn.he.ranges\n`IMPLS` x\n"
    )
    assert shown(page) == {"gpu", "plan", "Plan", "ranges", "IMPLS"}
    assert "band" in shown(".. automodule:: refattn.masks\n   :members:\n")
