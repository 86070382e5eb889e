"""The long test of a server, for some seconds; and that it would see a wrong reply."""

import numpy as np
import pytest

from refattn import he

from .soak import Load, soak

pytest.importorskip("tenseal")
pytest.importorskip("uvicorn")


def test_a_server_under_load_and_faults():
    count, wrong, curve = soak(0.2, 6, sessions=4, every=4.0)
    assert wrong == []
    assert count["right"] > 0
    assert max(processes for _, _, processes in curve) < 4 + 12


def test_a_wrong_reply_is_seen(monkeypatch):
    load = Load("http://127.0.0.1:1", 0)
    monkeypatch.setattr(he, "reference", lambda call: np.zeros((1, 1, 4, 4)))

    class Client:
        def decrypt(self, reply):
            return np.full((1, 1, 4, 4), 1.0)

    load.right(Client(), b"", "right")
    assert load.wrong[0].startswith("right: off by 1.0, the plan's error is")
    load.refused(type("Server", (), {"attend": lambda self, body: b""})(), b"", "repeated", "asked before")
    assert load.wrong[1] == "repeated: answered"
