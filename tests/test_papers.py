"""Every paper's row names things that exist, and tests that use them."""

import importlib
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from refattn import VARIANTS
from refattn.papers import PAPERS
from refattn.theory import CLAIMS

TESTS = Path(__file__).parent
PEERS = {
    "PyTorch": "torch",
    "TenSEAL": "tenseal",
    "faiss": "faiss",
    "fla-core": "fla",
    "kvpress": "kvpress",
    "native-sparse-attention-pytorch": "native_sparse_attention_pytorch",
    "natten": "natten",
    "routing-transformer": "routing_transformer",
    "titans-pytorch": "titans_pytorch",
    "transformers": "transformers",
    "xformers": "xformers",
}
"""Packages that rows are compared with, and what tests import of them."""
OF_ALL = {"operator": TESTS / "variants" / "test_variants.py", "claim": TESTS / "theory" / "test_claims.py"}


def wrong(paper):
    """Return what a row names that is not there, or that none of its tests speaks of."""
    texts = [(TESTS / f).read_text() if (TESTS / f).is_file() else "" for f in paper.checks]
    found = [f for f, text in zip(paper.checks, texts, strict=True) if "\ndef test_" not in text]
    for name in paper.here:
        kind, _, rest = name.partition(" ")
        if kind in OF_ALL:
            if rest not in (VARIANTS if kind == "operator" else CLAIMS) or not OF_ALL[kind].is_file():
                found.append(name)
            continue
        try:
            importlib.import_module(f"refattn.{name}")
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            if not hasattr(importlib.import_module(f"refattn.{module}"), attribute):
                found.append(name)
        if not any(name.rpartition(".")[2] in text for text in texts):
            found.append(f"{name} in its tests")
    return found


def unknown_peers(paper):
    """Return what a row says that it was compared with, of which neither its tests nor a page know."""
    texts = "".join((TESTS / f).read_text() for f in paper.checks if (TESTS / f).is_file())
    found = []
    for part in filter(None, map(str.strip, paper.peer.split(";"))):
        page = re.search(r"\((docs/\w+\.md)\)$", part)
        package = re.match("|".join(sorted(PEERS, key=len, reverse=True)), part)
        if page:
            known = (TESTS.parent / page[1]).is_file()
        elif package:
            known = re.search(rf"(import|from|importorskip\(\"|find_spec\(\") ?{PEERS[package[0]]}\b", texts)
        else:
            known = part.endswith((" once", "no package has it"))
        found += [] if known else [part]
    return found


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.title)
def test_a_row_names_peers_that_its_tests_import(paper):
    assert unknown_peers(paper) == []
    assert not (paper.peer == "" and any(c.startswith("peers/") for c in paper.checks))


def test_that_rule_can_fail():
    paper = next(p for p in PAPERS if p.title == "Titans")
    assert unknown_peers(replace(paper, peer="natten; its release, run beside it once; its release")) == [
        "natten", "its release",
    ]  # fmt: skip
    assert unknown_peers(replace(paper, checks=("functions/test_memory.py",)))[0] == "titans-pytorch"
    assert unknown_peers(replace(paper, peer="for speed cuDNN (docs/none.md)")) != []


def unlisted(paper, page):
    """Return a paper's modules of functions where the page's table has no function of any of them."""
    rows = page.partition("\n| function | paper |")[2].splitlines()
    names = {n for row in rows for n in re.findall(r"`(\w+)`", row.split(" | ")[0])}
    modules = {x.split(".")[1] for x in paper.here if x.startswith("functions.") and ".costs." not in x}
    public = {n for m in modules for n in importlib.import_module(f"refattn.functions.{m}").__all__}
    return set() if public & names else modules


def test_the_page_has_a_row_for_every_paper_of_functions():
    page = (TESTS.parent / "docs" / "peers.md").read_text()
    assert {p.title: x for p in PAPERS if (x := unlisted(p, page))} == {}
    (seer,) = (p for p in PAPERS if p.title == "SeerAttention")
    assert unlisted(seer, page.replace("seer_", "sear_")) == {"gates"}


def test_every_test_beside_a_package_belongs_to_a_row():
    files = {f"peers/{f.name}" for f in (TESTS / "peers").glob("test_*.py")}
    assert files == {c for p in PAPERS for c in p.checks if c.startswith("peers/")}


def test_the_page_names_the_packages_that_tests_import_and_no_others():
    page = (TESTS.parent / "docs" / "peers.md").read_text().partition("## Packages that compute our operators")[2]
    table = page.partition("| package |")[2].partition("\n\n")[0]
    named = {line.split()[1] for line in table.splitlines()[2:]}
    texts = "".join(f.read_text() for f in (TESTS / "peers").glob("test_*.py"))
    imported = {name for name, module in PEERS.items() if f'importorskip("{module}' in texts}
    assert named == {name if name != "faiss" else "faiss-cpu" for name in (imported | {"faiss"}) - {"PyTorch"}}


def test_continuous_integration_has_the_small_peers_in_the_versions_that_the_page_names():
    extras = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "peers-small" in extras["test"][-1]
    pinned = (TESTS.parent / "constraints.txt").read_text().split()
    page = (TESTS.parent / "docs" / "peers.md").read_text()
    rows = dict(re.findall(r"^\| ([\w-]+) ([\d.]+) \|.*`\[test\]`", page, re.MULTILINE))
    assert sorted(rows) == sorted(x.partition(">=")[0] for x in extras["peers-small"])
    assert {f"{name}=={version}" for name, version in rows.items()} <= set(pinned)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.title)
def test_what_is_here_is_there_and_checked(paper):
    assert paper.checks
    assert paper.here
    assert paper.not_here
    assert wrong(paper) == []


def test_the_rule_can_fail():
    paper = PAPERS[0]
    assert wrong(replace(paper, here=("operator none",))) == ["operator none"]
    assert wrong(replace(paper, here=("claim none",))) == ["claim none"]
    assert wrong(replace(paper, here=("functions.costs.nothing",)))[0] == "functions.costs.nothing"
    assert wrong(replace(paper, here=("functions.maps",))) == ["functions.maps in its tests"]
    assert wrong(replace(paper, checks=("none.py",)))[0] == "none.py"


def test_all_of_them_and_each_once():
    assert len(PAPERS) == len({p.title for p in PAPERS}) == 34
