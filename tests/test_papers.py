"""Every paper's row names things that exist, and tests that use them."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from refattn import VARIANTS
from refattn.papers import PAPERS
from refattn.theory import CLAIMS

TESTS = Path(__file__).parent
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
