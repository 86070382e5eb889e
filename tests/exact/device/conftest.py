"""A GPU's stand-in for the tests of this folder."""

import pytest

from refattn.exact.device import asked, card

from .cupys_part import cupys_part


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def stand_in(folder, monkeypatch):
    """Return a function that puts a stand-in for CuPy in its place, with fewer threads to a block: they take turns."""

    def put(threads=64, **what):
        module = cupys_part(folder, **what)
        monkeypatch.setattr(card, "THREADS", threads)
        monkeypatch.setattr(card, "KEYS", threads * card.PER)
        for room in (asked, card):
            monkeypatch.setattr(room, "cupy_with_gpu", lambda: module)
        card.card_of.cache_clear()
        return module

    yield put
    card.card_of.cache_clear()


@pytest.fixture
def trusted(stand_in, monkeypatch):
    """Put a stand-in in CuPy's place whose checks are not asked again."""
    from refattn.exact.device import canaries

    monkeypatch.setattr(canaries, "check", lambda card: None)
    return stand_in()
