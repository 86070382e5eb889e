"""A service that computes on a GPU: refused by name where there is none, and what ends before its process does."""

import asyncio
import importlib.util
import time

import pytest
from click.testing import CliRunner

from refattn.cli.main import main
from refattn.he import hosted
from refattn.he.processes import pool_of
from refattn.he.saved import plan_to_json
from refattn.he.service import service

from .exchange import exchange

pytest.importorskip("tenseal")
httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
WITHOUT = pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")


@WITHOUT
def test_the_command_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text(plan_to_json(exchange("the server divides").plan))
    done = CliRunner().invoke(main, ["he", "serve", str(tmp_path / "plan.json"), "--device", "cuda"])
    assert done.exit_code == 2
    assert "device='cuda' needs the package cupy" in done.output


@WITHOUT
def test_a_session_is_refused_and_leaves_its_place():
    e = exchange("the server divides")

    async def go():
        app = service(e.program, sessions=1, device="cuda")
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as http,
        ):
            for _ in range(2):
                answer = await http.post("/sessions", content=e.keys)
                assert (answer.status_code, "needs the package cupy" in answer.json()["error"]) == (400, True)

    asyncio.run(go())


class Noted:
    """What stands for a server: it notes where it was closed."""

    def __init__(self, path):
        self.path = path

    def close(self):
        self.path.write_text("closed")


def hold(path, seconds=0.0):
    hosted._HERE["server"] = Noted(path)
    time.sleep(seconds)


def test_a_server_is_closed_before_its_process_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(hosted, "CLOSE_SECONDS", 60.0)  # the machine may be busy
    pool = pool_of(1)
    pool.submit(hold, tmp_path / "a").result(60)
    (process,) = pool._processes.values()
    hosted._end(pool)
    assert (tmp_path / "a").read_text() == "closed"
    process.join(60)
    assert not process.is_alive()


def test_a_process_that_does_not_answer_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(hosted, "CLOSE_SECONDS", 0.2)
    pool = pool_of(1)
    pool.submit(hold, tmp_path / "a").result(60)
    (process,) = pool._processes.values()
    pool.submit(hold, tmp_path / "b", 1000.0)
    hosted._end(pool)
    process.join(60)
    assert not process.is_alive()
    assert not (tmp_path / "b").exists()


def test_a_session_of_a_gpu_has_no_limit_of_addresses(monkeypatch):
    asked = []
    monkeypatch.setattr(hosted, "pool_of", lambda *given: asked.append(given))
    program = exchange("the server divides").program
    for device in ("cpu", "cuda"):
        hosted.Hosted(program, b"", 0.0, 1.0, device)
    assert asked == [(1, hosted.limit_memory, hosted.memory_of(program.plan)), (1,)]
