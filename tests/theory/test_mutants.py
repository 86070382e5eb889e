"""The mutation tests themselves: they edit what checks run, find edits, leave inputs alone, have no stale reasons."""

import ast
import time

from . import mutants
from .mutants import INPUTS, checked, dependents, edits, imports, reasons, source, verdict


def test_there_are_many_edits_and_every_reason_is_of_one():
    found = edits()
    assert len(found) >= 150
    names = {e.name for e in found}
    assert set(reasons()) <= names
    assert all(r.startswith(("equivalent: ", "loosens: ", "held elsewhere: ")) for r in reasons().values())


def test_every_module_with_claims_is_edited_and_inputs_are_not():
    found = edits()
    with_claims = {m for m in imports() if "CLAIMS = [" in ast.unparse(source(m))}
    assert with_claims <= {e.module for e in found}
    assert not {f"{e.module}.{e.function}" for e in found} & INPUTS
    run_by = checked()
    assert all(e.function in run_by[e.module] for e in found)


def test_an_edit_of_an_operator_and_of_what_it_imports_are_found():
    own = next(e for e in edits() if (e.module, e.function, e.was) == ("lightning", "chunked", "n - 1"))
    assert verdict(own).startswith("lightning-chunks: ")
    assert dependents("io_loops") == ["io_loops", "flash_io", "flash_lower"]
    used = next(e for e in edits() if (e.module, e.function, e.was) == ("systems", "power_sums", "-1"))
    assert verdict(used)


def test_what_changes_nothing_is_not_found():
    same = next(e for e in edits() if e.module == "lightning")
    object.__setattr__(same, "tree", lambda: source("lightning"))
    assert verdict(same) == ""


def test_an_edit_is_given_so_much_time_of_its_own(monkeypatch):
    monkeypatch.setattr(mutants, "SECONDS", 1)
    monkeypatch.setattr(mutants, "found_by", lambda edit: time.sleep(1.5) or "waits for others")
    assert verdict(edits()[0]) == "waits for others"
    monkeypatch.setattr(mutants, "found_by", lambda edit: any(iter(int, 1)))
    assert verdict(edits()[0]) == mutants.SLOW
