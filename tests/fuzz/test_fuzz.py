"""Input that was changed on its way is a value or a RefattnError, in time; a longer run is a command."""

import random

import pytest

from refattn.errors import InvalidInput

from . import readers as r
from .mutate import of_bytes, of_json, of_zip
from .readers import Readers, attack

pytest.importorskip("tenseal")
SEEDS = 150
CORPUS = [("weights", 529), ("weights", 616), ("weights", 1051), ("weights", 1581), ("weights", 1860)]
"""Readers and seeds that once went wrong."""


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    found = Readers(tmp_path_factory.mktemp("fuzz"))
    yield found
    found.close()


SLOW = {"golden": 30, "ciphertext": 40, "key": 20}


@pytest.mark.parametrize(
    "name",
    ["problem", "arrays", "weights", "plan", "golden", "baseline", "message", "ciphertext", "key", "request"],
)
def test_changed_input_is_read_or_refused(readers, name):
    seeds = range(SLOW.get(name, SEEDS))
    assert [said for seed in seeds if (said := attack(readers, name, seed))] == []


def test_what_once_went_wrong(readers):
    assert [said for name, seed in CORPUS if (said := attack(readers, name, seed))] == []


def test_what_is_valid_is_read(readers):
    for read, valid, _ in readers.all.values():
        read(valid)


@pytest.mark.parametrize("name", ["problem", "plan", "message"])
def test_most_changes_are_refused_and_some_reach_what_is_inside(readers, name):
    """A fuzzer whose input never gets past the first check finds nothing."""
    read, valid, changes = readers.all[name]
    said = set()
    for seed in range(200):
        rng = random.Random(seed)
        try:
            read(rng.choice(changes)(rng, valid))
        except InvalidInput as e:
            said.add(str(e)[:30])
        except Exception as e:
            said.add(type(e).__name__)
    assert len(said) >= 2


def test_the_attack_finds_what_is_wrong(readers, monkeypatch):
    def fragile(data):
        return data[40] / 0 if len(data) % 2 else None

    monkeypatch.setitem(readers.all, "fragile", (fragile, b"x" * 101, (of_bytes,)))
    assert any("ZeroDivisionError" in attack(readers, "fragile", seed) for seed in range(20))
    monkeypatch.setattr(r, "SECONDS", -1.0)
    assert attack(readers, "baseline", 0).endswith(" s") or attack(readers, "baseline", 1).endswith(" s")


def test_changes_change(readers):
    rng = random.Random(0)
    for name, (_, valid, changes) in readers.all.items():
        for change in changes:
            assert any(change(rng, valid) != valid for _ in range(5)), (name, change)
    used = {c for _, _, changes in readers.all.values() for c in changes}
    assert used == {of_bytes, of_json, of_zip, readers.of_request}
