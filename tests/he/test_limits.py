"""What a server lets its clients take: time, memory, places; and that a signal ends it."""

import asyncio
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from refattn import he
from refattn.he import bodies, hosted, sessions, wire
from refattn.he import service as service_module
from refattn.he.remote import Remote
from refattn.he.saved import plan_to_json

from . import forge
from .test_service import CALL, PLAN, opened, running

pytest.importorskip("tenseal")
pytest.importorskip("httpx")
pytest.importorskip("starlette")


def sleeps(query):
    time.sleep(3600)


def raises(query):
    raise ArithmeticError("not for the client")


@pytest.mark.parametrize(
    ("what", "limit", "status", "text"),
    [
        (sleeps, 0.2, 504, "it took longer than 1 s; the session was ended"),
        (raises, 60.0, 500, "the session's process failed (ArithmeticError); open another session"),
    ],
)
def test_a_query_that_does_not_end_ends_its_session(monkeypatch, what, limit, status, text):
    async def go():
        monkeypatch.setattr(hosted, "_attend", what)
        monkeypatch.setattr(service_module, "seconds_of", lambda plan: limit)
        client = he.Client(PLAN)
        async with running(sessions=1) as http:
            at = await opened(http, client)
            answer = await http.post(at + "/queries", content=client.encrypt(CALL))
            assert (answer.status_code, answer.json()["error"]) == (status, text)
            assert (await http.post(at + "/queries", content=client.encrypt(CALL))).status_code == 404
            await opened(http, client)

    asyncio.run(go())


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_a_session_has_its_memory_and_no_more(monkeypatch):
    async def go():
        client = he.Client(PLAN)
        with monkeypatch.context() as patch:
            patch.setattr(hosted, "memory_of", lambda plan: 2**22)
            async with running(sessions=1) as http:
                answer = await http.post("/sessions", content=client.evaluation_keys())
                assert answer.status_code in (413, 500), answer.text
                assert re.search(
                    "more memory than a session may take|process ended|process failed", answer.json()["error"]
                )
        async with running(sessions=1) as http:
            await opened(http, client)

    asyncio.run(go())


def test_the_servers_own_process_looks_at_no_part(monkeypatch):
    async def go():
        client = he.Client(PLAN)
        keys, query = client.evaluation_keys(), client.encrypt(CALL)
        many = forge.repacked(query, wire.QUERY, PLAN, [b""] * 10**5, bytes(16))
        monkeypatch.setattr(sessions, "unpack", lambda *given, **more: pytest.fail("it blocks all other clients"))
        monkeypatch.setattr(wire, "_digests", lambda data: pytest.fail("it blocks all other clients"))
        async with running() as http:
            answer = await http.post("/sessions", content=keys)
            at = f"/sessions/{answer.json()['session']}"
            answer = await http.post(at + "/queries", content=many)
            assert (answer.status_code, "of 100000 parts, expected" in answer.json()["error"]) == (400, True)
            assert (await http.post(at + "/queries", content=query)).status_code == 200

    asyncio.run(go())


async def trickle(first=b"x", then=None):
    """Yield a body's start, and nothing more."""
    yield first
    await (then or asyncio.Event()).wait()


def test_slow_bodies_keep_nobody_waiting():
    async def go():
        client = he.Client(PLAN)
        async with running(sessions=1) as http:
            slow = [asyncio.create_task(http.post("/sessions", content=trickle())) for _ in range(20)]
            await asyncio.sleep(0)
            at = await opened(http, client)
            slow += [asyncio.create_task(http.post(at + "/queries", content=trickle())) for _ in range(20)]
            await asyncio.sleep(0)
            answer = await http.post(at + "/queries", content=client.encrypt(CALL))
            assert np.abs(client.decrypt(answer.content) - he.reference(CALL)).max() <= PLAN.error
            assert not any(task.done() for task in slow)
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)

    asyncio.run(go())


def test_a_body_that_stops_is_given_up(monkeypatch):
    async def go():
        monkeypatch.setattr(bodies, "IDLE", 0.05)
        async with running() as http:
            answer = await http.post("/sessions", content=trickle())
            assert answer.status_code == 408
            assert re.match(
                r"the body came too slowly: 1 bytes in 0 s; send it at 65536 bytes/s", answer.json()["error"]
            )

    asyncio.run(go())


class Sender:
    """A request whose body comes in parts."""

    def __init__(self, parts, pause=None, **headers):
        self.parts, self.pause = parts, pause
        self.headers = headers

    async def stream(self):
        for part in self.parts:
            if self.pause is not None:
                await asyncio.sleep(self.pause)
            yield part


def test_a_body_has_a_least_rate(monkeypatch):
    async def go():
        monkeypatch.setattr(bodies, "GRACE", 0.05)
        with pytest.raises(bodies.Refused, match="the body came too slowly"):
            async with bodies.Bodies(10**9).read(Sender(itertools.repeat(b"x", 5000), 0.001), 10**9):
                pass
        many = [bytes(2**20)] * 3  # each earns 16 s
        async with bodies.Bodies(10**9).read(Sender(many, 0.001), 10**9) as body:
            assert body == b"".join(many)

    asyncio.run(go())


def test_all_bodies_together_have_a_bound():
    async def go():
        every = bodies.Bodies(100)
        async with every.read(Sender([bytes(60)]), 100):
            assert every.held == 60
            with pytest.raises(bodies.Refused, match="the server holds 100 bytes of others' messages") as refused:
                async with every.read(Sender([bytes(60)]), 100):
                    pass
            assert refused.value.status == 503
            async with every.read(Sender([bytes(40)]), 100):
                assert every.held == 100
        assert every.held == 0
        for said in ("101", "-1", "²", "1e3", "9" * 5000):
            with pytest.raises(bodies.Refused, match="the body says it has"):
                async with every.read(Sender([], **{"content-length": said}), 100):
                    pass
        with pytest.raises(bodies.Refused, match="the body has more than 50 bytes"):
            async with every.read(Sender([bytes(30), bytes(30)]), 50):
                pass
        assert every.held == 0

    asyncio.run(go())


LISTENING = """
import sys
from refattn.he import bodies
from refattn.he.listen import listen
from refattn.he.saved import plan_from_json
from refattn.he.service import service

if __name__ == "__main__":
    bodies.IDLE = bodies.GRACE = 3600.0  # no slow body is given up before the signal
    app = service(plan_from_json(open(sys.argv[1]).read()))
    listen(app, port=0, announce=lambda url: print(url, flush=True), grace=1)
"""


def test_a_signal_ends_a_server_whatever_its_clients_do(tmp_path):
    (tmp_path / "plan.json").write_text(plan_to_json(PLAN))
    (tmp_path / "serve.py").write_text(LISTENING)
    command = [sys.executable, str(tmp_path / "serve.py"), str(tmp_path / "plan.json")]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            url = process.stdout.readline().strip()
            client = he.Client(PLAN)
            with Remote(url) as server:
                assert server.plan().digest == PLAN.digest
                server.open(client.evaluation_keys())
                assert (
                    np.abs(client.decrypt(server.attend(client.encrypt(CALL))) - he.reference(CALL)).max() <= PLAN.error
                )
                port = int(url.rsplit(":", 1)[1])
                slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
                for connection in slow:
                    connection.sendall(b"POST /sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\nx")
                server.attend(client.encrypt(CALL))  # all eight are read meanwhile
                process.send_signal(signal.SIGTERM)
                process.wait(30)  # within the second's grace, and what it takes to stop
                for connection in slow:
                    connection.close()
                server._session = None
        finally:
            process.kill()
