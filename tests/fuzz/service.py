"""What a server of encrypted attention reads: SEAL's own bytes in messages that are whole, and requests on its port."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from refattn import he
from refattn.errors import RefattnError
from refattn.he.saved import plan_to_json
from refattn.he.wire import KEYS, QUERY

from ..he import forge
from ..he.make import planned
from ..he.make import problem as small

CALL = small(4, 4, 4, epsilon=1.0)
PLAN = planned(CALL, normalize="client")
REQUESTS = (
    b"GET /plan HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"POST /sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello",
    b"POST /sessions/"
    + 64 * b"0"
    + b"/queries HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"DELETE /sessions/" + 64 * b"f" + b" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer y\r\nConnection: close\r\n\r\n",
)


class Sealed:
    """Readers of a query's ciphertexts and of evaluation keys: each input is loaded in a process of its own."""

    def __init__(self):
        client = he.Client(PLAN)
        self.keys, self.query = client.evaluation_keys(), client.encrypt(CALL)
        self.server = he.Server(PLAN, self.keys)
        self.parts = {QUERY: forge.parts_of(self.query, QUERY, PLAN), KEYS: forge.parts_of(self.keys, KEYS, PLAN)}

    def ciphertext(self, data):
        parts = [data, *self.parts[QUERY][1:]]
        apart(lambda: self.server.attend(forge.repacked(self.query, QUERY, PLAN, parts)))

    def key(self, data):
        parts = [data, *self.parts[KEYS][1:]]
        apart(lambda: he.Server(PLAN, forge.repacked(self.keys, KEYS, PLAN, parts)))


def apart(work):
    """Do something in a forked process; raise what it raises, or that it has crashed."""
    out, back = os.pipe()
    child = os.fork()
    if child == 0:
        text = b""
        try:
            signal.alarm(60)
            work()
        except RefattnError as e:
            text = b"refused: " + str(e).encode()[:500]
        except BaseException as e:
            text = f"{type(e).__name__}: {e}".encode()[:500]
        os.write(back, text)
        os._exit(0)
    os.close(back)
    with os.fdopen(out, "rb") as pipe:
        text = pipe.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise OSError(f"ended by signal {-code}" if code < 0 else f"exit code {code}")
    if text.startswith("refused: "):
        raise RefattnError(text[9:])
    if text:
        raise OSError(text)


class Port:
    """A server on a port of its own, and what it answers to bytes; its process ends with it."""

    def __init__(self, folder):
        Path(folder, "served.json").write_text(plan_to_json(PLAN))
        command = [
            sys.executable,
            "-u",
            "-m",
            "refattn",
            "he",
            "serve",
            str(Path(folder, "served.json")),
            "--port",
            "0",
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.port = int(self.process.stdout.readline().rpartition(":")[2])

    def close(self):
        self.process.terminate()
        self.process.wait(60)
        self.process.stdout.close()

    def answer(self, data):
        with socket.create_connection(("127.0.0.1", self.port), 30) as s:
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)
            s.settimeout(30)
            found = b""
            while len(found) < 2**20 and (part := s.recv(2**16)):
                found += part
        return found

    def request(self, data):
        """Send a request; whatever it is, the answer is one, and the next honest one is answered."""
        for each in (data, REQUESTS[0]):
            try:
                found = self.answer(each)
            except (BrokenPipeError, ConnectionResetError):
                found = b""
            status = found.split(b" ", 2)[1:2]
            if found and (not found.startswith(b"HTTP/1.1 ") or status[0] not in ALLOWED):
                raise OSError(f"answered {found[:200]!r}")
        if not found.startswith(b"HTTP/1.1 200"):
            raise OSError("it answers no more")


ALLOWED = {str(n).encode() for n in (200, 201, 204, 400, 401, 403, 404, 405, 408, 411, 413, 414, 429, 431, 503)}
"""No error of the server's own."""
