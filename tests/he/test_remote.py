"""What a client over HTTP reads of a server that lies, and what it shows to whom."""

import contextlib
import json
import socket
import threading
import time

import pytest

from refattn import he
from refattn.errors import InvalidInput, RefattnError, ServiceError
from refattn.he.remote import Remote
from refattn.he.saved import MOST_TEXT, plan_to_json

from .make import planned, problem

httpx = pytest.importorskip("httpx")
PLAN = planned(problem(4, 4, 4, epsilon=1.0))
NAME = "0" * 64


class Endless(httpx.SyncByteStream):
    """A body that is far too long, which notes how much of it was read."""

    def __init__(self, part=bytes(2**20), each=lambda: None, count=600):
        self.part, self.each, self.count, self.read = part, each, count, 0

    def __iter__(self):
        for _ in range(self.count):
            self.each()
            self.read += len(self.part)
            yield self.part


def remote(answer, **more):
    """Return a client of a server that answers as told; to /plan and to /sessions rightly, where it is not told."""

    def handle(request):
        found = answer(request)
        if found is not None:
            return found
        if request.url.path == "/plan":
            return httpx.Response(200, text=plan_to_json(PLAN))
        return httpx.Response(201, json={"session": NAME})

    return Remote("http://127.0.0.1", transport=httpx.MockTransport(handle), **more)


def at(path, *given, **more):
    return lambda request: httpx.Response(*given, **more) if request.url.path.endswith(path) else None


@pytest.mark.parametrize(
    ("path", "call", "most"),
    [
        ("/plan", lambda r: r.plan(), MOST_TEXT),
        ("/sessions", lambda r: r.open(b"keys"), 2**16),
        ("/queries", lambda r: (r.plan(), r.open(b"keys"), r.attend(b"query")), PLAN.reply_most),
        ("/queries", lambda r: (r.open(b"keys"), r.attend(b"query")), 2**28),
        (NAME, lambda r: (r.open(b"keys"), r.close()), 2**16),
    ],
)
@pytest.mark.parametrize("status", [200, 400, 500])
def test_an_answer_is_read_no_further_than_it_may_go(path, call, most, status):
    body = Endless()
    server = remote(lambda q: httpx.Response(status, stream=body) if q.url.path.endswith(path) else None)
    with pytest.raises(ServiceError, match=r"he: http://127.0.0.1 sends more than the \d+ bytes of such an answer"):
        call(server)
    assert body.read <= (most if status == 200 else 2**16) + 2**20


def test_an_answer_that_drips_is_given_up():
    body = Endless(b"x", lambda: time.sleep(0.001), 5000)
    server = remote(lambda q: httpx.Response(200, stream=body), seconds=0.1)
    with pytest.raises(ServiceError, match=r"took longer than 0\.1 s to answer"):
        server.plan()


@pytest.mark.parametrize(
    "body",
    [b"{}", b"[]", b"x", b'{"session":5}', b'{"session":"../../plan"}', b'{"session":null}', b"[" * 60000, b"\xff"],
)
def test_a_session_has_a_name(body):
    server = remote(at("/sessions", 201, content=body))
    with pytest.raises(ServiceError, match="he: the server opened a session without a name"):
        server.open(b"keys")
    with pytest.raises(InvalidInput, match="open a session with evaluation keys first"):
        server.attend(b"query")


@pytest.mark.parametrize("status", [204, 301, 302, 307, 404, 418, 500, 503])
def test_no_answer_leads_elsewhere(status):
    asked = []

    def answer(request):
        asked.append(request.url.host)
        return httpx.Response(status, headers={"location": "http://elsewhere/"})

    with pytest.raises(RefattnError, match=r"^he: "):
        remote(answer).plan()
    assert asked == ["127.0.0.1"]


def test_what_a_server_says_is_cut_short():
    for body in (json.dumps({"error": "x" * 60000}), "x" * 60000, "[" * 60000, "{}"):
        with pytest.raises(InvalidInput, match="he: the server refuses it \\(400\\)") as refused:
            remote(at("/plan", 400, text=body)).plan()
        assert len(str(refused.value)) < 1100


def test_a_packed_answer_is_not_unpacked():
    seen = []

    def answer(request):
        seen.append(request.headers["accept-encoding"])
        return httpx.Response(200, headers={"content-encoding": "gzip"}, stream=Endless())

    with pytest.raises(ServiceError, match="sends more than"):
        remote(answer).plan()
    assert seen == ["identity"]


def test_a_plan_may_ask_for_so_much_and_no_more():
    with pytest.raises(InvalidInput, match=r"asks for \d+ bytes of keys, expected at most most_bytes = 1000"):
        remote(lambda q: None, most_bytes=1000).plan()
    assert isinstance(remote(lambda q: None).plan(), he.Plan)


def test_a_token_is_not_sent_in_clear():
    seen = []

    def answer(request):
        seen.append(request.headers.get("authorization"))

    remote(answer, token="t" * 40).plan()
    Remote("https://elsewhere", token="t" * 40)
    Remote("http://[::1]:8000", token="t" * 40)
    assert seen == ["Bearer " + "t" * 40]
    for url in ("http://elsewhere", "http://127.0.0.1.elsewhere", "http://10.0.0.1"):
        with pytest.raises(InvalidInput, match=r"token: is not sent to http://.* in clear; use an https URL"):
            Remote(url, token="t" * 40)
    for token in ("a\nb", "ä"):
        with pytest.raises(InvalidInput, match="token: has characters that a header cannot carry"):
            Remote("https://elsewhere", token=token)


def test_heads_that_drip_are_given_up():
    """What comes before an answer's body is bounded in time, too."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(2**16)
                for _ in range(200):
                    connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        client = Remote(f"http://127.0.0.1:{server.getsockname()[1]}", seconds=0.5)
        began = time.monotonic()
        with pytest.raises(ServiceError, match=r"took longer than 0\.5 s to answer"):
            client.plan()
        assert time.monotonic() - began < 5
        with pytest.raises(ServiceError, match="is closed; make a new client"):
            client.plan()


def test_what_a_server_says_has_no_escape_codes():
    with pytest.raises(InvalidInput) as refused:
        remote(at("/plan", 400, text=json.dumps({"error": "\x1b]0;title\x07full"}))).plan()
    assert str(refused.value).endswith("]0;titlefull")
